# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Tries to reach targets over the network, all at once, and says what was seen and how.

It knows nothing of flows, rules or expectations: what it says must not depend on what anybody
hopes for. Standard library only, Python 3.9 or newer.

Outcomes:

- ``open``: the target itself answered (handshake done, datagram or echo answered)
- ``refused``: the target itself refused (RST, port unreachable): the packet arrived
- ``filtered``: no answer within the time
- ``unreachable``: something said that there is no way, this host's own stack or another box
- ``sent``: a forged packet left; only the target's listener knows whether it arrived
- ``denied``: this process may not open a socket for it, so it cannot send such a packet
- ``error``: the probe could not be made, so nothing is known
"""

from __future__ import annotations

import abc
import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import json
import math
import os
import resource
import secrets
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Target = Mapping[str, Any]

PROTOCOLS = (
    "tcp",
    "udp",
    "icmp",
    "neighbour",
    "spoofed_udp",
    "spoofed_icmp",
    "spoofed_frame",
)
PAYLOADS = ("nonce", "dns", "ntp")

# What our own datagrams begin with, and the answers of our own listener. They differ so that no
# two listeners can ever talk to each other, whatever source a datagram claims to have.
ASK = b"cellblock-probe "
ANSWER = b"cellblock-heard "

# After a handshake: how long to wait for what the service says first. Evidence only.
_BANNER_S = 0.15
_BANNER_SHOWN = 60
# A share of the time after which what the kernel does not retransmit is sent once more.
_AGAIN = 0.4
# How many times as long an answer is waited for that is expected: a host that is busy is no finding.
PATIENCE = 4
# Descriptors kept for other things than probes.
_SPARE_FILES = 32
_MOST_FILES = 4096

# linux/errqueue.h, linux/in.h, linux/in6.h, linux/icmp.h: Python has no names for these.
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_MSG_ERRQUEUE = 0x2000
_SO_EE_ORIGIN_LOCAL = 1
_ETH_ARP, _ETH_IPV4, _ETH_IPV6 = 0x0806, 0x0800, 0x86DD
_SIOCGIFFLAGS, _SIOCGIFHWADDR = 0x8913, 0x8927
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_BROADCAST = b"\xff" * 6

_ICMP4 = {
    0: "network unreachable",
    1: "host unreachable",
    2: "protocol unreachable",
    3: "port unreachable",
    9: "network administratively prohibited",
    10: "host administratively prohibited",
    13: "administratively prohibited",
}
_ICMP6 = {
    0: "no route",
    1: "administratively prohibited",
    3: "address unreachable",
    4: "port unreachable",
    5: "source address refused",
    6: "route rejected",
}
_LOCAL = {
    errno.ENETUNREACH: "this host has no route",
    errno.EHOSTUNREACH: "this host's own routes say that there is no way",
    errno.EADDRNOTAVAIL: "this host has no address of its own to send from",
    errno.EACCES: "this host's own routes prohibit it",
    errno.EINVAL: "this host's own routes discard it",
    errno.EPERM: "this host's own filter refused to send it",
    errno.ENETDOWN: "this host's interface is down",
    errno.ENOBUFS: "this host's own filter or queue dropped it",
}


class ProbeError(Exception):
    """An expected failure; the text is one sentence that names the thing and the remedy."""


def probe(targets: Sequence[Target], timeout_ms: int) -> list[dict[str, Any]]:
    """What happened to each of ``targets``, in their order.

    All are tried at the same time, unless there are more than this process may have files open;
    then as many as possible at a time, each batch with ``timeout_ms``. Those that are ``expected``
    to answer are given PATIENCE times as long.
    """
    at_once = _raise_file_limit() - _SPARE_FILES
    results: dict[str, dict[str, Any]] = {}
    for begin in range(0, len(targets), at_once):
        _Batch(targets[begin : begin + at_once], timeout_ms / 1000, results).run()
    return [results[str(target["id"])] for target in targets]


def check_targets(targets: Sequence[Target]) -> None:
    """Raises ProbeError for the first target that makes no sense, naming it and its field."""
    seen: set[str] = set()
    for target in targets:
        name, protocol = target["id"], target["protocol"]
        if name in seen:
            raise ProbeError(f"targets: the id {name} is given twice; ids must differ.")
        seen.add(name)
        version = _address(target, "address").version
        source = target.get("source")
        if source is not None and _address(target, "source").version != version:
            raise ProbeError(
                f"target {name}: source {source} is not of the same kind as {target['address']}."
            )
        port = target.get("port")
        if protocol in ("tcp", "udp", "spoofed_udp") and port is None:
            raise ProbeError(f"target {name}: port is missing; {protocol} needs one.")
        if port is not None and not 1 <= port <= 65535:
            raise ProbeError(f"target {name}: port is {port}; use 1 to 65535.")
        needed = {
            "neighbour": ("interface",),
            "spoofed_udp": ("source",),
            "spoofed_icmp": ("source",),
            "spoofed_frame": ("source", "interface", "mac"),
        }.get(protocol, ())
        for field in needed:
            if not target.get(field):
                raise ProbeError(f"target {name}: {field} is missing; {protocol} needs it.")
        for field in ("mac", "source_mac"):
            if target.get(field):
                _mac(target[field], f"target {name}: {field}")


def _address(target: Target, field: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(target[field])
    except ValueError:
        raise ProbeError(
            f"target {target['id']}: {field} {target[field]!r} is not an IPv4 or IPv6 address; "
            "names are not resolved here."
        ) from None


def _raise_file_limit() -> int:
    """As many open files as this process may have, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        return soft
    return most


class _Batch:
    """Targets that are tried at the same time, until each has an answer or the time is over."""

    def __init__(
        self, targets: Sequence[Target], timeout_s: float, results: dict[str, dict[str, Any]]
    ) -> None:
        self.timeout_s = timeout_s
        self.results = results
        self.selector = selectors.DefaultSelector()
        self.begun = time.monotonic()
        self.attempts: list[_Attempt] = []
        neighbours: dict[tuple[str, int], _Neighbours] = {}
        for target in targets:
            if target["protocol"] == "neighbour":
                # One socket for all neighbours on a link: each would see all of its traffic.
                link = (target["interface"], ipaddress.ip_address(target["address"]).version)
                if link not in neighbours:
                    neighbours[link] = _Neighbours(self, target)
                    self.attempts.append(neighbours[link])
                neighbours[link].add(target)
            else:
                self.attempts.append(_KINDS[target["protocol"]](self, target))

    def run(self) -> None:
        with contextlib.closing(self.selector):
            for attempt in self.attempts:
                attempt.guarded(attempt.begin)
            self.begun = time.monotonic()
            for attempt in self.attempts:
                attempt.ends_at = min(attempt.ends_at, self.begun + attempt.timeout_s)
            again_at = self.begun + self.timeout_s * _AGAIN
            while True:
                now = time.monotonic()
                is_time = now >= again_at
                if is_time:
                    again_at += self.timeout_s
                for attempt in self.attempts:
                    if is_time and not attempt.is_done:
                        attempt.guarded(attempt.again)
                    if not attempt.is_done and now >= attempt.ends_at:
                        attempt.guarded(attempt.out_of_time)
                waiting = [attempt for attempt in self.attempts if not attempt.is_done]
                if not waiting:
                    break
                soonest = min(again_at, *(attempt.ends_at for attempt in waiting))
                pause = max(0.0, soonest - time.monotonic())
                for key, _events in self.selector.select(pause):
                    if not key.data.is_done:
                        key.data.guarded(key.data.ready)


class _Attempt(abc.ABC):
    """One target's probe. Subclasses send in ``begin`` and read in ``ready``."""

    is_forged = False

    def __init__(self, batch: _Batch, target: Target) -> None:
        self.batch = batch
        self.target = target
        self.is_done = False
        self.sock: socket.socket | None = None
        self.timeout_s = batch.timeout_s * (PATIENCE if target.get("expected") else 1)
        self.ends_at = math.inf  # set by the batch, unless the attempt ends earlier by itself
        self.sent_at = time.monotonic()
        self.more: dict[str, Any] = {}
        self.address = ipaddress.ip_address(target["address"])
        self.family = socket.AF_INET if self.address.version == 4 else socket.AF_INET6

    # What subclasses do.
    @abc.abstractmethod
    def begin(self) -> None:
        """Open the socket and send."""

    def ready(self) -> None:  # noqa: B027 -- a hook: forged packets are not answered
        """Read what the socket has."""

    def again(self) -> None:  # noqa: B027 -- a hook: the kernel repeats for TCP
        """Send once more; nothing where the kernel does that."""

    def out_of_time(self) -> None:
        self.finish("filtered", f"no answer in {_ms(self.timeout_s)}")

    # What they use.
    def guarded(self, step: Callable[[], None]) -> None:
        """``step``, where what goes wrong is this target's result and nobody else's."""
        try:
            step()
        except BlockingIOError:
            pass
        except OSError as problem:
            self.failed(problem)

    def failed(self, problem: OSError) -> None:
        """A call failed at once: that was this host's own doing."""
        code = problem.errno or 0
        name = errno.errorcode.get(code, str(code))
        if code == errno.ECONNREFUSED:
            self.finish("refused", f"port unreachable or RST in {self.elapsed()}")
        elif code == errno.EPERM and self.sock is None:
            self.finish("denied", "needs root (CAP_NET_RAW): no socket for it (EPERM)")
        elif code == errno.EADDRNOTAVAIL and self.target.get("source") and not self.is_forged:
            self.finish("error", f"{self.target['source']} is no address of this host ({name})")
        elif code in _LOCAL:
            self.finish("unreachable", f"not sent: {_LOCAL[code]} ({name})")
        else:
            self.finish("error", f"not tried: {os.strerror(code)} ({name})")

    def finish(self, outcome: str, evidence: str) -> None:
        self.end()
        self.record(self.target, outcome, evidence, **self.more)

    def end(self) -> None:
        self.is_done = True
        if self.sock is not None:
            with contextlib.suppress(KeyError, ValueError):
                self.batch.selector.unregister(self.sock)
            self.sock.close()

    def record(self, target: Target, outcome: str, evidence: str, **more: Any) -> None:
        self.batch.results[str(target["id"])] = {
            "id": target["id"],
            "outcome": outcome,
            "evidence": evidence,
            "elapsed_ms": round((time.monotonic() - self.sent_at) * 1000, 1),
            **more,
        }

    def elapsed(self) -> str:
        return _ms(time.monotonic() - self.sent_at)

    def sockaddr(self, port: int = 0) -> tuple[Any, ...]:
        if self.family == socket.AF_INET:
            return (str(self.address), port)
        interface = self.target.get("interface")
        scope = socket.if_nametoindex(interface) if interface else 0
        return (str(self.address).split("%")[0], port, 0, scope)

    def open(self, kind: int, protocol: int = 0) -> socket.socket:
        interface = self.target.get("interface")
        if interface and interface not in (name for _, name in socket.if_nameindex()):
            raise OSError(errno.ENODEV, "no such interface")
        self.sock = socket.socket(self.family, kind, protocol)
        self.sock.setblocking(False)
        source = self.target.get("source")
        if source:
            self.sock.bind((source, 0) if self.family == socket.AF_INET else (source, 0, 0, 0))
        return self.sock

    def watch(self, events: int) -> None:
        assert self.sock is not None
        self.batch.selector.register(self.sock, events, self)


class _Tcp(_Attempt):
    is_connected = False
    greeting = ""

    def begin(self) -> None:
        sock = self.open(socket.SOCK_STREAM)
        self.sent_at = time.monotonic()
        code = sock.connect_ex(self.sockaddr(self.target["port"]))
        self.more["source"], self.more["source_port"] = sock.getsockname()[:2]
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        self.watch(selectors.EVENT_WRITE)

    def ready(self) -> None:
        assert self.sock is not None
        if self.is_connected:
            self.finish("open", f"{self.greeting}{_said(self.sock.recv(256))}")
            return
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            self.is_connected = True
            self.greeting = f"connected in {self.elapsed()}"
            self.ends_at = time.monotonic() + _BANNER_S
            self.batch.selector.modify(self.sock, selectors.EVENT_READ, self)
        elif code == errno.ECONNREFUSED:
            self.finish("refused", f"refused in {self.elapsed()} (RST or port unreachable)")
        elif code in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.ENOPROTOOPT):
            # The kernel does not say who told it.
            self.finish(
                "unreachable",
                f"{errno.errorcode[code]} after {self.elapsed()} (no neighbour answered, or an "
                "ICMP message said so)",
            )
        elif code == errno.ETIMEDOUT:
            self.out_of_time()
        else:
            self.finish("error", f"{os.strerror(code)} after {self.elapsed()}")

    def failed(self, problem: OSError) -> None:
        # Whatever comes after the handshake (a reset, say) does not undo it.
        if self.is_connected:
            self.finish("open", f"{self.greeting}, then {errno.errorcode.get(problem.errno or 0)}")
        else:
            super().failed(problem)

    def out_of_time(self) -> None:
        if self.is_connected:
            self.finish("open", self.greeting)
        else:
            super().out_of_time()


class _Datagram(_Attempt):
    """What UDP and ICMP echo have in common: an answer, or an error that the kernel queues."""

    message = b""

    def ready(self) -> None:
        assert self.sock is not None
        error = self._queued_error()
        if error is not None:
            outcome, evidence = error
            self.finish(outcome, evidence)
            return
        answer = self.sock.recv(2048)
        understood = self.understood(answer)
        if understood:
            self.finish("open", understood)

    def again(self) -> None:
        assert self.sock is not None
        self.sock.send(self.message)

    @abc.abstractmethod
    def understood(self, answer: bytes) -> str | None:
        """How an answer is known to be one; None when it is something else."""
        raise NotImplementedError

    def ask_for_errors(self, sock: socket.socket) -> None:
        if self.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)

    def _queued_error(self) -> tuple[str, str] | None:
        assert self.sock is not None
        try:
            _data, ancillary, _flags, _to = self.sock.recvmsg(512, 512, _MSG_ERRQUEUE)
        except BlockingIOError:
            return None
        for level, kind, data in ancillary:
            if (level, kind) in (
                (socket.IPPROTO_IP, _IP_RECVERR),
                (socket.IPPROTO_IPV6, _IPV6_RECVERR),
            ):
                return self._meaning(data)
        return None

    def _meaning(self, data: bytes) -> tuple[str, str]:
        """struct sock_extended_err and, behind it, the address of who sent the message."""
        code, origin, kind, subcode = struct.unpack_from("=IBBB", data)
        name = errno.errorcode.get(code, str(code))
        if origin == _SO_EE_ORIGIN_LOCAL:
            return "unreachable", f"this host's own stack: {os.strerror(code)} ({name})"
        offender = _offender(data[16:])
        names = _ICMP4 if self.family == socket.AF_INET else _ICMP6
        known_type = kind == (3 if self.family == socket.AF_INET else 1)
        text = names.get(subcode, f"code {subcode}") if known_type else f"type {kind}"
        evidence = f"ICMP {text} from {offender} in {self.elapsed()}"
        assert self.sock is not None
        if offender == str(self.sock.getsockname()[0]).split("%")[0] and offender != str(
            self.address
        ):
            return "unreachable", f"{evidence}, this host itself (no neighbour answered)"
        if code == errno.ECONNREFUSED:
            if offender == str(self.address).split("%")[0]:
                return "refused", evidence
            return "unreachable", f"{evidence}, which is not the target"
        return "unreachable", evidence


class _Udp(_Datagram):
    def begin(self) -> None:
        sock = self.open(socket.SOCK_DGRAM)
        self.ask_for_errors(sock)
        sock.connect(self.sockaddr(self.target["port"]))
        self.message, self.key = payload(self.target.get("payload") or "nonce")
        self.more["payload"] = digest(self.message)
        self.more["source"], self.more["source_port"] = sock.getsockname()[:2]
        self.sent_at = time.monotonic()
        sock.send(self.message)
        self.watch(selectors.EVENT_READ)

    def understood(self, answer: bytes) -> str | None:
        took = self.elapsed()
        if answer.startswith(ANSWER) and self.key in answer:
            return f"answered in {took} by a listener of the prober"
        if self.key in answer:
            return f"answered in {took} ({self.target.get('payload') or 'nonce'}, its own key)"
        # From the address and port that were asked, but not to what was asked.
        return f"answered in {took} with {len(answer)} bytes"


class _Icmp(_Datagram):
    def begin(self) -> None:
        v4 = self.family == socket.AF_INET
        number = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
        try:
            # Needs no privilege where net.ipv4.ping_group_range has the user's group.
            sock = self.open(socket.SOCK_DGRAM, number)
        except PermissionError:
            sock = self.open(socket.SOCK_RAW, number)
        self.ask_for_errors(sock)
        sock.connect(self.sockaddr())
        self.key = secrets.token_hex(8).encode()
        body = ASK + self.key
        self.more["payload"] = digest(body)
        self.more["source"] = str(sock.getsockname()[0])
        # The kernel puts in the checksum for IPv6 and for ping sockets, but not for raw IPv4.
        self.message = _echo(8 if v4 else 128, body)
        self.sent_at = time.monotonic()
        sock.send(self.message)
        self.watch(selectors.EVENT_READ)

    def understood(self, answer: bytes) -> str | None:
        v4 = self.family == socket.AF_INET
        if v4 and answer[:1] and answer[0] >> 4 == 4:  # a raw socket gives the IP header too
            answer = answer[(answer[0] & 15) * 4 :]
        if answer[:1] == (b"\x00" if v4 else b"\x81") and self.key in answer:
            return f"echo answered in {self.elapsed()}"
        return None


class _Neighbours(_Attempt):
    """Who on a link answers when asked for an address: ARP, or neighbour discovery for IPv6.

    Frames are made by hand, so that neither this host's filter nor its neighbour table has a say.
    """

    def __init__(self, batch: _Batch, target: Target) -> None:
        super().__init__(batch, target)
        self.wanted: dict[bytes, Target] = {}

    def add(self, target: Target) -> None:
        address = ipaddress.ip_address(str(target["address"]).split("%")[0]).packed
        if address in self.wanted:
            self.record(target, "error", f"{target['address']} is asked for twice on one link")
        else:
            self.wanted[address] = target

    def begin(self) -> None:
        interface = self.target["interface"]
        if interface not in (name for _, name in socket.if_nameindex()):
            raise OSError(errno.ENODEV, "no such interface")
        kind = _ETH_ARP if self.address.version == 4 else _ETH_IPV6
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
        self.sock.setblocking(False)
        self.sock.bind((interface, kind))
        self.mac = self.sock.getsockname()[4]
        own = [
            ipaddress.ip_address(a["address"])
            for link in interfaces()
            if link["name"] == interface
            for a in link["addresses"]
        ]
        fitting = [a for a in own if a.version == self.address.version]
        # Neighbours answer a link-local source on every link; ARP without a source is a probe.
        fitting.sort(key=lambda a: not a.is_link_local if a.version == 6 else False)
        given = self.target.get("source")
        if given:
            self.own = ipaddress.ip_address(given).packed
        elif fitting:
            self.own = fitting[0].packed
        elif self.address.version == 4:
            self.own = bytes(4)
        else:
            raise OSError(errno.EADDRNOTAVAIL, "no address")
        self.sent_at = time.monotonic()
        self.again()
        self.watch(selectors.EVENT_READ)

    def again(self) -> None:
        assert self.sock is not None
        for address in self.wanted:
            if self.address.version == 4:
                self.sock.send(_arp_request(self.mac, self.own, address))
            else:
                self.sock.send(_solicitation(self.mac, self.own, address))

    def ready(self) -> None:
        assert self.sock is not None
        while self.wanted:
            frame = self.sock.recv(2048)
            answer = _arp_answer(frame) if self.address.version == 4 else _advertisement(frame)
            if answer is None:
                continue
            address, mac = answer
            target = self.wanted.pop(address, None)
            if target is not None:
                how = "ARP" if self.address.version == 4 else "neighbour discovery"
                name = mac.hex(":")
                self.record(target, "open", f"{how}: {name} answered in {self.elapsed()}", mac=name)
        self.finish("open", "")

    def finish(self, outcome: str, evidence: str) -> None:
        self.end()
        for target in self.wanted.values():
            self.record(target, outcome, evidence)


class _Spoofed(_Attempt):
    """A packet with a forged source. It gets no answer here; the target's listener tells."""

    is_forged = True

    def begin(self) -> None:
        self.key = secrets.token_hex(8).encode()
        body = ASK + self.key
        self.more["payload"] = digest(body)
        source = ipaddress.ip_address(self.target["source"])
        port = self.target.get("port")
        is_udp = port is not None and self.target["protocol"] != "spoofed_icmp"
        self.message = _ip_packet(source, self.address, port if is_udp else None, body)
        self.prepare()
        self.sent_at = time.monotonic()
        self.send()
        # Once more a little later: the first may only have asked for the neighbour.
        self.ends_at = self.sent_at + self.batch.timeout_s * (_AGAIN + 0.05)

    def prepare(self) -> None:
        # IPPROTO_RAW implies that the header is given, for IPv4 and IPv6.
        self.sock = socket.socket(self.family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self.sock.setblocking(False)

    def send(self) -> None:
        assert self.sock is not None
        self.sock.sendto(self.message, self.sockaddr())

    def again(self) -> None:
        self.send()

    def out_of_time(self) -> None:
        self.finish("sent", f"sent twice as {self.target['source']}")


class _SpoofedFrame(_Spoofed):
    def prepare(self) -> None:
        interface = self.target["interface"]
        if interface not in (name for _, name in socket.if_nameindex()):
            raise OSError(errno.ENODEV, "no such interface")
        kind = _ETH_IPV4 if self.address.version == 4 else _ETH_IPV6
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # 0: it only sends
        self.sock.setblocking(False)
        self.sock.bind((interface, 0))
        source = self.target.get("source_mac")
        mac = _mac(source, "source_mac") if source else self.sock.getsockname()[4]
        self.message = (
            _mac(self.target["mac"], "mac") + mac + struct.pack("!H", kind) + self.message
        )

    def send(self) -> None:
        assert self.sock is not None
        self.sock.send(self.message)

    def out_of_time(self) -> None:
        mac = self.target.get("source_mac") or "its own hardware address"
        self.finish("sent", f"frame sent twice as {self.target['source']} with {mac}")


_KINDS: dict[str, type[_Attempt]] = {
    "tcp": _Tcp,
    "udp": _Udp,
    "icmp": _Icmp,
    "spoofed_udp": _Spoofed,
    "spoofed_icmp": _Spoofed,
    "spoofed_frame": _SpoofedFrame,
}


# What is sent and heard.


def payload(kind: str) -> tuple[bytes, bytes]:
    """A datagram to send, and the key by which an answer to it is known."""
    if kind == "dns":
        # NS of a name that cannot exist: whatever a resolver says to that is an answer. The name
        # is new each time, so that no answer comes from memory, and so is the id.
        key = secrets.token_bytes(2)
        label = secrets.token_hex(8).encode()
        name = b"".join(bytes([len(part)]) + part for part in (label, b"invalid")) + b"\0"
        return key + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + name + struct.pack(
            "!HH", 2, 1
        ), key
    if kind == "ntp":
        # A client's request (version 4); a server repeats our transmit time as origin time.
        key = secrets.token_bytes(8)
        return b"\x23" + bytes(39) + key, key
    key = secrets.token_hex(8).encode()
    return ASK + key, key


def answer_to(kind: str, data: bytes) -> bytes | None:
    """What our own listener answers; None for what is itself an answer, or not for us."""
    if data.startswith(ASK):
        return ANSWER + data[len(ASK) :]
    # A query with one question: nothing that any of our own listeners answers looks like it.
    if (
        kind == "dns"
        and len(data) >= 17
        and not data[2] & 0xF8
        and data[4:10] == b"\0\1" + bytes(4)
    ):
        return data[:2] + bytes([data[2] | 0x80, 5]) + data[4:]  # refused
    if kind == "ntp" and len(data) >= 48 and data[0] & 7 == 3:
        return b"\x24" + bytes(23) + data[40:48] + bytes(16)
    return None


def digest(data: bytes) -> str:
    """By this a sent datagram is recognised among what a listener received."""
    return hashlib.sha256(data).hexdigest()[:16]


def printable(data: bytes) -> str:
    """Text that can be shown anywhere: what is not plain ASCII is escaped."""
    return "".join(chr(b) if 32 <= b < 127 and b != 92 else f"\\x{b:02x}" for b in data)


def _said(banner: bytes) -> str:
    if not banner:
        return ", then closed"
    if banner.startswith(ANSWER):
        return " to a listener of the prober"
    line = banner.splitlines()[0] if banner.splitlines() else b""
    return f", it said '{printable(line[:_BANNER_SHOWN])}'"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _offender(data: bytes) -> str:
    """The address in a struct sockaddr; empty when there is none."""
    if len(data) >= 8:
        (family,) = struct.unpack_from("=H", data)
        if family == socket.AF_INET:
            return str(ipaddress.IPv4Address(data[4:8]))
        if family == socket.AF_INET6 and len(data) >= 24:
            return str(ipaddress.IPv6Address(data[8:24]))
    return "an unknown address"


# Packets made by hand.


def _mac(text: str, what: str) -> bytes:
    parts = text.split(":")
    if len(parts) != 6 or not all(len(p) == 2 for p in parts):
        raise ProbeError(f"{what} {text!r} is no hardware address such as 02:42:0a:d5:00:15.")
    try:
        return bytes.fromhex("".join(parts))
    except ValueError:
        raise ProbeError(
            f"{what} {text!r} is no hardware address such as 02:42:0a:d5:00:15."
        ) from None


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _echo(kind: int, body: bytes, pseudo: bytes = b"") -> bytes:
    number = int.from_bytes(secrets.token_bytes(2), "big")
    bare = struct.pack("!BBHHH", kind, 0, 0, number, 1) + body
    return bare[:2] + struct.pack("!H", checksum(pseudo + bare)) + bare[4:]


def _pseudo(source: bytes, destination: bytes, length: int, protocol: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!IxxxB", length, protocol)


def _ip_packet(
    source: ipaddress.IPv4Address | ipaddress.IPv6Address,
    destination: ipaddress.IPv4Address | ipaddress.IPv6Address,
    port: int | None,
    body: bytes,
) -> bytes:
    """An IP packet with a UDP datagram to ``port``, or with an echo request when that is None."""
    v4 = source.version == 4
    ends = source.packed, ipaddress.ip_address(str(destination).split("%")[0]).packed
    if port is not None:
        protocol = socket.IPPROTO_UDP
        from_port = 32768 + int.from_bytes(secrets.token_bytes(2), "big") // 4
        bare = struct.pack("!HHHH", from_port, port, 8 + len(body), 0) + body
        check = checksum(_pseudo(*ends, len(bare), protocol) + bare) or 0xFFFF
        inner = bare[:6] + struct.pack("!H", check) + body
    elif v4:
        protocol, inner = socket.IPPROTO_ICMP, _echo(8, body)
    else:
        protocol = socket.IPPROTO_ICMPV6
        inner = _echo(128, body, _pseudo(*ends, 8 + len(body), protocol))
    if not v4:
        return struct.pack("!IHBB", 6 << 28, len(inner), protocol, 64) + b"".join(ends) + inner
    number = int.from_bytes(secrets.token_bytes(2), "big")
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(inner), number, 0, 64, protocol, 0)
    head += b"".join(ends)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + inner


def _arp_request(mac: bytes, own: bytes, wanted: bytes) -> bytes:
    head = struct.pack("!HHBBH", 1, _ETH_IPV4, 6, 4, 1)
    return _BROADCAST + mac + struct.pack("!H", _ETH_ARP) + head + mac + own + bytes(6) + wanted


def _arp_answer(frame: bytes) -> tuple[bytes, bytes] | None:
    if len(frame) < 42 or frame[12:22] != struct.pack("!HHHBBH", _ETH_ARP, 1, _ETH_IPV4, 6, 4, 2):
        return None
    return frame[28:32], frame[22:28]


def _solicitation(mac: bytes, own: bytes, wanted: bytes) -> bytes:
    group = ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + wanted[13:]
    bare = struct.pack("!BBHI", 135, 0, 0, 0) + wanted + b"\x01\x01" + mac
    check = checksum(_pseudo(own, group, len(bare), socket.IPPROTO_ICMPV6) + bare)
    inner = bare[:2] + struct.pack("!H", check) + bare[4:]
    head = struct.pack("!IHBB", 6 << 28, len(inner), socket.IPPROTO_ICMPV6, 255) + own + group
    return b"\x33\x33" + group[12:] + mac + struct.pack("!H", _ETH_IPV6) + head + inner


def _advertisement(frame: bytes) -> tuple[bytes, bytes] | None:
    if len(frame) < 78 or frame[12:14] != struct.pack("!H", _ETH_IPV6):
        return None
    if frame[20] != socket.IPPROTO_ICMPV6 or frame[54] != 136:
        return None
    return frame[62:78], frame[6:12]


# This host's interfaces.


def interfaces() -> list[dict[str, Any]]:
    """Every interface that is up, but the loopback: name, mac, addresses with prefix length."""
    found = []
    addresses = _kernel_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for index, name in socket.if_nameindex():
            request = struct.pack("16s24x", name.encode())
            try:
                flags = fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
                hardware = fcntl.ioctl(sock, _SIOCGIFHWADDR, request)
            except OSError:
                continue  # it has just gone
            (bits,) = struct.unpack_from("=H", flags, 16)
            if bits & _IFF_LOOPBACK or not bits & _IFF_UP:
                continue
            own = [a for a in addresses if a["index"] == index]
            found.append(
                {
                    "name": name,
                    "mac": hardware[18:24].hex(":"),
                    "addresses": [
                        {"address": a["address"], "prefix_length": a["prefix_length"]} for a in own
                    ],
                }
            )
    return found


def own_addresses() -> list[str]:
    """Every address of this host, also those of the loopback interface."""
    return sorted({a["address"] for a in _kernel_addresses()})


def _kernel_addresses() -> list[dict[str, Any]]:
    """Addresses from the kernel (RTM_GETADDR): /proc and ioctl leave out some of IPv4's."""
    request = struct.pack("=IHHII BBBBI", 24, 22, 0x301, 1, 0, 0, 0, 0, 0, 0)
    found = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(5)
        sock.sendto(request, (0, 0))
        for kind, body in _netlink_messages(sock):
            if kind != 20:  # RTM_NEWADDR
                continue
            family, prefix_length, _flags, _scope, index = struct.unpack_from("=BBBBI", body)
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            attributes = dict(_attributes(body[8:]))
            # IFA_LOCAL is the own end of a point-to-point link, where IFA_ADDRESS is the other.
            packed = attributes.get(2) or attributes.get(1)
            if packed:
                found.append(
                    {
                        "index": index,
                        "address": str(ipaddress.ip_address(packed)),
                        "prefix_length": prefix_length,
                    }
                )
    return found


def _netlink_messages(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        data = sock.recv(65536)
        while len(data) >= 16:
            length, kind, _flags, _seq, _pid = struct.unpack_from("=IHHII", data)
            if kind in (2, 3) or length < 16:  # NLMSG_ERROR, NLMSG_DONE
                return
            yield kind, data[16:length]
            data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


# As a program, where this file is all that there is: in a job, in a network slot.


def main(given: Mapping[str, Any] | None = None) -> None:
    """Tries ``targets`` for ``timeout_ms`` and prints ``results``; from standard input unless given."""
    asked = json.load(sys.stdin) if given is None else given
    print(json.dumps({"results": probe(asked["targets"], asked["timeout_ms"])}))


if __name__ == "__main__":
    main()
