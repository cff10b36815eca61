"""A service that starts has shown what it promises; each promise that is not kept is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cellblock.engine import proof
from cellblock.engine.host import Environment, Host
from cellblock.engine.limits import StageConstraints
from cellblock.engine.result import JobResult, Output, StageResult, Usage, Verdict, Violation
from cellblock.engine.runner import Runner
from cellblock.errors import HostSetupError, InternalError

STATUS = b"""Name:\tsh
Uid:\t1000\t1000\t1000\t1000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
net Inter-|   Receive                                                |  Transmit
net  face |bytes    packets errs drop fifo frame compressed multicast|bytes
net     lo:       0       0    0    0    0     0          0         0        0
"""


def usage(wall_time_ms: float) -> Usage:
    return Usage(wall_time_ms, 30.0, 30.0, 0.0, 4096, 0, *(None,) * 14, {})


def ended(name: str, verdict: Verdict, exit_code: int | None = None, **more: Any) -> StageResult:
    return StageResult(name, verdict, StageConstraints(), exit_code=exit_code, **more)


def over(limit: str, name: str | None = None) -> StageResult:
    violation = Violation(limit, 1, 2, "seen")
    return ended(name or limit, Verdict.LIMIT_EXCEEDED, violations=(violation,), usage=usage(150.0))


def kept() -> dict[str, StageResult]:
    return {
        "start": ended("start", Verdict.NONZERO_EXIT, 7),
        "confinement": ended("confinement", Verdict.OK, 0, stdout=Output(STATUS)),
        "cpus": over("cpu_time_ms", "cpus"),
        **{
            name: over(name)
            for name in ("memory_bytes", "wall_time_ms", "processes", "stdout_bytes")
        },
        "file_size_bytes": over("file_size_bytes"),
        "scratch_bytes": ended("scratch_bytes", Verdict.NONZERO_EXIT, 9),
        "open_files": ended("open_files", Verdict.NONZERO_EXIT, 9),
    }


@pytest.fixture
def prove(tmp_path: Path) -> Callable[..., None]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").touch()

    def run(*changed: StageResult, error: Exception | None = None) -> None:
        results = kept() | {result.name: result for result in changed}

        class FakeRunner:
            def run(self, admitted: Any, slots: Any, *, report: bool) -> JobResult:
                assert not report
                if error is not None:
                    raise error
                names = [stage.name.replace("-", "_") for stage in admitted.job.stages]
                assert names == [name for name in names if name in results]
                return JobResult(
                    "proof", "proof", "base", "here", {}, tuple(results[name] for name in names)
                )

        environments = {"base": Environment("base", tmp_path, "/bin", "")}
        host = SimpleNamespace(
            name="slave1", environments=lambda: environments, uids=lambda number: None
        )
        proof.prove(cast(Host, host), cast(Runner, FakeRunner()))

    return run


def test_a_host_that_keeps_all_may_start(prove: Callable[..., None]) -> None:
    prove()


@pytest.mark.parametrize("name", sorted(kept()))
def test_each_promise_is_named_when_it_is_not_kept(prove: Callable[..., None], name: str) -> None:
    with pytest.raises(HostSetupError, match=rf"slave1: does not keep a promise \({name}: .*as ok"):
        prove(ended(name, Verdict.OK, 0, usage=usage(30.0)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"Uid:\t1000", b"Uid:\t0"),
        (b"CapEff:\t0000000000000000", b"CapEff:\t0000000000000001"),
        (b"CapBnd:\t0000000000000000", b"CapBnd:\t000001ffffffffff"),
        (b"NoNewPrivs:\t1", b"NoNewPrivs:\t0"),
        (b"Seccomp:\t2", b"Seccomp:\t0"),
        (b"net     lo:", b"net   eth0: 1\nnet     lo:"),
        (b"Name:", b"writable root\nName:"),
    ],
)
def test_what_confinement_is(prove: Callable[..., None], before: bytes, after: bytes) -> None:
    stdout = Output(STATUS.replace(before, after))
    assert stdout.data != STATUS
    with pytest.raises(HostSetupError, match="confinement"):
        prove(ended("confinement", Verdict.OK, 0, stdout=stdout))


def test_cpus_that_do_not_slow_down(prove: Callable[..., None]) -> None:
    with pytest.raises(HostSetupError, match="cpus"):
        prove(dataclasses.replace(over("cpu_time_ms", "cpus"), usage=usage(31.0)))


def test_what_keeps_a_stage_from_running_is_said(prove: Callable[..., None]) -> None:
    broken = ended("start", Verdict.INTERNAL_ERROR, reason="jail: did not start; mounting /proc")
    with pytest.raises(HostSetupError, match="start: a stage runs.*mounting /proc"):
        prove(broken)
    with pytest.raises(HostSetupError, match="cannot be unmounted"):
        prove(error=InternalError("scratch", "cannot be unmounted", "unmount it"))


def test_without_a_shell_nothing_is_proven_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environments = {"bare": Environment("bare", tmp_path / "bare", "/bin", "")}
    host = SimpleNamespace(environments=lambda: environments)
    proof.prove(cast(Host, host), cast(Runner, None))
    assert "no environment has /bin/sh" in caplog.text
