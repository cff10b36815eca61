"""The part that runs in a container without a network: builds hosts, loads mutants, probes.

Reads the facts and the hosts' texts as JSON on stdin, prints one JSON line per layer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import cells as expected
from mutants import Mutant, mutants
from packets import ICMP, ICMPV6, TCP, UDP
from prober import HELD, IN, OUT, Cell, Prober

from cellblock import network
from cellblock.job import parse_job
from cellblock.limits import StageConstraints
from cellblock.netlink import Netlink, inside, new_namespace
from cellblock.network import Access, NetworkConfig, Reach
from cellblock.nft import Nft, NftError
from cellblock.slots import Slot

WORLD_MAC, HOST_MAC = "02:00:00:00:00:01", "02:00:00:00:00:21"
# Lets everything through and follows connections; what the kernel resets for want of a socket is no
# part of them.
OPEN = """
table inet open {
    chain before { type filter hook output priority -400; tcp flags & rst == rst drop; }
    chain out { type filter hook output priority 0; ct state new accept; }
    chain in { type filter hook input priority 0; ct state new accept; }
}
"""


def ip(namespace: int, *commands: str) -> None:
    with inside(namespace):
        subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def sysctl(namespace: int, **values: str) -> None:
    with inside(namespace):
        for name, value in values.items():
            path = Path("/proc/sys/net") / name.replace("__", "/")
            if path.exists():
                path.write_text(value)


QUIET = {
    "ipv4__icmp_ratelimit": "0",
    "ipv4__icmp_msgs_per_sec": "1000000",
    "ipv4__icmp_msgs_burst": "1000000",
    "ipv6__icmp__ratelimit": "0",
    "ipv4__conf__all__rp_filter": "0",
    "ipv4__conf__default__rp_filter": "0",
    "ipv6__conf__default__accept_dad": "0",
    "ipv6__conf__default__accept_ra": "0",
    "ipv4__ip_forward": "1",
}


def wired(host: int, interface: str) -> int:
    """Gives ``host`` its interface and returns the namespace of the world at the other end."""
    world = new_namespace()
    sysctl(world, ipv6__conf__default__disable_ipv6="1")
    ip(
        host,
        "link set lo up",
        f"link add {interface} address {HOST_MAC} type veth peer name world0 address {WORLD_MAC} "
        f"netns /proc/{os.getpid()}/fd/{world}",
        # Neighbours need not be there to be sent to.
        f"link set {interface} arp off up",
    )
    ip(world, "link set world0 arp off up")
    return world


class Layer:
    """One text, loaded alone, and what is probed of it."""

    def __init__(
        self,
        name: str,
        text: str,
        nft: Nft,
        prober: Prober,
        cells: Sequence[Cell],
        stranger: dict[str, str],
    ) -> None:
        self.name, self.text, self.nft, self.prober, self.cells = name, text, nft, prober, cells
        self.stranger = stranger

    def differences(self, text: str, cells: Sequence[Cell]) -> list[str]:
        held = [cell for cell in cells if cell.way in HELD]
        self.nft.run("flush ruleset\n" + (OPEN if held else ""))
        self.prober.forget()
        numbers = self.prober.hold(held)
        self.nft.run("flush ruleset\n" + text)
        return self.prober.differences(cells, numbers)

    def changeable(self, mutant: Mutant) -> list[Cell]:
        """The cells that the mutant can change: of its rule's family, protocol and direction."""
        if mutant.where == "everything" or mutant.rule.startswith("policy"):
            return list(self.cells)
        about = f"{mutant.where} {mutant.rule} {mutant.what}"
        six = re.search(r"ip6|ipv6|icmpv6|_v6\b", about)
        four = re.search(r"\bip [sd]addr|ipv4|_v4\b|\bicmp type", about)
        version = 6 if six and not four else 4 if four and not six else 0
        # A flow's rule has one protocol, and lets pass one way of what one side began.
        protocols: set[int] = set()
        ways: set[str] = set()
        flow = re.search(r"ct direction (original|reply) accept comment", mutant.rule)
        if flow:
            found = re.search(r"(tcp|udp) [sd]port|(icmp)(v6)? type", mutant.rule)
            word = found and (found.group(1) or found.group(2))
            protocols = {"tcp": {TCP}, "udp": {UDP}, "icmp": {ICMP, ICMPV6}}.get(word or "", set())
            by_host = (mutant.where == "output") == (flow.group(1) == "original")
            sender = "host" if mutant.where == "output" else "peer"
            ways = {OUT if by_host else IN}
            ways.add(f"held by {'host' if by_host else 'peer'}, {sender} sends")
        held = re.search(r"resets|related", about)
        return [
            cell
            for cell in self.cells
            if (not version or cell.packet.version == version)
            and (not protocols or cell.packet.protocol in protocols)
            and (cell.way in ways if ways else held or cell.way not in HELD)
        ]

    def run(self, only: str = "") -> dict[str, Any]:
        started = time.monotonic()
        found: dict[str, Any] = {"layer": self.name, "cells": len(self.cells), "survivors": []}
        for _ in range(2):
            found["control"] = self.differences(self.text, self.cells)
            if not found["control"]:
                break
        found["empty"] = len(self.differences("", self.cells))
        killed = invalid = probed = 0
        for mutant in mutants(self.text, self.stranger):
            if only and only not in str(mutant):
                continue
            some = self.changeable(mutant)
            probed += len(some)
            try:
                seen = self.differences(mutant.text, some)
            except NftError as problem:
                invalid += 1
                found.setdefault("refused", []).append(f"{mutant}: {problem}")
                continue
            if seen:
                killed += 1
            else:
                found["survivors"].append([mutant.where, mutant.what, mutant.rule])
            if only:
                print(mutant, seen[:4], len(seen), file=sys.stderr)
        found |= {"killed": killed, "refused_by_nft": invalid, "probed": probed}
        found["seconds"] = round(time.monotonic() - started, 1)
        return found


def host_layer(fleet: expected.Fleet, host: str, text: str) -> Layer:
    namespace = new_namespace()
    sysctl(namespace, **QUIET)
    world = wired(namespace, "eth0")
    sysctl(namespace, ipv6__conf__all__forwarding="1", ipv6__conf__eth0__accept_ra="0")
    addresses = fleet.facts["addresses"][host]
    ip(
        namespace,
        *(
            f"address add {a}/{64 if ':' in a else 24} dev eth0{' nodad' if ':' in a else ''}"
            for a in addresses
        ),
        "link add elsewhere type veth peer name nowhere",
        "link set nowhere up",
        "link set elsewhere up",
        "route add 10.99.0.0/24 dev elsewhere",
        "route add fd00:99::/64 dev elsewhere",
        "route add default via 10.213.0.30",
        "route add default via fd00:cb::30",
    )
    with inside(namespace):
        nft = Nft()
    stranger = {
        name: "10.213.0.23" if name.endswith("_v4") else "fd00:cb::23"
        for name in re.findall(r"set (\w+_v[46]) ", text)
        if not name.startswith("resets")
    }
    stranger |= {"not_internet_v4": "198.51.100.10", "not_internet_v6": "2001:db8:113::10"}
    stranger["ipv6_routers"] = "fe80::31"
    prober = Prober(namespace, "eth0", HOST_MAC, world, "world0")
    cells = expected.host_cells(fleet, host, text)
    return Layer(f"firewall of {host}", text, nft, prober, cells, stranger)


def slot_layers(fleet: expected.Fleet, facts: dict[str, Any]) -> list[Layer]:
    slave = new_namespace()
    world = wired(slave, "cellblock0")
    config = NetworkConfig.parse(facts["engine"], "network")
    with inside(slave):
        slot = Slot(0, config, Netlink(), Path(tempfile.mkdtemp()))
    mac = ":".join(f"{byte:02x}" for byte in config.mac(0))
    other_mac = ":".join(f"{byte:02x}" for byte in config.mac(1))
    # The namespace's own settings are a layer too: opened.
    sysctl(slot.namespace, **QUIET, ipv4__conf__job0__rp_filter="0")
    for name in ("all", "default", "lo", "job0"):
        sysctl(slot.namespace, **{f"ipv6__conf__{name}__disable_ipv6": "0"})
    sysctl(slot.namespace, ipv6__conf__job0__accept_dad="0")
    ip(
        slot.namespace,
        "link set job0 arp off",
        "address add fd00:cb::128/64 dev job0 nodad",
        "route add default via fd00:cb::30",
    )
    with inside(slot.namespace):
        nft = Nft()
    prober = Prober(slot.namespace, "job0", mac, world, "world0")
    inet, netdev = network.closed_rules(config, 0).split("table netdev", 1)
    layers = []
    address = str(config.address(0))
    listed = "198.51.100.10"
    allow = {"to": f"{listed}/32", "protocol": "tcp", "ports": [8080]}
    for policy, more in (("cache", {}), ("internet", {}), ("allow", {"network_allow": [allow]})):
        stage = {"name": "run", "command": ["true"], "network": policy, **more}
        parsed = parse_job({"environment": "base", "stages": [stage]}).stages[0]
        access = Access.of(parsed, "stages[0]", config, "slave1")
        texts = [(policy, access, listed if more else "")]
        if more:
            # The engine refuses a list with forbidden addresses; opened, the rules must.
            everything = Reach((IPv4Network("0.0.0.0/0"),), "tcp", (8080,))
            opened = replace(access, after_denied=(everything,))
            texts.append(("allow, all of 0.0.0.0/0", opened, "0.0.0.0/0"))
        for name, ready, entry in texts:
            limits = StageConstraints(network_bytes_per_second=2**30)
            text = inet + network.open_rules(ready, limits)
            cells = expected.slot_cells(fleet, address, mac, text, policy, entry)
            stranger = {"denied": listed} if policy == "internet" or entry == "0.0.0.0/0" else {}
            layers.append(Layer(f"slot, policy {name}", text, nft, prober, cells, stranger))
    frames = expected.frame_cells(address, mac, str(config.address(1)), other_mac)
    layers.append(Layer("slot, frames", "table netdev" + netdev, nft, prober, frames, {}))
    return layers


def main() -> None:
    facts = json.load(sys.stdin)
    wanted, only = (sys.argv[1:] + ["", ""])[:2]
    fleet = expected.Fleet(facts)
    makers: list[Callable[[], list[Layer]]] = [lambda: slot_layers(fleet, facts)]
    for host, text in facts["firewalls"].items():
        makers.append(lambda host=host, text=text: [host_layer(fleet, host, text)])  # type: ignore[misc]
    for make in makers:
        for layer in make():
            if wanted in layer.name:
                print(json.dumps(layer.run(only)), flush=True)


if __name__ == "__main__":
    main()
