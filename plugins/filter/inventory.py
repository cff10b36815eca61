"""Filters for what an inventory says and computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible.template import trust_as_template
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import (
    model,
    variables,
)
from ansible_collections.cellblock.fleet.plugins.plugin_utils.role_variables import role_variables


def trusted(value: str) -> str:
    """`value`, as trustworthy as if it were written in a file of the inventory.

    Ansible distrusts what it computes while it reads an inventory. `ansible-inventory --list`
    then wraps each such value in a dictionary, which tools that read its output (testinfra)
    do not expect. Only for values that no other machine has a say in.
    """
    trusted_value: str = trust_as_template(value)
    return trusted_value


def slave_problem(groups: Mapping[str, Sequence[str]], host: str) -> str:
    """Why `host` may not run untrusted jobs, with the inventory's `groups`; empty when it may, or is
    no slave (``fleet.model.slave_problem``).
    """
    return model.slave_problem(host, groups) or ""


def variable_problems(hosts: Iterable[str], hostvars: Mapping[str, Any]) -> list[str]:
    """A sentence for each variable of `hosts` that nothing reads (``fleet.variables.variable_problems``)."""
    return variables.variable_problems(
        {host: list(hostvars[host]) for host in hosts}, *role_variables()
    )


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "slave_problem": slave_problem,
            "trusted": trusted,
            "variable_problems": variable_problems,
        }
