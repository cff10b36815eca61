"""The operator's way: run-job.yml, its table, its records, and its errors."""

from __future__ import annotations

import base64
import collections
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

ROOT = Path(__file__).resolve().parents[4]

Playbook = Callable[..., Any]


def jobs(*names: str) -> str:
    return json.dumps({"job": [f"jobs/{name}.yml" for name in names]})


@pytest.fixture(scope="module")
def examples(
    playbook: Playbook, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """All example jobs in one run: what was printed, and the records by job name."""
    output = tmp_path_factory.mktemp("records") / "results.json"
    names = sorted(path.stem for path in (ROOT / "jobs").glob("*.yml"))
    done = playbook("run-job.yml", "-e", jobs(*names), "-e", f"output={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {record["name"]: record for record in json.loads(output.read_text())}


def test_the_examples(examples: tuple[str, dict[str, Any]]) -> None:
    _, records = examples
    assert [stage["verdict"] for stage in records["hello-c"]["stages"]] == ["ok", "ok"]
    assert "Hello from C" in records["hello-c"]["stages"][1]["stdout"]["text"]
    assert (
        "Hello, operator, from Python 3.11"
        in records["hello-python"]["stages"][0]["stdout"]["text"]
    )
    assert [stage["verdict"] for stage in records["numpy"]["stages"]] == ["ok", "ok"], records[
        "numpy"
    ]
    assert records["numpy"]["stages"][1]["stdout"]["text"] == "[0.8, 1.4]\n"
    assert records["package-cache"]["stages"][0]["verdict"] == "ok"
    aborted = records["abort"]["stages"][0]
    assert (aborted["signal"], aborted["exit_code"]) == ({"name": "SIGABRT", "number": 6}, None)
    exited = records["exit-137"]["stages"][0]
    assert (exited["signal"], exited["exit_code"]) == (None, 137)


def test_jobs_are_spread_over_the_slaves(examples: tuple[str, dict[str, Any]]) -> None:
    assert {record["host"] for record in examples[1].values()} == {"slave1", "slave2"}


def test_the_table(examples: tuple[str, dict[str, Any]]) -> None:
    rows = [line.split() for line in examples[0].splitlines()]
    assert ["job", "host", "stage", "verdict", "exit", "wall", "cpu", "memory"] in rows
    assert any(row[:1] == ["abort"] and row[3:5] == ["signaled", "SIGABRT"] for row in rows)
    assert any(row[:1] == ["exit-137"] and row[3:5] == ["nonzero_exit", "137"] for row in rows)


GOOD = {"environment": "base", "stages": [{"name": "run", "command": ["touch", "/work/ran"]}]}


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({**GOOD, "environment": "cobol"}, ["environment", "'cobol'", "slave", "base, c, python"]),
        ({**GOOD, "colour": "red"}, ["colour", "not a known field", "environment, stages"]),
        (
            {**GOOD, "files": {"/etc/x": {"text": ""}}},
            ["files./etc/x", "absolute path", "relative"],
        ),
        (
            {**GOOD, "files": {"../x": {"text": ""}}},
            ["files.../x", "'..'", "inside the work directory"],
        ),
        (
            {
                "environment": "base",
                "stages": [
                    {"name": "run", "command": ["true"], "constraints": {"memory_bytes": "64"}}
                ],
            },
            ["stages[0].constraints.memory_bytes", "no unit", "MiB"],
        ),
        (
            {
                "environment": "base",
                "stages": [
                    {"name": "run", "command": ["true"], "constraints": {"processes": 99999}}
                ],
            },
            ["processes is 99999", "maximum is 1024"],
        ),
    ],
    ids=["environment", "field", "absolute", "dotdot", "unit", "maximum"],
)
def test_bad_jobs(
    playbook: Playbook, tmp_path: Path, job: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(job))
    done = playbook("run-job.yml", "-e", f"job={path}")
    assert done.returncode != 0
    printed = " ".join((done.stdout + done.stderr).split())
    for word in words:
        assert word in printed, printed


def test_a_mistake_in_one_job_runs_none_on_any_slave(playbook: Playbook, tmp_path: Path) -> None:
    paths = [tmp_path / "good.json", tmp_path / "bad.json"]
    paths[0].write_text(json.dumps(GOOD))
    paths[1].write_text(json.dumps({**GOOD, "environment": "cobol"}))
    done = playbook("run-job.yml", "-e", json.dumps({"job": [str(path) for path in paths]}))
    assert done.returncode != 0
    assert "TASK [Ask the slaves whether they would run the jobs]" in done.stdout
    assert "TASK [Run this slave's share of the jobs]" not in done.stdout


def test_no_job_given(playbook: Playbook) -> None:
    done = playbook("run-job.yml")
    assert done.returncode != 0
    assert "-e job=jobs/hello-c.yml" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("name", ["site.yml", "run-job.yml"])
def test_an_inventory_without_slaves(playbook: Playbook, tmp_path: Path, name: str) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("all:\n  children:\n    worker_slaves:\n")
    done = playbook(name, "-e", "job=jobs/hello-c.yml", inventory=inventory)
    assert done.returncode != 0
    assert "worker_slaves" in done.stdout + done.stderr


BOTH = jobs("hello-c", "abort")


def told(done: Any) -> str:
    return " ".join((done.stdout + done.stderr).split())


def ran(output: Path) -> dict[str, str]:
    """By whom each job's record is."""
    return {record["name"]: record["host"] for record in json.loads(output.read_text())}


def test_limited_to_a_slave(playbook: Playbook, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = playbook("run-job.yml", "-e", BOTH, "-e", f"output={output}", "--limit", "slave1")
    assert done.returncode == 0, told(done)
    assert ran(output) == {"hello-c": "slave1", "abort": "slave1"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit", "cache1"), "--limit cache1 names no slave; name some of slave1, slave2"),
        (("--tags", "jobs"), "leave out --tags and --skip-tags"),
        (("--skip-tags", "jobs"), "leave out --tags and --skip-tags"),
        (("-e", "output=/nosuch/x.json"), "output: there is no directory /nosuch"),
        (("--start-at-task", "Run this slave's share of the jobs"), "undefined"),
    ],
    ids=["limit", "tags", "skip-tags", "output", "start-at-task"],
)
def test_no_run_ends_well_that_ran_no_job(
    playbook: Playbook, arguments: tuple[str, ...], words: str
) -> None:
    done = playbook("run-job.yml", "-e", BOTH, *arguments)
    assert done.returncode != 0
    assert words in told(done)
    assert "Hello from C" not in done.stdout


@pytest.fixture
def instead_of_cellblock(host: Any) -> Iterator[Callable[..., None]]:
    """Has a shell script answer on slave2 in place of the engine's command, as its captor would."""
    slave2 = host.get_host("ansible://slave2")
    real = "/usr/local/bin/cellblock"
    slave2.check_output(f"mv {real} {real}.kept")

    def put(script: str, first: str = "cat >/dev/null") -> None:
        content = base64.b64encode(f"#!/bin/sh\n{first}\n{script}\n".encode()).decode()
        slave2.check_output(f"echo {content} | base64 -d > {real} && chmod 755 {real}")

    yield put
    slave2.check_output(f"mv {real}.kept {real}")


def test_a_slave_that_does_not_answer_gets_no_job(
    playbook: Playbook, instead_of_cellblock: Callable[[str], None], tmp_path: Path
) -> None:
    instead_of_cellblock("exec sleep 20")
    output = tmp_path / "results.json"
    done = playbook(
        *("run-job.yml", "-e", BOTH, "-e", f"output={output}", "-e", "run_job_check_timeout_s=4")
    )
    assert done.returncode == 0, told(done)
    assert ran(output) == {"hello-c": "slave1", "abort": "slave1"}
    assert "slave2 got no job: Timed out after 4 second(s)" in told(done)


def test_a_slave_that_refuses_everything_stops_no_other(
    playbook: Playbook, instead_of_cellblock: Callable[[str], None], tmp_path: Path
) -> None:
    instead_of_cellblock("echo 'not for you' >&2; exit 2")
    output = tmp_path / "results.json"
    done = playbook("run-job.yml", "-e", BOTH, "-e", f"output={output}")
    assert done.returncode == 0, told(done)
    assert ran(output) == {"hello-c": "slave1", "abort": "slave1"}
    assert "slave2 got no job: not for you" in told(done)


def test_records_that_a_slave_makes_up_cost_its_own_jobs_alone(
    playbook: Playbook, instead_of_cellblock: Callable[[str], None], tmp_path: Path
) -> None:
    # Of another slave's job, and with that one's name.
    forged = {"name": "hello-c", "host": "slave1", "verdict": "ok", "stages": []}
    instead_of_cellblock(f"[ $1 = check ] || echo '{json.dumps(forged)}'")
    output = tmp_path / "results.json"
    done = playbook("run-job.yml", "-e", BOTH, "-e", f"output={output}")
    assert done.returncode != 0
    assert ran(output) == {"hello-c": "slave1"}
    assert len(json.loads(output.read_text())[0]["stages"]) == 2
    assert "abort: no record from slave2: what it returned makes no sense" in told(done)


@pytest.mark.parametrize(
    ("maxima", "words"),
    [
        ({"memory_bytes": "4G"}, "worker_slave_maxima.memory_bytes"),
        ({"memory": "4GiB"}, "worker_slave_maxima.memory: is not a limit"),
    ],
    ids=["unit", "name"],
)
def test_maxima_that_the_engine_would_not_start_with_are_refused(
    host: Any, playbook: Playbook, maxima: dict[str, str], words: str
) -> None:
    before = host.check_output("sha256sum /etc/cellblock/engine.json")
    given = json.dumps({"worker_slave_maxima": maxima})
    done = playbook("site.yml", "--limit", "slave1", "--tags", "worker_slave_config", "-e", given)
    assert done.returncode != 0
    assert words in told(done)
    assert host.check_output("sha256sum /etc/cellblock/engine.json") == before


def test_the_service_says_whether_it_would_start(host: Any) -> None:
    assert host.run("cellblock check-config /etc/cellblock/engine.json").rc == 0
    config = json.loads(host.file("/etc/cellblock/engine.json").content_string)
    wrong = json.dumps({**config, "maxima": {"memory": "1GiB"}})
    content = base64.b64encode(wrong.encode()).decode()
    host.check_output(f"echo {content} | base64 -d >/root/wrong.json")
    done = host.run("cellblock check-config /root/wrong.json; s=$?; rm /root/wrong.json; exit $s")
    assert done.rc == 3
    assert "maxima.memory: is not a limit" in done.stderr


def test_check_mode_runs_no_job(playbook: Playbook, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = playbook(
        "run-job.yml", "-e", "job=jobs/hello-c.yml", "-e", f"output={output}", "--check"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not output.exists()
    assert "Hello from C" not in done.stdout


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=lambda end: end.name)
def test_the_job_ends_with_its_play(
    host: Any,
    start_playbook: Callable[..., subprocess.Popen[bytes]],
    tmp_path: Path,
    slowness: int,
    end: signal.Signals,
) -> None:
    path = tmp_path / "long.json"
    stage = {"name": "run", "command": ["sleep", "135791"], "constraints": {"wall_time_ms": "2min"}}
    path.write_text(json.dumps({"environment": "base", "stages": [stage]}))
    running = "pgrep -fx 'sleep 135791'"
    with start_playbook("run-job.yml", "-e", f"job={path}", "--limit", "slave1") as play:
        assert waits_for(lambda: host.run(running).rc == 0), "the job did not start"
        play.send_signal(end)
        play.wait(timeout=30)
    assert waits_for(lambda: host.run(running).rc == 1, 2 * slowness), "the job outlived its play"


def waits_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_an_environment_that_cannot_be_built_leaves_the_others(
    host: Any, playbook: Playbook
) -> None:
    before = host.file("/etc/cellblock/environments.json").content_string
    extra = {"environments_extra": {"odd": {"description": "odd", "packages": ["no-such-package"]}}}
    done = playbook("site.yml", "--tags", "environments", "-e", json.dumps(extra))
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "Environment 'odd': Debian bookworm has no package 'no-such-package'" in said
    assert "Name the environments that could not be built" in said
    assert said.count("failed=1") == 1
    assert host.file("/etc/cellblock/environments.json").content_string == before
    assert {"base", "c", "python"} <= set(host.file("/var/lib/cellblock/environments").listdir())


def test_a_slave_that_is_lost_on_the_way_costs_what_was_not_back(
    playbook: Playbook, instead_of_cellblock: Callable[..., None], tmp_path: Path
) -> None:
    real = "/opt/cellblock/engine/bin/cellblock"
    instead_of_cellblock(
        f'[ $1 = check ] && exec {real} "$@"; mkdir /tmp/one-round 2>/dev/null && exec {real} "$@"; '
        "rmdir /tmp/one-round; echo 'the disk is gone' >&2; exit 1",
        first="",
    )
    output = tmp_path / "results.json"
    jobs = json.dumps({"job": ["jobs/hello-c.yml"] * 40})
    done = playbook("run-job.yml", "-e", jobs, "-e", f"output={output}")
    assert done.returncode != 0
    hosts = collections.Counter(record["host"] for record in json.loads(output.read_text()))
    assert hosts == {"slave1": 20, "slave2": 16}
    assert "hello-c: no record from slave2: the disk is gone" in told(done)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_jobs_that_were_lost_are_given_to_another_slave(
    playbook: Playbook, instead_of_cellblock: Callable[..., None], tmp_path: Path
) -> None:
    real = "/opt/cellblock/engine/bin/cellblock"
    instead_of_cellblock(
        f"[ $1 = check ] && exec {real} \"$@\"; echo 'the disk is gone' >&2; exit 1", first=""
    )
    output = tmp_path / "results.json"
    jobs = json.dumps({"job": ["jobs/hello-c.yml", "jobs/abort.yml"]})
    done = playbook("run-job.yml", "-e", jobs, "-e", f"output={output}", "-e", "rerun_lost=true")
    assert done.returncode == 0, told(done)
    assert ran(output) == {"hello-c": "slave1", "abort": "slave1"}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
