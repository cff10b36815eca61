"""Runs one stage in its jail and its cgroup, watches its limits, and composes its record.

The record has four first-hand sources, all outside the jail: the wait status that jobinit reports, the
monotonic clock, which jobinit reads when the program starts and ends, the stage's own cgroup, and byte-capped pipes.
This process may be late at any time, and no record depends on that.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import Cancelled
from ..job_network.slots import Traffic
from . import cgroup, content
from . import contained as worker
from .content import Content
from .jail import Begun, Ended, Failed, Gone, Jail
from .job import Stage
from .result import Outcome, Output, StageResult, Usage, Verdict, Violation

KILL_GRACE_S = 0.5
"""How long jobinit may take to end everything and report before it is killed itself."""
_NETWORK_CHECK_S = 0.1
"""How often a running stage's byte quota is looked at; the quota itself holds to the packet."""
_READ_SIZE = 65_536
_WORKER_ENDED = "the worker container, or the jail's init in it, was ended; run the job again"
_WORKER_TOOK = "the worker container took processes of the stage out of their limits: do not trust it, and have it made anew"


class StageNetwork(Protocol):
    """The slot that a stage has to itself."""

    @property
    def namespace(self) -> int:
        """Descriptor of its network namespace."""

    @property
    def files(self) -> Sequence[tuple[Path, str]]:
        """Files of the host, and the files of the root that they are bound over."""

    def traffic(self) -> Traffic:
        """What has gone through it."""


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


class StageRun:
    """One run of a stage; ``network`` is the slot that it has to itself, None where it has none."""

    def __init__(
        self,
        stage: Stage,
        default_path: str,
        jail: Jail,
        group: cgroup.Group,
        network: StageNetwork | None,
        cancelled: Callable[[], bool],
        *,
        contained: bool = False,
    ) -> None:
        """``contained``: the jail is in the worker container, whose root can say and do more than a job can."""
        self._contained = contained
        self._groups: dict[str, str] = {}
        self._worker_lost: str | None = _WORKER_ENDED if contained else None
        self._network = network
        self._network_check_at = time.monotonic() + _NETWORK_CHECK_S
        self._stage = stage
        self._default_path = default_path
        self._jail = jail
        self._group = group
        self._cancelled = cancelled
        self._violations: dict[str, Violation] = {}
        self._kill_deadline: float | None = None
        self._killed_at = float("inf")
        self._ended_at = 0.0
        self._is_out_of_limits = False

    def run(self) -> StageResult:
        """Runs it to its end and returns its record; raises :class:`Cancelled`."""
        constraints = self._stage.constraints
        with contextlib.ExitStack() as stack:
            pipes = self._start(stack)
            started = time.monotonic()
            ended = self._watch(pipes, started)
            wall_time_s = self._ended_at - started
            if isinstance(ended, Ended) and not self._contained:
                wall_time_s = (ended.ended_ns - ended.started_ns) / 1e9
                self._settle_wall_time(ended, wall_time_s)
        if self._cancelled():
            raise Cancelled
        io = self._jail.io() if isinstance(ended, Ended) else None
        usage = self._group.usage()
        self._add_group_violations(usage)
        traffic = None if self._network is None else self._network.traffic()
        if traffic is not None:
            self._add_network_violations(traffic)
        if isinstance(ended, Ended) and ended.signal == signal.SIGXFSZ:
            self._violate("file_size_bytes", constraints.file_size_bytes, None, "SIGXFSZ")
        outcome = Outcome.of(
            ended,
            limited=bool(self._violations),
            killed_by_host=usage.oom_kills > 0 and not usage.at_memory_limit,
            failure=self._jail.failure,
            worker_lost=self._worker_lost,
        )
        if self._is_out_of_limits:
            outcome = Outcome(Verdict.WORKER_LOST, reason=_WORKER_TOOK)
        return StageResult(
            name=self._stage.name,
            verdict=outcome.verdict,
            constraints=constraints,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            reason=outcome.reason,
            violations=tuple(self._violations.values()),
            stdout=pipes[0].output(),
            stderr=pipes[1].output(),
            usage=Usage.of(
                wall_time_s,
                usage,
                ended,
                io,
                traffic,
                own_clock=self._contained or not isinstance(ended, Ended),
            ),
        )

    def _start(self, stack: contextlib.ExitStack) -> tuple[_Pipe, _Pipe]:
        """Puts jobinit into the group, then starts the program: nothing of it runs uncounted."""
        constraints = self._stage.constraints
        self._group.attach(self._jail.pid)
        if self._contained:
            self._groups = worker.groups_of(self._jail.pid)
        # While the program forks, jobinit has the score that the job inherits; afterwards jobinit
        # goes back to 0, so that the OOM killer takes the job and never its init.
        _set_oom_score(self._jail.pid, 1000)
        stdin = _input(self._stage.stdin)
        stack.callback(os.close, stdin)
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        for _, theirs in ends:
            # /dev/stdout and /proc/self/fd/1 can be opened, which many programs do; not for reading.
            os.fchmod(theirs, 0o622)
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
                    "PATH": self._default_path,
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
                    self._check_groups()
                    self._ended_at = time.monotonic()
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
        self._check_groups()
        if self._violations or self._is_out_of_limits or self._cancelled():
            self._group.unthrottle()
            self._killed_at = time.monotonic()
            self._jail.kill()
            self._kill_deadline = now + KILL_GRACE_S

    def _check_groups(self) -> None:
        """On cgroup v1 whoever has a process's uid may move it, and the worker container's root has it."""
        if self._contained and not self._is_out_of_limits:
            self._is_out_of_limits = worker.has_left(self._jail.pid, self._groups)

    def _check_wall_time(self, started: float, now: float) -> None:
        wall_ms, allowed = (now - started) * 1000, self._stage.constraints.wall_time_ms
        if wall_ms >= allowed:
            self._violate("wall_time_ms", allowed, wall_ms, "supervisor_clock")

    def _settle_wall_time(self, ended: Ended, wall_time_s: float) -> None:
        """By the times of the program itself: it may have ended before this process had a look at the clock."""
        if ended.ended_ns / 1e9 < self._killed_at:
            self._violations.pop("wall_time_ms", None)
        allowed = self._stage.constraints.wall_time_ms
        if wall_time_s * 1000 >= allowed:
            self._violate("wall_time_ms", allowed, wall_time_s * 1000, "jobinit_clock")

    def _check_outputs(self, pipes: tuple[_Pipe, _Pipe]) -> None:
        for pipe in pipes:
            if pipe.over:
                self._violate(pipe.limit, pipe.allowed, pipe.seen, "byte_counter")

    def _add_group_violations(self, usage: cgroup.GroupUsage) -> None:
        constraints = self._stage.constraints
        if usage.oom_kills and usage.at_memory_limit:
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


def _input(data: Content) -> int:
    """A descriptor from which ``data`` can be read, and nothing be written."""
    if not data:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    writable = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        content.write(data, writable)
        os.fchmod(writable, 0o444)  # the job can open it anew (/dev/stdin), and not for writing
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def _set_oom_score(pid: int, score: int) -> None:
    # The process may be gone; then its report says so.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))
