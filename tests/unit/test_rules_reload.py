"""Nothing forbidden gets through while tables are being replaced: the templates' rules, for real. Root only."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import segment as lab
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from cellblock.netlink import inside, new_namespace
from cellblock.nft import Nft
from cellblock_fleet.model import NOT_INTERNET

OBSTACLE = lab.obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "-")

ROLES = Path(__file__).parents[2] / "roles"
MAC, ADDRESS, PORT = "02:cb:00:d5:00:80", "10.213.0.128", 443
STREAM_S = 3.0
PAUSE_S = 0.005
"""Between two reloads."""
_SO_RCVBUFFORCE = 33
STREAM = """
import contextlib, socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stream:
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
    for command in (
        "link set job0 up",
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


def guard(segment: lab.Segment) -> str:
    mac = segment.ip(segment.slave, f"-br link show dev {lab.PARENT}").split()[2]
    text = rendered(
        *("macvlan", "jobs.nft.j2"),
        inventory_hostname="slave1",
        __macvlan_mode="macvlan",
        __macvlan_job_network={"slots": [{"address": ADDRESS, "mac": MAC}]},
        __macvlan_services=[[lab.CACHE, "tcp", 3142]],
        __macvlan_host={"parent": lab.PARENT, "addresses": [lab.SLAVE]},
        __macvlan_gateway=lab.GATEWAY,
        __macvlan_denied=[str(n) for n in NOT_INTERNET if n.version == 4],
        __macvlan_probe_mac="02:cb:00:d5:00:9f",
    )
    return text.replace(f"@mac:{lab.PARENT}@", mac)


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
            "sets": {"not_internet": [str(n) for n in NOT_INTERNET]},
            "inbound": [],
            "outbound": [flow],
        },
        firewall_ipv6_routers=[],
        firewall_dhcp_client=False,
        firewall_reverse_path="off",
    )


@pytest.fixture
def received(segment: lab.Segment) -> Iterator[socket.socket]:
    with inside(segment.database), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        server.bind((lab.DATABASE, PORT))
        server.settimeout(0.3)
        yield server


@pytest.mark.parametrize("make", [guard, firewall])
def test_a_stream_during_reloads(segment: lab.Segment, received: socket.socket, make: Any) -> None:
    """To a private address, which "the internet" never is; the layer is alone."""
    sender = segment.slot if make is guard else segment.slave  # type: ignore[attr-defined]
    text = make(segment)
    table = re.search(r"(?m)^table \w+ \w+", text)
    assert table
    with inside(segment.slave):
        nft = Nft()
    try:
        # Control: without the table they arrive.
        assert streamed(sender, nft, "", 0.2) > 0
        assert len(drained(received)) > 0
        nft.run(text)
        again = f"add {table[0]}\ndelete {table[0]}\n{text}"
        assert streamed(sender, nft, again, STREAM_S) > 10_000
        assert len(drained(received)) == 0
    finally:
        nft.run(f"add {table[0]}\ndelete {table[0]}")
        nft.close()


def streamed(namespace: int, nft: Nft, commands: str, duration_s: float) -> int:
    """How many packets were to be sent while ``commands`` were done over and over."""
    command = [sys.executable, "-c", STREAM, lab.DATABASE, str(PORT), str(duration_s)]
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
