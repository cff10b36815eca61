"""The supervisor: a root service on a unix socket that runs jobs for one group.

One event loop answers all connections, so that those who wait cost next to nothing; it takes nothing apart, and
watches no job (see :mod:`cellblock.engine.workers`). What is said on the socket: :mod:`cellblock.engine.protocol`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import grp
import json
import logging
import os
import pickle
import pwd
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from ..errors import (
    CellblockError,
    HostSetupError,
    InternalError,
    InvalidJobError,
    ServiceUnavailableError,
)
from ..job_network.plan import INTERFACE
from ..job_network.policy import NetworkPolicy
from ..linux.sd_notify import notify
from ..validate import Value
from . import protocol
from .batch import run_all
from .host import Host
from .job_parser import parse_stage
from .request import Request, parse
from .run import CheckedJob, Engine
from .shares import Shares
from .spool import Spool, SpoolPart
from .tasks import settled
from .turns import Places

GROUP = "cellblock"
"""Members of this group, and root, may submit jobs."""
MAX_CONNECTIONS = 4096
MAX_CONNECTIONS_PER_USER = 256
"""Of each user but root."""
MAX_JOBS = 50_000
"""Jobs of all requests that have no record yet: some 4 KiB of memory each."""
MAX_JOBS_PER_USER = 10_000
MAX_PARSED_BYTES, MAX_PARSED_BYTES_PER_USER = 512 * 2**20, 128 * 2**20
"""Memory of requests that were taken apart, without what is in files."""
RECEIVE_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 60.0
"""For each :data:`_CHUNK_BYTES`."""
PARSED_AT_A_TIME, CHECKED_AT_A_TIME = 2, 8
"""Requests that are taken apart, and whose jobs are checked (which may wait for names to resolve)."""
_SMALL_BYTES = 16_384
"""A request up to that size is taken apart here: it takes less time than to hand it over."""
_FEW_STAGES = 16
"""So many are checked here, unless that may take long."""
_GROWTH, _GROWTH_OF_SMALL = 4, 64
"""How much more a request takes in memory than pickled, and than as text of nothing but the shortest stages."""
_CHUNK_BYTES = 256 * 1024
_CHATTER_BYTES = 65_536
"""What a client may send after its request; nobody reads it."""
_FIRST_PASSED_FD = 3
_PEER = struct.Struct("3i")
_log = logging.getLogger("cellblock")

T = TypeVar("T")


def serve(engine: Engine, listener: socket.socket, spool: Path, load: Callable[[], Host]) -> None:
    """Answers requests on ``listener`` until the process ends.

    ``spool`` is a directory for what is too large for memory. On SIGHUP (``systemctl reload``) ``engine`` takes over
    its configuration as ``load`` finds it then; where that takes a restart, or is wrong, the journal says so, and
    all stays as it is.
    """
    asyncio.run(_Service(engine, spool).run(listener, load))


def listen_fd() -> socket.socket:
    """The socket that systemd made (sd_listen_fds(3)); raises :class:`HostSetupError`."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise HostSetupError(
            "cellblock serve",
            "was not started by cellblock.socket",
            "systemctl start cellblock.socket",
        )
    return socket.socket(fileno=_FIRST_PASSED_FD)


class _NotRead(Exception):
    """The client takes no answer."""


class _Service:
    def __init__(self, engine: Engine, spool: Path) -> None:
        self._engine = engine
        self._spool = Spool(spool)
        self._connections = Shares(
            "many connections",
            MAX_CONNECTIONS,
            MAX_CONNECTIONS_PER_USER,
            f"keep at most {MAX_CONNECTIONS_PER_USER} requests waiting at a time",
        )
        self._jobs = Shares(
            "many jobs waiting",
            MAX_JOBS,
            MAX_JOBS_PER_USER,
            f"keep at most {MAX_JOBS_PER_USER} jobs waiting at a time",
        )
        self._parsing = Places(PARSED_AT_A_TIME)
        self._checking = Places(CHECKED_AT_A_TIME)
        self._parsed_bytes = Shares(
            "much waiting",
            MAX_PARSED_BYTES,
            MAX_PARSED_BYTES_PER_USER,
            "send fewer jobs at a time, and what is long in them as files",
        )
        self._check_threads = concurrent.futures.ThreadPoolExecutor(CHECKED_AT_A_TIME, "check")
        self._authorizing = concurrent.futures.ThreadPoolExecutor(2, "authorize")
        self._spool.on_change = engine.admit
        engine.admit_only(self._spool.has_room)
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[_Client] = set()

    async def run(self, listener: socket.socket, load: Callable[[], Host]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self._reconfigure(load)))
        listener.setblocking(False)
        notify("READY=1")
        _log.info(
            "ready: %d jobs at a time, %s",
            self._engine.host.parallel_jobs,
            ", ".join(self._engine.host.environments()),
        )
        self._start(self._beat())
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as problem:
                # Out of descriptors or memory: those who are connected go on, the next one waits.
                _log.warning("cannot accept a connection: %s", problem.strerror)
                await asyncio.sleep(0.1)
                continue
            self._start(self._serve(connection))
            await asyncio.sleep(0)  # those who are here already come first

    def _start(self, act: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(act)
        self._tasks.add(task)  # the loop itself does not keep it
        task.add_done_callback(self._tasks.discard)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(protocol.HEARTBEAT_S)
            for client in self._waiting:
                client.beat()

    async def _reconfigure(self, load: Callable[[], Host]) -> None:
        begun = time.time()
        try:
            is_done = self._engine.reconfigure(host := await asyncio.to_thread(load))
        except HostSetupError as problem:
            _log.error("not reconfigured: %s", problem)
            return
        if is_done:
            host.note_taken_over(begun)
        _log.info("reconfigured" if is_done else "not reconfigured: this change takes a restart")

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            client = _Client(connection)
            try:
                uid = _peer_uid(connection)
                with self._connections.of(uid), self._spool.part(uid) as spool:
                    if uid != 0:  # who belongs to a group may take asking a server
                        await _in_thread(self._authorizing, lambda: _authorize(connection))
                    line = await client.receive(spool)
                    answering = asyncio.create_task(self._answer(client, uid, line, spool))
                    self._waiting.add(client)
                    try:
                        await client.accompany(answering)
                    finally:
                        self._waiting.discard(client)
            except (ConnectionError, _NotRead):
                # Not for the journal: it is the client's to do that as often as it likes.
                _log.debug("client went away or did not read its answer; its jobs were ended")
            except CellblockError as problem:
                await client.send_last(problem)
            except Exception:
                # A defect of ours must end neither the service nor the caller without a word.
                _log.exception("request failed")
                await client.send_last(
                    InternalError(
                        "service", "failed unexpectedly", "see the journal of cellblock.service"
                    )
                )

    async def _answer(
        self, client: _Client, uid: int, line: bytes | Path, spool: SpoolPart
    ) -> None:
        if isinstance(line, bytes):
            with self._parsed_bytes.of(uid, len(line) * _GROWTH_OF_SMALL):
                await self._answer_request(client, uid, parse(line), spool)
            return
        async with self._parsing.place(uid):
            contents = spool.path()
            spool.take(line.stat().st_size)  # they are no larger than their encoding
            pickled = await self._engine.parse(line, contents)
        spool.remove(line)
        # Pickled by this program, from plain data that it has checked.
        with self._parsed_bytes.of(uid, len(pickled) * _GROWTH):
            request = pickle.loads(pickled)
            del pickled
            await self._answer_request(client, uid, request, spool)

    async def _answer_request(
        self, client: _Client, uid: int, request: Request, spool: SpoolPart
    ) -> None:
        if request.op == "slot":
            await self._hold_slot(client, uid, request.slot)
        elif request.op == "environments":
            environments = self._engine.host.environments()
            await client.send(
                {"result": {name: env.description for name, env in environments.items()}}
            )
        else:
            with self._jobs.of(uid, len(request.jobs)):
                await self._check_and_run(client, uid, request, spool)

    async def _check_and_run(
        self, client: _Client, uid: int, request: Request, spool: SpoolPart
    ) -> None:
        async with self._checking.place(uid):
            jobs = await self._checked(request)
        if isinstance(jobs, dict):
            await client.send(jobs)
            return
        if request.op == "check":
            await client.send({"result": {}})
            return
        del request

        async def run(job: CheckedJob) -> bytes | Path:
            record = await self._engine.run(job, uid, path := spool.path())
            if record == path:
                spool.count(path)
            else:
                spool.remove(path)
            return record

        parallel_jobs = self._engine.host.parallel_jobs
        number = 0
        async with contextlib.aclosing(run_all(jobs, run, parallel_jobs)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, CellblockError):
                    await client.send({"job": number, "error": outcome.as_dict()})
                else:
                    await client.send_record(number, outcome)
                    if isinstance(outcome, Path):
                        spool.remove(outcome)
                number += 1

    async def _checked(self, request: Request) -> list[CheckedJob] | dict[str, Any]:
        """All jobs as they will run, or the line that says which of them is refused and why."""
        is_over = threading.Event()

        def check() -> list[CheckedJob] | dict[str, Any]:
            checked: list[CheckedJob] = []
            for job in request.jobs:
                if is_over.is_set():
                    break
                try:
                    checked.append(self._engine.check(job))
                except CellblockError as problem:
                    return {"error": problem.as_dict(), "refused": len(checked)}
            if request.refused is not None:
                return {"error": request.refused.as_dict(), "refused": len(checked)}
            return checked

        stages = sum(len(job.stages) for job in request.jobs)
        if stages <= _FEW_STAGES and not _has_names(request):
            return check()
        try:
            return await _in_thread(self._check_threads, check)
        finally:
            is_over.set()

    async def _hold_slot(self, client: _Client, uid: int, wanted: Any) -> None:
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
        async with self._engine.hold_slot(stage, uid) as slot:
            result = {
                "address": str(slot.address),
                "ipv6": None if slot.ipv6_address is None else str(slot.ipv6_address),
                "interface": INTERFACE,
            }
            client.send_descriptor({"result": result}, slot.namespace)
            with contextlib.suppress(asyncio.CancelledError):  # how it ends
                await asyncio.Event().wait()


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._is_sending = False
        self._loop = asyncio.get_running_loop()

    async def receive(self, spool: SpoolPart) -> bytes | Path:
        """The request's line, or the file that it is in. Raises :class:`ServiceUnavailableError`."""
        try:
            async with asyncio.timeout(RECEIVE_TIMEOUT_S):
                return await self._receive(spool)
        except TimeoutError:
            raise ServiceUnavailableError(
                "request",
                f"was not complete after {RECEIVE_TIMEOUT_S:.0f} s",
                "send it as one line of JSON",
            ) from None

    async def _receive(self, spool: SpoolPart) -> bytes | Path:
        line = b""
        while not line.endswith(b"\n"):
            chunk = await self._loop.sock_recv(self._connection, _CHUNK_BYTES)
            if not chunk:
                raise ConnectionError
            line += chunk
            if len(line) > _SMALL_BYTES:
                return await self._receive_file(line, spool)
        return line

    async def _receive_file(self, begun: bytes, spool: SpoolPart) -> Path:
        path = spool.path()
        chunk, size = begun, 0
        with path.open("xb", buffering=0) as file:
            while True:
                size += len(chunk)
                if size > protocol.MAX_REQUEST_BYTES:
                    raise ServiceUnavailableError(
                        "request",
                        f"is larger than {protocol.MAX_REQUEST_BYTES} bytes",
                        "send smaller files",
                    )
                spool.take(len(chunk))
                _write_all(file, chunk)
                if chunk.endswith(b"\n"):
                    return path
                chunk = await self._loop.sock_recv(self._connection, _CHUNK_BYTES)
                if not chunk:
                    raise ConnectionError

    async def accompany(self, answering: asyncio.Task[None]) -> None:
        """Until ``answering`` is done, or the client gone, which ends it."""
        gone = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answering.done():
                answering.cancel()
                await settled([answering])
        if answering.cancelled():
            raise ConnectionError
        answering.result()

    def beat(self) -> None:
        """Says that the service is there."""
        if not self._is_sending:
            with contextlib.suppress(OSError):
                self._connection.send(b"\n")

    async def _until_gone(self) -> None:
        unread = 0
        with contextlib.suppress(OSError):
            while chunk := await self._loop.sock_recv(self._connection, 4096):
                unread += len(chunk)
                if unread > _CHATTER_BYTES:
                    return

    async def send(self, answer: dict[str, Any]) -> None:
        """Raises :class:`_NotRead`."""
        await self._send(json.dumps(answer).encode() + b"\n")

    async def send_record(self, number: int, record: bytes | Path) -> None:
        """The line of the job ``number``."""
        head, tail = f'{{"job": {number}, "result": '.encode(), b"}\n"
        if isinstance(record, bytes):
            await self._send(head + record + tail)
            return
        await self._send(head)
        with record.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                await self._send(chunk)
        await self._send(tail)

    async def send_last(self, problem: CellblockError) -> None:
        """Of a connection that ends with it."""
        try:
            await self.send({"error": problem.as_dict()})
        except _NotRead:
            _log.info("client went away before its answer, or did not read it")

    def send_descriptor(self, answer: dict[str, Any], descriptor: int) -> None:
        """With the first answer to a client, for which there is room."""
        line = json.dumps(answer).encode() + b"\n"
        socket.send_fds(self._connection, [line], [descriptor])

    async def _send(self, data: bytes) -> None:
        self._is_sending = True
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._loop.sock_sendall(self._connection, data)
        except OSError:  # TimeoutError is one
            raise _NotRead from None
        # A record comes in parts, between which there must be no heartbeat.
        self._is_sending = not data.endswith(b"\n")


async def _in_thread(threads: concurrent.futures.Executor, act: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, act)


def _has_names(request: Request) -> bool:
    """Whether to check it may take resolving names."""
    stages = (stage for job in request.jobs for stage in job.stages)
    return any(stage.network is NetworkPolicy.ALLOW for stage in stages)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(credentials)[1])


def _authorize(connection: socket.socket) -> None:
    """Raises for a peer that may not submit. The socket's mode says the same; this holds should the mode ever be
    wrong."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, gid = _PEER.unpack(credentials)
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


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as problem:
        raise ServiceUnavailableError(
            "service",
            f"cannot keep the request: {problem.strerror}",
            "make room in /var/lib/cellblock",
        ) from None
