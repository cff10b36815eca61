"""Runs one job in the process that it is called in: from a job that was checked and admitted to its record."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import CellblockError, HostOverloadedError, InternalError, WorkerLostError
from ..linux import journal
from . import cgroup, files
from .contained import WorkerContainer
from .host import BoundMount, Environment, Host, JobUids
from .jail import Jail, JailSpec
from .job import Job, Stage
from .result import CollectedFile, JobResult, StageResult, Verdict, Violation
from .stage import StageNetwork, StageRun

_OVERLOAD_PATIENCE_S, _OVERLOAD_PAUSE_S = 5.0, 0.1
"""How long a stage that the host has no room to start is tried again, and how often."""
_WORKER_PATIENCE_S = 15.0
"""Likewise one whose worker container is not there: it is made anew within a second or two."""


@dataclass(frozen=True)
class AdmittedJob:
    """A job that may run now, and what it gets of the host."""

    job_id: str
    job: Job
    environment: Environment
    mounts: tuple[BoundMount, ...]
    uids: JobUids
    networked: frozenset[str]
    """The stages that have a network."""
    queue_time_ms: float
    worker: WorkerContainer | None = None
    """What it runs in, where it is not the host itself."""


class Slots(Protocol):
    """Where the network slots of stages come from."""

    def take(self, stage: str) -> contextlib.AbstractContextManager[StageNetwork]:
        """The slot for the job's stage of that name, open while the context lasts."""


@dataclass(frozen=True)
class _Run:
    admitted: AdmittedJob
    slots: Slots
    cancelled: Callable[[], bool]
    report: bool

    @property
    def job(self) -> Job:
        return self.admitted.job


class Runner:
    """What is the same for all jobs of a host."""

    def __init__(self, host: Host) -> None:
        """Checks the host and clears what an earlier one left behind.

        Raises :class:`HostSetupError` when a limit could not be enforced here.
        """
        self._host = host
        self._hierarchy = cgroup.detect()
        self._hierarchy.sweep()
        self._jobs_dir = host.run_dir / "jobs"
        host.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.sweep(self._jobs_dir)
        self._dev = files.make_dev(host.run_dir / "dev")

    def bound_memory(self, memory_bytes: int) -> None:
        """Bounds what this process and those that it starts use, jobs apart."""
        self._hierarchy.bound_supervisor(memory_bytes)

    def run(
        self,
        admitted: AdmittedJob,
        slots: Slots,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        report: bool = True,
    ) -> JobResult:
        """Runs every stage and returns the record; with ``report``, the journal is told of limits that were hit.

        ``cancelled`` is asked often; once it is true the job is ended and :class:`Cancelled` raised.
        """
        try:
            stages, collected = self._run_stages(_Run(admitted, slots, cancelled, report))
        except OSError as problem:
            raise InternalError(
                problem.filename or "scratch",
                f"failed: {problem.strerror}",
                "see whether the host is out of memory, disk or descriptors",
            ) from problem
        job = admitted.job
        return JobResult(
            job_id=admitted.job_id,
            name=job.name,
            environment=job.environment,
            host=self._host.name,
            labels=dict(job.labels),
            stages=stages,
            files=collected,
            queue_time_ms=admitted.queue_time_ms,
            target=job.target,
            runtime=None if admitted.worker is None else admitted.worker.runtime,
            is_boundary=admitted.worker is None or admitted.worker.is_boundary,
        )

    def clear(self, admitted: AdmittedJob) -> None:
        """Ends and removes what is left of a job whose runner was killed; returns when it is gone."""
        self._hierarchy.sweep(f"{admitted.job_id}-")
        files.remove_scratch(self._jobs_dir / admitted.job_id)

    def _run_stages(self, run: _Run) -> tuple[tuple[StageResult, ...], tuple[CollectedFile, ...]]:
        job = run.job
        results: list[StageResult] = []
        first = job.stages[0].constraints
        with files.Scratch(
            self._jobs_dir / run.admitted.job_id,
            run.admitted.uids.job,
            first.scratch_bytes,
            first.scratch_files,
        ) as scratch:
            scratch.put(job.files)
            all_well = True
            for stage in job.stages:
                if not all_well and not stage.run_always:
                    results.append(StageResult(stage.name, Verdict.SKIPPED, stage.constraints))
                    continue
                result = self._run_stage(run, stage, scratch)
                for violation in result.violations if run.report else ():
                    _report(run, stage, violation)
                all_well = all_well and result.verdict is Verdict.OK
                results.append(result)
            collected = scratch.collect(job.collect)
        return tuple(results), collected

    def _run_stage(self, run: _Run, stage: Stage, scratch: files.Scratch) -> StageResult:
        """The stage's record; tried again for a while when the host has no room to start it, or no worker."""
        began = time.monotonic()
        reason: CellblockError
        while True:
            try:
                return self._try_stage(run, stage, scratch)
            except HostOverloadedError as problem:
                verdict, patience_s, reason = Verdict.INTERNAL_ERROR, _OVERLOAD_PATIENCE_S, problem
            except WorkerLostError as problem:
                verdict, patience_s, reason = Verdict.WORKER_LOST, _WORKER_PATIENCE_S, problem
            if time.monotonic() >= began + patience_s or run.cancelled():
                return StageResult(stage.name, verdict, stage.constraints, reason=str(reason))
            time.sleep(_OVERLOAD_PAUSE_S)

    def _try_stage(self, run: _Run, stage: Stage, scratch: files.Scratch) -> StageResult:
        try:
            scratch.resize(stage.constraints.scratch_bytes, stage.constraints.scratch_files)
            group = self._hierarchy.create(
                f"{run.admitted.job_id}-{stage.name}",
                cgroup.GroupLimits(
                    memory_bytes=stage.constraints.memory_bytes,
                    processes=stage.constraints.processes + 1,  # jobinit
                    cpus=stage.constraints.cpus,
                ),
            )
            try:
                with (
                    _slot_of(run, stage) as slot,
                    contextlib.closing(self._jail(run, scratch, slot)) as jail,
                ):
                    default_path = run.admitted.environment.default_path
                    return StageRun(
                        stage,
                        default_path,
                        jail,
                        group,
                        slot,
                        run.cancelled,
                        contained=run.admitted.worker is not None,
                    ).run()
            finally:
                group.remove()
        except (HostOverloadedError, WorkerLostError):
            raise
        except CellblockError as problem:
            # The job's other stages still have their records.
            return StageResult(
                stage.name, Verdict.INTERNAL_ERROR, stage.constraints, reason=str(problem)
            )

    def _jail(self, run: _Run, scratch: files.Scratch, slot: StageNetwork | None) -> Jail:
        spec = self._jail_spec(run, scratch, slot)
        worker = run.admitted.worker
        if worker is None:
            return Jail(spec)
        try:
            jail = Jail(spec, worker.start)
        except InternalError as problem:
            raise WorkerLostError(
                "worker container", f"starts no jail: {problem}", "see its journal"
            ) from None
        try:
            worker.require_own(jail)
        except BaseException:
            jail.close()
            raise
        return jail

    def _jail_spec(self, run: _Run, scratch: files.Scratch, slot: StageNetwork | None) -> JailSpec:
        return JailSpec(
            nsjail=self._host.nsjail,
            jobinit=self._host.jobinit,
            root=run.admitted.environment.path,
            dev=self._dev,
            work=scratch.work,
            tmp=scratch.tmp,
            uids=run.admitted.uids,
            mounts=run.admitted.mounts,
            namespace=None if slot is None else slot.namespace,
            files=() if slot is None else tuple(slot.files),
        )


def _slot_of(run: _Run, stage: Stage) -> contextlib.AbstractContextManager[StageNetwork | None]:
    if stage.name not in run.admitted.networked:
        return contextlib.nullcontext()
    return run.slots.take(stage.name)


def _report(run: _Run, stage: Stage, violation: Violation) -> None:
    """Tells the journal of a limit that was hit."""
    job = run.job
    journal.send(
        f"job {job.name} ({run.admitted.job_id}), stage {stage.name}: {violation.limit} "
        f"allowed {violation.allowed}, seen {violation.seen} ({violation.evidence})",
        event="limit_exceeded",
        job_id=run.admitted.job_id,
        job=job.name,
        stage=stage.name,
        environment=job.environment,
        limit=violation.limit,
        allowed=violation.allowed,
        seen=violation.seen,
        evidence=violation.evidence,
        labels=json.dumps(dict(job.labels), sort_keys=True),
    )
