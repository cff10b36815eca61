"""What the declared flows mean for the jobs of a slave: whom they may reach, and who they are to others."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

from .model import INTERNET, Fleet, FleetError, Flow
from .rules import not_internet, ports_by_protocol

# By this name jobs call the cache servers (which know it: cache_server_names of the role).
CACHE_NAME = "cache"


def job_sources(fleet: Fleet) -> list[str]:
    """The addresses (CIDR) that what jobs send may come from: theirs, and every slave's own.

    In mode routed of the role job_network a job's traffic has its slave's address; and a slave that a
    job broke out to is to be told no more than the job.
    """
    slaves = [fleet.hosts[name] for name in fleet.groups.get(fleet.slaves_group, ())]
    return [
        *(str(network) for network in fleet.networks_of_jobs()),
        *(str(ip_network(address)) for slave in slaves for address in slave.addresses),
    ]


def job_network(fleet: Fleet, slave: str) -> dict[str, Any]:
    """What is declared about the jobs' network of a slave, as ``section.compose_section`` takes it.

    ``addresses`` (CIDR), the slave's range; ``denied`` [CIDR], what no job reaches but for the services
    that a policy names, IPv4 and IPv6; ``policies`` {name: {services: [{to, protocol, ports}], internet:
    [{protocol, ports}]}}; ``resolvers`` [address], IPv4 alone; ``names`` {name: [address]}, what jobs need
    no resolver for. Where the slave's jobs have IPv6 there is ``ipv6_prefix`` too, and policies and names
    have the services' IPv6 addresses besides.
    """
    if slave not in fleet.job_networks:
        raise FleetError(f"{slave}: has no range of addresses for jobs; set cellblock_job_range")
    prefix = fleet.job_ipv6_prefixes.get(slave)
    versions = (4,) if prefix is None else (4, 6)
    return {
        "addresses": str(fleet.job_networks[slave]),
        **({"ipv6_prefix": str(prefix)} if prefix else {}),
        "denied": not_internet(fleet),
        "policies": {
            name: {
                "services": [entry for flow in flows for entry in _services(fleet, flow, versions)],
                "internet": [
                    {"protocol": protocol, "ports": ports}
                    for flow in flows
                    if flow.destination == INTERNET
                    for protocol, ports in ports_by_protocol(fleet, flow.services)
                ],
            }
            for name, flows in fleet.job_flows.items()
            # The host refuses a job with a policy that it has no rules for.
            if not fleet.opens_nothing(name)
        },
        "resolvers": fleet.job_resolvers(),
        "names": {CACHE_NAME: caches} if (caches := _caches(fleet, versions)) else {},
    }


def _caches(fleet: Fleet, versions: Sequence[int]) -> list[str]:
    """What policies let jobs to in the fleet, besides resolvers."""
    found = (
        address
        for flows in fleet.job_flows.values()
        for flow in flows
        for service in flow.services
        if fleet.services[service].port != 53
        for address in _addresses(fleet, flow, service, versions)
    )
    return list(dict.fromkeys(found))


def _services(fleet: Fleet, flow: Flow, versions: Sequence[int]) -> list[dict[str, Any]]:
    if flow.destination == INTERNET:
        return []
    return [
        {"to": addresses, "protocol": service.protocol, "ports": [service.port]}
        for name in flow.services
        for service in [fleet.services[name]]
        if (addresses := _addresses(fleet, flow, name, versions))
    ]


def _addresses(fleet: Fleet, flow: Flow, service: str, versions: Sequence[int]) -> list[str]:
    if flow.destination == INTERNET:
        return []
    return [
        str(address)
        for host in fleet.members(flow.destination)
        if host in fleet.serving(service)
        for address in host.addresses
        if address.version in versions
    ]
