#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: guarded_rules
short_description: An nftables table of the host's own, changed without locking anybody out
version_added: 0.1.0
description:
  - Ensures that one table holds exactly the given rules, now and after a reboot, and that the guard which
    repairs it is running. Other tables are never touched.
  - New rules are loaded on trial. A timer on the host brings the earlier ones back (or removes the
    table, where there were none) unless this action confirms them over a connection that it opened
    after they were loaded. An established or shared connection proves nothing, so it is never used.
  - When the confirmation does not come through, the action waits until the host is back on the
    earlier rules, makes sure that it answers, and fails saying so. A play that is killed on the way
    leads to the same rollback.
  - Everything that can be wrong with the rules or the host is found before anything is changed;
    the rules are really loaded, in a network namespace that is thrown away.
  - The program that does this on the host, C(/usr/local/sbin/NAME), and its units come with the action.
options:
  name:
    description:
      - Of this use of guarded rules on the host, which can have several; the command, the units, their
        events in the journal and C(/run/NAME) are called after it.
    type: str
    required: true
  state:
    description: Whether the rules shall be there; V(absent) removes the table, the program, the units and
      what is recorded, and nothing else.
    type: str
    choices: [present, absent]
    default: present
  description:
    description: What the rules are, for the units' descriptions. Needed unless O(state=absent).
    type: str
  tables:
    description:
      - Family and name of the table, like V(inet cellblock). Where there are several, O(rules) are one of
        them, and the others are removed; all have one name.
    type: list
    elements: str
    required: true
  rules:
    description:
      - The rules, one C(table FAMILY NAME { ... }). Needed unless O(state=absent).
      - V(@mac:NAME@) stands for the hardware address that the interface has when they are loaded.
    type: str
  path:
    description: Where the confirmed rules are kept; it ends in V(.nft). Who keeps ssh is in a file
      beside it, in V(.json).
    type: path
    required: true
  controllers:
    description:
      - Addresses or networks from which the host is administered, for rules that decide who may reach it.
      - The address that this very connection comes from must be among them; otherwise the task fails
        before anything is changed. Connections other than ssh are not checked.
      - They keep ssh if the confirmed rules cannot be loaded at a later boot. Without this option there
        is no table then.
    type: list
    elements: str
  controller_ports:
    description:
      - TCP ports that the rules let O(controllers) open. The one that this very connection came to, as sshd sees it,
        must be among them; otherwise the task fails before anything is changed.
      - Without this option no port is compared.
    type: list
    elements: int
  foreign_rules:
    description:
      - What the guard does with rules, chains, sets and elements that somebody else adds to the table.
        It reports them in the journal in any case.
      - Elements that the rules themselves add to sets while packets pass are no such thing.
    type: str
    choices: [remove, report]
    default: remove
  before_network:
    description: Whether a unit of its own loads the confirmed rules at boot before the network is
      configured. Otherwise the guard loads them, for rules that need something which comes later.
    type: bool
    default: true
  after:
    description: Units after which the guard's starts.
    type: list
    elements: str
    default: []
  before:
    description: Units before which the guard's starts.
    type: list
    elements: str
    default: []
  rollback_after_s:
    description: Seconds after which rules that nobody confirmed are rolled back, 10 to 600.
    type: int
    default: 30
requirements:
  - root on the host; Python 3.10 or newer, systemd, C(nft), C(unshare)
attributes:
  check_mode:
    description: Can run in check mode, also on a clean host. The rules are checked as always, unless C(nft)
      is still to be installed.
    support: full
  diff_mode:
    description: Shows the change in rules and files, and how the kernel's table differs from what was
      loaded.
    support: full
  idempotent:
    description: A second run with the same rules changes nothing.
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
- name: Load the host's firewall
  cellblock.fleet.guarded_rules:
    name: cellblock-firewall
    description: the host's firewall
    tables: [inet cellblock]
    rules: "{{ lookup('ansible.builtin.template', 'firewall.nft.j2') }}"
    path: /etc/cellblock/firewall.nft
    controllers: [192.0.2.10, "2001:db8::10"]

- name: Guard an interface
  cellblock.fleet.guarded_rules:
    name: example-guard
    description: the rules of an interface
    tables: [netdev example]
    rules: |
      table netdev example {
        chain ingress {
          type filter hook ingress device "eth1" priority filter; policy accept;
          ether saddr != @mac:eth1@ udp dport 67 drop
        }
      }
    path: /etc/example/guard.nft
    before_network: false
    foreign_rules: report
"""

RETURN = r"""
reasons:
  description: Why something had to be changed, one fragment each.
  returned: success
  type: list
  elements: str
missing:
  description: What the kernel's table lacked before of what was loaded; each with C(object) and C(text).
  returned: O(state=present)
  type: list
  elements: dict
added:
  description: What somebody had added to the kernel's table; each with C(object) and C(text).
  returned: O(state=present)
  type: list
  elements: dict
confirmed_after_s:
  description: Seconds from the start of loading to the confirmation over a new connection.
  returned: when new rules were loaded
  type: float
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._guarded_rules_options import (  # noqa: E402
    ARGUMENT_SPEC,
    REQUIRED_IF,
)


def main() -> None:
    """The action of the same name does it all, with a module of its own on the host."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC, required_if=REQUIRED_IF, supports_check_mode=True
    )
    module.fail_json(msg="guarded_rules is an action and cannot run as a module by itself.")


if __name__ == "__main__":
    main()
