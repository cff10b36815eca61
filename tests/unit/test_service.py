"""The service's socket: its answers, its errors, and that a lost client ends its job."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cellblock.engine import batch, cli, client, protocol, service
from cellblock.engine import request as request_room
from cellblock.engine import spool as spool_room
from cellblock.engine.host import Environment
from cellblock.engine.job import Job, Stage
from cellblock.engine.limits import StageConstraints
from cellblock.engine.result import JobResult, Output, StageResult, Usage, Verdict
from cellblock.engine.run import Engine
from cellblock.engine.shares import Shares
from cellblock.errors import (
    CellblockError,
    HostSetupError,
    InternalError,
    ServiceUnavailableError,
    UnknownEnvironmentError,
)
from cellblock.job_network.policy import NetworkPolicy


class FakeHost:
    parallel_jobs = 2

    def environments(self) -> dict[str, Environment]:
        return {"base": Environment("base", Path("/"), "/bin", "a shell")}


class FakeEngine:
    """Stands where workers, nsjail and cgroups would be; the job's name decides what happens."""

    host = FakeHost()

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.held: list[Stage] = []
        self.calls: list[str] = []
        self.uids: set[int] = set()
        self.admitted = False

    def check(self, job: Job) -> Job:
        self.calls.append(f"check {job.name}")
        if job.environment != "base":
            raise UnknownEnvironmentError("environment", "is unknown", "use base")
        return job

    async def parse(self, line: Path, contents: Path) -> bytes:
        self.calls.append("parse")
        return pickle.dumps(request_room.parse(line.read_bytes(), contents.open("xb")))

    def admit_only(self, may_run: Callable[[int], bool]) -> None:
        self.may_run = may_run

    def admit(self) -> None:
        self.admitted = True

    @contextlib.asynccontextmanager
    async def hold_slot(self, stage: Stage, uid: int) -> AsyncIterator[Any]:
        self.held.append(stage)
        try:
            with open("/proc/self/ns/net") as namespace:
                yield SimpleNamespace(
                    address="192.0.2.1", ipv6_address="2001:db8::1", namespace=namespace.fileno()
                )
        finally:
            self.ended.set()

    async def run(self, job: Job, uid: int, record: Path) -> bytes | Path:
        self.calls.append(f"run {job.name}")
        self.uids.add(uid)
        if job.name == "slow":
            await asyncio.sleep(0.2)
        if job.name == "broken":
            raise InternalError("scratch", "failed", "see the journal")
        if job.name == "crash":
            raise RuntimeError("a defect")
        if job.name == "wait":
            try:
                await asyncio.sleep(60)
            finally:
                self.ended.set()
        verdict = Verdict.OK if job.name in ("good", "large") else Verdict.NONZERO_EXIT
        stage = StageResult(
            "run",
            verdict,
            StageConstraints(),
            exit_code=0 if job.name == "good" else 1,
            stdout=Output(b"out" if job.name != "large" else b"o" * 10**6),
            usage=Usage(1.0, 1.0, 1.0, 0.0, 4096, 0, *(None,) * 14, {}),
        )
        result = JobResult("id", job.name, "base", "here", {}, (stage,))
        line = json.dumps(result.as_dict()).encode()
        if job.name != "large":
            return line
        record.write_bytes(line)
        return record


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def engine(tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    fake = FakeEngine()
    with serving(fake, tmp_path / "socket", spool):
        for door in (client.run, client.check, client.environments, client.hold_slot):
            path = tmp_path / "socket"
            monkeypatch.setattr(client, door.__name__, functools.partial(door, socket_path=path))
        monkeypatch.chdir(tmp_path)
        yield fake


@contextlib.contextmanager
def serving(fake: FakeEngine, path: Path, spool: Path) -> Iterator[None]:
    """A service on ``path``, in a thread; signals are for a process's main thread, and so are left out."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    loop = asyncio.new_event_loop()
    loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
    ended: list[asyncio.Task[None]] = []

    async def serve() -> None:
        ended.append(
            loop.create_task(
                service._Service(cast(Engine, fake), spool).run(listener, cast(Any, None))
            )
        )
        await asyncio.wait(ended)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(lambda: ended[0].cancel())
        thread.join(10)
        assert not thread.is_alive()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        listener.close()


def job(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "environment": "base",
        "stages": [{"name": "run", "command": ["true"]}],
        **changes,
    }


def request(op: str, *jobs: Any) -> bytes:
    return json.dumps({"version": 3, "op": op, "jobs": jobs}).encode() + b"\n"


def write(name: str, data: Any) -> str:
    Path(name).write_text(json.dumps(data))
    return name


def test_run_prints_one_record_per_job(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write("good.json", job("good")), write("bad.json", job("bad"))]
    assert cli.main(["run", *paths]) == cli.EXIT_JOB_NOT_OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["name"], r["verdict"]) for r in records] == [("good", "ok"), ("bad", "nonzero_exit")]
    assert cli.main(["run", paths[0]]) == cli.EXIT_OK


def test_run_as_table(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--format=table", write("good.json", job("good"))]) == 0
    header, row, output = capsys.readouterr().out.splitlines()
    assert output == "good/run stdout: out"
    assert header.split() == ["job", "host", "stage", "verdict", "exit", "wall", "cpu", "memory"]
    assert row.split() == ["good", "here", "run", "ok", "0", "1", "ms", "1", "ms", "4.0", "KiB"]


def test_no_job_is_run_when_one_is_invalid(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write("good.json", job("good"))
    bad = write("bad.json", job("bad", environment="none"))
    assert cli.main(["run", good, bad]) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr()
    assert engine.calls == ["check good", "check bad"]
    assert json.loads(printed.out)["error"]["code"] == "unknown_environment"
    assert printed.err.startswith("cellblock: bad.json: environment: is unknown")


def test_a_wrong_job_of_a_list_is_called_by_its_name(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job("good"), job("bad", environment="none")]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(jobs)))
    assert cli.main(["run", "-"]) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("cellblock: job bad: environment: is unknown")
    nameless = {key: value for key, value in jobs[1].items() if key != "name"}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([jobs[0], nameless])))
    assert cli.main(["run", "-"]) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("cellblock: job 2: environment: is unknown")


def test_check_runs_nothing(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", write("crash.json", job("crash"))]) == cli.EXIT_OK
    assert capsys.readouterr().out == ""
    assert engine.calls == ["check crash"]


def test_a_defect_is_an_answer_and_loses_no_other_record(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write("good.json", job("good")), write("crash.json", job("crash"))]
    assert cli.main(["run", *paths]) == cli.EXIT_UNAVAILABLE
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0]["verdict"] == "ok"
    assert records[1]["error"]["code"] == "internal_error"


def names(outcomes: Iterable[dict[str, Any] | CellblockError]) -> list[str]:
    return [o.code if isinstance(o, CellblockError) else o["name"] for o in outcomes]


def test_a_batch_is_one_request_and_each_job_is_checked_once_before_any_runs(
    engine: FakeEngine,
) -> None:
    wanted = ["slow", "good", "broken", "good", "crash", "good"]
    assert names(client.run([(name, job(name)) for name in wanted])) == [
        *("slow", "good", "internal_error", "good", "internal_error", "good"),
    ]
    assert engine.calls[:6] == [f"check {name}" for name in wanted]
    assert sorted(engine.calls[6:]) == sorted(f"run {name}" for name in wanted)


def test_records_come_as_soon_as_they_are_there(engine: FakeEngine) -> None:
    outcomes = client.run([(name, job(name)) for name in ("good", "wait")])
    assert names([next(outcomes)]) == ["good"]
    outcomes.close()  # type: ignore[attr-defined]
    assert engine.ended.wait(5)


def test_a_batch_that_one_request_cannot_hold_is_checked_as_a_whole_too(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_STRUCTURE", 1100)  # client and service both read it there
    jobs = [(str(n), job(f"good{n}", environment="base" if n < 39 else "none")) for n in range(40)]
    with pytest.raises(UnknownEnvironmentError, match="39: environment: is unknown"):
        list(client.run(jobs))
    assert not any(call.startswith("run") for call in engine.calls)
    assert names(client.run(jobs[:39])) == [f"good{n}" for n in range(39)]


def test_a_service_that_ends_loses_no_record_that_was_there(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()

    def answer_once() -> None:
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        connection.sendall(b'{"job": 0, "result": {"name": "first"}}\n{"job": 1, "res')
        connection.close()

    threading.Thread(target=answer_once, daemon=True).start()
    jobs = [(str(n), job("good")) for n in range(3)]
    assert names(client.run(jobs, tmp_path / "socket")) == [
        *("first", "service_unavailable", "service_unavailable"),
    ]


def test_no_more_records_wait_for_an_earlier_one_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "MAX_UNSENT", 3)
    started: list[str] = []

    async def run(name: str) -> str:
        started.append(name)
        await asyncio.sleep(0.2 if name == "slow" else 0)
        return name

    async def collect() -> list[str | CellblockError]:
        outcomes = batch.run_all(["slow", *"abcdefghi"], run, 2)
        first = await anext(outcomes)
        assert len(started) <= 4
        return [first] + [outcome async for outcome in outcomes]

    assert asyncio.run(collect()) == ["slow", *"abcdefghi"]


def test_who_closes_a_batch_ends_what_runs() -> None:
    ended: list[str] = []

    async def run(name: str) -> str:
        try:
            await asyncio.sleep(0 if name == "quick" else 60)
        finally:
            await asyncio.sleep(0.01)  # putting things away takes a moment
            ended.append(name)
        return name

    async def collect() -> None:
        outcomes = batch.run_all(["quick", "a", "b", "never"], run, 3)
        assert await anext(outcomes) == "quick"
        await outcomes.aclose()
        assert sorted(ended) == ["a", "b", "quick"]

    asyncio.run(collect())


def test_shares_are_bounded_for_each_and_all_and_root_is_not_one_of_many() -> None:
    shares = Shares("many connections", 5, 3, "keep fewer")
    with shares.of(7, 2):
        assert not shares.has_room(7, 2)
        with pytest.raises(ServiceUnavailableError, match="too many connections of this user"):
            shares.take(7, 2)
        assert shares.has_room(0, 3) and not shares.has_room(0, 4)
        shares.take_anyway(8, 9)
        assert not shares.has_room(7) and not shares.has_room(0)
        shares.give(8, 9)
    assert shares.held(7) == 0


def test_environments(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["environments"]) == 0
    assert capsys.readouterr().out.split() == ["base", "a", "shell"]


@pytest.mark.parametrize("more", [b"", b"\n"], ids=["", "that sent a byte too many"])
def test_a_lost_client_ends_its_job(engine: FakeEngine, tmp_path: Path, more: bytes) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(tmp_path / "socket"))
    connection.sendall(request("run", job("wait"), job("wait")))
    time.sleep(0.1)
    connection.sendall(more)
    assert not engine.ended.wait(0.2)
    connection.close()
    assert engine.ended.wait(5)


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (b"nonsense\n", "not a line of JSON"),
        (b"[" * 50_000 + b"\n", "not a line of JSON"),
        (b"[]\n", "version None of the protocol, this service speaks 3; use the cellblock"),
        (b'{"op": "run", "job": {}}\n', "version None of the protocol"),
        (b'{"version": 4, "op": "run"}\n', "version 4 of the protocol"),
        (b'{"version": 3, "op": "reboot"}\n', "operation 'reboot'"),
        (b'{"version": 3, "op": "run"}\n', "jobs: is None, not a list"),
        (b'{"version": 3, "op": "run", "jobs": [3]}\n', "job: is 3, not a mapping"),
    ],
)
def test_bad_requests(engine: FakeEngine, tmp_path: Path, sent: bytes, complaint: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "socket"))
        connection.sendall(sent)
        answer = json.loads(connection.makefile().readline())
    assert complaint in answer["error"]["text"]


def test_a_large_request_and_a_large_record_go_through_files(
    engine: FakeEngine, spool: Path
) -> None:
    jobs = [(n, job(n, files={"big": {"text": "x" * 10**6}})) for n in ("large", "good")]
    records = list(client.run(jobs))
    assert [r["stages"][0]["stdout"]["size_bytes"] for r in records] == [10**6, 3]  # type: ignore[index]
    assert engine.calls[0] == "parse"
    assert engine.admitted and engine.may_run(1000)  # what they took was given back
    deadline = time.monotonic() + 5
    while list(spool.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(spool.iterdir()) == []


def test_a_user_has_so_much_in_flight_and_no_more(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(spool_room, "MAX_BYTES", 3 * 10**6)
    with serving(engine, tmp_path / "small", tmp_path / "small-spool"):
        big = job("wait", files={"big": {"text": "x" * 10**6}})
        waiting = client.run([("one", big)], socket_path=tmp_path / "small")
        threading.Thread(target=lambda: next(waiting, None), daemon=True).start()
        time.sleep(0.3)
        with pytest.raises(ServiceUnavailableError, match="too many bytes in requests"):
            client.check(
                [("two", {**big, "files": {"big": {"text": "x" * 2 * 10**6}}})],
                socket_path=tmp_path / "small",
            )
        client.check(
            [("three", job("good"))], socket_path=tmp_path / "small"
        )  # small ones need none


def test_jobs_that_wait_are_counted(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(service, "MAX_JOBS", 2)
    with serving(engine, tmp_path / "few", tmp_path / "few-spool"):
        with pytest.raises(ServiceUnavailableError, match="too many jobs waiting"):
            list(client.run([("j", job("good"))] * 3, socket_path=tmp_path / "few"))
        assert names(client.run([("j", job("good"))] * 2, socket_path=tmp_path / "few")) == [
            "good",
            "good",
        ]


def test_no_service(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailableError, match="does not answer"):
        client.environments(tmp_path / "none")
    with pytest.raises(ServiceUnavailableError, match="does not answer"):
        list(client.run([("one", job("good"))], tmp_path / "none"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(client, "PATIENCE_S", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_service_that_never_starts_keeps_nobody_waiting(tmp_path: Path) -> None:
    """systemd holds its socket, so connecting works."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        started = time.monotonic()
        with pytest.raises(ServiceUnavailableError, match="answers nobody"):
            client.environments(path)
        (outcome,) = client.run([("one", job("good"))], path)
        assert isinstance(outcome, ServiceUnavailableError)
        # More than the socket takes: the client waits while it sends.
        files = {"big": {"text": "x" * 2**21}}
        with pytest.raises(ServiceUnavailableError, match="does not answer"):
            client.check([("one", job("good", files=files))], path)
        assert time.monotonic() - started < 15


@pytest.mark.usefixtures("impatient")
def test_who_waits_for_a_service_that_answers_goes_on_waiting(engine: FakeEngine) -> None:
    outcomes = client.run([("wait", job("wait"))])
    waiting = threading.Thread(target=lambda: next(outcomes, None), daemon=True)
    waiting.start()
    assert not engine.ended.wait(2)  # twenty times the interval, twice the patience
    assert waiting.is_alive()


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["run"], ["fly"], ["run", "--format=xml", "x"]),
        ["slot", "--policy=cache", "--constraint=memory_bytes=64MiB", "--", "true"],
        ["slot", "--policy=cache", "--constraint=netwrk=1", "--", "true"],
    ],
)
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.EXIT_BAD_INPUT


@pytest.mark.skipif(os.geteuid() != 0, reason="network slots are held for root only")
def test_a_slot_is_held_as_long_as_its_command_runs(engine: FakeEngine) -> None:
    with client.hold_slot({"network": "cache"}) as (namespace, about):
        assert engine.held[0].network is NetworkPolicy.CACHE
        assert about == {"address": "192.0.2.1", "ipv6": "2001:db8::1", "interface": "job0"}
        assert os.fstat(namespace).st_ino == os.stat("/proc/self/ns/net").st_ino
        assert not engine.ended.wait(0.1)
    assert engine.ended.wait(5)
    # This namespace, so that it works without any right over another.
    assert cli.main(["slot", "--policy", "cache", "--", "sh", "-c", "exit 7"]) == 7
    assert cli.main(["slot", "--policy", "cache", "--", "sh", "-c", "kill -9 $$"]) == 137
    assert cli.main(["slot", "--policy", "cache", "--", "/absent"]) == 127
    options = ["--policy", "internet", "--constraint", "network_bytes=1MiB"]
    assert cli.main(["slot", *options, "--", "true"]) == 0
    assert engine.held[-1].network is NetworkPolicy.INTERNET
    assert engine.held[-1].constraints.network_bytes == 2**20


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "none", "true"],
        ["--policy", "allow", "--allow", "tcp:198.51.100.10", "true"],
        ["--policy", "cache", "--constraint", "network_bytes", "true"],
    ],
)
def test_slots_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["slot", *arguments])
    assert "cellblock slot: error" in capsys.readouterr().err


def test_a_hangup_takes_over_the_configuration_or_says_why_not(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "cellblock")
    noted: list[float] = []
    denied = SimpleNamespace(note_taken_over=noted.append)
    problem = HostSetupError("engine.json", "is not JSON", "mend it")
    found: list[Any] = [denied, SimpleNamespace(), problem]
    engine = cast(
        Engine,
        SimpleNamespace(
            reconfigure=lambda host: host is denied,
            host=FakeHost(),
            admit=None,
            admit_only=lambda may_run: None,
        ),
    )

    def load() -> Any:
        if isinstance(found[0], Exception):
            raise found.pop(0)
        return found.pop(0)

    async def hang_up() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        serving = asyncio.create_task(
            service._Service(engine, tmp_path / "spool").run(listener, load)
        )
        for number, says in enumerate(
            ("reconfigured", "not reconfigured: this change takes a restart", "is not JSON"), 2
        ):
            await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(10):
                while len(caplog.messages) < number:
                    await asyncio.sleep(0.01)
            assert says in caplog.messages[-1]
        assert len(noted) == 1  # what takes a restart is still to be taken over
        serving.cancel()
        listener.close()

    asyncio.run(hang_up())
