"""Checks and runs jobs on this host: from a :class:`Job` to a :class:`JobResult`."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..errors import (
    CellblockError,
    HostOverloadedError,
    InternalError,
    UnsupportedNetworkError,
)
from ..job_network.access import Access
from ..job_network.policy import NetworkPolicy
from ..job_network.slots import JobNetwork, Slot
from ..linux import journal
from . import cgroup, files
from .admission import Admission
from .host import BoundMount, Environment, Host, JobUids
from .jail import Jail, JailSpec
from .job import Job, Stage
from .result import CollectedFile, JobResult, StageResult, Verdict, Violation, milliseconds
from .stage import StageRun

_OVERLOAD_PATIENCE_S, _OVERLOAD_PAUSE_S = 5.0, 0.1
"""How long a stage that the host has no room to start is tried again, and how often."""


@dataclass(frozen=True)
class CheckedJob:
    """A job that this host would run, and what it gets there; made by :meth:`Engine.check` only."""

    job: Job
    environment: Environment
    mounts: tuple[BoundMount, ...]
    accesses: Mapping[str, Access]
    """What each stage with a network may reach, by its name; names are resolved and pinned."""
    checked_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Run:
    """One run of a job that was admitted."""

    job_id: str
    checked: CheckedJob
    uids: JobUids
    cancelled: Callable[[], bool]


class Engine:
    """The sandbox of one host. Thread-safe: jobs wait for one another in :meth:`run`."""

    def __init__(self, host: Host) -> None:
        """Checks the host and clears what an earlier engine left behind.

        Raises :class:`HostSetupError` when a limit could not be enforced here.
        """
        self.host = host
        self._hierarchy = cgroup.detect()
        self._hierarchy.sweep()
        self._jobs_dir = host.run_dir / "jobs"
        host.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.sweep(self._jobs_dir)
        self._dev = files.make_dev(host.run_dir / "dev")
        self._network = (
            None
            if host.network is None
            else JobNetwork(host.network, host.name, host.run_dir / "network")
        )
        self._admission = Admission.of_this_host(
            host.parallel_jobs, 0 if host.network is None else host.network.slots
        )

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
        return CheckedJob(job, environment, mounts, accesses)

    def run(self, checked: CheckedJob, cancelled: Callable[[], bool] = lambda: False) -> JobResult:
        """Runs every stage of a job and returns its record; waits while the host is busy with others.

        ``cancelled`` is asked often; once it is true the job is ended and :class:`Cancelled` raised.
        """
        job, job_id = checked.job, uuid.uuid4().hex
        with self._admission.job(job, cancelled) as number:
            queue_time_ms = milliseconds(time.monotonic() - checked.checked_at)
            if checked.accesses and self._network is not None:
                # It may have waited for long.
                self._network.require_ready()
                self._network.prepare(checked.environment.path)
            try:
                stages, collected = self._run_stages(
                    _Run(job_id, checked, self.host.uids(number), cancelled)
                )
            except OSError as problem:
                raise InternalError(
                    problem.filename or "scratch",
                    f"failed: {problem.strerror}",
                    "see whether the host is out of memory, disk or descriptors",
                ) from problem
        return JobResult(
            job_id=job_id,
            name=job.name,
            environment=job.environment,
            host=self.host.name,
            labels=dict(job.labels),
            stages=stages,
            files=collected,
            queue_time_ms=queue_time_ms,
        )

    @contextlib.contextmanager
    def hold_slot(self, stage: Stage, cancelled: Callable[[], bool]) -> Iterator[Slot]:
        """A network slot with the policy of ``stage`` and nothing in it, for operators."""
        constraints = stage.constraints.within(self.host.maxima, stage.chosen, "constraints")
        stage = replace(stage, constraints=constraints)
        access = self._access_of(stage, "slot")
        if access is None or self._network is None:
            raise UnsupportedNetworkError(
                "network", "is none, which has no slot", "use another policy"
            )
        with (
            self._admission.network_slot(cancelled),
            self._network.slots.take(access, stage.constraints, cancelled) as slot,
        ):
            yield slot

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

    def _run_stages(self, run: _Run) -> tuple[tuple[StageResult, ...], tuple[CollectedFile, ...]]:
        job = run.checked.job
        results: list[StageResult] = []
        first = job.stages[0].constraints
        with files.Scratch(
            self._jobs_dir / run.job_id, run.uids.job, first.scratch_bytes, first.scratch_files
        ) as scratch:
            scratch.put(job.files)
            all_well = True
            for stage in job.stages:
                if not all_well and not stage.run_always:
                    results.append(StageResult(stage.name, Verdict.SKIPPED, stage.constraints))
                    continue
                result = self._run_stage(run, stage, scratch)
                for violation in result.violations:
                    _report(run, stage, violation)
                all_well = all_well and result.verdict is Verdict.OK
                results.append(result)
            collected = scratch.collect(job.collect)
        return tuple(results), collected

    def _run_stage(self, run: _Run, stage: Stage, scratch: files.Scratch) -> StageResult:
        """The stage's record; tried again for a while when the host has no room to start it."""
        deadline = time.monotonic() + _OVERLOAD_PATIENCE_S
        while True:
            try:
                return self._try_stage(run, stage, scratch)
            except HostOverloadedError as problem:
                if time.monotonic() >= deadline or run.cancelled():
                    return StageResult(
                        stage.name, Verdict.INTERNAL_ERROR, stage.constraints, reason=str(problem)
                    )
                time.sleep(_OVERLOAD_PAUSE_S)

    def _try_stage(self, run: _Run, stage: Stage, scratch: files.Scratch) -> StageResult:
        try:
            scratch.resize(stage.constraints.scratch_bytes, stage.constraints.scratch_files)
            group = self._hierarchy.create(
                f"{run.job_id}-{stage.name}",
                cgroup.GroupLimits(
                    memory_bytes=stage.constraints.memory_bytes,
                    processes=stage.constraints.processes + 1,  # jobinit
                    cpus=stage.constraints.cpus,
                ),
            )
            try:
                with (
                    self._slot_of(run, stage) as slot,
                    contextlib.closing(Jail(self._jail_spec(run, scratch, slot))) as jail,
                ):
                    default_path = run.checked.environment.default_path
                    return StageRun(stage, default_path, jail, group, slot, run.cancelled).run()
            finally:
                group.remove()
        except HostOverloadedError:
            raise
        except CellblockError as problem:
            # The job's other stages still have their records.
            return StageResult(
                stage.name, Verdict.INTERNAL_ERROR, stage.constraints, reason=str(problem)
            )

    def _slot_of(self, run: _Run, stage: Stage) -> contextlib.AbstractContextManager[Slot | None]:
        access = run.checked.accesses.get(stage.name)
        if access is None or self._network is None:
            return contextlib.nullcontext()
        return self._network.slots.take(access, stage.constraints, run.cancelled)

    def _jail_spec(self, run: _Run, scratch: files.Scratch, slot: Slot | None) -> JailSpec:
        return JailSpec(
            nsjail=self.host.nsjail,
            jobinit=self.host.jobinit,
            root=run.checked.environment.path,
            dev=self._dev,
            work=scratch.work,
            tmp=scratch.tmp,
            uids=run.uids,
            mounts=run.checked.mounts,
            namespace=None if slot is None else slot.namespace,
            files=() if slot is None else slot.files,
        )


def _report(run: _Run, stage: Stage, violation: Violation) -> None:
    """Tells the journal of a limit that was hit."""
    job = run.checked.job
    journal.send(
        f"job {job.name} ({run.job_id}), stage {stage.name}: {violation.limit} "
        f"allowed {violation.allowed}, seen {violation.seen} ({violation.evidence})",
        event="limit_exceeded",
        job_id=run.job_id,
        job=job.name,
        stage=stage.name,
        environment=job.environment,
        limit=violation.limit,
        allowed=violation.allowed,
        seen=violation.seen,
        evidence=violation.evidence,
        labels=json.dumps(dict(job.labels), sort_keys=True),
    )
