"""What a slave's firewall passes on for its routed jobs, IPv4 and IPv6: the template's rules, for real."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

import segment as lab
from cellblock.linux.netlink import inside, new_namespace
from cellblock.linux.nft import Nft

TEMPLATE = Path(__file__).parents[2] / "roles/firewall/templates/etc/cellblock/firewall.nft.j2"
V4, V6 = ["10.66.0.0/27"], ["10.66.0.0/27", "fd66::a42:0/123"]
PORT = 443
# Whether there is one or not.
WITHOUT = "table inet cellblock\ndelete table inet cellblock"

needs_root = pytest.mark.skipif(bool(lab.obstacle()), reason=lab.obstacle() or "-")


def rendered(networks: list[str] | None) -> str:
    forward = {} if networks is None else {"interfaces": "cbj*", "networks": networks}
    variables = {
        "firewall_rules": {
            "own_name": "slave1",
            "sets": {},
            "inbound": [],
            "outbound": [],
            "forward": forward,
        },
        "firewall_ipv6_routers": [],
        "firewall_dhcp_client": False,
        "firewall_reverse_path": "off",
        "firewall_connections_per_address": 512,
        "firewall_connections_per_job": 128,
        "firewall_connections_of_jobs": 4096,
    }
    templar = Templar(loader=DataLoader(), variables=variables)
    text = templar.template(trust_as_template(TEMPLATE.read_text()))
    assert isinstance(text, str)
    return text


def forward_chain(text: str) -> list[str]:
    chain = text.split("chain forward {")[1].split("}\n}")[0]
    return [line.strip() for line in chain.splitlines() if "cbj" in line]


def test_ipv6_adds_rules_and_changes_none() -> None:
    without, with_ipv6 = rendered(V4), rendered(V6)
    assert forward_chain(rendered(None)) == []
    assert len(forward_chain(without)) == 3
    assert not any("ip6" in rule or "icmpv6" in rule for rule in forward_chain(without))
    more = [line for line in with_ipv6.splitlines() if line not in without.splitlines()]
    assert [line for line in with_ipv6.splitlines() if line not in more] == without.splitlines()
    assert len(more) == 3
    assert all("ip6 " in rule and "{ fd66::a42:0/123 }" in rule for rule in more)


class Slave:
    """A slave that passes on: two jobs at cbj0 and cbj1, somebody else's interface, the outside."""

    def __init__(self) -> None:
        self.slave = self.namespace()
        with inside(self.slave):
            for family in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path(f"/proc/sys/net/{family}").write_text("1")
            self.nft = Nft()
        self.ends = {
            name: self.end(name, number)
            for number, name in enumerate(("cbj0", "cbj1", "other0", "up0"))
        }

    def namespace(self) -> int:
        made = new_namespace()
        with inside(made):  # no waiting for whether somebody else has an address
            Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
        return made

    def run(self, namespace: int, *commands: str) -> None:
        with inside(namespace):
            for command in commands:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    def end(self, name: str, number: int) -> int:
        namespace = self.namespace()
        path = f"/proc/{os.getpid()}/fd/{namespace}"
        self.run(
            self.slave,
            f"link add {name} type veth peer name eth0 netns {path}",
            f"address add 10.0.{number}.1/32 dev {name}",
            f"address add fd00:{number}::1/128 dev {name} nodad",
            f"link set {name} up",
        )
        self.run(namespace, "link set lo up", "link set eth0 up")
        for address in addresses(name):
            gateway = f"10.0.{number}.1" if "." in address else f"fd00:{number}::1"
            bits, flag = (32, "") if "." in address else (128, "nodad")
            self.run(namespace, f"address add {address}/{bits} dev eth0 {flag}")
            self.run(self.slave, f"route add {address}/{bits} dev {name}")
            self.run(namespace, f"route replace {gateway}/{bits} dev eth0")
            self.run(namespace, f"route replace default via {gateway} dev eth0 onlink")
        return namespace

    def load(self, text: str) -> None:
        self.nft.run(f"{WITHOUT}\n{text}")

    def fate(self, sender: str, source: str, receiver: str, to: str) -> str:
        """What becomes of a datagram: it is lost, it has arrived, or was answered too."""
        family = socket.AF_INET if "." in to else socket.AF_INET6
        with inside(self.ends[receiver]):
            server = socket.socket(family, socket.SOCK_DGRAM)
        with inside(self.ends[sender]):
            client = socket.socket(family, socket.SOCK_DGRAM)
        with server, client:
            server.bind((to, PORT))
            client.bind((source, 0))
            client.settimeout(0.3)
            server.settimeout(0.3)
            what = "lost"
            with contextlib.suppress(TimeoutError):
                client.sendto(b"asked", (to, PORT))
                peer = server.recvfrom(16)[1]
                what = "arrived"
                server.sendto(b"answered", peer)
                what = client.recv(16).decode()
            return what


def addresses(name: str) -> list[str]:
    """Each end's own; who has slots' addresses has one that is no slot's as well."""
    return {
        "cbj0": ["10.66.0.3", "10.67.0.3", "fd66::a42:3", "fd67::3"],
        "cbj1": ["10.66.0.4", "fd66::a42:4"],
        "other0": ["10.66.0.5", "fd66::a42:5"],
        "up0": ["198.51.100.10", "2001:db8:113::10"],
    }[name]


@pytest.fixture(scope="module")
def slave() -> Iterator[Slave]:
    made = Slave()
    yield made
    made.nft.close()


CASES = [
    # sender, its address, receiver, address, whether it passes
    ("cbj0", "10.66.0.3", "up0", "198.51.100.10", True),
    ("cbj0", "fd66::a42:3", "up0", "2001:db8:113::10", True),
    # An address that no slot has.
    ("cbj0", "10.67.0.3", "up0", "198.51.100.10", False),
    ("cbj0", "fd67::3", "up0", "2001:db8:113::10", False),
    # A slot's address, from elsewhere.
    ("other0", "10.66.0.5", "up0", "198.51.100.10", False),
    ("other0", "fd66::a42:5", "up0", "2001:db8:113::10", False),
    # To jobs, from outside and from each other.
    ("up0", "198.51.100.10", "cbj0", "10.66.0.3", False),
    ("up0", "2001:db8:113::10", "cbj0", "fd66::a42:3", False),
    ("cbj1", "10.66.0.4", "cbj0", "10.66.0.3", False),
    ("cbj1", "fd66::a42:4", "cbj0", "fd66::a42:3", False),
]


@needs_root
@pytest.mark.parametrize(("sender", "source", "receiver", "to", "passed"), CASES)
def test_forwarded(
    slave: Slave, sender: str, source: str, receiver: str, to: str, passed: bool
) -> None:
    slave.load("")
    # Control: it is the rules that stop it.
    assert slave.fate(sender, source, receiver, to) == "answered"
    slave.load(rendered(V6))
    assert slave.fate(sender, source, receiver, to) == ("answered" if passed else "lost")
    # Without IPv6 for jobs, none of it is passed on.
    slave.load(rendered(V4))
    passed = passed and ip_address(to).version == 4
    assert slave.fate(sender, source, receiver, to) == ("answered" if passed else "lost")


@needs_root
def test_a_packet_that_is_too_big_is_told_to_the_job(slave: Slave) -> None:
    """IPv6 is not fragmented on the way: without that message a connection stands still."""
    slave.run(slave.ends["up0"], "link set eth0 mtu 1280")
    slave.run(slave.slave, "link set up0 mtu 1280")
    slave.load(rendered(V6))
    with inside(slave.ends["cbj0"]):
        client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with client:
        client.bind(("fd66::a42:3", 0))
        client.setsockopt(socket.IPPROTO_IPV6, 23, 2)  # IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO
        client.connect(("2001:db8:113::10", PORT))
        client.send(bytes(1400))
        for _ in range(20):
            mtu = client.getsockopt(socket.IPPROTO_IPV6, 24)  # IPV6_MTU
            if mtu == 1280:
                break
            time.sleep(0.05)
        assert mtu == 1280
