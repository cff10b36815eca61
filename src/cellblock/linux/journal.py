"""Events for operators, in the host's journal with stable fields.

    journalctl -u cellblock CELLBLOCK_EVENT=limit_exceeded -o json
    journalctl -t cellblock-firewall CELLBLOCK_EVENT=firewall_repaired -o json

Every event has CELLBLOCK_EVENT. The engine's have besides: CELLBLOCK_JOB_ID, CELLBLOCK_JOB,
CELLBLOCK_STAGE, CELLBLOCK_ENVIRONMENT, CELLBLOCK_LIMIT, CELLBLOCK_ALLOWED, CELLBLOCK_SEEN,
CELLBLOCK_EVIDENCE, CELLBLOCK_LABELS (JSON). Those of guarded rules: CELLBLOCK_BY (who made the change:
``nft[123]``, or nothing), CELLBLOCK_MISSING and CELLBLOCK_REMOVED (JSON), CELLBLOCK_OBJECT,
CELLBLOCK_RULE, CELLBLOCK_ACTION, CELLBLOCK_ELAPSED_MS, CELLBLOCK_STATE, CELLBLOCK_SHA256, CELLBLOCK_REASON.
"""

from __future__ import annotations

import socket
import struct
import sys

CRITICAL, ERROR, WARNING, NOTICE = 2, 3, 4, 5
_SOCKET = "/run/systemd/journal/socket"


def send(
    message: str, *, identifier: str = "cellblock", priority: int = NOTICE, **fields: object
) -> None:
    """Writes one event; without a journal (early in the boot) it goes to standard error, which
    reaches the journal of a unit later. Never raises."""
    entries = {
        "MESSAGE": message,
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": identifier,
        **{f"CELLBLOCK_{name.upper()}": value for name, value in fields.items()},
    }
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journal:
            journal.connect(_SOCKET)
            journal.send(b"".join(_entry(name, str(value)) for name, value in entries.items()))
    except OSError:
        print(message, file=sys.stderr, flush=True)


def _entry(name: str, value: str) -> bytes:
    # The form with a length, so that no value can start a field of its own (systemd's
    # "Native Journal Protocol").
    data = value.encode("utf-8", "backslashreplace")
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
