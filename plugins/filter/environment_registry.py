# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Filter cellblock.fleet.environment_registry."""

from __future__ import annotations

DOCUMENTATION = r"""
name: environment_registry
short_description: The engine's list of installed environments
version_added: 0.1.0
description:
  - Joins environment definitions with the archives built from them to what the engine reads on a
    host.
positional: _input, archives, architecture, directory, failures, installed
options:
  _input:
    description: The environment definitions, by name.
    type: dict
    required: true
  archives:
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
  failures:
    description: The RV(cellblock.fleet.environment_archive#module:failures) list; anything else that was
      not built is an error.
    type: list
    elements: dict
    default: []
  installed:
    description: The list as the host has it, from which what could not be built is kept.
    type: dict
    default: {}
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Tell the engine which environments exist
  ansible.builtin.copy:
    content: "{{ registry | to_nice_json }}\n"
    dest: /etc/cellblock/environments.json
    mode: "0644"
  vars:
    registry: >-
      {{ definitions
         | cellblock.fleet.environment_registry(archives, 'x86_64', '/srv/environments') }}
"""

RETURN = r"""
_value:
  description:
    - Name to a dictionary with C(path) (root directory on the host), C(digest) (C(sha256:...) of
      the archive), C(description), C(default_path) (the PATH that programs start with) and C(mounts).
  type: dict
"""

from collections.abc import Callable, Mapping  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleFilterError  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._environments import (  # noqa: E402
    DefinitionError,
    registry_for_host,
)


def environment_registry(
    definitions: object,
    archives: object,
    architecture: str,
    directory: str,
    failures: object = (),
    installed: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    try:
        return registry_for_host(
            definitions, archives, architecture, directory, failures, installed
        )
    except DefinitionError as error:
        raise AnsibleFilterError(f"cellblock.fleet.environment_registry: {error}") from error


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"environment_registry": environment_registry}
