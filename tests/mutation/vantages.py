"""Says which frames pass the rules between several places: slots, their host, and the world.

The places' ends of the wires are packet sockets, so that nobody's own filter, route or neighbour has a
say; whether the host itself gets a packet is told by its raw sockets. Slots' kernels never answer.
"""

from __future__ import annotations

import builtins
import contextlib
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from packets import ACK, ICMP, ICMPV6, MAGIC, SYN_ACK, TCP, UDP, Packet, heard, mac
from prober import LATE_S, QUIET_S, Difference, back, differences, forget_connections, numbered

from cellblock.linux.netlink import inside

_RCVBUFFORCE = 33
HOST, WORLD = "host", "world"
ANSWERED, RETURNED, DISGUISED = "answered", "returned", "under another address"


@dataclass(frozen=True)
class Arp:
    """What an ARP packet says: ``operation`` 1 asks, 2 answers."""

    operation: int
    sender_mac: str
    sender: str
    target: str

    version = 4
    protocol = 0

    def bytes(self, number: int) -> builtins.bytes:
        return (
            struct.pack("!HHBBH", 1, 0x800, 6, 4, self.operation)
            + mac(self.sender_mac)
            + socket.inet_aton(self.sender)
            + bytes(6)
            + socket.inet_aton(self.target)
            + MAGIC
            + number.to_bytes(3, "big")
        )


@dataclass(frozen=True)
class Passage:
    """One question: at which places is ``packet`` of ``sender`` seen? ``answered``: the answer got
    back to the sender. ``returned``: something came back at once. ``seen_as`` is the address that the
    world must see. ``held``: of a connection from before the rules that ``packet`` began, the sender's
    next packet; it began it itself (``by_sender``) or ``other`` did.
    """

    name: str
    sender: str
    packet: Packet | Arp
    expected: frozenset[str] = frozenset()
    answer: Packet | None = None
    answer_from: str = WORLD
    source_mac: str = ""
    target_mac: str = ""
    watched: frozenset[str] = frozenset(("slot0", "slot1", HOST, WORLD, ANSWERED, DISGUISED))
    seen_as: str = ""
    held: bool = False
    by_sender: bool = True
    other: str = WORLD


class Vantages:
    """``wires``: by place, the namespace and its interface. A frame's addresses are ``macs`` (own,
    next hop) unless the passage has others. The host sends IP packets through its stack when
    ``host_routes``, and otherwise frames."""

    def __init__(
        self,
        host: int,
        wires: Mapping[str, tuple[int, str]],
        macs: Mapping[str, tuple[str, str]],
        *,
        host_routes: bool,
    ) -> None:
        self._macs = macs
        self._wires: dict[str, socket.socket] = {}
        self._poll = select.poll()
        self._by_fd: dict[int, tuple[socket.socket, str, int]] = {}
        for place, (namespace, interface) in wires.items():
            with inside(namespace):
                wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
                wire.bind((interface, 3))
            self._wires[place] = wire
            if place != HOST:
                self._by_fd[wire.fileno()] = (wire, place, 0)
        self._stack: dict[int, socket.socket] = {}
        with inside(host):
            for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
                if host_routes:
                    self._stack[version] = socket.socket(
                        family, socket.SOCK_RAW, socket.IPPROTO_RAW
                    )
                for protocol in (TCP, UDP, ICMP if version == 4 else ICMPV6):
                    raw = socket.socket(family, socket.SOCK_RAW, protocol)
                    self._by_fd[raw.fileno()] = (raw, HOST, version)
            self._flush = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        for fd, (receiver, _, _) in self._by_fd.items():
            receiver.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 24)
            receiver.setblocking(False)
            self._poll.register(fd, select.POLLIN)
        self._next = 20000
        self._cells: dict[int, tuple[int, Passage]] = {}
        self._seen: list[set[str]] = []
        self._answering: set[int] = set()

    def forget(self) -> None:
        forget_connections(self._flush)
        self._cells = {}
        while self._collect(0.001):
            pass

    def hold(self, cells: Sequence[Passage]) -> list[int]:
        """Opens, under rules that let everything through, the connections of the held cells."""
        numbers = []
        for cell in cells:
            number = self._number()
            numbers.append(number)
            assert isinstance(cell.packet, Packet)
            packet = numbered(cell.packet, number)
            ends = (cell.sender, cell.other)
            opener, listener = ends if cell.by_sender else reversed(ends)
            self._send(opener, packet, number)
            self._send(listener, back(packet, SYN_ACK), number)
        while self._collect(0.001):
            pass
        return numbers

    def differences(
        self, cells: Sequence[Passage], held: Sequence[int] = (), quiet_s: float = QUIET_S
    ) -> list[Difference]:
        """What is not as expected."""
        self._cells, self._seen = {}, [set() for _ in cells]
        self._answering = set()
        held_numbers = iter(held)
        rows = []
        for index, cell in enumerate(cells):
            number = next(held_numbers) if cell.held else self._number()
            self._cells[number] = (index, cell)
            rows.append((index, cell, number))
        for index, cell, number in rows:
            packet = cell.packet
            if isinstance(packet, Packet):
                packet = numbered(packet, number)
                if cell.held:
                    if not cell.by_sender:
                        packet = back(packet, ACK)
                    elif packet.protocol == TCP:
                        packet = replace(packet, type=ACK)
                    packet = replace(packet, later=True)
            self._send(cell.sender, packet, number, cell)
            if index % 64 == 63:
                self._collect()
        self._settle(cells, quiet_s)
        for _, cell, number in rows:
            if cell.answer is None:
                continue
            self._answering.add(number)
            answer = numbered(cell.answer, number)
            self._send(cell.answer_from, answer, number)
        if self._answering:
            self._settle(cells, quiet_s, last=True)
        return differences(cells, self._seen)

    def _settle(self, cells: Sequence[Passage], quiet_s: float, *, last: bool = False) -> None:
        deadline = time.monotonic() + LATE_S
        silent = 0
        while silent < 7 and time.monotonic() < deadline:
            silent = 0 if self._collect(quiet_s) else silent + 1
            later = set() if last else {ANSWERED}
            if silent and not any(
                (cell.expected & cell.watched) - later - seen
                for cell, seen in zip(cells, self._seen, strict=True)
            ):
                return

    def _collect(self, timeout_s: float = 0.0) -> bool:
        some = False
        for fd, _ in self._poll.poll(timeout_s * 1000):
            receiver, place, version = self._by_fd[fd]
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, where = receiver.recvfrom(4096)
                    some = True
                    if version == 0 and where[2] == 4:
                        continue  # what was sent there
                    self._note(data, place, version, receiver)
        return some

    def _note(self, data: bytes, place: str, version: int, receiver: socket.socket) -> None:
        seen, mark = heard(data, version, receiver.proto)
        numbers = [n for n in (*(seen.numbers if seen else ()), mark) if n in self._cells]
        if not numbers:
            return
        number = numbers[0]
        index, cell = self._cells[number]
        if place == cell.sender:
            self._seen[index].add(ANSWERED if number in self._answering else RETURNED)
            return
        reset = seen is not None and seen.protocol == TCP and seen.type & 4
        if number in self._answering or reset:
            return  # the host's own word to what it never opened
        self._seen[index].add(place)
        if place == WORLD and cell.seen_as and seen is not None and seen.source != cell.seen_as:
            self._seen[index].add(DISGUISED)

    def _number(self) -> int:
        self._next = 20000 if self._next >= 60000 else self._next + 1
        return self._next

    def _send(
        self, place: str, packet: Packet | Arp, number: int, cell: Passage | None = None
    ) -> None:
        data = packet.bytes(number)
        # What the kernel itself refuses to send does not leave, whoever it was that refused.
        with contextlib.suppress(OSError):
            if place == HOST and self._stack and isinstance(packet, Packet):
                to = (packet.target, 0) if packet.version == 4 else (packet.target, 0, 0, 0)
                self._stack[packet.version].sendto(data, to)
                return
            own, next_hop = self._macs[place]
            own = cell.source_mac if cell is not None and cell.source_mac else own
            next_hop = cell.target_mac if cell is not None and cell.target_mac else next_hop
            kind = 0x0806 if isinstance(packet, Arp) else 0x0800
            kind = 0x86DD if packet.version == 6 else kind
            self._wires[place].send(mac(next_hop) + mac(own) + struct.pack("!H", kind) + data)
