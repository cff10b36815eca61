"""Filters that derive things from the declared flows (group_vars/all/flows.yml)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import (
    jobs,
    model,
    rules,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.job_network import plan


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
    job_range: str | Mapping[str, str] | None,
    prefix_length: Any,
    slaves: Sequence[str],
    hostvars: Mapping[str, Any],
) -> Mapping[str, str]:
    """The range of each slave: as it is written, or its part of the one network."""
    if not job_range:
        return {}
    if isinstance(job_range, Mapping):
        return job_range
    if prefix_length is None:
        prefix_length = plan.RANGE_PREFIX_LENGTH
    if not _is_number(prefix_length, 8, 30):
        raise model.FleetError(
            f"cellblock_job_range_prefix_length is {prefix_length!r}; write a number from 8 to 30"
        )
    numbers = {
        slave: plan.range_number(slave, hostvars[slave].get("cellblock_job_range_number"))
        for slave in slaves
    }
    return plan.deal_ranges(str(job_range), numbers, int(prefix_length))


def _is_number(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


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
    job_range_prefix_length: int | None = None,
) -> dict[str, Any]:
    """Everything declared as one plain dictionary, checked: what ``parse_fleet`` takes.

    ``job_range`` is one network, of which each slave has the part with its number
    (``cellblock_job_range_number``, or the number at the end of its name), of ``job_range_prefix_length``
    (27); or it says which of them has which range. ``job_ipv6_prefix`` is the one of all slaves, or says
    which of them has which. A host in no group is refused; one without ``cellblock_addresses`` has those
    that its ``ansible_host`` or name resolves to.
    Where something is wrong, the dictionary has but one key: ``problem``, the sentence that says
    what. So a playbook can say it first of all; filters that take the dictionary refuse it.
    """
    data: dict[str, Any] = {
        "groups": {
            **{name: [] for name in model.GROUPS},
            **{n: list(hosts) for n, hosts in groups.items() if n not in ("all", "ungrouped")},
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
        data["job_networks"] = _job_ranges(job_range, job_range_prefix_length, slaves, hostvars)
        data["job_ipv6_prefixes"] = _job_ipv6_prefixes(
            job_ipv6_prefix, slaves, data["job_networks"]
        )
        data["worker_containers"] = [
            slave
            for slave in slaves
            if boolean(hostvars[slave].get("worker_container_enabled", False))
        ]
        members = {host for hosts in data["groups"].values() for host in hosts}
        for host in groups["all"]:
            if host not in members:
                raise model.FleetError(
                    f"{host}: in no group of the inventory; put it into those that say what it does, or"
                    f" into {model.OUTSIDE_GROUP} to have it left alone"
                    + (
                        " (Ansible knows localhost without an inventory: take it out)"
                        if host == "localhost"
                        else ""
                    )
                )
        data["addresses"] = {host: _addresses(host, hostvars[host]) for host in groups["all"]}
        model.parse_fleet(data)
    except (model.FleetError, plan.PlanError) as problem:
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


def affected_by(data: Mapping[str, Any], host: str) -> list[str]:
    """The hosts that must be provisioned with ``host`` to know it (``fleet.rules.affected_by``)."""
    derived: list[str] = _derived(data, lambda fleet: rules.affected_by(fleet, host))
    return derived


def without_packages(data: Mapping[str, Any]) -> list[str]:
    """The hosts that could get no packages (``fleet.rules.without_packages``)."""
    derived: list[str] = _derived(data, rules.without_packages)
    return derived


def clients(data: Mapping[str, Any], service: str) -> list[str]:
    """The addresses (CIDR) that may use ``service`` (``fleet.rules.clients``)."""
    derived: list[str] = _derived(data, lambda fleet: rules.clients(fleet, service))
    return derived


def job_sources(data: Mapping[str, Any]) -> list[str]:
    """The addresses (CIDR) of jobs and of the slaves that run them: whoever is one of them is given
    no more than a job (``fleet.jobs.job_sources``).
    """
    derived: list[str] = _derived(data, jobs.job_sources)
    return derived


def job_network(data: Mapping[str, Any] | None, slave: str) -> dict[str, Any] | None:
    """What is declared about the network of a slave's jobs (``fleet.jobs.job_network``); None where it has no
    range of addresses for them, or nothing is declared at all.
    """
    if not data:
        return None
    derived: dict[str, Any] | None = _derived(
        data,
        lambda fleet: jobs.job_network(fleet, slave) if slave in fleet.job_networks else None,
    )
    return derived


def fleet_networks(data: Mapping[str, Any] | None) -> list[str]:
    """The addresses and networks (CIDR) of hosts, of jobs and of what ``cellblock_networks`` declares; nothing
    where nothing is declared.
    """
    if not data:
        return []

    def derive(fleet: model.Fleet) -> list[str]:
        addresses = [address for host in fleet.hosts.values() for address in host.addresses]
        declared = [network for networks in fleet.networks.values() for network in networks]
        return rules.collapsed(
            [*map(ipaddress.ip_network, addresses), *declared, *fleet.job_networks.values()]
        )

    derived: list[str] = _derived(data, derive)
    return derived


def not_internet(networks: Sequence[str]) -> list[str]:
    """These networks (CIDR, or addresses) and all that is never "the internet", as few as possible."""
    try:
        ours = [ipaddress.ip_network(network) for network in networks]
    except ValueError as problem:
        raise AnsibleFilterError(f"cellblock.fleet.not_internet: {problem}") from None
    return rules.collapsed([*plan.SPECIAL_NETWORKS, *ours])


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "fleet_model": fleet_model,
            "host_rules": host_rules,
            "affected_by": affected_by,
            "clients": clients,
            "without_packages": without_packages,
            "job_sources": job_sources,
            "job_network": job_network,
            "fleet_networks": fleet_networks,
            "not_internet": not_internet,
        }
