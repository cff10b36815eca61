"""Numbers, CPUs and memory are given out in order, never twice, and come back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from cellblock.engine.admission import Admission
from cellblock.engine.job import Job
from cellblock.engine.job_parser import parse_job
from cellblock.errors import Cancelled, LimitAboveMaximumError

MIB = 2**20


def job(**constraints: Any) -> Job:
    stage = {"name": "run", "command": ["true"], "constraints": constraints}
    return parse_job({"environment": "base", "stages": [stage]})


class Runner:
    """Runs jobs in threads that hold what they were given until told to end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.running: list[str] = []

    def start(self, name: str, wanted: Job) -> threading.Event:
        end = threading.Event()

        def run() -> None:
            with self._admission.job(wanted, lambda: False):
                self.running.append(name)
                end.wait(10)
                self.running.remove(name)

        threading.Thread(target=run, daemon=True).start()
        time.sleep(0.05)
        return end

    def settle(self) -> list[str]:
        time.sleep(0.05)
        return self.running


def test_no_more_at_a_time_than_allowed() -> None:
    runner = Runner(Admission(parallel_jobs=2, cpus=8, memory_bytes=2**40))
    first, *_ = [runner.start(name, job()) for name in "abc"]
    assert runner.settle() == ["a", "b"]
    first.set()
    assert runner.settle() == ["b", "c"]


@pytest.mark.parametrize(
    "constraints", [{"memory_bytes": "100MiB"}, {"cpus": 2, "memory_bytes": "4MiB"}]
)
def test_memory_and_cpus_are_reserved(constraints: dict[str, Any]) -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=3, memory_bytes=150 * MIB))
    first = runner.start("a", job(**constraints))
    runner.start("b", job(**constraints))
    assert runner.settle() == ["a"]
    first.set()
    assert runner.settle() == ["b"]


def test_a_small_job_does_not_overtake_a_large_one() -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=9, memory_bytes=150 * MIB))
    first = runner.start("first", job(memory_bytes="100MiB"))
    runner.start("large", job(memory_bytes="150MiB"))
    small = runner.start("small", job(memory_bytes="4MiB"))
    assert runner.settle() == ["first"]
    first.set()
    assert runner.settle() == ["large"]
    small.set()


def test_a_job_that_wants_more_cpus_than_there_are_gets_them_all() -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=1, memory_bytes=2**40))
    runner.start("wide", job(cpus=4))
    assert runner.settle() == ["wide"]


def test_a_job_that_can_never_run_is_refused() -> None:
    with pytest.raises(LimitAboveMaximumError, match="memory_bytes"):
        Admission(parallel_jobs=1, cpus=1, memory_bytes=10 * MIB).refuse_impossible(
            job(memory_bytes="20MiB")
        )


def test_a_waiting_job_can_be_cancelled_and_leaves_the_queue() -> None:
    admission = Admission(parallel_jobs=1, cpus=1, memory_bytes=2**40)
    runner = Runner(admission)
    first = runner.start("first", job())
    with pytest.raises(Cancelled), admission.job(job(), lambda: True):
        pytest.fail("was admitted")
    runner.start("next", job())
    first.set()
    assert runner.settle() == ["next"]


def test_a_number_is_never_given_twice() -> None:
    admission = Admission(parallel_jobs=3, cpus=99, memory_bytes=2**40)
    held: set[int] = set()
    problems: list[str] = []

    def run() -> None:
        for _ in range(20):
            with admission.job(job(), lambda: False) as number:
                if number in held or not 0 <= number < 3:
                    problems.append(f"number {number}")
                held.add(number)
                time.sleep(0.001)
                held.discard(number)

    threads = [threading.Thread(target=run) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def networked() -> Job:
    stage = {"name": "run", "command": ["true"], "network": "cache"}
    return parse_job({"environment": "base", "stages": [stage, {**stage, "name": "again"}]})


def test_network_slots_are_a_resource_of_their_own() -> None:
    admission = Admission(parallel_jobs=9, cpus=9, memory_bytes=2**40, network_slots=1)
    runner = Runner(admission)
    first = runner.start("a", networked())
    runner.start("b", networked())
    assert runner.settle() == ["a"]
    first.set()
    assert runner.settle() == ["b"]


def test_a_network_slot_alone_takes_nothing_else() -> None:
    admission = Admission(parallel_jobs=1, cpus=1, memory_bytes=2**40, network_slots=1)
    runner = Runner(admission)
    with admission.network_slot(lambda: False):
        end = runner.start("a", job())
        assert runner.settle() == ["a"]
        end.set()
        runner.start("b", networked())
        assert runner.settle() == []
    assert runner.settle() == ["b"]
    with pytest.raises(Cancelled), admission.network_slot(lambda: True):
        pass
