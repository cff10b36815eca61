"""Jails that the worker container starts; the container is played by a thread, its mounts need root."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellblock.engine import contained
from cellblock.engine.host import BoundMount, JobUids
from cellblock.engine.jail import JailSpec
from cellblock.errors import WorkerLostError

FIRST_ID = 300_000


@pytest.fixture
def spec() -> JailSpec:
    jobs = Path("/run/cellblock/jobs")
    return JailSpec(
        nsjail=Path("/opt/cellblock/bin/nsjail"),
        jobinit=Path("/opt/cellblock/engine/bin/jobinit"),
        root=Path("/var/lib/cellblock/environments/base"),
        dev=Path("/run/cellblock/dev"),
        work=jobs / "j1/work",
        tmp=jobs / "j1/tmp",
        uids=JobUids(init=FIRST_ID + 65_536, job=FIRST_ID + 65_537),
        mounts=(BoundMount(source=Path("/srv/data"), target="/mnt/data", writable=False),),
        files=((Path("/run/cellblock/slots/1/resolv.conf"), "/etc/resolv.conf"),),
    )


@pytest.fixture
def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[list[dict[str, Any]]], tuple[contained.WorkerContainer, list[Any]]]]:
    """Plays the container's first process: what it answers; what it was asked is in the list."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    monkeypatch.setattr(contained, "_detached", lambda path: os.open("/", os.O_PATH))
    threads: list[threading.Thread] = []

    def begin(answers: list[dict[str, Any]]) -> tuple[contained.WorkerContainer, list[Any]]:
        asked: list[Any] = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                message, descriptors, _, _ = socket.recv_fds(connection, 2**17, 64)
                asked.extend([json.loads(message), len(descriptors)])
                for one in descriptors:
                    os.close(one)
                for answer in answers:
                    connection.send(json.dumps(answer).encode())

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return contained.WorkerContainer(tmp_path, FIRST_ID, 65_536, 131_072, "userns"), asked

    yield begin
    for thread in threads:
        thread.join(timeout=5)
    listener.close()


def test_the_jail_is_asked_for_as_it_is_within(spec: JailSpec, play: Any) -> None:
    worker, asked = play([{"pid": 7}, {"status": 256}])
    process = worker.start(spec, 1, 2)
    assert process.wait(timeout=5) == process.returncode == 1
    request, count = asked
    assert count == len(request["mounts"]) + 2
    assert request["mounts"][0] == "/run/cellblock/jobs/j1"
    assert "--user=0:65536:1" in request["argv"]
    assert "--user=1000:65537:1" in request["argv"]
    assert "--bindmount=/run/cellblock/jobs/j1/work:/work" in request["argv"]
    assert not [word for word in request["argv"] if "/srv/data" in word]
    assert request["argv"][-1] == str(request["descriptors"][0])


@pytest.mark.parametrize("answers", [[], [{"failed": "no such file"}]])
def test_what_is_not_started_is_an_error(spec: JailSpec, play: Any, answers: Any) -> None:
    worker, _ = play(answers)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WorkerLostError, match="worker container"):
        worker.start(spec, 1, 2)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the thread's


def test_no_container_is_an_error(spec: JailSpec, tmp_path: Path) -> None:
    with pytest.raises(WorkerLostError, match="starts no jail"):
        contained.WorkerContainer(tmp_path / "none", FIRST_ID, 65_536, 131_072, "userns").start(
            spec, 1, 2
        )


@pytest.mark.parametrize("answers", [[{"pid": 7}], [{"pid": 7}, {"status": "x"}]])
def test_a_container_that_is_gone_or_talks_nonsense_has_ended_it(
    spec: JailSpec, play: Any, answers: Any
) -> None:
    worker, _ = play(answers)
    assert worker.start(spec, 1, 2).wait(timeout=5) == -9


def test_waiting_has_an_end() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = contained.ContainedProcess(here)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.kill()
    assert process.wait() == -9
    assert there.recv(1) == b""
    there.close()
