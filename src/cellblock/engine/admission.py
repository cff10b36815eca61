"""Who may run now: the host's uids for jobs, CPUs, memory and network slots, users in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ..errors import LimitAboveMaximumError
from ..job_network.policy import NetworkPolicy
from .job import Job
from .turns import Turns

MEMORY_FOR_THE_HOST = 0.1
"""Part of the host's memory that jobs never get."""


@dataclass(frozen=True)
class Demand:
    """What a job occupies while it runs: the most that any of its stages may use.

    What an earlier stage left in the scratch is charged to that stage, so it comes on top.
    """

    cpus: float
    memory_bytes: int
    network_slots: int = 0
    """A job has one at a time, whatever the number of its stages."""

    @classmethod
    def of(cls, job: Job) -> Demand:
        return cls(
            cpus=max(stage.constraints.cpus for stage in job.stages),
            memory_bytes=max(stage.constraints.memory_bytes for stage in job.stages)
            + max((stage.constraints.scratch_bytes for stage in job.stages[:-1]), default=0),
            network_slots=int(any(s.network is not NetworkPolicy.NONE for s in job.stages)),
        )


NETWORK_SLOT = Demand(cpus=0.0, memory_bytes=0, network_slots=1)
"""Just that, for operators who look into one."""


@dataclass(eq=False)
class _Share:
    demand: Demand
    is_job: bool = True
    number: int = -1


class Admission:
    """Lets so many jobs run at a time as there are numbers (of a pair of uids each), CPUs, memory and network
    slots for them: users in turn, and each user's in the order of their arrival. For one event loop."""

    def __init__(
        self, parallel_jobs: int, cpus: float, memory_bytes: int, network_slots: int = 0
    ) -> None:
        self._numbers = list(range(parallel_jobs))
        self._cpus = self._cpus_in_all = cpus
        self._memory = self._memory_in_all = memory_bytes
        self._network_slots = network_slots
        self._turns: Turns[_Share] = Turns(self._fits, self._take, self._give)

    @classmethod
    def of_this_host(cls, parallel_jobs: int, network_slots: int = 0) -> Admission:
        """All CPUs of this host, and its memory less :data:`MEMORY_FOR_THE_HOST`."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(
            parallel_jobs,
            float(len(os.sched_getaffinity(0))),
            int(memory * (1 - MEMORY_FOR_THE_HOST)),
            network_slots,
        )

    def admit_only(self, may: Callable[[int], bool]) -> None:
        """Passes over users of whom ``may`` says no; :meth:`admit` looks again."""
        self._turns.may = may

    def admit(self) -> None:
        """Admits who fits, now that something has changed outside of here."""
        self._turns.call()

    def refuse_impossible(self, job: Job) -> None:
        """Raises :class:`LimitAboveMaximumError` for a job that could never be admitted."""
        demand = Demand.of(job)
        if demand.memory_bytes > self._memory_in_all:
            raise LimitAboveMaximumError(
                "memory_bytes",
                f"is {demand.memory_bytes}, this host has {self._memory_in_all} for all jobs together",
                "ask for less, or run the job on a larger host",
            )

    @contextlib.asynccontextmanager
    async def job(self, job: Job, uid: int) -> AsyncIterator[int]:
        """Waits until ``job``, of the user ``uid``, may run, and yields the number that it alone has then, from 0."""
        demand = Demand.of(job)
        # More CPUs than there are cannot be used, only waited for.
        demand = dataclasses.replace(demand, cpus=min(demand.cpus, self._cpus_in_all))
        async with self._turns.share(uid, _Share(demand)) as share:
            yield share.number

    @contextlib.asynccontextmanager
    async def network_slot(self, uid: int) -> AsyncIterator[None]:
        """Waits for a network slot alone, in the same queue."""
        async with self._turns.share(uid, _Share(NETWORK_SLOT, is_job=False)):
            yield

    def _fits(self, share: _Share) -> bool:
        demand = share.demand
        return (
            (bool(self._numbers) or not share.is_job)
            and demand.cpus <= self._cpus
            and demand.memory_bytes <= self._memory
            and demand.network_slots <= self._network_slots
        )

    def _take(self, share: _Share) -> None:
        if share.is_job:
            share.number = self._numbers.pop(0)
        self._change(share.demand, -1)

    def _give(self, share: _Share) -> None:
        if share.is_job:
            self._numbers.append(share.number)
        self._change(share.demand, 1)

    def _change(self, demand: Demand, sign: int) -> None:
        self._cpus += sign * demand.cpus
        self._memory += sign * demand.memory_bytes
        self._network_slots += sign * demand.network_slots
