"""The supervisor: a root service on a unix socket that runs jobs for one group.

Protocol: the client sends one JSON object on one line and keeps the connection open; the service
answers with one line, ``{"result": ...}`` or ``{"error": ...}``. A client that goes away ends its job.

    {"op": "run", "job": {...}}     -> the job's record
    {"op": "check", "job": {...}}   -> {} when this host would run it
    {"op": "environments"}          -> {name: description}
    {"op": "slot", "slot": {...}}   -> {address, interface}, and the descriptor of a network slot's
                                       namespace; the slot is held while the client stays connected.
                                       For root only
"""

from __future__ import annotations

import collections
import contextlib
import grp
import json
import logging
import os
import pwd
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import CellblockError, HostSetupError, InternalError, ServiceUnavailableError
from ..job_network.network import INTERFACE
from .admission import Cancelled
from .engine import Engine
from .job_parser import MAX_INPUT_BYTES, parse_job

GROUP = "cellblock"
"""Members of this group, and root, may submit jobs."""
MAX_REQUEST_BYTES = 2 * MAX_INPUT_BYTES
"""Room for the largest job in base64, and its stages."""
MAX_STRUCTURE = 100_000
"""Brackets and commas of a request. Contents are one string each (clients send base64), so a request
needs few; parsing millions of them would hold up the supervision of running jobs."""
MAX_CONNECTIONS = 4096
MAX_CONNECTIONS_PER_USER = 256
"""Of each user but root."""
RECEIVE_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 60.0
_FIRST_PASSED_FD = 3
_PEER = struct.Struct("3i")
_log = logging.getLogger("cellblock")


def serve(engine: Engine, listener: socket.socket) -> None:
    """Answers requests on ``listener`` until the process ends."""
    _notify("READY=1")
    _log.info("ready: %d slots, %s", engine.host.slots, ", ".join(engine.host.environments()))
    connections = _Connections()
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as problem:
            # Out of descriptors or memory: those who are connected go on, the next one waits.
            _log.warning("cannot accept a connection: %s", problem.strerror)
            time.sleep(0.1)
            continue
        try:
            threading.Thread(
                target=_answer, args=(engine, connection, connections), daemon=True
            ).start()
        except RuntimeError:
            _log.warning("cannot start a thread for a connection")
            connection.close()


def listen_fd() -> socket.socket:
    """The socket that systemd made (sd_listen_fds(3)); raises :class:`HostSetupError`."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise HostSetupError(
            "cellblock serve",
            "was not started by cellblock.socket",
            "systemctl start cellblock.socket",
        )
    return socket.socket(fileno=_FIRST_PASSED_FD)


class _Connections:
    """How many connections there are, and of whom."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: collections.Counter[int] = collections.Counter()

    @contextlib.contextmanager
    def of(self, uid: int) -> Iterator[None]:
        """Counts one of ``uid``; raises :class:`ServiceUnavailableError` when there are too many."""
        with self._lock:
            allowed = MAX_CONNECTIONS if uid == 0 else MAX_CONNECTIONS_PER_USER
            if self._of[uid] >= allowed or self._of.total() >= MAX_CONNECTIONS:
                raise ServiceUnavailableError(
                    "service",
                    "has too many connections of this user or in all",
                    f"keep at most {MAX_CONNECTIONS_PER_USER} jobs waiting at a time",
                )
            self._of[uid] += 1
        try:
            yield
        finally:
            with self._lock:
                self._of[uid] -= 1


def _answer(engine: Engine, connection: socket.socket, connections: _Connections) -> None:
    with connection:
        try:
            with connections.of(uid := _check_peer(connection)):
                request = _receive(connection)
                if isinstance(request, dict) and request.get("op") == "slot":
                    _hold_slot(engine, connection, request.get("slot"), uid)
                    return
                answer: dict[str, Any] = {
                    "result": _dispatch(engine, request, lambda: _is_gone(connection))
                }
        except (Cancelled, ConnectionError):
            _log.info("client went away; its job was ended")
            return
        except CellblockError as problem:
            answer = {"error": problem.as_dict()}
        except Exception:
            # A defect of ours must end neither the service nor the caller without a word.
            _log.exception("request failed")
            answer = {
                "error": InternalError(
                    "service", "failed unexpectedly", "see the journal of cellblock.service"
                ).as_dict()
            }
        try:
            connection.settimeout(SEND_TIMEOUT_S)
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            _log.info("client went away before its answer, or did not read it")


def _dispatch(engine: Engine, request: Any, cancelled: Callable[[], bool]) -> dict[str, Any]:
    op = request.get("op") if isinstance(request, dict) else None
    if op == "run":
        return engine.run(parse_job(request.get("job")), cancelled).as_dict()
    if op == "check":
        engine.check(parse_job(request.get("job")))
        return {}
    if op == "environments":
        return {name: env.description for name, env in engine.host.environments().items()}
    raise ServiceUnavailableError(
        "service", f"does not know the operation {op!r}", "use a client of the same version"
    )


def _hold_slot(engine: Engine, connection: socket.socket, wanted: Any, uid: int) -> None:
    """Until the client goes away. Who is inside as root is bound by the slot's filter only."""
    if uid != 0:
        raise ServiceUnavailableError("slot", "is for root only", "run the command as root")
    if not isinstance(wanted, dict) or not set(wanted) <= {
        "network",
        "network_allow",
        "constraints",
    }:
        raise ServiceUnavailableError(
            "slot", "is not a request for a slot", "use the cellblock command"
        )
    stage = {"name": "slot", "command": ["slot"], **wanted}
    parsed = parse_job({"environment": "slot", "stages": [stage]}).stages[0]
    with engine.hold_slot(parsed, lambda: _is_gone(connection)) as slot:
        address, ipv6 = str(slot.address), slot.ipv6_address
        answer = {
            "result": {
                "address": address,
                "ipv6": None if ipv6 is None else str(ipv6),
                "interface": INTERFACE,
            }
        }
        socket.send_fds(connection, [json.dumps(answer).encode() + b"\n"], [slot.namespace])
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass


def _check_peer(connection: socket.socket) -> int:
    """The uid of a peer that may submit. The socket's mode says the same; this holds should the
    mode ever be wrong."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, gid = _PEER.unpack(credentials)
    if uid == 0:
        return 0
    try:
        allowed = grp.getgrnam(GROUP).gr_gid
        name = pwd.getpwuid(uid).pw_name
        groups = os.getgrouplist(name, gid)
    except KeyError:
        allowed, name, groups = -1, str(uid), []
    if allowed not in groups:
        raise ServiceUnavailableError(
            f"user {name}", "may not submit jobs", f"add the user to the group {GROUP}"
        )
    return int(uid)


def _receive(connection: socket.socket) -> Any:
    data = bytearray()
    deadline = time.monotonic() + RECEIVE_TIMEOUT_S
    while not data.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            chunk = connection.recv(1 << 20)
        except TimeoutError:
            raise ServiceUnavailableError(
                "request",
                f"was not complete after {RECEIVE_TIMEOUT_S:.0f} s",
                "send it as one line of JSON",
            ) from None
        if not chunk:
            raise ConnectionError
        data += chunk
        if len(data) > MAX_REQUEST_BYTES:
            raise ServiceUnavailableError(
                "request", f"is larger than {MAX_REQUEST_BYTES} bytes", "send smaller files"
            )
    connection.settimeout(None)
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MAX_STRUCTURE:
        raise ServiceUnavailableError(
            "request",
            "has too many parts",
            "send contents as base64, as the cellblock command does",
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ServiceUnavailableError(
            "request", "is not a line of JSON", "use the cellblock command"
        ) from None


def _is_gone(connection: socket.socket) -> bool:
    poller = select.poll()  # select(2) knows descriptors below 1024 only
    poller.register(connection, select.POLLIN)
    if not poller.poll(0):
        return False
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def _notify(state: str) -> None:
    """sd_notify(3): systemd then knows that the service is ready."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        notifier.sendall(state.encode())
