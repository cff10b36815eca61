"""The filters behind playbooks/run-job.yml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import jobs

ROOT = Path(__file__).resolve().parents[2]
JOB = {"environment": "base", "stages": [{"name": "run", "command": ["true"]}]}


def write(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def test_a_job_is_named_after_its_file_unless_it_has_a_name(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "first.yml", JOB),
        write(tmp_path / "second.yml", {**JOB, "name": "own"}),
    ]
    assert [job["name"] for job in jobs.read_jobs(paths)] == ["first", "own"]
    assert jobs.read_jobs(paths[0])[0]["name"] == "first"


@pytest.mark.parametrize("given", [None, [], 3, [3], {"a": 1}, ""])
def test_what_is_not_a_path(given: Any) -> None:
    with pytest.raises(AnsibleFilterError):
        jobs.read_jobs(given)


def test_a_mistake_names_file_and_field(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yml", {**JOB, "files": {"/x": {"text": ""}}})
    with pytest.raises(AnsibleFilterError) as caught:
        jobs.read_jobs(path)
    assert str(caught.value).startswith(f"{path}: files./x: is an absolute path; ")


def test_all_wrong_files_are_named(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "field.yml", {**JOB, "colour": "red"}),
        write(tmp_path / "good.yml", JOB),
        write(tmp_path / "file.yml", {**JOB, "files": {"a": {"path": "none"}}}),
        str(tmp_path / "missing.yml"),
    ]
    problems = jobs.job_problems(paths)
    assert [problem.split(": ")[0] for problem in problems] == [paths[0], paths[2], paths[3]]
    with pytest.raises(AnsibleFilterError) as caught:
        jobs.read_jobs(paths)
    assert str(caught.value) == "\n".join(problems)
    assert jobs.job_problems(paths[1]) == []
    assert jobs.job_problems(None) == [
        "job is not set; write -e job=jobs/hello-c.yml, or a list of files"
    ]


def test_run_job_says_each_sentence_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.yml", {**JOB, name: 1}) for name in ("colour", "taste")]
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            f"--inventory={ROOT / 'inventory/minimal'}",
            str(ROOT / "playbooks/run-job.yml"),
            *("-e", json.dumps({"job": paths})),
        ],
        env={
            **{k: v for k, v in os.environ.items() if k != "ANSIBLE_STDOUT_CALLBACK"},
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "Finalization" not in done.stdout + done.stderr
    for path, field in zip(paths, ("colour", "taste"), strict=True):
        assert done.stdout.count(f"{path}: {field}: is not a known field") == 1, done.stdout


def test_jobs_are_dealt_out_in_turn() -> None:
    deal = [{"n": n} for n in range(5)]
    hosts = ["a", "b"]
    assert [job["n"] for job in jobs.share_jobs(deal, hosts, "a")] == [0, 2, 4]
    assert [job["n"] for job in jobs.share_jobs(deal, hosts, "b")] == [1, 3]
    with pytest.raises(AnsibleFilterError):
        jobs.share_jobs(deal, hosts, "c")


def test_table_of_violations_and_signals() -> None:
    stage = {
        "name": "run",
        "verdict": "limit_exceeded",
        "violations": [{"limit": "wall_time_ms"}, {"limit": "stdout_bytes"}],
        "signal": {"name": "SIGKILL", "number": 9},
        "exit_code": None,
        "usage": None,
        "stdout": {"text": ""},
        "stderr": {"text": ""},
        "reason": None,
    }
    table = jobs.result_table([{"name": "j", "host": "h", "stages": [stage]}])
    assert table.splitlines()[1].split() == [
        "j", "h", "run", "limit_exceeded", "(wall_time_ms,", "stdout_bytes)", "SIGKILL", "-", "-", "-",
    ]  # fmt: skip


def test_what_jobs_wrote_is_shown_but_cannot_act_on_the_terminal() -> None:
    stage: dict[str, Any] = {
        "name": "run",
        "verdict": "ok",
        "violations": [],
        "signal": None,
        "exit_code": 0,
        "usage": None,
        "stdout": {"text": "héllo\n\x1b[2Jcleared\n" + "more\n" * 9},
        "stderr": {"base64": "/w==", "size_bytes": 1},
        "reason": None,
    }
    shown = jobs.result_table([{"name": "j", "host": "h", "stages": [stage]}]).splitlines()
    assert shown[2:5] == ["", "j/run stdout: héllo", "j/run stdout: \\x1b[2Jcleared"]
    assert shown[-2:] == [
        "j/run stdout: (6 more lines)",
        "j/run stderr: (1 bytes that are not text)",
    ]


def test_the_table_shows_the_end_of_standard_error_and_what_was_not_collected() -> None:
    stage: dict[str, Any] = {
        "name": "run",
        "verdict": "nonzero_exit",
        "violations": [],
        "signal": None,
        "exit_code": 1,
        "usage": None,
        "stdout": {"text": ""},
        "reason": None,
    }
    written = "".join(f"at line {n}\n" for n in range(9)) + "ValueError: why\n"
    record = {
        "name": "j",
        "host": "h",
        "stages": [{**stage, "stderr": {"text": written, "size_bytes": 1, "truncated": False}}],
        "files": [{"name": "out", "problem": None}, {"name": "plot\x1b.png", "problem": "missing"}],
    }
    shown = jobs.result_table([record]).splitlines()
    assert shown[-7:] == [
        "j/run stderr: (5 earlier lines)",
        *(f"j/run stderr: at line {n}" for n in range(5, 9)),
        "j/run stderr: ValueError: why",
        "j file plot\\x1b.png: not collected, missing",
    ]


def test_jobs_that_were_lost_are_collected_from_another_host() -> None:
    asked: list[dict[str, Any]] = [
        {"name": name, "stages": []} for name in ("kept", "gone", "broken")
    ]
    kept = {"name": "kept", "verdict": "ok", "stages": []}
    broken = {
        "name": "broken",
        "verdict": "internal_error",
        "stages": [],
        "error": {"text": "no disk"},
    }
    first = jobs.collect_records(
        {"a": {"results": [kept, broken]}, "b": {"unreachable": True, "msg": "gone"}},
        asked,
        ["a", "b"],
    )
    assert [job["name"] for job in first["lost_jobs"]] == ["broken", "gone"]
    assert first["reliable"] == []
    again = {"results": [{**broken, "verdict": "ok", "error": None}, {**kept, "name": "gone"}]}
    second = jobs.collect_records({"c": again}, first["lost_jobs"], ["c"], first["records"])
    assert second["lost"] == []
    assert {record["name"]: record["host"] for record in second["records"]} == {
        "kept": "a",
        "broken": "c",
        "gone": "c",
    }
