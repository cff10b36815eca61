#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_archive
short_description: Builds the archive of the engine that runs jobs
version_added: 0.1.0
description:
  - Packs the engine that this collection brings for one architecture, with its jobinit compiled.
    M(cellblock.fleet.archive_tree) installs it.
  - The archive is kept as C(<cache_dir>/engine/engine-<architecture>-<digest>.tar.gz), where the digest
    covers the sources. It is deterministic and not built again while these stay the same.
  - Runs on the controller alone, as an action.
options:
  architecture:
    description: Architecture as in C(ansible_facts['architecture']); V(x86_64) and V(aarch64) are supported.
    type: str
    required: true
  cache_dir:
    description: Directory on the controller for the archive. Created when it is missing.
    type: path
    required: true
requirements:
  - gcc and the C library's static part on the controller, for O(architecture)
attributes:
  check_mode:
    description: The archive is built in check mode too, in the controller's cache only, so that
      what follows can tell whether a host would change.
    support: full
  diff_mode:
    description: Shows a difference.
    support: none
  idempotent:
    description: Never reports a change; builds nothing that the cache holds.
    support: full
  action:
    description: Has an action plugin that runs on the controller.
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: none
seealso:
  - module: cellblock.fleet.archive_tree
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Build the engine's archive for the host's architecture
  cellblock.fleet.engine_archive:
    architecture: "{{ ansible_facts['architecture'] }}"
    cache_dir: /srv/cache/cellblock
  register: engine
"""

RETURN = r"""
path:
  description: The archive on the controller.
  returned: success
  type: str
sha256:
  description: Its digest.
  returned: success
  type: str
built:
  description: Whether it was built by this task.
  returned: success
  type: bool
"""
