# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The options of cellblock.fleet.guarded_rules, for its module and its action."""

from __future__ import annotations

from typing import Any

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "description": {"type": "str"},
    "tables": {"type": "list", "elements": "str", "required": True},
    "rules": {"type": "str"},
    "path": {"type": "path", "required": True},
    "controllers": {"type": "list", "elements": "str"},
    "controller_ports": {"type": "list", "elements": "int"},
    "foreign_rules": {"type": "str", "choices": ["remove", "report"], "default": "remove"},
    "before_network": {"type": "bool", "default": True},
    "after": {"type": "list", "elements": "str", "default": []},
    "before": {"type": "list", "elements": "str", "default": []},
    "rollback_after_s": {"type": "int", "default": 30},
}
REQUIRED_IF = [("state", "present", ["rules", "description"])]
