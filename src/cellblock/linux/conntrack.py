"""The kernel's table of connections of a network namespace, through its netlink."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from .netlink_messages import attributes, message, messages

_NETLINK_NETFILTER = 12
_GET = 1 << 8 | 1  # subsystem ctnetlink, IPCTNL_MSG_CT_GET
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
# What every message has before its attributes: family, version, resource.
_PREFIX = struct.Struct("=BBH")
_TUPLE_ORIGINAL, _PROTOCOL_INFO = 1, 4
_TUPLE_ADDRESSES, _TUPLE_PROTOCOL = 1, 2
_ADDRESSES = ((1, 2), (3, 4))  # source and destination, IPv4 and IPv6
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_INFO_TCP, _TCP_STATE = 1, 1
# SYN_RECV to LAST_ACK, and CLOSE (enum tcp_conntrack): a reset was seen here, which is not to say that it was
# taken there. Not those that were never answered, nor those that both ends have ended.
_OPEN = (2, 3, 4, 5, 6, 8)
_TIMEOUT_S = 5.0


class Connection(NamedTuple):
    """Of TCP, as its first packet went."""

    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    destination_port: int


def open_connections() -> list[Connection]:
    """The TCP connections that this thread's network namespace knows, as far as they were answered and
    the other end may still have them; raises OSError."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    ) as asked:
        asked.settimeout(_TIMEOUT_S)
        asked.bind((0, 0))
        asked.send(message(_GET, _REQUEST | _DUMP, 1, _PREFIX.pack(socket.AF_UNSPEC, 0, 0)))
        return [found for body in _answers(asked) if (found := _parse(body)) is not None]


def _answers(asked: socket.socket) -> Iterator[bytes]:
    while True:
        for answer in messages(asked.recv(1 << 18)):
            if answer.kind == _DONE:
                return
            if answer.kind == _ERROR:
                (error,) = struct.unpack_from("=i", answer.body)
                raise OSError(-error, os.strerror(-error) if error else "no answer", "conntrack")
            if answer.kind != _GET & ~0xFF:
                raise OSError(errno.EPROTO, "an answer of another kind", "conntrack")
            yield answer.body


def _parse(body: bytes) -> Connection | None:
    found = attributes(body[_PREFIX.size :])
    info = attributes(attributes(found.get(_PROTOCOL_INFO, b"")).get(_INFO_TCP, b""))
    if info.get(_TCP_STATE, b"\0")[0] not in _OPEN:
        return None
    parts = attributes(found[_TUPLE_ORIGINAL])
    protocol = attributes(parts[_TUPLE_PROTOCOL])
    if protocol[_NUMBER][0] != socket.IPPROTO_TCP:
        return None
    addresses = attributes(parts[_TUPLE_ADDRESSES])
    source, destination = next(pair for pair in _ADDRESSES if pair[0] in addresses)
    return Connection(
        ip_address(addresses[source]),
        int.from_bytes(protocol[_SOURCE_PORT], "big"),
        ip_address(addresses[destination]),
        int.from_bytes(protocol[_DESTINATION_PORT], "big"),
    )
