"""What a job did: the record, composed outside the jail, and its JSON shape."""

from __future__ import annotations

import base64
import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..job_network.slots import Traffic
from .cgroup import GroupUsage
from .jail import Ended, Failed, Gone
from .job import Target
from .limits import StageConstraints

_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\r")
_FEW_CONTROLS = 4096


class Verdict(str, Enum):
    """How a stage ended; exactly one per stage."""

    OK = "ok"
    """Exit code 0 and no limit hit."""
    NONZERO_EXIT = "nonzero_exit"
    SIGNALED = "signaled"
    """Ended by a signal that was not the sandbox's answer to a limit."""
    LIMIT_EXCEEDED = "limit_exceeded"
    NOT_STARTED = "not_started"
    """The program could not be executed; ``reason`` says why (no such file, not executable...)."""
    SKIPPED = "skipped"
    """An earlier stage did not end well."""
    HOST_OVERLOADED = "host_overloaded"
    """The host ran out of memory, and its kernel ended a process of the stage: nothing that the job did."""
    WORKER_LOST = "worker_lost"
    """The worker container ended under the stage, or took its processes out of their limits: nothing that the
    job did, unless it has become that container's root."""
    INTERNAL_ERROR = "internal_error"
    """The sandbox failed; it says nothing about the job."""


_NO_MEMORY_ON_HOST = (
    "the host ran out of memory and ended a process of the stage; run the job again"
)


@dataclass(frozen=True)
class Outcome:
    """How a stage's program ended."""

    verdict: Verdict
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None

    @classmethod
    def of(
        cls,
        report: Ended | Failed | Gone,
        *,
        limited: bool,
        killed_by_host: bool,
        failure: Callable[[], str],
        worker_lost: str | None = None,
    ) -> Outcome:
        """From jobinit's report. ``limited``: a limit was hit. ``killed_by_host``: the kernel ended a process for
        lack of memory that the stage's own limit does not explain. ``failure`` says why a jail is gone.
        ``worker_lost`` is why nothing that the jail's init reports counts, or what a jail that is gone means: the
        reason, of a jail in the worker container."""
        if isinstance(report, Failed):
            if limited:
                return cls(Verdict.LIMIT_EXCEEDED, reason=report.reason)
            verdict = Verdict.NOT_STARTED if report.by_job else Verdict.INTERNAL_ERROR
            return cls(verdict, reason=report.reason)
        if isinstance(report, Gone):
            # Only the OOM killer or this supervisor can have ended jobinit.
            if limited:
                return cls(Verdict.LIMIT_EXCEEDED, reason="the jail had to be destroyed")
            if killed_by_host:
                return cls(Verdict.HOST_OVERLOADED, reason=_NO_MEMORY_ON_HOST)
            if worker_lost is not None:
                return cls(Verdict.WORKER_LOST, reason=worker_lost)
            return cls(Verdict.INTERNAL_ERROR, reason=failure())
        if limited:
            verdict = Verdict.LIMIT_EXCEEDED
        elif killed_by_host:
            return cls(Verdict.HOST_OVERLOADED, report.exit_code, report.signal, _NO_MEMORY_ON_HOST)
        elif report.signal is not None:
            verdict = Verdict.SIGNALED
        else:
            verdict = Verdict.OK if report.exit_code == 0 else Verdict.NONZERO_EXIT
        return cls(verdict, report.exit_code, report.signal)


@dataclass(frozen=True)
class Violation:
    """A limit that was hit. ``seen`` is in the limit's unit, None where only the fact is known."""

    limit: str
    allowed: int | float
    seen: int | float | None
    evidence: str


@dataclass(frozen=True)
class Output:
    """Bytes from a pipe, never parsed. ``truncated``: the stage wrote more than it was allowed."""

    data: bytes = b""
    truncated: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {**content(self.data), "size_bytes": len(self.data), "truncated": self.truncated}


@dataclass(frozen=True)
class CollectedFile:
    """A file that the job left, or why it was not taken.

    ``name`` is relative to the work directory; where it is not UTF-8 it is escaped for reading and
    ``name_base64`` has its bytes. ``problem`` is None or one of ``missing``, ``symbolic_link``,
    ``not_a_regular_file``, ``too_large``, ``too_deep``, ``too_many_files``.
    """

    name: str
    name_base64: str | None
    problem: str | None
    data: bytes
    sha256: str | None

    def as_dict(self) -> dict[str, Any]:
        shape: dict[str, Any] = {"name": self.name, "problem": self.problem}
        if self.name_base64 is not None:
            shape["name_base64"] = self.name_base64
        if self.problem is None:
            shape.update(content(self.data), size_bytes=len(self.data), sha256=self.sha256)
        return shape


@dataclass(frozen=True)
class Usage:
    """What a stage cost; a figure that this host cannot give is None, never 0.

    ``sources`` says of every figure where it comes from. Figures from the cgroup and the
    supervisor cannot be hidden; ``reaped_only`` ones are what the kernel adds up for children that
    were waited for: a job that ignores SIGCHLD lowers them.
    """

    wall_time_ms: float
    cpu_time_ms: float
    cpu_user_ms: float
    cpu_system_ms: float
    memory_peak_bytes: int
    memory_cache_end_bytes: int
    processes_peak: int | None
    max_rss_bytes: int | None
    voluntary_context_switches: int | None
    involuntary_context_switches: int | None
    read_bytes: int | None
    written_bytes: int | None
    block_read_bytes: int | None
    block_written_bytes: int | None
    network_received_bytes: int | None
    network_sent_bytes: int | None
    network_received_packets: int | None
    network_sent_packets: int | None
    network_refused_packets: int | None
    network_throttled_packets: int | None
    sources: dict[str, str]

    @classmethod
    def of(
        cls,
        wall_time_s: float,
        group: GroupUsage,
        report: Ended | Failed | Gone,
        io: tuple[int, int] | None,
        traffic: Traffic | None,
        *,
        own_clock: bool,
    ) -> Usage:
        """From the program's time, the cgroup, jobinit's report, the ``io`` (bytes read, written) of
        what it reaped, and the network slot. ``own_clock``: the time is this supervisor's, not jobinit's."""
        ended = report if isinstance(report, Ended) else None
        network = "nft_counter" if traffic else "unavailable: the stage has no network"
        reaped = "reaped_only" if ended else "unavailable: the jail's init did not report"
        return cls(
            wall_time_ms=milliseconds(wall_time_s),
            cpu_time_ms=group.cpu_us / 1000,
            cpu_user_ms=group.cpu_user_us / 1000,
            cpu_system_ms=group.cpu_system_us / 1000,
            memory_peak_bytes=group.memory_peak_bytes,
            memory_cache_end_bytes=group.memory_cache_bytes,
            # jobinit is not the job's
            processes_peak=None
            if group.processes_peak is None
            else max(0, group.processes_peak - 1),
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
                "wall_time_ms": "supervisor_clock" if own_clock else "jobinit_clock",
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


@dataclass(frozen=True)
class StageResult:
    """One stage's record; ``exit_code`` and ``signal`` are never guessed from each other."""

    name: str
    verdict: Verdict
    constraints: StageConstraints
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    violations: tuple[Violation, ...] = ()
    stdout: Output = field(default_factory=Output)
    stderr: Output = field(default_factory=Output)
    usage: Usage | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "signal": None
            if self.signal is None
            else {"name": signal_name(self.signal), "number": self.signal},
            "reason": self.reason,
            "violations": [vars(violation) for violation in self.violations],
            "stdout": self.stdout.as_dict(),
            "stderr": self.stderr.as_dict(),
            "usage": None if self.usage is None else dict(vars(self.usage)),
            "constraints": self.constraints.as_dict(),
        }


@dataclass(frozen=True)
class JobResult:
    """The record of a job: one entry per stage, in order."""

    job_id: str
    name: str
    environment: str
    host: str
    labels: dict[str, str]
    stages: tuple[StageResult, ...]
    files: tuple[CollectedFile, ...] = ()
    queue_time_ms: float = 0.0
    target: Target = Target.HOST
    runtime: str | None = None
    """Of the worker container that it ran in."""
    is_boundary: bool = True
    """Whether the runtime keeps the container's root from the host."""

    @property
    def data_bytes(self) -> int:
        """How much of outputs and collected files the record holds."""
        outputs = sum(len(s.stdout.data) + len(s.stderr.data) for s in self.stages)
        return outputs + sum(len(file.data) for file in self.files)

    @property
    def verdict(self) -> Verdict:
        """The first verdict that is not ``ok`` (or skipped), else ``ok``."""
        for stage in self.stages:
            if stage.verdict not in (Verdict.OK, Verdict.SKIPPED):
                return stage.verdict
        return Verdict.OK

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape of the record, documented in ``docs/results.md``."""
        return {
            "job_id": self.job_id,
            "name": self.name,
            "environment": self.environment,
            "host": self.host,
            "labels": self.labels,
            "target": {
                "kind": self.target.value,
                "runtime": self.runtime,
                "is_boundary": self.is_boundary,
            },
            "verdict": self.verdict.value,
            "queue_time_ms": self.queue_time_ms,
            "stages": [stage.as_dict() for stage in self.stages],
            "files": [file.as_dict() for file in self.files],
        }


def content(data: bytes) -> dict[str, str]:
    """``text`` when the bytes are UTF-8 and text for the most part, else ``base64``.

    JSON writes a control character as six: a job that writes nothing else would blow up its record.
    """
    controls = len(data) - len(data.translate(None, _CONTROLS))
    text: str | None = None
    if b"\0" not in data and controls <= max(_FEW_CONTROLS, len(data) // 10):
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode("utf-8")
    if text is None:
        return {"base64": base64.b64encode(data).decode("ascii")}
    return {"text": text}


def signal_name(number: int) -> str:
    """``SIGABRT`` for 6; real-time signals as ``SIGRTMIN+n``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > 31 else f"SIG{number}"


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
