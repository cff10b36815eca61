# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Controller side of cellblock.fleet.firewall: confirms new rules over a connection that is newer.

The order proves that the rules let a new connection through:

1. `plan` on the host finds out what is wrong and checks the rules. Nothing else happens in check mode.
2. `apply` starts the rollback's timer and loads the rules a second later, when its answer is here.
3. The connection is closed. `look`, over the next one, says whether they are loaded by now.
4. The connection is closed again: the next one is opened when they are known to be loaded.
   `confirm` comes over it; the host refuses if it knows the connection from before.

Where no connection gets through, the host rolls back by itself; this waits for that.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display

MODULE = "cellblock.fleet.firewall"
INTERNAL = ("phase", "token", "earlier_connections")
# How long after the rollback the host may take to answer.
GRACE_S = 20.0
PAUSE_S = 0.5

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
        for internal in INTERNAL:
            if internal in self._task.args:
                raise AnsibleActionFail(f"{internal} is set by the action itself; remove it.")
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
        plan = self._ask(phase="plan")
        load = plan.pop("load", False)
        if plan.get("failed") or not plan["changed"] or self._task.check_mode:
            return plan
        if self._task.args.get("state", "present") == "absent":
            return plan
        if not load:
            applied = self._ask(phase="apply")
            return {**plan, **applied} if applied.get("failed") else plan
        return self._trial(plan)

    def _ask(self, **internal: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name=MODULE,
            module_args={**self._task.args, **internal},
            task_vars=self._task_vars,
        )
        answer.pop("invocation", None)
        return answer

    def _ask_anew(self, **internal: Any) -> dict[str, Any] | None:
        """The same over a new connection; None where none gets through."""
        if type(self._connection).reset is not ConnectionBase.reset:
            self._connection.reset()
        try:
            answer = self._ask(**internal)
        except AnsibleConnectionFailure as error:
            display.vvv(f"firewall: no new connection: {error}")
            return None
        if answer.get("unreachable"):
            return None
        return answer

    def _trial(self, plan: dict[str, Any]) -> dict[str, Any]:
        token = secrets.token_hex(16)
        rollback_after = float(self._task.args.get("rollback_after_s", 30))
        started = time.monotonic()
        connections: list[str] = []
        try:
            applied = self._ask(phase="apply", token=token)
        except AnsibleConnectionFailure:
            # The answer is lost, not necessarily the rules: ask what became of them.
            display.vvv("firewall: the connection broke while the rules were being loaded")
        else:
            if applied.get("failed"):
                return {**plan, **applied, "changed": False}
            connections.append(applied["connection"])
            time.sleep(applied["load_after_s"] + 0.2)

        while time.monotonic() - started < rollback_after:
            seen = self._ask_anew(phase="look", token=token)
            if seen is None or seen.get("failed"):
                time.sleep(PAUSE_S)
                continue
            if seen["rolled_back"] or seen["phase"] == "none":
                break
            if seen["phase"] == "failed":
                return {**plan, "changed": False, "failed": True, "msg": seen["error"]}
            if seen["phase"] == "waiting":
                time.sleep(PAUSE_S)
                continue
            connections.append(seen["connection"])
            confirmed = self._ask_anew(
                phase="confirm",
                token=token,
                earlier_connections=[connection for connection in connections if connection],
            )
            if confirmed is not None and not confirmed.get("failed"):
                took = round(time.monotonic() - started, 1)
                return {**plan, "confirmed_after_s": took}
            if confirmed is not None:
                return self._not_confirmed(plan, token, started, rollback_after, confirmed["msg"])
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
            seen = self._ask_anew(phase="look", token=token)
            if seen is not None and not seen.get("failed"):
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
                    f"{GRACE_S:g} s later either; look at its console: 'cellblock-firewall status'.",
                }
            time.sleep(PAUSE_S)
        back = {
            "none": "has no rules again, as before",
            "loaded": "is back on its earlier rules",
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
