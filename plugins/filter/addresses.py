"""Filters that compute network addresses for the inventory."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def _subnet(value: Any, filter_name: str) -> Subnet:
    try:
        return ipaddress.ip_network(value)
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(
            f"{filter_name}: {value!r} is not a subnet such as '10.213.0.0/24': {error}"
        ) from error


def nth_address(subnet: str, number: int) -> str:
    """The address at position `number` of `subnet` (CIDR), counted from the network address.

    Raises AnsibleFilterError where `subnet` is no subnet without host bits, or where a host cannot
    have that address: positions 0 (network), 1 (bridge) and the last (broadcast).
    """
    network = _subnet(subnet, "cellblock.fleet.nth_address")
    if isinstance(number, bool) or not isinstance(number, int):
        raise AnsibleFilterError(f"cellblock.fleet.nth_address: {number!r} is not a whole number")
    last = network.num_addresses - 2
    if last < 6:
        raise AnsibleFilterError(
            f"cellblock.fleet.nth_address: {subnet} has no room for hosts; use a larger one"
        )
    if not 2 <= number <= last:
        raise AnsibleFilterError(
            f"cellblock.fleet.nth_address: {subnet} has no host address number {number};"
            f" choose one from 2 to {last}"
        )
    return str(network[number])


def bridge_address(subnet: str) -> str:
    """The first address of `subnet` (CIDR): this machine's own, on the bridge."""
    return str(_subnet(subnet, "cellblock.fleet.bridge_address")[1])


def upper_half(subnet: str) -> str:
    """The second of the two halves of `subnet` (CIDR)."""
    network = _subnet(subnet, "cellblock.fleet.upper_half")
    if network.prefixlen == network.max_prefixlen:
        raise AnsibleFilterError(
            f"cellblock.fleet.upper_half: {subnet} is one address and has no halves"
        )
    return str(list(network.subnets(prefixlen_diff=1))[1])


def without_hosts(addresses: Sequence[str], networks: Sequence[str]) -> list[str]:
    """Those of `addresses` that `networks` (CIDR) do not have as a network of that one address."""
    named = {_subnet(network, "cellblock.fleet.without_hosts") for network in networks}
    return [a for a in addresses if _subnet(a, "cellblock.fleet.without_hosts") not in named]


def derived_subnet(name: str, within: str) -> str:
    """A /24 (IPv6: /64) of the network `within` (CIDR), chosen by a digest of `name`.

    The same name always gives the same subnet; two names rarely give the same one.
    """
    network = _subnet(within, "cellblock.fleet.derived_subnet")
    prefix = 24 if network.version == 4 else 64
    if network.prefixlen > prefix:
        raise AnsibleFilterError(
            f"cellblock.fleet.derived_subnet: {within} is smaller than the /{prefix} to be taken from it"
        )
    digest = int.from_bytes(hashlib.sha256(str(name).encode()).digest())
    index = digest % 2 ** (prefix - network.prefixlen)
    size = 2 ** (network.max_prefixlen - prefix)
    return str(ipaddress.ip_network((int(network.network_address) + index * size, prefix)))


def container_networks(
    names: Sequence[str], segments: Mapping[str, Mapping[str, str]], number: int, prefix: str
) -> list[dict[str, str]]:
    """What docker_container takes as ``networks``: those of `segments` ({name: {ipv4, ipv6}}, CIDR)
    that `names` lists, with the addresses at position `number`; `prefix` begins Docker's names.
    """
    if unknown := sorted(set(names) - set(segments)):
        raise AnsibleFilterError(
            f"local_fleet_host_segments names {unknown[0]!r}, which is none of the fleet's networks"
            f" {', '.join(segments)}"
        )
    return [
        {
            "name": prefix + name,
            "ipv4_address": nth_address(segments[name]["ipv4"], number),
            "ipv6_address": nth_address(segments[name]["ipv6"], number),
        }
        for name in names
    ]


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "nth_address": nth_address,
            "bridge_address": bridge_address,
            "derived_subnet": derived_subnet,
            "upper_half": upper_half,
            "without_hosts": without_hosts,
            "container_networks": container_networks,
        }
