# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A process that answers probes for a short while, where no service does, and notes what came.

It dies by itself when its time is over, whatever becomes of who started it; all that it has on
disk is a socket in a directory of its own under /run. Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.cellblock.fleet.plugins.module_utils._network_probe import (
    ANSWER,
    ASK,
    ProbeError,
    answer_to,
    digest,
    interfaces,
)

STATE_DIR = "/run/cellblock-probe"
LONGEST_S = 3600

_MOST_RECORDS = 20000
_MOST_CONNECTIONS = 256
_CONNECTION_S = 2.0
_TICK_S = 0.5
_IP_PKTINFO, _ICMP_FILTER, _ICMP6_FILTER, _SOL_RAW = 8, 1, 1, 255
_SYN_RECEIVED = "03"  # in /proc/net/tcp

Listener = Mapping[str, Any]


def listen(
    listeners: Sequence[Listener], duration_s: int, state_dir: str = STATE_DIR
) -> dict[str, Any]:
    """Serve ``listeners`` for ``duration_s`` from now on, in a process of its own.

    A process that serves exactly these goes on, with its time counted anew; one that serves others
    is ended first. Returns ``handle`` and ``listeners``, each with what became of it for ipv4 and
    ipv6: ``listening``, ``busy`` (a service has the port) or why it could not be.
    """
    check_listeners(listeners)
    wanted = [_plain(listener) for listener in listeners]
    renewed = _ask(state_dir, {"do": "renew", "listeners": wanted, "duration_s": duration_s})
    if renewed and renewed.get("is_renewed"):
        return {"handle": renewed["handle"], "listeners": renewed["listeners"]}
    if renewed:
        collect(state_dir)
    if not wanted:
        return {"handle": None, "listeners": []}
    server = _Server(wanted, duration_s, state_dir)
    server.open()
    try:
        _daemonise(server)
    finally:
        server.close_sockets()
    return {"handle": server.handle, "listeners": server.status}


def main(given: Mapping[str, Any]) -> None:
    """As ``listen``, but in this process, which prints what ``listen`` returns and its interfaces."""
    wanted = [_plain(entry) for entry in given["listeners"]]
    server = _Server(wanted, given["duration_s"], given["state_dir"])
    server.open()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, server.told_to_end)
    started = {"handle": server.handle, "listeners": server.status, "interfaces": interfaces()}
    print(json.dumps(started), flush=True)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    server.serve()


def process_of(state_dir: str = STATE_DIR) -> int | None:
    """The id of the listening process; None when there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        try:
            sock.connect(f"{state_dir}/control")
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return None
    pid: int = struct.unpack("=iII", credentials)[0]
    return pid


def collect(state_dir: str = STATE_DIR) -> dict[str, Any]:
    """End the process and return what it noted; ``was_running`` is false when there was none."""
    answer = _ask(state_dir, {"do": "collect"})
    _remove_leftovers(state_dir)
    if answer is None:
        return {"was_running": False, "handle": None, "received": [], "half_open": []}
    return {"was_running": True, **answer}


def check_listeners(listeners: Sequence[Listener]) -> None:
    """Raises ProbeError for the first listener that makes no sense, naming it and its field."""
    seen: set[str] = set()
    for listener in listeners:
        name, port = listener["id"], listener.get("port")
        if name in seen:
            raise ProbeError(f"listeners: the id {name} is given twice; ids must differ.")
        seen.add(name)
        if listener["protocol"] == "icmp":
            continue
        if port is None:
            raise ProbeError(f"listener {name}: port is missing; {listener['protocol']} needs one.")
        if not 1 <= port <= 65535:
            raise ProbeError(f"listener {name}: port is {port}; use 1 to 65535.")


def _plain(listener: Listener) -> dict[str, Any]:
    return {
        "id": str(listener["id"]),
        "protocol": str(listener["protocol"]),
        "port": listener.get("port"),
        "payload": str(listener.get("payload") or "nonce"),
    }


def _daemonise(server: _Server) -> None:
    """Run ``server`` in a process that belongs to nobody: not to the session, nor its terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        # The connection to the controller is among these; it would stay open with them.
        nothing = os.open(os.devnull, os.O_RDWR)
        kept = server.descriptors()
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        # Should the loop ever hang, the kernel still ends the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, server.told_to_end)
        signal.signal(signal.SIGINT, server.told_to_end)
        server.serve()
        status = 0
    finally:
        os._exit(status)


def _ask(state_dir: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of the running process; None when none is running."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        try:
            sock.connect(f"{state_dir}/control")
            sock.sendall(json.dumps(request).encode() + b"\n")
            sock.shutdown(socket.SHUT_WR)
            data = b""
            while True:
                part = sock.recv(1 << 16)
                if not part:
                    break
                data += part
        except OSError:
            return None
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        return None
    return answer


def _remove_leftovers(state_dir: str) -> None:
    """What a process that was killed could not remove itself."""
    if os.path.isdir(state_dir) and not os.path.islink(state_dir):
        shutil.rmtree(state_dir, ignore_errors=True)


def _now() -> float:
    # Goes on while the machine sleeps, so that no listener outlives its time that way.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Server:
    def __init__(self, listeners: list[dict[str, Any]], duration_s: int, state_dir: str) -> None:
        self.listeners = listeners
        self.duration_s = duration_s
        self.state_dir = state_dir
        self.handle = secrets.token_hex(8)
        self.status: list[dict[str, Any]] = []
        self.sockets: list[tuple[str, dict[str, Any], socket.socket]] = []
        self.control: socket.socket | None = None
        self.received: dict[tuple[Any, ...], int] = {}
        self.half_open: set[tuple[str, int, int]] = set()
        self.is_incomplete = False
        self.connections: dict[socket.socket, float] = {}
        self.is_ending = False

    # In the process that starts it, so that what cannot be served is known at once.

    def open(self) -> None:
        self._open_control()
        for listener in self.listeners:
            status = dict(listener)
            for name, family in (("ipv4", socket.AF_INET), ("ipv6", socket.AF_INET6)):
                try:
                    sock = _bound(listener, family)
                except OSError as problem:
                    status[name] = (
                        "busy"
                        if problem.errno == errno.EADDRINUSE
                        else f"impossible: {os.strerror(problem.errno or 0)}"
                    )
                else:
                    status[name] = "listening"
                    self.sockets.append((name, listener, sock))
            self.status.append(status)

    def _open_control(self) -> None:
        _remove_leftovers(self.state_dir)
        try:
            os.mkdir(self.state_dir, 0o700)
            made = os.lstat(self.state_dir)
            if not stat.S_ISDIR(made.st_mode) or made.st_uid != os.geteuid():
                raise ProbeError(f"{self.state_dir} is somebody else's; remove it.")
            self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.control.bind(f"{self.state_dir}/control")
            self.control.listen(8)
            self.control.setblocking(False)
        except OSError as problem:
            raise ProbeError(
                f"{self.state_dir} cannot be made ({problem.strerror}); run as root (become: true)."
            ) from None

    def descriptors(self) -> set[int]:
        assert self.control is not None
        return {self.control.fileno(), *(sock.fileno() for _, _, sock in self.sockets)}

    def close_sockets(self) -> None:
        for _, _, sock in self.sockets:
            sock.close()
        if self.control is not None:
            self.control.close()

    # In the process itself.

    def told_to_end(self, _signal: int, _frame: Any) -> None:
        self.is_ending = True

    def serve(self) -> None:
        assert self.control is not None
        self._live_for(self.duration_s)
        selector = selectors.DefaultSelector()
        selector.register(self.control, selectors.EVENT_READ, None)
        for name, listener, sock in self.sockets:
            selector.register(sock, selectors.EVENT_READ, (name, listener))
        scanned_at = 0.0
        while not self.is_ending and _now() < self.ends_at:
            for key, _events in selector.select(min(_TICK_S, max(0.0, self.ends_at - _now()))):
                try:
                    if key.data is None:
                        self._control()
                    else:
                        name, listener = key.data
                        self._serve_one(name, listener, key.fileobj)
                except OSError:
                    pass  # what one peer does is no reason to leave the others
            self._end_connections()
            if _now() - scanned_at >= _TICK_S:
                self._note_half_open()
                scanned_at = _now()
        self._leave()

    def _live_for(self, duration_s: int) -> None:
        self.ends_at = _now() + duration_s
        signal.alarm(duration_s + 5)

    def _leave(self) -> None:
        # In this order: who sees that the directory is gone finds the ports free.
        for _, _, sock in self.sockets:
            sock.close()
        _remove_leftovers(self.state_dir)

    def _control(self) -> None:
        assert self.control is not None
        peer, _ = self.control.accept()
        with peer:
            peer.settimeout(2)
            request = b""
            while not request.endswith(b"\n"):
                part = peer.recv(1 << 16)
                if not part:
                    return
                request += part
            asked = json.loads(request)
            if asked["do"] == "renew":
                is_renewed = asked["listeners"] == self.listeners
                if is_renewed:
                    self._live_for(asked["duration_s"])
                answer = {
                    "is_renewed": is_renewed,
                    "handle": self.handle,
                    "listeners": self.status,
                }
            else:
                # What came in the meantime is still in the sockets.
                self._drain()
                self._note_half_open()
                answer = self._account()
                self.is_ending = True
                # The one who asked shall find nothing left: who listens again at once would take a
                # port that is still held for a service's.
                for _, _, sock in self.sockets:
                    sock.close()
                self._leave()
            peer.sendall(json.dumps(answer).encode())

    def _drain(self) -> None:
        for name, listener, sock in self.sockets:
            with contextlib.suppress(OSError):
                for _ in range(_MOST_RECORDS):
                    self._serve_one(name, listener, sock)

    def _serve_one(self, name: str, listener: dict[str, Any], sock: Any) -> None:
        if listener["protocol"] == "tcp":
            self._accept(name, listener, sock)
        elif listener["protocol"] == "udp":
            self._answer(name, listener, sock)
        else:
            self._note_echo(name, listener, sock)

    def _accept(self, name: str, listener: dict[str, Any], sock: socket.socket) -> None:
        peer, source = sock.accept()
        self._note(name, listener, source, peer.getsockname()[0], "")
        try:
            peer.setblocking(False)
            peer.send(ANSWER + self.handle.encode() + b"\r\n")
            peer.shutdown(socket.SHUT_WR)
        except OSError:
            peer.close()
            return
        if len(self.connections) >= _MOST_CONNECTIONS:
            oldest = next(iter(self.connections))
            del self.connections[oldest]
            oldest.close()
        self.connections[peer] = _now() + _CONNECTION_S

    def _end_connections(self) -> None:
        """Closes those whose peer has closed too, and those that take too long."""
        now = _now()
        for peer, ends_at in list(self.connections.items()):
            is_over = now >= ends_at
            try:
                while not is_over:
                    is_over = not peer.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                is_over = True
            if is_over:
                del self.connections[peer]
                peer.close()

    def _answer(self, name: str, listener: dict[str, Any], sock: socket.socket) -> None:
        data, ancillary, _flags, source = sock.recvmsg(2048, 256)
        at, reply = _received_at(ancillary)
        self._note(name, listener, source, at, digest(data))
        answer = answer_to(listener["payload"], data)
        if answer is not None:
            # From the address that was asked, not from the one that the route would choose.
            sock.sendmsg([answer], reply, 0, source)

    def _note_echo(self, name: str, listener: dict[str, Any], sock: socket.socket) -> None:
        """The kernel answers an echo request; a raw socket sees it once the filter let it in."""
        data, source = sock.recvfrom(2048)
        at = ""
        if name == "ipv4":
            at = socket.inet_ntop(socket.AF_INET, data[16:20])
            data = data[(data[0] & 15) * 4 :]
        if data[8:].startswith(ASK):
            self._note(name, listener, (source[0], 0), at, digest(data[8:]))

    def _note(
        self, name: str, listener: dict[str, Any], source: tuple[Any, ...], at: str, payload: str
    ) -> None:
        address = str(source[0]).split("%")[0]
        key = (listener["id"], name, address, source[1], str(at).split("%")[0], payload)
        if key not in self.received and len(self.received) >= _MOST_RECORDS:
            self.is_incomplete = True
            return
        self.received[key] = self.received.get(key, 0) + 1

    def _note_half_open(self) -> None:
        """Connections whose SYN came in, and whose handshake nobody finished."""
        ports = {entry["port"] for entry in self.listeners if entry["protocol"] == "tcp"}
        if not ports:
            return
        for path in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
            with contextlib.suppress(OSError), open(path, encoding="ascii") as table:
                for line in table:
                    fields = line.split()
                    if len(fields) < 4 or fields[3] != _SYN_RECEIVED:
                        continue
                    _, port = _endpoint(fields[1])
                    if port in ports and len(self.half_open) < _MOST_RECORDS:
                        self.half_open.add((*_endpoint(fields[2]), port))

    def _account(self) -> dict[str, Any]:
        names = ("listener", "family", "source", "source_port", "address", "payload")
        return {
            "handle": self.handle,
            "is_incomplete": self.is_incomplete,
            "received": [
                {**dict(zip(names, key)), "count": count}  # noqa: B905 -- Python 3.9
                for key, count in sorted(self.received.items())
            ],
            "half_open": [
                {"source": source, "source_port": source_port, "port": port}
                for source, source_port, port in sorted(self.half_open)
            ],
        }


def _bound(listener: Mapping[str, Any], family: int) -> socket.socket:
    protocol = listener["protocol"]
    v4 = family == socket.AF_INET
    if protocol == "icmp":
        number = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
        sock = socket.socket(family, socket.SOCK_RAW, number)
        if v4:
            sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << 8) & 0xFFFFFFFF))
        else:
            blocked = [0xFFFFFFFF] * 8
            blocked[128 // 32] &= ~(1 << (128 % 32))
            sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *blocked))
        sock.setblocking(False)
        return sock
    sock = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        if protocol == "tcp":
            # For what an earlier run left in TIME_WAIT. Not for UDP: there it would take the
            # datagrams of a service that set it too.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif v4:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        if not v4:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("0.0.0.0" if v4 else "::", listener["port"]))
        if protocol == "tcp":
            sock.listen(128)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _received_at(
    ancillary: Sequence[tuple[int, int, bytes]],
) -> tuple[str, list[tuple[int, int, bytes]]]:
    """The address at which a datagram came in, and what makes the answer leave from it."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            index, local, _destination = struct.unpack("=I4s4s", data[:12])
            reply = struct.pack("=I4s4s", 0, local, bytes(4))
            return socket.inet_ntop(socket.AF_INET, local), [(level, kind, reply)]
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            packed, index = struct.unpack("=16sI", data[:20])
            is_link_local = packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
            reply = struct.pack("=16sI", packed, index if is_link_local else 0)
            return socket.inet_ntop(socket.AF_INET6, packed), [(level, kind, reply)]
    return "", []


def _endpoint(text: str) -> tuple[str, int]:
    """An address and port as /proc/net/tcp writes them: words in the byte order of this host."""
    address, _, port = text.partition(":")
    words = struct.pack(
        f"={len(address) // 8}I", *(int(address[i : i + 8], 16) for i in range(0, len(address), 8))
    )
    family = socket.AF_INET if len(words) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, words), int(port, 16)
