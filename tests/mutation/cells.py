"""What must and must not pass, from the declared flows alone: no rules are read here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from packets import ACK, ICMP, ICMPV6, SYN, SYN_ACK, TCP, UDP, Packet
from prober import HELD, IN, LOOPBACK, OUT, Cell

PROTOCOLS = {"tcp": TCP, "udp": UDP, "icmp": ICMP}
UNDECLARED = 9999
_NOTHING: frozenset[str] = frozenset()
_LEFT = frozenset(("left",))
_ARRIVED = frozenset(("arrived",))


def neighbour(address: str) -> str:
    """The address that a prefix one bit too short would add."""
    number = ip_address(address)
    return str(type(number)(int(number) ^ 1))


class Fleet:
    """The declared flows, read once more. ``facts`` is plain data: groups, addresses, networks,
    services, flows, job_flows, job_address, internet, special (CIDR), ipv6_jobs: whether jobs have IPv6."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.services: set[tuple[str, int]] = {
            (s["protocol"], s.get("port") or 0) for s in facts["services"].values()
        }
        self.special = [ip_network(cidr) for cidr in facts["special"]]

    def groups(self, host: str) -> set[str]:
        return {"fleet"} | {g for g, hosts in self.facts["groups"].items() if host in hosts}

    def names(self, address: str) -> set[str]:
        """What flows may call whoever has the address."""
        for host, addresses in self.facts["addresses"].items():
            if address in addresses:
                return self.groups(host)
        found = {
            name
            for name, entries in self.facts["networks"].items()
            if any(ip_address(address) in ip_network(entry) for entry in entries)
        }
        if not found and not self.is_special(address):
            found.add("internet")
        return found

    def is_special(self, address: str) -> bool:
        known = [ip_network(a) for every in self.facts["addresses"].values() for a in every]
        known += [ip_network(n) for every in self.facts["networks"].values() for n in every]
        number = ip_address(address)
        return any(number in network for network in (*self.special, *known))

    def in_(self, host: str, peer: str, protocol: str, port: int) -> bool:
        for flow in self.facts["flows"]:
            if flow["to"] in self.groups(host) and flow["from"] in self.names(peer):
                for name in flow["services"]:
                    service = self.facts["services"][name]
                    if self._is(service, protocol, port) and self.groups(host) & set(
                        service["groups"]
                    ):
                        return True
        job = ip_address(peer) in ip_network(self.facts["job_network"])
        return job and self.job(host, protocol, port)

    def any_policy(self, address: str, protocol: str, port: int) -> bool:
        """Whether the union of all policies reaches it, as far as guards tell services apart: outside
        the fleet, TCP and UDP as a whole."""
        if ":" in address and not self.facts.get("ipv6_jobs"):
            return False
        for host, addresses in self.facts["addresses"].items():
            if address in addresses:
                return any(
                    flow["to"] in self.groups(host)
                    and any(
                        self._is(self.facts["services"][s], protocol, port)
                        and self.groups(host) & set(self.facts["services"][s]["groups"])
                        for s in flow["services"]
                    )
                    for flows in self.facts["job_flows"].values()
                    for flow in flows
                )
        return protocol != "icmp" and not self.is_special(address)

    def container(self, peer: str, protocol: str, port: int) -> bool:
        """Whether worker containers, and what runs in them, may use it: over IPv4 alone."""
        return ":" not in peer and any(
            flow["from"] == "worker_containers"
            and flow["to"] in self.names(peer)
            and any(self._is(self.facts["services"][s], protocol, port) for s in flow["services"])
            for flow in self.facts["flows"]
        )

    def job(self, host: str, protocol: str, port: int) -> bool:
        return any(
            flow["to"] in self.groups(host)
            and any(self._is(self.facts["services"][s], protocol, port) for s in flow["services"])
            for flows in self.facts["job_flows"].values()
            for flow in flows
        )

    def out(self, host: str, peer: str, protocol: str, port: int) -> bool:
        return any(
            flow["from"] in self.groups(host)
            and flow["to"] in self.names(peer)
            and any(self._is(self.facts["services"][s], protocol, port) for s in flow["services"])
            for flow in self.facts["flows"]
        )

    @staticmethod
    def _is(service: Mapping[str, Any], protocol: str, port: int) -> bool:
        return (service["protocol"], service.get("port") or 0) == (protocol, port)

    def peers(self, host: str) -> list[str]:
        """Everybody's addresses, and beside each one that nobody has."""
        known = [
            *(a for name, every in self.facts["addresses"].items() if name != host for a in every),
            *(str(ip_network(n)[0]) for every in self.facts["networks"].values() for n in every),
            *self.facts["internet"],
        ]
        known = [a for a in known if a not in self.facts["unroutable"]]
        beside = [neighbour(a) for a in known]
        own = self.facts["addresses"].get(host, ())
        return list(
            dict.fromkeys(a for a in [*known, *beside, self.facts["job_address"]] if a not in own)
        )


def _packet(source: str, target: str, protocol: str, port: int, type_: int = SYN) -> Packet:
    if protocol == "icmp":
        six = ":" in target
        return Packet(source, target, ICMPV6 if six else ICMP, type=128 if six else 8)
    return Packet(source, target, PROTOCOLS[protocol], 0, port, type_ if protocol == "tcp" else 0)


def _answer(packet: Packet) -> Packet:
    if packet.protocol in (ICMP, ICMPV6):
        return packet.back(0 if packet.protocol == ICMP else 129)
    return packet.back(SYN_ACK if packet.protocol == TCP else 0)


def edges(text: str, sets: str) -> Iterator[str]:
    """First and last address of every element of the sets, and the ones before and after it."""
    for listed in re.findall(rf"set {sets} \{{[^}}]*elements = \{{([^}}]*)\}}", text):
        for element in listed.split(","):
            network = ip_network(element.strip())
            width = network.max_prefixlen
            first, last = int(network[0]), int(network[-1])
            make = type(network[0])
            half = int(network[network.num_addresses // 2])
            wider = network.supernet() if network.prefixlen else network
            # In the half that a bit more or less would take or leave.
            for number in {first, last, half, first - 1, last + 1, int(wider[0]), int(wider[-1])}:
                if 0 <= number < 1 << width:
                    yield str(make(number))


def host_cells(fleet: Fleet, host: str, text: str) -> list[Cell]:
    """For the firewall of ``host``: all services with everybody, both ways, and what is no flow."""
    cells: list[Cell] = []
    own = {4: "", 6: ""}
    for address in fleet.facts["addresses"][host]:
        own[6 if ":" in address else 4] = address
    services = sorted(fleet.services | {("tcp", UNDECLARED), ("udp", UNDECLARED)})
    some_in: dict[int, Packet] = {}
    some_out: dict[int, Packet] = {}
    for peer in fleet.peers(host):
        version = 6 if ":" in peer else 4
        for protocol, port in services:
            packet = _packet(peer, own[version], protocol, port)
            allowed = fleet.in_(host, peer, protocol, port)
            name = f"{protocol} {port} from {peer}"
            expected = frozenset(("arrived", "replied")) if allowed else _NOTHING
            answer = None
            if allowed and protocol == "udp":
                # The kernel says that nobody listens; a service would say this.
                expected, answer = expected | {"answered"}, _answer(packet)
            cells.append(Cell(name, IN, packet, expected, answer))
            if allowed and protocol == "icmp":  # what TCP resets is forgotten at once
                some_in.setdefault(version, packet)
            packet = _packet(own[version], peer, protocol, port)
            allowed = fleet.out(host, peer, protocol, port)
            name = f"{protocol} {port} to {peer}"
            expected = frozenset(("left", "answered")) if allowed else _NOTHING
            cells.append(Cell(name, OUT, packet, expected, _answer(packet) if allowed else None))
            if allowed and protocol == "tcp":
                some_out.setdefault(version, packet)
    cells += _held(fleet, host, own, services)
    for address in edges(text, r"not_internet_v[46]"):
        version = 6 if ":" in address else 4
        packet = _packet(own[version], address, "tcp", 80)
        known = fleet.out(host, address, "tcp", 80)
        expected = _LEFT if known else _NOTHING
        cells.append(Cell(f"tcp 80 to {address}", OUT, packet, expected, None, _LEFT))
    for address in edges(text, "jobs_v4"):
        for protocol, port in services:
            if fleet.job(host, protocol, port):
                passes = fleet.in_(host, address, protocol, port)
                packet = _packet(address, own[4], protocol, port)
                expected = frozenset(("arrived", "replied")) if passes else _NOTHING
                answer = None
                if passes and protocol == "udp":
                    expected, answer = expected | {"answered"}, _answer(packet)
                cells.append(
                    Cell(f"{protocol} {port} from {address}", IN, packet, expected, answer)
                )
    for version in (4, 6):
        loop = Packet("", "::1" if version == 6 else "127.0.0.1", TCP)
        cells.append(Cell(f"loopback IPv{version}", LOOPBACK, loop, frozenset(("answered",))))
    cells += _errors(some_in, some_out)
    cells += _spoofed(fleet, host, own, some_out)
    cells += _neighbourhood(own[6])
    cells += _dhcp(own)
    for peer in ("10.213.0.98", "fd00:cb::98"):  # nobody's, so that every host would pass it on
        source = "fd00:cb::97" if ":" in peer else "10.213.0.97"
        cells.append(Cell(f"forwarded to {peer}", IN, _packet(source, peer, "udp", 53)))
    return cells


def _held(
    fleet: Fleet, host: str, own: Mapping[int, str], services: Iterable[tuple[str, int]]
) -> Iterator[Cell]:
    """Connections from before the rules, that they do not allow: over, and those of TCP reset."""
    mine = {
        (protocol, port)
        for protocol, port in services
        if (
            any(
                fleet.out(host, p, protocol, port) or fleet.in_(host, p, protocol, port)
                for p in fleet.peers(host)
            )
            or port == UNDECLARED
        )
    }
    for peer in fleet.peers(host):
        version = 6 if ":" in peer else 4
        for protocol, port in sorted(mine):
            for way in HELD:
                by_host = "by host" in way
                allowed = (fleet.out if by_host else fleet.in_)(host, peer, protocol, port)
                if allowed:
                    continue
                source, target = (own[version], peer) if by_host else (peer, own[version])
                expected = frozenset(("refused",) if "host sends" in way else ("replied",))
                if protocol != "tcp":
                    expected = _NOTHING
                packet = _packet(source, target, protocol, port)
                cells_name = f"{protocol} {port} with {peer}, {way}"
                yield Cell(cells_name, way, packet, expected)
        # A service's own port is no right to begin anything.
        for protocol, port in sorted(mine):
            known = (fleet.out(host, peer, protocol, port), fleet.in_(host, peer, protocol, port))
            if protocol == "icmp" or not any(known):
                continue
            for way in HELD:
                source, target = (own[version], peer) if "by host" in way else (peer, own[version])
                expected = frozenset(("refused",) if "host sends" in way else ("replied",))
                expected = expected if protocol == "tcp" else _NOTHING
                packet = Packet(source, target, PROTOCOLS[protocol], port, 0, SYN)
                packet = packet if protocol == "tcp" else replace(packet, type=0)
                yield Cell(f"{protocol} from port {port}, {peer}, {way}", way, packet, expected)


def _errors(some_in: Mapping[int, Packet], some_out: Mapping[int, Packet]) -> Iterator[Cell]:
    """ICMP errors about what is allowed."""
    for version, known in (
        (4, {3: 1, 11: 1, 12: 1, 4: 0, 5: 0}),
        (6, {1: 1, 2: 1, 3: 1, 4: 1, 5: 0}),
    ):
        protocol = ICMPV6 if version == 6 else ICMP
        for type_, passes in known.items():
            watched = frozenset(("answered",))
            expected = watched if passes else _NOTHING
            for way, some in ((OUT, some_out), (IN, some_in)):
                if version not in some:
                    continue
                packet = some[version]
                error = Packet(packet.target, packet.source, protocol, type=type_, inner=packet)
                yield Cell(
                    f"ICMP error {type_} about {way} IPv{version}",
                    way,
                    packet,
                    expected,
                    error,
                    watched,
                )


def _spoofed(
    fleet: Fleet, host: str, own: Mapping[int, str], some_out: Mapping[int, Packet]
) -> Iterator[Cell]:
    for version, packet in some_out.items():
        other = neighbour(own[version])
        yield Cell(f"spoofed {other}", OUT, Packet(other, packet.target, TCP, 0, packet.dport, SYN))
    for address in fleet.facts["unroutable"]:
        version = 6 if ":" in address else 4
        yield Cell(
            f"spoofed {address}, which is elsewhere", IN, _packet(address, own[version], "tcp", 22)
        )


def _neighbourhood(own: str) -> Iterator[Cell]:
    """Neighbour discovery, multicast listeners, routers."""
    body = bytes(8)

    def cell(way: str, source: str, target: str, type_: int, hops: int, passes: bool) -> Cell:
        packet = Packet(source, target, ICMPV6, type=type_, hops=hops, data=body)
        watched = _ARRIVED if way == IN else _LEFT
        name = f"ICMPv6 {type_}, hop limit {hops}, {source} to {target}"
        return Cell(name, way, packet, watched if passes else _NOTHING, None, watched)

    local, router, other = "fe80::42", "fe80::30", "fe80::31"
    for type_ in (135, 136):
        yield cell(IN, local, own, type_, 255, True)
        yield cell(IN, local, own, type_, 64, False)
        yield cell(OUT, own, local, type_, 255, True)
        yield cell(OUT, own, local, type_, 64, False)
    yield cell(IN, local, own, 128, 255, False)
    yield cell(OUT, own, local, 128, 255, False)
    yield cell(IN, local, own, 130, 1, True)
    yield cell(IN, "fd00:cb::99", own, 130, 1, False)
    yield cell(IN, "fec0::42", own, 130, 1, False)
    yield cell(IN, local, own, 128, 1, False)
    for type_ in (131, 132, 143):
        yield cell(OUT, own, "ff02::16", type_, 1, True)
        yield cell(OUT, own, local, type_, 1, False)
        yield cell(OUT, own, "ff03::16", type_, 1, False)
    yield cell(OUT, own, "ff02::1", 128, 1, False)
    yield cell(IN, router, own, 134, 255, True)
    yield cell(IN, other, own, 134, 255, False)
    yield cell(IN, router, own, 128, 255, False)
    yield cell(OUT, own, "ff02::2", 133, 255, True)
    # From a router further away, or for one.
    yield cell(IN, local, own, 130, 2, False)
    yield cell(OUT, own, "ff02::16", 143, 2, False)
    yield cell(IN, router, own, 134, 254, False)
    yield cell(OUT, own, "ff02::2", 133, 254, False)
    yield cell(OUT, own, "ff02::1", 128, 255, False)


def _dhcp(own: Mapping[int, str]) -> Iterator[Cell]:
    watched = {IN: _ARRIVED, OUT: _LEFT}
    for version, server, client, peer, beyond in (
        (4, 67, 68, "10.213.0.99", ()),
        (6, 547, 546, "fe80::42", ("fd00:cb::99", "fec0::42")),
    ):
        me = own[version]
        source = me if version == 4 else "fe80::77"
        for way in (IN, OUT):
            there, here = (server, client) if way == IN else (client, server)
            ends = (peer, me) if way == IN else (source, peer)
            for sport, dport in ((there, here), (UNDECLARED, here), (there, UNDECLARED)):
                passes = UNDECLARED not in (sport, dport)
                packet = Packet(*ends, UDP, sport, dport)
                name = f"DHCP {sport} to {dport}, {way}, IPv{version}"
                yield Cell(
                    name, way, packet, watched[way] if passes else _NOTHING, None, watched[way]
                )
            for far in beyond:
                ends = (far, me) if way == IN else (me if far[1] == "d" else far, peer)
                packet = Packet(*ends, UDP, there, here)
                yield Cell(f"DHCP from {ends[0]}, {way}", way, packet, _NOTHING, None, watched[way])


def slot_cells(
    fleet: Fleet, slot: str, slot_ipv6: str, text: str, policy: str, listed: str = ""
) -> list[Cell]:
    """For a slot's own filter. ``listed``: the one address that policy ``allow`` names, for 8080.
    ``slot_ipv6``: empty where slots have no IPv6."""
    refused = frozenset(("refused",))
    cells: list[Cell] = []
    services = sorted({*fleet.services, ("tcp", UNDECLARED), ("udp", UNDECLARED), ("tcp", 8080)})
    own6 = slot_ipv6 or "fd00:cb::128"
    flows = fleet.facts["job_flows"].get(policy, [])

    def allowed(address: str, protocol: str, port: int) -> bool:
        if ":" in address and not slot_ipv6:
            return False
        if listed == "0.0.0.0/0":
            return (protocol, port) == ("tcp", 8080) and not fleet.is_special(address)
        if listed:
            return (address, protocol, port) == (listed, "tcp", 8080)
        here = fleet.names(address)
        for flow in flows:
            if flow["to"] in here and any(
                fleet._is(fleet.facts["services"][s], protocol, port) for s in flow["services"]
            ):
                return True
            # A job asks for nothing of the fleet's but services; the rest that is public is open.
            if (
                flow["to"] == "internet"
                and not fleet.is_special(address)
                and any(
                    fleet._is(fleet.facts["services"][s], protocol, port) for s in flow["services"]
                )
            ):
                return True
        return False

    some: Packet | None = None
    some_ipv6: Packet | None = None
    for peer in [p for p in fleet.peers("") if p not in (slot, slot_ipv6)]:
        own = own6 if ":" in peer else slot
        for protocol, port in services:
            packet = _packet(own, peer, protocol, port)
            passes = allowed(peer, protocol, port)
            expected = frozenset(("left", "answered")) if passes else refused
            name = f"{protocol} {port} to {peer}"
            cells.append(Cell(name, OUT, packet, expected, _answer(packet) if passes else None))
            if passes and protocol == "tcp":
                if packet.version == 4:
                    some = some or packet
                else:
                    some_ipv6 = some_ipv6 or packet
            cells.append(
                Cell(f"{protocol} {port} from {peer}", IN, _packet(peer, own, protocol, port))
            )
    if policy == "internet" or listed == "0.0.0.0/0":
        web = 8080 if listed else 80
        for address in (*edges(text, "denied"), *edges(text, "denied_v6")):
            passes = allowed(address, "tcp", web)
            packet = _packet(own6 if ":" in address else slot, address, "tcp", web)
            cells.append(
                Cell(
                    f"tcp {web} to {address}",
                    OUT,
                    packet,
                    _LEFT if passes else _NOTHING,
                    None,
                    _LEFT,
                )
            )
    assert some is not None
    # The next packet of what it has begun passes; one of a connection that nobody began does not.
    cells.append(Cell("of before, begun by the slot", HELD[1], some, frozenset(("left",))))
    cells.append(Cell("of before, answered", HELD[0], some, frozenset(("arrived", "replied"))))
    begun = Packet(some.target, slot, TCP, some.dport, 0, SYN)
    cells.append(Cell("of before, begun outside", HELD[2], begun))
    unknown = Packet(slot, some.target, TCP, 0, some.dport, ACK, later=True)
    cells.append(Cell("of no connection", OUT, unknown, _NOTHING, None, _LEFT))
    for other in (neighbour(slot), "10.213.0.12"):
        packet = Packet(other, some.target, TCP, 0, some.dport, SYN)
        cells.append(Cell(f"spoofed {other}", OUT, packet))
    for everybody in ("255.255.255.255", "10.213.0.255", "224.0.0.1"):
        packet = _packet("10.213.0.14", everybody, "udp", 53)
        cells.append(Cell(f"udp 53 from 10.213.0.14 to {everybody}", IN, packet))
    cells += _errors({}, {4: some})
    loop = Packet("", "127.0.0.1", TCP)
    cells.append(Cell("loopback IPv4", LOOPBACK, loop, frozenset(("answered",))))
    cells.append(Cell("forwarded", IN, _packet("10.213.0.14", "10.213.0.12", "udp", 53)))
    if some_ipv6 is not None:
        cells += _slot_ipv6(some_ipv6)
    return cells


def _slot_ipv6(some: Packet) -> Iterator[Cell]:
    """What there is in IPv6 only; ``some`` is allowed."""
    slot, other = some.source, neighbour(some.source)
    yield Cell("spoofed IPv6", OUT, Packet(other, some.target, TCP, 0, some.dport, SYN))
    yield from _errors({}, {6: some})
    yield Cell("with a routing header", OUT, replace(some, route=True), _NOTHING, None, _LEFT)
    for target, expected in (
        ("fe80::30", frozenset(("refused",))),
        ("ff02::1", _NOTHING),  # of multicast, nobody is told that it was refused
        (other, frozenset(("refused",))),
    ):
        yield Cell(f"IPv6 to {target}", OUT, replace(some, target=target), expected)
    body = bytes(8)
    for type_, hops, arrives, leaves in (
        (135, 255, True, True),
        (136, 255, True, True),
        (135, 64, False, True),
        (136, 64, False, True),
        (133, 255, False, False),
        (134, 255, False, False),
        (137, 255, False, False),
        (128, 255, False, False),
        (143, 255, False, False),
    ):
        for way, ends, passes, watched in (
            (IN, ("fe80::42", slot), arrives, _ARRIVED),
            (OUT, (slot, "fe80::42"), leaves, _LEFT),
            (OUT, (other, "fe80::42"), False, _LEFT),
        ):
            packet = Packet(*ends, ICMPV6, type=type_, hops=hops, data=body)
            name = f"ICMPv6 {type_}, hop limit {hops}, {ends[0]} to {ends[1]}"
            yield Cell(name, way, packet, watched if passes else _NOTHING, None, watched)
    loop = Packet("", "::1", TCP)
    yield Cell("loopback IPv6", LOOPBACK, loop, frozenset(("answered",)))


def frame_cells(slot: str, slot_ipv6: str, slot_mac: str, other: str, other_mac: str) -> list[Cell]:
    """For the table netdev of a slot: whose frames may leave it. Its other table is open.
    ``slot_ipv6``: empty where slots have no IPv6."""

    def cell(name: str, mac_: str, packet: Packet, passes: bool) -> Cell:
        return Cell(name, OUT, packet, _LEFT if passes else _NOTHING, None, _LEFT, "", mac_)

    good = Packet(slot, "198.51.100.10", UDP, 0, 80)
    forged = Packet(other, "198.51.100.10", UDP, 0, 80)
    six = Packet(slot_ipv6 or "fd00:cb::128", "2001:db8:113::10", UDP, 0, 80)
    forged_six = replace(six, source=neighbour(six.source))
    return [
        cell("own frame", slot_mac, good, True),
        cell("another's MAC", other_mac, good, False),
        cell("another's address", slot_mac, forged, False),
        cell("another's MAC and address", other_mac, forged, False),
        cell("IPv6", slot_mac, six, bool(slot_ipv6)),
        cell("IPv6, another's MAC", other_mac, six, False),
        cell("IPv6, another's address", slot_mac, forged_six, False),
        *(
            Cell(
                f"ARP of {m} for {a}",
                "arp",
                Packet(a, "10.213.0.30", UDP),
                _LEFT if ok else _NOTHING,
                None,
                _LEFT,
                m,
                f,
            )  # fmt: skip
            for f, m, a, ok in (
                (slot_mac, slot_mac, slot, True),
                (slot_mac, other_mac, slot, False),
                (slot_mac, slot_mac, other, False),
                (other_mac, slot_mac, slot, False),
                (other_mac, other_mac, other, False),
            )
        ),
    ]
