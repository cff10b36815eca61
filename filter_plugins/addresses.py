"""Filters that compute network addresses for the inventory."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError


def _subnet(value: Any, filter_name: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(value)
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(
            f"{filter_name}: {value!r} is not an IPv4 subnet such as '10.213.0.0/24': {error}"
        ) from error


def nth_address(subnet: str, number: int) -> str:
    """The address at position `number` of `subnet` (CIDR), counted from the network address.

    Raises AnsibleFilterError where `subnet` is no IPv4 subnet without host bits, or where a
    host cannot have that address: positions 0 (network), 1 (bridge) and the last (broadcast).
    """
    network = _subnet(subnet, "cellblock_nth_address")
    if isinstance(number, bool) or not isinstance(number, int):
        raise AnsibleFilterError(f"cellblock_nth_address: {number!r} is not a whole number")
    if network.prefixlen > 29:
        raise AnsibleFilterError(
            f"cellblock_nth_address: {subnet} has no room for hosts; use a /29 or larger"
        )
    last = network.num_addresses - 2
    if not 2 <= number <= last:
        raise AnsibleFilterError(
            f"cellblock_nth_address: {subnet} has no host address number {number};"
            f" choose one from 2 to {last}"
        )
    return str(network[number])


def derived_subnet(name: str, within: str) -> str:
    """A /24 of the IPv4 network `within` (CIDR, /24 or larger), chosen by a digest of `name`.

    The same name always gives the same subnet; two names rarely give the same one.
    """
    network = _subnet(within, "cellblock_derived_subnet")
    if network.prefixlen > 24:
        raise AnsibleFilterError(
            f"cellblock_derived_subnet: {within} is smaller than the /24 to be taken from it"
        )
    digest = int.from_bytes(hashlib.sha256(str(name).encode()).digest())
    index = digest % 2 ** (24 - network.prefixlen)
    return str(ipaddress.IPv4Network((int(network.network_address) + index * 256, 24)))


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "cellblock_nth_address": nth_address,
            "cellblock_derived_subnet": derived_subnet,
        }
