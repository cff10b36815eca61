# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""cellblock.fleet.sandbox_job: the module of this name on the host, as long as the controller lives.

In rounds, what has come back is not lost with the host, or with the controller.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import records
from ansible_collections.cellblock.fleet.plugins.plugin_utils import controller

FIRST_ROUND, LARGEST_ROUND = 16, 512
SHORT_ROUND_S, LONG_ROUND_S = 5.0, 20.0
"""After a shorter round the next one has twice as many jobs, after a longer one half as many: a round costs about half
a second of its own."""


class ActionModule(ActionBase):
    """Closes the connection, by which the module and its jobs end, when ansible-playbook is killed."""

    _supports_check_mode = True
    _supports_diff = False
    _supports_async = True
    _requires_connection = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        super().run(tmp, task_vars)
        controller.end_with_controller()
        arguments = dict(self._task.args)
        file, in_rounds = arguments.pop("records_file", None), arguments.pop("in_rounds", False)
        jobs = arguments.get("jobs")
        if not boolean(in_rounds) or self._task.check_mode or not isinstance(jobs, list):
            return self._run_module(arguments, task_vars)
        return self._run_in_rounds(arguments, jobs, _file(file), task_vars)

    def _run_in_rounds(
        self,
        arguments: dict[str, Any],
        jobs: Sequence[Any],
        file: Path | None,
        task_vars: dict[str, Any] | None,
    ) -> dict[str, Any]:
        host = (task_vars or {}).get("inventory_hostname", "")
        results: list[Any] = []
        failures: list[str] = []
        answer: dict[str, Any] = {"changed": False, "results": []}
        for round_ in _Rounds(jobs):
            try:
                answer = self._run_module({**arguments, "jobs": round_}, task_vars)
            except AnsibleConnectionFailure as problem:
                return {"unreachable": True, "msg": str(problem), "results": results}
            found = answer.get("results")
            if (
                answer.get("unreachable")
                or not isinstance(found, list)
                or len(found) != len(round_)
            ):
                return {**answer, "results": results}
            results += found
            if file is not None:
                _append(file, host, round_, answer)
            if answer.get("failed"):
                failures.append(str(answer.get("msg")))
        if failures:
            return {**answer, "failed": True, "msg": "; ".join(failures), "results": results}
        return {**answer, "results": results}

    def _run_module(
        self, arguments: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        in_background = bool(self._task.async_val)
        result: dict[str, Any] = self._execute_module(
            module_args=arguments, task_vars=task_vars, wrap_async=in_background
        )
        if not in_background:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result


class _Rounds:
    """The jobs in their order, so many at a time that a round takes some seconds."""

    def __init__(self, jobs: Sequence[Any]) -> None:
        self._jobs = jobs

    def __iter__(self) -> Iterator[list[Any]]:
        begin, size = 0, FIRST_ROUND
        while begin < len(self._jobs) or begin == 0:
            started = time.monotonic()
            yield list(self._jobs[begin : begin + size])
            begin += size
            took = time.monotonic() - started
            if took < SHORT_ROUND_S:
                size = min(2 * size, LARGEST_ROUND)
            elif took > LONG_ROUND_S:
                size = max(1, size // 2)


def _file(path: str | None) -> Path | None:
    """An empty file to append to."""
    if path is None:
        return None
    try:
        Path(path).write_bytes(b"")
    except OSError as problem:
        raise AnsibleActionFail(
            f"records_file: {path} cannot be written on the controller: {problem.strerror}"
        ) from None
    return Path(path)


def _append(file: Path, host: str, jobs: Sequence[Any], answer: dict[str, Any]) -> None:
    kept, _ = records.collect({host: jobs}, {host: answer})
    with file.open("a", encoding="utf-8") as target:
        target.writelines(json.dumps(record) + "\n" for record in kept)
