"""Numbers, CPUs and memory are given out in turn, never twice, and come back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cellblock.engine.admission import Admission
from cellblock.engine.job import Job
from cellblock.engine.job_parser import parse_job
from cellblock.engine.turns import Places
from cellblock.errors import LimitAboveMaximumError

MIB = 2**20
Test = Callable[..., Coroutine[Any, Any, None]]


def job(**constraints: Any) -> Job:
    stage = {"name": "run", "command": ["true"], "constraints": constraints}
    return parse_job({"environment": "base", "stages": [stage]})


def networked() -> Job:
    stage = {"name": "run", "command": ["true"], "network": "cache"}
    return parse_job({"environment": "base", "stages": [stage, {**stage, "name": "again"}]})


def in_loop(test: Test) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 10))

    return run


class Runner:
    """Runs jobs that hold what they were given until told to end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.running: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, wanted: Job, uid: int = 1000) -> None:
        end = self.ends[name] = asyncio.Event()

        async def run() -> None:
            async with self._admission.job(wanted, uid):
                self.running.append(name)
                await end.wait()
                self.running.remove(name)

        self.tasks[name] = asyncio.create_task(run())
        await settle()

    async def end(self, name: str) -> list[str]:
        """Ends it; who runs then."""
        self.ends[name].set()
        await settle()
        return self.running


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@in_loop
async def test_no_more_at_a_time_than_allowed() -> None:
    runner = Runner(Admission(parallel_jobs=2, cpus=8, memory_bytes=2**40))
    for name in "abc":
        await runner.start(name, job())
    assert runner.running == ["a", "b"]
    assert await runner.end("a") == ["b", "c"]


@pytest.mark.parametrize(
    "constraints", [{"memory_bytes": "100MiB"}, {"cpus": 2, "memory_bytes": "4MiB"}]
)
@in_loop
async def test_memory_and_cpus_are_reserved(constraints: dict[str, Any]) -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=3, memory_bytes=150 * MIB))
    await runner.start("a", job(**constraints))
    await runner.start("b", job(**constraints))
    assert runner.running == ["a"]
    assert await runner.end("a") == ["b"]


@in_loop
async def test_a_small_job_does_not_overtake_a_large_one() -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=9, memory_bytes=150 * MIB))
    await runner.start("first", job(memory_bytes="100MiB"))
    await runner.start("large", job(memory_bytes="150MiB"))
    await runner.start("small", job(memory_bytes="4MiB"), uid=1001)
    assert runner.running == ["first"]
    assert await runner.end("first") == ["large"]


@in_loop
async def test_users_take_turns() -> None:
    runner = Runner(Admission(parallel_jobs=1, cpus=9, memory_bytes=2**40))
    for number in range(4):
        await runner.start(f"many{number}", job(), uid=1000)
    await runner.start("one", job(), uid=1001)
    await runner.start("other", job(), uid=1002)
    order = list(runner.running)
    while runner.running:
        order += await runner.end(runner.running[0])
    assert order == ["many0", "many1", "one", "other", "many2", "many3"]


@in_loop
async def test_a_job_that_wants_more_cpus_than_there_are_gets_them_all() -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=1, memory_bytes=2**40))
    await runner.start("wide", job(cpus=4))
    assert runner.running == ["wide"]


def test_a_job_that_can_never_run_is_refused() -> None:
    with pytest.raises(LimitAboveMaximumError, match="memory_bytes"):
        Admission(parallel_jobs=1, cpus=1, memory_bytes=10 * MIB).refuse_impossible(
            job(memory_bytes="20MiB")
        )


@in_loop
async def test_who_is_cancelled_leaves_the_queue_or_gives_back_what_it_has() -> None:
    runner = Runner(Admission(parallel_jobs=1, cpus=1, memory_bytes=2**40))
    for name in ("first", "waiting", "next"):
        await runner.start(name, job())
    runner.tasks["waiting"].cancel()
    await settle()
    assert runner.running == ["first"]
    runner.tasks["first"].cancel()
    await settle()
    assert runner.running == ["first", "next"]  # the first had no time to leave the list


@in_loop
async def test_a_number_is_never_given_twice() -> None:
    admission = Admission(parallel_jobs=3, cpus=99, memory_bytes=2**40)
    held: set[int] = set()

    async def run(uid: int) -> None:
        for _ in range(20):
            async with admission.job(job(), uid) as number:
                assert number not in held and 0 <= number < 3
                held.add(number)
                await asyncio.sleep(0.0001)
                held.discard(number)

    await asyncio.gather(*(run(uid) for uid in range(10)))


@in_loop
async def test_network_slots_are_a_resource_of_their_own() -> None:
    runner = Runner(Admission(parallel_jobs=9, cpus=9, memory_bytes=2**40, network_slots=1))
    await runner.start("a", networked())
    await runner.start("b", networked())
    assert runner.running == ["a"]
    assert await runner.end("a") == ["b"]


@in_loop
async def test_a_network_slot_alone_takes_nothing_else() -> None:
    admission = Admission(parallel_jobs=1, cpus=1, memory_bytes=2**40, network_slots=1)
    runner = Runner(admission)
    async with admission.network_slot(0):
        await runner.start("a", job())
        assert runner.running == ["a"]
        await runner.end("a")
        await runner.start("b", networked())
        assert runner.running == []
    await settle()
    assert runner.running == ["b"]


@in_loop
async def test_places_are_for_users_in_turn() -> None:
    places, order = Places(1), []

    async def visit(uid: int) -> None:
        async with places.place(uid):
            order.append(uid)
            await asyncio.sleep(0)

    await asyncio.gather(*(visit(uid) for uid in (1, 1, 1, 2, 2, 3)))
    assert order == [1, 1, 2, 3, 1, 2]


@in_loop
async def test_who_may_not_is_passed_over_until_it_may() -> None:
    admission = Admission(parallel_jobs=1, cpus=9, memory_bytes=2**40)
    runner = Runner(admission)
    unread = {1000}
    admission.admit_only(lambda uid: uid not in unread)
    await runner.start("full", job(), uid=1000)
    await runner.start("other", job(), uid=1001)
    assert runner.running == ["other"]
    assert await runner.end("other") == []
    unread.clear()
    admission.admit()
    await settle()
    assert runner.running == ["full"]
