"""Runs on a slave: jobs that spend one kind of kernel memory each, and what the host lost meanwhile.

    kernel_memory.py PROGRAM PROCESSES OPEN_FILES BYTES ROUNDS SLOWNESS KIND...

Every round runs a job for every kind, in another order: what else happens on the machine falls on all alike,
and no kind always follows the one whose memory takes the longest to be freed. Prints
a JSON object for each kind: ``kind``, ``loss_bytes`` (one for each round), ``record_bytes`` (what the last
round's record says), ``text`` (what the program printed), ``verdict``.
"""

from __future__ import annotations

import base64
import json
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOLD_MS = 100


def host_memory() -> int:
    """Bytes in use on this host, but for what others' programs come and go with.

    Without anonymous memory and the cache of files, which are always a cgroup's; with shared memory. What
    each processor keeps of freed pages is free, and no part of MemFree.
    """
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name.rstrip(":"): int(value) for name, value, *_ in fields}
    free = kib["MemFree"] + kib["Buffers"] + kib["Cached"] - kib["Shmem"] + kib["AnonPages"]
    kept = re.findall(r"^ +count: (\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return (kib["MemTotal"] - free) * 1024 - sum(map(int, kept)) * resource.getpagesize()


def settled() -> int:
    """The same, once what an earlier job had is no longer being freed."""
    last = host_memory()
    for _ in range(10):
        time.sleep(0.04)
        now = host_memory()
        if now > last - 512 * 1024:
            return now
        last = now
    return last


def job(program: str, kind: str, processes: int, files: int, size: int, slow: int) -> str:
    """A job as its JSON text."""
    constraints = {
        "processes": processes + 2,
        "open_files": files,
        "memory_bytes": "384MiB",
        "scratch_bytes": "128MiB",
        "scratch_files": 65_536,
        "file_size_bytes": "1GiB",
        "wall_time_ms": min(5_000 * slow, 120_000),
        "cpu_time_ms": min(5_000 * slow, 120_000),
    }
    command = ["./program", kind, str(processes), str(size), str(HOLD_MS)]
    return json.dumps(
        {
            "environment": "base",
            "files": {"program": {"base64": program, "executable": True}},
            "stages": [{"name": "spend", "command": command, "constraints": constraints}],
        }
    )


def spend(text: str) -> tuple[int, dict[str, Any]]:
    """What the host lost at most while the job ran, and the record of its stage."""
    before = most = settled()
    with subprocess.Popen(
        ["cellblock", "run", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(text)
        client.stdin.close()
        while client.poll() is None:
            most = max(most, host_memory())
            time.sleep(0.01)
        record: dict[str, Any] = json.loads(client.stdout.readline())
    stage: dict[str, Any] = record["stages"][0]
    return most - before, stage


def main() -> None:
    path, *numbers = sys.argv[1:7]
    processes, files, size, rounds, slow = map(int, numbers)
    program = base64.b64encode(Path(path).read_bytes()).decode()
    kinds = sys.argv[7:]
    losses: dict[str, list[int]] = {kind: [] for kind in kinds}
    stages: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for kind in random.Random(number).sample(kinds, len(kinds)):
            loss, stages[kind] = spend(job(program, kind, processes, files, size, slow))
            losses[kind].append(loss)
    for kind in kinds:
        stage = stages[kind]
        shown = {
            "kind": kind,
            "loss_bytes": losses[kind],
            "record_bytes": stage["usage"]["memory_peak_bytes"],
            "text": stage["stdout"].get("text", "").strip(),
            "verdict": stage["verdict"],
        }
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
