# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Lookup cellblock.fleet.debian_sources."""

from __future__ import annotations

DOCUMENTATION = r"""
name: debian_sources
short_description: Where the controller gets Debian packages from, as apt sources
version_added: 0.1.0
description:
  - Returns the apt sources of Debian releases as the controller's own apt configuration reaches the
    archive, so that a local mirror is used where there is one.
  - Returns nothing where it names no Debian archive (Ubuntu, say); mmdebstrap then uses its default.
options:
  _terms:
    description: Code names of releases.
    type: list
    elements: str
    required: true
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Show them
  ansible.builtin.debug:
    msg: "{{ query('cellblock.fleet.debian_sources', 'bookworm') }}"
"""

RETURN = r"""
_raw:
  description: Lines such as C(deb http://archive.example.com/debian bookworm main).
  type: list
  elements: str
"""

from typing import Any  # noqa: E402

from ansible.plugins.lookup import LookupBase  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._environments import (  # noqa: E402
    apt_index_targets,
    sources,
)


class LookupModule(LookupBase):
    def run(
        self, terms: list[str], variables: dict[str, Any] | None = None, **options: Any
    ) -> list[str]:
        targets = apt_index_targets()
        return [line for suite in terms for line in sources(suite, None, None, targets)]
