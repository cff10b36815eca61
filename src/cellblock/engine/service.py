"""The supervisor: a root service on a unix socket that runs jobs for one group.

What is said on the socket: see :mod:`cellblock.engine.protocol`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import grp
import json
import logging
import os
import pwd
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ..errors import (
    Cancelled,
    CellblockError,
    HostSetupError,
    InternalError,
    InvalidJobError,
    ServiceUnavailableError,
)
from ..job_network.plan import INTERFACE
from ..linux.sd_notify import notify
from ..validate import Value, show
from . import protocol
from .batch import run_all
from .host import Host
from .job_parser import parse_job, parse_stage
from .run import CheckedJob, Engine

GROUP = "cellblock"
"""Members of this group, and root, may submit jobs."""
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
    notify("READY=1")
    _log.info(
        "ready: %d jobs at a time, %s",
        engine.host.parallel_jobs,
        ", ".join(engine.host.environments()),
    )
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
            _turn_away(connection)


def _turn_away(connection: socket.socket) -> None:
    """Says that there is no room, as far as that takes no waiting."""
    problem = ServiceUnavailableError(
        "service",
        "cannot start another thread now",
        "run the job again when this host has less to do",
    )
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(json.dumps({"error": problem.as_dict()}).encode() + b"\n")


def reconfigure_on_hangup(engine: Engine, load: Callable[[], Host]) -> None:
    """From now on SIGHUP (``systemctl reload``) has ``engine`` take over its configuration as ``load`` finds it
    then; where that takes a restart, or is wrong, the journal says so, and all stays as it is."""

    one_at_a_time = threading.Lock()

    def reconfigure() -> None:
        try:
            with one_at_a_time:  # so that who read the newest file comes last
                is_done = engine.reconfigure(load())
        except HostSetupError as problem:
            _log.error("not reconfigured: %s", problem)
            return
        _log.info("reconfigured" if is_done else "not reconfigured: this change takes a restart")

    # Not in the handler itself, which may find the pool's lock taken.
    signal.signal(
        signal.SIGHUP, lambda *_: threading.Thread(target=reconfigure, daemon=True).start()
    )


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

    @contextlib.contextmanager
    def more(self, uid: int, wanted: int) -> Iterator[int]:
        """Counts up to ``wanted`` more of ``uid``, as many as there is room for: jobs side by side of
        one request weigh what they would on connections of their own."""
        with self._lock:
            allowed = MAX_CONNECTIONS if uid == 0 else MAX_CONNECTIONS_PER_USER
            room = min(allowed - self._of[uid], MAX_CONNECTIONS - self._of.total())
            granted = max(0, min(wanted, room))
            self._of[uid] += granted
        try:
            yield granted
        finally:
            with self._lock:
                self._of[uid] -= granted


def _answer(engine: Engine, connection: socket.socket, connections: _Connections) -> None:
    with connection:
        try:
            with connections.of(uid := _authorized_uid(connection)):
                request = _receive(connection)
                if request.get("op") == "slot":
                    _hold_slot(engine, connection, request.get("slot"), uid)
                    return
                with contextlib.closing(
                    _answers(
                        engine,
                        request,
                        lambda: _is_gone(connection),
                        functools.partial(connections.more, uid),
                    )
                ) as answers:
                    for answer in answers:
                        _send(connection, answer)
        except (Cancelled, ConnectionError, _NotRead):
            _log.info("client went away or did not read its answer; its jobs were ended")
        except CellblockError as problem:
            _send_last(connection, problem)
        except Exception:
            # A defect of ours must end neither the service nor the caller without a word.
            _log.exception("request failed")
            _send_last(
                connection,
                InternalError(
                    "service", "failed unexpectedly", "see the journal of cellblock.service"
                ),
            )


def _answers(
    engine: Engine,
    request: dict[str, Any],
    cancelled: Callable[[], bool],
    more: Callable[[int], contextlib.AbstractContextManager[int]],
) -> Generator[dict[str, Any], None, None]:
    """The lines of the answer to ``request``; ``more`` grants threads besides this one."""
    op = request.get("op")
    if op == "environments":
        environments = engine.host.environments()
        yield {"result": {name: env.description for name, env in environments.items()}}
    elif op in ("check", "run"):
        # It may be large, and nobody needs it while the jobs run.
        jobs = _checked(engine, request.pop("jobs", None), cancelled)
        if isinstance(jobs, dict):
            yield jobs
            return
        if op == "check":
            yield {"result": {}}
            return
        with more(min(len(jobs), engine.host.parallel_jobs) - 1) as granted:
            for number, outcome in enumerate(run_all(engine, jobs, cancelled, 1 + granted)):
                if isinstance(outcome, CellblockError):
                    yield {"job": number, "error": outcome.as_dict()}
                else:
                    yield {"job": number, "result": outcome.as_dict()}
    else:
        raise ServiceUnavailableError(
            "service", f"does not know the operation {op!r}", "use a client of the same version"
        )


def _checked(
    engine: Engine, jobs: Any, cancelled: Callable[[], bool]
) -> list[CheckedJob] | dict[str, Any]:
    """All of ``jobs`` as they will run, or the line that says which of them is refused and why."""
    checked: list[CheckedJob] = []
    for value in Value(jobs, "jobs", InvalidJobError).list():
        if cancelled():
            raise Cancelled
        try:
            checked.append(engine.check(parse_job(value.raw)))
        except CellblockError as problem:
            return {"error": problem.as_dict(), "refused": len(checked)}
    return checked


class _NotRead(Exception):
    """The client takes no answer."""


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    try:
        connection.settimeout(SEND_TIMEOUT_S)
        connection.sendall(json.dumps(answer).encode() + b"\n")
    except OSError:
        raise _NotRead from None


def _send_last(connection: socket.socket, problem: CellblockError) -> None:
    try:
        _send(connection, {"error": problem.as_dict()})
    except _NotRead:
        _log.info("client went away before its answer, or did not read it")


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
    stage = parse_stage(
        Value({"name": "slot", "command": ["slot"], **wanted}, "slot", InvalidJobError)
    )
    with engine.hold_slot(stage, lambda: _is_gone(connection)) as slot:
        result = {
            "address": str(slot.address),
            "ipv6": None if slot.ipv6_address is None else str(slot.ipv6_address),
            "interface": INTERFACE,
        }
        line = json.dumps({"result": result}).encode() + b"\n"
        socket.send_fds(connection, [line], [slot.namespace])
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass


def _authorized_uid(connection: socket.socket) -> int:
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


def _receive(connection: socket.socket) -> dict[str, Any]:
    """The request, of this version of the protocol."""
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
        if len(data) > protocol.MAX_REQUEST_BYTES:
            raise ServiceUnavailableError(
                "request",
                f"is larger than {protocol.MAX_REQUEST_BYTES} bytes",
                "send smaller files",
            )
    connection.settimeout(None)
    if protocol.structure(data) > protocol.MAX_STRUCTURE:
        raise ServiceUnavailableError(
            "request",
            "has too many parts",
            "send contents as base64, as the cellblock command does",
        )
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        raise ServiceUnavailableError(
            "request", "is not a line of JSON", "use the cellblock command"
        ) from None
    version = request.get("version") if isinstance(request, dict) else None
    if version != protocol.VERSION:
        raise ServiceUnavailableError(
            "request",
            f"is in version {show(version)} of the protocol, this service speaks {protocol.VERSION}",
            "use the cellblock command of this host's engine",
        )
    return dict(request)


def _is_gone(connection: socket.socket) -> bool:
    poller = select.poll()  # select(2) knows descriptors below 1024 only
    # Not by what is left to read: a byte too many would hide the end behind it.
    poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(0))
