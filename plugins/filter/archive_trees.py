# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Filter cellblock.fleet.archive_trees."""

from __future__ import annotations

DOCUMENTATION = r"""
name: archive_trees
short_description: Built environments as the trees option of cellblock.fleet.archive_tree
version_added: 0.1.0
description:
  - Picks the archives of one architecture and gives each a directory named after its environment.
positional: _input, architecture, directory
options:
  _input:
    description: The RV(cellblock.fleet.environment_archive#module:environments) list.
    type: list
    elements: dict
    required: true
  architecture:
    description: Architecture of the host, as in C(ansible_facts['architecture']).
    type: str
    required: true
  directory:
    description: Directory on the host that holds one directory per environment.
    type: str
    required: true
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Install the environments
  cellblock.fleet.archive_tree:
    trees: "{{ build.environments | cellblock.fleet.archive_trees('x86_64', '/srv/environments') }}"
    purge_under: /srv/environments
"""

RETURN = r"""
_value:
  description: A list for the O(cellblock.fleet.archive_tree#module:trees) option.
  type: list
  elements: dict
"""

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleFilterError  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._environments import (  # noqa: E402
    DefinitionError,
    trees_for_host,
)


def archive_trees(archives: object, architecture: str, directory: str) -> list[dict[str, Any]]:
    try:
        return trees_for_host(archives, architecture, directory)
    except DefinitionError as error:
        raise AnsibleFilterError(f"cellblock.fleet.archive_trees: {error}") from error


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"archive_trees": archive_trees}
