"""A host's firewall rules, derived from the declared flows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from ..job_network import plan
from ..job_network.plan import SPECIAL_NETWORKS, Address, Network
from .model import CONTROLLERS, INTERNET, WORKER_CONTAINERS, Fleet, Flow

# Names of sets and peers in a host's rules that no group or network may have.
ANY = "any"
NOT_THE_INTERNET = "not_internet"
JOBS = "jobs"
# The service of cache servers from which the hosts take their packages.
PACKAGE_CACHE = "package_cache"
DNS_PORT = 53
# The host's ends of the slots' veth pairs, as nft writes all of them.
JOB_INTERFACES = f"{plan.HOST_END}*"
# The bridges of an engine for containers, likewise.
CONTAINER_BRIDGES = ("docker0", "br-*")


def host_rules(fleet: Fleet, name: str) -> dict[str, Any]:
    """What the firewall of host ``name`` lets in and out: role firewall's ``firewall_rules``.

    ``own_name``; ``sets`` {peer: [CIDR]}, the addresses behind each peer's name; ``inbound`` and
    ``outbound`` [{name, peer, protocol, ports, except}], where ``name`` says which flow it is, the
    peer ``any`` is every address but those of the sets in ``except``, and ports are in ascending
    order, none for icmp; ``controllers`` [address] and ``controller_ports``, the TCP ports that they may
    open, in ascending order; of a slave with a range for jobs ``forward`` {interfaces, networks}, whose traffic the host may pass on (role job_network, mode routed), IPv4 and,
    where jobs have it, IPv6; of one with a worker container ``containers`` {interfaces [name], outbound [as above]}.
    """
    host = fleet.hosts[name]
    inbound: list[dict[str, Any]] = []
    outbound: list[dict[str, Any]] = []
    for flow in fleet.flows:
        # What containers send has their slave's address.
        if host in fleet.members(flow.destination) and flow.source != WORKER_CONTAINERS:
            served = [s for s in flow.services if host in fleet.serving(s)]
            inbound += _rules(fleet, flow, flow.source, served)
        if host in fleet.members(flow.source):
            outbound += _rules(fleet, flow, flow.destination, flow.services)
    for policy, flows in fleet.job_flows.items():
        for flow in flows if fleet.job_networks else ():
            if host in fleet.members(flow.destination):
                served = [s for s in flow.services if host in fleet.serving(s)]
                rules = _rules(fleet, flow, JOBS, served)
                inbound += [{**rule, "name": f"jobs, policy {policy}"} for rule in rules]
    of_containers = [
        rule
        for flow in fleet.flows
        if flow.source == WORKER_CONTAINERS and name in fleet.worker_containers
        for rule in _rules(fleet, flow, flow.destination, flow.services)
    ]
    peers = {rule["peer"] for rule in inbound + outbound + of_containers} - {ANY}
    sets = {peer: _addresses(fleet, peer, host.addresses) for peer in sorted(peers)}
    if any(rule["peer"] == ANY for rule in outbound + of_containers):
        sets[NOT_THE_INTERNET] = not_internet(fleet)
    passed_on = [n[name] for n in (fleet.job_networks, fleet.job_ipv6_networks) if name in n]
    forward = (
        {"interfaces": JOB_INTERFACES, "networks": [str(network) for network in passed_on]}
        if passed_on
        else {}
    )
    controllers = list(fleet.networks.get(CONTROLLERS, ()))
    theirs = {
        peer
        for peer, addresses in sets.items()
        if any(ip_network(a).overlaps(c) for a in addresses for c in controllers)
    }
    return {
        **({"forward": forward} if forward else {}),
        **(
            {"containers": {"interfaces": [*CONTAINER_BRIDGES], "outbound": of_containers}}
            if name in fleet.worker_containers
            else {}
        ),
        "own_name": name,
        "sets": sets,
        "inbound": inbound,
        "outbound": outbound,
        "controllers": [str(network) for network in controllers],
        "controller_ports": sorted(
            {
                port
                for rule in inbound
                if rule["protocol"] == "tcp" and rule["peer"] in {ANY, *theirs}
                for port in rule["ports"]
            }
        ),
    }


def affected_by(fleet: Fleet, name: str) -> list[str]:
    """The hosts whose own rules are others because host ``name``, or its jobs, are in the fleet: until they are
    provisioned with it they do not know it.
    """
    without = replace(
        fleet,
        hosts={host: entry for host, entry in fleet.hosts.items() if host != name},
        groups={g: tuple(h for h in hosts if h != name) for g, hosts in fleet.groups.items()},
        job_networks={s: n for s, n in fleet.job_networks.items() if s != name},
        job_ipv6_prefixes={s: p for s, p in fleet.job_ipv6_prefixes.items() if s != name},
    )
    return [
        host.name
        for host in without.fleet_hosts()
        if host_rules(fleet, host.name) != host_rules(without, host.name)
    ]


def without_packages(fleet: Fleet) -> list[str]:
    """The hosts that no flow lets fetch packages: neither from a cache server, nor from the internet or a named
    network over TCP. Once their rules are loaded, apt waits there until it gives up.
    """
    ways = [flow for flow in fleet.flows if _leads_to_packages(fleet, flow)]
    return [
        host.name
        for host in fleet.fleet_hosts()
        if not any(host in fleet.members(flow.source) for flow in ways)
    ]


def _leads_to_packages(fleet: Fleet, flow: Flow) -> bool:
    if flow.destination == INTERNET or fleet.networks.get(flow.destination):
        named = (fleet.services[service] for service in flow.services)
        return any(service.protocol == "tcp" and service.port != DNS_PORT for service in named)
    if PACKAGE_CACHE not in flow.services:
        return False
    return not set(fleet.serving(PACKAGE_CACHE)).isdisjoint(fleet.members(flow.destination))


def clients(fleet: Fleet, service: str) -> list[str]:
    """The addresses (CIDR) from which the flows let ``service`` be used: for the service's own list."""
    peers = {flow.source for flow in fleet.flows if service in flow.services}
    return collapsed(ip_network(a) for peer in peers for a in _addresses(fleet, peer, ()))


def _rules(fleet: Fleet, flow: Flow, peer: str, services: Iterable[str]) -> list[dict[str, Any]]:
    """One rule for each protocol of a flow."""
    everywhere = {"peer": ANY, "except": [NOT_THE_INTERNET]}
    return [
        {
            "name": f"{flow.source} -> {flow.destination}",
            "protocol": protocol,
            "ports": ports,
            **(everywhere if peer == INTERNET else {"peer": peer}),
        }
        for protocol, ports in ports_by_protocol(fleet, services)
    ]


def ports_by_protocol(fleet: Fleet, services: Iterable[str]) -> list[tuple[str, list[int]]]:
    """The services' ports by protocol."""
    ports: dict[str, set[int]] = {}
    for service in services:
        declared = fleet.services[service]
        ports.setdefault(declared.protocol, set())
        if declared.port is not None:
            ports[declared.protocol].add(declared.port)
    return [(protocol, sorted(numbers)) for protocol, numbers in sorted(ports.items())]


def _addresses(fleet: Fleet, peer: str, own: Iterable[Address]) -> list[str]:
    if peer == JOBS:
        return collapsed(fleet.networks_of_jobs())
    if peer in fleet.networks:
        return collapsed(fleet.networks[peer])
    members = {address for host in fleet.members(peer) for address in host.addresses}
    return collapsed(ip_network(address) for address in members - set(own))


def not_internet(fleet: Fleet) -> list[str]:
    """Every address that is not the internet: special ranges, and what is declared as ours."""
    ours = [ip_network(a) for host in fleet.fleet_hosts() for a in host.addresses]
    declared = [network for networks in fleet.networks.values() for network in networks]
    return collapsed([*SPECIAL_NETWORKS, *ours, *declared, *fleet.networks_of_jobs()])


def collapsed(networks: Iterable[Network]) -> list[str]:
    """The same addresses as few networks (CIDR), IPv4 first, each family in ascending order."""
    return [str(network) for network in plan.collapsed(networks)]
