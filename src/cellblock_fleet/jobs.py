"""The jobs' own network on a slave: addresses, and what policies may reach, from the declared flows."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, ip_network
from typing import Any

from cellblock_fleet.model import INTERNET, Fleet, FleetError, Flow
from cellblock_fleet.rules import not_internet, ports_by_protocol

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
            f"cellblock_job_range is {whole}: write an IPv4 network; jobs have no IPv6"
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
        *(str(network) for network in fleet.job_networks.values()),
        *(str(ip_network(address)) for slave in slaves for address in slave.addresses),
    ]


def job_network(fleet: Fleet, slave: str, slots: int) -> dict[str, Any]:
    """What a slave's engine and guards must know about the jobs' network.

    ``slots`` [{address, mac}]; ``denied`` [CIDR], what no job reaches but for the services that a
    policy names; ``policies`` {name: {allow: [{to, protocol, ports}], internet: [{protocol,
    ports}]}}; ``resolvers`` [address]; ``names`` {name: [address]}, what jobs need no resolver for. IPv4 alone:
    jobs have no IPv6.
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
    return {
        "slots": [{"address": str(a), "mac": mac_address(a)} for a in addresses],
        "denied": [cidr for cidr in not_internet(fleet) if ":" not in cidr],
        "policies": {
            name: {
                "allow": [entry for flow in flows for entry in _allowed(fleet, flow)],
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
        "names": {CACHE_NAME: caches} if (caches := _caches(fleet)) else {},
    }


def _caches(fleet: Fleet) -> list[str]:
    """What policies let jobs to in the fleet, besides resolvers."""
    found = (
        address
        for flows in fleet.job_flows.values()
        for flow in flows
        for service in flow.services
        if fleet.services[service].port != 53
        for address in _addresses(fleet, flow, service)
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


def mac_address(address: IPv4Address) -> str:
    """The hardware address of the slot with this address: unique wherever the address is."""
    return ":".join([MAC_PREFIX, *(f"{byte:02x}" for byte in address.packed[1:])])


def _allowed(fleet: Fleet, flow: Flow) -> list[dict[str, Any]]:
    if flow.destination == INTERNET:
        return []
    return [
        {"to": addresses, "protocol": service.protocol, "ports": [service.port]}
        for name in flow.services
        for service in [fleet.services[name]]
        if (addresses := _addresses(fleet, flow, name))
    ]


def _addresses(fleet: Fleet, flow: Flow, service: str) -> list[str]:
    if flow.destination == INTERNET:
        return []
    return [
        str(address)
        for host in fleet.members(flow.destination)
        if host in fleet.serving(service)
        for address in host.addresses
        if address.version == 4
    ]
