"""Says which packets pass a host's rules, by sending them and looking whether they get there.

The host is a namespace with one interface, whose other end is the *world*: no IP stack, packet
sockets only. So everybody whom the rules know is played by one process, and no other rule, route or
neighbour decides what arrives. Independent of the code under test: sockets, no rules, no counters.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from packets import ACK, ICMP, ICMPV6, MAGIC, SYN_ACK, TCP, UDP, Packet, heard, mac

from cellblock.linux.netlink import inside

_RCVBUFFORCE = 33
LATE_S = 0.5
"""How long to wait for what should arrive."""
QUIET_S = 0.004
"""How long nothing may have come before it is believed that nothing more does."""

OUT, IN, LOOPBACK = "out", "in", "loopback"
HELD = ("held by host, peer sends", "held by host, host sends",
        "held by peer, peer sends", "held by peer, host sends")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One question. What is seen of it is a set of words: ``left``, ``arrived`` for the packet
    itself, ``refused`` and ``replied`` for what the kernels say to it, ``answered`` for ``answer``,
    the other side's packet. Only those in ``watched`` count.
    """

    name: str
    way: str
    packet: Packet
    expected: frozenset[str] = frozenset()
    answer: Packet | None = None
    watched: frozenset[str] = frozenset(("left", "arrived", "refused", "replied", "answered"))
    destination_mac: str = ""
    source_mac: str = ""

    @property
    def held(self) -> bool:
        """Whether it is about a connection from before the rules."""
        return self.way in HELD


@dataclass(frozen=True)
class Difference:
    """A cell (of any prober) that was not as expected, in words."""

    cell: Any
    text: str


class Prober:
    def __init__(
        self, host: int, interface: str, host_mac: str, world: int, world_interface: str
    ) -> None:
        self._mac = host_mac
        with inside(host):
            self._out = {
                4: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
                6: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
            }
            for sender in self._out.values():
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
                sender.setblocking(False)
            self._out[4].setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            self._in = [
                *((socket.socket(socket.AF_INET, socket.SOCK_RAW, p), 4) for p in (TCP, UDP, ICMP)),
                *(
                    (socket.socket(socket.AF_INET6, socket.SOCK_RAW, p), 6)
                    for p in (TCP, UDP, ICMPV6)
                ),
            ]
            self._listeners = [
                socket.create_server(("127.0.0.1", 19999)),
                socket.create_server(("::1", 19999), family=socket.AF_INET6),
            ]
            self._host_link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._host_link.bind((interface, 0))
            self._flush = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        with inside(world):
            self._world = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._world.bind((world_interface, 3))
        self._host = host
        for receiver in (self._world, *(s for s, _ in self._in)):
            receiver.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 24)
            receiver.setblocking(False)
        self._poll = select.poll()
        self._by_fd = {s.fileno(): (s, v) for s, v in self._in} | {
            self._world.fileno(): (self._world, 0)
        }
        for fd in self._by_fd:
            self._poll.register(fd, select.POLLIN)
        self._next = 20000
        self._cells: dict[int, tuple[int, Cell]] = {}
        self._seen: list[set[str]] = []
        self._answering: set[int] = set()

    def forget(self) -> None:
        forget_connections(self._flush)
        self._drain()

    def hold(self, cells: Sequence[Cell]) -> list[int]:
        """Opens, under rules that let everything through, the connections of the held cells."""
        numbers = []
        for cell in cells:
            number = self._number()
            numbers.append(number)
            packet = numbered(cell.packet, number)
            if "by host" in cell.way:
                self._send_out(packet, number)
                self._send_in(back(packet, SYN_ACK), number)
            else:
                self._send_in(packet, number)
                self._send_out(back(packet, SYN_ACK), number)
        self._drain()
        return numbers

    def differences(
        self, cells: Sequence[Cell], held: Sequence[int] = (), quiet_s: float = QUIET_S
    ) -> list[Difference]:
        """What is not as expected. ``quiet_s``: how long nothing may have come before it is believed
        that nothing more does."""
        self._cells, self._seen = {}, [set() for _ in cells]
        self._answering = set()
        held_numbers = iter(held)
        rows: list[tuple[int, Cell, int]] = []
        for index, cell in enumerate(cells):
            number = next(held_numbers) if cell.held else self._number()
            self._cells[number] = (index, cell)
            rows.append((index, cell, number))
        for index, cell, number in rows:
            if cell.way == LOOPBACK:
                if self._loopback(cell.packet.version):
                    self._seen[index].add("answered")
                continue
            packet = numbered(cell.packet, number)
            if cell.way in HELD:
                if cell.way in (HELD[0], HELD[3]):
                    packet = back(packet, ACK)
                elif packet.protocol == TCP:
                    packet = replace(packet, type=ACK)
                packet = replace(packet, later=True)
                (self._send_in if "peer sends" in cell.way else self._send_out)(packet, number)
            elif cell.way == "arp":
                # Of a sender (cell.destination_mac, address) that the frame's own may contradict.
                body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + mac(cell.destination_mac)
                body += socket.inet_aton(packet.source) + bytes(6) + socket.inet_aton(packet.target)
                data = b"\xff" * 6 + mac(cell.source_mac) + b"\x08\x06" + body
                with contextlib.suppress(OSError):
                    self._host_link.send(data + MAGIC + number.to_bytes(3, "big"))
            elif cell.way == OUT:
                self._send_out(packet, number, cell)
            else:
                self._send_in(packet, number, cell)
            if index % 64 == 63:
                self._collect()
        self._settle(cells, quiet_s)
        for _, cell, number in rows:
            if cell.answer is None:
                continue
            self._answering.add(number)
            answer = numbered(cell.answer, number)
            (self._send_in if cell.way == OUT else self._send_out)(answer, number)
        if self._answering:
            self._settle(cells, quiet_s, last=True)
        return differences(cells, self._seen)

    def _settle(self, cells: Sequence[Cell], quiet_s: float, *, last: bool = False) -> None:
        """Until all that is expected has been seen, and for a moment nothing more."""
        deadline = time.monotonic() + LATE_S
        while True:
            more = self._collect(quiet_s)
            wanting = any(
                (cell.expected & cell.watched) - ({"answered"} if not last else set()) - seen
                for cell, seen in zip(cells, self._seen, strict=True)
            )
            if not more and not wanting or time.monotonic() > deadline:
                return
            if not more and self._gave_up():
                return

    def _gave_up(self) -> bool:
        """A few more moments for what is missing; machines are busy."""
        return not any(self._collect(QUIET_S) for _ in range(6))

    def _drain(self) -> None:
        self._cells = {}
        while self._collect(0.001):
            pass

    def _collect(self, timeout_s: float = 0.0) -> bool:
        some = False
        for fd, _ in self._poll.poll(timeout_s * 1000):
            receiver, version = self._by_fd[fd]
            with contextlib.suppress(BlockingIOError):
                while True:
                    some = True
                    data, where = receiver.recvfrom(4096)
                    if version == 0 and where[2] == 4:
                        continue  # what the world sent itself
                    self._note(data, version, receiver)
        return some

    def _note(self, data: bytes, version: int, receiver: socket.socket) -> None:
        seen, mark = heard(data, version, receiver.proto)
        if seen is None:
            if mark is not None and mark in self._cells:
                self._seen[self._cells[mark][0]].add("left" if version == 0 else "arrived")
            return
        numbers = [n for n in (*seen.numbers, mark) if n in self._cells]
        if not numbers:
            return
        number = numbers[0]
        index, cell = self._cells[number]
        error = seen.protocol == ICMP and seen.type in (3, 4, 5, 11, 12)
        error = error or (seen.protocol == ICMPV6 and seen.type < 128)
        reset = seen.protocol == TCP and bool(seen.type & 4)
        crafted = cell.packet.inner is not None
        if version == 0:
            if cell.way == OUT or "host sends" in cell.way:
                # Later, the host's kernel resets what it never opened.
                word = "left" if not reset else ""
            else:
                word = "answered" if number in self._answering and not reset else "replied"
        elif cell.way == OUT:
            word = "answered" if number in self._answering else "refused"
        elif "host sends" in cell.way:
            word = "refused" if reset or error else ""
        else:
            word = "arrived" if crafted or not error else "refused"
        if word:
            self._seen[index].add(word)

    def _number(self) -> int:
        self._next = 20000 if self._next >= 60000 else self._next + 1
        return self._next

    def _loopback(self, version: int) -> bool:
        listener = self._listeners[0 if version == 4 else 1]
        with inside(self._host), socket.socket(listener.family) as connection:
            connection.settimeout(0.05)
            try:
                connection.connect(listener.getsockname()[:2])
                listener.accept()[0].close()
                return True
            except OSError:
                return False

    def _send_out(self, packet: Packet, number: int, cell: Cell | None = None) -> None:
        data = packet.bytes(number)
        if cell is not None and cell.source_mac:
            kind = b"\x08\x00" if packet.version == 4 else b"\x86\xdd"
            with contextlib.suppress(OSError):
                self._host_link.send(b"\x02" + bytes(5) + mac(cell.source_mac) + kind + data)
            return
        # What the kernel itself refuses to send does not leave, whoever it was that refused.
        with contextlib.suppress(OSError):
            to = (packet.target, 0) if packet.version == 4 else (packet.target, 0, 0, 0)
            self._out[packet.version].sendto(data, to)

    def _send_in(self, packet: Packet, number: int, cell: Cell | None = None) -> None:
        kind = b"\x08\x00" if packet.version == 4 else b"\x86\xdd"
        target = cell.destination_mac if cell is not None and cell.destination_mac else self._mac
        source = cell.source_mac if cell is not None and cell.source_mac else "02:00:00:00:00:01"
        self._world.send(mac(target) + mac(source) + kind + packet.bytes(number))


def forget_connections(netfilter: socket.socket) -> None:
    """Removes what connection tracking knows (IPCTNL_MSG_CT_DELETE of everything)."""
    netfilter.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 5, 1, 0, 0, 0, 0))
    netfilter.recv(4096)


def back(packet: Packet, flags: int) -> Packet:
    """What the other side says to it; ``flags`` of TCP."""
    echo = {ICMP: 0, ICMPV6: 129}.get(packet.protocol, flags)
    return replace(packet.back(echo), sport=packet.sport) if echo != flags else packet.back(flags)


def numbered(packet: Packet, number: int) -> Packet:
    """With the number as the port that nobody chose, unless both are chosen; within an error, too."""
    if packet.inner is not None:
        packet = replace(packet, inner=numbered(packet.inner, number))
    if packet.protocol in (TCP, UDP):
        if packet.sport == 0:
            return replace(packet, sport=number)
        if packet.dport == 0:
            return replace(packet, dport=number)
        return packet
    return replace(packet, sport=number)


def differences(cells: Sequence[Any], seen: Sequence[set[str]]) -> list[Difference]:
    """The cells (of any prober) of which something else was seen than expected."""
    found = []
    for cell, words_seen in zip(cells, seen, strict=True):
        counted = words_seen & cell.watched
        if counted != cell.expected:
            text = f"{cell.name}: {words(counted)}, expected {words(cell.expected)}"
            found.append(Difference(cell, text))
    return found


def words(words: Iterable[str]) -> str:
    return " and ".join(sorted(words)) or "nothing"
