"""Runs a job: one public function, :meth:`Engine.run`, from a :class:`Job` to a :class:`JobResult`.

The record is composed here, outside the jail, from four first-hand sources: the wait status that
jobinit reports, this process's monotonic clock, the stage's own cgroup, and byte-capped pipes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import (
    CellblockError,
    HostOverloadedError,
    HostSetupError,
    InternalError,
    UnsupportedNetworkError,
)
from ..job_network.network import Access
from ..job_network.slots import JobNetwork, Slot, Traffic
from ..linux import journal
from . import cgroup, files
from .admission import Admission, Cancelled
from .host import Environment, Host
from .jail import Begun, Ended, Failed, Gone, Jail, JailSpec
from .job import Job, NetworkPolicy, Stage
from .limits import StageConstraints
from .result import CollectedFile, JobResult, Output, StageResult, Usage, Verdict, Violation

KILL_GRACE_S = 0.5
"""How long jobinit may take to end everything and report before it is killed itself."""
_NETWORK_CHECK_S = 0.1
"""How often a running stage's byte quota is looked at; the quota itself holds to the packet."""
_OVERLOAD_PATIENCE_S, _OVERLOAD_PAUSE_S = 5.0, 0.1
"""How long a stage that the host has no room to start is tried again, and how often."""
_READ_SIZE = 65_536
_DEVICES = ("null", "zero", "full", "random", "urandom")
_MS_RDONLY, _MS_NOSUID, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 8, 32, 4096


class Engine:
    """The sandbox of one host. Thread-safe: every concurrent :meth:`run` takes a slot."""

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
        self._dev = _make_dev(host.run_dir / "dev")
        self._network = None if host.network is None else JobNetwork(host.network, host)
        self._admission = Admission.of_this_host(
            host.slots, 0 if host.network is None else host.network.slots
        )

    def run(self, job: Job, cancelled: Callable[[], bool] = lambda: False) -> JobResult:
        """Runs every stage of ``job`` and returns its record; waits while all slots are taken.

        ``cancelled`` is asked often; once it is true the job is ended and :class:`Cancelled` raised.
        Raises :class:`UnknownEnvironmentError`, :class:`LimitAboveMaximumError` or
        :class:`InvalidJobError` before anything is started.
        """
        environment, access = self._check(job)
        job_id = uuid.uuid4().hex
        queued = time.monotonic()
        with self._admission.slot(job, cancelled) as slot:
            queue_time_ms = _milliseconds(time.monotonic() - queued)
            if access and self._network is not None:
                # It may have waited for long.
                self._network.check()
            try:
                stages, collected = _JobRun(
                    self, job, job_id, environment, slot, access, cancelled
                ).run()
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

    def check(self, job: Job) -> Environment:
        """The job's environment if this host would run the job; else raises as :meth:`run`."""
        return self._check(job)[0]

    @contextlib.contextmanager
    def hold_slot(self, stage: Stage, cancelled: Callable[[], bool]) -> Iterator[Slot]:
        """A network slot with the policy of ``stage`` and nothing in it, for operators."""
        stage.constraints.check_maxima(self.host.maxima, "constraints")
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

    def _check(self, job: Job) -> tuple[Environment, dict[str, Access]]:
        """The environment, and what each stage with a network may reach."""
        accesses: dict[str, Access] = {}
        for index, stage in enumerate(job.stages):
            where = f"stages[{index}]"
            stage.constraints.check_maxima(self.host.maxima, f"{where}.constraints")
            access = self._access_of(stage, where)
            if access is not None:
                accesses[stage.name] = access
        self._admission.check(job)
        environment = self.host.environment(job.environment)
        self.host.bind((*environment.mounts, *job.mounts))
        if accesses and self._network is not None:
            self._network.check()
            self._network.prepare(environment)
        return environment, accesses

    def _access_of(self, stage: Stage, where: str) -> Access | None:
        if stage.network is NetworkPolicy.NONE:
            return None
        if self._network is None:
            raise UnsupportedNetworkError(
                f"{where}.network",
                f"is {stage.network.value!r}, but {self.host.name} has no job networks",
                "use none",
            )
        return self._network.access(stage, where)


class _JobRun:
    """One job in its slot."""

    def __init__(
        self,
        engine: Engine,
        job: Job,
        job_id: str,
        environment: Environment,
        slot: int,
        accesses: Mapping[str, Access],
        cancelled: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._accesses = accesses
        self._job = job
        self._job_id = job_id
        self._environment = environment
        self._first_id = engine.host.first_id + 2 * slot
        self._cancelled = cancelled

    def run(self) -> tuple[tuple[StageResult, ...], tuple[CollectedFile, ...]]:
        results: list[StageResult] = []
        first = self._job.stages[0].constraints
        with files.Scratch(
            self._engine._jobs_dir / self._job_id,
            self._first_id + 1,
            first.scratch_bytes,
            first.scratch_files,
        ) as scratch:
            scratch.put(self._job.files)
            all_well = True
            for stage in self._job.stages:
                if not all_well and not stage.run_always:
                    results.append(StageResult(stage.name, Verdict.SKIPPED, stage.constraints))
                    continue
                result = self._run_stage(stage, scratch)
                self._report_violations(result)
                all_well = all_well and result.verdict is Verdict.OK
                results.append(result)
            collected = scratch.collect(self._job.collect)
        return tuple(results), collected

    def _report_violations(self, result: StageResult) -> None:
        for violation in result.violations:
            journal.send(
                f"job {self._job.name} ({self._job_id}), stage {result.name}: {violation.limit} "
                f"allowed {violation.allowed}, seen {violation.seen} ({violation.evidence})",
                event="limit_exceeded",
                job_id=self._job_id,
                job=self._job.name,
                stage=result.name,
                environment=self._job.environment,
                limit=violation.limit,
                allowed=violation.allowed,
                seen=violation.seen,
                evidence=violation.evidence,
                labels=json.dumps(dict(self._job.labels), sort_keys=True),
            )

    def _run_stage(self, stage: Stage, scratch: files.Scratch) -> StageResult:
        """The stage's record; tried again as long as the host has no room to start it."""
        deadline = time.monotonic() + _OVERLOAD_PATIENCE_S
        while True:
            try:
                return self._try_stage(stage, scratch)
            except HostOverloadedError as problem:
                if time.monotonic() >= deadline or self._cancelled():
                    return StageResult(
                        stage.name, Verdict.INTERNAL_ERROR, stage.constraints, reason=str(problem)
                    )
                time.sleep(_OVERLOAD_PAUSE_S)

    def _try_stage(self, stage: Stage, scratch: files.Scratch) -> StageResult:
        try:
            scratch.resize(stage.constraints.scratch_bytes, stage.constraints.scratch_files)
            group = self._engine._hierarchy.create(
                f"{self._job_id}-{stage.name}",
                cgroup.GroupLimits(
                    memory_bytes=stage.constraints.memory_bytes,
                    processes=stage.constraints.processes + 1,  # jobinit
                    cpus=stage.constraints.cpus,
                ),
            )
            try:
                with (
                    self._slot_of(stage) as network,
                    contextlib.closing(Jail(self._jail_spec(scratch, network))) as jail,
                ):
                    return _StageRun(
                        stage, self._environment, jail, group, network, self._cancelled
                    ).run()
            finally:
                group.remove()
        except HostOverloadedError:
            raise
        except CellblockError as problem:
            # The job's other stages still have their records.
            return StageResult(
                stage.name, Verdict.INTERNAL_ERROR, stage.constraints, reason=str(problem)
            )

    def _slot_of(self, stage: Stage) -> contextlib.AbstractContextManager[Slot | None]:
        access, network = self._accesses.get(stage.name), self._engine._network
        if access is None or network is None:
            return contextlib.nullcontext()
        return network.slots.take(access, stage.constraints, self._cancelled)

    def _jail_spec(self, scratch: files.Scratch, network: Slot | None) -> JailSpec:
        host = self._engine.host
        return JailSpec(
            nsjail=host.nsjail,
            jobinit=host.jobinit,
            root=self._environment.path,
            dev=self._engine._dev,
            work=scratch.work,
            tmp=scratch.tmp,
            first_id=self._first_id,
            mounts=host.bind((*self._environment.mounts, *self._job.mounts)),
            namespace=None if network is None else network.namespace,
            files=() if network is None else network.files,
        )


@dataclass
class _Pipe:
    """The supervisor's end of a job's stdout or stderr."""

    limit: str
    allowed: int
    fd: int
    data: bytearray = field(default_factory=bytearray)
    seen: int = 0

    def read(self) -> bool:
        """Takes what is there; False at end of file. Bytes beyond the cap are counted only."""
        chunk = os.read(self.fd, _READ_SIZE)
        self.seen += len(chunk)
        self.data += chunk[: max(0, self.allowed - len(self.data))]
        return bool(chunk)

    @property
    def over(self) -> bool:
        return self.seen > self.allowed

    def output(self) -> Output:
        return Output(bytes(self.data), truncated=self.over)


class _StageRun:
    """One stage in its jail and its cgroup."""

    def __init__(
        self,
        stage: Stage,
        environment: Environment,
        jail: Jail,
        group: cgroup.Group,
        network: Slot | None,
        cancelled: Callable[[], bool],
    ) -> None:
        self._network = network
        self._network_check_at = time.monotonic() + _NETWORK_CHECK_S
        self._stage = stage
        self._environment = environment
        self._jail = jail
        self._group = group
        self._cancelled = cancelled
        self._violations: dict[str, Violation] = {}
        self._kill_deadline: float | None = None
        self._ended_at = 0.0

    def run(self) -> StageResult:
        constraints = self._stage.constraints
        with contextlib.ExitStack() as stack:
            pipes = self._start(stack)
            started = time.monotonic()
            ended = self._watch(pipes, started)
            wall_time_s = self._ended_at - started
        if self._cancelled():
            raise Cancelled
        io = self._jail.io() if isinstance(ended, Ended) else None
        usage = self._group.usage()
        self._add_group_violations(usage)
        traffic = None if self._network is None else self._network.traffic()
        if traffic is not None:
            self._add_network_violations(traffic)
        result = _Outcome.of(
            ended, bool(self._violations), constraints, self._violations, self._jail
        )
        return StageResult(
            name=self._stage.name,
            verdict=result.verdict,
            constraints=constraints,
            exit_code=result.exit_code,
            signal=result.signal,
            reason=result.reason,
            violations=tuple(self._violations.values()),
            stdout=pipes[0].output(),
            stderr=pipes[1].output(),
            usage=_usage(wall_time_s, usage, ended, io, traffic),
        )

    def _start(self, stack: contextlib.ExitStack) -> tuple[_Pipe, _Pipe]:
        """Puts jobinit into the group, then starts the program: nothing of it runs uncounted."""
        constraints = self._stage.constraints
        self._group.attach(self._jail.pid)
        # While the program forks, jobinit has the score that the job inherits; afterwards jobinit
        # goes back to 0, so that the OOM killer takes the job and never its init.
        _set_oom_score(self._jail.pid, 1000)
        stdin = _input(self._stage.stdin)
        stack.callback(os.close, stdin)
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        pipes = (
            _Pipe("stdout_bytes", constraints.stdout_bytes, ends[0][0]),
            _Pipe("stderr_bytes", constraints.stderr_bytes, ends[1][0]),
        )
        for pipe in pipes:
            stack.callback(os.close, pipe.fd)
        try:
            self._jail.begin(
                command=self._stage.command,
                working_directory=os.path.normpath(f"/work/{self._stage.working_directory}"),
                environment_variables={
                    "PATH": self._environment.default_path,
                    "HOME": "/work",
                    "TMPDIR": "/tmp",
                    "LANG": "C.UTF-8",
                    **self._stage.environment_variables,
                },
                constraints=constraints,
                stdio=(stdin, ends[0][1], ends[1][1]),
            )
        finally:
            for _, theirs in ends:
                os.close(theirs)
        return pipes

    def _watch(self, pipes: tuple[_Pipe, _Pipe], started: float) -> Ended | Failed | Gone:
        """Until jobinit has reported and both pipes are at their end."""
        report: Ended | Failed | Gone | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._jail, selectors.EVENT_READ, None)
            for pipe in pipes:
                selector.register(pipe.fd, selectors.EVENT_READ, pipe)
            drained_by = float("inf")
            # Whatever holds a pipe longer than that is not of this jail (a descriptor can leave it
            # through a writable mount); what was written so far is there.
            while report is None or (selector.get_map() and time.monotonic() < drained_by):
                for key, _ in selector.select(self._next_check_s(started)):
                    if isinstance(key.data, _Pipe):
                        if not key.data.read():
                            selector.unregister(key.fd)
                        continue
                    event = self._jail.event()
                    if isinstance(event, Begun):
                        _set_oom_score(self._jail.pid, 0)
                        continue
                    report = event
                    self._ended_at = time.monotonic()
                    self._check_wall_time(started, self._ended_at)
                    drained_by = self._ended_at + KILL_GRACE_S
                    selector.unregister(self._jail)
                if report is None:
                    self._check_limits(pipes, started)
        self._check_outputs(pipes)
        return report

    def _next_check_s(self, started: float) -> float:
        """How long nothing can happen that this supervisor must see by itself."""
        now = time.monotonic()
        if self._kill_deadline is not None:
            return max(0.0, self._kill_deadline - now)
        constraints = self._stage.constraints
        wall_left = started + constraints.wall_time_ms / 1000 - now
        cpu_left = constraints.cpu_time_ms / 1000 - self._group.cpu_us() / 1e6
        # At most `cpus` seconds of CPU pass per second; also look often enough to see a cancel.
        return max(0.001, min(wall_left, cpu_left / max(1.0, constraints.cpus), 0.1))

    def _check_limits(self, pipes: tuple[_Pipe, _Pipe], started: float) -> None:
        now = time.monotonic()
        if self._kill_deadline is not None:
            if now >= self._kill_deadline:
                self._jail.destroy()
                self._kill_deadline = now + KILL_GRACE_S
            return
        constraints = self._stage.constraints
        self._check_wall_time(started, now)
        cpu_ms = self._group.cpu_us() / 1000
        if cpu_ms >= constraints.cpu_time_ms:
            self._violate("cpu_time_ms", constraints.cpu_time_ms, cpu_ms, "cgroup_cpu")
        self._check_outputs(pipes)
        if self._network is not None and now >= self._network_check_at:
            self._network_check_at = now + _NETWORK_CHECK_S
            self._check_volume(self._network.traffic())
        if self._violations or self._cancelled():
            self._group.unthrottle()
            self._jail.kill()
            self._kill_deadline = now + KILL_GRACE_S

    def _check_wall_time(self, started: float, now: float) -> None:
        wall_ms, allowed = (now - started) * 1000, self._stage.constraints.wall_time_ms
        if wall_ms >= allowed:
            self._violate("wall_time_ms", allowed, wall_ms, "supervisor_clock")

    def _check_outputs(self, pipes: tuple[_Pipe, _Pipe]) -> None:
        for pipe in pipes:
            if pipe.over:
                self._violate(pipe.limit, pipe.allowed, pipe.seen, "byte_counter")

    def _add_group_violations(self, usage: cgroup.GroupUsage) -> None:
        constraints = self._stage.constraints
        if usage.oom_kills:
            self._violate(
                "memory_bytes", constraints.memory_bytes, usage.memory_peak_bytes, "cgroup_oom_kill"
            )
        if usage.forks_refused:
            self._violate(
                "processes", constraints.processes, constraints.processes + 1, "cgroup_pids_max"
            )
        if usage.cpu_us / 1000 >= constraints.cpu_time_ms:
            self._violate("cpu_time_ms", constraints.cpu_time_ms, usage.cpu_us / 1000, "cgroup_cpu")

    def _check_volume(self, traffic: Traffic) -> None:
        if traffic.over_bytes_packets:
            # All that passed, and the packet that was too much; those after it are retransmissions.
            passed = traffic.sent_bytes + traffic.received_bytes
            seen = passed + traffic.over_bytes // traffic.over_bytes_packets
            self._violate("network_bytes", self._stage.constraints.network_bytes, seen, "nft_quota")

    def _add_network_violations(self, traffic: Traffic) -> None:
        self._check_volume(traffic)
        allowed = self._stage.constraints.network_connections
        if traffic.over_connections:
            self._violate("network_connections", allowed, allowed + 1, "nft_ct_count")

    def _violate(self, limit: str, allowed: float, seen: float | None, evidence: str) -> None:
        self._violations.setdefault(
            limit, Violation(limit, allowed, None if seen is None else round(seen, 3), evidence)
        )


@dataclass(frozen=True)
class _Outcome:
    verdict: Verdict
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None

    @classmethod
    def of(
        cls,
        report: Ended | Failed | Gone,
        limited: bool,
        constraints: StageConstraints,
        violations: dict[str, Violation],
        jail: Jail,
    ) -> _Outcome:
        """The verdict; adds the violation that only a signal shows (SIGXFSZ)."""
        if isinstance(report, Failed) and limited:
            return cls(Verdict.LIMIT_EXCEEDED, reason=report.reason)
        if isinstance(report, Failed):
            verdict = Verdict.NOT_STARTED if report.by_job else Verdict.INTERNAL_ERROR
            return cls(verdict, reason=report.reason)
        if isinstance(report, Gone):
            # Only the OOM killer or this supervisor can have ended jobinit.
            if limited:
                return cls(Verdict.LIMIT_EXCEEDED, reason="the jail had to be destroyed")
            return cls(Verdict.INTERNAL_ERROR, reason=jail.failure())
        exit_code = signal_number = None
        if os.WIFSIGNALED(report.wait_status):
            signal_number = os.WTERMSIG(report.wait_status)
        else:
            exit_code = os.WEXITSTATUS(report.wait_status)
        if signal_number == signal.SIGXFSZ:
            violations["file_size_bytes"] = Violation(
                "file_size_bytes", constraints.file_size_bytes, None, "SIGXFSZ"
            )
        if violations:
            verdict = Verdict.LIMIT_EXCEEDED
        elif signal_number is not None:
            verdict = Verdict.SIGNALED
        else:
            verdict = Verdict.OK if exit_code == 0 else Verdict.NONZERO_EXIT
        return cls(verdict, exit_code, signal_number)


def _usage(
    wall_time_s: float,
    group: cgroup.GroupUsage,
    report: Ended | Failed | Gone,
    io: tuple[int, int] | None,
    traffic: Traffic | None,
) -> Usage:
    ended = report if isinstance(report, Ended) else None
    network = "nft_counter" if traffic else "unavailable: the stage has no network"
    reaped = "reaped_only" if ended else "unavailable: the jail's init did not report"
    return Usage(
        wall_time_ms=_milliseconds(wall_time_s),
        cpu_time_ms=group.cpu_us / 1000,
        cpu_user_ms=group.cpu_user_us / 1000,
        cpu_system_ms=group.cpu_system_us / 1000,
        memory_peak_bytes=group.memory_peak_bytes,
        memory_cache_end_bytes=group.memory_cache_bytes,
        # jobinit is not the job's
        processes_peak=None if group.processes_peak is None else max(0, group.processes_peak - 1),
        max_rss_bytes=None if ended is None else ended.max_rss_kib * 1024,
        voluntary_context_switches=None if ended is None else ended.voluntary_switches,
        involuntary_context_switches=None if ended is None else ended.involuntary_switches,
        read_bytes=None if io is None else io[0],
        written_bytes=None if io is None else io[1],
        block_read_bytes=None if ended is None else ended.blocks_in * 512,
        block_written_bytes=None if ended is None else ended.blocks_out * 512,
        network_received_bytes=None if traffic is None else traffic.received_bytes,
        network_sent_bytes=None if traffic is None else traffic.sent_bytes,
        network_received_packets=None if traffic is None else traffic.received_packets,
        network_sent_packets=None if traffic is None else traffic.sent_packets,
        network_refused_packets=None if traffic is None else traffic.refused_packets,
        network_throttled_packets=None if traffic is None else traffic.throttled_packets,
        sources={
            "wall_time_ms": "supervisor_clock",
            "cpu_time_ms": "cgroup",
            "cpu_user_ms": "cgroup",
            "cpu_system_ms": "cgroup",
            "memory_peak_bytes": "cgroup",
            "memory_cache_end_bytes": "cgroup",
            "processes_peak": "unavailable: this kernel does not keep it (Linux 6.1 does)"
            if group.processes_peak is None
            else "cgroup",
            "max_rss_bytes": reaped,
            "voluntary_context_switches": reaped,
            "involuntary_context_switches": reaped,
            "read_bytes": reaped,
            "written_bytes": reaped,
            "block_read_bytes": reaped,
            "block_written_bytes": reaped,
            "network_received_bytes": network,
            "network_sent_bytes": network,
            "network_received_packets": network,
            "network_sent_packets": network,
            "network_refused_packets": network,
            "network_throttled_packets": network,
        },
    )


def _input(data: bytes) -> int:
    """A descriptor from which ``data`` can be read, and nothing be written."""
    if not data:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    writable = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        with open(writable, "wb", closefd=False) as target:
            target.write(data)
        os.fchmod(writable, 0o400)  # the job cannot open it anew for writing
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def _set_oom_score(pid: int, score: int) -> None:
    # The process may be gone; then its report says so.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))


def _make_dev(directory: Path) -> Path:
    """A minimal /dev for all jails: the harmless devices, bound from the host's.

    Each is read-only by itself: a read-only mount around it would leave its times to the jobs, which could
    so leave something for the next one. That does not keep anybody from writing to the device.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    directory.mkdir(mode=0o755, exist_ok=True)
    for name in _DEVICES:
        source, target = Path("/dev") / name, directory / name
        if not (target.exists() and stat.S_ISCHR(target.stat().st_mode)):
            target.touch()
            _mount(libc, source, target, _MS_BIND)
        _mount(libc, None, target, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NOEXEC)
    links = {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
        "shm": "/tmp",  # so that shared memory counts in scratch_bytes
    }
    for name, target_path in links.items():
        with contextlib.suppress(FileExistsError):
            (directory / name).symlink_to(target_path)
    return directory


def _mount(libc: ctypes.CDLL, source: Path | None, target: Path, flags: int) -> None:
    origin = None if source is None else os.fsencode(source)
    if libc.mount(origin, os.fsencode(target), None, flags, None) < 0:
        raise HostSetupError(
            str(target),
            f"cannot be bound: {os.strerror(ctypes.get_errno())}",
            "the service needs CAP_SYS_ADMIN in its mount namespace",
        )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
