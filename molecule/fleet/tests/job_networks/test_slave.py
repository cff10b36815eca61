"""A slave's job network: what a job reaches, what the guard alone stops, and what happens without it."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import testinfra

testinfra_hosts = ["ansible://slave1", "ansible://slave2"]

Record = dict[str, Any]
Outcome = dict[tuple[str, int], str]

INTERNET, METADATA = "198.51.100.10", "169.254.169.254"
GUARD = "cellblock-job-guard"
REACHED = "reached"

# Prints for every [address, port] whether a TCP connection is made.
ATTEMPTS = """
import json, socket, sys
outcome = []
for address, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((address, port), 1).close()
        outcome.append("reached")
    except OSError as problem:
        outcome.append(str(problem))
print(json.dumps(outcome))
"""


def address(host: Any) -> str:
    return str(host.ansible.get_variables()["ansible_host"])


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """How long it took."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s: {what}")


def container(host: Any) -> str:
    command = "docker inspect $(docker ps --quiet --filter label=org.cellblock.fleet)"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    for found in json.loads(shown.stdout):
        networks = found["NetworkSettings"]["Networks"].values()
        if address(host) in [network["IPAddress"] for network in networks]:
            return str(found["Name"].lstrip("/"))
    raise AssertionError(f"no container has the address {address(host)}")


def inside(host: Any, command: str) -> None:
    """Without the network, which may be closed for a moment."""
    subprocess.run(["docker", "exec", container(host), "sh", "-c", command], check=True, timeout=30)


def table(host: Any) -> str:
    return f"{'netdev' if mode(host) == 'macvlan' else 'inet'} cellblock_jobs"


def guarded(host: Any) -> bool:
    return bool(host.run(f"{GUARD} status").rc == 0)


def counters(host: Any) -> dict[str, int]:
    drops = json.loads(host.run(f"{GUARD} status --json").stdout)["drops"]
    return {name: counter["packets"] for name, counter in drops.items()}


def mode(host: Any) -> str:
    """slave1 has the mode that `auto` chose, slave2 the other (molecule/inventory)."""
    return str(network(host)["mode"])


def network(host: Any) -> Record:
    """The engine's configuration of job networks."""
    found: Record = json.loads(host.file("/etc/cellblock/engine.json").content_string)["network"]
    return found


@pytest.fixture(autouse=True)
def intact(host: Any) -> Iterator[None]:
    assert guarded(host)
    yield
    wait_for(lambda: guarded(host), 5, "the guard's table is as confirmed")


@pytest.fixture(scope="module")
def web(request: Any) -> Iterator[None]:
    """Something that answers on the internet's port 80."""
    outside = testinfra.get_host("ansible://outside1")
    # Not http.server, which asks for its own name first.
    serve = f'import socket; s = socket.create_server(("{INTERNET}", 80))\nwhile True: s.accept()[0].close()'
    command = f"python3 -c {shlex.quote(serve)}"
    outside.check_output(f"systemd-run --quiet --collect --unit=test-web {command}")
    wait_for(lambda: ":80 " in outside.run("ss -Hltn").stdout, 5, "the web server listens")
    yield
    outside.run("systemctl stop test-web")


@pytest.fixture
def attempts(run_stage: Callable[..., Record]) -> Callable[..., Outcome]:
    """What a job reaches of some (address, port)."""

    def run(policy: str, *targets: tuple[str, int], **fields: Any) -> Outcome:
        command = ("python3", "-c", ATTEMPTS, json.dumps(targets))
        stage = run_stage(*command, environment="python", network=policy, **fields)
        assert stage["verdict"] == "ok", stage
        return dict(zip(targets, json.loads(stage["stdout"]["text"]), strict=True))

    return run


@pytest.fixture
def as_root(host: Any) -> Callable[..., Outcome]:
    """The same as root in a slot whose own filter is taken away, so that the guard is alone."""

    def run(*targets: tuple[str, int], before: str = "true") -> Outcome:
        script = (
            f"nft flush ruleset; {before}; "
            f"python3 -c {shlex.quote(ATTEMPTS)} {shlex.quote(json.dumps(targets))}"
        )
        done = host.run(
            f"timeout 60 cellblock slot --policy internet -- sh -c {shlex.quote(script)}"
        )
        assert done.rc == 0, done
        return dict(zip(targets, json.loads(done.stdout.splitlines()[-1]), strict=True))

    return run


@pytest.fixture
def ours(host: Any) -> list[tuple[str, int]]:
    """What no job may reach, all of which answers to the controller or to its own clients."""
    names = ("database1", "memory1", "handler1", "master1", "cache1", "slave1", "slave2")
    return [(address(host.get_host(f"ansible://{name}")), 22) for name in names]


def refused(outcome: Outcome) -> bool:
    return all(result != REACHED for result in outcome.values())


def test_the_mode(host: Any) -> None:
    link = host.run("ip -d link show dev cellblock0")
    assert mode(host) == {"slave1": "macvlan", "slave2": "routed"}[host.backend.get_hostname()]
    if mode(host) == "routed":
        assert link.rc != 0
        assert host.file("/proc/sys/net/ipv4/ip_forward").content_string == "1\n"
    else:
        assert re.search(r"macvlan +mode private", link.stdout)
        assert "inet" not in host.check_output("ip address show dev cellblock0")
        assert not host.file("/etc/sysctl.d/90-cellblock-jobs.conf").exists


@pytest.mark.usefixtures("web")
def test_policies_reach_what_they_name(host: Any, attempts: Any) -> None:
    cache = (address(host.get_host("ansible://cache1")), 3142)
    assert attempts("internet", (INTERNET, 80), cache) == {(INTERNET, 80): REACHED, cache: REACHED}
    outcome = attempts("cache", (INTERNET, 80), cache)
    assert outcome[cache] == REACHED
    assert outcome[INTERNET, 80] != REACHED
    stage = attempts("none", (INTERNET, 80), cache)
    assert refused(stage)


def test_packages_come_from_the_cache_by_its_name(run_stage: Callable[..., Record]) -> None:
    fetch = "import urllib.request as u; print(u.urlopen('http://cache:3142/debian/dists/bookworm/Release').read(7))"
    for policy in ("cache", "internet"):
        stage = run_stage("python3", "-c", fetch, environment="python", network=policy)
        assert stage["stdout"]["text"] == "b'Origin:'\n", stage
    stage = run_stage("python3", "-c", fetch, environment="python", network="none")
    assert stage["verdict"] == "nonzero_exit", stage


def test_nothing_of_ours_is_reached(attempts: Any, ours: list[tuple[str, int]]) -> None:
    # Control: all of these ports answer.
    for target in ours:
        socket.create_connection(target, 2).close()
    others = [(METADATA, 80), ("2001:db8:113::10", 80), ("fe80::1%job0", 22)]
    assert refused(attempts("internet", *ours, *others))


@pytest.mark.usefixtures("web")
def test_the_guard_alone(host: Any, as_root: Any, ours: list[tuple[str, int]]) -> None:
    before = counters(host)
    cache = (address(host.get_host("ansible://cache1")), 3142)
    outcome = as_root((INTERNET, 80), cache, (METADATA, 80), *ours)
    # Control: the slot is really open, the guard lets through what some policy allows.
    assert outcome.pop((INTERNET, 80)) == REACHED
    assert outcome.pop(cache) == REACHED
    assert refused(outcome)
    assert counters(host)["refused_out"] > before["refused_out"]


@pytest.mark.usefixtures("web")
def test_the_guard_stops_other_addresses(host: Any, as_root: Any) -> None:
    before = counters(host)
    free = re.sub(r"\d+$", "250", address(host))
    route = "g=$(ip -4 route show default | cut -d' ' -f3)"
    other = f"{route}; ip address add {free}/32 dev job0; ip route replace default via $g dev job0 onlink src {free}"
    assert refused(as_root((INTERNET, 80), before=other))
    assert counters(host)["spoofed"] > before["spoofed"]
    if mode(host) != "routed":
        before = counters(host)
        assert refused(
            as_root((INTERNET, 80), before="ip link set dev job0 address 02:aa:00:00:00:01")
        )
        assert counters(host)["spoofed"] > before["spoofed"]


def test_the_guard_stops_ipv6(host: Any, as_root: Any) -> None:
    prefix = (
        host.check_output("ip -6 -o address show dev eth0 scope global").split()[3].split("::")[0]
    )
    target = host.get_host("ansible://cache1")
    v6 = target.check_output("ip -6 -o address show dev eth0 scope global").split()[3].split("/")[0]
    socket.create_connection((v6, 22), 2).close()  # control
    on = (
        "echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 0 >/proc/sys/net/ipv6/conf/job0/disable_ipv6; "
        f"ip address add {prefix}::fa/64 dev job0 nodad"
    )
    before = counters(host)
    assert refused(as_root((v6, 22), (v6, 3142), before=on))
    if mode(host) != "routed":
        # There, the host's end has no IPv6 at all, and drops the packets before any rule sees them.
        assert counters(host)["refused_out"] > before["refused_out"]


@pytest.mark.usefixtures("web")
def test_without_the_guard_no_job_with_a_network_starts(
    host: Any, submit: Callable[..., Record], attempts: Any
) -> None:
    assert attempts("internet", (INTERNET, 80))[INTERNET, 80] == REACHED
    host.check_output(f"systemctl stop {GUARD}")
    try:
        host.check_output(f"nft delete table {table(host)}")
        stage = {"name": "run", "command": ["true"], "network": "internet"}
        job = {"environment": "base", "stages": [stage]}
        error = submit(job)["error"]
        assert error["code"] == "host_setup", error
        assert table(host) in error["message"] or table(host) in error.get("subject", ""), error
        # Jobs without a network go on.
        stage["network"] = "none"
        assert submit(job)["stages"][0]["verdict"] == "ok"
    finally:
        host.check_output(f"systemctl start {GUARD}")
    wait_for(lambda: guarded(host), 3, "the guard is back")
    assert attempts("internet", (INTERNET, 80))[INTERNET, 80] == REACHED


def test_a_flush_is_repaired_within_two_seconds(host: Any) -> None:
    inside(
        host,
        f"nft flush ruleset; for i in $(seq 40); do {GUARD} status >/dev/null && exit; sleep 0.05; done; exit 1",
    )


@pytest.mark.usefixtures("web")
def test_all_of_it_comes_back_after_a_restart(host: Any, attempts: Any) -> None:
    subprocess.run(
        ["docker", "restart", container(host)], check=True, capture_output=True, timeout=60
    )

    def answers() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((address(host), 22), 1).close()
            return True
        return False

    wait_for(answers, 30, "ssh answers")
    wait_for(lambda: guarded(host), 20, "the guard's table is as confirmed")
    wait_for(lambda: host.service("cellblock").is_running, 20, "the engine runs")
    wait_for(lambda: host.run("cellblock-firewall status").rc == 0, 20, "the firewall is loaded")
    assert attempts("internet", (INTERNET, 80))[INTERNET, 80] == REACHED
