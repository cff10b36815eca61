"""Checks and runs jobs on this host: from a :class:`Job` to its record."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from ..errors import InternalError, UnsupportedNetworkError
from ..job_network.access import Access
from ..job_network.policy import NetworkPolicy
from ..job_network.slots import JobNetwork, Slot
from .admission import Admission
from .contained import WorkerContainer
from .host import BoundMount, Environment, Host
from .job import Job, Stage, Target
from .result import milliseconds
from .runner import AdmittedJob
from .tasks import settled
from .workers import Record, Workers

T = TypeVar("T")


@dataclass(frozen=True)
class CheckedJob:
    """A job that this host would run, and what it gets there; made by :meth:`Engine.check` only."""

    job: Job
    environment: Environment
    mounts: tuple[BoundMount, ...]
    accesses: Mapping[str, Access]
    """What each stage with a network may reach, by its name; names are resolved and pinned."""
    worker: WorkerContainer | None = None
    checked_at: float = field(default_factory=time.monotonic)


class Engine:
    """The sandbox of one host: who may run what, and when. For one event loop; :meth:`check` is for any thread."""

    def __init__(self, host: Host, workers: Workers) -> None:
        """``workers`` run the jobs."""
        self.host = host
        self._workers = workers
        self._network = (
            None
            if host.network is None
            else JobNetwork(host.network, host.name, host.run_dir / "network")
        )
        self._admission = Admission.of_this_host(
            host.parallel_jobs, 0 if host.network is None else host.network.slots
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(4, "engine")

    def reconfigure(self, host: Host) -> bool:
        """Takes over what jobs are denied from another configuration of this host, without ending any; False,
        and nothing is taken over, where the two differ in more: that takes a restart.
        """
        if self._network is None or host.network is None or self.host.network is None:
            return host == self.host
        if replace(host, network=self.host.network) != self.host:
            return False
        if not self._network.reconfigure(host.network):
            return False
        self.host = host
        return True

    def check(self, job: Job) -> CheckedJob:
        """``job`` as :meth:`run` takes it; starts and writes nothing.

        Raises :class:`UnknownEnvironmentError`, :class:`LimitAboveMaximumError` or another of
        ``errors.BAD_INPUT`` where this host would not run it.
        """
        accesses: dict[str, Access] = {}
        stages: list[Stage] = []
        for index, stage in enumerate(job.stages):
            where = f"stages[{index}]"
            constraints = stage.constraints.within(
                self.host.maxima, stage.chosen, f"{where}.constraints"
            )
            stages.append(replace(stage, constraints=constraints))
            access = self._access_of(stage, where)
            if access is not None:
                accesses[stage.name] = access
        job = replace(job, stages=tuple(stages))
        self._admission.refuse_impossible(job)
        environment = self.host.environment(job.environment)
        mounts = self.host.bind((*environment.mounts, *job.mounts))
        if accesses and self._network is not None:
            self._network.require_ready()
        worker = None
        if job.target is Target.WORKER_CONTAINER:
            worker = WorkerContainer.load(
                self.host.worker_container_file, self.host.name, self.host.parallel_jobs
            )
        return CheckedJob(job, environment, mounts, accesses, worker)

    def admit_only(self, may_run: Callable[[int], bool]) -> None:
        """From now on a user's jobs are started only while ``may_run`` says so of the uid."""
        self._admission.admit_only(may_run)

    def admit(self) -> None:
        """To be called when ``may_run`` may have changed its mind."""
        self._admission.admit()

    async def parse(self, line: Path, contents: Path) -> bytes:
        """Takes a request apart that is not small: see :func:`cellblock.engine.request.parse_file`."""
        return await self._workers.parse(line, contents)

    async def run(self, checked: CheckedJob, uid: int, record: Path) -> Record:
        """Runs every stage of a job and returns its record, which is in the file ``record`` if it is large; waits
        while the host is busy with others. Whoever is cancelled ends the job.
        """
        job_id = uuid.uuid4().hex
        async with self._admission.job(checked.job, uid) as number:
            queue_time_ms = milliseconds(time.monotonic() - checked.checked_at)
            if checked.accesses:
                await self._in_thread(lambda: self._prepare_network(checked.environment))
            admitted = AdmittedJob(
                job_id=job_id,
                job=checked.job,
                environment=checked.environment,
                mounts=checked.mounts,
                uids=(checked.worker or self.host).uids(number),
                networked=frozenset(checked.accesses),
                queue_time_ms=queue_time_ms,
                worker=checked.worker,
            )
            return await self._workers.run(
                admitted, record, lambda stage, cancelled: self._slot(checked, stage, cancelled)
            )

    @contextlib.asynccontextmanager
    async def hold_slot(self, stage: Stage, uid: int) -> AsyncIterator[Slot]:
        """A network slot with the policy of ``stage`` and nothing in it, for operators."""
        constraints = stage.constraints.within(self.host.maxima, stage.chosen, "constraints")
        stage = replace(stage, constraints=constraints)
        access = self._access_of(stage, "slot")
        if access is None or self._network is None:
            raise UnsupportedNetworkError(
                "network", "is none, which has no slot", "use another policy"
            )
        async with self._admission.network_slot(uid):
            taken = self._network.slots.take(access, stage.constraints, lambda: False)
            taking = asyncio.ensure_future(self._in_thread(taken.__enter__))
            try:
                yield await asyncio.shield(taking)
            finally:
                await settled([taking])
                if taking.exception() is None:
                    await self._in_thread(lambda: taken.__exit__(None, None, None))

    def _prepare_network(self, environment: Environment) -> None:
        if self._network is not None:
            # It may have waited for long.
            self._network.require_ready()
            self._network.prepare(environment.path)

    def _slot(
        self, checked: CheckedJob, stage_name: str, cancelled: Callable[[], bool]
    ) -> contextlib.AbstractContextManager[Slot]:
        (stage,) = (s for s in checked.job.stages if s.name == stage_name)
        if self._network is None:
            raise InternalError(stage_name, "has no network", "restart cellblock.service")
        owner = None if checked.worker is None else checked.worker.pid()
        return self._network.slots.take(
            checked.accesses[stage_name], stage.constraints, cancelled, owner
        )

    def _access_of(self, stage: Stage, where: str) -> Access | None:
        if stage.network is NetworkPolicy.NONE:
            return None
        if self._network is None:
            raise UnsupportedNetworkError(
                f"{where}.network",
                f"is {stage.network.value!r}, but {self.host.name} has no job networks",
                "use none",
            )
        return self._network.access(stage.network, stage.network_allow, where)

    async def _in_thread(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, act)
