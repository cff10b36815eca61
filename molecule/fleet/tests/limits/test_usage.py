"""Usage figures against workloads of known cost, idle and with the other core busy.

A figure may be off by 3 % or by one tick of the clock concerned (a scheduler tick of 4 ms at
CONFIG_HZ=250 for CPU time, a page for memory), and by the fixed cost of starting the interpreter,
which a control run of the same program without its work measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]
pytestmark = pytest.mark.kernel

Pair = tuple[dict[str, Any], dict[str, Any]]

MIB = 2**20
TICK_MS = 10.0  # the coarsest clock concerned: USER_HZ

WORKLOADS = Path(__file__).resolve().parents[4] / "bench" / "workloads"
SPIN = (WORKLOADS / "cpu-500ms.c").read_text()
TOUCH = (WORKLOADS / "memory-100mib.c").read_text()
WRITE = (WORKLOADS / "written-10mib.c").read_text()
FORK = (WORKLOADS / "processes-200.c").read_text()
SWITCH = (WORKLOADS / "switches-1000.c").read_text()
NOTHING = (WORKLOADS / "nothing.c").read_text()
# The spin in a child that nobody waits for.
HIDDEN_SPIN = "#include <signal.h>\n#include <sys/wait.h>\n#include <unistd.h>\n" + SPIN.replace(
    "\tstruct timespec used;",
    "\tsignal(SIGCHLD, SIG_IGN);\n\tif (fork()) {\n\t\twhile (wait(0) > 0);\n\t\treturn 0;\n\t}\n"
    "\tstruct timespec used;",
)


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
def usage(submit: Callable[..., dict[str, Any]], load: None) -> Callable[..., Pair]:
    """Usage of a C program, and of one that does nothing under the same limits."""

    def run(source: str, **constraints: Any) -> Pair:
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
    # An emulated machine takes for its own what this one gave to others meanwhile: not three times over.
    for _ in range(1 if slowness == 1 else 3):
        work, nothing = usage(SPIN)
        cost = work["cpu_time_ms"] - nothing["cpu_time_ms"]
        if within(cost, 500, TICK_MS * slowness):
            break
    assert within(cost, 500, TICK_MS * slowness)
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
    work, _ = usage(HIDDEN_SPIN)
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
