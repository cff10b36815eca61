"""The prober in jobs and slots, against a ``cellblock`` command of this file's own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils import _network_probe
from ansible_collections.cellblock.fleet.plugins.module_utils import _network_sandbox as sandbox

Command = Callable[[str], None]
# Nobody listens there.
TARGET = {"id": "own", "address": "127.0.0.1", "protocol": "tcp", "port": 1}

# Runs a job's program here, as the engine would, and prints a record.
RUN = """
job = json.load(sys.stdin)
stage = job["stages"][0]
source = job["files"]["probe.py"]["text"]
done = subprocess.run([sys.executable, "-c", source], input=stage["stdin"]["text"],
                      capture_output=True, text=True)
print(json.dumps({"stages": [{"verdict": "ok" if done.returncode == 0 else "nonzero_exit",
    "reason": stage["network"], "stdout": {"text": done.stdout}, "stderr": {"text": done.stderr}}]}))
"""
SLOT = """
assert sys.argv[1:5] == ["slot", "--policy", "internet", "--"], sys.argv
os.execvp(sys.argv[5], sys.argv[5:])
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    def be(program: str) -> None:
        file = tmp_path / "cellblock"
        file.write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\n{program}")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(sandbox, "CONFIG", str(tmp_path / "engine.json"))
    return be


def offer(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "offered_slots", lambda: slots)


def probed(kind: str, **more: Any) -> dict[str, Any]:
    box = {"name": "box", "kind": kind, "policy": "internet", "targets": [TARGET], **more}
    return sandbox.probe([box], 500)["box"]


@pytest.mark.parametrize(("kind", "program"), [("job", RUN), ("slot", SLOT)])
def test_probes_from_there(command: Command, kind: str, program: str) -> None:
    command(program)
    (result,) = probed(kind)["results"]
    assert (result["id"], result["outcome"]) == ("own", "refused")


def test_what_a_job_is_asked(command: Command, tmp_path: Path) -> None:
    command(f"open({str(tmp_path / 'job')!r}, 'w').write(sys.stdin.read())")
    probed("job", policy="cache")
    job = json.loads((tmp_path / "job").read_text())
    (stage,) = job["stages"]
    assert (job["environment"], stage["network"]) == ("python", "cache")
    assert json.loads(stage["stdin"]["text"]) == {"targets": [TARGET], "timeout_ms": 500}
    assert stage["constraints"]["wall_time_ms"] < 120_000, "more than hosts allow"


@pytest.mark.parametrize(
    ("kind", "program", "problem"),
    [
        ("job", "print('x')", "cellblock run printed no record but 'x"),
        ("job", "print(json.dumps({'error': {'text': 'no table'}})); sys.exit(3)", "failed (3)"),
        ("job", "print(json.dumps({'error': {'text': 'no table'}}))", "no table"),
        (
            "job",
            "print(json.dumps({'stages': [{'verdict': 'timeout', 'reason': 'wall', 'stderr': {}}]}))",
            "the job's verdict is timeout: 'wall'",
        ),
        (
            "job",
            "print(json.dumps({'stages': [{'verdict': 'ok', 'stdout': {'text': 'hm'}}]}))",
            "the prober printed no results but 'hm'",
        ),
        (
            "job",
            "print(json.dumps({'stages': [{'verdict': 'ok', 'stdout':"
            " {'text': json.dumps({'results': [{'id': 'other'}]})}}]}))",
            "not those of its targets",
        ),
        ("slot", "print('no slot is free', file=sys.stderr); sys.exit(3)", "no slot is free"),
        ("sibling", "", "its listener has ended"),
    ],
)
def test_what_went_wrong_is_said(command: Command, kind: str, program: str, problem: str) -> None:
    command(program)
    told = probed(kind)
    assert set(told) == {"problem"}
    assert problem in told["problem"]


def test_what_takes_too_long_is_ended(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MORE_S", 0.0)
    command("import time; time.sleep(60)")
    assert probed("slot")["problem"].endswith("did not end within 2 s")


def test_the_command_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "COMMAND", "cellblock-nosuch")
    assert probed("slot")["problem"].startswith("the command cellblock-nosuch is missing")


def test_all_are_tried_at_the_same_time_and_one_does_not_spoil_another(command: Command) -> None:
    command(f"if sys.argv[1] == 'run':\n    sys.exit(9)\n{SLOT}")
    boxes = [
        {"name": kind, "kind": kind, "policy": "internet", "targets": [TARGET]}
        for kind in ("job", "slot")
    ]
    done = sandbox.probe(boxes, 500)
    assert "problem" in done["job"]
    assert done["slot"]["results"]
    assert sandbox.probe([], 500) == {}


LISTENER = {"id": "quiet", "protocol": "udp", "port": 45999, "payload": "nonce"}


def test_a_sibling_listens_and_tells(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(2, monkeypatch)
    command(SLOT)
    started = sandbox.start_sibling("internet", [LISTENER], 20)
    assert started is not None
    try:
        assert [entry["ipv4"] for entry in started["listeners"]] == ["listening"]
        assert "interfaces" in started
        result = _network_probe.probe(
            [{"id": "x", "address": "127.0.0.1", "protocol": "udp", "port": 45999}], 1000
        )[0]
        assert result["outcome"] == "open"
    finally:
        told = sandbox.collect_sibling()
    assert told["was_running"]
    assert told["handle"] == started["handle"]
    assert result["payload"] in {entry["payload"] for entry in told["received"]}
    assert not sandbox.collect_sibling()["was_running"]


@pytest.mark.parametrize(
    ("config", "slots"),
    [
        ("{}", 0),
        ('{"network": null}', 0),
        ('{"network": {"slots": 16}}', 16),
        ("[]", 0),
        ("not JSON", 0),
        (None, 0),
    ],
)
def test_whether_jobs_have_a_network(tmp_path: Path, config: str | None, slots: int) -> None:
    file = tmp_path / "engine.json"
    if config is not None:
        file.write_text(config)
    assert sandbox.offered_slots(str(file)) == slots


def test_without_job_networks_nothing_is_started(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("raise SystemExit('never')")
    offer(0, monkeypatch)
    assert sandbox.start_sibling("internet", [LISTENER], 20) is None
    offer(1, monkeypatch)
    assert "one network slot only" in (sandbox.start_sibling("internet", [], 20) or {})["problem"]


def test_a_sibling_that_cannot_start_says_why(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(2, monkeypatch)
    command("print('table inet x: is not loaded', file=sys.stderr); sys.exit(3)")
    assert sandbox.start_sibling("internet", [LISTENER], 20) == {
        "problem": "cellblock failed (3): table inet x: is not loaded"
    }
