"""Packets made by hand, and told apart again by a number that each carries."""

from __future__ import annotations

import builtins
import socket
import struct
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address

TCP, UDP, ICMP, ICMPV6, ROUTING = 6, 17, 1, 58, 43
SYN, RST, ACK, SYN_ACK = 0x02, 0x04, 0x10, 0x12
MAGIC = b"cellblk"


@dataclass(frozen=True)
class Packet:
    """One way of a conversation. ``type`` is TCP's flags, or ICMP's type; ``inner``: of which
    packet an ICMP error tells; ``route``: with a routing header (IPv6)"""

    source: str
    target: str
    protocol: int
    sport: int = 0
    dport: int = 0
    type: int = 0
    inner: Packet | None = None
    hops: int = 64
    data: builtins.bytes = b""
    later: bool = False
    route: bool = False

    @property
    def version(self) -> int:
        return 6 if ":" in self.target else 4

    def back(self, type_: int = 0) -> Packet:
        return Packet(self.target, self.source, self.protocol, self.dport, self.sport, type_)

    def bytes(self, number: int) -> builtins.bytes:
        source, target = _packed(self.source), _packed(self.target)
        mark = MAGIC + number.to_bytes(3, "big")
        body = self._transport(mark, number)
        pseudo = (
            source + target + struct.pack("!HH", self.protocol, len(body))
            if self.version == 4
            else source + target + struct.pack("!II", len(body), self.protocol)
        )
        at = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}[self.protocol]
        sum_ = _checksum(body if self.protocol == ICMP else pseudo + body)
        body = body[:at] + struct.pack("!H", sum_ or 0xFFFF) + body[at + 2 :]
        if self.version == 6:
            protocol = self.protocol
            if self.route:
                # Of the type that a job's program may set (RFC 6275), at its end: nobody is named any more.
                body = struct.pack("!BBBBI", protocol, 2, 2, 0, 0) + target + body
                protocol = ROUTING
            head = struct.pack("!IHBB", 6 << 28, len(body), protocol, self.hops)
            return head + source + target + body
        head = struct.pack(
            "!BBHHHBBH4s4s",
            0x45,
            0,
            20 + len(body),
            1,
            0,
            self.hops,
            self.protocol,
            0,
            source,
            target,
        )
        return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + body

    def _transport(self, mark: builtins.bytes, number: int) -> builtins.bytes:
        if self.protocol == TCP:
            # One sequence for all that one side says, so that connection tracking believes it.
            seq, ack = (1000, 0) if self.type == SYN else (1000, 1001)
            if self.later:
                seq = ack = 1001
            data = b"" if self.type & RST else (mark if self.later or self.type == SYN else b"")
            if self.type == SYN:
                data = b""
            flags = self.type
            return (
                struct.pack(
                    "!HHIIBBHHH", self.sport, self.dport, seq, ack, 5 << 4, flags, 8192, 0, 0
                )
                + data
            )
        if self.protocol == UDP:
            return struct.pack("!HHHH", self.sport, self.dport, 8 + len(mark), 0) + mark
        if self.inner is not None:
            rest = self.inner.bytes(number)
            return struct.pack("!BBHI", self.type, 0 if self.protocol == ICMPV6 else 1, 0, 0) + rest
        return struct.pack("!BBHHH", self.type, 0, 0, self.sport, 1) + (self.data or b"") + mark


@cache
def _packed(address: str) -> bytes:
    return ip_address(address).packed


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(source: str, target: str, kind: int, body: bytes) -> bytes:
    return mac(target) + mac(source) + struct.pack("!H", kind) + body


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


@dataclass(frozen=True)
class Seen:
    """What is known of a packet that was received."""

    source: str
    protocol: int
    type: int
    numbers: tuple[int, ...]
    mark: int | None


def parse(data: bytes) -> Seen | None:
    """An IP packet."""
    at = data.find(MAGIC)
    mark = int.from_bytes(data[at + 7 : at + 10], "big") if at >= 0 else None
    if not data:
        return None
    if data[0] >> 4 == 4:
        size, protocol, source = (data[0] & 15) * 4, data[9], socket.inet_ntoa(data[12:16])
    elif data[0] >> 4 == 6 and len(data) >= 40:
        size, protocol = 40, data[6]
        source = socket.inet_ntop(socket.AF_INET6, data[8:24])
        if protocol == ROUTING and len(data) >= 48:
            size, protocol = size + 8 * (data[41] + 1), data[40]
    else:
        return None
    return transport(data[size:], protocol, source, mark)


def heard(data: bytes, version: int, protocol: int) -> tuple[Seen | None, int | None]:
    """What a socket received, and the number that it carries: ``version`` 4 or 6 for a raw socket of
    that family and ``protocol``, 0 for one that gets frames."""
    at = data.find(MAGIC)
    mark = int.from_bytes(data[at + 7 : at + 10], "big") if at >= 0 else None
    if version == 0:
        return parse(data[14:]), mark
    if version == 4:
        return parse(data), mark
    return transport(data, protocol, "", mark), mark


def transport(body: bytes, protocol: int, source: str, mark: int | None) -> Seen | None:
    if len(body) < 8:
        return None
    if protocol in (TCP, UDP):
        flags = body[13] if protocol == TCP and len(body) > 13 else 0
        return Seen(source, protocol, flags, struct.unpack("!HH", body[:4]), mark)
    if protocol not in (ICMP, ICMPV6):
        return Seen(source, protocol, 0, (), mark)
    kind = body[0]
    error = kind in (3, 4, 5, 11, 12) if protocol == ICMP else kind < 128
    if error:
        inner = parse(body[8:])
        numbers = inner.numbers if inner else ()
        mark = inner.mark if inner and inner.mark is not None else mark
    else:
        numbers = struct.unpack("!H", body[4:6])
    return Seen(source, protocol, kind, numbers, mark)
