"""Workers: tasks in processes of their own, which may be cancelled and killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cellblock.engine import request as request_room
from cellblock.engine.limits import StageConstraints
from cellblock.engine.result import JobResult, Output, StageResult, Verdict
from cellblock.engine.runner import AdmittedJob, Runner, Slots
from cellblock.engine.workers import ForkServer, Workers
from cellblock.errors import (
    Cancelled,
    HostOverloadedError,
    InternalError,
    InvalidJobError,
    ServiceUnavailableError,
)


class FakeRunner:
    """Stands where jails would be; the job's id decides what happens."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def run(self, admitted: AdmittedJob, slots: Slots, cancelled: Callable[[], bool]) -> JobResult:
        name = admitted.job_id
        (self._directory / name).write_text(str(os.getpid()))
        if name == "wait":
            while not cancelled():
                time.sleep(0.005)
            (self._directory / "put-away").touch()
            raise Cancelled
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "refused":
            raise InvalidJobError("files.x", "does not fit", "send less")
        if name == "defect":
            raise RuntimeError("a defect")
        output = b"x" * (10**5 if name == "large" else 1)
        if name == "network":
            with slots.take("run") as slot:
                output = os.read(slot.namespace, 100) + repr(slot.traffic()).encode()
                if admitted.queue_time_ms:
                    while not cancelled():
                        time.sleep(0.005)
                    raise Cancelled
        stage = StageResult("run", Verdict.OK, StageConstraints(), stdout=Output(output))
        return JobResult(name, name, "base", "here", {}, (stage,))

    def clear(self, admitted: AdmittedJob) -> None:
        (self._directory / f"{admitted.job_id}-cleared").touch()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    runner = cast(Runner, FakeRunner(tmp_path))
    fork_server = ForkServer(runner)
    yield Workers(fork_server, runner, kept=2)
    fork_server.close()


def admitted(name: str, queue_time_ms: float = 0.0) -> AdmittedJob:
    nothing = cast(Any, None)
    return AdmittedJob(name, nothing, nothing, nothing, nothing, frozenset({"run"}), queue_time_ms)


class Slot:
    """A descriptor that can be read, in the place of a namespace."""

    def __init__(self, path: Path) -> None:
        self.path, self.files, self.is_open = path, (), False

    @contextlib.contextmanager
    def take(self, stage: str, cancelled: Callable[[], bool]) -> Iterator[Any]:
        self.path.write_text(f"slot of {stage}, ")
        with self.path.open() as file:
            self.is_open = True
            yield SimpleNamespace(
                namespace=file.fileno(), files=self.files, traffic=lambda: "12 packets"
            )
        self.is_open = False


async def run(workers: Workers, name: str, tmp_path: Path, slot: Any = None, **more: Any) -> bytes:
    record = await workers.run(admitted(name, **more), tmp_path / "record", slot)
    return record if isinstance(record, bytes) else record.read_bytes()


def test_records_come_back_and_workers_are_used_again(workers: Workers, tmp_path: Path) -> None:
    async def test() -> None:
        assert b'"stdout": {"text": "x"' in await run(workers, "small", tmp_path)
        assert not (tmp_path / "record").exists()
        assert len(await run(workers, "large", tmp_path)) > 10**5
        assert (tmp_path / "record").exists()

    asyncio.run(test())
    assert (tmp_path / "small").read_text() == (tmp_path / "large").read_text() != str(os.getpid())


def test_errors_come_back_as_what_they_are(
    workers: Workers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        with pytest.raises(InvalidJobError) as refused:
            await run(workers, "refused", tmp_path)
        assert str(refused.value) == "files.x: does not fit; send less"
        with pytest.raises(Exception, match="RuntimeError: a defect"):
            await run(workers, "defect", tmp_path)

    asyncio.run(test())


def test_a_worker_that_is_killed_costs_its_task_alone(workers: Workers, tmp_path: Path) -> None:
    async def test() -> None:
        killed, small = await asyncio.gather(
            run(workers, "killed", tmp_path),
            run(workers, "small", tmp_path),
            return_exceptions=True,
        )
        assert isinstance(killed, InternalError) and "lost the process" in str(killed)
        assert isinstance(small, bytes)
        assert (tmp_path / "killed-cleared").exists()
        await run(workers, "small", tmp_path)

    asyncio.run(test())


def test_who_is_cancelled_has_seen_its_job_put_away(workers: Workers, tmp_path: Path) -> None:
    async def test() -> None:
        task = asyncio.create_task(run(workers, "wait", tmp_path))
        while not (tmp_path / "wait").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (tmp_path / "put-away").exists()
        await run(workers, "small", tmp_path)

    asyncio.run(asyncio.wait_for(test(), 10))


@pytest.mark.skipif(os.geteuid() != 0, reason="descriptors of another process are for root")
def test_slots_are_held_by_the_service(workers: Workers, tmp_path: Path) -> None:
    slot = Slot(tmp_path / "slot")

    async def test() -> None:
        assert b"slot of run, '12 packets'" in await run(workers, "network", tmp_path, slot.take)
        assert not slot.is_open
        task = asyncio.create_task(run(workers, "network", tmp_path, slot.take, queue_time_ms=1.0))
        while not slot.is_open:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not slot.is_open

    asyncio.run(asyncio.wait_for(test(), 10))


def test_a_request_is_taken_apart_and_a_defect_in_it_is_an_answer(
    workers: Workers, tmp_path: Path
) -> None:
    job = b'{"environment": "base", "stages": [], "files": {"x": {"text": "' + b"y" * 5000 + b'"}}}'
    job = job.replace(b"[]", b'[{"name": "run", "command": ["true"]}]')

    async def test() -> None:
        line, contents = tmp_path / "line", tmp_path / "contents"
        line.write_bytes(b'{"version": 3, "op": "run", "jobs": [' + job + b", 7]}\n")
        request = pickle.loads(await workers.parse(line, contents))
        (parsed,) = request.jobs
        content = parsed.files[0].content
        assert (len(content), contents.read_bytes()) == (5000, b"y" * 5000)
        assert isinstance(request.refused, InvalidJobError)
        line.write_bytes(b"[" * 10**6)
        with pytest.raises(ServiceUnavailableError, match="too many parts"):
            await workers.parse(line, tmp_path / "more")

    asyncio.run(test())


def test_a_request_that_is_long_without_files_is_refused(workers: Workers, tmp_path: Path) -> None:
    stage = {"name": "run", "command": ["true", "x" * 100_000]}
    jobs = [{"environment": "base", "stages": [stage]}] * 60
    line = tmp_path / "line"
    line.write_text(json.dumps({"version": 3, "op": "check", "jobs": jobs}) + "\n")

    async def test() -> None:
        with pytest.raises(ServiceUnavailableError, match="bytes besides files and inputs"):
            await workers.parse(line, tmp_path / "contents")
        line.write_text('{"version": 3, "op": "environments", "slot": "' + "x" * 10**7 + '"}\n')
        assert len(await workers.parse(line, tmp_path / "more")) < 1000

    asyncio.run(test())


def test_a_request_that_takes_too_long_is_refused_and_nobody_waits_for_one_that_is_not_wanted(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        while True:
            pass

    monkeypatch.setattr(request_room, "parse", never)  # workers are forked later
    monkeypatch.setattr(request_room, "MAX_CPU_S", 0.2)
    fork_server = ForkServer(workers._runner)
    slow = Workers(fork_server, workers._runner, kept=1)
    line = tmp_path / "line"
    line.touch()

    async def test() -> None:
        with pytest.raises(ServiceUnavailableError, match="takes too long"):
            await slow.parse(line, tmp_path / "contents")
        parsing = asyncio.create_task(slow.parse(line, tmp_path / "more"))
        await asyncio.sleep(0.05)
        begun = time.monotonic()
        parsing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await parsing
        assert time.monotonic() - begun < 0.1

    asyncio.run(test())
    fork_server.close()


def test_an_idle_worker_that_was_killed_costs_nobody(workers: Workers, tmp_path: Path) -> None:
    workers.prepare()

    async def test() -> None:
        await run(workers, "small", tmp_path)
        os.kill(int((tmp_path / "small").read_text()), signal.SIGKILL)
        await asyncio.sleep(0.1)
        await run(workers, "small", tmp_path)

    asyncio.run(test())


def test_who_is_cancelled_twice_has_seen_its_job_put_away_too(
    workers: Workers, tmp_path: Path
) -> None:
    async def test() -> None:
        task = asyncio.create_task(run(workers, "wait", tmp_path))
        while not (tmp_path / "wait").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (tmp_path / "put-away").exists()

    asyncio.run(asyncio.wait_for(test(), 10))


def test_a_long_subject_is_cut() -> None:
    problem = InvalidJobError("x" * 10**6, "y" * 10**6, "z" * 10**6)
    assert len(str(problem)) < 6000


def test_errors_travel() -> None:
    problem = InvalidJobError("a", "b", "c")
    assert pickle.loads(pickle.dumps(problem)).as_dict() == problem.as_dict()


def test_no_room_for_a_process_is_the_hosts_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks = iter([os.fork])

    def fork() -> int:
        for real in forks:
            return real()
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    fork_server = ForkServer(cast(Runner, FakeRunner(tmp_path)))
    with pytest.raises(HostOverloadedError, match="cannot start a process"):
        fork_server.fork()
    fork_server.close()
