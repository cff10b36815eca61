"""The client's side of the service's socket (see :mod:`cellblock.service`)."""

from __future__ import annotations

import json
import platform
import socket
from pathlib import Path
from typing import Any

from cellblock import errors
from cellblock.errors import ServiceUnavailableError

DEFAULT_SOCKET = Path("/run/cellblock/cellblock.socket")


def request(operation: dict[str, Any], socket_path: Path = DEFAULT_SOCKET) -> dict[str, Any]:
    """Sends one request and waits for its result; closing the process ends the job.

    Raises the service's typed error, or :class:`ServiceUnavailableError`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(str(socket_path))
            connection.sendall(json.dumps(operation).encode() + b"\n")
            with connection.makefile("rb") as reader:
                line = reader.readline()
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
