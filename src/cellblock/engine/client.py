"""The client's side of the service's socket (see :mod:`cellblock.engine.protocol`)."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import CellblockError, ServiceUnavailableError
from . import protocol

DEFAULT_SOCKET = Path("/run/cellblock/cellblock.socket")

PATIENCE_S = 30.0
"""How long a service may be silent (see ``protocol.HEARTBEAT_S``), or take nothing. systemd holds its socket, so
whoever connects to one that does not start would wait for ever; who gives up too early loses its jobs."""

_CHUNK_BYTES = 65_536

NamedJob = tuple[str, Any]
"""What errors call a job, and its data (with contents in base64, see ``job_file.as_request``)."""
Answer = dict[str, Any]


def check(jobs: Sequence[NamedJob], socket_path: Path = DEFAULT_SOCKET) -> None:
    """Returns when the host would run all ``jobs``.

    Raises the typed error of the first that it would not, whose subject begins with the job's name,
    or :class:`ServiceUnavailableError`.
    """
    for batch in _batches(jobs):
        _check(batch, socket_path)


def run(
    jobs: Sequence[NamedJob], socket_path: Path = DEFAULT_SOCKET
) -> Iterator[dict[str, Any] | CellblockError]:
    """Runs ``jobs`` and yields their records in their order, each as soon as it is there.

    An error instead of a record is a failure of the service with that job. Raises as :func:`check`,
    before anything is run. To close the iterator, or the process, ends what still runs.
    """
    batches = list(_batches(jobs))
    if len(batches) > 1:
        # A mistake in the last must be seen before the first is run.
        for batch in batches:
            _check(batch, socket_path)
    done = 0
    for batch in batches:
        try:
            for outcome in _run(batch, socket_path):
                done += 1
                yield outcome
        except CellblockError as problem:
            if done == 0:
                raise
            # The records of earlier batches are there; these jobs have none.
            yield from [problem] * len(batch)


def environments(socket_path: Path = DEFAULT_SOCKET) -> dict[str, str]:
    """What jobs can run in: descriptions by name. Raises :class:`ServiceUnavailableError`."""
    request = {"version": protocol.VERSION, "op": "environments"}
    with _connected(_line(request), socket_path) as connection:
        found: dict[str, str] = _result(next(_lines(connection)), socket_path)
        return found


@contextlib.contextmanager
def hold_slot(
    wanted: dict[str, Any], socket_path: Path = DEFAULT_SOCKET
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A network slot of this host while the context lasts: its namespace's descriptor, and what it
    is. ``wanted`` has ``network`` and optionally ``network_allow`` and ``constraints``, as in a
    stage. For root only. Raises the service's typed error, or :class:`ServiceUnavailableError`.
    """
    request = {"version": protocol.VERSION, "op": "slot", "slot": wanted}
    with _connected(_line(request), socket_path) as connection:
        descriptors: list[int] = []
        line = b""
        try:
            with _reachable(socket_path):
                while not line.strip() or not line.endswith(b"\n"):
                    part, received, _, _ = socket.recv_fds(
                        connection, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC
                    )
                    descriptors += received
                    line += part
                    if not part:
                        break
            result = _result(line.lstrip(), socket_path)
            yield descriptors[0], result
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _batches(jobs: Sequence[NamedJob]) -> Iterator[list[tuple[str, bytes]]]:
    """The jobs as JSON, in as few requests as the service takes them in."""
    batch: list[tuple[str, bytes]] = []
    size = structure = 1000  # for what is around the jobs
    for name, job in jobs:
        encoded = json.dumps(job).encode()
        parts = protocol.structure(encoded) + 1
        if batch and (
            len(batch) == protocol.MAX_JOBS
            or size + len(encoded) + 2 > protocol.MAX_REQUEST_BYTES
            or structure + parts > protocol.MAX_STRUCTURE
        ):
            yield batch
            batch, size, structure = [], 1000, 1000
        batch.append((name, encoded))
        size += len(encoded) + 2
        structure += parts
    if batch:
        yield batch


def _check(batch: Sequence[tuple[str, bytes]], socket_path: Path) -> None:
    with _connected(_batch_line("check", batch), socket_path) as connection:
        _refuse(_answer(next(_lines(connection)), socket_path), batch)


def _run(
    batch: Sequence[tuple[str, bytes]], socket_path: Path
) -> Iterator[dict[str, Any] | CellblockError]:
    with _connected(_batch_line("run", batch), socket_path) as connection:
        lines = _lines(connection)
        for number in range(len(batch)):
            try:
                answer = _answer(next(lines), socket_path)
            except ServiceUnavailableError as problem:
                # Only now: what was returned is not lost.
                yield from [problem] * (len(batch) - number)
                return
            if "job" not in answer:
                _refuse(answer, batch)
            yield errors.from_dict(answer["error"]) if "error" in answer else answer["result"]


def _refuse(answer: Answer, batch: Sequence[tuple[str, bytes]]) -> None:
    """Raises the error in ``answer``, with the name of the job that it is about."""
    if "error" not in answer:
        return
    problem = errors.from_dict(answer["error"])
    if "refused" in answer:
        name, _ = batch[answer["refused"]]
        raise type(problem)(f"{name}: {problem.subject}", problem.message, problem.remedy)
    raise problem


def _lines(connection: socket.socket) -> Iterator[bytes]:
    """The answers that the service sends, line by line; b"" at their end, or when it has been silent for too long.

    It is taken at once: the service does not wait for long for a client that is held up by whoever
    reads its output.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        line = b""
        with contextlib.suppress(OSError), connection.makefile("rb") as reader:
            while line := reader.readline():
                if line != b"\n":
                    lines.put(line)
        lines.put(b"")

    threading.Thread(target=receive, daemon=True).start()
    while line := lines.get():
        yield line
    while True:
        yield b""


def _batch_line(op: str, batch: Sequence[tuple[str, bytes]]) -> bytes:
    head = json.dumps({"version": protocol.VERSION, "op": op}).encode()
    return b"".join((head[:-1], b', "jobs": [', b", ".join(job for _, job in batch), b"]}\n"))


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


@contextlib.contextmanager
def _connected(line: bytes, socket_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(PATIENCE_S)
        with _reachable(socket_path):
            _connect(connection, socket_path)
        try:
            # A service that wants no more of it has said why.
            with _reachable(socket_path), contextlib.suppress(BrokenPipeError):
                for start in range(0, len(line), _CHUNK_BYTES):
                    connection.sendall(line[start : start + _CHUNK_BYTES])
            yield connection
        finally:
            # A thread that still reads from it would keep it open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _connect(connection: socket.socket, socket_path: Path) -> None:
    """Also where many others are connecting: the kernel then has a socket with a time limit try again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return connection.connect(str(socket_path))
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def _reachable(socket_path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise ServiceUnavailableError(
            str(socket_path),
            "may not be used by this user",
            "run as root or as a member of the group cellblock",
        ) from None
    except OSError as problem:
        raise ServiceUnavailableError(
            str(socket_path),
            f"does not answer on {platform.node()}: {problem.strerror or problem}",
            "systemctl start cellblock.socket, or provision this host with playbooks/site.yml",
        ) from None


def _answer(line: bytes, socket_path: Path) -> Answer:
    if not line.endswith(b"\n"):
        raise ServiceUnavailableError(
            str(socket_path),
            "closed the connection without an answer: the service was stopped, or answers nobody",
            "run the job again, and see journalctl -u cellblock",
        )
    answer: Answer = json.loads(line)
    return answer


def _result(line: bytes, socket_path: Path) -> dict[str, Any]:
    answer = _answer(line, socket_path)
    if "error" in answer:
        raise errors.from_dict(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result
