# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The variables that the collection's roles document."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ansible.parsing.dataloader import DataLoader

ROLES_DIR = Path(__file__).resolve().parents[2] / "roles"


@cache
def role_variables() -> tuple[frozenset[str], frozenset[str]]:
    """What the roles document, and what their variables begin with."""
    names: set[str] = set()
    prefixes: set[str] = set()
    for path in ROLES_DIR.glob("*/meta/argument_specs.yml"):
        prefixes.add(f"{path.parents[1].name}_")
        entry_points = DataLoader().load_from_file(str(path))["argument_specs"]
        names.update(name for entry in entry_points.values() for name in entry.get("options", {}))
    return frozenset(names), frozenset(prefixes)
