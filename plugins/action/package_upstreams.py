# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The action cellblock.fleet.package_upstreams; its documentation is in the module of this name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cellblock.fleet.plugins.plugin_utils import package_upstreams


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
                "upstreams": {"type": "dict", "default": {}},
                "ca_bundle": {"type": "str", "default": ""},
                "cache_dir": {"type": "path", "required": True},
            }
        )
        try:
            upstreams, bundle = package_upstreams.find(
                args["upstreams"], args["ca_bundle"], Path(args["cache_dir"])
            )
        except package_upstreams.UpstreamError as problem:
            host = (task_vars or {}).get("inventory_hostname", "the host")
            raise AnsibleActionFail(
                f"{host}: it is not known where packages come from: {problem}."
            ) from None
        return {"changed": False, "upstreams": upstreams, "ca_bundle": str(bundle)}
