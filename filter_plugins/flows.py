"""Filters that derive things from the declared flows (group_vars/all/flows.yml)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

from cellblock_fleet import model, rules


def _addresses(host: str, variables: Mapping[str, Any]) -> list[str]:
    """The host's declared addresses, or what the name that Ansible connects to resolves to."""
    if "cellblock_addresses" in variables:
        return list(variables["cellblock_addresses"])
    name = str(variables.get("ansible_host", host))
    try:
        return [str(ipaddress.ip_address(name))]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        raise model.FleetError(
            f"{host}: its name {name!r} does not resolve on the controller; set"
            " cellblock_addresses to the addresses that it has on the fleet's networks"
        ) from None
    return sorted({str(entry[4][0]) for entry in found if "%" not in str(entry[4][0])})


def fleet_model(
    flows: Sequence[Mapping[str, Any]],
    services: Mapping[str, Any],
    networks: Mapping[str, Any],
    job_flows: Mapping[str, Any],
    external: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    hostvars: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything declared as one plain dictionary, checked: what ``parse_fleet`` takes.

    Hosts are those that are in some group. One without ``cellblock_addresses`` has those that its ``ansible_host`` or name resolves to.
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
    """The firewall rules of ``host`` as data (``cellblock_fleet.rules.host_rules``)."""
    derived: dict[str, Any] = _derived(data, lambda fleet: rules.host_rules(fleet, host))
    return derived


def clients(data: Mapping[str, Any], service: str) -> list[str]:
    """The addresses (CIDR) that may use ``service`` (``cellblock_fleet.rules.clients``)."""
    derived: list[str] = _derived(data, lambda fleet: rules.clients(fleet, service))
    return derived


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "cellblock_fleet_model": fleet_model,
            "cellblock_host_rules": host_rules,
            "cellblock_clients": clients,
        }
