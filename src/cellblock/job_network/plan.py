"""The jobs' own network on a slave: addresses, and what policies may reach, from the declared flows."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_network,
)
from typing import Any

from ..fleet.model import INTERNET, Fleet, FleetError, Flow, job_ipv6_address, job_ipv6_network
from ..fleet.rules import not_internet, ports_by_protocol

# The first three bytes of a slot's hardware address: locally administered, unicast (IEEE 802).
MAC_PREFIX = "02:cb:00"
# By this name jobs call the cache servers (which know it: cache_server_names of the role).
CACHE_NAME = "cache"


def slave_ranges(whole: str, slaves: Sequence[str], slots: int) -> dict[str, str]:
    """Shares the IPv4 network ``whole`` (CIDR) out to the slaves: {slave: CIDR}, all of one size.

    The slaves take their ranges in the order of their names, so that each host computes the same.
    Raises FleetError where a range would have fewer than ``slots`` addresses. The last address of a
    range is not used: at the end of a segment it is the broadcast address.
    """
    try:
        network = ip_network(whole)
    except ValueError as error:
        raise FleetError(
            f"cellblock_job_range is {whole!r}, which is no network ({error}); write a CIDR such as"
            " 192.0.2.128/25"
        ) from None
    if not isinstance(network, IPv4Network):
        raise FleetError(
            f"cellblock_job_range is {whole}: write an IPv4 network, and what is IPv6 as"
            " cellblock_job_ipv6_prefix"
        )
    if not slaves:
        return {}
    bits = (len(slaves) - 1).bit_length()
    size = network.num_addresses >> bits
    if size - 1 < slots:
        raise FleetError(
            f"cellblock_job_range {whole} has too few addresses: {len(slaves)} slaves get {size} each,"
            f" of which {max(size - 1, 0)} are for jobs, and {slots} slots are configured; give a"
            " larger range or fewer slots"
        )
    ranges = network.subnets(prefixlen_diff=bits)
    return {slave: str(part) for slave, part in zip(sorted(slaves), ranges, strict=False)}


def job_sources(fleet: Fleet) -> list[str]:
    """The addresses (CIDR) that what jobs send may come from: theirs, and every slave's own.

    In mode routed of the role macvlan a job's traffic has its slave's address; and a slave that a job
    broke out to is to be told no more than the job.
    """
    slaves = [fleet.hosts[name] for name in fleet.groups.get(fleet.slaves_group, ())]
    return [
        *(str(network) for network in fleet.networks_of_jobs()),
        *(str(ip_network(address)) for slave in slaves for address in slave.addresses),
    ]


def job_network(fleet: Fleet, slave: str, slots: int) -> dict[str, Any]:
    """What a slave's engine and guards must know about the jobs' network.

    ``slots`` [{address, mac}]; ``denied`` [CIDR], what no job reaches but for the services that a
    policy names, IPv4 and IPv6; ``policies`` {name: {allow: [{to, protocol, ports}], internet:
    [{protocol, ports}]}}; ``resolvers`` [address], IPv4 alone; ``names`` {name: [address]}, what jobs
    need no resolver for. Where the slave's jobs have IPv6 there is ``ipv6_prefix`` too, each slot has
    ``ipv6``, its address, and policies and names have the services' IPv6 addresses besides.
    """
    if slave not in fleet.job_networks:
        raise FleetError(f"{slave}: has no range of addresses for jobs; set cellblock_job_range")
    network = fleet.job_networks[slave]
    if network.num_addresses - 1 < slots:
        raise FleetError(
            f"{slave}: its range for jobs {network} has {network.num_addresses - 1} addresses for"
            f" {slots} slots; give a larger cellblock_job_range or fewer slots"
            " (macvlan_slots)"
        )
    first = int(network.network_address)
    addresses = [IPv4Address(first + number) for number in range(slots)]
    prefix = fleet.job_ipv6_prefixes.get(slave)
    versions = (4,) if prefix is None else (4, 6)
    return {
        "slots": [
            {
                "address": str(a),
                "mac": mac_address(a),
                **({"ipv6": str(job_ipv6_address(prefix, a))} if prefix else {}),
            }
            for a in addresses
        ],
        **({"ipv6_prefix": str(prefix)} if prefix else {}),
        "denied": not_internet(fleet),
        "policies": {
            name: {
                "allow": [entry for flow in flows for entry in _allowed(fleet, flow, versions)],
                "internet": [
                    {"protocol": protocol, "ports": ports}
                    for flow in flows
                    if flow.destination == INTERNET
                    for protocol, ports in ports_by_protocol(fleet, flow.services)
                ],
            }
            for name, flows in fleet.job_flows.items()
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


def segment_problem(network: str, slots: int, interface: str, gateway: str) -> str:
    """Why slots with the first addresses of ``network`` cannot be on a segment; "" when they can.

    ``interface`` is the slave's own address there with the prefix length, ``gateway`` the way out.
    """
    ours, segment = IPv4Network(network), IPv4Interface(interface).network
    if not ours.subnet_of(segment):
        return (
            f"its range for jobs {ours} is not within the segment {segment} of its parent interface;"
            " choose a cellblock_job_range there, or set macvlan_mode to routed"
        )
    if IPv4Address(gateway) not in segment:
        return (
            f"its gateway {gateway} is not on the segment {segment} of the parent interface; set"
            " macvlan_gateway to the one that jobs are to use"
        )
    first = ours.network_address
    for address, what in (
        (segment.network_address, "the segment's own address"),
        (segment.broadcast_address, "the segment's broadcast address"),
        (IPv4Address(gateway), "the gateway's address"),
        (IPv4Interface(interface).ip, "the slave's own address"),
    ):
        if 0 <= int(address) - int(first) < slots:
            return (
                f"its range for jobs {ours} has {address}, {what}, among the slots' addresses;"
                " choose a cellblock_job_range without it"
            )
    return ""


def ipv6_segment_problem(
    prefix: str, network: str, slots: int, interface: str, gateway: str
) -> str:
    """As ``segment_problem``, of the slots' IPv6 addresses: those with ``prefix`` (CIDR) and the first
    addresses of ``network`` (IPv4). ``interface`` and ``gateway`` are empty where there is none.
    """
    if not interface:
        return (
            "jobs are to have IPv6 (cellblock_job_ipv6_prefix), but its parent interface has no IPv6"
            " address besides link-local ones; give it one, or set macvlan_mode to routed"
        )
    if not gateway:
        return (
            "jobs are to have IPv6 (cellblock_job_ipv6_prefix), but there is no IPv6 gateway on its"
            " parent interface; set macvlan_gateway_ipv6, or give it an IPv6 default route"
        )
    ours = job_ipv6_network(IPv6Network(prefix), IPv4Network(network))
    own, way = IPv6Interface(interface), IPv6Address(gateway)
    if not ours.subnet_of(own.network):
        return (
            f"its IPv6 range for jobs {ours} is not within the segment {own.network} of its parent"
            " interface; choose a cellblock_job_ipv6_prefix there, or set macvlan_mode to routed"
        )
    if not way.is_link_local and way not in own.network:
        return (
            f"its IPv6 gateway {gateway} is neither link-local nor on the segment {own.network} of the"
            " parent interface; correct macvlan_gateway_ipv6 or the IPv6 default route"
        )
    for address, what in (
        (own.network.network_address, "the address of every router on the segment"),
        (way, "the gateway's address"),
        (own.ip, "the slave's own address"),
    ):
        if 0 <= int(address) - int(ours.network_address) < slots:
            return (
                f"its IPv6 range for jobs {ours} has {address}, {what}, among the slots' addresses;"
                " choose a cellblock_job_ipv6_prefix without it"
            )
    return ""


def mac_address(address: IPv4Address) -> str:
    """The hardware address of the slot with this address: unique wherever the address is."""
    return ":".join([MAC_PREFIX, *(f"{byte:02x}" for byte in address.packed[1:])])


def _allowed(fleet: Fleet, flow: Flow, versions: Sequence[int]) -> list[dict[str, Any]]:
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
