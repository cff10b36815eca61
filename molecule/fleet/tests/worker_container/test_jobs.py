"""Jobs in the worker container: as on the host, and what becomes of them when it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import NAME

testinfra_hosts = ["ansible://slave2"]

TARGET = {"kind": "worker_container", "runtime": "userns", "is_boundary": True}
DEVICES = (
    "head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; echo x >/dev/null && echo null"
)


def job(command: list[str], target: str = "worker_container", **fields: Any) -> dict[str, Any]:
    return {
        "environment": "python",
        "target": target,
        "stages": [{"name": "run", "command": command, **fields}],
    }


def test_a_job_runs_in_it_as_on_the_host(submit: Callable[..., dict[str, Any]]) -> None:
    script = (
        "import os\n"
        "print(open('in.txt').read(), os.getuid(), open('/proc/self/status').read().count('0000000000000000'))\n"
        "print(sorted(os.listdir('/')), os.listdir('/proc/self/fd'))\n"
        "open('out.txt', 'w').write('made')"
    )
    records = [
        submit(
            {
                **job(["python3", "-c", script], target),
                "files": {"in.txt": {"text": "hello"}},
                "collect": ["out.txt"],
            }
        )
        for target in ("host", "worker_container")
    ]
    first, second = (record["stages"][0] for record in records)
    assert second["verdict"] == "ok", second
    assert first["stdout"] == second["stdout"]
    assert [record["files"][0]["text"] for record in records] == ["made", "made"]
    assert records[0]["target"] == {"kind": "host", "runtime": None, "is_boundary": True}
    assert records[1]["target"] == TARGET


def test_limits_hold_there(submit: Callable[..., dict[str, Any]]) -> None:
    cases = {
        "memory_bytes": (["python3", "-c", "b'x' * 10**9"], {"memory_bytes": "64MiB"}),
        "cpu_time_ms": (["sh", "-c", "while :; do :; done"], {"cpu_time_ms": 300}),
        "wall_time_ms": (["sleep", "9"], {"wall_time_ms": 300}),
        "processes": (
            ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 2 & done; wait"],
            {"processes": 4},
        ),
    }
    for limit, (command, constraints) in cases.items():
        stage = submit(job(command, constraints=constraints))["stages"][0]
        assert [v["limit"] for v in stage["violations"]] == [limit], stage
        assert stage["usage"]["sources"]["wall_time_ms"] == "supervisor_clock"


def test_what_is_mounted_there_and_unmounted_stays_on_the_host(
    submit: Callable[..., dict[str, Any]],
) -> None:
    for target in ("worker_container", "host", "worker_container", "host"):
        stage = submit(job(["sh", "-c", DEVICES], target))["stages"][0]
        assert stage["stdout"]["text"].split() == ["3", "3", "null"], target


def test_its_end_is_a_verdict_and_the_next_job_finds_another(
    host: Any, start_job: Any, submit: Callable[..., dict[str, Any]], ready: Any
) -> None:
    record = start_job("sh", "-c", "echo begun; sleep 20")
    time.sleep(1)
    began = time.monotonic()
    host.check_output(f"docker kill {NAME}")
    ended = record()
    assert ended["verdict"] == "worker_lost", ended
    assert ended["stages"][0]["stdout"]["text"] == "begun\n"
    assert "run the job again" in ended["stages"][0]["reason"]
    assert submit(job(["true"]))["verdict"] == "ok"
    assert time.monotonic() - began < 10
    ready()


def test_an_engine_that_restarts_ends_neither_it_nor_its_jobs(host: Any, start_job: Any) -> None:
    before = host.check_output(f"docker inspect --format '{{{{.State.Pid}}}}' {NAME}")
    record = start_job("sh", "-c", "sleep 6; echo done")
    host.check_output("systemctl restart docker")
    assert record()["stages"][0]["stdout"]["text"] == "done\n"
    assert host.check_output(f"docker inspect --format '{{{{.State.Pid}}}}' {NAME}") == before


@pytest.mark.parametrize("policy", ["none", "cache", "internet"])
def test_a_job_there_reaches_what_one_on_the_host_does(
    submit: Callable[..., dict[str, Any]], report: dict[str, Any], policy: str
) -> None:
    """The targets and their addresses are the matrix's, which was tried from jobs on the host."""
    program = (
        "import json, socket, sys\n"
        "found = {}\n"
        "for address, port in json.load(sys.stdin):\n"
        "    try:\n"
        "        socket.create_connection((address, port), 1).close()\n"
        "        found[f'{address} {port}'] = True\n"
        "    except OSError:\n"
        "        found[f'{address} {port}'] = False\n"
        "print(json.dumps(found, sort_keys=True))"
    )
    places = sorted(
        {
            (seen["address"], finding["port"])
            for finding in report["cells"]
            if finding["vantage"] == f"slave2/{policy}"
            and finding["protocol"] == "tcp"
            and finding["path"] == "ipv4"
            and finding["kind"] == "service"
            for seen in finding["seen"]
        }
    )
    assert places
    fields = {"stdin": {"text": json.dumps(places)}, "network": policy}
    fields["constraints"] = {"wall_time_ms": "60s"}
    here, there = (
        submit(job(["python3", "-c", program], target, **fields))["stages"][0]
        for target in ("host", "worker_container")
    )
    assert here["verdict"] == there["verdict"] == "ok", there
    reached = json.loads(there["stdout"]["text"])
    assert reached == json.loads(here["stdout"]["text"])
    assert any(reached.values()) is (policy != "none")
    assert not all(reached.values())
    if policy != "none":
        assert there["usage"]["network_sent_packets"] > 0
