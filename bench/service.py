#!/usr/bin/env python3
"""What a job costs its client, and what waiting clients cost the service; runs on a slave, with Debian's Python:

    ansible slave1 --module-name ansible.builtin.script --args "bench/service.py executable=python3"

Prints a table: medians of several turns, with the least and the most.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import statistics
import subprocess
import time

SOCKET = "/run/cellblock/cellblock.socket"
TURNS = 5
RUNS = 100
SECONDS = 4.0
WARM_UP_S = 1.0
VERSION = 3
"""Of the protocol."""


def submit(network: str = "none") -> socket.socket:
    """A connection with one job of one stage, ``true``."""
    stage = {"name": "run", "command": ["true"], "network": network}
    jobs = [{"environment": "base", "stages": [stage]}]
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(SOCKET)
    connection.sendall(json.dumps({"version": VERSION, "op": "run", "jobs": jobs}).encode() + b"\n")
    return connection


def check(answer: bytes) -> None:
    """Ends the program when ``answer`` is no record of a job that ended well."""
    if b'"verdict": "ok"' not in answer:
        raise SystemExit(f"a job did not end well: {answer.decode()}")


def latencies_ms(network: str) -> list[float]:
    """From request to record, one job after the other."""
    found = []
    for _ in range(RUNS):
        started = time.perf_counter()
        with submit(network) as connection, connection.makefile("rb") as reader:
            check(next(line for line in reader if line.strip()))
        found.append((time.perf_counter() - started) * 1000)
    return found


def jobs_per_second(clients: int) -> float:
    """With so many clients, each of which waits for one job and then brings another."""
    poller, connections, done = select.epoll(), {}, 0

    def begin() -> None:
        connection = submit()
        connections[connection.fileno()] = connection
        poller.register(connection, select.EPOLLIN)

    for _ in range(clients):
        begin()
    counts_from = time.monotonic() + WARM_UP_S
    end = counts_from + SECONDS
    while (now := time.monotonic()) < end:
        for descriptor, _ in poller.poll(0.1):
            answer = connections[descriptor].recv(1 << 20)
            if not answer.strip():
                continue  # the service says that it is there
            check(answer)
            done += now > counts_from
            poller.unregister(descriptor)
            connections.pop(descriptor).close()
            begin()
    for connection in connections.values():
        connection.close()
    time.sleep(1.0)
    return done / SECONDS


def fork_and_exec_ms() -> list[float]:
    """What starting a program costs here without any of this, for comparison."""
    found = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(["/bin/true"], check=True)
        found.append((time.perf_counter() - started) * 1000)
    return found


def row(what: str, values: list[float], unit: str) -> None:
    """One line of the table."""
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"| {what} | {middle:.3g} {unit} | {low:.3g} to {high:.3g} |", flush=True)


def main() -> None:
    """Measures in turns and prints the table."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    p50: dict[str, list[float]] = {}
    p99: dict[str, list[float]] = {}
    rates: dict[int, list[float]] = {8: [], 2000: []}
    for _ in range(TURNS):
        for name, measure in (
            ("fork and exec", fork_and_exec_ms),
            ("job without a network", lambda: latencies_ms("none")),
        ):
            values = sorted(measure())
            p50.setdefault(name, []).append(statistics.median(values))
            p99.setdefault(name, []).append(values[int(len(values) * 0.99) - 1])
        for clients, found in rates.items():
            found.append(jobs_per_second(clients))
    print(
        f"{os.cpu_count()} CPUs, {TURNS} turns\n\n| what | median | least and most |\n|---|---|---|"
    )
    for name in p50:
        row(f"{name}, p50 of {RUNS}", p50[name], "ms")
        row(f"{name}, p99", p99[name], "ms")
    for clients, found in rates.items():
        row(f"jobs per second, {clients} clients", found, "/s")
    ratios = [many / few for few, many in zip(rates[8], rates[2000], strict=True)]
    row("2000 clients against 8", ratios, "")


if __name__ == "__main__":
    main()
