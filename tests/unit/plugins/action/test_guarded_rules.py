"""The order of a trial: never confirmed over a connection that may be older than the rules."""

from __future__ import annotations

import base64
import multiprocessing
import os
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible_collections.cellblock.fleet.plugins.action import guarded_rules
from ansible_collections.cellblock.fleet.plugins.action.guarded_rules import ActionModule

Answer = dict[str, Any]
RULES = {
    "name": "cellblock-firewall",
    "description": "the host's firewall",
    "tables": ["inet cellblock"],
    "path": "/etc/cellblock/firewall.nft",
    "rules": "x",
    "controllers": ["192.0.2.10"],
    "controller_ports": [22],
}
PLAN = {"changed": True, "load": True, "reasons": ["the rules differ"]}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Connection:
    """One that counts how often it was opened anew."""

    def __init__(self) -> None:
        self._shell = mock.Mock(tmpdir=None)
        self.opened = 1

    def reset(self) -> None:
        self.opened += 1


class Host:
    """Answers the module's phases as a host would; `reachable` says whether rules on trial let us in."""

    def __init__(self, plan: Answer | None = None, check: bool = False, **args: Any) -> None:
        self.clock = Clock()
        self.connection = Connection()
        task = mock.Mock(
            args={name: value for name, value in {**RULES, **args}.items() if value is not None},
            check_mode=check,
            async_val=0,
        )
        self.action = ActionModule(task, self.connection, mock.Mock(), None, mock.Mock(), None)
        self.plan = plan or dict(PLAN)
        self.arguments: Answer = {}
        self.asked: list[tuple[str, int]] = []
        self.reachable = True
        self.apply_answer: Answer | Exception = {}
        self.loaded_at: float | None = None
        self.token = ""
        self.confirmed = False
        self.back = True

    def phase(self) -> str:
        if self.loaded_at is None or self.confirmed or self.rolled_back():
            return "none"
        return "loaded" if self.clock.now >= self.loaded_at else "waiting"

    def rolled_back(self) -> bool:
        return self.loaded_at is not None and not self.confirmed and self.clock.now >= 30

    def execute(self, module_args: Answer, **_: Any) -> Answer:
        phase = module_args["step"]
        self.arguments = module_args
        self.asked.append((phase, self.connection.opened))
        if phase in ("plan", "remove"):
            return dict(self.plan)
        if phase == "apply":
            if isinstance(self.apply_answer, Exception):
                raise self.apply_answer
            if not self.apply_answer.get("failed") and "token" in module_args:
                self.loaded_at = self.clock.now + 1.1
                self.token = module_args["token"]
            return {
                "connection": f"c{self.connection.opened}",
                "load_after_s": 1,
                **self.apply_answer,
            }
        cut_off = not self.reachable and self.phase() == "loaded"
        if cut_off or (self.rolled_back() and not self.back):
            self.clock.now += 10
            raise AnsibleConnectionFailure("timed out")
        self.clock.now += 0.3
        if phase == "look":
            return {
                "connection": f"c{self.connection.opened}",
                "phase": self.phase(),
                "rolled_back": self.rolled_back(),
                "state": "loaded",
                "error": None,
            }
        if f"c{self.connection.opened}" in module_args["earlier_connections"]:
            return {"failed": True, "msg": "old connection."}
        self.confirmed = True
        return {"changed": True}

    def run(self) -> Answer:
        with (
            mock.patch("ansible.plugins.action.ActionBase.run"),
            mock.patch.object(self.action, "_execute_module", self.execute),
            mock.patch.object(self.action, "_remove_tmp_path"),
            mock.patch.object(guarded_rules, "time", self.clock),
        ):
            return self.action.run(task_vars={"inventory_hostname": "slave1"})


def test_confirmed_over_a_connection_opened_after_the_rules_were_seen_loaded() -> None:
    host = Host()
    result = host.run()
    assert result["changed"] and not result.get("failed")
    assert host.confirmed
    phases = [phase for phase, _ in host.asked]
    assert phases[:2] == ["plan", "apply"] and phases[-2:] == ["look", "confirm"]
    # Every question after `apply` over a connection of its own.
    numbers = [number for _, number in host.asked]
    assert numbers[1:] == list(range(1, len(numbers)))
    assert "load" not in result


def test_waits_until_the_rules_are_loaded() -> None:
    host = Host()
    host.apply_answer = {"load_after_s": 0}
    host.run()
    assert [phase for phase, _ in host.asked].count("look") > 1
    assert host.confirmed


def test_a_connection_that_is_not_renewed_confirms_nothing() -> None:
    host = Host()
    host.connection.reset = lambda: None  # type: ignore[method-assign]
    result = host.run()
    assert result["failed"] and "old connection." in result["msg"]
    assert not host.confirmed


def test_cut_off_waits_for_the_rollback_and_says_so() -> None:
    host = Host()
    host.reachable = False
    result = host.run()
    assert result["failed"] and not result["changed"]
    assert "cut off Ansible" in result["msg"]
    assert "slave1 answers and is back on its earlier rules" in result["msg"]
    assert 30 <= host.clock.now < 45


def test_a_host_that_stays_away() -> None:
    host = Host()
    host.reachable = host.back = False
    result = host.run()
    assert "does not answer" in result["msg"] and "console" in result["msg"]
    assert host.clock.now < 80


def test_the_answer_to_apply_is_lost_but_the_rules_are_good() -> None:
    host = Host()

    def lost(module_args: Answer, **kwargs: Any) -> Answer:
        answer = Host.execute(host, module_args, **kwargs)
        if module_args["step"] == "apply":
            raise AnsibleConnectionFailure("broken pipe")
        return answer

    host.execute = lost  # type: ignore[method-assign]
    assert not host.run().get("failed")
    assert host.confirmed


def test_the_connection_broke_before_anything_was_loaded() -> None:
    host = Host()
    host.apply_answer = AnsibleConnectionFailure("broken pipe")
    result = host.run()
    assert result["failed"] and "nothing was changed" in result["msg"]


def test_refused_by_the_program() -> None:
    host = Host()
    host.apply_answer = {"failed": True, "msg": "no timer."}
    result = host.run()
    assert result["failed"] and result["msg"] == "no timer." and not result["changed"]


@pytest.mark.parametrize(
    ("host", "phases"),
    [
        (lambda: Host(check=True), ["plan"]),
        (lambda: Host({"changed": False, "load": False}), ["plan"]),
        (lambda: Host({"failed": True, "msg": "no nft."}), ["plan"]),
        # Only files or units: no trial.
        (lambda: Host({"changed": True, "load": False}), ["plan", "apply"]),
        (lambda: Host({"changed": True, "diff": {}}, state="absent"), ["remove"]),
    ],
)
def test_no_trial(host: Callable[[], Host], phases: list[str]) -> None:
    made = host()
    made.run()
    assert [phase for phase, _ in made.asked] == phases
    assert made.connection.opened == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "x"},
        {"phase": "apply"},
        {"earlier_connections": []},
        {"rules": None},
        {"foreign_rules": "keep"},
        {"rollback_after_s": "soon"},
    ],
)
def test_wrong_options_are_refused_before_the_host_is_asked(wrong: Answer) -> None:
    host = Host(**wrong)
    with pytest.raises(AnsibleError, match=next(iter(wrong))):
        host.run()
    assert host.asked == []


def test_the_host_gets_the_program_and_the_units() -> None:
    host = Host({"changed": False, "load": False})
    host.run()
    paths = [file["path"] for file in host.arguments["files"]]
    assert paths == [
        "/usr/local/sbin/cellblock-firewall",
        "/etc/systemd/system/cellblock-firewall.service",
        "/etc/systemd/system/cellblock-firewall-guard.service",
    ]
    assert host.arguments["units"] == [path.rpartition("/")[2] for path in paths[1:]]
    program = zlib.decompress(base64.b64decode(host.arguments["files"][0]["content"]))
    # Whether a minimal set may take the rules' place follows from there being controllers.
    assert b"minimal=True" in program
    other = Host({"changed": False, "load": False}, controllers=None)
    other.run()
    program = zlib.decompress(base64.b64decode(other.arguments["files"][0]["content"]))
    assert b"minimal=False" in program


def test_what_nobody_waits_for_any_more_is_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The playbook was killed; its worker process goes on by itself."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: mock.Mock(pid=1 << 30))
    host = Host()
    result = host.run()
    assert result["failed"]
    assert not host.confirmed
    assert "confirm" not in [phase for phase, _ in host.asked]
    # The control: the parent is the one that it was.
    parent = mock.Mock(pid=os.getppid())
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    host = Host()
    host.run()
    assert host.confirmed


@pytest.mark.parametrize("seconds", [1e9, float("nan"), -1, 10**400, "x", None])
def test_a_host_does_not_decide_how_long_is_waited(seconds: object) -> None:
    host = Host()
    host.apply_answer = {"load_after_s": seconds}
    host.run()
    assert host.confirmed
    assert host.clock.now < 10


@pytest.mark.parametrize("answer", [{}, {"phase": 1}, {"phase": "loaded", "rolled_back": "no"}])
def test_an_answer_of_another_shape_is_none(answer: Answer) -> None:
    host = Host()
    execute = host.execute

    def garbled(module_args: Answer, **more: Any) -> Answer:
        return dict(answer) if module_args["step"] == "look" else execute(module_args, **more)

    host.execute = garbled  # type: ignore[method-assign]
    result = host.run()
    assert result["failed"] and "does not answer" in result["msg"]
    assert host.clock.now < 60
