"""What root of the worker container can do to the host, to jobs, and to their records.

As the role runs it, and, for the control, with the options of the runtime `runc`, where root is the host's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import ATTACKS, NAME, put

testinfra_hosts = ["ansible://slave2"]

# What root can do where it is the host's, with the same capabilities and the same filter.
SUCCEED_WITHOUT_MAPPING = {
    "identity", "core_pattern", "panic", "overcommit", "file_max", "drop_caches", "own_limit",
}  # fmt: skip


def attacked(host: Any, container: str) -> dict[str, str]:
    """{attack: denied, succeeded or absent}."""
    network = host.check_output("readlink /proc/1/ns/net")
    engine = host.check_output("docker info --format '{{.ID}}'")
    put(host, "/root/attacks", ATTACKS.read_bytes())
    done = host.run(
        f"timeout 60 docker exec --interactive {container} sh -s '{network}' '{engine}' </root/attacks"
    )
    print(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: words[1] for words in lines}


@pytest.fixture
def control(host: Any) -> Iterator[str]:
    """A container with the same options, but for the mapping of its root."""
    made = json.loads(host.file("/etc/cellblock/worker_container/container.json").content_string)
    words = made["create"]
    at = next(n for n, word in enumerate(words) if word.startswith(f"{NAME}:"))
    options = [
        f"{option} '{value}'"
        for option, value in zip(words[:at:2], words[1:at:2], strict=True)
        if option not in ("--name", "--hostname", "--volume")
    ]
    host.check_output(
        f"docker run --detach --name control --userns host {' '.join(options)} {words[at]} sleep 300"
    )
    yield "control"
    host.run("docker rm --force --volumes control")


def test_every_attack_fails_and_without_the_mapping_it_does_not(host: Any, control: str) -> None:
    mapped, not_mapped = attacked(host, NAME), attacked(host, control)
    assert set(mapped) == set(not_mapped)
    assert [name for name, verdict in mapped.items() if verdict == "succeeded"] == []
    succeeded = {name for name, verdict in not_mapped.items() if verdict == "succeeded"}
    assert succeeded >= SUCCEED_WITHOUT_MAPPING
    assert sum(verdict == "denied" for verdict in mapped.values()) >= len(SUCCEED_WITHOUT_MAPPING)


# Finds the init of the one jail: it is the child of nsjail, which the container's first process has started.
FIND = r"""
import ctypes, os, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
def name(pid):
    return open(f"/proc/{pid}/comm").read().strip()
def pids():
    return [int(one) for one in os.listdir("/proc") if one.isdigit()]
def jails():
    found = []
    for pid in pids():
        try:
            if name(parent(pid)) == "nsjail" and parent(parent(pid)) == 1:
                found.append(pid)
        except OSError:
            pass
    return found
(init,) = jails()
jobs = [pid for pid in pids() if pid != init and parent(pid) == init]
"""


def test_a_killed_init_is_no_record_of_a_success(start_job: Any, inside: Any) -> None:
    record = start_job("sh", "-c", "echo begun; while :; do :; done")
    inside(f"import time; time.sleep(1)\n{FIND}\nos.kill(init, signal.SIGKILL)")
    ended = record()
    assert ended["verdict"] == "worker_lost", ended
    usage = ended["stages"][0]["usage"]
    assert usage["cpu_time_ms"] > 300
    assert usage["sources"]["cpu_time_ms"] == "cgroup"


def test_it_can_forge_how_a_job_ended_and_not_what_it_cost(start_job: Any, inside: Any) -> None:
    """It takes the descriptor of the jail's init and says what that would say."""
    record = start_job(
        "python3", "-c", "x = bytearray(50_000_000)\nwhile True: pass", constraints={"cpu_time_ms": "8s"}
    )  # fmt: skip
    program = (
        f"import socket\nimport time; time.sleep(2)\n{FIND}\n"
        "pidfd = os.pidfd_open(init)\n"
        "for number in range(64):\n"
        "    taken = libc.syscall(438, pidfd, number, 0)\n"
        "    if taken < 0: continue\n"
        "    try: one = socket.socket(fileno=taken)\n"
        "    except OSError: continue\n"
        "    now = time.monotonic_ns()\n"
        "    one.send(struct.pack('=Ii11Q', 0x45444E45, 0, *[0] * 9, now - 1000, now))\n"
        "    print('said')\n"
    )
    said = inside(program)
    ended = record()
    stage = ended["stages"][0]
    print(said, stage["verdict"], stage["exit_code"], stage["usage"])
    if "said" in said:
        assert (stage["verdict"], stage["exit_code"]) == ("ok", 0)
    assert stage["usage"]["cpu_time_ms"] > 1000
    assert stage["usage"]["wall_time_ms"] > 1500
    assert stage["usage"]["memory_peak_bytes"] > 50_000_000


def test_processes_that_it_takes_out_of_their_limits_are_missed(
    host: Any, start_job: Any, inside: Any
) -> None:
    if host.file("/sys/fs/cgroup/cgroup.controllers").exists:
        pytest.skip("cgroup v2 asks for the right to the group above both")
    record = start_job("sh", "-c", "sleep 20")
    program = (
        f"import time; time.sleep(1)\n{FIND}\n"
        "uid = int(open(f'/proc/{jobs[0]}/status').read().partition('Uid:')[2].split()[0])\n"
        "os.makedirs('/sys/fs/cgroup/memory/mine', exist_ok=True)\n"
        "procs = '/sys/fs/cgroup/memory/mine/cgroup.procs'\n"
        "os.chmod(procs, 0o666)\n"
        "if os.fork() == 0:\n"
        "    os.setgroups([]); os.setuid(uid)\n"
        "    open(procs, 'w').write(str(jobs[0])); os._exit(0)\n"
        "print(os.wait()[1])\n"
    )
    assert inside(program) == "0\n"
    ended = record()
    assert ended["verdict"] == "worker_lost", ended
    assert "out of their limits" in ended["stages"][0]["reason"]
    assert ended["stages"][0]["usage"]["wall_time_ms"] < 5000


def test_a_job_whose_filter_it_takes_away_reaches_no_more(
    host: Any, start_job: Any, inside: Any, report: dict[str, Any]
) -> None:
    """The slave's own rules are around the jobs' networks."""
    (database,) = {
        seen["address"]
        for finding in report["cells"]
        if finding["target"] == "database1" and finding["path"] == "ipv4" for seen in finding["seen"]
    }  # fmt: skip
    program = (
        "import socket, time\n"
        "deadline = time.monotonic() + 5\n"
        "while time.monotonic() < deadline:\n"
        f"    try: socket.create_connection(('{database}', 5432), 1); print('reached')\n"
        "    except OSError as problem: print(problem.errno)\n"
        "    time.sleep(0.2)\n"
    )
    record = start_job("python3", "-uc", program, network="cache")
    took = inside(
        f"import time; time.sleep(1.5)\n{FIND}\nimport json, subprocess\n"
        "nft = ['nsenter', f'--net=/proc/{init}/ns/net', 'nft']\n"
        "listed = json.loads(subprocess.check_output([*nft, '--json', 'list', 'table', 'inet', 'cellblock']))\n"
        "chains = [e['chain'] for e in listed['nftables'] if 'hook' in e.get('chain', {})]\n"
        "opened = ''.join(f\"add chain inet cellblock {c['name']} {{ policy accept ; }}\\n\" for c in chains)\n"
        "subprocess.run([*nft, '-f', '-'], input=(opened + 'flush table inet cellblock').encode(), check=True)\n"
        "print(len(chains) > 0)\n"
    )
    ended = record()["stages"][0]
    said = ended["stdout"]["text"].split()
    assert took == "True\n"
    # The control: without its filter nobody refuses at once any more, and packets are lost on the way.
    assert said.count("113") > 2, ended
    assert said[-1] != "113", ended
    assert "reached" not in said


def test_a_filter_that_is_gone_ends_the_stage(start_job: Any, inside: Any) -> None:
    record = start_job("sleep", "20", network="cache")
    inside(
        f"import time; time.sleep(1)\n{FIND}\nimport subprocess\n"
        "nft = ['nsenter', f'--net=/proc/{init}/ns/net', 'nft']\n"
        "subprocess.run([*nft, 'delete', 'table', 'inet', 'cellblock'], check=True)\n"
    )
    ended = record()["stages"][0]
    assert ended["verdict"] == "internal_error", ended
    assert "has lost its filter" in ended["reason"]
