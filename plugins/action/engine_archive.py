# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The action cellblock.fleet.engine_archive; its documentation is in the module of this name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cellblock.fleet.plugins.plugin_utils import engine_archive


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
                "architecture": {"type": "str", "required": True},
                "cache_dir": {"type": "path", "required": True},
            }
        )
        try:
            archive = engine_archive.build(args["architecture"], Path(args["cache_dir"]))
        except (engine_archive.BuildError, OSError) as problem:
            raise AnsibleActionFail(f"The engine's archive cannot be built: {problem}") from None
        # A cache that fills is no change: the host is what it was.
        return {
            "changed": False,
            "path": str(archive.path),
            "sha256": archive.sha256,
            "built": archive.built,
        }
