#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: isolation_report
short_description: Compares who was found to reach whom with what is declared
version_added: 0.1.0
description:
  - Compares what M(cellblock.fleet.network_probe) saw on all hosts with the declared flows, prints the
    matrix to the terminal and writes it as C(isolation.json), C(isolation.html) and C(isolation.svg)
    into a directory of O(dest) that is named after the fleet and the time (UTC). Earlier reports stay;
    C(latest), a link beside them, leads to the newest of the fleet.
  - The task fails, with a sentence for each difference, unless everything was tried and is as
    declared.
  - Runs on the controller alone, as an action. What the hosts saw is taken from the variables that
    C(playbooks/verify-isolation.yml) registers, see O(observations).
options:
  plan:
    description: What was to be tried, as the filter C(cellblock.fleet.probe_plan) returned it.
    type: dict
    required: true
  name:
    description: Name of the fleet, for the report and its directory.
    type: str
    required: true
  observations:
    description:
      - By host, and C(controller), the results of the tasks on it, in C(listening), C(probed) and
        C(collected), and C(rules), one sentence for each difference between the rules in force and
        those installed.
      - A result that is missing, failed, unreachable or none that M(cellblock.fleet.network_probe) returns
        makes what depends on it unproven, and nothing else.
    type: dict
    required: true
  dest:
    description: Directory on the controller for the reports of all fleets. Created when it is missing.
      Relative to the directory that ansible-playbook was started in.
    type: path
    required: true
attributes:
  check_mode:
    description: Nothing is compared and nothing is written, since nothing was tried.
    support: full
  diff_mode:
    description: Not supported.
    support: none
seealso:
  - module: cellblock.fleet.network_probe
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Report
  cellblock.fleet.isolation_report:
    plan: "{{ plan }}"
    name: mine
    dest: reports/isolation
    observations:
      controller:
        listening: "{{ hostvars['localhost'].listening }}"
        probed: "{{ hostvars['localhost'].probed }}"
      slave1:
        listening: "{{ hostvars['slave1'].listening }}"
        probed: "{{ hostvars['slave1'].probed }}"
        collected: "{{ hostvars['slave1'].collected }}"
"""

RETURN = r"""
counts:
  description: Number of cells by verdict, C(as_declared), C(leak), C(broken), C(unproven).
  returned: always
  type: dict
differences:
  description: The first few of what is not as declared or not proven, one sentence each. All are on
    the terminal and in the files.
  returned: always
  type: list
  elements: str
files:
  description: What was written.
  returned: always
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def main() -> None:
    """The action of the same name does it all, on the controller."""
    module = AnsibleModule(
        argument_spec={
            "plan": {"type": "dict", "required": True},
            "name": {"type": "str", "required": True},
            "observations": {"type": "dict", "required": True},
            "dest": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="isolation_report is an action and cannot run as a module by itself.")


if __name__ == "__main__":
    main()
