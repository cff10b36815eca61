"""The section ``network`` of the engine's configuration: composed and parsed here, and nowhere else.

The slave's provisioning composes it, the engine parses it; what is composed has been parsed already, so that
no slave is given what its engine would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from ..errors import CellblockError, HostSetupError
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
)
from .policy import HOST_NAME, HOST_POLICIES, PROTOCOLS, EgressRule, EgressRules, NetworkPolicy

_MAC_PREFIX = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){2}")
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

    @classmethod
    def parse(cls, data: object, where: str) -> NetworkConfig:
        """From plain data; raises :class:`HostSetupError` that names the field below ``where``."""
        return _Parser(where).parse(data)

    def address(self, slot: int) -> IPv4Address:
        return self.addresses[slot]

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


def _without_zone(value: object) -> str:
    """The text; "", which is no address, for another type and where it has a zone (fe80::1%eth0), which
    is an interface of one host and would reach the rules as it stands."""
    return value if isinstance(value, str) and "%" not in value else ""


class _Parser:
    """Parses the section; every mistake is named with its field."""

    _FIELDS = (
        *("mode", "parent", "slots", "addresses", "prefix_length", "gateway", "mac_prefix"),
        *("resolvers", "names", "denied", "policies", "guard", "ipv6"),
    )

    def __init__(self, where: str) -> None:
        self._where = where

    def parse(self, data: object) -> NetworkConfig:
        fields = self._mapping(data, "", self._FIELDS)
        try:
            mode = Mode(fields.get("mode"))
        except ValueError:
            raise self._wrong(".mode", fields.get("mode"), "write macvlan or routed") from None
        routed = mode is Mode.ROUTED
        config = NetworkConfig(
            mode=mode,
            parent="" if routed else self._parent(fields.get("parent")),
            slots=self._integer(fields.get("slots"), ".slots", 1, MAX_SLOTS),
            addresses=self._ipv4_network(fields.get("addresses"), ".addresses"),
            prefix_length=32
            if routed
            else self._integer(fields.get("prefix_length"), ".prefix_length", 8, 30),
            gateway=ROUTED_GATEWAY
            if routed
            else self._ipv4_address(fields.get("gateway"), ".gateway"),
            mac_prefix=self._mac_prefix(fields.get("mac_prefix")),
            resolvers=tuple(
                self._ipv4_address(entry, f".resolvers[{i}]")
                for i, entry in enumerate(self._list(fields.get("resolvers", []), ".resolvers"))
            ),
            names=self._names(fields.get("names", {})),
            denied=tuple(
                self._network(entry, f".denied[{i}]")
                for i, entry in enumerate(self._list(fields.get("denied", []), ".denied"))
            ),
            policies=self._policies(fields.get("policies")),
            guard_tables=self._guard(fields.get("guard", {"tables": []})),
            ipv6=None if fields.get("ipv6") is None else self._ipv6(fields["ipv6"], routed),
        )
        self._check_addresses(config)
        if NetworkPolicy.INTERNET in config.policies and not config.resolvers:
            raise HostSetupError(
                f"{self._where}.resolvers",
                "is empty, and the policy internet needs one",
                "name a resolver, or leave out that policy",
            )
        return config

    def _check_addresses(self, config: NetworkConfig) -> None:
        if config.slots > config.addresses.num_addresses:
            raise HostSetupError(
                f"{self._where}.addresses",
                f"{config.addresses} has {config.addresses.num_addresses} addresses for "
                f"{config.slots} slots",
                "give this host a larger range or fewer slots",
            )
        if config.mode is Mode.ROUTED:
            return
        segment = IPv4Network((config.gateway, config.prefix_length), strict=False)
        used = {config.address(slot) for slot in range(config.slots)}
        if not config.addresses.subnet_of(segment):
            raise HostSetupError(
                f"{self._where}.addresses",
                f"{config.addresses} is not within the segment {segment} of the gateway",
                "correct addresses, prefix_length or gateway",
            )
        for address, what in (
            (config.gateway, "the gateway"),
            (segment.network_address, "the segment's own address"),
            (segment.broadcast_address, "the segment's broadcast address"),
        ):
            if address in used:
                raise HostSetupError(
                    f"{self._where}.addresses",
                    f"{config.addresses} has {address}, {what}, among the slots' addresses",
                    "choose a range without it",
                )
        if config.ipv6 is not None:
            self._check_ipv6(config, config.ipv6)

    def _ipv6(self, value: object, routed: bool) -> IPv6Config:
        known = ("prefix",) if routed else ("prefix", "prefix_length", "gateway")
        fields = self._mapping(value, ".ipv6", known)
        prefix = self._network(fields.get("prefix"), ".ipv6.prefix")
        if not isinstance(prefix, IPv6Network) or prefix.prefixlen > LONGEST_IPV6_PREFIX:
            raise self._wrong(
                ".ipv6.prefix",
                str(prefix),
                f"write an IPv6 network of at most /{LONGEST_IPV6_PREFIX}",
            )
        if routed:
            return IPv6Config(prefix, 128, ROUTED_GATEWAY_IPV6)
        gateway = self._address(fields.get("gateway"), ".ipv6.gateway")
        if not isinstance(gateway, IPv6Address):
            raise self._wrong(".ipv6.gateway", str(gateway), "write an IPv6 address")
        length = self._integer(fields.get("prefix_length"), ".ipv6.prefix_length", 8, 126)
        return IPv6Config(prefix, length, gateway)

    def _check_ipv6(self, config: NetworkConfig, ipv6: IPv6Config) -> None:
        used = {config.ipv6_address(slot) for slot in range(config.slots)}
        segment = IPv6Network((ipv6.prefix.network_address, ipv6.prefix_length), strict=False)
        if not ipv6.gateway.is_link_local and ipv6.gateway not in segment:
            raise HostSetupError(
                f"{self._where}.ipv6.gateway",
                f"is {ipv6.gateway}, which is not within the segment {segment} of the prefix",
                "correct prefix, prefix_length or gateway",
            )
        if ipv6.gateway in used:
            raise HostSetupError(
                f"{self._where}.ipv6.prefix",
                f"{ipv6.prefix} has {ipv6.gateway}, the gateway, among the slots' addresses",
                "choose one without it",
            )

    def _parent(self, value: object) -> str:
        if not isinstance(value, str) or not _INTERFACE_NAME.fullmatch(value):
            raise self._wrong(".parent", value, "write the name of an interface of this host")
        return value

    def _mac_prefix(self, value: object) -> str:
        if not isinstance(value, str) or not _MAC_PREFIX.fullmatch(value.lower()):
            raise self._wrong(".mac_prefix", value, f"write three bytes such as {MAC_PREFIX}")
        if int(value[:2], 16) & 3 != 2:
            raise self._wrong(
                ".mac_prefix",
                value,
                f"choose a locally administered unicast one such as {MAC_PREFIX}",
            )
        return value.lower()

    def _names(self, value: object) -> dict[str, tuple[Address, ...]]:
        if not isinstance(value, Mapping):
            raise self._wrong(".names", value, "write addresses by host name")
        names = {}
        for name, addresses in value.items():
            if not isinstance(name, str) or not HOST_NAME.fullmatch(name):
                raise self._wrong(".names", name, "write host names")
            where = f".names.{name}"
            names[name] = tuple(
                self._address(entry, f"{where}[{i}]")
                for i, entry in enumerate(self._list(addresses, where, least=1))
            )
        return names

    def _policies(self, value: object) -> dict[NetworkPolicy, EgressRules]:
        ours = [policy.value for policy in HOST_POLICIES]
        policies = {}
        for name, entry in self._mapping(value, ".policies", ours).items():
            where = f".policies.{name}"
            fields = self._mapping(entry, where, ("services", "internet"))
            policies[NetworkPolicy(name)] = EgressRules(
                services=self._rules(fields, "services", where, with_to=True),
                internet=self._rules(fields, "internet", where, with_to=False),
            )
        return policies

    def _rules(
        self, fields: Mapping[str, Any], name: str, where: str, *, with_to: bool
    ) -> tuple[EgressRule, ...]:
        entries = self._list(fields.get(name, []), f"{where}.{name}")
        return tuple(
            self._rule(entry, f"{where}.{name}[{i}]", with_to=with_to)
            for i, entry in enumerate(entries)
        )

    def _rule(self, value: object, where: str, *, with_to: bool) -> EgressRule:
        known = ("to", "protocol", "ports") if with_to else ("protocol", "ports")
        fields = self._mapping(value, where, known)
        if fields.get("protocol") not in PROTOCOLS:
            raise self._wrong(f"{where}.protocol", fields.get("protocol"), "write tcp or udp")
        to: tuple[Network, ...] | None = None
        if with_to:
            to = tuple(
                self._network(entry, f"{where}.to[{i}]")
                for i, entry in enumerate(self._list(fields.get("to"), f"{where}.to", least=1))
            )
        ports = self._list(fields.get("ports"), f"{where}.ports", least=1)
        return EgressRule(
            to,
            fields["protocol"],
            tuple(self._integer(p, f"{where}.ports[{i}]", 1, 65535) for i, p in enumerate(ports)),
        )

    def _guard(self, value: object) -> tuple[tuple[str, str], ...]:
        tables = self._list(
            self._mapping(value, ".guard", ("tables",)).get("tables"), ".guard.tables"
        )
        parsed = []
        for index, entry in enumerate(tables):
            if (
                not isinstance(entry, list)
                or len(entry) != 2
                or not all(isinstance(word, str) and word for word in entry)
            ):
                raise self._wrong(
                    f".guard.tables[{index}]", entry, "write family and name, as [inet, cellblock]"
                )
            parsed.append((entry[0], entry[1]))
        return tuple(parsed)

    def _network(self, value: object, where: str) -> Network:
        try:
            return ip_network(_without_zone(value))
        except ValueError:
            raise self._wrong(where, value, "write a network such as 192.0.2.0/24") from None

    def _ipv4_network(self, value: object, where: str) -> IPv4Network:
        try:
            return IPv4Network(value if isinstance(value, str) else "")
        except ValueError:
            raise self._wrong(where, value, "write an IPv4 network such as 192.0.2.0/24") from None

    def _address(self, value: object, where: str) -> Address:
        try:
            return ip_address(_without_zone(value))
        except ValueError:
            raise self._wrong(where, value, "write an address") from None

    def _ipv4_address(self, value: object, where: str) -> IPv4Address:
        try:
            return IPv4Address(value if isinstance(value, str) else "")
        except ValueError:
            raise self._wrong(where, value, "write an IPv4 address") from None

    def _integer(self, value: object, where: str, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(where, value, f"write a number from {least} to {most}")
        return value

    def _list(self, value: object, where: str, least: int = 0) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise self._wrong(where, value, "write a list" + (" of one or more" if least else ""))
        return value

    def _mapping(self, value: object, where: str, known: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._wrong(where, value, f"write the fields {', '.join(known)}")
        for name in value:
            if name not in known:
                raise HostSetupError(
                    f"{self._where}{where}.{name}",
                    "is not a known field",
                    f"the fields here are {', '.join(known)}",
                )
        return value

    def _wrong(self, where: str, value: object, remedy: str) -> CellblockError:
        shown = "is missing" if value is None else f"is {value!r}"
        return HostSetupError(
            f"{self._where}{where}", shown, f"{remedy}, or run the job_network role"
        )
