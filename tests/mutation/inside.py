"""The part that runs in a container without a network: builds hosts, loads mutants, probes.

Reads the facts and the hosts' texts as JSON on stdin, prints one JSON line per layer.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, Protocol

import cells as expected
import equivalent
import guards
import guards6
from mutants import Mutant, mutants
from packets import ICMP, ICMPV6, TCP, UDP
from prober import IN, LATE_S, OUT, QUIET_S, Cell, Difference, Prober
from vantages import HOST, WORLD, Vantages

from cellblock.engine.job_parser import parse_job
from cellblock.engine.limits import StageConstraints
from cellblock.job_network.access import Access
from cellblock.job_network.plan import HOST_END, INTERFACE
from cellblock.job_network.policy import EgressRule, EgressRules
from cellblock.job_network.rules import closed_rules, open_rules
from cellblock.job_network.section import NetworkConfig
from cellblock.job_network.slots import Slot
from cellblock.linux.netlink import Netlink, inside, new_namespace
from cellblock.linux.nft import Nft, NftError
from cellblock.units import Bytes, Count

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
# So that no slot's kernel answers: what jobs send is made by hand.
SILENT = """
table inet silent {
    chain out { type filter hook output priority 0; policy drop; }
}
"""
SLOW_QUIET_S = 0.03
"""How long nothing may have come where a mutant seems to survive."""
CONFIRMED = 3
"""So many cells, of those that a mutant seems to change, are probed again."""


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
    # Beside the numbers that cells have for ports.
    "ipv4__ip_local_port_range": "61000 65000",
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


class AnyProber(Protocol):
    """What a layer needs of its prober."""

    def forget(self) -> None: ...

    def hold(self, cells: Sequence[Any]) -> list[int]: ...

    def differences(
        self, cells: Sequence[Any], held: Sequence[int] = (), quiet_s: float = QUIET_S
    ) -> list[Difference]: ...


@dataclass
class Layer:
    """One text, loaded alone, and what is probed of it."""

    name: str
    text: str
    nft: Nft
    prober: AnyProber
    cells: Sequence[Any]
    strangers: Mapping[str, Sequence[str]]
    is_about: Callable[[Mutant], bool] = lambda mutant: True
    loaded: str | None = None
    noticed: list[Any] = field(default_factory=list)
    """Cells that noticed the latest mutants."""
    STEP = 10

    def differences(
        self, text: str, cells: Sequence[Any], quiet_s: float = QUIET_S
    ) -> list[Difference]:
        held = [cell for cell in cells if cell.held]
        numbers: list[int] = []
        if held:
            self.nft.run("flush ruleset\n" + OPEN)
            self.loaded = None
        self.prober.forget()
        if held:
            numbers = self.prober.hold(held)
        if self.loaded != text:
            self.loaded = None
            self.nft.run("flush ruleset\n" + text)
            self.loaded = text
        return self.prober.differences(cells, numbers, quiet_s)

    def changeable(self, mutant: Mutant) -> list[Any]:
        """The cells that the mutant can change: of its rule's family, protocol and direction."""
        if not isinstance(self.cells[0], Cell):
            return list(self.cells)
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
            if mutant.what.startswith("without ct direction"):
                # What the other side began may pass now.
                ways |= {IN, OUT, f"held by {'peer' if by_host else 'host'}, {sender} sends"}
        held = re.search(r"resets|related|ct state", about)
        return [
            cell
            for cell in self.cells
            if (not version or cell.packet.version == version)
            and (not protocols or cell.packet.protocol in protocols)
            and (cell.way in ways if ways else held or not cell.held)
        ]

    def notices(self, mutant: Mutant, some: Sequence[Any], doubts: list[str]) -> list[Difference]:
        """What is seen of the mutant, twice; nothing when it survives. Raises NftError."""
        # Most are noticed by a few cells: those that have noticed others, and one in ten.
        known = {id(cell) for cell in some}
        few = [cell for cell in self.noticed if id(cell) in known] + list(some[:: self.STEP])
        for attempt in range(3):
            seen = self.differences(mutant.text, few) if attempt == 0 else []
            seen = seen or self.differences(mutant.text, some)
            # A packet that comes late is no lost one: whoever seems to survive is waited for longer.
            seen = seen or self.differences(mutant.text, some, SLOW_QUIET_S)
            if not seen:
                break
            cells = [difference.cell for difference in seen[:CONFIRMED]]
            if self.differences(mutant.text, cells):
                self.noticed = [*cells[:1], *(c for c in self.noticed if c is not cells[0])][:20]
                return seen
            doubts.append(f"{mutant}: seen once only: {seen[0].text}")
            if attempt == 2 or self.differences(self.text, self.cells):
                doubts.append(f"{mutant}: and the rules without it do not pass either")
        return []

    def run(self, only: str = "") -> dict[str, Any]:
        started, cpu = time.monotonic(), time.process_time()
        doubts: list[str] = []
        found: dict[str, Any] = {"layer": self.name, "cells": len(self.cells), "doubts": doubts}
        counts: dict[str, list[list[str]]] = {
            key: [] for key in ("killed", "refused", "equivalent", "survivors", "not equivalent")
        }
        found["empty"] = len(self.differences("", self.cells))
        found["control"] = self.control()
        for mutant in mutants(self.text, self.strangers):
            if (only and only not in str(mutant)) or not self.is_about(mutant):
                continue
            row = [mutant.where, mutant.what, mutant.rule]
            excuse = equivalent.reason(self.name, *row[:3])
            some = self.changeable(mutant)
            try:
                seen = self.notices(mutant, some, doubts)
            except NftError as problem:
                counts["refused"].append([*row, str(problem)])
                continue
            if only:
                print(f"{mutant}\n   ", *(d.text for d in seen[:4]), len(seen), file=sys.stderr)
            if seen:
                counts["not equivalent" if excuse else "killed"].append([*row, seen[0].text])
            else:
                counts["equivalent" if excuse else "survivors"].append([*row, excuse])
        found["control"] = found["control"] or self.control()
        found |= {"seconds": time.monotonic() - started, "cpu": time.process_time() - cpu}
        return {**found, **counts}

    def control(self) -> list[str]:
        """What the unmutated rules do wrong; it must be seen every time, as a kernel that is busy takes
        seconds until a link carries IPv6."""
        slow = [(SLOW_QUIET_S, pause_s) for pause_s in (2, 5, 20)]
        for quiet_s, pause_s in ((QUIET_S, 0), *slow, (LATE_S, 0)):
            differences = self.differences(self.text, self.cells, quiet_s)
            if not differences:
                break
            time.sleep(pause_s)
        return [difference.text for difference in differences]


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
    strangers = {
        name: ["10.213.0.23" if name.endswith("_v4") else "fd00:cb::23"]
        for name in re.findall(r"set (\w+_v[46]) ", text)
        if not name.startswith("resets")
    }
    strangers |= {"not_internet_v4": ["198.51.100.10"], "not_internet_v6": ["2001:db8:113::10"]}
    strangers["ipv6_routers"] = ["fe80::31"]
    prober = Prober(namespace, "eth0", HOST_MAC, world, "world0")
    cells = expected.host_cells(fleet, host, text)
    # What jobs' interfaces are in has a layer of its own.
    return Layer(
        f"firewall of {host}", text, nft, prober, cells, strangers, lambda m: "cbj*" not in m.rule
    )


def slot_layers(fleet: expected.Fleet, facts: dict[str, Any], ipv6: bool) -> list[Layer]:
    """With ``ipv6`` for slots that have it, and only what the rules have more then."""
    slave = new_namespace()
    world = wired(slave, "cellblock0")
    config = NetworkConfig.parse(facts["ipv6_engine" if ipv6 else "engine"], "network")
    with inside(slave):
        slot = Slot(0, config, Netlink(), Path(tempfile.mkdtemp()))
    mac, other_mac = config.mac(0), config.mac(1)
    # The namespace's own settings are a layer too: opened.
    sysctl(slot.namespace, **QUIET, ipv4__conf__job0__rp_filter="0")
    for name in ("all", "default", "lo", "job0"):
        sysctl(slot.namespace, **{f"ipv6__conf__{name}__disable_ipv6": "0"})
    sysctl(slot.namespace, ipv6__conf__job0__accept_dad="0")
    ip(slot.namespace, "link set job0 arp off")
    if not ipv6:
        ip(
            slot.namespace,
            "address add fd00:cb::128/64 dev job0 nodad",
            "route add default via fd00:cb::30",
        )
    with inside(slot.namespace):
        nft = Nft()
    prober = Prober(slot.namespace, "job0", mac, world, "world0")
    closed, netdev = closed_rules(config, 0).split("table netdev", 1)
    # What waits for a policy does not answer ARP: no matter of who may reach whom.
    inet = closed.split("table arp", 1)[0]
    layers = []
    address = str(config.address(0))
    listed = "198.51.100.10"
    allow = {"to": f"{listed}/32", "protocol": "tcp", "ports": [8080]}
    slot_ipv6 = str(slot.ipv6_address or "")
    policies: list[tuple[str, dict[str, Any]]] = [("internet", {})]
    if not ipv6:
        policies = [("cache", {}), *policies, ("allow", {"network_allow": [allow]})]
    for policy, more in policies:
        stage = {"name": "run", "command": ["true"], "network": policy, **more}
        parsed = parse_job({"environment": "base", "stages": [stage]}).stages[0]
        access = Access.of(parsed.network, parsed.network_allow, "stages[0]", config, "slave1")
        texts = [(policy, access, listed if more else "")]
        if more:
            # The engine refuses a list with forbidden addresses; opened, the rules must.
            everything = EgressRule(None, "tcp", (8080,))
            opened = replace(access, rules=EgressRules(services=(), internet=(everything,)))
            texts.append(("allow, all of 0.0.0.0/0", opened, "0.0.0.0/0"))
        for name, ready, entry in texts:
            limits = StageConstraints(
                network_bytes_per_second=Bytes(2**30),
                network_connections=Count(10**5),
                network_connections_per_second=Count(10**6),
            )
            opening = open_rules(config, ready, limits).splitlines()
            text = inet + "\n".join(c for c in opening if not c.startswith("add rule arp"))
            cells = expected.slot_cells(fleet, address, slot_ipv6, text, policy, entry)
            widened = policy == "internet" or entry == "0.0.0.0/0"
            strangers = {"denied": [listed]} if widened else {}
            if ipv6:
                strangers = {"denied_v6": ["2001:db8:113::10"]}
            layer = Layer(f"slot, policy {name}", text, nft, prober, cells, strangers)
            layers.append(_of_ipv6(layer) if ipv6 else layer)
    frames = expected.frame_cells(address, slot_ipv6, mac, str(config.address(1)), other_mac)
    layer = Layer("slot, frames", "table netdev" + netdev, nft, prober, frames, {})
    return [*layers, _of_ipv6(layer) if ipv6 else layer]


def _of_ipv6(layer: Layer) -> Layer:
    """The layer with what is for IPv6 alone mutated; the rest has been, without IPv6."""

    def is_about(mutant: Mutant) -> bool:
        text = f"{mutant.where} {mutant.rule} {mutant.what}"
        return mutant.where == "everything" or bool(re.search(r"ip6|icmpv6|_v6\b|exthdr", text))

    return replace(layer, name=f"{layer.name}, IPv6", is_about=is_about)


def guarded(
    facts: Mapping[str, Any], mode: str, *, ipv6: bool = False
) -> tuple[int, int, list[Slot], list[str]]:
    """A slave with two slots, made as the engine does: its namespace, the world's, the slots and their
    MACs. All that hinders jobs besides the rules is open."""
    slave = new_namespace()
    sysctl(slave, **QUIET)
    world = wired(slave, "eth0")
    sysctl(slave, ipv6__conf__all__forwarding="1", ipv6__conf__eth0__accept_ra="0")
    ip(
        slave,
        *(f"address add {a} dev eth0" for a in ("10.213.0.21/24", f"{guards.SECOND}/24")),
        "address add fd00:cb::21/64 dev eth0 nodad",
        f"address add {guards6.SECOND_SIX}/64 dev eth0 nodad preferred_lft 0",
        "route add default via 10.213.0.30",
        "route add default via fd00:cb::30",
    )
    if mode == "macvlan":
        ip(
            slave,
            "link add link eth0 name cellblock0 type macvlan mode private",
            "link set cellblock0 up",
        )
    engine = {**facts["engine"], "mode": mode, "slots": 2}
    if ipv6:
        on_segment = {"prefix_length": 64, "gateway": guards6.GATEWAY_SIX}
        engine["ipv6"] = {"prefix": facts["ipv6_prefix"]} | (
            on_segment if mode == "macvlan" else {}
        )
    config = NetworkConfig.parse(engine, "network")
    slots = []
    with inside(slave):
        for number in range(2):
            slots.append(Slot(number, config, Netlink(), Path(tempfile.mkdtemp())))
    for number, slot in enumerate(slots):
        with inside(slot.namespace):
            Nft().run("flush ruleset\n" + SILENT)
        if mode == "routed":
            name = f"{HOST_END}{number}"
            values = {"disable_ipv6": "0", "accept_dad": "0", "forwarding": "1"}
            sysctl(slave, **{f"ipv6__conf__{name}__{k}": v for k, v in values.items()})
            sysctl(slave, **{f"ipv4__conf__{name}__rp_filter": "0"})
            ip(slave, f"link set {name} arp off")
    macs = [config.mac(number) for number in range(2)]
    return slave, world, slots, macs


def framed(
    facts: Mapping[str, Any], *, ipv6: bool = False
) -> tuple[int, Vantages, list[Slot], list[str]]:
    """A slave in mode macvlan, and what looks at its frames."""
    slave, world, slots, macs = guarded(facts, "macvlan", ipv6=ipv6)
    wires = {
        HOST: (slave, "eth0"),
        WORLD: (world, "world0"),
        **{f"slot{n}": (slot.namespace, INTERFACE) for n, slot in enumerate(slots)},
    }
    ends = {
        HOST: (HOST_MAC, WORLD_MAC),
        WORLD: (WORLD_MAC, HOST_MAC),
        **{f"slot{n}": (mac, WORLD_MAC) for n, mac in enumerate(macs)},
    }
    return slave, Vantages(slave, wires, ends, host_routes=False), slots, macs


def frame_guard_layer(fleet: expected.Fleet, facts: Mapping[str, Any]) -> Layer:
    slave, prober, slots, macs = framed(facts)
    # As the program of the guard does it.
    text = facts["guards"]["macvlan"].replace("@mac:eth0@", HOST_MAC)
    pairs = [(str(slot.address), mac) for slot, mac in zip(slots, macs, strict=True)]
    cells = guards.frame_guard(fleet, "10.213.0.21", HOST_MAC, pairs, facts["probe_mac"], text)
    strangers = {
        "slots": [f"{macs[0]} . {pairs[1][0]}", f"{guards.STRANGER_MAC} . {guards.STRANGER}"],
        "slot_macs": [HOST_MAC],
        "slot_addresses": ["10.213.0.21"],
        "host_addresses": [guards.STRANGER, pairs[0][0]],
        "neighbours": [guards.STRANGER],
        "services": ["10.213.0.12 . tcp . 5432", "10.213.0.14 . tcp . 22"],
        "denied": [guards.OUTSIDE],
    }
    with inside(slave):
        nft = Nft()
    return Layer("guard, mode macvlan", text, nft, prober, cells, strangers)


def routed(facts: Mapping[str, Any], *, ipv6: bool = False) -> tuple[int, Vantages, list[Slot]]:
    """A slave in mode routed, and what looks at what it passes on."""
    slave, world, slots, macs = guarded(facts, "routed", ipv6=ipv6)
    wires = {
        WORLD: (world, "world0"),
        **{f"slot{n}": (slot.namespace, INTERFACE) for n, slot in enumerate(slots)},
    }
    with inside(slave):
        listed = subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout
        links = {link["ifname"]: link["address"] for link in json.loads(listed)}
    ends = {f"slot{n}": (mac, links[f"{HOST_END}{n}"]) for n, mac in enumerate(macs)}
    ends[WORLD] = (WORLD_MAC, HOST_MAC)
    return slave, Vantages(slave, wires, ends, host_routes=True), slots


def routed_layers(fleet: expected.Fleet, facts: Mapping[str, Any]) -> list[Layer]:
    slave, prober, slots = routed(facts)
    with inside(slave):
        nft = Nft()
    addresses = [str(slot.address) for slot in slots]
    text = facts["guards"]["routed"]
    cells = guards.routed_guard(fleet, "10.213.0.21", guards.SECOND, addresses, text)
    strangers = {
        "slots": [f'"{HOST_END}0" . {addresses[1]}', f'"{HOST_END}0" . {guards.STRANGER}'],
        "slot_addresses": [guards.SECOND],
        "services": ["10.213.0.12 . tcp . 5432", "10.213.0.14 . tcp . 22"],
        "denied": [guards.OUTSIDE],
    }
    within, beside = [addresses[0], addresses[1], "10.213.0.159"], ["10.213.0.127", "10.213.0.160"]
    firewall = facts["firewalls"]["slave1"]
    passed_on = guards.forwarding(fleet, "10.213.0.21", addresses, within, beside)
    return [
        Layer("guard, mode routed", text, nft, prober, cells, strangers),
        Layer(
            "forward of slave1",
            firewall,
            nft,
            prober,
            passed_on,
            {},
            lambda m: m.where == "forward",
        ),
    ]


def container_layers(fleet: expected.Fleet, facts: Mapping[str, Any]) -> list[Layer]:
    """A slave with a container on each of two bridges, as interfaces of the bridges' names."""
    slave = new_namespace()
    sysctl(slave, **QUIET)
    world = wired(slave, "eth0")
    ip(slave, "address add 10.213.0.22/24 dev eth0", "route add default via 10.213.0.30")
    wires, ends, own = {WORLD: (world, "world0")}, {WORLD: (WORLD_MAC, HOST_MAC)}, []
    for number, bridge in enumerate(("docker0", "br-0123456789ab")):
        namespace = new_namespace()
        mac, gateway = f"02:00:00:00:01:0{number}", f"02:00:00:00:02:0{number}"
        ip(
            slave,
            f"link add {bridge} address {gateway} type veth peer name {INTERFACE} address {mac} "
            f"netns /proc/{os.getpid()}/fd/{namespace}",
            f"link set {bridge} arp off up",
            f"address add 172.16.{number}.1/24 dev {bridge}",
        )
        ip(namespace, f"link set {INTERFACE} arp off up")
        with inside(namespace):
            Nft().run("flush ruleset\n" + SILENT)
        sysctl(slave, **{f"ipv4__conf__{bridge}__rp_filter": "0"})
        wires[f"slot{number}"], ends[f"slot{number}"] = (namespace, INTERFACE), (mac, gateway)
        own.append(f"172.16.{number}.2")
    with inside(slave):
        nft = Nft()
    return [
        Layer(
            "forward of containers",
            facts["containers_firewall"],
            nft,
            Vantages(slave, wires, ends, host_routes=True),
            guards.containers(fleet, "10.213.0.22", own),
            {"cache_servers_v4": ["10.213.0.12", "10.213.0.23"]},
            lambda m: m.where in ("forward", "cache_servers_v4"),
        )
    ]


def is_about_ipv6(mutant: Mutant) -> bool:
    """What is there for IPv6 only; the rest has a layer of its own."""
    return (
        mutant.where == "everything"
        or mutant.where.endswith("6")
        or re.search(r"\bip6 |icmpv6|exthdr|@\w+6\b", mutant.rule) is not None
    )


def bits(address: str) -> str:
    return f"0x{int(IPv6Address(address)):032x}"


def ipv6_strangers(slots: list[str]) -> dict[str, list[str]]:
    return {
        "slot_addresses6": [guards6.SECOND_SIX],
        "services6": [
            f"{guards6.DATABASE_SIX} . tcp . 5432",
            f"{guards6.CACHE_SIX} . tcp . 22",
        ],
        "denied6": [guards.OUTSIDE_SIX],
        "@th,64,128": [bits(guards6.STRANGER_SIX), bits(slots[1])],
    }


def frame_guard_ipv6_layer(facts: Mapping[str, Any]) -> Layer:
    slave, prober, slots, macs = framed(facts, ipv6=True)
    text = facts["ipv6_guards"]["macvlan"].replace("@mac:eth0@", HOST_MAC)
    addresses = [str(slot.ipv6_address) for slot in slots]
    pairs = list(zip(addresses, macs, strict=True))
    fleet = expected.Fleet({**facts, "ipv6_jobs": True})
    cells = guards6.frame_guard(fleet, HOST_MAC, pairs, text)
    strangers = ipv6_strangers(addresses) | {
        "slots6": [
            f"{macs[0]} . {addresses[1]}",
            f"{guards.STRANGER_MAC} . {guards6.STRANGER_SIX}",
        ],
        "ether saddr . @th,64,128": [
            f"{macs[0]} . {bits(addresses[1])}",
            f"{macs[0]} . {bits(guards6.STRANGER_SIX)}",
        ],
    }
    with inside(slave):
        nft = Nft()
    name = "guard, mode macvlan, IPv6"
    return Layer(name, text, nft, prober, cells, strangers, is_about_ipv6)


def routed_ipv6_layers(facts: Mapping[str, Any]) -> list[Layer]:
    slave, prober, slots = routed(facts, ipv6=True)
    with inside(slave):
        nft = Nft()
    text = facts["ipv6_guards"]["routed"]
    addresses = [str(slot.ipv6_address) for slot in slots]
    fleet = expected.Fleet({**facts, "ipv6_jobs": True})
    cells = guards6.routed_guard(fleet, addresses, text)
    strangers = ipv6_strangers(addresses) | {
        "slots6": [
            f'"{HOST_END}0" . {addresses[1]}',
            f'"{HOST_END}0" . {guards6.STRANGER_SIX}',
        ],
    }
    within = [*addresses, "fd00:cb::ad5:9f"]
    beside = ["fd00:cb::ad5:7f", "fd00:cb::ad5:a0"]
    return [
        Layer("guard, mode routed, IPv6", text, nft, prober, cells, strangers, is_about_ipv6),
        Layer(
            "forward of slave1, IPv6",
            facts["ipv6_firewall"],
            nft,
            prober,
            guards6.forwarding(fleet, addresses, within, beside),
            {},
            lambda m: m.where == "forward" and is_about_ipv6(m),
        ),
    ]


def main() -> None:
    facts = json.load(sys.stdin)
    wanted, only = (sys.argv[1:] + ["", ""])[:2]
    fleet = expected.Fleet(facts)
    # The longest first, so that all processors end at about the same time.
    makers: list[tuple[str, Callable[[], list[Layer]]]] = [
        (f"firewall of {host}", lambda host=host, text=text: [host_layer(fleet, host, text)])  # type: ignore[misc]
        for host, text in facts["firewalls"].items()
    ]
    makers.append(("slot", lambda: slot_layers(fleet, facts, ipv6=False)))
    makers.append(("slot, IPv6", lambda: slot_layers(fleet, facts, ipv6=True)))
    makers.append(("guard, mode macvlan", lambda: [frame_guard_layer(fleet, facts)]))
    makers.append(("guard, mode macvlan, IPv6", lambda: [frame_guard_ipv6_layer(facts)]))
    both = "guard, mode routed, IPv6 forward of slave1, IPv6"
    makers.append((both, lambda: routed_ipv6_layers(facts)))
    makers.append(("guard, mode routed forward of slave1", lambda: routed_layers(fleet, facts)))
    makers.append(("forward of containers", lambda: container_layers(fleet, facts)))
    turn, output = multiprocessing.Value("i", 0), multiprocessing.Lock()

    def work() -> None:
        while True:
            with turn.get_lock():
                number = turn.value
                turn.value += 1
            if number >= len(makers):
                return
            name, make = makers[number]
            if wanted.startswith("slot") or wanted in name or name.startswith(wanted):
                for layer in make():
                    if wanted in layer.name:
                        found = json.dumps(layer.run(only))
                        with output:
                            print(found, flush=True)

    workers = [multiprocessing.Process(target=work) for _ in os.sched_getaffinity(0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    main()
