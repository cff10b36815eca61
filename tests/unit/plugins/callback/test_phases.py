"""What people are shown of a playbook, and that nothing they have to know is held back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible import context
from ansible.module_utils.common.collections import ImmutableDict
from ansible_collections.cellblock.fleet.plugins.callback import phases

ROOT = Path(__file__).resolve().parents[4]


class Screen:
    """As much of Ansible's display as callbacks use."""

    def __init__(self, verbosity: int) -> None:
        self.verbosity = verbosity
        self.columns = 80
        self.lines: list[str] = []

    def display(self, text: str, **_: Any) -> None:
        self.lines += text.split("\n")

    banner = display

    def _warning(self, warning: str) -> None:
        self.lines.append(f"[WARNING]: {warning}")

    def _error(self, error: str, **_: Any) -> None:
        self.lines.append(f"[ERROR]: {error}")


class Callback(phases.CallbackModule):
    """With a display of its own and the options' defaults."""

    def __init__(self, verbosity: int = 0) -> None:
        super().__init__()
        self._display = Screen(verbosity)

    def get_option(self, name: str, hostvars: object = None) -> Any:
        return {
            "display_failed_stderr": False,
            "show_custom_stats": False,
            "check_mode_markers": False,
            "show_per_host_start": False,
            "result_format": "yaml",
            "pretty_results": None,
            "result_indentation": 4,
            "result_yaml_line_width": "default",
        }.get(name, True)

    @property
    def lines(self) -> list[str]:
        lines: list[str] = self._display.lines
        return lines


class Host:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_name(self) -> str:
        return self.name


class Task:
    def __init__(self, name: str, action: str, role: str | None = None, **fields: Any) -> None:
        self.name = name
        self.action = action
        self._uuid = f"{role}/{name}"
        self._role = Host(role) if role else None
        self.loop = fields.get("loop")
        self.run_once = fields.get("run_once", False)
        self.ignore_unreachable = fields.get("ignore_unreachable", False)
        self.args = fields.get("args", {})
        self.check_mode = self.no_log = False
        self.delegate_to = None

    def get_name(self) -> str:
        return f"{self._role.name} : {self.name}" if self._role else self.name

    def get_path(self) -> str:
        return "x.yml:1"


def result(
    task: Task, host: str = "slave1", warning: str = "", error: str = "", **found: Any
) -> Any:
    if warning:
        found["warnings"] = [warning]
    if error:
        found["exception"] = error
    return SimpleNamespace(
        host=Host(host),
        task=task,
        result=found,
        warnings=[warning],
        exception=error,
        deprecations=[],
    )


def started(callback: Callback, task: Task, *hosts: str) -> Task:
    callback.v2_playbook_on_task_start(task, False)
    for host in hosts or ("slave1",):
        callback.v2_runner_on_start(Host(host), task)
    return task


def play(callback: Callback, name: str = "Provision") -> None:
    callback.v2_playbook_on_play_start(
        SimpleNamespace(get_name=lambda: name, check_mode=False, strategy="linear")
    )


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "CLIARGS", ImmutableDict(check=False, diff=False))


@pytest.fixture
def callback() -> Any:
    made = Callback()
    play(made)
    yield made
    made._over.set()


def send(callback: Callback, given: Any) -> None:
    callback._current_task_result = given
    callback.v2_runner_on_ok(given)


def ended(callback: Callback, **hosts: Mapping[str, int]) -> None:
    none = dict.fromkeys(
        ("ok", "changed", "unreachable", "failures", "skipped", "rescued", "ignored"), 0
    )
    callback.v2_playbook_on_stats(
        SimpleNamespace(
            processed=dict.fromkeys(hosts, 1),
            custom={},
            summarize=lambda host: {**none, **hosts[host]},
        )
    )


def test_phases_with_their_hosts_and_changes(callback: Callback) -> None:
    for role in ("nsjail", "environments"):
        for name in ("one", "two"):
            task = started(callback, Task(name, "command", role), "slave1", "slave2")
            for host in ("slave1", "slave2"):
                send(callback, result(task, host, changed=True))
    send(callback, result(started(callback, Task("three", "command", "short")), changed=False))
    ended(callback, slave1={"changed": 4}, slave2={"changed": 4, "ok": 9})
    assert callback.lines == [
        "[ 0:00] Provision",
        "        0 s  nsjail: slave1, slave2, 4 changes",
        "        0 s  environments: slave1, slave2, 4 changes",
        "Done in 0 s; changed: slave1 4, slave2 4.",
    ]


def test_what_takes_long_and_many_hosts(
    callback: Callback, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = started(callback, Task("Build", "command", "environments"), *(f"s{n}" for n in range(6)))
    for host in ("s0", "s1", "s2"):
        send(callback, result(task, host))
    now = time.monotonic()
    assert callback._waited_for(now + phases.SILENCE_S / 2) is None
    assert callback._waited_for(now + 75) == (
        "             ... environments : Build: 1 min 15 s, waiting for s3, s4, s5"
    )
    for host in ("s3", "s4", "s5"):
        send(callback, result(task, host))
    assert callback._waited_for(now + 99) is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 75)
    callback._end_phase()
    assert callback.lines[1:] == [" 1 min 15 s  environments: 6 hosts, no change"]


def test_silence_is_ended_by_itself(callback: Callback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "SILENCE_S", 0.2)
    started(callback, Task("Build", "command", "environments"))
    end = time.monotonic() + 10
    while len(callback.lines) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert "... environments : Build" in callback.lines[1]


FAILURE: dict[str, Any] = {"msg": "it broke", "stderr": "the reason", "rc": 1}


@pytest.mark.parametrize("ignored", [False, True])
def test_failures_are_shown_in_full(callback: Callback, ignored: bool) -> None:
    task = started(callback, Task("Build", "command", "environments"))
    given = result(task, **FAILURE, error="Task failed: why")
    callback._current_task_result = given
    callback.v2_runner_on_failed(given, ignore_errors=ignored)
    shown = "\n".join(callback.lines)
    for text in (
        "TASK [environments : Build]",
        "[slave1]",
        "it broke",
        "the reason",
        "failed: why",
    ):
        assert text in shown
    assert ("...ignoring" in shown) == ignored
    callback._end_phase()
    assert callback.lines[-1].endswith("1 failed and ignored" if ignored else "1 failed")


def test_failures_of_a_loop_are_shown_in_full(callback: Callback) -> None:
    task = started(callback, Task("Build", "command", loop=[1]))
    callback.v2_runner_item_on_failed(result(task, **FAILURE, item="base"))
    assert "item=base" in "\n".join(callback.lines)
    assert "the reason" in "\n".join(callback.lines)


def test_hosts_that_do_not_answer_are_named(callback: Callback) -> None:
    task = started(callback, Task("Build", "command", ignore_unreachable=True))
    callback.v2_runner_on_unreachable(result(task, unreachable=True, msg="no route"))
    shown = "\n".join(callback.lines)
    assert "fatal: [slave1]: UNREACHABLE!" in shown
    assert "no route" in shown
    assert "...ignoring" in shown


@pytest.mark.parametrize("action", ["ansible.builtin.fail", "ansible.builtin.assert"])
def test_a_sentence_for_people_stands_once(callback: Callback, action: str) -> None:
    task = started(callback, Task("Refuse", action, args={"fail_msg": "x", "msg": "x"}))
    given = result(task, msg="Wrong \x1b[2J; do that.\nAnd this.", error="Task failed: Wrong")
    callback._current_task_result = given
    callback.v2_runner_on_failed(given)
    assert callback.lines[1:] == [
        "",
        "FAILED: Refuse [slave1]",
        "  Wrong \\x1b[2J; do that.",
        "  And this.",
    ]


def test_an_assertion_without_a_sentence_is_shown_in_full(callback: Callback) -> None:
    task = started(callback, Task("Refuse", "ansible.builtin.assert", args={"that": "x"}))
    callback.v2_runner_on_failed(result(task, msg="Assertion failed", assertion="x == 1"))
    assert "x == 1" in "\n".join(callback.lines)


@pytest.mark.parametrize("loop", [None, [1]])
def test_warnings_name_their_task(callback: Callback, loop: list[int] | None) -> None:
    task = started(callback, Task("Build", "command", loop=loop))
    given = result(task, warning="old thing", changed=True)
    callback._current_task_result = given
    callback.v2_runner_item_on_ok(given) if loop else callback.v2_runner_on_ok(given)
    assert callback.lines[1:] == ["TASK [Build]", "[WARNING]: old thing"]


def test_a_skipped_task_warns_too(callback: Callback) -> None:
    given = result(started(callback, Task("Build", "command")), warning="old thing")
    callback._current_task_result = given
    callback.v2_runner_on_skipped(given)
    assert "[WARNING]: old thing" in callback.lines


def test_what_playbooks_print_is_shown_as_it_is(callback: Callback) -> None:
    task = started(callback, Task("Show", "ansible.builtin.debug", run_once=True))
    table = "job  verdict\n\nj    signaled \x1b[32m"
    send(callback, result(task, msg=table, _ansible_verbose_always=True))
    assert callback.lines[1:] == ["job  verdict", "", "j    signaled \\x1b[32m"]


def test_what_is_printed_for_each_host_names_it(callback: Callback) -> None:
    task = started(callback, Task("Show", "ansible.builtin.debug", loop=[1]))
    callback.v2_runner_item_on_ok(result(task, msg="no range", _ansible_verbose_always=True))
    send(callback, result(task, results=[{}], msg="All items completed"))
    variable = started(callback, Task("Variable", "ansible.builtin.debug"))
    send(callback, result(variable, x=[1], changed=False, _ansible_verbose_always=True))
    assert callback.lines[1:] == ["slave1: no range", "slave1: x:", "    - 1"]


@pytest.mark.parametrize("option", ["check", "diff"])
def test_dry_runs_and_differences_show_what_changes(
    callback: Callback, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "CLIARGS", ImmutableDict({"check": False, option: True}))
    task = started(callback, Task("Write", "copy", "firewall"))
    given = result(task, changed=True, diff={"before": "a\n", "after": "b\n"})
    callback.v2_on_file_diff(given)
    send(callback, given)
    shown = "\n".join(callback.lines)
    for text in ("TASK [firewall : Write]", "-a", "+b", "changed: [slave1]"):
        assert text in shown


def test_a_failed_run_says_where(callback: Callback) -> None:
    ended(
        callback,
        slave1={"failures": 1, "changed": 2},
        slave2={"unreachable": 1, "ignored": 1, "rescued": 2},
    )
    (line,) = callback.lines[1:]
    assert line == (
        "Failed after 0 s: slave1 (1 failed), slave2 (1 unreachable);"
        " changed: slave1 2; 2 rescued; 1 ignored."
    )


def test_verbose_brings_every_task_back() -> None:
    callback = Callback(verbosity=1)
    play(callback)
    task = started(callback, Task("Build", "command", "environments"))
    send(callback, result(task, changed=False, stdout="x"))
    callback.v2_runner_on_skipped(result(task, skipped=True))
    shown = "\n".join(callback.lines)
    for text in ("PLAY [Provision]", "TASK [environments : Build]", "ok: [slave1]", "skipping:"):
        assert text in shown


@pytest.mark.parametrize("verbose", [False, True])
def test_with_ansible_and_without_a_terminal(tmp_path: Path, verbose: bool) -> None:
    playbook = [
        {
            "name": "Only play",
            "hosts": "all",
            "gather_facts": False,
            "tasks": [
                {"name": "Fine", "ansible.builtin.set_fact": {"x": 1}},
                {"name": "Show", "ansible.builtin.debug": {"msg": "verdict killed"}},
                {"name": "Refuse", "ansible.builtin.fail": {"msg": "That is wrong."}},
            ],
        }
    ]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(playbook, sort_keys=False))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            "--inventory=one,",
            "--connection=local",
            str(tmp_path / "play.yml"),
            *(["-v"] if verbose else []),
        ],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "ANSIBLE_STDOUT_CALLBACK"},
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    shown = done.stdout
    assert "verdict killed" in shown
    assert "That is wrong." in shown
    assert ("TASK [Fine]" in shown) == verbose
    if not verbose:
        assert shown.count("That is wrong.") == 1
        assert shown.splitlines()[:2] == ["[ 0:00] Only play", "one: verdict killed"]
        assert "Failed after" in shown.splitlines()[-1]
