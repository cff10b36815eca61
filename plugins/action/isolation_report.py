# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""cellblock.fleet.isolation_report: judge what all hosts saw, show it, write it down."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import (
    answers,
    report,
    verdict,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet.probe_plan import (
    plan_of,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.text import printable

# Sentences under the matrix, and in the task's result; the files have all.
SHOWN = 40
QUOTED = 5


class ActionModule(ActionBase):
    """Runs on the controller; no host is asked anything."""

    _supports_check_mode = True
    _supports_diff = False
    _supports_async = False
    _requires_connection = False

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            argument_spec={
                "plan": {"type": "dict", "required": True},
                "name": {"type": "str", "required": True},
                "observations": {"type": "dict", "required": True},
                "dest": {"type": "path", "required": True},
            }
        )
        nothing: dict[str, Any] = {"changed": False, "counts": {}, "differences": [], "files": []}
        if self._task.check_mode:
            return {**nothing, "skipped": True, "msg": "Check mode: nothing was tried."}
        try:
            plan = plan_of(args["plan"]["request"])
        except (KeyError, ValueError) as problem:
            raise AnsibleActionFail(
                f"plan is not what the filter probe_plan returns ({problem})."
            ) from None
        full, observations = answers.observe(plan, args["observations"])
        judged = verdict.judge(
            full,
            observations,
            {host: seen.get("rules") or () for host, seen in args["observations"].items()},
        )
        run = report.Run(args["name"], datetime.now(timezone.utc))
        files = write(judged, run, Path(args["dest"]))
        show(judged)
        differences = judged.differences()
        result = {**nothing, "changed": True, "counts": judged.counts, "files": files}
        if not judged.is_green:
            # All of them stand above, under the matrix, and in the files.
            result["failed"] = True
            # A callback shows them as they are.
            result["differences"] = [printable(text) for text in differences[:QUOTED]]
            result["msg"] = f"{report.summary(judged)} See {files[0]}"
        return result


def write(judged: verdict.Report, run: report.Run, dest: Path) -> list[str]:
    """The three files; each is complete or not there at all."""
    # Ansible itself may have changed to the playbook's directory.
    directory = Path(os.environ.get("PWD") or ".") / dest
    as_json = report.to_json(judged, run)
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("isolation.html", report.to_html(judged, run, as_json)),
            ("isolation.json", as_json),
            ("isolation.svg", report.to_svg(judged)),
        ):
            partial = directory / f".{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(directory / name)
            written.append(str(directory / name))
    except OSError as problem:
        raise AnsibleActionFail(
            f"{directory} cannot be written ({problem.strerror}); choose another dest."
        ) from None
    return written


def show(judged: verdict.Report) -> None:
    """The matrix as it is: a callback would quote it line by line. The log gets no colours."""
    display = Display()
    display.display("\n" + report.to_text(judged, bool(ANSIBLE_COLOR), SHOWN), screen_only=True)
    display.display(report.to_text(judged, False), log_only=True)
