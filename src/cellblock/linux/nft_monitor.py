"""The kernel's notices of changes to nf_tables: what ``nft monitor`` prints, from the same source,
but with no process in between that could die."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from typing import NamedTuple

from .netlink_messages import Message, attributes, message, messages

_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_SUBSYSTEM = 10
_NEWGEN, _GETGEN = 15, 16
_GEN_ID, _GEN_PROCESS_ID, _GEN_PROCESS_NAME = 1, 2, 3
# The table's name, in messages about tables and about everything in them.
_TABLE_NAME = 1
# What every message has before its attributes: family, version, resource.
_PREFIX = 4
_REQUEST = 0x1

# The messages of one transaction come together. Not longer: connections that are opened while there
# is no table are unknown to connection tracking later.
_SETTLE_S = 0.005
_ANSWER_S = 5.0


class Generation(NamedTuple):
    """A state of all tables of a network namespace: each transaction makes the next one."""

    number: int
    # Who made it, as ``nft[123]``; empty where the kernel does not say.
    by: str


def generation() -> Generation:
    """The present one; raises OSError."""
    with _socket() as asked:
        asked.settimeout(_ANSWER_S)
        asked.send(message(_SUBSYSTEM << 8 | _GETGEN, _REQUEST, 1, bytes(_PREFIX)))
        for answer in messages(asked.recv(1 << 16)):
            if answer.kind == _SUBSYSTEM << 8 | _NEWGEN:
                return _generation(answer)
    raise OSError(errno.EPROTO, "the kernel does not say which generation of rules it has")


class NftMonitor:
    """Waits for changes to the tables of one name."""

    def __init__(self, table: str) -> None:
        """``table`` is the name without its family."""
        self._table = table.encode() + b"\0"
        self._socket: socket.socket | None = None
        self._by = ""
        self._open()

    def take_author(self) -> str:
        """Who made the last change, as ``nft[123]``; empty where there was none since the last call."""
        by, self._by = self._by, ""
        return by

    def wait(self, seconds: float) -> bool:
        """True when something in the table may have changed; False when the time is over."""
        end = time.monotonic() + seconds
        if self._socket is None:
            self._open()
        if self._socket is None:
            # Without notices, look every second.
            time.sleep(min(seconds, 1.0))
            return True
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                return False
            if self._read():
                # A transaction comes as many messages; the last says whose it was.
                for _ in range(20):
                    if (
                        self._socket is None
                        or not select.select([self._socket], [], [], _SETTLE_S)[0]
                    ):
                        break
                    self._read()
                return True

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            if self._socket:
                self._socket.close()
            self._socket = None
            opened = _socket()
            try:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                opened.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
                opened.setblocking(False)
            except OSError:
                opened.close()
                raise
            self._socket = opened

    def _read(self) -> bool:
        assert self._socket is not None
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                self._open()
            # Notices were lost, so one of them may have been about our table.
            return True
        return self._take(data)

    def _take(self, data: bytes) -> bool:
        """Whether a datagram is about our table; notes who made the change."""
        ours = False
        for notice in messages(data):
            if notice.kind >> 8 != _SUBSYSTEM:
                continue
            if notice.kind & 0xFF == _NEWGEN:
                self._by = _generation(notice).by
            elif attributes(notice.body[_PREFIX:]).get(_TABLE_NAME) == self._table:
                ours = True
        return ours


def _socket() -> socket.socket:
    return socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    )


def _generation(notice: Message) -> Generation:
    found = attributes(notice.body[_PREFIX:])
    number, pid = (_number(found.get(kind, b"")) for kind in (_GEN_ID, _GEN_PROCESS_ID))
    name = found.get(_GEN_PROCESS_NAME, b"").split(b"\0")[0].decode("ascii", "backslashreplace")
    return Generation(number, f"{name}[{pid}]" if pid else "")


def _number(value: bytes) -> int:
    number: int = struct.unpack(">I", value[:4])[0] if len(value) >= 4 else 0
    return number
