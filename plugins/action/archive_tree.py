# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Controller side of cellblock.fleet.archive_tree: transfer what the host lacks, and only that."""

from __future__ import annotations

import os
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

MODULE = "cellblock.fleet.archive_tree"


class ActionModule(ActionBase):
    """Ask the module on the host which trees differ, copy their archives there, let it unpack "
    "them."""

    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False
    _requires_connection = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        super().run(tmp, task_vars)
        for internal in ("phase", "staged"):
            if internal in self._task.args:
                raise AnsibleActionFail(f"{internal} is set by the action itself; remove it.")
        try:
            return self._run(task_vars or {})
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _run(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        result = self._ask_host(task_vars, phase="plan")
        if result.get("failed") or not result["changed"]:
            return {**result, "transferred": []}
        wanted = self._archives(result)
        if self._task.check_mode:
            return {**result, "transferred": []}
        for src, digest in wanted.items():
            if not digest:
                raise AnsibleActionFail(f"sha256 of {src} is missing; give the archive's digest.")
            if not os.path.isfile(src):
                raise AnsibleActionFail(
                    f"The archive {src} does not exist on the controller; build or download it "
                    "first."
                )
        staged = self._transfer(wanted)
        result = self._ask_host(task_vars, phase="apply", staged=staged)
        return {**result, "transferred": sorted(wanted)}

    def _ask_host(self, task_vars: dict[str, Any], **internal: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name=MODULE,
            module_args={**self._task.args, **internal},
            task_vars=task_vars,
        )
        answer.pop("invocation", None)
        return answer

    def _archives(self, plan: dict[str, Any]) -> dict[str, str]:
        """The archives to transfer, path -> digest; each digest once."""
        archives: dict[str, str] = {}
        for tree, state in zip(self._task.args["trees"], plan["trees"], strict=True):
            digest = tree.get("sha256") or ""
            if state["unpack"] and (not digest or digest not in archives.values()):
                archives[os.path.expanduser(tree["src"])] = digest
        return archives

    def _transfer(self, archives: dict[str, str]) -> dict[str, str]:
        """Copy archives to a temporary directory of the host: digest -> path there."""
        if not archives:
            return {}
        shell = self._connection._shell
        if not shell.tmpdir:
            self._make_tmp_path()
        staged: dict[str, str] = {}
        for src, digest in archives.items():
            remote = shell.join_path(shell.tmpdir, f"{digest}-{os.path.basename(src)}")
            self._transfer_file(src, remote)
            staged[digest] = remote
        # Only a third user's files need more than their owner's permissions; root reads everything.
        self._fixup_perms2((shell.tmpdir, *staged.values()), execute=False)
        return staged
