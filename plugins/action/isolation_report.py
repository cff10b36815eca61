# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""cellblock.fleet.isolation_report: judge what all hosts saw, show it, write it down."""

from __future__ import annotations

import errno
import os
import re
import shutil
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
# Runs of one fleet that may end in the same second.
PER_SECOND = 100


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
        show(judged, files[0])
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
    """The three files in a directory of this run alone, which is complete or not there at all, and to
    which the fleet's `latest` leads. Evidence of an earlier run is never written over.
    """
    # Ansible itself may have changed to the playbook's directory.
    fleet = Path(os.environ.get("PWD") or ".") / dest / directory_name(run.fleet_name)
    as_json = report.to_json(judged, run)
    texts = {
        "isolation.html": report.to_html(judged, run, as_json),
        "isolation.json": as_json,
        "isolation.svg": report.to_svg(judged),
    }
    partial = fleet / f".{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            directory = place(partial, fleet, run.created.strftime("%Y-%m-%dT%H%M%SZ"))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        link = fleet / f".{os.getpid()}.latest"
        link.symlink_to(directory.name)
        link.replace(fleet / "latest")
    except OSError as problem:
        raise AnsibleActionFail(
            f"{fleet} cannot be written ({problem.strerror}); choose another dest."
        ) from None
    return [str(directory / name) for name in texts]


def directory_name(fleet: str) -> str:
    """The fleet's name as one that a directory can have, whatever inventory it was taken from."""
    return re.sub(r"[^\w.-]+|^\.+", "_", fleet) or "_"


def place(partial: Path, fleet: Path, moment: str) -> Path:
    """Renames the directory after the moment; with a number when another run of that second has it."""
    for number in range(1, PER_SECOND + 1):
        directory = fleet / (moment if number == 1 else f"{moment}-{number}")
        try:
            return partial.rename(directory)
        except OSError as problem:
            # rename(2) replaces an empty directory, and says one of these of any other.
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST) or number == PER_SECOND:
                raise
    raise AssertionError  # not reached


def show(judged: verdict.Report, page: str) -> None:
    """The matrix as it is: a callback would quote it line by line. The log gets no colours."""
    display = Display()
    display.display("\n" + report.to_text(judged, bool(ANSIBLE_COLOR), SHOWN), screen_only=True)
    display.display(f"Report: {page}", screen_only=True)
    display.display(f"{report.to_text(judged, False)}\nReport: {page}", log_only=True)
