"""The supervisor under attack: by those who may submit, and by jobs that aim at it or past it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Submit = Callable[..., dict[str, Any]]

MIB = 2**20
CONNECT = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/cellblock/cellblock.socket')\n"


def python(program: str, **constraints: Any) -> dict[str, Any]:
    return {
        "environment": "python",
        "stages": [
            {"name": "run", "command": ["python3", "-c", program], "constraints": constraints}
        ],
    }


def on_host(host: Any, program: str) -> Any:
    encoded = base64.b64encode(program.encode()).decode()
    return host.run(f"echo {encoded} | base64 -d | python3 -")


@pytest.fixture
def quick(slowness: int) -> None:
    """For what does not depend on the host's kernel, and takes minutes on an emulated one."""
    if slowness > 1:
        pytest.skip("thousands of threads take an emulated machine minutes")


@pytest.mark.usefixtures("quick")
def test_many_idle_connections(host: Any, submit: Submit) -> None:
    # More descriptors than select(2) knows; the job among them runs all the same.
    program = (
        "import json, resource, socket, subprocess\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        "held = []\n"
        "for _ in range(1300):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect('/run/cellblock/cellblock.socket'); held.append(s)\n"
        "job = {'environment': 'base', 'stages': [{'name': 'run', 'command': ['echo', 'through']}]}\n"
        "print(subprocess.run(['cellblock', 'run', '-'], input=json.dumps(job), text=True,"
        " capture_output=True).stdout)\n"
    )
    record = json.loads(on_host(host, program).stdout)
    assert record["stages"][0]["stdout"]["text"] == "through\n"


@pytest.mark.usefixtures("quick")
def test_a_user_has_a_share_of_the_connections(host: Any) -> None:
    host.check_output("id mallory >/dev/null 2>&1 || useradd -G cellblock mallory")
    program = (
        "import json, os, pwd, socket\n"
        "os.initgroups('mallory', pwd.getpwnam('mallory').pw_gid)\n"
        "os.setuid(pwd.getpwnam('mallory').pw_uid)\n"
        "held = []\n"
        "for _ in range(300):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect('/run/cellblock/cellblock.socket'); held.append(s)\n"
        "print(held[-1].makefile().readline())\n"
    )
    assert "too many connections" in json.loads(on_host(host, program).stdout)["error"]["text"]


@pytest.mark.parametrize(
    "request_text",
    [
        json.dumps({"version": 3, "op": "check", "jobs": [python("pass", memory_bytes="9" * 400_000 + "B")]}),
        "[" + "[]," * 500_000 + "[]]",
    ],
    ids=["long-quantity", "many-parts"],
)  # fmt: skip
def test_a_request_does_not_hold_up_the_supervision(
    host: Any, slowness: int, request_text: str
) -> None:
    program = (
        CONNECT + "import json, sys, time\n"
        f"request = {request_text!r} + '\\n'\n"
        "start = time.monotonic()\n"
        "s.sendall(request.encode())\n"
        "print(json.dumps([json.loads(next(filter(str.strip, s.makefile()))), time.monotonic() - start]))\n"
    )
    encoded = base64.b64encode(program.encode()).decode()
    # Too long for a command line: in pieces.
    host.check_output("rm -f /tmp/request.b64")
    for start in range(0, len(encoded), 100_000):
        host.check_output(f"printf %s {encoded[start : start + 100_000]} >> /tmp/request.b64")
    answer, seconds = json.loads(
        host.check_output("base64 -d /tmp/request.b64 > /tmp/request.py; python3 /tmp/request.py")
    )
    assert "error" in answer
    assert seconds < 2 * slowness


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_socket_buffers_are_limited(host: Any, kind: str) -> None:
    udp = (
        "a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); a.bind(('127.0.0.1', 0))\n"
        "    a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)\n"
        "    for _ in range(12): a.sendto(b'x' * 60000, a.getsockname())\n    keep.append(a)"
    )
    tcp = (
        "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(1)\n"
        "    a = socket.create_connection(l.getsockname()); b, _ = l.accept(); a.setblocking(False)\n"
        "    for _ in range(100):\n"
        "        try: a.send(b'x' * 65536)\n"
        "        except BlockingIOError: break\n"
        "    keep.append((a, b)); l.close()"
    )
    program = (
        "import os, socket, time\nkeep = []\n"
        "for _ in range(3): os.fork()\n"
        f"for _ in range(100):\n    {udp if kind == 'udp' else tcp}\n"
        "time.sleep(4)\n"
    )
    job = python(program, memory_bytes="128MiB", open_files=1000, wall_time_ms="20s")
    encoded = base64.b64encode(json.dumps(job).encode()).decode()
    watched = host.check_output(
        "free() { awk '/MemAvailable/ {print $2}' /proc/meminfo; }; before=$(free); least=$before; "
        f"echo {encoded} | base64 -d | cellblock run - > /tmp/sockets.json & "
        "for i in $(seq 60); do sleep 0.1; now=$(free); [ $now -lt $least ] && least=$now; done; wait; "
        "echo $before $least"
    ).split()
    dropped = (int(watched[0]) - int(watched[1])) * 1024
    assert dropped < 300 * MIB, f"{dropped // MIB} MiB under a limit of 128 MiB"


@pytest.mark.kernel
def test_a_throttled_stage_still_dies_at_once(submit: Submit, slowness: int) -> None:
    program = (
        "import os, signal\n"
        "for _ in range(300):\n"
        "    if os.fork() == 0: signal.pause()\n"
        "signal.pause()\n"
    )
    job = python(program, cpus=0.02, processes=400, wall_time_ms="6s", memory_bytes="512MiB")
    stage = submit(job)["stages"][0]
    assert [violation["limit"] for violation in stage["violations"]] == ["wall_time_ms"]
    assert stage["usage"]["wall_time_ms"] < 4 * 6000 * slowness


def test_a_descriptor_in_flight_is_no_wall_time(submit: Submit, slowness: int) -> None:
    program = (
        "import os, socket\na, b = socket.socketpair()\n"
        "socket.send_fds(a, [b'x'], [1, a.fileno(), b.fileno()])\n"
        "socket.send_fds(b, [b'x'], [1, a.fileno(), b.fileno()])\nos._exit(0)\n"
    )
    stage = submit(python(program))["stages"][0]
    assert stage["verdict"] == "ok"
    assert stage["usage"]["wall_time_ms"] < 400 * slowness


def test_a_record_of_control_characters_stays_small(submit: Submit) -> None:
    stage = submit(python("import os; os.write(1, b'\\x01' * 500000)"))["stages"][0]
    assert "base64" in stage["stdout"] and stage["stdout"]["size_bytes"] == 500_000


def test_less_scratch_than_an_earlier_stage_left(submit: Submit) -> None:
    fill = {"name": "fill", "command": ["sh", "-c", "head -c 8M /dev/zero > kept"]}
    script = "wc -c < kept; head -c 2M /dev/zero > more && echo wrote more"
    small = {
        "name": "small",
        "command": ["sh", "-c", script],
        "constraints": {"scratch_bytes": "1MiB", "scratch_files": 16},
    }
    record = submit({"environment": "base", "stages": [fill, small]})
    assert record["stages"][1]["verdict"] == "nonzero_exit"
    assert record["stages"][1]["stdout"]["text"] == "8388608\n"
    assert "No space left" in record["stages"][1]["stderr"]["text"]


def test_interrupting_the_command_ends_its_jobs(host: Any, slowness: int) -> None:
    stage = {"name": "run", "command": ["sleep", "246802"], "constraints": {"wall_time_ms": "2min"}}
    job = {"environment": "base", "stages": [stage]}
    encoded = base64.b64encode(json.dumps([job, job]).encode()).decode()
    tries = f"for i in $(seq {60 * slowness}); do sleep 0.05; "
    # `timeout` sends SIGINT as a person's Ctrl-C would; a shell's background jobs ignore it.
    done = host.run(
        f"echo {encoded} | base64 -d > /tmp/two.json; "
        f"timeout --preserve-status -s INT {3 * slowness} cellblock run - < /tmp/two.json & "
        f"{tries} pgrep -cfx 'sleep 246802' | grep -q 2 && echo running && break; done; "
        "wait $!; echo status $?; "
        f"{tries} pgrep -fx 'sleep 246802' >/dev/null || {{ echo gone; break; }}; done"
    )
    assert done.stdout.split() == ["running", "status", "130", "gone"], done


def run_while_stopped(
    host: Any, seconds: str, wall_time_ms: str, stopped_s: float
) -> dict[str, Any]:
    """The stage of a job that sleeps while the service and its worker are stopped, from its start on for
    ``stopped_s``."""
    job = {
        "environment": "base",
        "stages": [
            {
                "name": "run",
                "command": ["sleep", seconds],
                "constraints": {"wall_time_ms": wall_time_ms},
            }
        ],
    }
    program = (
        "import json, os, signal, subprocess, time\n"
        "show = ['systemctl', 'show', '--property=MainPID', '--value', 'cellblock']\n"
        "service = int(subprocess.check_output(show))\n"
        "run = subprocess.Popen(['cellblock', 'run', '-'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        f"run.stdin.write(json.dumps({job!r}).encode()); run.stdin.close()\n"
        f"while subprocess.run(['pgrep', '-fx', 'sleep {seconds}'], stdout=-3).returncode: time.sleep(0.01)\n"
        "jail = subprocess.check_output(['pgrep', '-fo', '/nsjail '], text=True).strip()\n"
        "worker = int(subprocess.check_output(['ps', '-o', 'ppid=', '-p', jail]))\n"
        "for pid in (service, worker): os.kill(pid, signal.SIGSTOP)\n"
        f"try: time.sleep({stopped_s})\n"
        "finally:\n    for pid in (service, worker): os.kill(pid, signal.SIGCONT)\n"
        "print(run.stdout.read().decode())\n"
    )
    stage: dict[str, Any] = json.loads(on_host(host, program).stdout)["stages"][0]
    return stage


@pytest.mark.usefixtures("quick")
def test_a_late_supervisor_convicts_nobody(host: Any) -> None:
    stage = run_while_stopped(host, "0.71", "1500ms", 3)
    assert (stage["verdict"], stage["exit_code"], stage["violations"]) == ("ok", 0, [])
    assert 700 <= stage["usage"]["wall_time_ms"] < 1500
    assert stage["usage"]["sources"]["wall_time_ms"] == "jobinit_clock"


@pytest.mark.usefixtures("quick")
def test_nor_does_it_acquit(host: Any) -> None:
    stage = run_while_stopped(host, "2.17", "1500ms", 3)
    assert [violation["limit"] for violation in stage["violations"]] == ["wall_time_ms"]
    assert 2100 <= stage["violations"][0]["seen"] < 3000
