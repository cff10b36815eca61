"""Records are true: programs of known behaviour, and what the record says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Stage = Callable[..., dict[str, Any]]

# Signals whose default action ends a process (signal(7)); Python's number for each on Linux.
FATAL = {
    "SIGHUP": 1,
    "SIGINT": 2,
    "SIGABRT": 6,
    "SIGKILL": 9,
    "SIGSEGV": 11,
    "SIGPIPE": 13,
    "SIGTERM": 15,
}


@pytest.mark.parametrize("code", [0, 1, 127, 128, 134, 137, 143, 255])
def test_exit_codes_are_exit_codes(run_stage: Stage, code: int) -> None:
    stage = run_stage("sh", "-c", f"exit {code}")
    assert (stage["exit_code"], stage["signal"]) == (code, None)
    assert stage["verdict"] == ("ok" if code == 0 else "nonzero_exit")


@pytest.mark.parametrize(("name", "number"), FATAL.items())
def test_signals_are_signals(run_stage: Stage, name: str, number: int) -> None:
    program = (
        f"import os, signal\nsignal.signal({number}, signal.SIG_DFL) if {number} != 9 else 0\n"
    )
    stage = run_stage(
        "python3", "-c", f"{program}os.kill(os.getpid(), {number})", environment="python"
    )
    assert stage["verdict"] == "signaled"
    assert stage["signal"] == {"name": name, "number": number}
    assert stage["exit_code"] is None


def test_abort_in_c(run_stage: Stage, submit: Callable[..., dict[str, Any]]) -> None:
    record = submit(
        {
            "environment": "c",
            "files": {"a.c": {"text": "#include <stdlib.h>\nint main(void) { abort(); }\n"}},
            "stages": [
                {"name": "compile", "command": ["gcc", "-o", "a", "a.c"]},
                {"name": "run", "command": ["./a"]},
            ],
        }
    )
    assert [stage["verdict"] for stage in record["stages"]] == ["ok", "signaled"]
    assert record["stages"][1]["signal"]["name"] == "SIGABRT"


def test_output_is_what_was_written(run_stage: Stage) -> None:
    stage = run_stage("sh", "-c", "cat; echo err >&2; printf '\\377'", stdin={"text": "in\n"})
    assert stage["stdout"]["base64"] == "aW4K/w=="
    assert stage["stderr"] == {"text": "err\n", "size_bytes": 4, "truncated": False}


def test_output_beyond_its_limit(run_stage: Stage) -> None:
    stage = run_stage("sh", "-c", "yes", constraints={"stdout_bytes": "1kB", "wall_time_ms": "5s"})
    assert stage["verdict"] == "limit_exceeded"
    assert [v["limit"] for v in stage["violations"]] == ["stdout_bytes"]
    assert stage["stdout"] == {"text": "y\n" * 500, "size_bytes": 1000, "truncated": True}


def test_wall_time(run_stage: Stage) -> None:
    stage = run_stage("sleep", "30", constraints={"wall_time_ms": "400ms"})
    assert stage["verdict"] == "limit_exceeded"
    assert [(v["limit"], v["evidence"]) for v in stage["violations"]] == [
        ("wall_time_ms", "supervisor_clock")
    ]
    assert 400 <= stage["usage"]["wall_time_ms"] < 2000


def test_cpu_time(run_stage: Stage) -> None:
    stage = run_stage("sh", "-c", "while :; do :; done", constraints={"cpu_time_ms": "300ms"})
    assert [v["limit"] for v in stage["violations"]] == ["cpu_time_ms"]
    assert 300 <= stage["usage"]["cpu_time_ms"] < 1000


def test_memory(run_stage: Stage) -> None:
    touch = "x = bytearray({} * 2**20)\nfor i in range(0, len(x), 4096): x[i] = 1"
    limits = {"memory_bytes": "64MiB"}
    stage = run_stage("python3", "-c", touch.format(200), environment="python", constraints=limits)
    assert [(v["limit"], v["evidence"]) for v in stage["violations"]] == [
        ("memory_bytes", "cgroup_oom_kill")
    ]
    # The control: the same program within the limit, and what it cost.
    stage = run_stage("python3", "-c", touch.format(40), environment="python", constraints=limits)
    assert stage["verdict"] == "ok"
    assert 40 * 2**20 <= stage["usage"]["memory_peak_bytes"] <= 56 * 2**20


def test_processes(run_stage: Stage) -> None:
    # In dash a refused fork ends the script; the control stays below the limit.
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 0.2 & done; wait"
    stage = run_stage("sh", "-c", script, constraints={"processes": 4})
    assert [v["limit"] for v in stage["violations"]] == ["processes"]
    assert run_stage("sh", "-c", script, constraints={"processes": 9})["verdict"] == "ok"


def test_a_program_that_is_not_there(run_stage: Stage) -> None:
    stage = run_stage("/no/such/program")
    assert stage["verdict"] == "not_started"
    assert stage["reason"] == "executing: No such file or directory"
    assert (stage["exit_code"], stage["signal"]) == (None, None)


def test_a_stage_after_a_failed_one_is_skipped(submit: Callable[..., dict[str, Any]]) -> None:
    record = submit(
        {
            "environment": "base",
            "stages": [
                {"name": "one", "command": ["false"]},
                {"name": "two", "command": ["true"]},
                {"name": "three", "command": ["true"], "run_always": True},
            ],
        }
    )
    assert [stage["verdict"] for stage in record["stages"]] == ["nonzero_exit", "skipped", "ok"]
    assert record["verdict"] == "nonzero_exit"


def test_the_standard_streams_can_be_opened_by_name(run_stage: Stage) -> None:
    script = (
        "cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr; echo again >/proc/self/fd/1; "
        "for d in 1 2; do (: </proc/$$/fd/$d) 2>/dev/null || echo unread; done; "
        "(: >/dev/stdin) 2>/dev/null || echo unwritten"
    )
    stage = run_stage("sh", "-c", script, stdin={"text": "in\n"})
    assert stage["stdout"]["text"] == "in\nout\nagain\nunread\nunread\nunwritten\n"
    assert stage["stderr"]["text"] == "err\n"
