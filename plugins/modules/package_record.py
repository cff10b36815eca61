#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: package_record
short_description: Remember which packages an installation added to a host, and purge exactly these
version_added: 0.1.0
description:
  - Keeps a record on the host of the packages that were added by installations, their dependencies
    included, and of the users, groups and directories that came with them, so that the host can be
    left as it was.
  - An installation is put between two tasks of this module, one with O(state=noted) before it and
    one with O(state=recorded) after it. When it is interrupted in between, the next
    O(state=recorded) counts from what was noted first; what somebody else installed meanwhile is
    then taken for ours.
  - With O(state=purged) the recorded packages are purged, and the recorded accounts and those of the
    recorded directories that are empty are removed. A
    recorded package that some other installed package needs stays, and RV(left) names it; accounts
    then stay as well. Packages that became superfluous otherwise are not touched.
  - A package whose configuration was already there from an earlier installation is removed without
    its configuration.
options:
  state:
    description: What to do; see the description.
    type: str
    choices: [noted, recorded, purged]
    required: true
  directory:
    description: Where the record is kept, in the files C(packages), C(accounts) and C(directories).
    type: path
    default: /var/lib/cellblock
requirements:
  - Python 3.10 or newer on the host
  - apt and dpkg on the host
attributes:
  check_mode:
    description: Can run in check mode and predict changes.
    support: full
  diff_mode:
    description: Shows packages and accounts that are recorded or removed.
    support: full
  idempotent:
    description: A second run changes nothing.
    support: full
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Note what is there
  cellblock.fleet.package_record:
    state: noted

- name: Install zstd
  ansible.builtin.apt:
    name: zstd

- name: Record what was added
  cellblock.fleet.package_record:
    state: recorded

- name: Purge what was ever recorded
  cellblock.fleet.package_record:
    state: purged
"""

RETURN = r"""
packages:
  description: Names of the packages that were recorded or removed, with the architecture where it
    is not the host's own.
  returned: success
  type: list
  elements: str
users:
  description: Users that were recorded or removed.
  returned: success
  type: list
  elements: str
groups:
  description: Groups that were recorded or removed.
  returned: success
  type: list
  elements: str
left:
  description: Recorded packages that stay, each with the packages that need it.
  returned: with O(state=purged)
  type: dict
"""

from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._package_record import (  # noqa: E402
    Record,
    RecordError,
    Removal,
    Store,
    added,
    as_result,
    carry_out,
    lines,
    plan_removal,
    read_state,
)


def difference(record: Record, new: Record) -> Removal:
    """What is new, in the shape in which results are told."""
    return Removal(
        purge=new.packages - record.packages,
        remove=new.kept - record.kept,
        users=new.users - record.users,
        groups=new.groups - record.groups,
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["noted", "recorded", "purged"], "required": True},
            "directory": {"type": "path", "default": "/var/lib/cellblock"},
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    store = Store(Path(module.params["directory"]))
    what = Removal()
    try:
        if module.params["state"] == "noted":
            # A change of the record alone is no change of the host: it is told by what follows.
            if not module.check_mode:
                store.note(read_state(module.run_command))
            module.exit_json(changed=False, **as_result(what))
        if module.params["state"] == "recorded":
            before = store.noted()
            if before is not None:
                record = store.read()
                new = added(module.run_command, record, before, read_state(module.run_command))
                what = difference(record, new)
                if not module.check_mode:
                    store.write(new)
                    store.settle()
            diff = {"before": "", "after": "".join(f"{line}\n" for line in lines(what))}
            module.exit_json(changed=bool(lines(what)), diff=diff, **as_result(what))
        record = store.read()
        before = store.noted()
        state = read_state(module.run_command)
        if before is not None:
            record = added(module.run_command, record, before, state)
        what = plan_removal(module.run_command, record, state)
        if not module.check_mode:
            carry_out(module.run_command, what)
            store.clear()
    except RecordError as error:
        module.fail_json(msg=str(error))
    for name, others in what.leave.items():
        module.warn(f"{name} stays installed, because {', '.join(others)} needs it")
    diff = {"before": "".join(f"{line}\n" for line in lines(what)), "after": ""}
    module.exit_json(changed=bool(lines(what)), diff=diff, **as_result(what))


if __name__ == "__main__":
    main()
