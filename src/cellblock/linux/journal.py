"""Events for operators, in the host's journal with stable fields.

    journalctl -u cellblock CELLBLOCK_EVENT=limit_exceeded -o json

Fields: CELLBLOCK_EVENT, CELLBLOCK_JOB_ID, CELLBLOCK_JOB, CELLBLOCK_STAGE, CELLBLOCK_ENVIRONMENT,
CELLBLOCK_LIMIT, CELLBLOCK_ALLOWED, CELLBLOCK_SEEN, CELLBLOCK_EVIDENCE, CELLBLOCK_LABELS (JSON).
"""

from __future__ import annotations

import logging
import socket
import struct

_SOCKET = "/run/systemd/journal/socket"
_NOTICE = 5
_log = logging.getLogger("cellblock")


def send(message: str, **fields: object) -> None:
    """Writes one event; without a journal it goes to the log. Never raises."""
    entries = {
        "MESSAGE": message,
        "PRIORITY": _NOTICE,
        "SYSLOG_IDENTIFIER": "cellblock",
        **{f"CELLBLOCK_{name.upper()}": value for name, value in fields.items()},
    }
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journal:
            journal.connect(_SOCKET)
            journal.send(b"".join(_entry(name, str(value)) for name, value in entries.items()))
    except OSError:
        _log.warning("%s", message)


def _entry(name: str, value: str) -> bytes:
    # The form with a length, so that no value can start a field of its own (systemd's
    # "Native Journal Protocol").
    data = value.encode("utf-8", "backslashreplace")
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
