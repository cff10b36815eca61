"""What is seen of a host before its jobs get a network, in a network namespace that stands for the host.
Root only."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import segment as lab
from cellblock.job_network.host import HostNetwork, Parent, look
from cellblock.linux.netlink import inside, new_namespace

OBSTACLE = lab.obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "-")

OPTIONS: dict[str, Any] = {
    "parent": "eth0",
    "interface": "cellblock0",
    "addresses": ["192.0.2.5"],
    "gateway": "",
    "gateway_ipv6": "",
    "ipv6_prefix": "",
    "probe_mac": "02:cb:00:00:02:ff",
    "try_clone": False,
}
FIRST, SECOND = "2001:db8:1:2::5/64", "fd00:9::5/64"


class Host:
    """Has eth0, at whose other end is router0."""

    def __init__(self) -> None:
        self.namespace = new_namespace()
        for name in ("all", "default"):
            self.set(f"{name}/accept_dad", "0")
        self.ip("link add eth0 type veth peer name router0")
        for interface in ("lo", "eth0", "router0"):
            self.ip(f"link set {interface} up")
        self.ip("address add 192.0.2.5/24 dev eth0")

    def ip(self, arguments: str) -> None:
        with inside(self.namespace):
            subprocess.run(["ip", *arguments.split()], check=True)

    def set(self, name: str, value: str) -> None:
        with inside(self.namespace):
            Path(f"/proc/sys/net/ipv6/conf/{name}").write_text(value)

    def routes(self) -> str:
        with inside(self.namespace):
            command = ["ip", "-6", "route", "show", "default"]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def look(self, **changes: Any) -> HostNetwork:
        with inside(self.namespace):
            return look(**{**OPTIONS, **changes})

    def parent(self, **changes: Any) -> Parent:
        found = self.look(**changes).parent
        assert found is not None
        return found


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    os.close(made.namespace)


def test_its_address_beside_which_jobs_are(host: Host) -> None:
    assert host.parent().cidr_ipv6 == ""
    for address in (FIRST, SECOND):
        host.ip(f"address add {address} dev eth0 nodad")
    assert host.parent(addresses=["192.0.2.5", SECOND[:-3]]).cidr_ipv6 == SECOND
    assert host.parent(addresses=["192.0.2.5", FIRST[:-3]]).cidr_ipv6 == FIRST
    # The one with the jobs' prefix, wherever the inventory says the host is.
    found = host.parent(addresses=["192.0.2.5", FIRST[:-3]], ipv6_prefix="fd00:9::/64")
    assert found.cidr_ipv6 == SECOND


def test_an_address_from_dhcp_has_its_segments_length(host: Host) -> None:
    host.ip("address add 2001:db8:1:2::6/128 dev eth0 nodad")
    assert host.parent().cidr_ipv6 == "2001:db8:1:2::6/128"
    host.ip("route add 2001:db8:1:2::/64 dev eth0")
    assert host.parent().cidr_ipv6 == "2001:db8:1:2::6/64"


def test_its_gateway(host: Host) -> None:
    assert host.parent().gateway_ipv6 == ""
    host.ip("route add default via fe80::1 dev eth0")
    assert host.parent().gateway_ipv6 == "fe80::1"
    assert host.parent(gateway_ipv6="fe80::77").gateway_ipv6 == "fe80::77"


def test_a_default_route_that_forwarding_would_take_away(host: Host) -> None:
    """The program is right about the kernel: the route that it names is gone then, and another stays."""
    with inside(host.namespace), socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58) as router:
        router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        advert = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
        everybody = ("ff02::1", 0, 0, socket.if_nametoindex("router0"))
        end = time.monotonic() + 5
        while not host.routes() and time.monotonic() < end:
            router.sendto(advert, everybody)
            time.sleep(0.05)
    assert "proto ra" in host.routes()
    assert host.look().lost_by_forwarding == "eth0"
    host.set("eth0/accept_ra", "2")
    assert host.look().lost_by_forwarding == ""
    host.set("eth0/accept_ra", "1")
    host.set("all/forwarding", "1")
    assert host.routes() == ""
    # As networkd and NetworkManager do it.
    host.set("all/forwarding", "0")
    host.set("eth0/accept_ra", "0")
    host.ip("route add default via fe80::1 dev eth0 proto ra")
    assert host.look().lost_by_forwarding == ""
    host.set("all/forwarding", "1")
    assert "fe80::1" in host.routes()


def test_its_interfaces_and_parent(host: Host) -> None:
    host.ip("link add cellblock0 type veth peer name cbj3")
    host.ip("link add other0 type veth peer name cbj4")
    host.ip("address add 198.51.100.5/24 dev other0")
    host.ip("address add 198.51.100.6/24 dev cbj3")
    seen = host.look(parent="")
    assert seen.interfaces == ["eth0", "other0", "router0"]
    assert seen.addresses == ["192.0.2.5", "198.51.100.5"]
    assert seen.parent is not None
    assert (seen.parent.name, seen.parent.cidr) == ("eth0", "192.0.2.5/24")
    assert host.parent(parent="", addresses=["198.51.100.5", "192.0.2.5"]).name == "other0"
    assert host.look(parent="", addresses=["203.0.113.9"]).parent is None
    assert host.look(parent="nosuch0").parent is None
    assert host.look(parent="other0", addresses=[]).parent is not None
    # Of several addresses, the declared one is first.
    host.ip("address add 192.0.2.4/24 dev eth0")
    assert host.parent(addresses=["192.0.2.4"]).cidr == "192.0.2.4/24"
    assert seen.egress_problem == ""


def test_whether_a_clone_reaches_the_gateway(host: Host) -> None:
    assert host.parent().clone_problem is None
    without = host.parent(try_clone=True)
    assert without.clone_problem == "eth0 has no default route whose gateway could be asked"
    host.ip("route add default via 192.0.2.1 dev eth0")
    away = host.parent(try_clone=True)
    assert away.gateway == "192.0.2.1"
    assert away.clone_problem == "the gateway 192.0.2.1 does not answer a clone of eth0"
    # The gateway is at the other end of the wire, in a namespace of its own: an address here would be
    # the host's.
    gateway = new_namespace()
    host.ip(f"link set router0 netns /proc/{os.getpid()}/fd/{gateway}")
    with inside(gateway):
        for command in ("link set router0 up", "address add 192.0.2.1/24 dev router0"):
            subprocess.run(["ip", *command.split()], check=True)
    assert host.parent(try_clone=True).clone_problem == ""
    assert host.parent(try_clone=True, gateway="192.0.2.9").clone_problem != ""
    loopback = host.parent(parent="lo", gateway="192.0.2.1", try_clone=True)
    assert (loopback.clone_problem or "").startswith("a clone of lo cannot be made (")
    os.close(gateway)
