"""What the rules around all jobs' networks must and must not let through where slots have IPv6; as
guards.py for IPv4, whose rules have layers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from cells import Fleet, _answer, _packet, edges
from guards import (
    _ARRIVED,
    _NOTHING,
    EVERYBODY,
    OUTSIDE_SIX,
    STRANGER_MAC,
    _begun,
    _held,
    _services,
)
from packets import ICMPV6, TCP, UDP, Packet
from vantages import ANSWERED, HOST, RETURNED, WORLD, Passage

HOST_SIX, GATEWAY_SIX, STRANGER_SIX = "fd00:cb::21", "fe80::30", "fd00:cb::23"
HOST_END_SIX = "fe80::cb:1"
"""The host's address towards every slot, in mode routed."""
SECOND_SIX = "fd00:cb::29"
"""Another address of the host's, which it begins nothing under by itself."""
CACHE_SIX, DATABASE_SIX = "fd00:cb::14", "fd00:cb::12"
SOLICIT, ADVERT = 135, 136
ERRORS = {1: True, 2: True, 3: True, 4: True, 5: False}
"""ICMPv6's types that tell of an error, and whether jobs get them; the last is none."""
OTHERS = (128, 129, 130, 131, 132, 133, 134, 137, 138, 143)
"""Echo, multicast listeners, routers, redirects, renumbering."""


def frame_guard(
    fleet: Fleet, host_mac: str, slots: list[tuple[str, str]], text: str
) -> list[Passage]:
    """Of the parent interface; ``slots`` [(IPv6 address, MAC)]."""
    return [
        *_frames_out(fleet, slots, text),
        *_forged(host_mac, slots),
        *_neighbours_out(slots),
        *_frames_in(fleet, host_mac, slots, text),
        *_misdirected(host_mac, slots),
    ]


def _peers(fleet: Fleet, *without: str) -> list[str]:
    return [p for p in fleet.peers("") if ":" in p and p not in without]


def _about(
    source: str, target: str, type_: int, about: str, *, hops: int = 255, route: bool = False
) -> Packet:
    """Neighbour discovery: a message about the address ``about``."""
    data = ip_address(about).packed
    return Packet(source, target, ICMPV6, type=type_, hops=hops, data=data, route=route)


def _everybody_of(address: str) -> str:
    """The multicast address at which who has the address is asked for."""
    return str(ip_address(0xFF0200000000000000000001FF000000 | int(ip_address(address)) & 0xFFFFFF))


def _frames_out(fleet: Fleet, slots: list[tuple[str, str]], text: str) -> Iterator[Passage]:
    address, other = slots[0][0], slots[1][0]
    for peer in _peers(fleet, address, other):
        for protocol, port in _services(fleet):
            expected = _ARRIVED if fleet.any_policy(peer, protocol, port) else _NOTHING
            name = f"{protocol} {port} to {peer}"
            yield Passage(name, "slot0", _packet(address, peer, protocol, port), expected)
    for peer in edges(text, "denied6"):
        expected = _ARRIVED if fleet.any_policy(peer, "tcp", 80) else _NOTHING
        yield Passage(f"tcp 80 to {peer}", "slot0", _packet(address, peer, "tcp", 80), expected)
    yield Passage("tcp 80 of slot1", "slot1", _packet(other, OUTSIDE_SIX, "tcp", 80), _ARRIVED)
    for protocol in ("tcp", "udp", "icmp"):
        packet = _packet(address, other, protocol, 80)
        yield Passage(f"{protocol} 80 of slot0 to slot1", "slot0", packet)
    for peer, port in ((OUTSIDE_SIX, 443), (CACHE_SIX, 53)):
        packet = Packet(address, peer, UDP, 0, port, route=True)
        yield Passage(f"udp {port} to {peer} with a routing header", "slot0", packet)


def _forged(host_mac: str, slots: list[tuple[str, str]]) -> Iterator[Passage]:
    (zero, zero_mac), (one, one_mac) = slots
    for place, source_mac, source, passes in (
        ("slot0", zero_mac, one, False),
        ("slot0", one_mac, zero, False),
        ("slot0", one_mac, one, True),  # no rule here tells who sent a frame that is right
        ("slot0", zero_mac, HOST_SIX, False),
        ("slot0", host_mac, zero, False),
        ("slot0", zero_mac, STRANGER_SIX, False),
        ("slot0", zero_mac, "::", False),
        ("slot0", zero_mac, "fe80::cb:d500:80", False),
        ("slot0", STRANGER_MAC, zero, False),
        ("slot0", STRANGER_MAC, STRANGER_SIX, False),
        (HOST, host_mac, HOST_SIX, True),
        (HOST, host_mac, SECOND_SIX, True),
        (HOST, host_mac, "fe80::21", True),
        (HOST, host_mac, zero, False),
        (HOST, host_mac, one, False),
    ):
        packet = _packet(source, OUTSIDE_SIX, "udp", 80)
        expected = _ARRIVED if passes else _NOTHING
        name = f"from {source} under {source_mac} of {place}"
        yield Passage(name, place, packet, expected, source_mac=source_mac)


def _neighbours_out(slots: list[tuple[str, str]]) -> Iterator[Passage]:
    def said(
        number: int, type_: int, about: str, passes: bool, target: str = "", **more: object
    ) -> Passage:
        address, mac_ = slots[number]
        target = target or (_everybody_of(about) if type_ == SOLICIT else GATEWAY_SIX)
        return Passage(
            f"ICMPv6 {type_} of slot{number} about {about} to {target} {more or ''}",
            f"slot{number}",
            _about(address, target, type_, about, **more),  # type: ignore[arg-type]
            _ARRIVED if passes else _NOTHING,
            source_mac=mac_,
        )

    known = (GATEWAY_SIX, CACHE_SIX)
    for number, (address, _) in enumerate(slots):
        other = slots[1 - number][0]
        for about in (*known, HOST_SIX, DATABASE_SIX, STRANGER_SIX, OUTSIDE_SIX, address, other):
            yield said(number, SOLICIT, about, about in known)
        for about in known:
            yield said(number, SOLICIT, about, True, about)
            yield said(number, SOLICIT, about, False, hops=64)
            yield said(number, SOLICIT, about, False, route=True)
        for about in (address, other, GATEWAY_SIX, CACHE_SIX, HOST_SIX, STRANGER_SIX):
            yield said(number, ADVERT, about, about == address)
            yield said(number, ADVERT, about, about == address, CACHE_SIX)
        yield said(number, ADVERT, address, False, hops=64)
        yield said(number, ADVERT, address, False, route=True)
        for type_ in (*OTHERS, *ERRORS):
            for target in (GATEWAY_SIX, "ff02::1", OUTSIDE_SIX):
                # As if it were about what may be asked for, and about its own.
                for about in (GATEWAY_SIX, address):
                    yield said(number, type_, about, False, target)


def _frames_in(
    fleet: Fleet, host_mac: str, slots: list[tuple[str, str]], text: str
) -> Iterator[Passage]:
    (zero, zero_mac), (one, one_mac) = slots
    arrived = frozenset(("slot0",))

    def came(name: str, packet: Packet, passes: bool) -> Passage:
        return Passage(name, WORLD, packet, arrived if passes else _NOTHING, target_mac=zero_mac)

    for peer in _peers(fleet, zero, one):
        for protocol, port in _services(fleet):
            passes = fleet.any_policy(peer, protocol, port)
            packet = _answer(_packet(zero, peer, protocol, port))
            yield came(f"{protocol} {port} answers from {peer}", packet, passes)
            if protocol != "udp":
                packet = _packet(peer, zero, protocol, port)
                yield came(f"{protocol} {port} begun by {peer}", packet, False)
    for peer in edges(text, "denied6"):
        passes = fleet.any_policy(peer, "tcp", 80)
        yield came(f"tcp 80 answers from {peer}", _answer(_packet(zero, peer, "tcp", 80)), passes)
    for peer, port in ((OUTSIDE_SIX, 443), (CACHE_SIX, 3142)):
        for flags, begins in ((0x03, True), (0x0A, True), (0xC2, True), (0x12, False)):
            packet = Packet(peer, zero, TCP, port, 0, flags)
            yield came(f"TCP flags {flags:#x} from {peer}", packet, not begins)
        for type_, passes in ERRORS.items():
            inner = _packet(zero, peer, "tcp", port)
            packet = Packet(peer, zero, ICMPV6, type=type_, inner=inner)
            yield came(f"ICMPv6 {type_} from {peer}", packet, passes)
    for peer, port in ((OUTSIDE_SIX, 443), (CACHE_SIX, 53)):
        packet = Packet(peer, zero, UDP, port, 0, route=True)
        yield came(f"udp {port} from {peer} with a routing header", packet, False)
    for peer in (GATEWAY_SIX, STRANGER_SIX, OUTSIDE_SIX):
        for type_ in (SOLICIT, ADVERT, *OTHERS):
            passes = type_ in (SOLICIT, ADVERT)
            packet = _about(peer, zero, type_, zero)
            yield came(f"ICMPv6 {type_} from {peer}", packet, passes)
            changes: tuple[dict[str, Any], ...] = ({"hops": 64}, {"route": True})
            for more in changes:
                packet = replace(_about(peer, zero, type_, zero), **more)
                yield came(f"ICMPv6 {type_} from {peer} {more}", packet, False)
    answer = _answer(_packet(one, OUTSIDE_SIX, "tcp", 80))
    yield Passage("tcp 80 answers slot1", WORLD, answer, frozenset(("slot1",)), target_mac=one_mac)
    for peer in (OUTSIDE_SIX, DATABASE_SIX):
        packet = _packet(peer, HOST_SIX, "tcp", 22)
        yield Passage(f"tcp 22 to the host from {peer}", WORLD, packet, frozenset((HOST,)))
    packet = _about(GATEWAY_SIX, "ff02::1", 134, GATEWAY_SIX)
    here = frozenset((HOST,))
    yield Passage("the router speaks to the host", WORLD, packet, here, target_mac=host_mac)


def _misdirected(host_mac: str, slots: list[tuple[str, str]]) -> Iterator[Passage]:
    for number, (address, mac_) in enumerate(slots):
        other, other_mac = slots[1 - number]
        good = _answer(_packet(address, OUTSIDE_SIX, "udp", 80))
        for target_mac in (other_mac, EVERYBODY, host_mac):
            yield Passage(f"{address} under {target_mac}", WORLD, good, target_mac=target_mac)
        for target in (other, STRANGER_SIX, HOST_SIX, "ff02::1"):
            packet = replace(good, target=target)
            yield Passage(f"{target} under {mac_}", WORLD, packet, target_mac=mac_)
        router = Packet(GATEWAY_SIX, "ff02::1", ICMPV6, type=134, hops=255, data=bytes(8))
        yield Passage(f"the router under {mac_}", WORLD, router, target_mac=mac_)
        back = _packet(OUTSIDE_SIX, HOST_SIX, "tcp", 22)
        yield Passage(f"from outside under {mac_}", WORLD, back, source_mac=mac_)


def routed_guard(fleet: Fleet, slots: list[str], text: str) -> list[Passage]:
    """Of a host that passes on what jobs send, under its own address."""
    address, other = slots
    cells: list[Passage] = []
    for peer in _peers(fleet, *slots, HOST_SIX):
        for protocol, port in _services(fleet):
            passes = fleet.any_policy(peer, protocol, port)
            cells.append(_begun(address, peer, protocol, port, passes, HOST_SIX))
            packet = _packet(peer, address, protocol, port)
            cells.append(Passage(f"{protocol} {port} from {peer}", WORLD, packet))
    for peer in edges(text, "denied6"):
        if peer not in (*slots, HOST_SIX):
            passes = fleet.any_policy(peer, "tcp", 80)
            cells.append(_begun(address, peer, "tcp", 80, passes, HOST_SIX))
    begun = _begun(other, OUTSIDE_SIX, "tcp", 80, True, HOST_SIX)
    cells.append(replace(begun, sender="slot1"))
    for peer, port in ((OUTSIDE_SIX, 443), (CACHE_SIX, 53)):
        packet = Packet(address, peer, UDP, 0, port, route=True)
        cells.append(Passage(f"udp {port} to {peer} with a routing header", "slot0", packet))
    cells += _hosts_own(slots)
    cells += _errors_to(address, HOST_SIX)
    cells += _held(slots, ("tcp", 443), ("udp", 443), outside=OUTSIDE_SIX)
    for source in (other, HOST_SIX, DATABASE_SIX, STRANGER_SIX, HOST_END_SIX, "fe80::42"):
        packet = _packet(source, OUTSIDE_SIX, "tcp", 80)
        cells.append(Passage(f"spoofed {source}", "slot0", packet))
        packet = _about(source, HOST_END_SIX, SOLICIT, HOST_END_SIX)
        cells.append(Passage(f"spoofed {source}, asking for the host", "slot0", packet))
    watched = frozenset(("slot1", HOST, WORLD, RETURNED))
    for target in (other, HOST_SIX, SECOND_SIX, HOST_END_SIX):
        for protocol in ("tcp", "udp", "icmp"):
            packet = _packet(address, target, protocol, 22)
            name = f"{protocol} 22 to {target} of slot0"
            cells.append(Passage(name, "slot0", packet, watched=watched))
    return cells


def _hosts_own(slots: list[str]) -> Iterator[Passage]:
    """What is not the jobs': left alone. And the host says to jobs only what their stacks need."""
    there = frozenset((HOST,))
    for source in (HOST_SIX, SECOND_SIX):
        packet = _packet(source, OUTSIDE_SIX, "udp", 123)
        yield Passage(f"udp 123 of {source}", HOST, packet, _ARRIVED, seen_as=source)
    for protocol in ("tcp", "udp", "icmp"):
        packet = _packet("fd00:cb::2", HOST_SIX, protocol, 22)
        yield Passage(f"{protocol} 22 to the host", WORLD, packet, there)
    for type_ in (SOLICIT, ADVERT, 134):
        packet = _about(GATEWAY_SIX, HOST_SIX, type_, HOST_SIX)
        yield Passage(f"ICMPv6 {type_} to the host", WORLD, packet, there)
        packet = _about(HOST_SIX, GATEWAY_SIX, type_, GATEWAY_SIX)
        yield Passage(f"ICMPv6 {type_} of the host", HOST, packet, _ARRIVED)
    packet = _packet("fd00:cb::97", "fd00:cb::98", "udp", 53)
    passed_on = frozenset((RETURNED,))
    yield Passage("passed on for others", WORLD, packet, passed_on, watched=passed_on)
    for number, address in enumerate(slots):
        place = f"slot{number}"
        here = frozenset((place,))
        for protocol in ("tcp", "udp"):
            packet = _packet(HOST_SIX, address, protocol, 22)
            yield Passage(f"{protocol} 22 of the host to {address}", HOST, packet)
        for type_, passes in ERRORS.items():
            inner = _packet(address, OUTSIDE_SIX, "udp", 80)
            packet = Packet(HOST_SIX, address, ICMPV6, type=type_, inner=inner)
            expected = here if passes else _NOTHING
            yield Passage(f"ICMPv6 {type_} of the host to {address}", HOST, packet, expected)
        for type_ in (SOLICIT, ADVERT, *OTHERS):
            for hops in (255, 64):
                passes = type_ in (SOLICIT, ADVERT) and hops == 255
                for about in (address, HOST_END_SIX):
                    packet = _about(HOST_SIX, address, type_, about, hops=hops)
                    name = f"ICMPv6 {type_} of the host to {address} about {about}, {hops}"
                    yield Passage(name, HOST, packet, here if passes else _NOTHING)
                    packet = _about(address, HOST_END_SIX, type_, about, hops=hops)
                    name = f"ICMPv6 {type_} of {address} to the host about {about}, {hops}"
                    yield Passage(name, place, packet, there if passes else _NOTHING)
        packet = _packet(address, HOST_SIX, "udp", 22)
        yield Passage(f"from outside as {address}", WORLD, packet)
        for type_ in (SOLICIT, ADVERT, 128, 134, 137):
            packet = _about("fd00:cb::97", address, type_, address)
            yield Passage(f"ICMPv6 {type_} from outside to {address}", WORLD, packet)
            packet = _about(address, "fd00:cb::97", type_, address)
            yield Passage(f"ICMPv6 {type_} of {address} to outside", place, packet)


def _errors_to(address: str, seen_as: str) -> Iterator[Passage]:
    """From outside, about what a job sent."""
    for type_, passes in ERRORS.items():
        packet = _packet(address, OUTSIDE_SIX, "udp", 443)
        inner = replace(packet, source=seen_as)
        error = Packet(OUTSIDE_SIX, seen_as, ICMPV6, type=type_, inner=inner)
        expected = _ARRIVED | (frozenset((ANSWERED,)) if passes else _NOTHING)
        yield Passage(f"ICMPv6 error {type_} about udp 443", "slot0", packet, expected, error)
        unknown = replace(inner, source=address, sport=7)
        error = Packet(OUTSIDE_SIX, address, ICMPV6, type=type_, inner=unknown)
        yield Passage(f"ICMPv6 error {type_} about nothing", WORLD, error)


def forwarding(
    fleet: Fleet, slots: list[str], inside: list[str], outside: list[str]
) -> list[Passage]:
    """As ``guards.forwarding``: of the firewall's chain for what a slave passes on."""
    address, other = slots
    cells: list[Passage] = []
    for peer in _peers(fleet, *slots, HOST_SIX):
        for protocol, port in _services(fleet):
            cells.append(_begun(address, peer, protocol, port, protocol != "icmp", address))
            packet = _packet(peer, address, protocol, port)
            cells.append(Passage(f"{protocol} {port} from {peer}", WORLD, packet))
    for source in (*inside, *outside):
        packet = _packet(source, OUTSIDE_SIX, "tcp", 80)
        expected = _ARRIVED if source in inside else _NOTHING
        cells.append(Passage(f"from {source}", "slot0", packet, expected))
    cells += _errors_to(address, address)
    cells += _held(slots, ("tcp", 443), ("udp", 443), outside=OUTSIDE_SIX)
    for protocol in ("tcp", "udp", "icmp"):
        packet = _packet(address, other, protocol, 22)
        answered = frozenset(("slot1", ANSWERED))
        cells.append(Passage(f"{protocol} 22 to slot1", "slot0", packet, watched=answered))
    returned = frozenset((RETURNED,))
    for source in ("fd00:cb::97", address):
        packet = _packet(source, "fd00:cb::98", "udp", 53)
        cells.append(Passage(f"{source} passed on for others", WORLD, packet, watched=returned))
    # Nor are replies and errors passed on to somebody outside who has such an address.
    packet = _packet(inside[-1], "fd00:cb::98", "udp", 53)
    cells.append(
        Passage(
            "to a job's address that is outside",
            WORLD,
            packet,
            answer=Packet("fd00:cb::98", packet.source, ICMPV6, type=1, inner=packet),
            watched=frozenset((RETURNED, ANSWERED)),
            held=True,
            by_sender=False,
        )
    )
    return cells
