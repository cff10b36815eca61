#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: archive_tree
short_description: Directories that hold exactly one unpacked archive each
version_added: 0.1.0
description:
  - Ensures that each directory in O(trees) holds exactly the content of one archive, given by its
    SHA-256 digest. All trees of a host are declared in one task.
  - Archives lie on the controller. One is transferred only when a tree that needs it is absent or
    holds something else, and only once even when several trees need it. Its digest is verified on
    the host before unpacking.
  - A tree is unpacked into a directory beside its destination and then renamed, so at no time is a
    half-unpacked tree at the destination. What an interrupted run left is removed by the next one.
  - A tree counts as present when its marker C(<parent>/.<name>.archive-tree.json) names the wanted
    digest. The marker lies outside the tree and is written as the last step. Files changed inside a
    tree later are not noticed.
  - Set-user-ID and set-group-ID bits are removed and device nodes are left out, because trees are
    meant as root file systems of jobs, which never gain privileges and get their devices from the
    engine.
  - Archives that contain absolute names or C(..) are refused.
options:
  trees:
    description: The wanted trees.
    type: list
    elements: dict
    required: true
    suboptions:
      src:
        description:
          - Absolute path of the archive on the controller.
          - Its name ends in C(.tar), C(.tar.gz), C(.tgz), C(.tar.zst), C(.zip) or C(.whl).
        type: path
        required: true
      sha256:
        description:
          - Expected SHA-256 digest of the archive, 64 lower-case hexadecimal digits.
          - May be empty in check mode only, for an archive that was not built yet.
        type: str
      dest:
        description: Absolute path of the directory on the host. Its parents are created when they
          are missing.
        type: path
        required: true
      mode:
        description: Mode of the directory itself, an octal string. What is inside keeps the modes
          of the archive.
        type: str
        default: "0755"
  purge_under:
    description:
      - A directory whose other trees are removed. Only direct children that carry the marker of
        this module are touched.
    type: path
  phase:
    description: Set by the action plugin; V(plan) compares and changes nothing.
    type: str
    choices: [plan, apply]
    default: plan
  staged:
    description: Set by the action plugin; archive digests to the transferred files on the host.
    type: dict
    default: {}
requirements:
  - Python 3.10 or newer on the host
  - C(tar) on the host; C(zstd) for archives that end in C(.tar.zst)
attributes:
  check_mode:
    description: Can run in check mode and predict changes, also on a clean host and before the
      archives exist.
    support: full
  diff_mode:
    description: Shows the digest of every tree before and after.
    support: full
  idempotent:
    description: A second run with the same archives changes nothing and transfers nothing.
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
- name: Two root file systems, and no other under that directory
  cellblock.fleet.archive_tree:
    trees:
      - src: /srv/cache/base-bookworm-amd64.tar.zst
        sha256: 3f79bb7b435b05321651daefd374cdc681dc06faa65e374e38337b88ca046dea
        dest: /var/lib/cellblock/environments/base
      - src: /srv/cache/python-bookworm-amd64.tar.zst
        sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
        dest: /var/lib/cellblock/environments/python
    purge_under: /var/lib/cellblock/environments
"""

RETURN = r"""
trees:
  description: One entry per wanted tree, in the order given.
  returned: success
  type: list
  elements: dict
  contains:
    dest:
      description: The directory.
      type: str
    changed:
      description: Whether it had to be changed.
      type: bool
    unpack:
      description: Whether the archive had to be unpacked; otherwise only the mode of the directory
        was set.
      type: bool
    before:
      description: SHA-256 digest of the archive that was there before, or null.
      type: str
    after:
      description: SHA-256 digest of the wanted archive; null in check mode when it is not known
        yet.
      type: str
    reason:
      description: Why it was changed, or V(up to date).
      type: str
purged:
  description: Trees that were removed because of O(purge_under).
  returned: success
  type: list
  elements: str
cleaned:
  description: Paths that an interrupted run had left and that were removed.
  returned: success
  type: list
  elements: str
transferred:
  description: Archives that were copied to the host, as paths on the controller.
  returned: success
  type: list
  elements: str
"""

# Not ansible.builtin.unarchive into directories named by digest, with a link: that sends and compares whole
# archives in every run, keeps what else is in a directory, set-user-ID bits and device nodes, and takes a
# half-unpacked directory that `creates` finds for a whole one.
from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._archive_tree import (  # noqa: E402
    TreeError,
    apply,
    checked_directory,
    make_plan,
    parse_trees,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "trees": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "src": {"type": "path", "required": True},
                    "sha256": {"type": "str"},
                    "dest": {"type": "path", "required": True},
                    "mode": {"type": "str", "default": "0755"},
                },
            },
            "purge_under": {"type": "path"},
            "phase": {"type": "str", "choices": ["plan", "apply"], "default": "plan"},
            "staged": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        trees = parse_trees(params["trees"])
        purge_under = params["purge_under"] and checked_directory(
            params["purge_under"], "purge_under"
        )
        if params["phase"] == "apply" and not module.check_mode:
            plan = apply(trees, purge_under, params["staged"])
        else:
            plan = make_plan(trees, purge_under)
    except TreeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**plan.as_result())


if __name__ == "__main__":
    main()
