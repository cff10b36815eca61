"""The section ``network`` of the engine's configuration: composed and parsed here, and nowhere else.

The slave's provisioning composes it, the engine parses it; what is composed has been parsed already, so that
no slave is given what its engine would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

from ..errors import HostSetupError
from ..validate import Value
from .plan import (
    LONGEST_IPV6_PREFIX,
    MAC_PREFIX,
    MAX_SLOTS,
    ROUTED_GATEWAY,
    ROUTED_GATEWAY_IPV6,
    SPECIAL_NETWORKS,
    Address,
    Mode,
    Network,
    collapsed,
    ipv6_address,
    ipv6_network,
    mac_address,
    slot_address,
)
from .policy import HOST_NAME, HOST_POLICIES, PROTOCOLS, EgressRule, EgressRules, NetworkPolicy

_MAC_PREFIX = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){2}")
_INTERFACE_NAME = re.compile(r"[^\s/:]{1,15}")
GUARD_TABLE = "cellblock_jobs"


@dataclass(frozen=True)
class IPv6Config:
    """IPv6 of slots: ``prefix`` with a slot's IPv4 address as the last 32 bits."""

    prefix: IPv6Network
    prefix_length: int
    """Of the segment."""
    gateway: IPv6Address


@dataclass(frozen=True)
class NetworkConfig:
    """The section ``network`` of the host's configuration.

    Slot ``n`` (from 0) has the address ``addresses[n]`` and the MAC ``mac_prefix`` plus the last
    three bytes of that address, so that neither is twice on a segment.
    """

    mode: Mode
    parent: str
    slots: int
    addresses: IPv4Network
    prefix_length: int
    gateway: IPv4Address
    mac_prefix: str
    resolvers: tuple[IPv4Address, ...]
    names: Mapping[str, Sequence[Address]]
    """In the hosts file of every job with one of the host's own policies."""
    denied: tuple[Network, ...]
    policies: Mapping[NetworkPolicy, EgressRules]
    guard_tables: tuple[tuple[str, str], ...]
    ipv6: IPv6Config | None
    """None: slots have no IPv6."""
    link: str = ""
    """Mode macvlan: the interface that ``parent`` is made of, and is made of again when it is gone; empty: it is not."""

    @classmethod
    def parse(cls, data: object, where: str) -> NetworkConfig:
        """From plain data; raises :class:`HostSetupError` that names the field below ``where``."""
        return _parse(data, where)

    def is_same_but_for_denied(self, other: NetworkConfig) -> bool:
        """Whether slots of the one could be those of the other, but for what they may not reach."""
        return replace(self, denied=other.denied) == other

    def address(self, slot: int) -> IPv4Address:
        return slot_address(self.addresses, slot)

    def ipv6_address(self, slot: int) -> IPv6Address | None:
        return None if self.ipv6 is None else ipv6_address(self.ipv6.prefix, self.address(slot))

    def mac(self, slot: int) -> str:
        return mac_address(self.address(slot), self.mac_prefix)

    def all_denied(self) -> tuple[Network, ...]:
        """Disjoint networks, IPv4 first: what is special, what the host adds, and the job network itself.
        IPv6 only where slots have it."""
        networks: list[Network] = [*SPECIAL_NETWORKS, *self.denied, self.addresses]
        on_segment = self.mode is Mode.MACVLAN
        if on_segment:
            networks.append(IPv4Network((self.gateway, self.prefix_length), strict=False))
        if self.ipv6 is None:
            networks = [network for network in networks if network.version == 4]
        else:
            slots = ipv6_network(self.ipv6.prefix, self.addresses)
            length = self.ipv6.prefix_length if on_segment else slots.prefixlen
            networks.append(slots.supernet(new_prefix=min(length, slots.prefixlen)))
        return tuple(collapsed(networks))

    def services(self) -> list[tuple[Address, str, int]]:
        """(address, protocol, port) of all that some policy opens of the fleet, IPv4 first."""
        found = {
            (network.network_address, rule.protocol, port)
            for policy in self.policies.values()
            for rule in policy.services
            for network in rule.to or ()
            for port in rule.ports
        }
        return sorted(found, key=lambda entry: (entry[0].version, *entry))


@dataclass(frozen=True)
class SegmentEnd:
    """Mode macvlan: how slots are on their segment. Of IPv6 None where slots have none."""

    parent: str
    """The interface that slots are cloned from."""
    prefix_length: int
    gateway: str
    ipv6_prefix_length: int | None = None
    ipv6_gateway: str | None = None
    link: str | None = None
    """The interface that the parent is made of."""


def compose_section(
    declared: Mapping[str, Any], slots: int, end: SegmentEnd | None
) -> dict[str, Any]:
    """The section of a slave as plain data; mode macvlan with an ``end``, routed without.

    ``declared`` is what the inventory says: ``addresses`` (CIDR), ``ipv6_prefix`` (CIDR, absent where
    slots have no IPv6), ``denied`` [CIDR], ``policies`` {name: {services: [{to, protocol, ports}],
    internet: [{protocol, ports}]}}, ``resolvers`` [address], ``names`` {name: [address]}. Raises
    :class:`HostSetupError` for what the engine would refuse.
    """
    section: dict[str, Any] = {
        "mode": Mode.ROUTED.value,
        "slots": slots,
        "addresses": declared["addresses"],
        "mac_prefix": MAC_PREFIX,
        "resolvers": declared["resolvers"],
        "names": declared["names"],
        "denied": declared["denied"],
        "policies": {
            policy.value: declared["policies"][policy.value]
            for policy in HOST_POLICIES
            if policy.value in declared["policies"]
        },
        "guard": {"tables": [["inet", "cellblock"], ["inet", GUARD_TABLE]]},
    }
    ipv6: dict[str, Any] = {}
    if "ipv6_prefix" in declared:
        ipv6 = section["ipv6"] = {"prefix": declared["ipv6_prefix"]}
    if end is not None:
        section |= {
            "mode": Mode.MACVLAN.value,
            "parent": end.parent,
            "prefix_length": end.prefix_length,
            "gateway": end.gateway,
            **({"link": end.link} if end.link else {}),
        }
        # The only hooks of the host that see frames of clones.
        section["guard"]["tables"][1] = ["netdev", GUARD_TABLE]
        if ipv6:
            ipv6 |= {"prefix_length": end.ipv6_prefix_length, "gateway": end.ipv6_gateway}
    NetworkConfig.parse(section, "network")
    return section


def load_config(data: Mapping[str, Any], path: Path) -> NetworkConfig | None:
    """The section ``network`` of the configuration in ``path``; None where it is absent."""
    section = data.get("network")
    return None if section is None else NetworkConfig.parse(section, f"{path}: network")


def _parse(data: object, where: str) -> NetworkConfig:
    section = Value(data, where, _error)
    mode = Mode(section.fields(("mode",), others=True)["mode"].choice([m.value for m in Mode]))
    routed = mode is Mode.ROUTED
    on_segment = ("parent", "prefix_length", "gateway")
    fields = section.fields(
        ("mode", "slots", "addresses", "mac_prefix", "policies", *(() if routed else on_segment)),
        {
            **dict.fromkeys(on_segment if routed else ()),
            **{"resolvers": [], "names": {}, "denied": [], "guard": {"tables": []}, "ipv6": None},
            **({} if routed else {"link": None}),
        },
    )
    ipv6 = fields["ipv6"].or_none()
    link = None if routed else fields["link"].or_none()
    config = NetworkConfig(
        mode=mode,
        parent=""
        if routed
        else fields["parent"].matching(_INTERFACE_NAME, "the name of an interface of this host"),
        slots=fields["slots"].integer(1, MAX_SLOTS),
        addresses=fields["addresses"].ipv4_network(),
        prefix_length=32 if routed else fields["prefix_length"].integer(8, 30),
        gateway=ROUTED_GATEWAY if routed else fields["gateway"].ipv4_address(),
        mac_prefix=_mac_prefix(fields["mac_prefix"]),
        resolvers=tuple(entry.ipv4_address() for entry in fields["resolvers"].list()),
        names=_names(fields["names"]),
        denied=tuple(entry.network() for entry in fields["denied"].list()),
        policies=_policies(fields["policies"]),
        guard_tables=tuple(
            _table(entry) for entry in fields["guard"].fields(("tables",))["tables"].list()
        ),
        ipv6=None if ipv6 is None else _ipv6(ipv6, routed),
        link=""
        if link is None
        else link.matching(_INTERFACE_NAME, "the name of an interface of this host"),
    )
    _check_addresses(config, fields)
    if NetworkPolicy.INTERNET in config.policies and not config.resolvers:
        raise fields["resolvers"].error(
            "is empty, and the policy internet needs one",
            "name a resolver, or leave out that policy",
        )
    return config


def _error(subject: str, message: str, remedy: str) -> HostSetupError:
    return HostSetupError(subject, message, f"{remedy}, or run the job_network role")


def _mac_prefix(value: Value) -> str:
    prefix = value.matching(_MAC_PREFIX, f"three bytes such as {MAC_PREFIX}").lower()
    if int(prefix[:2], 16) & 3 != 2:
        raise value.wrong(f"a locally administered unicast prefix such as {MAC_PREFIX}")
    return prefix


def _names(value: Value) -> dict[str, tuple[Address, ...]]:
    names = {}
    for name, addresses in value.entries(what="addresses by host name").items():
        if not HOST_NAME.fullmatch(name):
            raise value.instead(name).wrong("host names")
        names[name] = tuple(entry.address() for entry in addresses.list(least=1))
    return names


def _policies(value: Value) -> dict[NetworkPolicy, EgressRules]:
    known = {policy.value: None for policy in HOST_POLICIES}
    return {
        NetworkPolicy(name): _rules(entry)
        for name, entry in value.fields(optional=known).items()
        if name in value.raw
    }


def _rules(value: Value) -> EgressRules:
    fields = value.fields(optional={"services": [], "internet": []})
    return EgressRules(
        services=tuple(
            _rule(entry.fields(("to", "protocol", "ports"))) for entry in fields["services"].list()
        ),
        internet=tuple(
            _rule(entry.fields(("protocol", "ports"))) for entry in fields["internet"].list()
        ),
    )


def _rule(fields: Mapping[str, Value]) -> EgressRule:
    return EgressRule(
        to=tuple(entry.network() for entry in fields["to"].list(least=1))
        if "to" in fields
        else None,
        protocol=fields["protocol"].choice(PROTOCOLS),
        ports=tuple(port.integer(1, 65535) for port in fields["ports"].list(least=1)),
    )


def _table(value: Value) -> tuple[str, str]:
    match value.raw:
        case [str() as family, str() as name] if family and name:
            return family, name
    raise value.wrong("family and name, as [inet, cellblock]")


def _ipv6(value: Value, routed: bool) -> IPv6Config:
    fields = value.fields(("prefix",) if routed else ("prefix", "prefix_length", "gateway"))
    prefix = fields["prefix"].network()
    if not isinstance(prefix, IPv6Network) or prefix.prefixlen > LONGEST_IPV6_PREFIX:
        raise fields["prefix"].wrong(f"an IPv6 network of at most /{LONGEST_IPV6_PREFIX}")
    if routed:
        return IPv6Config(prefix, 128, ROUTED_GATEWAY_IPV6)
    gateway = fields["gateway"].address()
    if not isinstance(gateway, IPv6Address):
        raise fields["gateway"].wrong("an IPv6 address")
    return IPv6Config(prefix, fields["prefix_length"].integer(8, 126), gateway)


def _check_addresses(config: NetworkConfig, fields: Mapping[str, Value]) -> None:
    addresses = fields["addresses"]
    if config.slots > config.addresses.num_addresses:
        raise addresses.error(
            f"{config.addresses} has {config.addresses.num_addresses} addresses for "
            f"{config.slots} slots",
            "give this host a larger range or fewer slots",
        )
    if config.mode is Mode.ROUTED:
        return
    segment = IPv4Network((config.gateway, config.prefix_length), strict=False)
    used = {config.address(slot) for slot in range(config.slots)}
    if not config.addresses.subnet_of(segment):
        raise addresses.error(
            f"{config.addresses} is not within the segment {segment} of the gateway",
            "correct addresses, prefix_length or gateway",
        )
    for address, what in (
        (config.gateway, "the gateway"),
        (segment.network_address, "the segment's own address"),
        (segment.broadcast_address, "the segment's broadcast address"),
    ):
        if address in used:
            raise addresses.error(
                f"{config.addresses} has {address}, {what}, among the slots' addresses",
                "choose a range without it",
            )
    if config.ipv6 is not None:
        _check_ipv6(config, config.ipv6, fields["ipv6"])


def _check_ipv6(config: NetworkConfig, ipv6: IPv6Config, value: Value) -> None:
    used = {config.ipv6_address(slot) for slot in range(config.slots)}
    segment = IPv6Network((ipv6.prefix.network_address, ipv6.prefix_length), strict=False)
    if not ipv6.gateway.is_link_local and ipv6.gateway not in segment:
        raise value.within("gateway", None).error(
            f"is {ipv6.gateway}, which is not within the segment {segment} of the prefix",
            "correct prefix, prefix_length or gateway",
        )
    if ipv6.gateway in used:
        raise value.within("prefix", None).error(
            f"{ipv6.prefix} has {ipv6.gateway}, the gateway, among the slots' addresses",
            "choose one without it",
        )
