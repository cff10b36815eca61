"""Jails that the worker container starts; the container is played by a thread, its mounts need root."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellblock.engine import contained
from cellblock.engine.host import BoundMount, JobUids
from cellblock.engine.jail import JailSpec
from cellblock.errors import HostSetupError, UnsupportedTargetError, WorkerLostError

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


V1 = "5:memory:/docker/c1\n4:cpu,cpuacct:/docker/c1\n3:pids:/docker/c1\n1:name=systemd:/x\n0::/y\n"


def test_the_groups_that_limit_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {1: V1, 2: "0::/docker/c1/inner\n"}
    monkeypatch.setattr(
        Path, "read_text", lambda self, **_: texts[int(self.parts[2])] if self.parts[3:] else ""
    )
    assert contained.groups_of(1) == dict.fromkeys(
        ["memory", "cpu", "cpuacct", "pids"], "/docker/c1"
    )
    assert contained.groups_of(2) == {"": "/docker/c1/inner"}


@pytest.mark.parametrize(
    ("path", "above", "expected"),
    [
        ("/docker/c1", "/docker/c1", True),
        ("/docker/c1/inner", "/docker/c1", True),
        ("/docker/c10", "/docker/c1", False),
        ("/docker", "/docker/c1", False),
        ("/anything", "/", False),
        ("/anything", "", False),
    ],
)
def test_what_is_within_a_group(path: str, above: str, expected: bool) -> None:
    assert contained.is_within(path, above) is expected


def test_a_process_that_left_its_groups_is_found_below_another_one() -> None:
    with subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE
    ) as shell:
        assert shell.stdout is not None
        child = int(shell.stdout.readline())
        groups = contained.groups_of(shell.pid)
        try:
            assert not contained.has_left(shell.pid, groups)
            assert contained.has_left(shell.pid, dict.fromkeys(groups, "/elsewhere"))
        finally:
            os.kill(child, 9)
    assert not contained.has_left(shell.pid, {"memory": "/elsewhere"})  # it is gone


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (None, UnsupportedTargetError, "s1 has none; use host"),
        ("{", HostSetupError, "is no JSON"),
        ('{"owner": 300000}', HostSetupError, "directory"),
    ],
)
def test_a_host_without_a_worker_container_says_so(
    tmp_path: Path, text: str | None, error: type[Exception], words: str
) -> None:
    path = tmp_path / "container.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=words):
        contained.WorkerContainer.load(path, "s1", 2)


def test_the_ids_of_jobs_are_beyond_those_of_the_containers_own_system(tmp_path: Path) -> None:
    path = tmp_path / "container.json"
    described = {"directory": "/run/w", "owner": FIRST_ID, "runtime": "runc", "name": "w"}
    path.write_text(json.dumps({**described, "first_job_id": 65_536, "ids": 65_540}))
    worker = contained.WorkerContainer.load(path, "s1", 2)
    assert not worker.is_boundary
    assert worker.uids(1) == JobUids(FIRST_ID + 65_538, FIRST_ID + 65_539)
    with pytest.raises(HostSetupError, match="room for 2 jobs, and s1 runs 3"):
        contained.WorkerContainer.load(path, "s1", 3)


def test_only_a_process_of_the_container_is_taken_for_a_jails(tmp_path: Path) -> None:
    class Init:
        pid = os.getpid()

        def lives(self) -> bool:
            return True

    worker = contained.WorkerContainer(tmp_path, FIRST_ID, 65_536, 131_072, "userns")
    with pytest.raises(WorkerLostError, match="does not run"):
        worker.require_own(Init())  # type: ignore[arg-type]
    # A container in the root of all groups would have every process of the host below it.
    (tmp_path / "pid").write_text("1")
    with pytest.raises(WorkerLostError, match="not its own"):
        worker.require_own(Init())  # type: ignore[arg-type]


def test_what_is_unmounted_in_the_container_stays_on_the_host(tmp_path: Path) -> None:
    script = (
        "import ctypes, os, sys\n"
        "from pathlib import Path\n"
        "from cellblock.engine import contained\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def mount(*a):\n"
        "    assert libc.mount(*a) == 0, os.strerror(ctypes.get_errno())\n"
        "top = Path(sys.argv[1])\n"
        "mount(b'none', b'/', None, 0x4000 | (1 << 20), None)\n"  # shared, as under systemd
        "mount(b'x', bytes(top), b'tmpfs', 0, None)\n"
        "(top / 'dev').mkdir(); (top / 'dev/null').touch()\n"
        "mount(b'/dev/null', bytes(top / 'dev/null'), None, 4096, None)\n"
        "tree = contained._detached(top / 'dev')\n"
        "(top / 'there').mkdir()\n"
        "assert libc.syscall(429, tree, b'', -100, bytes(top / 'there'), 4) == 0\n"
        "assert (top / 'there/null').is_char_device()\n"
        "assert libc.umount2(bytes(top / 'there/null'), 2) == 0\n"
        "print((top / 'dev/null').is_char_device())\n"
    )
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr
