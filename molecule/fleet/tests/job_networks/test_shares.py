"""What a job opens at the cache server is its own share: hosts are served whatever jobs hold open, and who gets
the address next finds nothing of it.
"""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

import pytest

from .test_attacks import Lab, lab  # noqa: F401

testinfra_hosts = ["ansible://slave1"]

HELD_SECONDS = 8
# Of the firewall, for one address of jobs.
SHARE = 128
MANY = {
    "constraints": {
        "network_connections": 4096,
        "network_connections_per_second": 256,
        "open_files": 4096,
        "wall_time_ms": 60_000,
        "cpu_time_ms": 50_000,
    }
}
# As a host that takes packages and asks names; prints how long each took, and what failed.
SERVED = r"""
import json, socket, struct, sys, time
address = sys.argv[1]
worst = {"http": 0.0, "dns": 0.0}
failed = []
name = b"\x06cache1\x09cellblock\x08internal\x00"
question = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + name + struct.pack(">HH", 1, 1)
asks = {
    "http": (3142, b"GET /none HTTP/1.1\r\nHost: cache1:3142\r\nConnection: close\r\n\r\n"),
    "dns": (53, struct.pack(">H", len(question)) + question),
}
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    for kind, (port, said) in asks.items():
        begin = time.monotonic()
        try:
            with socket.create_connection((address, port), 8) as s:
                s.sendall(said)
                if not s.recv(100):
                    failed.append(f"{kind}: closed")
        except OSError as problem:
            failed.append(f"{kind}: {problem}")
        worst[kind] = max(worst[kind], time.monotonic() - begin)
    time.sleep(0.1)
print(json.dumps({"worst": worst, "failed": failed}))
"""


def served(lab: Lab, seconds: float) -> dict[str, Any]:  # noqa: F811
    command = f"python3 -c {shlex.quote(SERVED)} {lab.v4('cache1')} {seconds}"
    answer: dict[str, Any] = json.loads(lab.machines["master1"].check_output(command))
    return answer


@pytest.mark.parametrize(
    ("port", "begin", "policy"), [(3142, "GET /debian", "cache"), (53, "\0", "internet")]
)
def test_unfinished_requests_of_jobs(lab: Lab, port: int, begin: str, policy: str) -> None:  # noqa: F811
    """Two jobs open what they get and never end a request."""
    assert served(lab, 0.5)["failed"] == []
    given = {"address": lab.v4("cache1"), "port": port, "begin": begin}
    jobs = [
        lab.threads.submit(
            lab.job, slave, "hold", policy, fields=MANY, most=3000, seconds=HELD_SECONDS, **given
        )
        for slave in ("slave1", "slave1")
    ]
    time.sleep(HELD_SECONDS / 2)
    seen = served(lab, HELD_SECONDS / 2)
    told = [job.result(60) for job in jobs]
    # The control: they did open what they may, and nobody closed it at once.
    assert all(job["got"] >= 10 for job in told), told
    assert all(job["held"] <= SHARE for job in told), told
    assert seen["failed"] == [], (seen, told)
    assert max(seen["worst"].values()) < 2, (seen, told)


def held_by(lab: Lab, slave: str) -> int:  # noqa: F811
    """Connections that the cache server has with jobs of the slave."""
    network = lab.network(slave)
    of_jobs = lab.v4(slave) if network["mode"] == "routed" else network["addresses"]
    command = f"ss -Htn state connected exclude time-wait 'sport = :3142 and dst {of_jobs}' | wc -l"
    return int(lab.machines["cache1"].check_output(command))


@pytest.mark.parametrize("slave", ["slave1", "slave2"])
def test_nothing_is_left_to_the_next_job(lab: Lab, slave: str) -> None:  # noqa: F811
    """A job leaves 64 downloads unfinished and its byte quota used up, so that it can end none of them."""
    request = "GET /debian/dists/bookworm/InRelease HTTP/1.1\r\nHost: cache:3142\r\n\r\n"
    fields = {"constraints": {**MANY["constraints"], "network_bytes": 1_000_000}}
    given = {"address": lab.v4("cache1"), "port": 3142, "begin": request, "most": 64, "seconds": 5}
    job = lab.threads.submit(lab.record, slave, "hold", "cache", fields=fields, **given)
    most = 0
    while not job.done():
        most = max(most, held_by(lab, slave))
    (stage,) = job.result()["stages"]
    assert stage["verdict"] == "limit_exceeded", stage
    # The control: it had them.
    assert most >= 8, stage
    end = time.monotonic() + 3
    while (left := held_by(lab, slave)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == 0
