"""The rules, for real: nothing forbidden gets through while tables are being replaced, nft lists
them as the guard's program needs it, and the guard lets slots' kernels do what they must. Root only."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

import segment as lab
from cellblock.engine.job_parser import parse_job
from cellblock.engine.limits import StageConstraints
from cellblock.job_network.access import Access
from cellblock.job_network.guard import GuardedHost, guard_rules
from cellblock.job_network.plan import SPECIAL_NETWORKS
from cellblock.job_network.section import NetworkConfig
from cellblock.job_network.slots import Slot
from cellblock.linux.netlink import Netlink, inside, new_namespace
from cellblock.linux.nft import Nft

OBSTACLE = lab.obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "-")

ROLES = Path(__file__).parents[2] / "roles"
MAC, ADDRESS, PORT = "02:cb:00:d5:00:80", "10.213.0.128", 443
ADDRESS_IPV6 = lab.ipv6(ADDRESS)
STREAM_S = 3.0
PAUSE_S = 0.005
"""Between two reloads."""
_SO_RCVBUFFORCE = 33
_STATELESS, _NUMERIC_PROTOCOLS = 1 << 2, 1 << 7
"""What the guard's program has nft print: options -s and -p."""
STREAM = """
import contextlib, socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as stream:
    stream.connect((sys.argv[1], int(sys.argv[2])))
    end, sent = time.monotonic() + float(sys.argv[3]), 0
    while time.monotonic() < end:
        for _ in range(50):
            sent += 1
            with contextlib.suppress(OSError):  # dropped on the way out
                stream.send(b"stream")
print(sent)
"""


@pytest.fixture(scope="module")
def segment() -> lab.Segment:
    made = lab.Segment()
    slot = new_namespace()
    path = f"/proc/{os.getpid()}/fd/{slot}"
    clone = (
        f"link add link {lab.PARENT} name job0 address {MAC} netns {path} type macvlan mode private"
    )
    made.ip(made.slave, clone)
    there = made.ip(made.database, "-br link show dev eth0").split()[2]
    for command in (
        "link set job0 up",
        f"address add {ADDRESS_IPV6}/64 dev job0 nodad",
        # Nobody in the fleet but for services may be asked for.
        f"neighbour add {lab.ipv6(lab.DATABASE)} lladdr {there} dev job0",
        f"address add {ADDRESS}/24 dev job0",
        f"route add default via {lab.GATEWAY}",
    ):
        made.ip(slot, command)
    made.slot = slot  # type: ignore[attr-defined]
    return made


def rendered(role: str, name: str, **variables: Any) -> str:
    template = (ROLES / role / "templates/etc/cellblock" / name).read_text()
    made = Templar(loader=DataLoader(), variables=variables).template(trust_as_template(template))
    assert isinstance(made, str)
    return made


def guard(
    segment: lab.Segment, *, ipv6: bool = False, mode: str = "macvlan", **changes: Any
) -> str:
    mac = segment.ip(segment.slave, f"-br link show dev {lab.PARENT}").split()[2]
    section = segment.config(ipv6=ipv6, mode=mode, **{"slots": 1, **changes})
    host = GuardedHost("slave1", lab.PARENT, [lab.SLAVE])
    text = guard_rules(NetworkConfig.parse(section, "network"), host)
    return text.replace(f"@mac:{lab.PARENT}@", mac)


def guard_ipv6(segment: lab.Segment) -> str:
    return guard(segment, ipv6=True)


def firewall(segment: lab.Segment) -> str:
    flow = {
        "name": "web",
        "peer": "any",
        "except": ["not_internet"],
        "protocol": "udp",
        "ports": [PORT],
    }
    return rendered(
        *("firewall", "firewall.nft.j2"),
        firewall_rules={
            "own_name": "slave1",
            "sets": {"not_internet": [str(n) for n in SPECIAL_NETWORKS]},
            "inbound": [],
            "outbound": [flow],
        },
        firewall_ipv6_routers=[],
        firewall_dhcp_client=False,
        firewall_reverse_path="off",
    )


@pytest.fixture
def received(segment: lab.Segment) -> Iterator[socket.socket]:
    with inside(segment.database), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        server.bind(("::", PORT))
        server.settimeout(0.3)
        yield server


@pytest.mark.parametrize("make", [guard, guard_ipv6, firewall])
def test_a_stream_during_reloads(segment: lab.Segment, received: socket.socket, make: Any) -> None:
    """To a private address, which "the internet" never is; the layer is alone."""
    sender = segment.slave if make is firewall else segment.slot  # type: ignore[attr-defined]
    target = lab.ipv6(lab.DATABASE) if make is guard_ipv6 else lab.DATABASE
    text = make(segment)
    table = re.search(r"(?m)^table \w+ \w+", text)
    assert table
    with inside(segment.slave):
        nft = Nft()
    try:
        # Control: without the table they arrive.
        assert streamed(sender, target, nft, "", 0.2) > 0
        assert len(drained(received)) > 0
        nft.run(text)
        again = f"add {table[0]}\ndelete {table[0]}\n{text}"
        assert streamed(sender, target, nft, again, STREAM_S) > 10_000
        assert len(drained(received)) == 0
    finally:
        nft.run(f"add {table[0]}\ndelete {table[0]}")
        nft.close()


def streamed(namespace: int, target: str, nft: Nft, commands: str, duration_s: float) -> int:
    """How many packets were to be sent while ``commands`` were done over and over."""
    command = [sys.executable, "-c", STREAM, target, str(PORT), str(duration_s)]
    with inside(namespace):
        stream = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with stream:
        while commands and stream.poll() is None:
            nft.run(commands)
            time.sleep(PAUSE_S)
        output, _ = stream.communicate(timeout=duration_s + 10)
    return int(output)


def drained(server: socket.socket) -> list[bytes]:
    packets = []
    try:
        while True:
            packets.append(server.recv(64))
    except TimeoutError:
        return packets


@pytest.mark.parametrize("mode", ["macvlan", "routed"])
def test_what_is_listed_is_the_same_each_time(segment: lab.Segment, mode: str) -> None:
    """The guard's program tells by nft's listing whether somebody changed the table: with bits of
    packets in it as well, and of as many slots as there may be."""
    many = {"slots": 600, "addresses": "10.213.4.0/22", "prefix_length": 16}
    text = guard(segment, ipv6=True, mode=mode, **many)
    table = re.search(r"(?m)^table \w+ \w+", text)
    assert table
    listings = []
    for _ in range(3):
        namespace = new_namespace()
        segment.ip(namespace, f"link set lo name {lab.PARENT}")
        with inside(namespace):
            nft = Nft()
        nft.run(text)
        listings.append(listing(nft, table[0]))
        # What is listed is itself rules, and the same ones.
        nft.run(f"delete {table[0]}\n{listings[-1]}")
        listings.append(listing(nft, table[0]))
        nft.close()
        os.close(namespace)
    assert len(set(listings)) == 1
    last = f"0x{int(IPv6Address(lab.ipv6('10.213.6.87'))):032x}"
    assert (last in listings[0]) == (mode == "macvlan")


def listing(nft: Nft, table: str) -> str:
    return nft._run(f"list {table}", _STATELESS | _NUMERIC_PROTOCOLS).decode()


@pytest.fixture(scope="module")
def served() -> Iterator[lab.Segment]:
    made = lab.Segment()
    with contextlib.ExitStack() as stack:
        for namespace, port in ((made.cache, 3142), (made.gateway, 443), (made.database, 5432)):
            stack.enter_context(lab.serving(namespace, port, lab.hello))
        yield made


@pytest.fixture(params=["macvlan", "routed"])
def slot(request: pytest.FixtureRequest, served: lab.Segment, tmp_path: Path) -> Iterator[Slot]:
    """One with policy internet, and the guard around it."""
    mode = request.param
    config = NetworkConfig.parse(served.config(mode=mode, ipv6=True, slots=1), "network")
    with inside(served.slave):
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path(f"/proc/sys/net/{name}").write_text("1" if mode == "routed" else "0")
        made = Slot(0, config, Netlink(), tmp_path)
        nft = Nft()
    text = guard(served, ipv6=True, mode=mode)
    stage = {"name": "run", "command": ["true"], "network": "internet"}
    parsed = parse_job({"environment": "base", "stages": [stage]}).stages[0]
    access = Access.of(parsed.network, parsed.network_allow, "stages[0]", config, "slave1")
    try:
        nft.run(text)
        made.open(access, StageConstraints())
        yield made
    finally:
        nft.run("flush ruleset")
        nft.close()
        made.close()


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_a_slot_reaches_what_its_policy_opens(slot: Slot, ipv6: bool) -> None:
    """Neighbours are found, and replies come back, over either version of IP."""
    cache, database = (lab.ipv6(a) if ipv6 else a for a in (lab.CACHE, lab.DATABASE))
    internet = lab.INTERNET_IPV6 if ipv6 else lab.INTERNET
    for address, port in ((cache, 3142), (internet, 443)):
        with inside(slot.namespace), socket.create_connection((address, port), 5) as connection:
            assert connection.recv(64)
    with inside(slot.namespace), pytest.raises(OSError):
        socket.create_connection((database, 5432), 0.5).close()
