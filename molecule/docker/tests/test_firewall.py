"""The firewall decides, in whatever order it and the engine came: before, during and after the engine's start.

``outside1`` has no rules of its own, so what is closed here is closed by the slave; and it is nobody's friend.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Role = Callable[..., Any]
UNDECLARED = 9999
CACHE = 3142
JOB_NAMESPACE = "test-job"


@pytest.fixture(scope="module", autouse=True)
def listeners(lab: Any) -> Iterator[None]:
    for host in ("outside1", "slave1"):
        lab.output(host, "mkdir -p /var/empty")
        lab.listen(host, UNDECLARED)
    yield
    for host in ("outside1", "slave1"):
        lab.run(host, f"systemctl stop test-{UNDECLARED}; rmdir /var/empty")
    lab.run("outside1", "ip route del 172.16.0.0/24")


def container(lab: Any) -> str:
    address: str = lab.output(
        "slave1", "docker inspect --format '{{.NetworkSettings.IPAddress}}' web"
    )
    return address


def watches(lab: Any) -> Callable[[], dict[str, tuple[int, int]]]:
    """Begins to try what is declared and what is not; the result ends that and says what got through."""
    slave, outside = lab.address("slave1"), lab.address("outside1")
    lab.run("outside1", f"ip route replace 172.16.0.0/24 via {slave}")
    begun = [
        lab.watch("slave1", cache=(lab.address("cache1"), CACHE), out=(outside, UNDECLARED)),
        lab.watch(
            "outside1",
            into=(slave, UNDECLARED),
            published=(slave, 8080),
            passed_on=("172.16.0.2", 80),
        ),
    ]
    return lambda: {name: counts for watch in begun for name, counts in watch.end().items()}


def as_declared(counts: dict[str, tuple[int, int]]) -> None:
    """Of all that was tried, the cache alone was reached, every time."""
    print(counts)
    successes, failures = counts.pop("cache")
    assert successes > 20
    assert failures == 0
    assert {name: found[0] for name, found in counts.items() if found[0]} == {}
    assert all(failed >= 2 for _, failed in counts.values()), "hardly tried"


def status(lab: Any) -> int:
    return int(lab.run("slave1", "cellblock-firewall status").returncode)


def test_the_engine_first_and_the_firewall_after(lab: Any, role: Role, workload: str) -> None:
    removed = role("firewall_remove", "slave1")
    try:
        assert removed.returncode == 0, removed.stdout
        # Controls: nothing but the firewall stands in the way.
        slave, outside = lab.address("slave1"), lab.address("outside1")
        lab.run("outside1", f"ip route replace 172.16.0.0/24 via {slave}")
        assert container(lab) == "172.16.0.2"
        assert lab.reaches("outside1", slave, UNDECLARED)
        assert lab.reaches("outside1", slave, 8080)
        assert lab.reaches("outside1", "172.16.0.2", 80)
        assert lab.reaches("slave1", outside, UNDECLARED)
        assert lab.container_reaches("slave1", workload, outside, UNDECLARED)
    finally:
        done = role("firewall", "slave1")
    assert done.returncode == 0, done.stdout
    ended = watches(lab)
    time.sleep(3)
    as_declared(ended())
    assert not lab.container_reaches("slave1", workload, outside, UNDECLARED)
    assert status(lab) == 0


def test_a_restart_of_the_engine(lab: Any, workload: str) -> None:
    ended = watches(lab)
    lab.output("slave1", "systemctl reset-failed docker; systemctl restart docker; sleep 2")
    as_declared(ended())
    assert status(lab) == 0


def test_the_firewall_first_and_the_engine_after(lab: Any, role: Role, image: str) -> None:
    """As on a host where the engine never ran: its first start makes the host a router."""
    lab.output(
        "slave1",
        """docker ps -aq | xargs -r docker rm -f; systemctl stop docker.socket docker
        ip link delete docker0; for table in 'ip nat' 'ip filter'; do nft delete table $table; done
        echo 0 >/proc/sys/net/ipv4/ip_forward""",
    )
    ended = watches(lab)
    time.sleep(1)
    done = role("role", "slave1")
    assert done.returncode == 0, done.stdout
    try:
        lab.output("slave1", f"docker run -d --name web -p 8080:80 {image} httpd -f -p 80 -h /www")
        time.sleep(2)
        as_declared(ended())
        # It has done what one is afraid of.
        assert lab.output("slave1", "cat /proc/sys/net/ipv4/ip_forward") == "1"
        assert "-P FORWARD DROP" in lab.output("slave1", "iptables -S FORWARD")
        assert "8080" in lab.output("slave1", "iptables -t nat -S DOCKER")
        assert not lab.container_reaches("slave1", "web", lab.address("outside1"), UNDECLARED)
        assert status(lab) == 0
    finally:
        lab.run("slave1", "docker rm -f web")


def test_rules_that_are_put_back_leave_the_engines_alone(lab: Any, workload: str) -> None:
    rules = "iptables-save | grep -v '^[#:]'"
    before = lab.output("slave1", rules)
    lab.output("slave1", "nft delete table inet cellblock")
    end = time.monotonic() + 5
    while status(lab) != 0 and time.monotonic() < end:
        time.sleep(0.1)
    assert status(lab) == 0
    assert lab.output("slave1", rules) == before
    ended = watches(lab)
    time.sleep(2)
    as_declared(ended())


@pytest.fixture
def job(lab: Any) -> Iterator[str]:
    """A namespace behind an interface of jobs, with an address of theirs, that the host gives its own."""
    text = lab.output("slave1", "nft list chain inet cellblock forward")
    network = text.split("ip saddr ")[1].split("meta")[0].strip(" {}").split("/")[0]
    address = network.rpartition(".")[0] + "." + str(int(network.rpartition(".")[2]) + 5)
    lab.output(
        "slave1",
        f"""set -e
        ip netns add {JOB_NAMESPACE}
        ip link add cbjtest type veth peer name eth0 netns {JOB_NAMESPACE}
        ip addr add 169.254.77.1/32 dev cbjtest; ip link set cbjtest up
        ip -n {JOB_NAMESPACE} addr add {address}/32 dev eth0; ip -n {JOB_NAMESPACE} link set eth0 up
        ip -n {JOB_NAMESPACE} route add 169.254.77.1 dev eth0
        ip -n {JOB_NAMESPACE} route add default via 169.254.77.1 dev eth0
        ip route add {address}/32 dev cbjtest
        echo 1 >/proc/sys/net/ipv4/ip_forward
        nft add table ip test_nat
        nft 'add chain ip test_nat post {{ type nat hook postrouting priority 100; }}'
        nft add rule ip test_nat post ip saddr {address} masquerade""",
    )
    yield address
    lab.run(
        "slave1",
        f"ip netns del {JOB_NAMESPACE}; umount /run/netns; ip link del cbjtest; nft delete table ip test_nat",
    )


def test_what_is_passed_on_for_jobs_passes_the_engine(lab: Any, job: str) -> None:
    program = f'import socket; socket.create_connection(("{lab.address("cache1")}", {CACHE}), 1.5)'
    ask = f"ip netns exec {JOB_NAMESPACE} python3 -c '{program}'"

    def reached() -> bool:
        return bool(lab.run("slave1", ask).returncode == 0)

    assert "-P FORWARD DROP" in lab.output("slave1", "iptables -S FORWARD")
    assert reached()
    # Control: without what the drop-in does, the engine's policy drops it.
    lab.output(
        "slave1",
        "iptables -D DOCKER-USER -i cbj+ -j ACCEPT; iptables -D DOCKER-USER -o cbj+ -j ACCEPT",
    )
    assert not reached()
    lab.output("slave1", "systemctl reset-failed docker; systemctl restart docker")
    assert reached()
    assert lab.output("slave1", "iptables -S DOCKER-USER | grep -c cbj") == "2"
