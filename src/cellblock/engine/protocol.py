"""What travels over the service's socket, and how much of it; known to client and service alike.

The client sends one JSON object on one line and keeps the connection open; a client that goes away ends
its jobs. The service answers with lines of JSON:

    {"version": 3, "op": "run", "jobs": [...]}
        All jobs are checked before the first is run. Then a line for each, in their order and as soon as
        it is there: {"job": 0, "result": RECORD}, or {"job": 0, "error": ERROR} where the service failed.
        {"error": ERROR, "refused": 0} instead of them all: that job is wrong, and nothing was run.
    {"version": 3, "op": "check", "jobs": [...]}
        {"result": {}} when this host would run them all; else as above.
    {"version": 3, "op": "environments"}
        {"result": {NAME: DESCRIPTION}}
    {"version": 3, "op": "slot", "slot": {...}}
        {"result": {address, ipv6, interface}}, and the descriptor of a network slot's namespace; the slot
        is held while the client stays connected. For root only.

{"error": ERROR} alone: of the request as a whole. ERROR has the shape of ``CellblockError.as_dict``. Empty lines
between answers say that the service is there: one comes at least every ``HEARTBEAT_S`` from a request's end on.
"""

from __future__ import annotations

VERSION = 3
MAX_INPUT_BYTES = 64 * 2**20
"""All files and standard inputs of a job together."""
MAX_REQUEST_BYTES = 2 * MAX_INPUT_BYTES
"""Room for the largest job in base64, and its stages."""
MAX_STRUCTURE = 100_000
"""Brackets and commas of a request. Contents are one string each (clients send base64), so a request
needs few; each takes many times its size in memory."""
MAX_JOBS = 1000
"""Of a request."""
HEARTBEAT_S = 5.0


def structure(line: bytes | bytearray) -> int:
    """How many brackets and commas are in ``line``, each of which may begin a value."""
    return sum(line.count(mark) for mark in (b"[", b"{", b","))
