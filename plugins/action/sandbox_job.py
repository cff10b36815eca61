# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""cellblock.fleet.sandbox_job: the module of this name on the host, as long as the controller lives."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.cellblock.fleet.plugins.plugin_utils import controller


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
        in_background = bool(self._task.async_val)
        result = self._execute_module(task_vars=task_vars, wrap_async=in_background)
        if not in_background:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result
