"""Network namespaces, and the interfaces, addresses and routes in them, through the kernel's netlink.

In process: a slot is made and removed for every stage that has a network, and a program for each
step would cost more than the step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NoReturn

from .netlink_messages import HEADER, attribute, attributes, message, messages

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_PR_SET_DUMPABLE = 4

_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")

_REQUEST, _ACK, _EXCLUSIVE, _CREATE, _APPEND, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x800, 0x300
_ERROR, _DONE = 2, 3
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _NEWROUTE, _NEWLINKPROP = 16, 17, 18, 20, 24, 108
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 5, 18, 28
_IFLA_PROP_LIST, _IFLA_ALT_IFNAME, _NESTED = 52, 53, 0x8000
_INFO_KIND, _INFO_DATA = 1, 2
_MACVLAN_MODE, _MODE_PRIVATE = 1, 1
_VETH_PEER = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _SCOPE_LINK, _UNICAST = 254, 4, 0, 253, 1
_ONLINK = 4
_IFF_UP = 1
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_TIMEOUT_S = 10.0


class NetlinkError(OSError):
    """The kernel refused; ``strerror`` is its own explanation where it gave one."""


@dataclass(frozen=True)
class Link:
    """An interface as the kernel describes it."""

    index: int
    name: str
    up: bool
    mac: bytes = b""


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread, and the processes that it starts, in the network namespace of a descriptor."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)


def enter(namespace: int) -> None:
    """Moves this thread; see :func:`inside` for the way back."""
    if _libc.setns(namespace, _CLONE_NEWNET) < 0:
        raise _os_error("setns")


def new_namespace() -> int:
    """A descriptor of a new, empty network namespace, owned by this process's user namespace.

    It lives as long as the descriptor, or a process in it, does.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET) < 0:
            raise _os_error("unshare")
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            enter(before)
    finally:
        os.close(before)


def new_namespace_of(pid: int) -> int:
    """Likewise, owned by the user namespace of the process ``pid``, below this one's: processes there may enter it, and
    change what is in it.
    """
    user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Only a process with a single thread may enter a user namespace.
        child = os.fork()
        if child == 0:
            ours.close()
            _wait_there(user, theirs)
        os.close(user)
        theirs.close()
        ours.settimeout(_TIMEOUT_S)
        try:
            failed = int.from_bytes(ours.recv(4), "little")
            if failed:
                raise OSError(failed, os.strerror(failed), "making a network namespace")
            return os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            ours.close()
            os.waitpid(child, 0)


def _wait_there(user: int, connection: socket.socket) -> NoReturn:
    """In a child, whose memory is a copy of its parent's, and nobody there is to read it."""
    try:
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        failed = _libc.setns(user, 0) < 0 or _libc.unshare(_CLONE_NEWNET) < 0
        connection.send((ctypes.get_errno() if failed else 0).to_bytes(4, "little"))
        # Until it is taken: the parent closes its end.
        connection.settimeout(_TIMEOUT_S)
        connection.recv(1)
    finally:
        os._exit(0)


def _os_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)


class Netlink:
    """A routing socket. It stays with the network namespace in which it was made."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def link(self, name: str) -> Link | None:
        """The interface of that name, or None."""
        body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, _text(name))
        try:
            return _parse_link(self._ask(_GETLINK, _REQUEST | _ACK, body)[0])
        except NetlinkError as problem:
            if problem.errno == errno.ENODEV:
                return None
            raise

    def links(self) -> list[Link]:
        """All interfaces of the namespace."""
        body = _LINK.pack(0, 0, 0, 0, 0)
        return [_parse_link(part) for part in self._ask(_GETLINK, _REQUEST | _DUMP, body)]

    def add_macvlan(
        self, parent: int, name: str, mac: bytes | None = None, namespace: int | None = None
    ) -> None:
        """A clone of ``parent`` in private mode (clones do not hear each other) in ``namespace``, or here; with
        an address of the kernel's choice where there is no ``mac``."""
        mode = attribute(_MACVLAN_MODE, struct.pack("=I", _MODE_PRIVATE))
        self._do(
            _NEWLINK,
            _CREATE | _EXCLUSIVE,
            _LINK.pack(0, 0, 0, 0, 0)
            + attribute(_IFLA_IFNAME, _text(name))
            + attribute(_IFLA_LINK, struct.pack("=i", parent))
            + (b"" if mac is None else attribute(_IFLA_ADDRESS, mac))
            + (
                b""
                if namespace is None
                else attribute(_IFLA_NET_NS_FD, struct.pack("=I", namespace))
            )
            + _kind("macvlan", mode),
        )

    def add_veth(self, name: str, peer_name: str, peer_mac: bytes, namespace: int) -> None:
        """A pair of which ``name`` is here and the other end in ``namespace``."""
        peer = (
            _LINK.pack(0, 0, 0, 0, 0)
            + attribute(_IFLA_IFNAME, _text(peer_name))
            + attribute(_IFLA_ADDRESS, peer_mac)
            + attribute(_IFLA_NET_NS_FD, struct.pack("=I", namespace))
        )
        self._do(
            _NEWLINK,
            _CREATE | _EXCLUSIVE,
            _LINK.pack(0, 0, 0, 0, 0)
            + attribute(_IFLA_IFNAME, _text(name))
            + _kind("veth", attribute(_VETH_PEER, peer)),
        )

    def add_name(self, index: int, name: str) -> None:
        """An interface that is up can have more names, where it cannot have another."""
        body = _LINK.pack(0, 0, index, 0, 0)
        names = attribute(_IFLA_PROP_LIST | _NESTED, attribute(_IFLA_ALT_IFNAME, _text(name)))
        self._do(_NEWLINKPROP, _CREATE | _EXCLUSIVE | _APPEND, body + names)

    def set_up(self, index: int) -> None:
        self._do(_NEWLINK, 0, _LINK.pack(0, 0, index, _IFF_UP, _IFF_UP))

    def delete(self, index: int) -> None:
        self._do(_DELLINK, 0, _LINK.pack(0, 0, index, 0, 0))

    def add_address(
        self, index: int, address: IPv4Address | IPv6Address, prefix_length: int
    ) -> None:
        """Without asking first whether somebody has it (IPv6 would, for a second)."""
        flags = _IFA_F_NODAD if address.version == 6 else 0
        scope = _SCOPE_LINK if address.is_link_local and address.version == 6 else _SCOPE_UNIVERSE
        self._do(
            _NEWADDR,
            _CREATE | _EXCLUSIVE,
            _ADDRESS.pack(_family(address), prefix_length, flags, scope, index)
            + attribute(_IFA_LOCAL, address.packed)
            + attribute(_IFA_ADDRESS, address.packed),
        )

    def add_default_route(self, index: int, gateway: IPv4Address | IPv6Address) -> None:
        """Also where no address of the interface covers the gateway."""
        self._do(
            _NEWROUTE,
            _CREATE | _EXCLUSIVE,
            _ROUTE.pack(
                _family(gateway),
                0,
                0,
                0,
                _TABLE_MAIN,
                _PROTOCOL_STATIC,
                _SCOPE_UNIVERSE,
                _UNICAST,
                _ONLINK,
            )
            + attribute(_RTA_OIF, struct.pack("=i", index))
            + attribute(_RTA_GATEWAY, gateway.packed),
        )

    def add_host_route(self, index: int, address: IPv4Address | IPv6Address) -> None:
        """``address`` is directly behind the interface."""
        self._do(
            _NEWROUTE,
            _CREATE | _EXCLUSIVE,
            _ROUTE.pack(
                _family(address),
                address.max_prefixlen,
                0,
                0,
                _TABLE_MAIN,
                _PROTOCOL_STATIC,
                _SCOPE_LINK,
                _UNICAST,
                0,
            )
            + attribute(_RTA_DST, address.packed)
            + attribute(_RTA_OIF, struct.pack("=i", index)),
        )

    def _do(self, kind: int, flags: int, body: bytes) -> None:
        self._ask(kind, _REQUEST | _ACK | flags, body)

    def _ask(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Sends one request and returns the bodies of the answers to it."""
        self._sequence += 1
        self._socket.send(message(kind, flags, self._sequence, body))
        answers: list[bytes] = []
        while True:
            for answer in messages(self._socket.recv(1 << 18)):
                if answer.sequence != self._sequence:
                    continue
                if answer.kind == _DONE:
                    return answers
                if answer.kind != _ERROR:
                    answers.append(answer.body)
                    continue
                (error,) = struct.unpack_from("=i", answer.body)
                if error == 0:
                    return answers
                raise NetlinkError(-error, _explanation(answer.body) or os.strerror(-error))


def _family(address: IPv4Address | IPv6Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _explanation(body: bytes) -> str:
    """The kernel's own words in an error message (NLMSGERR_ATTR_MSG), or nothing."""
    # The error, and the header of the request; CAP_ACK leaves the rest of the request out.
    return attributes(body[4 + HEADER.size :]).get(1, b"").rstrip(b"\0").decode()


def _parse_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    found = attributes(body[_LINK.size :])
    name = found[_IFLA_IFNAME].rstrip(b"\0").decode()
    return Link(index, name, bool(flags & _IFF_UP), found.get(_IFLA_ADDRESS, b""))


def _kind(kind: str, data: bytes) -> bytes:
    return attribute(
        _IFLA_LINKINFO, attribute(_INFO_KIND, kind.encode()) + attribute(_INFO_DATA, data)
    )


def _text(text: str) -> bytes:
    return text.encode() + b"\0"
