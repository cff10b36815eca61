"""The format of netlink's messages and attributes, which all of its families share."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

HEADER = struct.Struct("=IHHII")  # length, kind, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # length, kind
# The rest of an attribute's kind says that it is nested, or of which byte order it is.
_KIND = 0x3FFF


class Message(NamedTuple):
    """What follows the header, and those of its fields that matter."""

    kind: int
    sequence: int
    body: bytes


def messages(data: bytes) -> Iterator[Message]:
    """The messages of a datagram, up to the first that is cut off or senseless."""
    while len(data) >= HEADER.size:
        length, kind, _, sequence, _ = HEADER.unpack_from(data)
        if not HEADER.size <= length <= len(data):
            return
        yield Message(kind, sequence, data[HEADER.size : length])
        data = data[_padded(length) :]


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by their kind, up to the first that is cut off or senseless."""
    found = {}
    while len(data) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            break
        found[kind & _KIND] = data[ATTRIBUTE.size : length]
        data = data[_padded(length) :]
    return found


def attribute(kind: int, value: bytes) -> bytes:
    size = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(size, kind) + value + bytes(_padded(size) - size)


def _padded(size: int) -> int:
    return (size + 3) & ~3
