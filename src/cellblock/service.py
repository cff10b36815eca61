"""The supervisor: a root service on a unix socket that runs jobs for one group.

Protocol: the client sends one JSON object on one line and keeps the connection open; the service
answers with one line, ``{"result": ...}`` or ``{"error": ...}``. A client that goes away ends its job.

    {"op": "run", "job": {...}}     -> the job's record
    {"op": "check", "job": {...}}   -> {} when this host would run it
    {"op": "environments"}          -> {name: description}
"""

from __future__ import annotations

import grp
import json
import logging
import os
import pwd
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from cellblock.admission import Cancelled
from cellblock.engine import Engine
from cellblock.errors import CellblockError, HostSetupError, InternalError, ServiceUnavailableError
from cellblock.job import MAX_INPUT_BYTES, parse_job

GROUP = "cellblock"
"""Members of this group, and root, may submit jobs."""
MAX_REQUEST_BYTES = 2 * MAX_INPUT_BYTES
"""Room for the largest job in base64, and its stages."""
_FIRST_PASSED_FD = 3
_PEER = struct.Struct("3i")
_log = logging.getLogger("cellblock")


def serve(engine: Engine, listener: socket.socket) -> None:
    """Answers requests on ``listener`` until the process ends."""
    _notify("READY=1")
    _log.info("ready: %d slots, %s", engine.host.slots, ", ".join(engine.host.environments()))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(engine, connection), daemon=True).start()


def listen_fd() -> socket.socket:
    """The socket that systemd made (sd_listen_fds(3)); raises :class:`HostSetupError`."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise HostSetupError(
            "cellblock serve",
            "was not started by cellblock.socket",
            "systemctl start cellblock.socket",
        )
    return socket.socket(fileno=_FIRST_PASSED_FD)


def _answer(engine: Engine, connection: socket.socket) -> None:
    with connection:
        try:
            _check_peer(connection)
            request = _receive(connection)
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
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except ConnectionError:
            _log.info("client went away before its answer")


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


def _check_peer(connection: socket.socket) -> None:
    """The socket's mode says the same; this holds should the mode ever be wrong."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, gid = _PEER.unpack(credentials)
    if uid == 0:
        return
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


def _receive(connection: socket.socket) -> Any:
    data = bytearray()
    while not data.endswith(b"\n"):
        chunk = connection.recv(1 << 20)
        if not chunk:
            raise ConnectionError
        data += chunk
        if len(data) > MAX_REQUEST_BYTES:
            raise ServiceUnavailableError(
                "request", f"is larger than {MAX_REQUEST_BYTES} bytes", "send smaller files"
            )
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ServiceUnavailableError(
            "request", "is not a line of JSON", "use the cellblock command"
        ) from None


def _is_gone(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    if not readable:
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
