"""A host's firewall rules, derived from the declared flows."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import collapse_addresses, ip_network
from typing import Any

from cellblock_fleet.model import CONTROLLERS, INTERNET, NOT_INTERNET, Address, Fleet, Network


def host_rules(fleet: Fleet, name: str) -> dict[str, Any]:
    """What the firewall of host ``name`` lets in and out, as plain data for a template.

    ``sets``: {peer: {"v4": [CIDR], "v6": [CIDR]}}, the addresses behind each peer's name (for
    ``internet`` those that are *not* it). ``inbound`` and ``outbound``: [{peer, protocol, ports,
    comment}], ports in ascending order, empty for icmp. ``controllers``: [CIDR].
    """
    host = fleet.hosts[name]
    inbound, outbound = [], []
    peers = set()
    for flow in fleet.flows:
        comment = f"{flow.source} -> {flow.destination}"
        for protocol, ports in _ports(fleet, flow.services):
            rule = {"protocol": protocol, "ports": ports, "comment": comment}
            if host in fleet.members(flow.destination):
                served = [
                    fleet.services[service].port
                    for service in flow.services
                    if host in fleet.serving(service)
                    and fleet.services[service].protocol == protocol
                ]
                if served:
                    peers.add(flow.source)
                    ours = sorted(port for port in served if port is not None)
                    inbound.append({**rule, "ports": ours, "peer": flow.source})
            if host in fleet.members(flow.source):
                peers.add(flow.destination)
                outbound.append({**rule, "peer": flow.destination})
    return {
        "sets": {peer: _addresses(fleet, peer, host.addresses) for peer in sorted(peers)},
        "inbound": inbound,
        "outbound": outbound,
        "controllers": [str(network) for network in fleet.networks.get(CONTROLLERS, ())],
    }


def _ports(fleet: Fleet, services: Iterable[str]) -> list[tuple[str, list[int]]]:
    """The services' ports by protocol."""
    ports: dict[str, set[int]] = {}
    for service in services:
        declared = fleet.services[service]
        ports.setdefault(declared.protocol, set())
        if declared.port is not None:
            ports[declared.protocol].add(declared.port)
    return [(protocol, sorted(numbers)) for protocol, numbers in sorted(ports.items())]


def _addresses(fleet: Fleet, peer: str, own: Iterable[Address]) -> dict[str, list[str]]:
    networks: list[Network]
    if peer == INTERNET:
        networks = [*NOT_INTERNET]
        networks += [ip_network(a) for host in fleet.fleet_hosts() for a in host.addresses]
        networks += [network for declared in fleet.networks.values() for network in declared]
    elif peer in fleet.networks:
        networks = list(fleet.networks[peer])
    else:
        networks = [ip_network(a) for host in fleet.members(peer) for a in host.addresses]
        networks = [n for n in networks if n.network_address not in set(own)]
    return {
        "v4": [str(n) for n in collapse_addresses(n for n in networks if n.version == 4)],
        "v6": [str(n) for n in collapse_addresses(n for n in networks if n.version == 6)],
    }
