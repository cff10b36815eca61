"""Ends the connections that a stage left open, before its address is anybody else's.

The sockets are gone with the stage, and what they had to say may have been over its quota. So the other end of
each connection is asked anew: whoever gets a SYN for a connection that he has answers with the number that he
waits for (RFC 5961, section 4), and a reset with that number ends it at once.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterable

from ..linux.conntrack import Connection, open_connections
from ..linux.nft import Nft

WITHIN_S = 0.5
"""How long all connections of a slot are waited for. Whoever has not answered by then is as far away as its
own timeouts are long."""
_AGAIN_S = 0.15
_POLL_S = 0.01
_MARK = 0xCB
_SYN, _WINDOW = 0x02, 64
# In place of the policy: nothing gets out but what ends a connection that the policy let be opened.
_RULES = f"""
delete table inet cellblock
table inet cellblock {{
    set ended {{
        type ipv4_addr . inet_service . inet_service
        flags dynamic
        size 65535
    }}
    set ended_v6 {{
        type ipv6_addr . inet_service . inet_service
        flags dynamic
        size 65535
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oif "lo" drop
        meta mark {_MARK:#x} tcp flags & (fin | syn | rst | ack) == syn accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        meta l4proto != tcp drop
        tcp flags & rst == 0x0 drop
        add @ended {{ ip daddr . tcp sport . tcp dport }}
        add @ended_v6 {{ ip6 daddr . tcp sport . tcp dport }}
        accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 hoplimit 255 accept
        tcp flags & (rst | ack) == ack reject with tcp reset
    }}
}}
"""


def end_connections(rules: Nft) -> int:
    """Ends the TCP connections of this thread's network namespace, a slot's, whose filter ``rules`` is; nothing
    else passes that filter from then on. Returns how many did not end in time; raises OSError, NftError.
    """
    left = set(open_connections())
    if not left:
        return 0
    rules.run(_RULES)
    end = time.monotonic() + WITHIN_S
    again = 0.0
    while left and time.monotonic() < end:
        if time.monotonic() >= again:
            _ask(left)
            again = time.monotonic() + _AGAIN_S
        time.sleep(_POLL_S)
        left -= _ended(rules, left)
    return len(left)


def _ended(rules: Nft, left: Iterable[Connection]) -> set[Connection]:
    listed = rules.ask("list table inet cellblock")
    ended = {
        (str(parts[0]), int(parts[1]), int(parts[2]))
        for entry in listed
        for element in entry.get("set", {}).get("elem", [])
        for parts in [element.get("elem", {}).get("val", element)["concat"]]
    }
    return {c for c in left if (str(c.destination), c.source_port, c.destination_port) in ended}


def _ask(connections: Iterable[Connection]) -> None:
    with contextlib.ExitStack() as stack:
        sockets = {}
        for family, level, option in (
            (socket.AF_INET, socket.IPPROTO_IP, socket.IP_HDRINCL),
            (socket.AF_INET6, socket.IPPROTO_IPV6, 36),  # IPV6_HDRINCL
        ):
            with contextlib.suppress(OSError):  # a kernel without IPv6
                made = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
                stack.enter_context(made)
                made.setsockopt(level, option, 1)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _MARK)
                sockets[4 if family == socket.AF_INET else 6] = made
        for connection in connections:
            address = str(connection.destination)
            # What finds no way now is asked again.
            with contextlib.suppress(OSError):
                sockets[connection.destination.version].sendto(_syn(connection), (address, 0))


def _syn(connection: Connection) -> bytes:
    """The packet, with its IP header."""
    source, destination = connection.source.packed, connection.destination.packed
    ports = (connection.source_port, connection.destination_port)
    segment = struct.pack("!HHIIBBHHH", *ports, 0, 0, 5 << 4, _SYN, _WINDOW, 0, 0)
    pseudo = source + destination + struct.pack("!II", len(segment), socket.IPPROTO_TCP)
    segment = segment[:16] + _checksum(pseudo + segment) + segment[18:]
    if connection.source.version == 4:
        # The kernel fills in the length, the identification and the checksum.
        head = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
    return head + source + destination + segment


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
