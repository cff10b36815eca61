"""What the action makes of the results of tasks, and what it leaves on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.cellblock.fleet.plugins.action import isolation_report


class Action(isolation_report.ActionModule):
    """Without what comes from the controller's machinery."""

    def validate_argument_spec(
        self, argument_spec: Mapping[str, Any] | None = None, **rules: Any
    ) -> tuple[Any, dict[str, Any]]:
        return None, self._task.args


def action(check: bool = False, **args: Any) -> Action:
    made = Action.__new__(Action)
    made._task = SimpleNamespace(args=args, check_mode=check, async_val=0, action="x")
    made._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None))
    made._supports_async = True
    return made


FLEET = {
    "groups": {"ones": ["a"], "outside": []},
    "addresses": {"a": ["10.0.0.11"]},
    "services": {"ping": {"groups": ["fleet"], "protocol": "icmp"}},
    "networks": {"controllers": ["10.0.0.1"]},
    "flows": [{"from": "controllers", "to": "fleet", "services": ["ping"]}],
    "external": {"far": {"addresses": ["203.0.113.1"], "services": ["ping"]}},
}


def plan(fleet: dict[str, Any]) -> dict[str, Any]:
    """As much of what the filter probe_plan returns as is read."""
    return {"request": {"fleet": fleet, "vantages": [], "spoof_frames": False}}


def listening(address: str, **more: Any) -> dict[str, Any]:
    own = [{"address": address, "prefix_length": 24}]
    interface = {"name": "eth0", "mac": "02:00:00:00:00:01", "addresses": own}
    return {"interfaces": [interface], "own_addresses": [address], "listeners": [], **more}


def observations(outcome: str) -> dict[str, Any]:
    def results(*found: tuple[str, str]) -> dict[str, Any]:
        return {"results": [{"id": i, "outcome": o, "evidence": "seen"} for i, o in found]}

    return {
        "controller": {
            "listening": listening("10.0.0.1"),
            "probed": results(("a/ping/ipv4/0", outcome), ("far/ping/ipv4/0", "open")),
            "rules": [],
        },
        "a": {
            "listening": listening("10.0.0.11", handle="h"),
            "probed": results(("a/ping/ipv4/0", "open"), ("far/ping/ipv4/0", "filtered")),
            "collected": {
                "was_running": True,
                "handle": "h",
                "received": [],
                "half_open": [],
            },
            "rules": [],
        },
    }


def run(tmp_path: Path, outcome: str, **more: Any) -> dict[str, Any]:
    args = {
        "plan": plan(FLEET),
        "name": "n",
        "observations": observations(outcome),
        "dest": str(tmp_path / "reports"),
        **more,
    }
    return action(**args).run(task_vars={})


def test_as_declared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(tmp_path, "open")
    assert "failed" not in done
    assert done["counts"] == {"as_declared": 2, "leak": 0, "broken": 0, "unproven": 0}
    names = sorted(path.name for path in (tmp_path / "reports/n/latest").iterdir())
    assert names == ["isolation.html", "isolation.json", "isolation.svg"]
    assert "Isolation is as declared: 2 as declared" in capsys.readouterr().out


def test_reports_of_earlier_runs_and_of_other_fleets_stay(tmp_path: Path) -> None:
    first = [Path(path) for path in run(tmp_path, "open")["files"]]
    before = [path.read_bytes() for path in first]
    other = run(tmp_path, "open", name="../other fleet,")["files"]
    second = run(tmp_path, "filtered")["files"]
    third = run(tmp_path, "open")["files"]
    assert [path.read_bytes() for path in first] == before
    assert len({*map(str, first), *other, *second, *third}) == 12
    fleets = {path.name: path for path in (tmp_path / "reports").iterdir()}
    assert sorted(fleets) == ["__other_fleet_", "n"]
    assert len(list(fleets["n"].iterdir())) == 4
    latest = fleets["n"] / "latest"
    assert [str(latest.resolve() / Path(path).name) for path in third] == third
    assert (fleets["n"] / latest.readlink()).is_dir()


def test_a_report_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run(tmp_path, "open")
    before = sorted((tmp_path / "reports/n").iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(AnsibleActionFail, match="No space left"):
        run(tmp_path, "open")
    assert sorted((tmp_path / "reports/n").iterdir()) == before


def test_a_difference_fails_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, "filtered")
    assert done["failed"]
    assert done["msg"].startswith("Isolation is NOT as declared: 1 as declared, 0 leaks, 1 broken")
    (sentence,) = done["differences"]
    assert sentence.startswith("controller -> a ping (icmp) over IPv4: not reached (seen), though")
    assert sentence in capsys.readouterr().out


def test_hosts_that_could_not_be_asked(tmp_path: Path) -> None:
    seen = observations("filtered")
    seen["a"] = {"listening": {"unreachable": True, "msg": "Task failed: no route\nmore"}}
    done = run(tmp_path, "", observations=seen)
    assert done["counts"]["unproven"] > 0
    assert done["counts"]["broken"] == 0
    assert any("a: unreachable (no route)." in text for text in done["differences"])


def test_what_a_captured_host_says_fails_nothing_and_acts_on_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = observations("open")
    seen["a"]["listening"]["interfaces"] = [{"name": "eth0", "addresses": []}]
    seen["controller"]["probed"]["results"][1]["outcome"] = "filtered"
    seen["controller"]["probed"]["results"][1]["evidence"] = "\x1b[2J<script>"
    seen["a"]["rules"] = ["\x1b]0;x\x07"]
    done = run(tmp_path, "", observations=seen)
    assert done["failed"]
    assert any(
        "what it returned makes no sense (interfaces[0].mac is missing)" in text
        for text in done["differences"]
    )
    shown = capsys.readouterr().out
    assert "\\x1b]0;x\\x07" in shown
    for text in (shown, *done["differences"]):
        assert "\x1b[2J" not in text
        assert "\x1b]0" not in text
    page = (tmp_path / "reports/n/latest/isolation.html").read_text()
    assert "\\x1b[2J&lt;script&gt;" in page
    assert "\x1b" not in page


def test_check_mode_writes_nothing(tmp_path: Path) -> None:
    done = action(check=True, dest=str(tmp_path / "x")).run(task_vars={})
    assert done["skipped"]
    assert not (tmp_path / "x").exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(AnsibleActionFail, match="cannot be written"):
        run(tmp_path, "open")


def test_a_fleet_that_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(AnsibleActionFail, match="unknown group"):
        run(tmp_path, "open", plan=plan({**FLEET, "flows": [{"from": "b", "to": "ones"}]}))


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(AnsibleActionFail, match="not what the filter probe_plan returns"):
        run(tmp_path, "open", plan={})
