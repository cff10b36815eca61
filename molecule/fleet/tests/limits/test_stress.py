"""A thousand jobs at once, and a host without room: typed errors, nothing left, healthy afterwards."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

testinfra_hosts = ["ansible://slave1"]

Submit = Callable[..., dict[str, Any]]

JOBS = 1000

# Runs on the slave: every job has a connection of its own, all at the same time.
DRIVER = r"""
import collections, json, socket, sys, time

count = int(sys.argv[1])
job = {"environment": "base", "stages": [{"name": "run", "command": ["sh", "-c", "exit 0"]}]}
request = json.dumps({"version": 3, "op": "run", "jobs": [job]}).encode() + b"\n"
connections = []
for _ in range(count):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("/run/cellblock/cellblock.socket")
    connection.sendall(request)
    connections.append(connection)
# A tenth of the clients lose patience; their jobs must not run.
for connection in connections[::10]:
    connection.close()
seen, ids, waited = collections.Counter(), set(), 0
for number, connection in enumerate(connections):
    if number % 10 == 0:
        continue
    answer = json.loads(next(filter(str.strip, connection.makefile())))
    result = answer.get("result", {})
    seen[result.get("verdict") or answer["error"]["text"]] += 1
    ids.add(result.get("job_id"))
    waited = max(waited, result.get("queue_time_ms", 0))
print(json.dumps({"seen": seen, "ids": len(ids), "waited": waited}))
"""

LEFTOVERS = (
    "ls /run/cellblock/jobs; find /sys/fs/cgroup -path '*cellblock-jobs/*' -type d; "
    "ps -eo uid= | awk '$1 >= 1900000000'"
)


def run_driver(host: Any, count: int) -> dict[str, Any]:
    encoded = base64.b64encode(DRIVER.encode()).decode()
    done = host.run(f"echo {encoded} | base64 -d > /tmp/stress.py; python3 /tmp/stress.py {count}")
    assert done.rc == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_thousand_jobs_at_once(
    host: Any, repetitions: Callable[[int], int], thorough: bool
) -> None:
    """Once, or ten times: ten thousand jobs."""
    count = repetitions(JOBS)
    for _ in range(10 if thorough else 1):
        result = run_driver(host, count)
        assert result["seen"] == {"ok": count - count // 10}
        assert result["ids"] == count - count // 10
        # They waited for one another, and the record says so.
        assert result["waited"] > 100
        assert host.check_output(LEFTOVERS) == ""


def test_no_room_for_scratch(host: Any, submit: Submit) -> None:
    job = {"environment": "base", "stages": [{"name": "run", "command": ["true"]}]}
    # Where scratches are made, in the service's own mount namespace, comes a file system without a
    # free inode.
    inside = "nsenter --mount --target $(systemctl show -p MainPID --value cellblock)"
    host.check_output(f"{inside} mount -t tmpfs -o nr_inodes=1 full /run/cellblock/jobs")
    try:
        error = submit(job).get("error", {"code": "none", "message": ""})
    finally:
        host.check_output(f"{inside} umount /run/cellblock/jobs")
    assert error["code"] == "internal_error"
    assert "No space left" in error["message"]
    assert submit(job)["verdict"] == "ok"
    assert host.check_output(LEFTOVERS) == ""
