# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""cellblock.fleet.guarded_rules: confirms new rules over a connection that is newer than they are.

It makes the program and the units, and runs the module `_guarded_rules` on the host for each step. The order proves that the rules let a new connection through:

1. `plan` on the host finds out what is wrong and checks the rules. Nothing else happens in check mode.
2. `apply` installs the files, starts the rollback's timer and loads the rules a second later, when its answer is here.
3. The connection is closed. `look`, over the next one, says whether they are loaded by now.
4. The connection is closed again: the next one is opened when they are known to be loaded.
   `confirm` comes over it; the host refuses if it knows the connection from before.

Where no connection gets through, the host rolls back by itself; this waits for that.
"""

from __future__ import annotations

import base64
import multiprocessing
import os
import secrets
import time
import zlib
from typing import Any, TypeGuard

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display
from ansible_collections.cellblock.fleet.plugins.module_utils._guarded_rules_options import (
    ARGUMENT_SPEC,
    REQUIRED_IF,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.guarded_rules import (
    installation,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.guarded_rules.instance import (
    Instance,
)

MODULE = "cellblock.fleet._guarded_rules"
# How long after the rollback the host may take to answer.
GRACE_S = 20.0
PAUSE_S = 0.5
# The longest that a host may put off the loading, whatever it says.
LOAD_AFTER_S = 5.0

display = Display()


class ActionModule(ActionBase):
    """Loads rules on trial and confirms them, or waits for their rollback."""

    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False
    _requires_connection = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, self._options = self.validate_argument_spec(
            argument_spec=ARGUMENT_SPEC, required_if=REQUIRED_IF
        )
        self._task_vars = task_vars or {}
        try:
            return self._run()
        finally:
            try:
                self._remove_tmp_path(self._connection._shell.tmpdir)
            except AnsibleConnectionFailure:
                # The failure that is being reported says more.
                display.vvv("The temporary directory could not be removed: no connection.")

    def _run(self) -> dict[str, Any]:
        if self._options["state"] == "absent":
            return self._ask("remove")
        plan = self._ask("plan")
        load = plan.pop("load", False)
        if plan.get("failed") or not plan["changed"] or self._task.check_mode:
            return plan
        if not load:
            applied = self._ask("apply")
            return {**plan, **applied} if applied.get("failed") else plan
        return self._trial(plan)

    def _ask(self, step: str, **arguments: Any) -> dict[str, Any]:
        """Takes a step on the host."""
        answer: dict[str, Any] = self._execute_module(
            module_name=MODULE,
            module_args={"step": step, **host_arguments(self._options), **arguments},
            task_vars=self._task_vars,
        )
        answer.pop("invocation", None)
        return answer

    def _ask_anew(self, step: str, **arguments: Any) -> dict[str, Any] | None:
        """The same over a new connection; None where none gets through."""
        if type(self._connection).reset is not ConnectionBase.reset:
            self._connection.reset()
        try:
            answer = self._ask(step, **arguments)
        except AnsibleConnectionFailure as error:
            display.vvv(f"guarded_rules: no new connection: {error}")
            return None
        if answer.get("unreachable"):
            return None
        return answer

    def _trial(self, plan: dict[str, Any]) -> dict[str, Any]:
        token = secrets.token_hex(16)
        rollback_after = float(self._options["rollback_after_s"])
        started = time.monotonic()
        connections: list[str] = []
        try:
            applied = self._ask("apply", token=token)
        except AnsibleConnectionFailure:
            # The answer is lost, not necessarily the rules: ask what became of them.
            display.vvv("guarded_rules: the connection broke while the rules were being loaded")
        else:
            if applied.get("failed"):
                return {**plan, **applied, "changed": False}
            connections.append(str(applied.get("connection", "")))
            time.sleep(put_off(applied.get("load_after_s")) + 0.2)

        while time.monotonic() - started < rollback_after:
            seen = self._ask_anew("look", token=token)
            if not is_look(seen):
                time.sleep(PAUSE_S)
                continue
            if seen["rolled_back"] or seen["phase"] == "none":
                break
            if seen["phase"] == "failed":
                return {**plan, "changed": False, "failed": True, "msg": str(seen.get("error"))}
            if seen["phase"] == "waiting":
                time.sleep(PAUSE_S)
                continue
            connections.append(seen["connection"])
            if not controller_lives():
                # Nobody is there who could undo what these rules do; the host goes back by itself.
                return {**plan, "changed": False, "failed": True, "msg": "Ansible was killed."}
            confirmed = self._ask_anew(
                "confirm",
                token=token,
                earlier_connections=[connection for connection in connections if connection],
            )
            if confirmed is not None and not confirmed.get("failed"):
                took = round(time.monotonic() - started, 1)
                return {**plan, "confirmed_after_s": took}
            if confirmed is not None:
                why = str(confirmed.get("msg", "The confirmation failed."))
                return self._not_confirmed(plan, token, started, rollback_after, why)
            time.sleep(PAUSE_S)
        return self._not_confirmed(plan, token, started, rollback_after, "")

    def _not_confirmed(
        self, plan: dict[str, Any], token: str, started: float, rollback_after: float, reason: str
    ) -> dict[str, Any]:
        """Waits until the host is back on its earlier rules, and says what happened."""
        host = self._task_vars.get("inventory_hostname", "the host")
        why = reason or (
            "The new rules cut off Ansible: no new connection came through "
            f"within {rollback_after:g} s."
        )
        failed = {**plan, "changed": False, "failed": True}
        while True:
            # At its very end the timer may be late by its accuracy.
            left = started + rollback_after + 0.3 - time.monotonic()
            if left > 0:
                time.sleep(left)
            seen = self._ask_anew("look", token=token)
            if is_look(seen):
                if seen["phase"] == "none" and not seen["rolled_back"]:
                    return {
                        **failed,
                        "msg": f"The connection to {host} broke before the new rules were loaded; "
                        "nothing was changed: run again.",
                    }
                if seen["rolled_back"]:
                    break
            if time.monotonic() - started > rollback_after + GRACE_S:
                return {
                    **failed,
                    "msg": f"{why} {host} was to roll back by itself, but does not answer "
                    f"{GRACE_S:g} s later either; look at its console: '{self._options['name']} status'.",
                }
            time.sleep(PAUSE_S)
        back = {
            "none": "has no rules again, as before",
            "loaded": "is back on its earlier rules",
            "failed": "has no rules, because the earlier ones failed",
        }.get(
            seen["state"], "admits only ssh from the controllers, because the earlier rules failed"
        )
        took = time.monotonic() - started
        return {
            **failed,
            "rolled_back_after_s": round(took, 1),
            "msg": f"{why} {host} answers and {back}, {took:.0f} s after the attempt; "
            "let the new rules admit ssh from the controller and run again.",
        }


def controller_lives() -> bool:
    """Whether the ansible-playbook is there that this worker process belongs to. When it is killed, its workers
    go on, and would confirm what nobody waits for."""
    controller = multiprocessing.parent_process()
    return controller is None or os.getppid() == controller.pid


def put_off(answer: object) -> float:
    """The seconds after which a host says that it loads the rules, within reason."""
    if isinstance(answer, int | float) and 0 <= answer <= LOAD_AFTER_S:
        return float(answer)
    return LOAD_AFTER_S


def is_look(answer: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a host answered `look`, and in the shape that it has: it may be in anybody's hands."""
    return (
        answer is not None
        and not answer.get("failed")
        and all(isinstance(answer.get(name), str) for name in ("phase", "state", "connection"))
        and isinstance(answer.get("rolled_back"), bool)
    )


def host_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What the module on the host needs to know, whatever the step."""
    instance = Instance(
        name=options["name"],
        tables=tuple(options["tables"]),
        rules=options["path"],
        minimal=options["controllers"] is not None,
    )
    units = installation.Units(
        description=options["description"] or "",
        before_network=options["before_network"],
        after=tuple(options["after"]),
        before=tuple(options["before"]),
        foreign_rules=options["foreign_rules"],
    )
    return {
        "name": instance.name,
        "tables": options["tables"],
        "path": instance.rules,
        "rules": options["rules"],
        "controllers": options["controllers"],
        "controller_ports": options["controller_ports"],
        "rollback_after_s": options["rollback_after_s"],
        "files": [
            {
                "path": file.path,
                "content": base64.b64encode(zlib.compress(file.content)).decode(),
                "mode": file.mode,
            }
            for file in installation.files(instance, units)
        ],
        "units": list(installation.unit_texts(instance, units)),
    }
