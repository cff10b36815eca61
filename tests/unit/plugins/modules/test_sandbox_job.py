# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0

"""sandbox_job against a stand-in for the cellblock command that records how it was called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.cellblock.fleet.plugins.module_utils import _reader
from ansible_collections.cellblock.fleet.plugins.modules import sandbox_job

JOB = {"name": "one", "environment": "base", "stages": [{"name": "run", "command": ["true"]}]}

Run = Callable[..., dict[str, Any]]


def record(name: str, verdict: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "stages": [], **more}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Path]:
    """Makes a stand-in that saves its arguments and input and prints what it is told to."""

    def make(records: list[dict[str, Any]], *, status: int = 0, stderr: str = "") -> Path:
        (tmp_path / "out").write_text("".join(json.dumps(line) + "\n" for line in records))
        (tmp_path / "err").write_text(stderr)
        path = tmp_path / "cellblock"
        path.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/input\n'
            f"cat {tmp_path}/out\ncat {tmp_path}/err >&2\nexit {status}\n"
        )
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(autouse=True)
def without_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would stay in this process, which does not end as a module does, beside other tests."""
    monkeypatch.setattr(_reader, "when_unread", lambda *_: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*, check: bool = False, **parameters: Any) -> dict[str, Any]:
        arguments = {**parameters, "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            sandbox_job.main()
        returned: dict[str, Any] = json.loads(capsys.readouterr().out)
        return returned

    return call


def test_jobs_go_in_and_records_come_out(
    run: Run, command: Callable[..., Path], tmp_path: Path
) -> None:
    records = [record("one", "ok"), record("two", "signaled")]
    done = run(jobs=[JOB, {**JOB, "name": "two"}], executable=str(command(records, status=1)))
    assert done["results"] == records
    assert not done["changed"]
    assert "failed" not in done
    assert (tmp_path / "arguments").read_text() == "run -\n"
    assert [job["name"] for job in json.loads((tmp_path / "input").read_text())] == ["one", "two"]


def test_one_job(run: Run, command: Callable[..., Path], tmp_path: Path) -> None:
    done = run(job=JOB, executable=str(command([record("one", "ok")])))
    assert len(done["results"]) == 1
    assert json.loads((tmp_path / "input").read_text()) == [JOB]


def test_check_mode_only_checks(run: Run, command: Callable[..., Path], tmp_path: Path) -> None:
    done = run(job=JOB, executable=str(command([])), check=True)
    assert (done["results"], done["changed"]) == ([], False)
    assert (tmp_path / "arguments").read_text() == "check -\n"


@pytest.mark.parametrize("check", [True, False])
def test_an_invalid_job_fails_with_the_commands_words(
    run: Run, command: Callable[..., Path], check: bool
) -> None:
    error = {"error": {"code": "invalid_job", "text": "x"}}
    stand_in = command([error], status=2, stderr="cellblock: job 1: stages: is missing; add it\n")
    done = run(job=JOB, executable=str(stand_in), check=check)
    assert done["failed"]
    assert done["msg"] == "cellblock: job 1: stages: is missing; add it"


@pytest.mark.parametrize(
    ("verdict", "fail_on", "failed"),
    [
        ("nonzero_exit", [], False),
        ("nonzero_exit", ["signaled"], False),
        ("nonzero_exit", ["nonzero_exit"], True),
        ("limit_exceeded", ["nonzero_exit", "limit_exceeded"], True),
        ("ok", ["nonzero_exit"], False),
    ],
)
def test_fail_on(
    run: Run, command: Callable[..., Path], verdict: str, fail_on: list[str], failed: bool
) -> None:
    stand_in = command([record("one", verdict)], status=0 if verdict == "ok" else 1)
    done = run(job=JOB, fail_on=fail_on, executable=str(stand_in))
    assert done.get("failed", False) is failed
    assert done["results"][0]["verdict"] == verdict
    if failed:
        assert done["msg"] == f"1 of 1 jobs failed: one ({verdict})"


def test_a_failure_of_the_service_fails_the_task(run: Run, command: Callable[..., Path]) -> None:
    records = [
        record("one", "ok"),
        record("two", "internal_error", error={"code": "host_setup", "text": "no cgroup"}),
    ]
    done = run(jobs=[JOB, JOB], executable=str(command(records, status=3)))
    assert done["failed"]
    assert done["msg"] == "1 of 2 jobs failed: two (no cgroup)"
    assert done["results"] == records


def test_a_missing_record_is_not_taken_for_success(run: Run, command: Callable[..., Path]) -> None:
    done = run(jobs=[JOB, JOB], executable=str(command([record("one", "ok")])))
    assert done["failed"]


def test_a_host_that_was_not_provisioned(run: Run) -> None:
    done = run(job=JOB, executable="/nonexistent/cellblock")
    assert done["failed"]
    assert "worker_slave" in done["msg"]


def test_no_jobs(run: Run) -> None:
    assert run(jobs=[])["results"] == []


@pytest.mark.parametrize(
    "parameters", [{}, {"job": JOB, "jobs": [JOB]}, {"job": JOB, "fail_on": ["ok"]}]
)
def test_bad_parameters(run: Run, parameters: dict[str, Any]) -> None:
    assert run(**parameters)["failed"]
