"""What the role macvlan sees of a host's IPv6, in a network namespace that stands for the host. Root only."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import segment as lab
from cellblock.linux.netlink import inside, new_namespace

OBSTACLE = lab.obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "-")

PROGRAM = Path(__file__).parents[2] / "roles/macvlan/files/look-at-host"
OPTIONS = {
    "parent": "eth0",
    "interface": "cellblock0",
    "addresses": ["192.0.2.5"],
    "gateway": "",
    "gateway_ipv6": "",
    "prefix_ipv6": "",
    "probe_mac": "",
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

    def look(self, **changes: Any) -> dict[str, Any]:
        command = [sys.executable, str(PROGRAM), json.dumps({**OPTIONS, **changes})]
        with inside(self.namespace):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    os.close(made.namespace)


def test_its_address_beside_which_jobs_are(host: Host) -> None:
    assert host.look()["cidr6"] == ""
    for address in (FIRST, SECOND):
        host.ip(f"address add {address} dev eth0 nodad")
    assert host.look(addresses=["192.0.2.5", SECOND[:-3]])["cidr6"] == SECOND
    assert host.look(addresses=["192.0.2.5", FIRST[:-3]])["cidr6"] == FIRST
    # The one with the jobs' prefix, wherever the inventory says the host is.
    found = host.look(addresses=["192.0.2.5", FIRST[:-3]], prefix_ipv6="fd00:9::/64")
    assert found["cidr6"] == SECOND


def test_an_address_from_dhcp_has_its_segments_length(host: Host) -> None:
    host.ip("address add 2001:db8:1:2::6/128 dev eth0 nodad")
    assert host.look()["cidr6"] == "2001:db8:1:2::6/128"
    host.ip("route add 2001:db8:1:2::/64 dev eth0")
    assert host.look()["cidr6"] == "2001:db8:1:2::6/64"


def test_its_gateway(host: Host) -> None:
    assert host.look()["gateway6"] == ""
    host.ip("route add default via fe80::1 dev eth0")
    assert host.look()["gateway6"] == "fe80::1"
    assert host.look(gateway_ipv6="fe80::77")["gateway6"] == "fe80::77"


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
    assert host.look()["lost_by_forwarding"] == "eth0"
    host.set("eth0/accept_ra", "2")
    assert host.look()["lost_by_forwarding"] == ""
    host.set("eth0/accept_ra", "1")
    host.set("all/forwarding", "1")
    assert host.routes() == ""
    # As networkd and NetworkManager do it.
    host.set("all/forwarding", "0")
    host.set("eth0/accept_ra", "0")
    host.ip("route add default via fe80::1 dev eth0 proto ra")
    assert host.look()["lost_by_forwarding"] == ""
    host.set("all/forwarding", "1")
    assert "fe80::1" in host.routes()
