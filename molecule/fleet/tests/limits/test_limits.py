"""Every limit, broken on purpose and kept: the verdict, the violation and its evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Stage = Callable[..., dict[str, Any]]

MIB = 2**20
TOUCH = "x = bytearray({} * 2**20)\nfor i in range(0, len(x), 4096): x[i] = 1\n"


def limits_hit(stage: dict[str, Any]) -> list[tuple[str, str]]:
    assert stage["verdict"] == ("limit_exceeded" if stage["violations"] else "ok"), stage
    return sorted((v["limit"], v["evidence"]) for v in stage["violations"])


@pytest.fixture
def python(run_stage: Stage) -> Stage:
    """Runs a Python program with the given constraints."""

    def run(program: str, **constraints: Any) -> dict[str, Any]:
        return run_stage("python3", "-c", program, environment="python", constraints=constraints)

    return run


def test_wall_time(run_stage: Stage, slowness: int) -> None:
    stage = run_stage("sleep", "30", constraints={"wall_time_ms": "300ms"})
    assert limits_hit(stage) == [("wall_time_ms", "supervisor_clock")]
    assert stage["signal"]["name"] == "SIGKILL"
    assert 300 <= stage["usage"]["wall_time_ms"] / slowness < 1500
    assert limits_hit(run_stage("sleep", "0.1", constraints={"wall_time_ms": "2s"})) == []


@pytest.mark.kernel
def test_cpu_time_of_one_process(python: Stage, slowness: int) -> None:
    stage = python("while True: pass", cpu_time_ms="300ms")
    assert limits_hit(stage) == [("cpu_time_ms", "cgroup_cpu")]
    assert 300 <= stage["usage"]["cpu_time_ms"] / slowness < 600


@pytest.mark.kernel
def test_cpu_time_counts_all_processes(python: Stage, slowness: int) -> None:
    # Each process stays far below the limit; together they are above it.
    program = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        f"        while time.process_time() < {0.1 * slowness}: pass\n"
        "        os._exit(0)\n"
        "for _ in range(8): os.wait()\n"
    )
    assert limits_hit(python(program, cpu_time_ms="400ms")) == [("cpu_time_ms", "cgroup_cpu")]
    assert limits_hit(python(program, cpu_time_ms="4s")) == []


@pytest.mark.kernel
def test_memory(python: Stage) -> None:
    stage = python(TOUCH.format(100), memory_bytes="64MiB")
    assert limits_hit(stage) == [("memory_bytes", "cgroup_oom_kill")]
    assert limits_hit(python(TOUCH.format(40), memory_bytes="64MiB")) == []


@pytest.mark.kernel
def test_memory_of_a_child(python: Stage) -> None:
    program = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {TOUCH.format(100)!r}])"
    )
    stage = python(program, memory_bytes="64MiB")
    assert limits_hit(stage) == [("memory_bytes", "cgroup_oom_kill")]
    # What was killed is the child: the program itself went on and ended by itself.
    assert (stage["exit_code"], stage["signal"]) == (0, None)


@pytest.mark.kernel
def test_scratch_counts_as_memory(run_stage: Stage) -> None:
    fill = "head -c 40M /dev/zero > fill; sleep 0.1"
    constraints = {"memory_bytes": "32MiB", "scratch_bytes": "32MiB", "file_size_bytes": "1GiB"}
    stage = run_stage("sh", "-c", fill, constraints=constraints)
    # 32 MiB of scratch do not fit beside the program: the limit that acts is the memory's.
    assert limits_hit(stage) == [("memory_bytes", "cgroup_oom_kill")]


@pytest.mark.kernel
def test_processes(run_stage: Stage, slowness: int) -> None:
    script = f"for i in 1 2 3 4 5 6 7 8; do sleep {0.2 * slowness} & done; wait"
    stage = run_stage("sh", "-c", script, constraints={"processes": 4})
    assert limits_hit(stage) == [("processes", "cgroup_pids_max")]
    within = run_stage("sh", "-c", script, constraints={"processes": 9})
    assert limits_hit(within) == []
    assert within["usage"]["processes_peak"] in (9, None)


@pytest.mark.kernel
def test_threads_are_processes(python: Stage, slowness: int) -> None:
    program = (
        "import threading, time\n"
        f"threads = [threading.Thread(target=time.sleep, args=({0.2 * slowness},)) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
    )
    assert limits_hit(python(program, processes=4)) == [("processes", "cgroup_pids_max")]
    assert limits_hit(python(program, processes=9)) == []


def test_stack(submit: Callable[..., dict[str, Any]]) -> None:
    source = (
        "#include <string.h>\n"
        "static int down(int n) { char block[65536]; memset(block, n, sizeof block);\n"
        "    return n ? down(n - 1) + block[n] : block[7]; }\n"
        "int main(void) { return down(64) == -1; }\n"
    )
    job = {
        "environment": "c",
        "files": {"a.c": {"text": source}},
        "stages": [
            {"name": "compile", "command": ["gcc", "-O0", "-o", "a", "a.c"]},
            {"name": "small", "command": ["./a"], "constraints": {"stack_bytes": "1MiB"}},
            {
                "name": "large",
                "command": ["./a"],
                "constraints": {"stack_bytes": "16MiB"},
                "run_always": True,
            },
        ],
    }
    _, small, large = submit(job)["stages"]
    assert (small["verdict"], small["signal"]["name"]) == ("signaled", "SIGSEGV")
    assert large["verdict"] == "ok"


def test_file_size(run_stage: Stage) -> None:
    write = ["sh", "-c", "exec head -c 2000000 /dev/zero > file"]
    stage = run_stage(*write, constraints={"file_size_bytes": "1MiB"})
    assert limits_hit(stage) == [("file_size_bytes", "SIGXFSZ")]
    assert stage["signal"]["name"] == "SIGXFSZ"
    assert limits_hit(run_stage(*write, constraints={"file_size_bytes": "2MB"})) == []
    # As documented: the kernel tells nobody of a child's end but its parent. The limit holds all the same.
    child = "head -c 2000000 /dev/zero > file; echo $?; wc -c < file"
    stage = run_stage("sh", "-c", child, constraints={"file_size_bytes": "1MiB"})
    assert stage["stdout"]["text"].split() == ["153", str(MIB)]
    assert (stage["verdict"], limits_hit(stage)) == ("ok", [])


@pytest.mark.parametrize("directory", ["/work", "/tmp", "/dev/shm"])
def test_scratch_bytes(run_stage: Stage, directory: str) -> None:
    fill = f"head -c 3000000 /dev/zero > {directory}/fill; wc -c < {directory}/fill"
    stage = run_stage("sh", "-c", fill, constraints={"scratch_bytes": "2MiB"})
    assert "No space left" in stage["stderr"]["text"]
    assert int(stage["stdout"]["text"]) <= 2 * MIB
    within = run_stage("sh", "-c", fill, constraints={"scratch_bytes": "4MiB"})
    assert int(within["stdout"]["text"]) == 3_000_000


def test_scratch_files(run_stage: Stage) -> None:
    make = "i=0; while [ $i -lt 60 ] && touch f$i 2>/dev/null; do i=$((i + 1)); done; echo $i"
    limited = run_stage("sh", "-c", make, constraints={"scratch_files": 50})
    assert int(limited["stdout"]["text"]) == 50
    assert int(run_stage("sh", "-c", make)["stdout"]["text"]) == 60


def test_open_files(python: Stage) -> None:
    program = (
        "import os\nfds = []\n"
        "try:\n    while len(fds) < 100: fds.append(os.open('/dev/null', 0))\n"
        "except OSError as e: print(e.errno, max(fds) + 1)\n"
    )
    assert python(program, open_files=32)["stdout"]["text"] == "24 32\n"  # EMFILE
    assert python(program, open_files=128)["stdout"]["text"] == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output(run_stage: Stage, stream: str) -> None:
    command = "yes" if stream == "stdout" else "yes >&2"
    stage = run_stage("sh", "-c", command, constraints={f"{stream}_bytes": "1kB"})
    assert limits_hit(stage) == [(f"{stream}_bytes", "byte_counter")]
    assert stage[stream] == {"text": "y\n" * 500, "size_bytes": 1000, "truncated": True}
    exact = "printf 'y\\n%.0s' $(seq 500)" + ("" if stream == "stdout" else " >&2")
    within = run_stage("sh", "-c", exact, constraints={f"{stream}_bytes": "1kB"})
    assert limits_hit(within) == []
    assert within[stream]["size_bytes"] == 1000 and not within[stream]["truncated"]


@pytest.mark.kernel
def test_cpus(python: Stage) -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    half = python(spin, cpus=0.25)
    assert half["verdict"] == "ok"
    assert half["usage"]["wall_time_ms"] >= 3 * half["usage"]["cpu_time_ms"]


@pytest.mark.kernel
def test_several_limits_at_once(python: Stage) -> None:
    program = (
        "import os, sys, time\n"
        "for _ in range(5):\n"
        "    try:\n"
        "        if os.fork() == 0: time.sleep(9)\n"
        "    except BlockingIOError: pass\n"
        "{}\n"
    )
    forks = ("processes", "cgroup_pids_max")
    stage = python(program.format("time.sleep(9)"), processes=3, wall_time_ms="500ms")
    assert limits_hit(stage) == [forks, ("wall_time_ms", "supervisor_clock")]
    flood = "while True: os.write(1, b'x' * 4096)"
    stage = python(program.format(flood), processes=3, stdout_bytes="1kB")
    assert limits_hit(stage) == [forks, ("stdout_bytes", "byte_counter")]


def test_constraints_are_echoed_as_applied(run_stage: Stage, slowness: int) -> None:
    stage = run_stage(
        "true", constraints={"memory_bytes": "16MiB", "wall_time_ms": "2s", "cpus": 0.5}
    )
    applied = stage["constraints"]
    assert (applied["memory_bytes"], applied["wall_time_ms"]) == (16 * MIB, 2000 * slowness)
    assert applied["cpus"] == 0.5
    assert applied["scratch_bytes"] == 16 * MIB
    assert applied["open_files"] == 256


def test_a_violation_is_an_event_in_the_journal(
    host: Any, submit: Callable[..., dict[str, Any]]
) -> None:
    record = submit(
        {
            "environment": "base",
            "name": "noisy",
            "labels": {"tenant": "acme"},
            "stages": [{"name": "run", "command": ["yes"], "constraints": {"stdout_bytes": "1kB"}}],
        }
    )
    fields = host.check_output(
        f"journalctl --no-pager -o verbose CELLBLOCK_JOB_ID={record['job_id']}"
    )
    for field in (
        "CELLBLOCK_EVENT=limit_exceeded",
        "CELLBLOCK_JOB=noisy",
        "CELLBLOCK_LIMIT=stdout_bytes",
        "CELLBLOCK_ALLOWED=1000",
        "CELLBLOCK_EVIDENCE=byte_counter",
        'CELLBLOCK_LABELS={"tenant": "acme"}',
    ):
        assert field in fields
