"""What the rules around all jobs' networks must and must not let through, from the declared flows:
the union of all policies, whatever the filter in a slot says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cells import UNDECLARED, Fleet, _answer, _packet, edges, neighbour
from packets import ICMP, ICMPV6, TCP, Packet
from vantages import ANSWERED, HOST, RETURNED, WORLD, Arp, Passage

GATEWAY, OUTSIDE, OUTSIDE_SIX = "10.213.0.30", "198.51.100.10", "2001:db8:113::10"
SECOND = "10.213.0.29"
"""Another address of the host's."""
STRANGER, STRANGER_MAC = "10.213.0.23", "02:00:00:00:00:23"
SLOT_SIX = "fd00:cb::128"
EVERYBODY = "ff:ff:ff:ff:ff:ff"
ERRORS = (3, 11, 12)
"""ICMP's types that tell of an error; 4 and 5 are no such to a job."""

_NOTHING: frozenset[str] = frozenset()
_ARRIVED = frozenset((WORLD,))


def _services(fleet: Fleet) -> list[tuple[str, int]]:
    return sorted({*fleet.services, ("tcp", UNDECLARED), ("udp", UNDECLARED), ("tcp", 8080)})


def frame_guard(
    fleet: Fleet, host: str, host_mac: str, slots: list[tuple[str, str]], probe: str, text: str
) -> list[Passage]:
    """Of the parent interface; ``slots`` [(address, MAC)], ``probe`` the MAC of the role's probe."""
    return [
        *_frames_out(fleet, slots, text),
        *_forged(host, host_mac, slots),
        *_arp(host, host_mac, slots, probe),
        *_frames_in(fleet, host, host_mac, slots, text),
        *_misdirected(host, host_mac, slots),
    ]


def _frames_out(fleet: Fleet, slots: list[tuple[str, str]], text: str) -> Iterator[Passage]:
    address = slots[0][0]
    for peer in fleet.peers(""):
        if peer in (address, slots[1][0]):
            continue
        own = SLOT_SIX if ":" in peer else address
        for protocol, port in _services(fleet):
            expected = _ARRIVED if fleet.any_policy(peer, protocol, port) else _NOTHING
            name = f"{protocol} {port} to {peer}"
            yield Passage(name, "slot0", _packet(own, peer, protocol, port), expected)
    for peer in edges(text, "denied"):
        expected = _ARRIVED if fleet.any_policy(peer, "tcp", 80) else _NOTHING
        yield Passage(f"tcp 80 to {peer}", "slot0", _packet(address, peer, "tcp", 80), expected)
    other = slots[1][0]
    yield Passage("tcp 80 of slot1", "slot1", _packet(other, OUTSIDE, "tcp", 80), _ARRIVED)
    yield Passage("slot0 to slot1", "slot0", _packet(address, other, "tcp", 80))


def _forged(host: str, host_mac: str, slots: list[tuple[str, str]]) -> Iterator[Passage]:
    (zero, zero_mac), (one, one_mac) = slots
    for place, source_mac, source, passes in (
        ("slot0", zero_mac, one, False),
        ("slot0", one_mac, zero, False),
        ("slot0", one_mac, one, True),  # no rule here tells who sent a frame that is right
        ("slot0", zero_mac, host, False),
        ("slot0", host_mac, zero, False),
        ("slot0", zero_mac, STRANGER, False),
        ("slot0", zero_mac, "0.0.0.0", False),
        ("slot0", STRANGER_MAC, zero, False),
        ("slot0", STRANGER_MAC, host, False),
        ("slot0", STRANGER_MAC, STRANGER, False),
        (HOST, host_mac, host, True),
        (HOST, host_mac, "0.0.0.0", True),
        (HOST, host_mac, SECOND, True),
        (HOST, host_mac, STRANGER, False),
        (HOST, host_mac, neighbour(host), False),
        (HOST, host_mac, zero, False),
    ):
        packet = _packet(source, OUTSIDE, "udp", 80)
        expected = _ARRIVED if passes else _NOTHING
        name = f"from {source} under {source_mac} of {place}"
        yield Passage(name, place, packet, expected, source_mac=source_mac)
    for type_, target in ((128, OUTSIDE_SIX), (133, "ff02::2"), (134, "ff02::1"), (135, "ff02::1")):
        for number in range(len(slots)):
            packet = Packet("fe80::128", target, ICMPV6, type=type_, hops=255, data=bytes(8))
            yield Passage(f"ICMPv6 {type_} of slot{number}", f"slot{number}", packet)
    packet = _packet(SLOT_SIX, OUTSIDE_SIX, "tcp", 80)
    yield Passage("IPv6 under a strange MAC", "slot0", packet, source_mac=STRANGER_MAC)
    packet = _packet("fd00:cb::21", OUTSIDE_SIX, "tcp", 80)
    yield Passage("IPv6 of the host", HOST, packet, _ARRIVED)
    packet = Packet(slots[0][0], OUTSIDE, ICMP, type=8)
    yield Passage("echo to the internet", "slot0", packet)


def _arp(host: str, host_mac: str, slots: list[tuple[str, str]], probe: str) -> Iterator[Passage]:
    def asked(
        place: str, frame_mac: str, operation: int, mac: str, sender: str, target: str, passes: bool
    ) -> Passage:
        return Passage(
            f"ARP {operation} for {target} of {mac} {sender}, frame of {frame_mac}",
            place,
            Arp(operation, mac, sender, target),
            _ARRIVED if passes else _NOTHING,
            source_mac=frame_mac,
            target_mac=EVERYBODY,
        )

    (zero, zero_mac), (one, one_mac) = slots
    known = (GATEWAY, "10.213.0.14")
    for place, (address, mac_) in zip(("slot0", "slot1"), slots, strict=True):
        for target in (*known, host, STRANGER, "10.213.0.12", one, zero):
            yield asked(place, mac_, 1, mac_, address, target, target in known)
        for target in (GATEWAY, STRANGER):
            yield asked(place, mac_, 2, mac_, address, target, True)
        for operation in (0, 3, 8):
            yield asked(place, mac_, operation, mac_, address, GATEWAY, False)
    for operation in (1, 2):
        for frame_mac, mac_, sender in (
            (zero_mac, zero_mac, one),
            (zero_mac, zero_mac, host),
            (zero_mac, zero_mac, STRANGER),
            (zero_mac, one_mac, zero),
            (zero_mac, one_mac, one),
            (one_mac, zero_mac, zero),
            (zero_mac, STRANGER_MAC, zero),
            (STRANGER_MAC, zero_mac, zero),
            (STRANGER_MAC, STRANGER_MAC, STRANGER),
            (zero_mac, host_mac, host),
            (host_mac, zero_mac, zero),
        ):
            yield asked("slot0", frame_mac, operation, mac_, sender, GATEWAY, False)
        yield asked(HOST, host_mac, operation, host_mac, host, STRANGER, True)
        yield asked(HOST, host_mac, operation, host_mac, "0.0.0.0", host, True)
        yield asked(HOST, host_mac, operation, host_mac, SECOND, GATEWAY, True)
        yield asked(HOST, host_mac, operation, host_mac, STRANGER, GATEWAY, False)
    yield asked("slot0", probe, 1, probe, "0.0.0.0", GATEWAY, True)
    yield asked("slot0", probe, 2, probe, "0.0.0.0", GATEWAY, False)
    yield asked("slot0", probe, 1, probe, "0.0.0.0", STRANGER, False)
    yield asked("slot0", probe, 1, probe, host, GATEWAY, False)
    yield asked("slot0", zero_mac, 1, zero_mac, "0.0.0.0", GATEWAY, False)


def _frames_in(
    fleet: Fleet, host: str, host_mac: str, slots: list[tuple[str, str]], text: str
) -> Iterator[Passage]:
    (zero, zero_mac), (one, one_mac) = slots
    arrived = frozenset(("slot0",))

    def came(name: str, packet: Packet, passes: bool) -> Passage:
        return Passage(name, WORLD, packet, arrived if passes else _NOTHING, target_mac=zero_mac)

    for peer in fleet.peers(""):
        if peer in (zero, one):
            continue
        six = ":" in peer
        for protocol, port in _services(fleet):
            passes = fleet.any_policy(peer, protocol, port)
            request = _packet(SLOT_SIX if six else zero, peer, protocol, port)
            name = f"{protocol} {port} answers from {peer}"
            yield came(name, _answer(request), passes)
            if protocol != "udp":
                packet = _packet(peer, SLOT_SIX if six else zero, protocol, port)
                yield came(f"{protocol} {port} begun by {peer}", packet, False)
    for peer in edges(text, "denied"):
        passes = fleet.any_policy(peer, "tcp", 80)
        yield came(f"tcp 80 answers from {peer}", _answer(_packet(zero, peer, "tcp", 80)), passes)
    for peer in (OUTSIDE, "10.213.0.14"):
        port = 3142 if peer == "10.213.0.14" else 443
        for flags, begins in ((0x03, True), (0x0A, True), (0xC2, True), (0x12, False)):
            packet = Packet(peer, zero, TCP, port, 0, flags)
            yield came(f"TCP flags {flags:#x} from {peer}", packet, not begins)
        for type_ in (0, 3, 4, 5, 8, 11, 12, 13):
            inner = _packet(zero, peer, "tcp", port) if type_ in (3, 4, 5, 11, 12) else None
            packet = Packet(peer, zero, ICMP, type=type_, inner=inner)
            yield came(f"ICMP {type_} from {peer}", packet, type_ in ERRORS)
    answer = _answer(_packet(one, OUTSIDE, "tcp", 80))
    yield Passage("tcp 80 answers slot1", WORLD, answer, frozenset(("slot1",)), target_mac=one_mac)
    for peer in (OUTSIDE, "10.213.0.12"):
        packet = _packet(peer, host, "tcp", 22)
        yield Passage(f"tcp 22 to the host from {peer}", WORLD, packet, frozenset((HOST,)))
    packet = _packet("fd00:cb::2", "fd00:cb::21", "tcp", 22)
    yield Passage("tcp 22 to the host over IPv6", WORLD, packet, frozenset((HOST,)))


def _misdirected(host: str, host_mac: str, slots: list[tuple[str, str]]) -> Iterator[Passage]:
    (zero, zero_mac), (one, one_mac) = slots
    answer = _answer(_packet(zero, OUTSIDE, "udp", 80))
    for number, (address, mac_) in enumerate(slots):
        other, other_mac = slots[1 - number]
        good = _answer(_packet(address, OUTSIDE, "udp", 80))
        for target_mac in (other_mac, EVERYBODY, host_mac):
            yield Passage(f"{address} under {target_mac}", WORLD, good, target_mac=target_mac)
        for target in (other, STRANGER, host, "255.255.255.255", "224.0.0.251"):
            packet = replace(good, target=target)
            yield Passage(f"{target} under {mac_}", WORLD, packet, target_mac=mac_)
        six = Packet("fe80::30", "ff02::1", ICMPV6, type=134, hops=255, data=bytes(8))
        yield Passage(f"IPv6 under {mac_}", WORLD, six, target_mac=mac_)
        arp = Arp(2, "02:00:00:00:00:30", GATEWAY, address)
        here = frozenset((f"slot{number}",))
        yield Passage(f"ARP answers {address}", WORLD, arp, here, target_mac=mac_)
        yield Passage(
            f"from outside under {mac_}, ARP", WORLD, arp, source_mac=mac_, target_mac=other_mac
        )
        back = _packet(OUTSIDE, host, "tcp", 22)
        yield Passage(f"from outside under {mac_}", WORLD, back, source_mac=mac_)
    both = frozenset(("slot0", "slot1"))
    arp = Arp(1, "02:00:00:00:00:30", GATEWAY, zero)
    yield Passage("ARP asks everybody", WORLD, arp, both, target_mac=EVERYBODY)
    yield Passage(
        "from outside under slot0's MAC to slot1",
        WORLD,
        replace(answer, target=one),
        source_mac=zero_mac,
        target_mac=one_mac,
    )


def routed_guard(
    fleet: Fleet, host: str, second: str, slots: list[str], text: str
) -> list[Passage]:
    """Of a host that passes on what jobs send, under its own address ``host``; it has another,
    ``second``."""
    address = slots[0]
    cells: list[Passage] = []
    for peer in [p for p in fleet.peers("") if p not in (*slots, host, second)]:
        own = SLOT_SIX if ":" in peer else address
        for protocol, port in _services(fleet):
            passes = fleet.any_policy(peer, protocol, port)
            cells.append(_begun(own, peer, protocol, port, passes, host))
            packet = _packet(peer, own, protocol, port)
            cells.append(Passage(f"{protocol} {port} from {peer}", WORLD, packet))
    for peer in edges(text, "denied"):
        if peer not in (*slots, host, second):
            passes = fleet.any_policy(peer, "tcp", 80)
            cells.append(_begun(address, peer, "tcp", 80, passes, host))
    cells.append(replace(_begun(slots[1], OUTSIDE, "tcp", 80, True, host), sender="slot1"))
    cells += _hosts_own(host, second, slots)
    cells += _errors(host, address)
    cells += _held(slots, ("tcp", 443), ("udp", 443))
    for source in (slots[1], host, "10.213.0.12", STRANGER, "169.254.203.1"):
        packet = _packet(source, OUTSIDE, "tcp", 80)
        cells.append(Passage(f"spoofed {source}", "slot0", packet))
    for target in (slots[1], host, second, "169.254.203.1", "fd00:cb::21"):
        six = ":" in target
        for protocol in ("tcp", "udp", "icmp"):
            packet = _packet(SLOT_SIX if six else address, target, protocol, 22)
            watched = frozenset(("slot1", HOST, WORLD, RETURNED))
            cells.append(
                Passage(f"{protocol} 22 to {target} of slot0", "slot0", packet, watched=watched)
            )
    return cells


def _begun(own: str, peer: str, protocol: str, port: int, passes: bool, seen_as: str) -> Passage:
    packet = _packet(own, peer, protocol, port)
    name = f"{protocol} {port} of {own} to {peer}"
    if not passes:
        return Passage(name, "slot0", packet)
    answer = replace(_answer(packet), target=seen_as)
    expected = frozenset((WORLD, ANSWERED))
    return Passage(name, "slot0", packet, expected, answer, seen_as=seen_as)


def _hosts_own(host: str, second: str, slots: list[str]) -> Iterator[Passage]:
    """What is not the jobs': left alone. And the host does not speak to jobs."""
    for source in (host, second):
        packet = _packet(source, OUTSIDE, "udp", 123)
        yield Passage(f"udp 123 of {source}", HOST, packet, _ARRIVED, seen_as=source)
    packet = _packet("fd00:cb::21", OUTSIDE_SIX, "udp", 123)
    yield Passage("udp 123 of the host over IPv6", HOST, packet, _ARRIVED)
    there = frozenset((HOST,))
    for source, target in (("10.213.0.2", host), ("fd00:cb::2", "fd00:cb::21")):
        for protocol in ("tcp", "udp", "icmp"):
            packet = _packet(source, target, protocol, 22)
            yield Passage(f"{protocol} 22 to {target}", WORLD, packet, there)
    packet = _packet("10.213.0.97", "10.213.0.98", "udp", 53)
    passed_on = frozenset((RETURNED,))
    yield Passage("passed on for others", WORLD, packet, passed_on, watched=passed_on)
    for address, place in zip(slots, ("slot0", "slot1"), strict=True):
        here = frozenset((place,))
        for protocol in ("tcp", "udp", "icmp"):
            packet = _packet("169.254.203.1", address, protocol, 22)
            yield Passage(f"{protocol} 22 of the host to {address}", HOST, packet)
        for type_ in (*ERRORS, 4, 5):
            inner = _packet(address, OUTSIDE, "udp", 80)
            packet = Packet("169.254.203.1", address, ICMP, type=type_, inner=inner)
            expected = here if type_ in ERRORS else _NOTHING
            yield Passage(f"ICMP {type_} of the host to {address}", HOST, packet, expected)
        packet = _packet(address, host, "udp", 22)
        yield Passage(f"from outside as {address}", WORLD, packet)


def _errors(seen_as: str, address: str) -> Iterator[Passage]:
    """From outside, about what a job sent; and from a job."""
    for type_ in (*ERRORS, 4, 5):
        packet = _packet(address, OUTSIDE, "udp", 443)
        inner = replace(packet, source=seen_as)
        error = Packet(OUTSIDE, seen_as, ICMP, type=type_, inner=inner)
        expected = _ARRIVED | (frozenset((ANSWERED,)) if type_ in ERRORS else _NOTHING)
        yield Passage(f"ICMP error {type_} about udp 443", "slot0", packet, expected, error)
        unknown = replace(inner, source=address, sport=7)
        error = Packet(OUTSIDE, address, ICMP, type=type_, inner=unknown)
        yield Passage(f"ICMP error {type_} about nothing", WORLD, error)


def _held(
    slots: list[str], *services: tuple[str, int], outside: str = OUTSIDE
) -> Iterator[Passage]:
    """Connections from before the rules that the other side began."""
    for protocol, port in services:
        packet = _packet(outside, slots[0], protocol, port)
        for sender, other in (("slot0", WORLD), (WORLD, "slot0")):
            yield Passage(
                f"{protocol} {port} of before, begun outside, {sender} sends",
                sender,
                packet,
                held=True,
                by_sender=sender == WORLD,
                other=other,
            )
        packet = _packet(slots[1], slots[0], protocol, port)
        yield Passage(
            f"{protocol} {port} of before, begun by slot1, slot0 sends",
            "slot0",
            packet,
            held=True,
            by_sender=False,
            other="slot1",
        )


def forwarding(
    fleet: Fleet, host: str, slots: list[str], inside: list[str], outside: list[str]
) -> list[Passage]:
    """Of the firewall's chain for what a slave passes on: jobs', and only what they begin. ``inside``
    and ``outside``: addresses in the slave's range and beside it."""
    address = slots[0]
    cells: list[Passage] = []
    for peer in [p for p in fleet.peers("") if p not in (*slots, host)]:
        own = SLOT_SIX if ":" in peer else address
        for protocol, port in _services(fleet):
            passes = protocol != "icmp" and ":" not in peer
            cells.append(_begun(own, peer, protocol, port, passes, own))
            packet = _packet(peer, own, protocol, port)
            cells.append(Passage(f"{protocol} {port} from {peer}", WORLD, packet))
    for source in (*inside, *outside):
        packet = _packet(source, OUTSIDE, "tcp", 80)
        expected = _ARRIVED if source in inside else _NOTHING
        cells.append(Passage(f"from {source}", "slot0", packet, expected))
    cells += _errors(address, address)
    cells += _held(slots, ("tcp", 443), ("udp", 443))
    for protocol in ("tcp", "udp", "icmp"):
        packet = _packet(address, slots[1], protocol, 22)
        answered = frozenset(("slot1", ANSWERED))
        cells.append(Passage(f"{protocol} 22 to slot1", "slot0", packet, watched=answered))
    packet = _packet("10.213.0.97", "10.213.0.98", "udp", 53)
    cells.append(Passage("passed on for others", WORLD, packet, watched=frozenset((RETURNED,))))
    packet = _packet(address, "10.213.0.98", "udp", 53)
    cells.append(
        Passage("a job's address from outside", WORLD, packet, watched=frozenset((RETURNED,)))
    )
    # Nor are replies and errors passed on to somebody outside who has such an address.
    packet = _packet("10.213.0.150", "10.213.0.98", "udp", 53)
    cells.append(
        Passage(
            "to a job's address that is outside",
            WORLD,
            packet,
            answer=Packet("10.213.0.98", packet.source, ICMP, type=3, inner=packet),
            watched=frozenset((RETURNED, ANSWERED)),
            held=True,
            by_sender=False,
        )
    )
    return cells


def containers(fleet: Fleet, host: str, own: list[str]) -> list[Passage]:
    """Of the firewall's chain for what a slave passes on: containers' on two bridges (``own`` addresses), and only what
    they begin. ``slot0`` and ``slot1`` are these containers.
    """
    cells: list[Passage] = []
    (cache,) = [a for a in fleet.facts["addresses"]["cache1"] if ":" not in a]
    (other,) = [a for a in fleet.facts["addresses"]["database1"] if ":" not in a]
    served = [("tcp", 53), ("tcp", 3142), ("udp", 53)]
    for peer in [p for p in fleet.peers("") if p not in (*own, host)]:
        for number, address in enumerate(own):
            source = SLOT_SIX if ":" in peer else address
            for protocol, port in _services(fleet):
                passes = fleet.container(peer, protocol, port)
                begun = _begun(source, peer, protocol, port, passes, source)
                cells.append(replace(begun, sender=f"slot{number}"))
                packet = _packet(peer, source, protocol, port)
                cells.append(Passage(f"{protocol} {port} from {peer}", WORLD, packet))
    for protocol, port in served:
        # A reply that nobody asked for, and what is passed on for nobody of ours.
        cells.append(Passage("unasked", WORLD, _answer(_packet(own[0], cache, protocol, port))))
        packet = _packet("10.213.0.97", cache, protocol, port)
        returned = frozenset((RETURNED,))
        cells.append(Passage("passed on for others", WORLD, packet, watched=returned))
        error = Packet(cache, packet.source, ICMP, type=3, inner=packet)
        watched = frozenset((RETURNED, ANSWERED))
        for answer in (None, error):
            cells.append(
                Passage(
                    "a reply for others", WORLD, packet, answer=answer, watched=watched,
                    held=True, by_sender=False,
                )
            )  # fmt: skip
        for place, address in zip(("slot0", "slot1"), own, strict=True):
            for source in (host, "10.213.0.12", STRANGER, own[place == "slot0"]):
                packet = _packet(source, cache, protocol, port)
                cells.append(Passage(f"{protocol} spoofed {source} of {place}", place, packet))
            # Connections from before the rules: begun by the container, but to another host or port, and by the
            # cache server, from such a port.
            for peer, wrong in ((other, port), (cache, UNDECLARED)):
                packet = _packet(address, peer, protocol, wrong)
                name = f"{protocol} {wrong} of before, {peer} answers {place}"
                cells.append(Passage(name, WORLD, packet, held=True, by_sender=False, other=place))
            packet = replace(_packet(cache, address, protocol, 4444), sport=port)
            for sender, begun_by in ((place, WORLD), (WORLD, place)):
                cells.append(
                    Passage(
                        f"{protocol} from {port} of before, begun outside, {sender} sends",
                        sender,
                        packet,
                        held=True,
                        by_sender=sender == WORLD,
                        other=begun_by,
                    )
                )
    for place, address in zip(("slot0", "slot1"), own, strict=True):
        for type_ in (*ERRORS, 4, 5):
            packet = _packet(address, cache, "udp", 53)
            error = Packet(cache, address, ICMP, type=type_, inner=packet)
            expected = _ARRIVED | (frozenset((ANSWERED,)) if type_ in ERRORS else _NOTHING)
            cells.append(Passage(f"ICMP error {type_} for {place}", place, packet, expected, error))
            unknown = Packet(cache, address, ICMP, type=type_, inner=replace(packet, sport=7))
            cells.append(Passage(f"ICMP error {type_} about nothing for {place}", WORLD, unknown))
    for protocol in ("tcp", "udp", "icmp"):
        packet = _packet(own[0], own[1], protocol, 53)
        cells.append(
            Passage(f"{protocol} to slot1", "slot0", packet, watched=frozenset(("slot1", ANSWERED)))
        )
    return cells
