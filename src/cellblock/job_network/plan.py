"""Which addresses jobs have, and which addresses are nobody's: facts that controller and slave share.

Nothing here touches a host. The slots of a slave take the first addresses of its range; everything else
about a slot (hardware address, IPv6 address, names of interfaces) follows from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    collapse_addresses,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

SPECIAL_NETWORKS: tuple[Network, ...] = tuple(
    ip_network(cidr)
    for cidr in """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 224.0.0.0/3
    168.63.129.16/32
    ::/3 2001::/23 2002::/16 4000::/2 8000::/1
    """.split()
)
"""What is never "the internet": IANA's IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and
its successors), multicast and what is reserved.

Without the ranges for documentation (RFC 5737, RFC 3849): those lead nowhere on a real network, and on
the local fleet they are its internet. 168.63.129.16 is public by its number and hands out configuration
and credentials to Azure's machines. Of IPv6 it is all that is not global unicast (2000::/3), with NAT64
and unique local addresses in it, and there what tunnels (Teredo, 6to4): 64:ff9b::/96 (NAT64) and 2002::/16
(6to4) would carry a private IPv4 address inside."""

INTERFACE = "job0"
"""The one interface of a slot besides its loopback."""
HOST_END = "cbj"
"""Mode routed: the host's end of slot n's veth pair is ``cbjN``."""
MAC_PREFIX = "02:cb:00"
"""What slots' hardware addresses begin with: locally administered, unicast (IEEE 802)."""
ROUTED_GATEWAY = IPv4Address("169.254.203.1")
"""Mode routed: the host's end of every slot's veth pair."""
ROUTED_GATEWAY_IPV6 = IPv6Address("fe80::cb:1")
"""The same where slots have IPv6."""
LONGEST_IPV6_PREFIX = 96
"""Behind an IPv6 prefix for jobs come the 32 bits of a slot's IPv4 address."""
MAX_SLOTS = 4096
RANGE_PREFIX_LENGTH = 27
"""Of the range that each slave takes of a network for all, unless the inventory says otherwise."""


class PlanError(ValueError):
    """The addresses for jobs, as declared, cannot be had; the text is one sentence with the remedy."""


class Mode(str, Enum):
    """How a slot is connected."""

    MACVLAN = "macvlan"
    """A clone of the parent, on its segment."""
    ROUTED = "routed"
    """A veth pair; the host forwards."""


# --- Addresses of slots ---------------------------------------------------------------------------


def capacity(network: IPv4Network) -> int:
    """How many slots a range has addresses for. Its last address stays free: at the end of a segment it
    is the broadcast address, and with its hardware address a slave tries a clone."""
    return network.num_addresses - 1


def mac_address(address: IPv4Address, prefix: str = MAC_PREFIX) -> str:
    """The hardware address of the slot with this address: unique wherever the address is."""
    return ":".join([prefix, *(f"{byte:02x}" for byte in address.packed[1:])])


def probe_mac(network: IPv4Network | str) -> str:
    """The hardware address with which a slave tries a clone: of the one address that no slot has."""
    return mac_address(IPv4Network(network).broadcast_address)


def ipv6_address(prefix: IPv6Network, address: IPv4Address) -> IPv6Address:
    """The IPv6 address of the slot with this IPv4 address: its number behind the prefix, so that two
    slots never have the same.
    """
    return prefix.network_address + int(address)


def ipv6_network(prefix: IPv6Network, network: IPv4Network) -> IPv6Network:
    """The IPv6 addresses of the slots with these IPv4 addresses."""
    first = ipv6_address(prefix, network.network_address)
    return IPv6Network((int(first), LONGEST_IPV6_PREFIX + network.prefixlen))


def host_end(slot: int) -> str:
    """Mode routed: the name of the host's end of a slot's veth pair."""
    return f"{HOST_END}{slot}"


def collapsed(networks: Iterable[Network]) -> list[Network]:
    """The same addresses as few networks, IPv4 first, each family in ascending order."""
    every = list(networks)
    v4 = collapse_addresses(n for n in every if isinstance(n, IPv4Network))
    v6 = collapse_addresses(n for n in every if isinstance(n, IPv6Network))
    return [*v4, *v6]


# --- Ranges of slaves -----------------------------------------------------------------------------


def deal_ranges(whole: str, numbers: Mapping[str, int], prefix_length: int) -> dict[str, str]:
    """The ranges (CIDR) of the slaves with these numbers: number n has the n-th part, from 1, of the
    IPv4 network ``whole`` (CIDR), each of ``prefix_length``.

    A slave's range depends on its own number alone: whoever comes or goes, the others' stay.
    Raises :class:`PlanError`.
    """
    try:
        network = ip_network(whole)
    except ValueError as error:
        raise PlanError(
            f"cellblock_job_range is {whole!r}, which is no network ({error}); write a CIDR such as"
            " 192.0.2.128/25"
        ) from None
    if not isinstance(network, IPv4Network):
        raise PlanError(
            f"cellblock_job_range is {whole}: write an IPv4 network, and what is IPv6 as"
            " cellblock_job_ipv6_prefix"
        )
    parts = 2 ** (prefix_length - network.prefixlen) if prefix_length >= network.prefixlen else 0
    taken: dict[int, str] = {}
    for slave, number in numbers.items():
        if number in taken:
            raise PlanError(
                f"{slave}: its number for jobs' addresses is {number}, as {taken[number]}'s is; set"
                " cellblock_job_range_number of one of them to another"
            )
        if number > parts:
            raise PlanError(
                f"cellblock_job_range {whole} has too few addresses: it has {parts} ranges of"
                f" /{prefix_length}, and {slave} is number {number} (cellblock_job_range_number, or the"
                " number at the end of its name); give a larger network, lower numbers, or smaller"
                " ranges (cellblock_job_range_prefix_length)"
            )
        taken[number] = slave
    size = 2 ** (32 - prefix_length)
    return {
        slave: str(IPv4Network((int(network.network_address) + (number - 1) * size, prefix_length)))
        for slave, number in numbers.items()
    }


# --- Do they fit the segment? ---------------------------------------------------------------------


class Misfit(Enum):
    """Why slots cannot be on the segment of their parent."""

    NO_ADDRESS = "the parent has no address"
    NO_GATEWAY = "there is no way out"
    OUTSIDE = "the range is not within the segment"
    GATEWAY_OUTSIDE = "the gateway is not on the segment"
    TAKEN = "an address among the slots' is somebody's"


@dataclass(frozen=True)
class SegmentProblem:
    """``text`` is a sentence without its full stop, about "its" range, with the remedy."""

    kind: Misfit
    text: str


def segment_problem(
    network: IPv4Network, slots: int, interface: str, gateway: str
) -> SegmentProblem | None:
    """Why slots with the first addresses of ``network`` cannot be on a segment; None when they can.

    ``interface`` is the slave's own address there with the prefix length, ``gateway`` the way out;
    either is empty where there is none.
    """
    if not interface:
        return SegmentProblem(Misfit.NO_ADDRESS, "the parent has no IPv4 address")
    if not gateway:
        text = "there is no gateway on the parent; set job_network_gateway"
        return SegmentProblem(Misfit.NO_GATEWAY, text)
    own, way = IPv4Interface(interface), IPv4Address(gateway)
    segment = own.network
    if not network.subnet_of(segment):
        return SegmentProblem(
            Misfit.OUTSIDE,
            f"its range for jobs {network} is not within the segment {segment} of its parent"
            " interface; choose a cellblock_job_range there, or set job_network_mode to routed",
        )
    if way not in segment:
        return SegmentProblem(
            Misfit.GATEWAY_OUTSIDE,
            f"its gateway {gateway} is not on the segment {segment} of the parent interface; set"
            " job_network_gateway to the one that jobs are to use",
        )
    for address, what in (
        (segment.network_address, "the segment's own address"),
        (segment.broadcast_address, "the segment's broadcast address"),
        (way, "the gateway's address"),
        (own.ip, "the slave's own address"),
    ):
        if 0 <= int(address) - int(network.network_address) < slots:
            return SegmentProblem(
                Misfit.TAKEN,
                f"its range for jobs {network} has {address}, {what}, among the slots' addresses;"
                " choose a cellblock_job_range without it",
            )
    return None


def ipv6_segment_problem(
    prefix: IPv6Network, network: IPv4Network, slots: int, interface: str, gateway: str
) -> SegmentProblem | None:
    """As :func:`segment_problem`, of the slots' IPv6 addresses: those with ``prefix`` and the first
    addresses of ``network``.
    """
    if not interface:
        return SegmentProblem(
            Misfit.NO_ADDRESS,
            "jobs are to have IPv6 (cellblock_job_ipv6_prefix), but its parent interface has no IPv6"
            " address besides link-local ones; give it one, or set job_network_mode to routed",
        )
    if not gateway:
        return SegmentProblem(
            Misfit.NO_GATEWAY,
            "jobs are to have IPv6 (cellblock_job_ipv6_prefix), but there is no IPv6 gateway on its"
            " parent interface; set job_network_gateway_ipv6, or give it an IPv6 default route",
        )
    ours = ipv6_network(prefix, network)
    own, way = IPv6Interface(interface), IPv6Address(gateway)
    if not ours.subnet_of(own.network):
        return SegmentProblem(
            Misfit.OUTSIDE,
            f"its IPv6 range for jobs {ours} is not within the segment {own.network} of its parent"
            " interface; choose a cellblock_job_ipv6_prefix there, or set job_network_mode to routed",
        )
    if not way.is_link_local and way not in own.network:
        return SegmentProblem(
            Misfit.GATEWAY_OUTSIDE,
            f"its IPv6 gateway {gateway} is neither link-local nor on the segment {own.network} of the"
            " parent interface; correct job_network_gateway_ipv6 or the IPv6 default route",
        )
    for address, what in (
        (own.network.network_address, "the address of every router on the segment"),
        (way, "the gateway's address"),
        (own.ip, "the slave's own address"),
    ):
        if 0 <= int(address) - int(ours.network_address) < slots:
            return SegmentProblem(
                Misfit.TAKEN,
                f"its IPv6 range for jobs {ours} has {address}, {what}, among the slots' addresses;"
                " choose a cellblock_job_ipv6_prefix without it",
            )
    return None
