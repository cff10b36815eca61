"""Filter for values that an inventory computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.template import trust_as_template


def trusted(value: str) -> str:
    """`value`, as trustworthy as if it were written in a file of the inventory.

    Ansible distrusts what it computes while it reads an inventory. `ansible-inventory --list`
    then wraps each such value in a dictionary, which tools that read its output (testinfra)
    do not expect. Only for values that no other machine has a say in.
    """
    trusted_value: str = trust_as_template(value)
    return trusted_value


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"trusted": trusted}
