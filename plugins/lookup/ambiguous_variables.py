# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Lookup cellblock.fleet.ambiguous_variables."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ambiguous_variables
short_description: What YAML makes of variables of this collection that may be meant otherwise
version_added: 0.1.0
description:
  - Ansible reads YAML 1.1, in which C(22:22) is the number 1342, C(010) is 8, C(1_0) is 10 and C(no) is false; of a key that is
    there twice, the last counts. This finds such values of this collection's variables, and such keys.
  - Read are the inventory's YAML files, C(group_vars) and C(host_vars) beside it and beside the playbook, and what
    C(--extra-vars) says. Variables of plays and of roles are not.
  - Values of other variables are left alone. Files that are encrypted as a whole are read as well.
options:
  _terms:
    description: None are needed.
    type: list
    elements: str
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Refuse values that mean something else
  ansible.builtin.assert:
    that: query('cellblock.fleet.ambiguous_variables') | length == 0
"""

RETURN = r"""
_raw:
  description: A sentence for each, with file, line and column.
  type: list
  elements: str
"""

import os  # noqa: E402
import re  # noqa: E402
from collections.abc import Iterable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible import context  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.engine.documents import (  # noqa: E402
    ambiguities,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet.variables import (  # noqa: E402
    FLEET_VARIABLES,
)
from ansible_collections.cellblock.fleet.plugins.plugin_utils.role_variables import (  # noqa: E402
    role_variables,
)

# What Ansible passes over in a directory that is an inventory.
_NO_INVENTORY = re.compile(r"\.|(host_vars|group_vars|vars_plugins)$")
_EXTENSIONS = (".yml", ".yaml", ".json")


class LookupModule(LookupBase):
    """Runs on the controller; reads the files as Ansible finds them."""

    def run(
        self, terms: list[str], variables: dict[str, Any] | None = None, **options: Any
    ) -> list[str]:
        known = variables or {}
        names = {*FLEET_VARIABLES, *role_variables()[0]}
        texts = [
            *((_shown(path), self._text(path)) for path in dict.fromkeys(self._files(known))),
            *self._extra_variables(),
        ]
        return [
            f"{source}: {sentence}"
            for source, text in texts
            for sentence in ambiguities(text, names)
        ]

    def _text(self, path: str) -> str:
        return str(self._loader.get_text_file_contents(path))

    def _files(self, known: dict[str, Any]) -> Iterator[str]:
        sources = [
            os.path.abspath(source)
            for source in known.get("ansible_inventory_sources") or []
            if os.path.exists(source)
        ]
        for source in sources:
            yield from _inventory_files(Path(source))
        places = [path if os.path.isdir(path) else os.path.dirname(path) for path in sources]
        places += [known["playbook_dir"]] if "playbook_dir" in known else []
        groups: dict[str, list[str]] = known.get("groups") or {}
        hosts = dict.fromkeys(host for members in groups.values() for host in members)
        for place in places:
            yield from self._variables_files(os.path.join(place, "group_vars"), groups)
            yield from self._variables_files(os.path.join(place, "host_vars"), hosts)

    def _variables_files(self, place: str, names: Iterable[str]) -> Iterator[str]:
        if os.path.isdir(place):
            for name in names:
                yield from map(str, self._loader.find_vars_files(place, name))

    def _extra_variables(self) -> Iterator[tuple[str, str]]:
        for given in context.CLIARGS.get("extra_vars") or ():
            text = str(given)
            if text.startswith("@"):
                yield text[1:], self._text(text[1:])
            elif text.startswith(("{", "[")):
                yield "--extra-vars", text


def _inventory_files(path: Path) -> Iterator[str]:
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if not _NO_INVENTORY.match(entry.name):
                yield from _inventory_files(entry)
    elif path.suffix in _EXTENSIONS:
        yield str(path)


def _shown(path: str) -> str:
    """As whoever started Ansible would write it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
