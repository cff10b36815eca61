"""Processes that work for the service, one task at a time each.

Nothing that a request or a job makes one of them do holds up another, or the service: the limits of a running
stage are watched by a process that has nothing else to do. One that is killed costs its task alone.

They are forked by a process of their own that has a single thread and, of what the service comes to hold, nothing.
What is said between them is pickled: both ends are this program.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import gc
import json
import logging
import os
import pickle
import select
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import (
    Cancelled,
    CellblockError,
    HostOverloadedError,
    InternalError,
    ServiceUnavailableError,
)
from ..job_network.slots import Slot, Traffic
from . import request
from .runner import AdmittedJob, Runner
from .tasks import settled

_LENGTH = struct.Struct("!I")
_FORKED = struct.Struct("!ii")
"""A worker's pid, and why there is none."""
INLINE_BYTES = 16_384
"""Records up to that size are handed over as they are, others in a file."""
_OOM_SCORE = 500
"""Of workers: where the service's memory is used up, a task ends rather than the service."""

Record = bytes | Path
"""A line of JSON, or the file that it is in."""
TakeSlot = Callable[[str, Callable[[], bool]], contextlib.AbstractContextManager[Slot]]
"""Opens a slot for the stage with that name; called in a thread, and gives up once what it is given says so."""


T = TypeVar("T")
_log = logging.getLogger("cellblock")


class WorkerKilledError(Exception):
    """A worker ended before its task did."""


@dataclass(frozen=True)
class _Parse:
    line: Path
    contents: Path


@dataclass(frozen=True)
class _Run:
    admitted: AdmittedJob
    record: Path


@dataclass(frozen=True)
class _Take:
    stage: str


@dataclass(frozen=True)
class _Count:
    """What has gone through the slot?"""


@dataclass(frozen=True)
class _Return:
    """The slot is not needed any more."""


@dataclass(frozen=True)
class _Answer:
    """To a worker's question, or of a task that is done. A problem is raised where it arrives."""

    value: Any = None
    problem: Exception | None = None

    def result(self) -> Any:
        if self.problem is not None:
            raise self.problem
        return self.value


class _Process:
    """A worker, as the service sees it."""

    def __init__(self, connection: socket.socket, pidfd: int) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._pidfd = pidfd

    def is_there(self) -> bool:
        """Whether one without a task can be given one."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return not poller.poll(0)  # it says nothing unasked: this would be its end

    def end_task(self, *, at_once: bool) -> None:
        """The worker takes it for its task's end, puts away what there is, and ends; or has no time for that."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            if at_once and self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Ends one without a task."""
        self.socket.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)


class ForkServer:
    """Starts workers. To be made before the process has a second thread."""

    def __init__(self, runner: Runner, not_theirs: Sequence[socket.socket] = ()) -> None:
        """Workers run jobs with ``runner`` and do not hold the sockets ``not_theirs``."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gc.freeze()
        if os.fork() == 0:
            try:
                for inherited in (self._socket, *not_theirs):
                    inherited.close()
                _fork_on_request(theirs, runner)
            finally:
                os._exit(0)
        theirs.close()

    def fork(self) -> _Process:
        """A new worker, as the service sees it; raises :class:`HostOverloadedError`."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._socket, [b"fork"], [theirs.fileno()])
                pid, error = _FORKED.unpack(self._socket.recv(_FORKED.size))
            except (OSError, struct.error):
                # Nothing can be run any more; systemd ends what is left, and starts the service again.
                _log.critical("the process that starts workers is gone")
                os._exit(1)
        if error:
            ours.close()
            raise HostOverloadedError(
                "service",
                f"cannot start a process: {os.strerror(error)}",
                "run the job again when this host has less to do",
            )
        try:
            return _Process(ours, os.pidfd_open(pid))
        except ProcessLookupError:
            return _Process(ours, -1)  # it was killed; whoever gives it a task will see

    def close(self) -> None:
        """Ends it, and with it workers that have no task."""
        self._socket.close()


def _fork_on_request(requests: socket.socket, runner: Runner) -> None:
    # Nobody waits for workers: their end is seen by their sockets.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 16, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        error = 0
        try:
            pid = os.fork()
        except OSError as problem:
            pid, error = -1, problem.errno or errno.EAGAIN
        if pid == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
            _Worker(socket.socket(fileno=descriptors[0]), runner).work()
            os._exit(0)
        os.close(descriptors[0])
        requests.send(_FORKED.pack(pid, error))


class _Worker:
    """A worker's own side."""

    def __init__(self, connection: socket.socket, runner: Runner) -> None:
        self._connection = connection
        self._runner = runner
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)

    def work(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                task = self._receive()
                try:
                    answer = _Answer(self._do(task))
                except (CellblockError, Cancelled) as problem:
                    answer = _Answer(problem=problem)
                except Exception as problem:
                    # A defect of ours must end neither the worker nor the caller without a word.
                    answer = _Answer(problem=_Defect(_traceback(problem)))
                self._send(answer)

    def _do(self, task: Any) -> bytes | Path:
        if isinstance(task, _Parse):
            return request.parse_file(task.line, task.contents)
        if not isinstance(task, _Run):
            raise TypeError(f"not a task: {task!r}")
        result = self._runner.run(task.admitted, self, self._cancelled)
        line = json.dumps(result.as_dict()).encode()
        if len(line) <= INLINE_BYTES:
            return line
        task.record.write_bytes(line)
        return task.record

    @contextlib.contextmanager
    def take(self, stage: str) -> Iterator[_RemoteSlot]:
        """A slot that the service holds for this worker."""
        namespace, files = self._ask(_Take(stage))
        descriptor = -1
        try:
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            yield _RemoteSlot(descriptor, files, lambda: self._ask(_Count()))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            with contextlib.suppress(EOFError, OSError):  # it has seen the end of this task already
                self._ask(_Return())

    def _ask(self, question: Any) -> Any:
        self._send(question)
        answer: _Answer = self._receive()
        return answer.result()

    def _cancelled(self) -> bool:
        """Whether the service has closed its direction: the task is not wanted any more, or there is no service.
        It says nothing unasked."""
        return bool(self._poller.poll(0))

    def _send(self, message: Any) -> None:
        self._connection.sendall(_framed(message))

    def _receive(self) -> Any:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            chunk = self._connection.recv(length - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


@dataclass(frozen=True)
class _RemoteSlot:
    namespace: int
    files: Sequence[tuple[Path, str]]
    count: Callable[[], Traffic]

    def traffic(self) -> Traffic:
        return self.count()


class _Defect(Exception):
    """What went wrong in a worker, for the journal."""


def _traceback(problem: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(problem))


def _framed(message: Any) -> bytes:
    data = pickle.dumps(message)
    return _LENGTH.pack(len(data)) + data


class Workers:
    """The service's side: tasks are awaited, and ended when whoever awaits them is cancelled."""

    def __init__(self, fork_server: ForkServer, runner: Runner, kept: int) -> None:
        """``kept`` wait for tasks to come; more are started when they are needed, and end after their task.
        ``runner`` puts away what is left of a job whose worker was killed."""
        self._fork_server = fork_server
        self._runner = runner
        self._kept = kept
        self._idle: list[_Process] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(kept, "slot")

    def prepare(self) -> None:
        """Starts those that wait."""
        while len(self._idle) < self._kept:
            self._idle.append(self._fork_server.fork())

    async def parse(self, line: Path, contents: Path) -> bytes:
        """See :func:`cellblock.engine.request.parse_file`."""
        try:
            # What it took of memory goes with it.
            parsed: bytes = await self._do(_Parse(line, contents), _no_slot, keep=False)
        except WorkerKilledError:
            raise ServiceUnavailableError(
                "request",
                "could not be taken apart: the process that did it was killed",
                "send fewer or smaller files at a time, or see whether the host is out of memory",
            ) from None
        return parsed

    async def run(self, admitted: AdmittedJob, record: Path, take_slot: TakeSlot) -> Record:
        """The record of a job; a large one is in the file ``record`` then. Raises as :meth:`Runner.run`."""
        task = _Run(admitted, record)
        try:
            outcome: Record = await self._do(task, take_slot, keep=True)
        except WorkerKilledError:
            raise InternalError(
                "service",
                "lost the process that ran the job",
                "run the job again, and see whether the host is out of memory",
            ) from None
        return outcome

    async def _do(self, task: _Parse | _Run, take_slot: TakeSlot, *, keep: bool) -> Any:
        worker = self._worker()
        lease = _Lease(take_slot, self._in_thread)
        conversation = asyncio.create_task(self._converse(worker, task, lease))
        try:
            answer = await asyncio.shield(conversation)
        except asyncio.CancelledError:
            lease.is_cancelled = True
            worker.end_task(at_once=isinstance(task, _Parse))
            await settled([conversation])
            conversation.exception()  # nobody asks any more
            worker.close()
            raise
        except BaseException:
            worker.close()
            raise
        if keep and len(self._idle) < self._kept:
            self._idle.append(worker)
        else:
            worker.close()
        return answer.result()

    def _worker(self) -> _Process:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_there():
                return worker
            worker.close()
        return self._fork_server.fork()

    async def _converse(self, worker: _Process, task: _Parse | _Run, lease: _Lease) -> _Answer:
        """Hands over the task and answers questions about its slot, until it is done."""
        try:
            await _send(worker.socket, task)
            while not isinstance(message := await _receive(worker.socket), _Answer):
                await _send(worker.socket, await lease.answer(message))
        except (EOFError, OSError):
            if isinstance(task, _Run):
                await self._in_thread(lambda: self._runner.clear(task.admitted))
            raise WorkerKilledError from None
        finally:
            await lease.give_back()
        return message

    async def _in_thread(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, act)


class _Lease:
    """The network slot of a task, while it has one."""

    def __init__(
        self, take_slot: TakeSlot, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self.is_cancelled = False
        self._take_slot = take_slot
        self._in_thread = in_thread
        self._held: tuple[Slot, contextlib.AbstractContextManager[Slot]] | None = None

    async def answer(self, question: _Take | _Count | _Return) -> _Answer:
        try:
            if isinstance(question, _Take):
                manager = self._take_slot(question.stage, lambda: self.is_cancelled)
                slot = await self._in_thread(manager.__enter__)
                self._held = slot, manager
                return _Answer((f"/proc/{os.getpid()}/fd/{slot.namespace}", slot.files))
            if isinstance(question, _Count) and self._held is not None:
                return _Answer(await self._in_thread(self._held[0].traffic))
            await self.give_back()
        except (CellblockError, Cancelled) as problem:
            return _Answer(problem=problem)
        return _Answer()

    async def give_back(self) -> None:
        if self._held is not None:
            (_, manager), self._held = self._held, None
            await self._in_thread(lambda: manager.__exit__(None, None, None))


def _no_slot(stage: str, _: Callable[[], bool]) -> contextlib.AbstractContextManager[Slot]:
    raise InternalError(stage, "asks for a network slot", "see the journal of cellblock.service")


async def _send(worker: socket.socket, message: Any) -> None:
    await asyncio.get_running_loop().sock_sendall(worker, _framed(message))


async def _receive(worker: socket.socket) -> Any:
    (length,) = _LENGTH.unpack(await _read(worker, _LENGTH.size))
    return pickle.loads(await _read(worker, length))


async def _read(worker: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < length:
        chunk = await loop.sock_recv(worker, min(length - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)
