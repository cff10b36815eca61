#!/usr/bin/env python3
"""What a job in the worker container costs beside one on the host, and how long the container takes to be ready.

Runs on a slave that has one, with Debian's Python; no job may run there meanwhile, as the container is made anew:

    ansible slave2 --module-name ansible.builtin.script --args "bench/worker_container.py executable=python3"

Prints a table: medians of several turns, with the least and the most.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import time

SOCKET = "/run/cellblock/cellblock.socket"
TURNS = 5
RUNS = 60
PAUSE_S = 0.06
"""Before each job: what the service puts away after one is not to slow the next."""
VERSION = 3
"""Of the protocol."""
TARGETS = ("host", "worker_container")
NETWORKS = ("none", "cache")


def latency_ms(target: str, network: str) -> float:
    """From request to record of a job of one stage, ``true``."""
    stage = {"name": "run", "command": ["true"], "network": network}
    jobs = [{"environment": "base", "target": target, "stages": [stage]}]
    time.sleep(PAUSE_S)
    started = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(SOCKET)
        connection.sendall(
            json.dumps({"version": VERSION, "op": "run", "jobs": jobs}).encode() + b"\n"
        )
        with connection.makefile("rb") as reader:
            answer = next(line for line in reader if line.strip())
    took = (time.perf_counter() - started) * 1000
    if b'"verdict": "ok"' not in answer:
        raise SystemExit(f"a job did not end well: {answer.decode()}")
    return took


def ready_ms() -> tuple[float, float]:
    """From the start of the unit until it says that it is ready, and until the engine within answers."""
    subprocess.run(["systemctl", "stop", "cellblock-worker"], check=True)
    started = time.perf_counter()
    subprocess.run(["systemctl", "start", "cellblock-worker"], check=True)
    ready = time.perf_counter() - started
    ask = ["docker", "exec", "cellblock-worker", "docker", "info"]
    while subprocess.run(ask, capture_output=True, check=False).returncode:
        if time.perf_counter() - started > 60:
            raise SystemExit("the engine within does not answer")
        time.sleep(0.02)
    return ready * 1000, (time.perf_counter() - started) * 1000


def row(what: str, values: list[float]) -> None:
    """One line of the table."""
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"| {what} | {middle:.3g} ms | {low:.3g} to {high:.3g} |", flush=True)


def main() -> None:
    """Measures in turns and prints the table."""
    medians: dict[tuple[str, str], list[float]] = {}
    for turn in range(TURNS):
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(RUNS):
            # One after the other, so that whatever else the machine does meets both.
            for network in NETWORKS:
                for target in TARGETS if turn % 2 else TARGETS[::-1]:
                    found.setdefault((network, target), []).append(latency_ms(target, network))
        for key, values in found.items():
            medians.setdefault(key, []).append(statistics.median(values))
    starts = [ready_ms() for _ in range(TURNS)]
    print(f"{os.cpu_count()} CPUs, {TURNS} turns of {RUNS} jobs\n")
    print("| what | median | least and most |\n|---|---|---|")
    for network in NETWORKS:
        for target in TARGETS:
            row(f"job, network {network}, target {target}", medians[network, target])
        pairs = zip(medians[network, TARGETS[1]], medians[network, TARGETS[0]], strict=True)
        row(f"difference, network {network}", [there - here for there, here in pairs])
    row("unit ready after its start", [ready for ready, _ in starts])
    row("engine within answers after it", [answers for _, answers in starts])


if __name__ == "__main__":
    main()
