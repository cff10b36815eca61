#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: child_container
short_description: Tries whom child containers of a worker container reach
version_added: 0.1.0
description:
  - An experiment. On a slave it makes a worker container with an engine and three child containers inside, a cache server and
    the hosts that a worker must not reach, and has each ask each, on one bridge, on two, across the slave, by name, and
    under the rules that could be thought to stop them.
  - All of it is in a transient unit, C(cellblock-child-container), with a network that has no way out, with mounts of its own and
    with a second engine of the slave's, so that nothing of the slave's own is used or changed. It is gone when the module ends; what
    one that was killed left, or still does, the next run removes. The unit ends by itself after ten minutes.
  - In check mode nothing is made; the host is checked, and the steps are returned.
options:
  host:
    description: What the host is called in messages.
    type: str
    required: true
  runtimes:
    description: Which runtimes to try, of V(runc), V(userns) and V(sysbox-runc). Empty for all that the host has.
    type: list
    elements: str
    default: []
  create:
    description: For each runtime the arguments of C(docker create) for the worker container, as the role C(worker_container) has
      them. What is place rather than nature in them (name, networks, volumes, image) is left out.
    type: dict
    required: true
  inner_engine:
    description: The command of the engine inside, as that role has it.
    type: list
    elements: str
    required: true
  root:
    description: Directory with the root file system of which all the containers are made, F(/) for the host's own.
    type: path
    default: /
requirements:
  - Python 3.10 or newer, Docker, nft and systemd on the host
attributes:
  check_mode:
    description: Can run in check mode and predict changes.
    support: full
  diff_mode:
    description: Shows nothing.
    support: none
  idempotent:
    description: Nothing that lasts is changed.
    support: full
seealso:
  - module: cellblock.fleet.worker_container
  - module: cellblock.fleet.network_probe
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: See whom child containers reach
  cellblock.fleet.child_container:
    host: slave1
    runtimes: [userns]
    create:
      userns: [--cap-add, SYS_ADMIN, --cap-add, NET_ADMIN, image]
    inner_engine: [dockerd, --bip, 172.31.255.1/24]
"""

RETURN = r"""
runtimes:
  description: The runtimes that are tried.
  returned: success
  type: list
  elements: str
left_out:
  description: Runtimes that the host does not have.
  returned: success
  type: list
  elements: str
steps:
  description: What is tried, in this order.
  returned: success
  type: list
  elements: dict
observations:
  description: What was seen, a row for each request; C(docs/experiments/child_container.md) has the fields.
  returned: success, not in check mode
  type: list
  elements: dict
workers:
  description: For each runtime what the kernel says of the worker's first process, C(uid_map), C(seccomp) (2 is a filter) and how
    many mounts of Sysbox's file system it has (C(sysbox_mounts)).
  returned: success, not in check mode
  type: dict
differences:
  description: What was not as expected, a sentence each.
  returned: success, not in check mode
  type: list
  elements: str
table:
  description: The observations in short, a line each.
  returned: success, not in check mode
  type: list
  elements: str
engine:
  description: The engine's version.
  returned: success, not in check mode
  type: str
kernel:
  description: The host's kernel.
  returned: success
  type: str
seconds:
  description: How long it took.
  returned: success, not in check mode
  type: float
"""

import os  # noqa: E402
import shutil  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils import (  # noqa: E402
    _child_container as plan,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import (  # noqa: E402
    _child_container_lab as lab,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import _reader  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._docker_engine import (  # noqa: E402
    Host,
)

PROGRAMS = ("dockerd", "docker", "ip", "iptables", "nft", "nsenter", "systemd-run")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "runtimes": {"type": "list", "elements": "str", "default": []},
            "create": {"type": "dict", "required": True},
            "inner_engine": {"type": "list", "elements": "str", "required": True},
            "root": {"type": "path", "default": "/"},
        },
        supports_check_mode=True,
    )
    asked = module.params["runtimes"]
    info = Host(lambda command: module.run_command(command)).ask("/info")
    engine = info if isinstance(info, dict) else None
    there = {name: shutil.which(name) is not None for name in PROGRAMS}
    refused = plan.refusals(
        module.params["host"], asked, there, engine, Path("/proc/net/if_inet6").exists()
    )
    if not (Path(module.params["root"]) / "usr/sbin/dockerd").exists() and not refused:
        refused = [
            f"{module.params['root']} has no usr/sbin/dockerd; name a root file system with an engine."
        ]
    if refused:
        module.fail_json(msg=" ".join(refused))
    registered = (engine or {}).get("Runtimes") or {}
    runtimes = plan.chosen(asked, registered)
    result: dict[str, Any] = {
        "changed": False,
        "runtimes": runtimes,
        "left_out": [name for name in plan.RUNTIMES if name not in runtimes and not asked],
        "steps": [asdict(step) for step in plan.STEPS],
        "kernel": os.uname().release,
    }
    if module.check_mode:
        module.exit_json(**result)
    # What this waits for ends with it, and so it ends as well.
    _reader.when_unread(lab.clean_up)
    try:
        answer = lab.run_in_unit(
            {
                "runtimes": runtimes,
                "create": module.params["create"],
                "inner_engine": module.params["inner_engine"],
                "root": module.params["root"],
                "engine_runtimes": {
                    name: registered[name].get("path", name)
                    for name in runtimes
                    if name == "sysbox-runc"
                },
            }
        )
    except (lab.LabError, OSError, ValueError) as error:
        module.fail_json(msg=f"{module.params['host']}: {error}", **result)
    seen = [plan.Observation(**row) for row in answer["observations"]]
    if "failed" in answer:
        module.fail_json(
            msg=f"{module.params['host']}: {answer['failed']}",
            differences=plan.differences(seen),
            observations=answer["observations"],
        )
    result.update(
        observations=answer["observations"],
        workers=answer["workers"],
        differences=[
            *plan.not_as_called(answer["workers"]),
            *plan.differences(seen),
            *plan.missing(seen, runtimes),
        ],
        table=plan.table(seen),
        engine=answer.get("engine", ""),
        seconds=answer["seconds"],
    )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
