#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: package_upstreams
short_description: Finds where the controller gets its packages from
version_added: 0.1.0
description:
  - Reads the configuration of apt, pip and npm as they see it, and asks the package indexes where the
    files are that they link to.
  - What an index answered is kept for a day in O(cache_dir), and used longer where it does not answer.
  - Runs on the controller alone, as an action.
options:
  upstreams:
    description:
      - A table of one's own, by path prefix, each with C(url) and C(kind) (C(apt), C(python), C(npm) or
        C(files)), optionally C(probe) and C(links). It is checked and completed; nothing is looked up then.
    type: dict
    default: {}
  ca_bundle:
    description:
      - File on the controller with the certificates that upstreams are verified by.
      - Empty means those that pip, apt and npm trust.
    type: str
    default: ""
  cache_dir:
    description: Directory on the controller for what was looked up. Created when it is missing.
    type: path
    required: true
requirements:
  - apt with package lists and pip on the controller, unless O(upstreams) is given
attributes:
  check_mode:
    description: Writes to O(cache_dir) only, in check mode too.
    support: full
  diff_mode:
    description: Shows a difference.
    support: none
  idempotent:
    description: Never reports a change.
    support: full
  action:
    description: Has an action plugin that runs on the controller.
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: none
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Find where the controller gets its packages from
  cellblock.fleet.package_upstreams:
    cache_dir: /srv/cache/cellblock
  register: found
"""

RETURN = r"""
upstreams:
  description:
    - By path prefix, the address in pieces (C(scheme), C(host), C(authority), C(path)), C(kind), C(probe)
      and C(links).
  returned: success
  type: dict
ca_bundle:
  description: File on the controller with the certificates by which they are verified.
  returned: success
  type: str
"""
