# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Shows people how far a playbook is, and all that they have to know."""

from __future__ import annotations

DOCUMENTATION = r"""
name: phases
type: stdout
short_description: Shows phases, how far hosts are and how long it took, instead of every task
version_added: 0.1.0
description:
  - Shows each play as it begins, each role or play that did something as it ends, with the time that it took, its hosts and
    how many changes it made, and every 15 seconds the task that is waited for and the hosts that are still at it.
  - Shown in full, with the task's name, are failures (also those that are ignored or rescued), hosts that are unreachable, and
    warnings. What C(ansible.builtin.debug) prints is shown as it is, with what a terminal would act upon escaped.
  - With C(--check) or C(--diff), what changes or would change is shown as C(ansible.builtin.default) does, with its differences.
  - With C(-v) everything is as C(ansible.builtin.default) shows it; it also does when C(ANSIBLE_STDOUT_CALLBACK=default) is set.
  - Works without a terminal; nothing that was printed is printed over.
extends_documentation_fragment:
  - default_callback
  - result_format_callback
author: The Cellblock authors (@cellblock)
requirements:
  - C(stdout_callback) in C(ansible.cfg) names it, C(cellblock.fleet.phases).
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ansible import constants as C
from ansible import context
from ansible.plugins.callback.default import CallbackModule as Default
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.text import printable

# Silence after which it is said what is waited for.
SILENCE_S = 15.0
# A phase that changed nothing and took less is not shown.
SHORT_S = 0.5
# More hosts than these are counted, not named.
NAMED = 4
FAILING_ON_PURPOSE = ("ansible.builtin.fail", "ansible.builtin.assert", "fail", "assert")


@dataclass
class Phase:
    """What a role, or the tasks of a play itself, did so far."""

    label: str
    began: float
    hosts: set[str] = field(default_factory=set)
    changes: int = 0
    failures: int = 0
    ignored: int = 0
    unreachable: int = 0

    def line(self, now: float) -> str | None:
        """What is to be said at its end, unless it was nothing."""
        took = now - self.began
        counts = [
            f"{number} {noun}"
            for number, noun in (
                (self.changes, "change" if self.changes == 1 else "changes"),
                (self.failures, "failed"),
                (self.ignored, "failed and ignored"),
                (self.unreachable, "unreachable"),
            )
            if number
        ]
        if not counts and (took < SHORT_S or not self.hosts):
            return None
        return f"{seconds(took):>11}  {self.label}: {', '.join([named(self.hosts), *(counts or ['no change'])])}"


def seconds(duration: float) -> str:
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes} min {rest:2} s" if minutes else f"{rest} s"


def named(hosts: set[str]) -> str:
    return ", ".join(sorted(hosts)) if len(hosts) <= NAMED else f"{len(hosts)} hosts"


class CallbackModule(Default):
    """Ansible's own callback, from which most that is not for people is held back."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "cellblock.fleet.phases"

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._phase: Phase | None = None
        # The hosts at the current task, for the thread that says what is waited for. The lock is
        # held for no more than taking or leaving them.
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._task_began = self._printed = self._began
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def _quiet(self) -> bool:
        return bool(self._display.verbosity == 0)

    @property
    def _shows_changes(self) -> bool:
        return bool(context.CLIARGS.get("check") or context.CLIARGS.get("diff"))

    # How far it is

    def v2_playbook_on_play_start(self, play: Any) -> None:
        if not self._quiet:
            return super().v2_playbook_on_play_start(play)
        self._end_phase()
        self._play = play
        dry = " (dry run)" if play.check_mode else ""
        clock = "{:2}:{:02}".format(*divmod(int(time.monotonic() - self._began), 60))
        self._say(f"[{clock}] {printable(play.get_name().strip())}{dry}")

    def v2_playbook_on_no_hosts_matched(self) -> None:
        if not self._quiet:
            return super().v2_playbook_on_no_hosts_matched()
        self._say(f"{'':11}  no hosts")

    def _task_start(self, task: Any, prefix: str | None = None) -> None:
        """What all kinds of tasks begin with; Ansible's shows a banner, unless it is to show some results only."""
        if not self._quiet:
            return super()._task_start(task, prefix)
        self._task_type_cache[task._uuid] = prefix or "TASK"
        # As it is now, with its variables.
        self._last_task_name = task.get_name().strip()
        role = task._role.get_name() if task._role else "tasks of the play"
        label = role if prefix != "RUNNING HANDLER" else f"{role}, handlers"
        if self._phase is None or self._phase.label != label:
            self._end_phase()
            self._phase = Phase(label, time.monotonic())
        with self._lock:
            self._waiting.clear()
            self._task_began = time.monotonic()
        if self._watch is None:
            self._over = threading.Event()
            self._watch = threading.Thread(
                target=self._say_what_is_waited_for, args=(self._over,), daemon=True
            )
            self._watch.start()

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        if not self._quiet:
            return super().v2_runner_on_start(host, task)
        with self._lock:
            self._waiting.add(host.get_name())

    def _end_phase(self) -> None:
        with self._lock:
            self._waiting.clear()
        if self._phase is not None:
            line = self._phase.line(time.monotonic())
            if line is not None:
                self._say(line)
        self._phase = None

    def _say_what_is_waited_for(self, over: threading.Event) -> None:
        while not over.wait(SILENCE_S / 15):
            line = self._waited_for(time.monotonic())
            if line is not None:
                self._say(line)

    def _waited_for(self, now: float) -> str | None:
        with self._lock:
            hosts = set(self._waiting)
            began = self._task_began
        if not hosts or now - max(began, self._printed) < SILENCE_S:
            return None
        name = printable(self._last_task_name or "")
        return f"{'':11}  ... {name}: {seconds(now - began)}, waiting for {named(hosts)}"

    def _say(self, text: str, color: str | None = None) -> None:
        self._printed = time.monotonic()
        self._display.display(text, color=color)

    # What came of tasks

    def _count(self, result: Any, **more: int) -> None:
        host = result.host.get_name()
        with self._lock:
            self._waiting.discard(host)
        if self._phase is not None:
            self._phase.hosts.add(host)
            for name, number in more.items():
                setattr(self._phase, name, getattr(self._phase, name) + number)

    def v2_runner_on_ok(self, result: Any) -> None:
        changed = bool(result.result.get("changed", False))
        self._count(result, changes=int(changed))
        if not self._quiet or (changed and self._shows_changes):
            return super().v2_runner_on_ok(result)
        # What loops print was shown item by item.
        self._show_result(result, of_loop=bool(result.task.loop and "results" in result.result))

    def v2_runner_item_on_ok(self, result: Any) -> None:
        if not self._quiet or (result.result.get("changed", False) and self._shows_changes):
            return super().v2_runner_item_on_ok(result)
        self._show_result(result)

    def _show_result(self, result: Any, of_loop: bool = False) -> None:
        """The warnings of a task that went well, and what it was there to print."""
        if result.result.get("warnings") or result.result.get("exception"):
            self._name_task(result)
        self._handle_warnings_and_exception(result)
        if of_loop or result.task.action not in C._ACTION_DEBUG or not self._run_is_verbose(result):
            return
        self._clean_results(result.result, result.task.action)
        message = result.result.get("msg")
        host = "" if result.task.run_once else f"{result.host.get_name()}: "
        if isinstance(message, str):
            text = "\n".join(host + printable(line) for line in message.splitlines())
        else:
            text = f"{host}{self._dump_results(result.result).strip()}"
        self._say(text)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._count(result, ignored=int(ignore_errors), failures=int(not ignore_errors))
        message = result.result.get("msg")
        if (
            self._quiet
            and not ignore_errors
            and result.task.action in FAILING_ON_PURPOSE
            and not result.task.loop
            and isinstance(message, str)
            and (result.task.action.endswith("fail") or "fail_msg" in result.task.args)
        ):
            # The sentence is all that there is to know; Ansible shows it twice, with where it is in the playbook.
            result.result.pop("exception", None)
            self._handle_warnings_and_exception(result)
            lines = "\n".join(f"  {printable(line)}" for line in message.splitlines())
            self._say(
                f"\nFAILED: {self._task_name(result)} [{self.host_label(result)}]\n{lines}",
                color=C.COLOR_ERROR,
            )
            return
        super().v2_runner_on_failed(result, ignore_errors)
        self._printed = time.monotonic()

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._count(result, unreachable=1)
        super().v2_runner_on_unreachable(result)
        self._printed = time.monotonic()

    def v2_runner_on_skipped(self, result: Any) -> None:
        if not self._quiet:
            return super().v2_runner_on_skipped(result)
        with self._lock:
            self._waiting.discard(result.host.get_name())
        self._handle_warnings_and_exception(result)

    def v2_runner_item_on_skipped(self, result: Any) -> None:
        if not self._quiet:
            return super().v2_runner_item_on_skipped(result)
        self._handle_warnings_and_exception(result)

    def v2_playbook_on_include(self, included_file: Any) -> None:
        if not self._quiet:
            super().v2_playbook_on_include(included_file)

    def v2_runner_retry(self, result: Any) -> None:
        # The last failure is shown.
        if not self._quiet:
            super().v2_runner_retry(result)

    def v2_runner_on_async_poll(self, result: Any) -> None:
        if not self._quiet:
            super().v2_runner_on_async_poll(result)

    def _name_task(self, result: Any) -> None:
        if self._last_task_banner != result.task._uuid:
            self._print_task_banner(result.task)

    def _task_name(self, result: Any) -> str:
        return printable(self._last_task_name or result.task.get_name().strip())

    # The end

    def v2_playbook_on_stats(self, stats: Any) -> None:
        # Another playbook may follow in the same run.
        self._over.set()
        self._watch = None
        if not self._quiet or stats.custom:
            return super().v2_playbook_on_stats(stats)
        self._end_phase()
        took = seconds(time.monotonic() - self._began)
        of = {host: stats.summarize(host) for host in sorted(stats.processed)}
        lost = [
            f"{host} ({', '.join(f'{one[key]} {word}' for key, word in LOST.items() if one[key])})"
            for host, one in of.items()
            if any(one[key] for key in LOST)
        ]
        changes = {host: one["changed"] for host, one in of.items() if one["changed"]}
        told = [
            ", ".join(f"{host} {number}" for host, number in changes.items())
            if changes
            else "nothing",
            *(
                f"{total} {word}"
                for key, word in (("rescued", "rescued"), ("ignored", "ignored"))
                if (total := sum(one[key] for one in of.values()))
            ),
        ]
        dry = "would change" if context.CLIARGS.get("check") else "changed"
        end = f"Failed after {took}: {', '.join(lost)}" if lost else f"Done in {took}"
        self._say(f"{end}; {dry}: {'; '.join(told)}.", color=C.COLOR_ERROR if lost else None)


LOST = {"failures": "failed", "unreachable": "unreachable"}
