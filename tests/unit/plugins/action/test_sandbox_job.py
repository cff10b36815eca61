"""Jobs in rounds: what came back before a host was lost is returned, and written as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible_collections.cellblock.fleet.plugins.action import sandbox_job

JOBS = [{"name": f"job{number}", "stages": []} for number in range(100)]


def record(job: dict[str, Any], verdict: str = "ok") -> dict[str, Any]:
    return {"name": job["name"], "verdict": verdict, "stages": [], "files": []}


class Host:
    """Runs what it is given, until it is lost."""

    def __init__(self, rounds: int = 99) -> None:
        self.rounds = rounds
        self.sizes: list[int] = []

    def __call__(self, *, module_args: dict[str, Any], **_: Any) -> dict[str, Any]:
        assert set(module_args) == {"jobs"}
        self.sizes.append(len(module_args["jobs"]))
        if len(self.sizes) > self.rounds:
            raise AnsibleConnectionFailure("gone")
        return {"changed": False, "results": [record(job) for job in module_args["jobs"]]}


def run(host: Any, **args: Any) -> dict[str, Any]:
    task = mock.Mock(args={"jobs": JOBS, **args}, check_mode=False, async_val=0)
    action = sandbox_job.ActionModule(task, mock.Mock(), mock.Mock(), None, mock.Mock(), None)
    with (
        mock.patch("ansible.plugins.action.ActionBase.run"),
        mock.patch.multiple(action, _execute_module=host, _remove_tmp_path=mock.DEFAULT),
    ):
        result: dict[str, Any] = action.run(task_vars={"inventory_hostname": "slave1"})
    return result


def names(result: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in result["results"]]


def test_all_at_once_unless_it_is_asked_for() -> None:
    host = Host()
    assert len(run(host)["results"]) == 100
    assert host.sizes == [100]


def test_rounds_grow_while_they_are_short_and_shrink_when_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host()
    assert names(run(host, in_rounds=True)) == [job["name"] for job in JOBS]
    assert host.sizes == [16, 32, 52]
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(sandbox_job, "time", mock.Mock(monotonic=lambda: next(clock)))
    slow = Host()
    run(slow, in_rounds=True)
    assert slow.sizes[:5] == [16, 8, 4, 2, 1]


def test_a_lost_host_keeps_the_rounds_before(tmp_path: Path) -> None:
    file = tmp_path / "records"
    result = run(Host(rounds=2), in_rounds=True, records_file=str(file))
    assert result["unreachable"] and result["msg"] == "gone"
    assert names(result) == [f"job{number}" for number in range(48)]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["name"] for line in lines] == names(result)
    assert {line["host"] for line in lines} == {"slave1"}


def test_a_failed_round_keeps_those_before_and_one_with_all_records_goes_on() -> None:
    host = Host()

    def fail(*, module_args: dict[str, Any], **more: Any) -> dict[str, Any]:
        answer = host(module_args=module_args, **more)
        if len(host.sizes) == 2:
            return {**answer, "failed": True, "msg": "1 of 32 jobs failed: job20 (signaled)"}
        return {"failed": True, "msg": "was stopped"} if len(host.sizes) == 3 else answer

    result = run(fail, in_rounds=True)
    assert result["failed"] and result["msg"] == "was stopped"
    assert len(result["results"]) == 48

    def verdict(**arguments: Any) -> dict[str, Any]:
        return {**host(**arguments), "failed": True, "msg": "a job failed"}

    result = run(verdict, in_rounds=True)
    assert (len(result["results"]), result["msg"]) == (
        100,
        "a job failed; a job failed; a job failed",
    )


def test_what_a_captured_host_returns_is_not_written(tmp_path: Path) -> None:
    def forge(*, module_args: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"results": [record({"name": "another's"}) for _ in module_args["jobs"]]}

    run(forge, in_rounds=True, records_file=str(tmp_path / "records"))
    assert (tmp_path / "records").read_text() == ""


def test_a_file_that_cannot_be_written() -> None:
    with pytest.raises(AnsibleActionFail, match="records_file: /absent/x cannot be written"):
        run(Host(), in_rounds=True, records_file="/absent/x")
