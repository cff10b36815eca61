"""The client's side of the service's socket (see :mod:`cellblock.service`)."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import ServiceUnavailableError

DEFAULT_SOCKET = Path("/run/cellblock/cellblock.socket")


def request(operation: dict[str, Any], socket_path: Path = DEFAULT_SOCKET) -> dict[str, Any]:
    """Sends one request and waits for its result; closing the process ends the job.

    Raises the service's typed error, or :class:`ServiceUnavailableError`.
    """
    with (
        _connected(operation, socket_path) as connection,
        _reachable(socket_path),
        connection.makefile("rb") as reader,
    ):
        line = reader.readline()
    return _result(line, socket_path)


@contextlib.contextmanager
def hold_slot(
    wanted: dict[str, Any], socket_path: Path = DEFAULT_SOCKET
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A network slot of this host while the context lasts: its namespace's descriptor, and what it
    is. ``wanted`` has ``network`` and optionally ``network_allow`` and ``constraints``, as in a
    stage. For root only. Raises as :func:`request`.
    """
    operation = {"op": "slot", "slot": wanted}
    with _connected(operation, socket_path) as connection:
        descriptors: list[int] = []
        line = b""
        try:
            with _reachable(socket_path):
                while not line.endswith(b"\n"):
                    part, received, _, _ = socket.recv_fds(
                        connection, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC
                    )
                    descriptors += received
                    line += part
                    if not part:
                        break
            result = _result(line, socket_path)
            yield descriptors[0], result
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


@contextlib.contextmanager
def _connected(operation: dict[str, Any], socket_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        with _reachable(socket_path):
            connection.connect(str(socket_path))
            connection.sendall(json.dumps(operation).encode() + b"\n")
        yield connection


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
            f"does not answer on {platform.node()}: {problem.strerror}",
            "systemctl start cellblock.socket, or provision this host with playbooks/site.yml",
        ) from None


def _result(line: bytes, socket_path: Path) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise ServiceUnavailableError(
            str(socket_path),
            "closed the connection without an answer: the service was stopped",
            "run the job again, and see journalctl -u cellblock",
        )
    answer = json.loads(line)
    if "error" in answer:
        raise errors.from_dict(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result
