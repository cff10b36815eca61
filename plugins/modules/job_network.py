#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: job_network
short_description: Gives the jobs of a slave a network, or takes it away
version_added: 0.1.0
description:
  - Looks at the host, chooses how its jobs get onto the network, and refuses what cannot work before
    anything is changed. Then makes the interface that jobs' networks are cloned from (now, and at boot by
    whatever manages its parent), or lets the host forward for them.
  - Returns the section C(network) of the engine's configuration, and the rules of the guard around all jobs,
    which others put in place (the roles C(worker_slave) and C(job_network)).
  - A clone is tried in a network namespace of its own, also in check mode.
options:
  state:
    description: V(planned) looks, chooses and refuses, and changes nothing. V(absent) removes the interface
      and all that makes it, and sets forwarding to what it was before.
    type: str
    choices: [planned, present, absent]
    default: present
  host:
    description: The host's name in the inventory, for messages and in the rules.
    type: str
    required: true
  mode:
    description: How jobs get onto the network. V(macvlan) is as clones of an interface of the host, each with
      an address of its own on the host's segment. V(routed) is behind the host, under its address. V(auto) is
      V(macvlan) if a clone is seen to reach the gateway, otherwise V(routed). V(none) is not at all.
    type: str
    choices: [auto, macvlan, routed, none]
    default: auto
  interface:
    description: The name of the interface that jobs' networks are cloned from.
    type: str
    default: cellblock0
  parent:
    description: The interface that it is made from; empty for the one with the first of O(addresses).
    type: str
    default: ""
  gateway:
    description: The way out of the segment; empty for the parent's default route.
    type: str
    default: ""
  gateway_ipv6:
    description: The same for IPv6.
    type: str
    default: ""
  addresses:
    description: The host's addresses on the fleet's networks.
    type: list
    elements: str
    default: []
  slots:
    description: How many jobs with a network run at once; by default two more than O(job_slots).
    type: int
  job_slots:
    description: How many jobs run at once; by default one per CPU.
    type: int
  declared:
    description: What is declared about the network of the host's jobs, as the filter
      P(cellblock.fleet.job_network#filter) returns it; without it, jobs have no network.
    type: dict
  renumber:
    description: Whether jobs may get other addresses than they have, which ends those that run.
    type: bool
    default: false
author: The Cellblock authors
attributes:
  check_mode:
    support: full
    description: Tells what would be changed.
  diff_mode:
    support: full
    description: Shows files.
"""

EXAMPLES = r"""
- name: Give jobs a network
  cellblock.fleet.job_network:
    host: "{{ inventory_hostname }}"
    addresses: "{{ cellblock_addresses }}"
    declared: "{{ cellblock_fleet | cellblock.fleet.job_network(inventory_hostname) }}"
"""

RETURN = r"""
mode:
  description: How jobs are connected; V(none) where they have no network.
  returned: success
  type: str
  sample: macvlan
parent:
  description: The host's interface that jobs' networks are made of, or pass.
  returned: success
  type: str
  sample: eth0
section:
  description: C(network) of the engine's configuration; null where jobs have no network.
  returned: success
  type: dict
rules:
  description: The rules of the guard around all jobs, as nftables text; empty where jobs have no network.
  returned: success
  type: str
done:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: ["cellblock0 is made of eth0"]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.errors import (
    HostSetupError,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.job_network.decision import (
    AUTO,
    MODES,
    NONE,
    Decision,
    RefusalError,
    Wishes,
    decide,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.job_network.host import (
    HostNetwork,
    look,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.job_network.plan import (
    Mode,
    probe_mac,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.job_network.provision import (
    Provisioner,
    ProvisionError,
)


def decided(parameters: dict[str, Any]) -> tuple[Decision, HostNetwork] | None:
    """The decision and what was seen; None where jobs have no network."""
    names = ("host", "mode", "interface", "parent", "gateway", "gateway_ipv6", "slots", "job_slots")
    wishes = Wishes(
        **{name: parameters[name] for name in names},
        declared=parameters["declared"],
        renumber=parameters["renumber"],
    )
    wishes.check()
    if wishes.mode == NONE or wishes.declared is None:
        return None
    seen = look(
        parent=wishes.parent,
        interface=wishes.interface,
        addresses=parameters["addresses"],
        gateway=wishes.gateway,
        gateway_ipv6=wishes.gateway_ipv6,
        ipv6_prefix=wishes.declared.get("ipv6_prefix", ""),
        probe_mac=probe_mac(wishes.declared["addresses"]),
        try_clone=wishes.mode in (AUTO, Mode.MACVLAN.value),
    )
    return decide(wishes, seen), seen


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"choices": ["planned", "present", "absent"], "default": "present"},
            "host": {"required": True},
            "mode": {"choices": list(MODES), "default": AUTO},
            "interface": {"default": "cellblock0"},
            **{name: {"default": ""} for name in ("parent", "gateway", "gateway_ipv6")},
            "addresses": {"type": "list", "elements": "str", "default": []},
            "slots": {"type": "int"},
            "job_slots": {"type": "int"},
            "declared": {"type": "dict"},
            "renumber": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    state = module.params["state"]
    provisioner = Provisioner(module.params["interface"], check=module.check_mode)
    chosen = None
    try:
        if state != "absent":
            chosen = decided(module.params)
        if state != "planned":
            if chosen is None:
                provisioner.remove()
            else:
                provisioner.provide(chosen[0], chosen[1].has_networkd)
    except (RefusalError, ProvisionError, HostSetupError) as problem:
        module.fail_json(msg=str(problem))
    decision = chosen[0] if chosen else None
    module.exit_json(
        changed=bool(provisioner.changes.done),
        mode=decision.mode.value if decision else NONE,
        parent=decision.parent.name if decision else "",
        section=decision.section if decision else None,
        rules=decision.rules if decision else "",
        done=provisioner.changes.done,
        diff=provisioner.changes.diff,
    )


if __name__ == "__main__":
    main()
