# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""What runs in the containers of the experiment: servers that say who they are, and senders.

Runs by its path and with the standard library alone:

    serve NAME PORT [{"name": "address", ...}]     answers each connection; with names, also as a resolver
    send SOCKET                                    does what is asked for over a Unix socket
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

LONGEST_S = 900


def answered(request: bytes, names: Mapping[str, str]) -> bytes:
    """A resolver's answer to a datagram: the address of a known name, otherwise that there is none."""
    labels, at = [], 12
    while request[at]:
        labels.append(request[at + 1 : at + 1 + request[at]].decode("ascii", "replace"))
        at += 1 + request[at]
    question = request[12 : at + 5]
    kind = struct.unpack("!H", request[at + 1 : at + 3])[0]
    found = names.get(".".join(labels).lower())
    code = 0 if found else 3
    records = 1 if found and kind == 1 else 0
    head = request[:2] + struct.pack("!HHHHH", 0x8580 | code, 1, records, 0, 0)
    if not records or not found:
        return head + question
    return head + question + struct.pack("!HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(found)


def resolve(names: Mapping[str, str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as served:
        served.bind(("", 53))
        while True:
            request, peer = served.recvfrom(2048)
            try:
                served.sendto(answered(request, names), peer)
            except (IndexError, struct.error, OSError):
                continue


def serve(name: str, port: int) -> None:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=128, dualstack_ipv6=both
    ) as listener:
        while True:
            connection, peer = listener.accept()
            with connection:
                said = {"answered_by": name, "seen_as": peer[0].removeprefix("::ffff:")}
                try:
                    connection.sendall(json.dumps(said).encode() + b"\n")
                except OSError:
                    continue


def ask(host: str, port: int, timeout_s: float) -> dict[str, Any]:
    """One request to an address: what the server said, or why it said nothing."""
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            connection.settimeout(timeout_s)
            said = connection.makefile().readline()
    except TimeoutError:
        return {"error": "timed out"}
    except OSError as error:
        return {"error": os.strerror(error.errno or 0).lower()}
    try:
        answer = json.loads(said)
    except ValueError:
        return {"error": "another answer"}
    return answer if isinstance(answer, dict) else {"error": "another answer"}


def ask_all(wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All at the same time. A name for which no resolver has an address in time is not known."""
    timeout_s = float(wanted["timeout_s"])
    answers: list[dict[str, Any]] = [{"error": "name not known"} for _ in wanted["requests"]]

    def one(number: int, host: str, port: int) -> None:
        found = host
        if ":" not in host:
            try:
                found = str(
                    socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
                )
            except socket.gaierror:
                return
        answers[number] = {"error": "timed out"}
        answers[number] = ask(found, port, timeout_s)

    threads = [
        threading.Thread(target=one, args=(number, *request), daemon=True)
        for number, request in enumerate(wanted["requests"])
    ]
    # A resolver's second, and what a connection may take then.
    deadline = time.monotonic() + timeout_s + 1.5
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


def send(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        # Whoever the containers' root is mapped to, the slave's root connects.
        os.chmod(path, 0o600)
        listener.listen(4)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                for line in stream:
                    stream.write(json.dumps(ask_all(json.loads(line))) + "\n")
                    stream.flush()


def main() -> None:
    # The first process of a container has no default for it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(LONGEST_S)
    if sys.argv[1] == "send":
        send(sys.argv[2])
        return
    if len(sys.argv) > 4:
        threading.Thread(target=resolve, args=(json.loads(sys.argv[4]),), daemon=True).start()
    serve(sys.argv[2], int(sys.argv[3]))


if __name__ == "__main__":
    main()
