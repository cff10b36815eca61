"""The supervisor is killed at random moments of running batches: nothing stays, nothing returned is lost."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

KILLS = 60
BATCH = 8

# Runs on the slave. Prints one JSON object per kill.
DRIVER = r"""
import json, os, random, subprocess, sys, time

KILLS, BATCH, SLOWNESS = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
random.seed(20261123)
program = (
    "i=0; while [ $i -lt 20 ]; do (sleep 30 &) ; i=$((i+1)); done; "
    "head -c 100000 /dev/zero > /tmp/x; sleep 0.0$((RANDOM % 9)); echo end"
)
job = {"environment": "base", "stages": [
    {"name": name, "command": ["bash", "-c", program]} for name in ("one", "two")]}
batch = json.dumps([{**job, "name": f"job{n}"} for n in range(BATCH)]).encode()

def leftovers():
    # Between two starts the old one's leftovers may exist; after a start they must not.
    found = {
        "processes": subprocess.run(
            "ps -eo uid=,args= | awk '$1 >= 1900000000'; pgrep -a nsjail; pgrep -a jobinit",
            shell=True, capture_output=True, text=True).stdout.splitlines(),
        "cgroups": subprocess.run(
            "find /sys/fs/cgroup -path '*cellblock-jobs/*' -type d",
            shell=True, capture_output=True, text=True).stdout.splitlines(),
        "directories": os.listdir("/run/cellblock/jobs"),
        "mounts": [line for line in open("/proc/mounts") if "cellblock/jobs" in line],
    }
    return {name: what for name, what in found.items() if what}

def main_pid():
    return subprocess.run(["systemctl", "show", "-p", "MainPID", "--value", "cellblock"],
                          capture_output=True, text=True).stdout.strip()

def start_batch():
    client = subprocess.Popen(["cellblock", "run", "-"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    client.stdin.write(batch); client.stdin.close()
    return client

# How long it takes when nobody disturbs it: what moments are random within.
started = time.monotonic()
with start_batch() as undisturbed:
    undisturbed.stdout.read()
duration = time.monotonic() - started

for number in range(KILLS):
    client = start_batch()
    time.sleep(random.uniform(0.05, 0.8) * duration)
    old = main_pid()
    os.kill(int(old), 9)
    records = [json.loads(line) for line in client.stdout]
    client.wait()
    deadline = time.monotonic() + 10 * SLOWNESS
    while time.monotonic() < deadline:
        # `environments` is answered only by a service that has finished its start.
        if main_pid() not in ("0", old) and subprocess.run(
                ["cellblock", "environments"], capture_output=True).returncode == 0:
            break
        time.sleep(0.02)
    print(json.dumps({
        "records": [(r.get("name"), r.get("verdict"), "error" in r) for r in records],
        "left": leftovers(),
    }), flush=True)
"""


def test_killed_at_random_moments(
    host: Any, slowness: int, repetitions: Callable[[int], int], thorough: bool
) -> None:
    count = repetitions(KILLS if thorough else KILLS // 3)
    batch = BATCH if slowness == 1 else BATCH // 2
    encoded = base64.b64encode(DRIVER.encode()).decode()
    done = host.run(
        f"echo {encoded} | base64 -d > /tmp/driver.py; "
        f"timeout 600 python3 /tmp/driver.py {count} {batch} {slowness}"
    )
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == count, done.stderr
    assert [kill["left"] for kill in kills if kill["left"]] == []
    finished = lost = 0
    for kill in kills:
        if kill["records"] in ([], [[None, None, True]]):
            continue  # killed while the batch was being checked: an error, and nothing was run
        assert [name for name, _, _ in kill["records"]] == [f"job{n}" for n in range(batch)]
        for _, verdict, failed in kill["records"]:
            # A job of a killed supervisor is an error that says so, never a verdict on the job.
            assert failed or verdict == "ok", kill["records"]
            finished += not failed
            lost += failed
    # The moments were such that both happened.
    assert finished > 0 and lost > 0


def test_a_restart_is_complete(host: Any) -> None:
    job = {"environment": "base", "stages": [{"name": "run", "command": ["echo", "back"]}]}
    done = host.run(
        f"systemctl restart cellblock && printf %s '{json.dumps(job)}' | cellblock run -"
    )
    assert json.loads(done.stdout)["stages"][0]["stdout"]["text"] == "back\n"


@pytest.mark.kernel
def test_a_service_does_not_start_on_a_host_that_breaks_a_promise(
    host: Any, slowness: int, submit: Callable[..., dict[str, Any]]
) -> None:
    # With something mounted over a part of /proc the kernel gives no jail one of its own.
    host.check_output("mount -t tmpfs over /proc/tty")
    try:
        start = host.run("systemctl restart cellblock")
        journal = host.check_output("journalctl -u cellblock --since -60s -o cat")
    finally:
        host.check_output("umount /proc/tty; systemctl restart cellblock")
    assert start.rc != 0
    assert "does not keep a promise (start: a stage runs" in journal, journal
    job = {"environment": "base", "stages": [{"name": "run", "command": ["true"]}]}
    assert submit(job)["verdict"] == "ok"
