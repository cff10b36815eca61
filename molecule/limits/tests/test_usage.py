"""Usage figures against workloads of known cost, idle and with the other core busy.

A figure may be off by 3 % or by one tick of the clock concerned (a scheduler tick of 4 ms at
CONFIG_HZ=250 for CPU time, a page for memory), and by the fixed cost of starting the interpreter,
which a control run of the same program without its work measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Stage = Callable[..., dict[str, Any]]

MIB = 2**20
TICK_MS = 10.0  # the coarsest clock concerned: USER_HZ

PRELUDE = "#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n#include <time.h>\n#include <fcntl.h>\n#include <sys/wait.h>\n#include <sched.h>\n"

SPIN = PRELUDE + (
    "int main(void) { struct timespec t; do clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);"
    " while (t.tv_sec * 1000 + t.tv_nsec / 1000000 < 500); return 0; }"
)
TOUCH = PRELUDE + (
    "int main(void) { volatile char *p = malloc(100 << 20);"
    " for (int i = 0; i < 100 << 20; i += 4096) p[i] = 1; return 0; }"
)
WRITE = PRELUDE + (
    'int main(void) { static char b[65536]; int f = open("out", O_CREAT | O_WRONLY, 0600);'
    " for (int i = 0; i < 160; i++) if (write(f, b, sizeof b) != sizeof b) return 1; return 0; }"
)
FORK = PRELUDE + (
    "int main(void) { for (int i = 0; i < 199; i++) if (fork() == 0) { sleep(1); _exit(0); }"
    " while (wait(0) > 0); return 0; }"
)
SWITCH = PRELUDE + (
    "int main(void) { struct timespec t = {0, 100000};"
    " for (int i = 0; i < 1000; i++) nanosleep(&t, 0); return 0; }"
)
NOTHING = "int main(void) { return 0; }"


@pytest.fixture(params=["idle", "busy"])
def load(host: Any, request: pytest.FixtureRequest, slowness: int) -> Iterator[None]:
    """Nothing else, or a process that keeps one core busy."""
    if slowness > 1 and request.param == "busy":
        pytest.skip("says nothing about a slave whose cores are emulated")
    if request.param == "idle":
        yield
        return
    pid = host.check_output("sh -c 'while :; do :; done' >/dev/null 2>&1 & echo $!")
    try:
        yield
    finally:
        host.check_output(f"kill {pid}")


@pytest.fixture
def usage(submit: Callable[..., dict[str, Any]], load: None) -> Callable[..., dict[str, Any]]:
    """Usage of a C program, and of one that does nothing under the same limits."""

    def run(source: str, **constraints: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        job = {
            "environment": "c",
            "files": {"work.c": {"text": source}, "nothing.c": {"text": NOTHING}},
            "stages": [
                {
                    "name": "compile",
                    "command": ["sh", "-c", "gcc -O1 -o work work.c && gcc -o nothing nothing.c"],
                },
                {"name": "work", "command": ["./work"], "constraints": constraints},
                {"name": "nothing", "command": ["./nothing"], "constraints": constraints},
            ],
        }
        record = submit(job)
        assert record["verdict"] == "ok", record
        return record["stages"][1]["usage"], record["stages"][2]["usage"]

    return run


def within(seen: float, known: float, grain: float) -> bool:
    return abs(seen - known) <= max(0.03 * known, grain)


def test_cpu_time_of_500_ms(usage: Any, slowness: int) -> None:
    work, nothing = usage(SPIN)
    assert within(work["cpu_time_ms"] - nothing["cpu_time_ms"], 500, TICK_MS * slowness)
    assert within(work["cpu_user_ms"] + work["cpu_system_ms"], work["cpu_time_ms"], 0.01)
    assert work["wall_time_ms"] >= 500


def test_memory_of_100_mib(usage: Any) -> None:
    work, nothing = usage(TOUCH)
    assert within(work["memory_peak_bytes"] - nothing["memory_peak_bytes"], 100 * MIB, 4096)
    assert within(work["max_rss_bytes"] - nothing["max_rss_bytes"], 100 * MIB, 4096)


def test_10_mib_written(usage: Any) -> None:
    work, nothing = usage(WRITE)
    assert work["written_bytes"] - nothing["written_bytes"] == 10 * MIB
    # The scratch is memory, and still there at the end.
    assert within(
        work["memory_cache_end_bytes"] - nothing["memory_cache_end_bytes"], 10 * MIB, 65_536
    )


def test_200_processes(usage: Any) -> None:
    work, _ = usage(FORK, processes=200)
    assert work["processes_peak"] in (200, None)
    if work["processes_peak"] is None:
        assert work["sources"]["processes_peak"].startswith("unavailable: ")


def test_1000_context_switches(usage: Any) -> None:
    work, nothing = usage(SWITCH)
    assert within(
        work["voluntary_context_switches"] - nothing["voluntary_context_switches"], 1000, 1
    )


def test_what_is_hidden_is_marked_and_what_is_not_cannot_be(usage: Any) -> None:
    hide = SPIN.replace(
        "int main(void) {",
        "#include <signal.h>\nint main(void) { signal(SIGCHLD, SIG_IGN); if (fork()) { while (wait(0) > 0); return 0; }",
    )
    work, _ = usage(hide)
    # The child was not reaped by its parent, yet the cgroup knows its CPU time...
    assert work["cpu_time_ms"] >= 490
    assert work["sources"]["cpu_time_ms"] == "cgroup"
    # ...and the figures that such a job lowers say so.
    for figure in ("max_rss_bytes", "voluntary_context_switches", "written_bytes"):
        assert work["sources"][figure] == "reaped_only"


def test_every_figure_has_its_source(usage: Any) -> None:
    work, _ = usage(NOTHING)
    figures = {name: value for name, value in work.items() if name != "sources"}
    assert set(figures) == set(work["sources"])
    for name, value in figures.items():
        assert (value is None) == work["sources"][name].startswith("unavailable: "), name
