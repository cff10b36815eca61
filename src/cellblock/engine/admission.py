"""Who may run now: the host's uids for jobs, CPUs, memory and network slots, first come, first served."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..errors import Cancelled, LimitAboveMaximumError
from ..job_network.policy import NetworkPolicy
from .job import Job

_POLL_S = 0.25
"""How often a waiting job looks whether it is still wanted."""
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


@dataclass
class _Ticket:
    demand: Demand
    is_job: bool = True
    called: threading.Event = field(default_factory=threading.Event)
    number: int = -1


class Admission:
    """Lets so many jobs run at a time, in the order of their arrival, as there are numbers (of a pair
    of uids each), CPUs, memory and network slots for them."""

    def __init__(
        self, parallel_jobs: int, cpus: float, memory_bytes: int, network_slots: int = 0
    ) -> None:
        self._lock = threading.Lock()
        self._numbers = list(range(parallel_jobs))
        self._cpus = self._cpus_in_all = cpus
        self._memory = self._memory_in_all = memory_bytes
        self._network_slots = network_slots
        self._queue: deque[_Ticket] = deque()

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

    def refuse_impossible(self, job: Job) -> None:
        """Raises :class:`LimitAboveMaximumError` for a job that could never be admitted."""
        demand = Demand.of(job)
        if demand.memory_bytes > self._memory_in_all:
            raise LimitAboveMaximumError(
                "memory_bytes",
                f"is {demand.memory_bytes}, this host has {self._memory_in_all} for all jobs together",
                "ask for less, or run the job on a larger host",
            )

    @contextlib.contextmanager
    def job(self, job: Job, cancelled: Callable[[], bool]) -> Iterator[int]:
        """Waits until ``job`` may run and yields the number that it alone has then, from 0.

        Raises :class:`Cancelled` while waiting.
        """
        demand = Demand.of(job)
        # More CPUs than there are cannot be used, only waited for.
        demand = dataclasses.replace(demand, cpus=min(demand.cpus, self._cpus_in_all))
        with self._admit(_Ticket(demand), cancelled) as ticket:
            yield ticket.number

    @contextlib.contextmanager
    def network_slot(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Waits for a network slot alone, in the same queue."""
        with self._admit(_Ticket(NETWORK_SLOT, is_job=False), cancelled):
            yield

    @contextlib.contextmanager
    def _admit(self, ticket: _Ticket, cancelled: Callable[[], bool]) -> Iterator[_Ticket]:
        with self._lock:
            self._queue.append(ticket)
            self._call()
        try:
            while not ticket.called.wait(_POLL_S):
                if cancelled():
                    raise Cancelled
            yield ticket
        finally:
            with self._lock:
                if ticket.called.is_set():
                    if ticket.is_job:
                        self._numbers.append(ticket.number)
                    self._cpus += ticket.demand.cpus
                    self._memory += ticket.demand.memory_bytes
                    self._network_slots += ticket.demand.network_slots
                else:
                    self._queue.remove(ticket)
                self._call()

    def _call(self) -> None:
        """Admits from the head of the queue what fits; nobody overtakes, so nobody starves."""
        while self._queue:
            ticket = self._queue[0]
            demand = ticket.demand
            if (
                (ticket.is_job and not self._numbers)
                or demand.cpus > self._cpus
                or demand.memory_bytes > self._memory
                or demand.network_slots > self._network_slots
            ):
                return
            self._queue.popleft()
            if ticket.is_job:
                ticket.number = self._numbers.pop(0)
            self._cpus -= demand.cpus
            self._memory -= demand.memory_bytes
            self._network_slots -= demand.network_slots
            ticket.called.set()
