"""Filters that derive things from the declared flows (group_vars/all/flows.yml)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import model, rules
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.job_network import (
    plan as jobs,
)


def _addresses(host: str, variables: Mapping[str, Any]) -> Any:
    """The host's declared addresses as they stand, which the model checks, or what the name that
    Ansible connects to resolves to.
    """
    if "cellblock_addresses" in variables:
        return variables["cellblock_addresses"]
    name = str(variables.get("ansible_host", host))
    try:
        return [str(ipaddress.ip_address(name))]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for what cannot be a name at all
        raise model.FleetError(
            f"{host}: its name {name!r} does not resolve on the controller; set"
            " cellblock_addresses to the addresses that it has on the fleet's networks"
        ) from None
    # Of each entry, the address of its socket address; no link-local ones, which have a scope.
    addresses = {str(socket_address[0]) for *_, socket_address in found}
    return sorted(address for address in addresses if "%" not in address)


def _job_ranges(
    job_range: str | Mapping[str, str] | None, slaves: Sequence[str]
) -> Mapping[str, str]:
    """The range of each slave: as it is written, or its share of the one network."""
    if not job_range:
        return {}
    if isinstance(job_range, Mapping):
        return job_range
    return jobs.slave_ranges(str(job_range), slaves, 1)


def _job_ipv6_prefixes(
    prefix: str | Mapping[str, str] | None, slaves: Sequence[str], ranges: Mapping[str, str]
) -> Mapping[str, str]:
    """The IPv6 prefix of each slave: as it is written, or the one of all that have a range."""
    if not prefix:
        return {}
    if isinstance(prefix, Mapping):
        return prefix
    if not isinstance(prefix, str):
        raise model.FleetError(
            f"cellblock_job_ipv6_prefix is {prefix!r}; write one prefix such as 2001:db8:1:2::/64, or"
            " {slave: prefix}"
        )
    if slaves and not ranges:
        raise model.FleetError(
            f"cellblock_job_ipv6_prefix is {prefix}, but no slave has a range of IPv4 addresses for"
            " jobs, which their IPv6 addresses are made from; set cellblock_job_range too"
        )
    return dict.fromkeys(ranges, prefix)


def fleet_model(
    flows: Sequence[Mapping[str, Any]],
    services: Mapping[str, Any],
    networks: Mapping[str, Any],
    job_flows: Mapping[str, Any],
    external: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    hostvars: Mapping[str, Any],
    job_range: str | Mapping[str, str] | None = None,
    job_ipv6_prefix: str | Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything declared as one plain dictionary, checked: what ``parse_fleet`` takes.

    ``job_range`` is shared out to the slaves, or says which of them has which range;
    ``job_ipv6_prefix`` is the one of all slaves, or says which of them has which. Hosts are those
    that are in some group; one without ``cellblock_addresses`` has those that its ``ansible_host``
    or name resolves to.
    Where something is wrong, the dictionary has but one key: ``problem``, the sentence that says
    what. So a playbook can say it first of all; filters that take the dictionary refuse it.
    """
    data: dict[str, Any] = {
        "groups": {
            name: list(hosts) for name, hosts in groups.items() if name not in ("all", "ungrouped")
        },
        "addresses": {},
        "services": services,
        "networks": networks,
        "flows": flows,
        "job_flows": job_flows,
        "external": external,
    }
    try:
        slaves = groups.get(model.SLAVES_GROUP, ())
        data["job_networks"] = _job_ranges(job_range, slaves)
        data["job_ipv6_prefixes"] = _job_ipv6_prefixes(
            job_ipv6_prefix, slaves, data["job_networks"]
        )
        members = {host for hosts in data["groups"].values() for host in hosts}
        data["addresses"] = {
            host: _addresses(host, hostvars[host]) for host in groups["all"] if host in members
        }
        model.parse_fleet(data)
    except model.FleetError as problem:
        return {"problem": str(problem)}
    return data


def _derived(data: Mapping[str, Any], derive: Callable[[model.Fleet], Any]) -> Any:
    try:
        return derive(model.parse_fleet(data))
    except model.FleetError as problem:
        raise AnsibleFilterError(str(problem)) from None


def host_rules(data: Mapping[str, Any], host: str) -> dict[str, Any]:
    """The firewall rules of ``host`` as data (``fleet.rules.host_rules``)."""
    derived: dict[str, Any] = _derived(data, lambda fleet: rules.host_rules(fleet, host))
    return derived


def clients(data: Mapping[str, Any], service: str) -> list[str]:
    """The addresses (CIDR) that may use ``service`` (``fleet.rules.clients``)."""
    derived: list[str] = _derived(data, lambda fleet: rules.clients(fleet, service))
    return derived


def job_ranges(data: Mapping[str, Any]) -> dict[str, str]:
    """The range of addresses (CIDR) that each slave gives its jobs; none without ranges."""
    ranges: dict[str, str] = _derived(
        data, lambda fleet: {slave: str(n) for slave, n in fleet.job_networks.items()}
    )
    return ranges


def job_sources(data: Mapping[str, Any]) -> list[str]:
    """The addresses (CIDR) of jobs and of the slaves that run them: whoever is one of them is given
    no more than a job (``job_network.plan.job_sources``).
    """
    derived: list[str] = _derived(data, jobs.job_sources)
    return derived


def job_network(data: Mapping[str, Any], slave: str, slots: int) -> dict[str, Any]:
    """What engine and guard of ``slave`` must know (``job_network.plan.job_network``)."""
    derived: dict[str, Any] = _derived(
        data,
        lambda fleet: {
            **jobs.job_network(fleet, slave, int(slots)),
            "addresses": str(fleet.job_networks[slave]),
            "mac_prefix": jobs.MAC_PREFIX,
        },
    )
    return derived


def job_segment_problem(network: Mapping[str, Any], interface: str, gateway: str) -> str:
    """Why ``network`` (of ``cellblock.fleet.job_network``) cannot be on the segment of ``interface``
    (address/length); empty when it can (``job_network.plan.segment_problem``).
    """
    slots = len(network["slots"])
    return jobs.segment_problem(network["addresses"], slots, interface, gateway)


def job_ipv6_segment_problem(network: Mapping[str, Any], interface: str, gateway: str) -> str:
    """As ``job_segment_problem``, of the slots' IPv6 addresses: ``interface`` is an IPv6 address of the
    parent, not link-local, with its length; either may be empty. Empty where slots have no IPv6
    (``job_network.plan.ipv6_segment_problem``).
    """
    if "ipv6_prefix" not in network:
        return ""
    try:
        return jobs.ipv6_segment_problem(
            network["ipv6_prefix"],
            network["addresses"],
            len(network["slots"]),
            interface or "",
            gateway or "",
        )
    except ValueError as problem:
        raise AnsibleFilterError(f"cellblock.fleet.job_ipv6_segment_problem: {problem}") from None


def ipv6_hex(address: str) -> str:
    """An IPv6 address as a number, as nft takes it where it compares bits of a packet."""
    try:
        return f"0x{int(ipaddress.IPv6Address(address)):032x}"
    except ValueError:
        raise AnsibleFilterError(
            f"cellblock.fleet.ipv6_hex: {address!r} is no IPv6 address"
        ) from None


def job_services(network: Mapping[str, Any]) -> list[list[Any]]:
    """[address, protocol, port] of all that some policy of ``network`` (``cellblock.fleet.job_network``)
    opens: what no guard may refuse. IPv4 first; IPv6 only where slots have it.
    """
    found = {
        (ipaddress.ip_address(address), entry["protocol"], port)
        for policy in network["policies"].values()
        for entry in policy["allow"]
        for address in entry["to"]
        for port in entry["ports"]
    }
    in_order = sorted(found, key=lambda entry: (entry[0].version, *entry))
    return [[str(address), protocol, port] for address, protocol, port in in_order]


def job_denied(network: Mapping[str, Any], interface: str | Sequence[str] = "") -> list[str]:
    """What no job reaches but for those services: ``denied`` of ``network``, the jobs' own ranges, and
    the segments of ``interface`` (one address/length, or several) where jobs are on it. IPv4 first, then
    IPv6, where a guard without IPv6 refuses it all anyway.
    """
    found = [ipaddress.ip_network(cidr) for cidr in (*network["denied"], network["addresses"])]
    if "ipv6_prefix" in network:
        found.append(
            model.job_ipv6_network(
                ipaddress.IPv6Network(network["ipv6_prefix"]),
                ipaddress.IPv4Network(network["addresses"]),
            )
        )
    interfaces = [interface] if isinstance(interface, str) else interface
    found += [ipaddress.ip_interface(own).network for own in interfaces if own]
    return rules.collapsed(found)


def job_probe_mac(data: Mapping[str, Any], slave: str) -> str:
    """The hardware address with which ``slave`` tries a clone: of the one address of its range that
    no slot has, its last.
    """
    derived: str = _derived(
        data,
        lambda fleet: jobs.mac_address(
            ipaddress.IPv4Address(fleet.job_networks[slave].broadcast_address)
        ),
    )
    return derived


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "fleet_model": fleet_model,
            "host_rules": host_rules,
            "clients": clients,
            "job_ranges": job_ranges,
            "job_sources": job_sources,
            "job_network": job_network,
            "job_segment_problem": job_segment_problem,
            "job_ipv6_segment_problem": job_ipv6_segment_problem,
            "ipv6_hex": ipv6_hex,
            "job_services": job_services,
            "job_denied": job_denied,
            "job_probe_mac": job_probe_mac,
        }
