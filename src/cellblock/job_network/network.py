"""Whom jobs may reach: the host's configuration, a stage's policy, and the rules that follow.

Nothing here touches an interface; :mod:`cellblock.slots` makes the namespaces and loads the rules.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_network,
)
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..engine.job import HOST_NAME, PROTOCOLS, Destination, NetworkPolicy, Stage
from ..engine.limits import StageConstraints
from ..errors import (
    CellblockError,
    ForbiddenDestinationError,
    HostSetupError,
    UnresolvedNameError,
    UnsupportedNetworkError,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

ALWAYS_DENIED: tuple[Network, ...] = tuple(
    ip_network(cidr)
    for cidr in """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 224.0.0.0/3
    ::/3 2001::/23 2002::/16 4000::/2 8000::/1
    """.split()
)
"""Private, link-local (metadata), shared, reserved and multicast ranges: no job reaches them, unless
the host's own policies name an address in them. Of IPv6 what is not global unicast (2000::/3), which
has NAT64 and unique local addresses in it, and there what tunnels (Teredo, 6to4)."""
RESOLVE_TIMEOUT_S = 5.0
"""For all host names of a stage together."""
MAX_LOOKUPS = 64
"""Host names that are being resolved at a time, of all stages: each takes a thread and sockets, and
may hang for longer than its stage waits."""
MAX_ADDRESSES = 64
"""Of one host name. Whoever runs its zone says how many it has, and every one costs a rule's element."""
INTERFACE = "job0"
"""The one interface of a slot besides its loopback."""
ROUTED_GATEWAY = IPv4Address("169.254.203.1")
"""In routed mode, the host's end of every slot's veth pair."""
ROUTED_GATEWAY_IPV6 = IPv6Address("fe80::cb:1")
"""The same where slots have IPv6."""
MAX_IPV6_PREFIX_LENGTH = 96
"""The last 32 bits of a slot's IPv6 address are those of its IPv4 address."""

_OneVersion = TypeVar("_OneVersion", IPv4Network, IPv6Network)
_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)
_MAC_PREFIX = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){2}")
_INTERFACE_NAME = re.compile(r"[^\s/:]{1,15}")


class Mode(str, Enum):
    """How a slot is connected."""

    MACVLAN = "macvlan"
    """A clone of the parent, on its segment."""
    ROUTED = "routed"
    """A veth pair; the host forwards."""


@dataclass(frozen=True)
class Reach:
    """Ports of networks that may be connected to."""

    to: tuple[Network, ...] | None
    """None: everywhere."""
    protocol: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class HostPolicy:
    """What a policy of the host's gives: ``allow`` before, ``internet`` after what is denied."""

    allow: tuple[Reach, ...]
    internet: tuple[Reach, ...]


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
    policies: Mapping[NetworkPolicy, HostPolicy]
    guard_tables: tuple[tuple[str, str], ...]
    ipv6: IPv6Config | None
    """None: slots have no IPv6."""

    @classmethod
    def parse(cls, data: object, where: str) -> NetworkConfig:
        """From plain data; raises :class:`HostSetupError` that names the field below ``where``."""
        return _Config(where).parse(data)

    def address(self, slot: int) -> IPv4Address:
        return self.addresses[slot]

    def ipv6_address(self, slot: int) -> IPv6Address | None:
        return None if self.ipv6 is None else self.ipv6.prefix[int(self.address(slot))]

    def mac(self, slot: int) -> bytes:
        return bytes.fromhex(self.mac_prefix.replace(":", "")) + self.address(slot).packed[1:]

    def all_denied(self) -> tuple[IPv4Network, ...]:
        """Disjoint networks: what is always denied, what the host adds, and the job network itself."""
        networks = [self.addresses, *_of_version(IPv4Network, (*ALWAYS_DENIED, *self.denied))]
        if self.mode is Mode.MACVLAN:
            networks.append(IPv4Network((self.gateway, self.prefix_length), strict=False))
        return tuple(collapse_addresses(networks))

    def all_denied_ipv6(self) -> tuple[IPv6Network, ...]:
        """The same of IPv6; none where slots have none."""
        if self.ipv6 is None:
            return ()
        networks = _of_version(IPv6Network, (*ALWAYS_DENIED, *self.denied))
        length = MAX_IPV6_PREFIX_LENGTH + self.addresses.prefixlen
        if self.mode is Mode.MACVLAN:
            length = self.ipv6.prefix_length
        first = self.ipv6.prefix[int(self.addresses.network_address)]
        networks.append(IPv6Network((first, length), strict=False))
        return tuple(collapse_addresses(networks))


@dataclass(frozen=True)
class Access:
    """A stage's policy, ready to be loaded: names are resolved, everything is checked."""

    policy: NetworkPolicy
    before_denied: tuple[Reach, ...]
    after_denied: tuple[Reach, ...]
    hosts: str
    """The job's /etc/hosts."""
    resolv_conf: str
    """The job's /etc/resolv.conf."""

    @classmethod
    def of(
        cls,
        stage: Stage,
        where: str,
        config: NetworkConfig,
        host_name: str,
        resolve: Callable[[Sequence[str], bool], Mapping[str, Sequence[Address]]] | None = None,
    ) -> Access:
        """What ``stage`` may reach; names in it are resolved now and pinned.

        Raises :class:`UnsupportedNetworkError` for a policy that this host does not have,
        :class:`ForbiddenDestinationError` and :class:`UnresolvedNameError` for its allow list.
        """
        if stage.network is NetworkPolicy.ALLOW:
            return cls._of_list(
                stage.network_allow,
                f"{where}.network_allow",
                config,
                host_name,
                resolve or resolve_names,
            )
        policy = config.policies.get(stage.network)
        if policy is None:
            known = ["none", *sorted(p.value for p in config.policies), "allow"]
            raise UnsupportedNetworkError(
                f"{where}.network",
                f"is {stage.network.value!r}, which {host_name} has no rules for",
                f"use one of {', '.join(known)}",
            )
        internet = stage.network is NetworkPolicy.INTERNET
        return cls(
            policy=stage.network,
            before_denied=policy.allow,
            after_denied=policy.internet,
            hosts=_hosts_file(config.names, config),
            resolv_conf=_resolv_conf(config.resolvers if internet else ()),
        )

    @classmethod
    def _of_list(
        cls,
        wanted: Sequence[Destination],
        where: str,
        config: NetworkConfig,
        host_name: str,
        resolve: Callable[[Sequence[str], bool], Mapping[str, Sequence[Address]]],
    ) -> Access:
        denied: list[Network] = [*config.all_denied(), *config.all_denied_ipv6()]
        names = list(dict.fromkeys(entry.name for entry in wanted if entry.name is not None))
        try:
            pinned = dict(resolve(names, config.ipv6 is not None)) if names else {}
        except UnresolvedNameError as problem:
            index = [entry.name for entry in wanted].index(problem.subject)
            raise UnresolvedNameError(
                f"{where}[{index}].to", problem.message, problem.remedy
            ) from None
        reaches = []
        for index, entry in enumerate(wanted):
            networks: tuple[Network, ...]
            if entry.name is None:
                networks = (entry.network,)
            else:
                networks = tuple(ip_network(address) for address in pinned[entry.name])
            for network in networks:
                if network.version == 6 and config.ipv6 is None:
                    raise UnsupportedNetworkError(
                        f"{where}[{index}].to",
                        f"is {entry.to}, and jobs on {host_name} have no IPv6",
                        "name an IPv4 address or a host name",
                    )
                _refuse_denied(network, entry, denied, f"{where}[{index}].to")
            reaches.append(Reach(networks, entry.protocol, entry.ports))
        return cls(
            policy=NetworkPolicy.ALLOW,
            before_denied=(),
            after_denied=tuple(reaches),
            hosts=_hosts_file(pinned, config),
            resolv_conf=_resolv_conf(()),
        )


def _of_version(version: type[_OneVersion], networks: Iterable[Network]) -> list[_OneVersion]:
    return [network for network in networks if isinstance(network, version)]


def _refuse_denied(
    network: Network, entry: Destination, denied: Iterable[Network], where: str
) -> None:
    for other in denied:
        if network.version == other.version and network.overlaps(other):
            what = f"is {entry.to}" + ("" if entry.name is None else f" ({network[0]})")
            raise ForbiddenDestinationError(
                where,
                f"{what}, {'in' if network.prefixlen >= other.prefixlen else 'which overlaps'} "
                f"{other}, "
                "which no job may reach",
                "name public addresses only; private, link-local, metadata and the fleet's own "
                "addresses are never open to jobs",
            )


def resolve_names(names: Sequence[str], ipv6: bool) -> Mapping[str, Sequence[Address]]:
    """Addresses of ``names`` by this host's resolver, within :data:`RESOLVE_TIMEOUT_S`; those of
    IPv6 only if ``ipv6``.

    Raises :class:`UnresolvedNameError`; its subject is the name.
    """
    family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
    found: dict[str, list[Address] | str] = {}
    # The C library's own timeouts are longer and cannot be set: whoever is late is left behind.
    threads = []
    deadline = time.monotonic() + RESOLVE_TIMEOUT_S
    for name in names:
        if not _lookups.acquire(timeout=max(0.0, deadline - time.monotonic())):
            found[name] = f"{MAX_LOOKUPS} other names are being resolved; try again later"
            continue
        thread = threading.Thread(target=_resolve, args=(name, family, found), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            _lookups.release()
            found[name] = "no thread can be started"
            continue
        threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    resolved: dict[str, Sequence[Address]] = {}
    for name in names:
        answer = found.get(name, f"no answer within {RESOLVE_TIMEOUT_S:.0f} s")
        if isinstance(answer, str):
            raise UnresolvedNameError(
                name,
                f"names {name}, which does not resolve to an {'' if ipv6 else 'IPv4 '}address "
                f"({answer})",
                "correct the name, or name its addresses",
            )
        resolved[name] = answer
    return resolved


def _resolve(
    name: str, family: socket.AddressFamily, found: dict[str, list[Address] | str]
) -> None:
    try:
        infos = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)
        addresses = {str(info[4][0]).partition("%")[0] for info in infos}
        if len(addresses) > MAX_ADDRESSES:
            found[name] = f"it has {len(addresses)} of them, more than {MAX_ADDRESSES}"
        else:
            found[name] = sorted(map(ip_address, addresses), key=lambda a: (a.version, int(a)))
    except OSError as problem:
        found[name] = str(problem.strerror)
    except UnicodeError:
        found[name] = "it is not a host name"
    finally:
        _lookups.release()


def _hosts_file(pinned: Mapping[str, Sequence[Address]], config: NetworkConfig) -> str:
    lines = ["127.0.0.1\tlocalhost cellblock"]
    lines += [] if config.ipv6 is None else ["::1\tlocalhost cellblock"]
    lines += [f"{address}\t{name}" for name, addresses in pinned.items() for address in addresses]
    return "".join(f"{line}\n" for line in lines)


def _resolv_conf(resolvers: Sequence[IPv4Address]) -> str:
    if not resolvers:
        # Without a nameserver, libc would ask one on the loopback, where there is none.
        return "# This job has no name service; the names it may use are in /etc/hosts.\n"
    return "".join(f"nameserver {address}\n" for address in resolvers)


# --- Rules ----------------------------------------------------------------------------------------


def closed_rules(config: NetworkConfig, slot: int) -> str:
    """The slot's tables before it has a policy: nothing gets in or out.

    All that does not depend on the stage is here, so that :func:`open_rules` has little to add. What
    opens a connection goes through ``allowed`` and ``opening``, every packet of it through
    ``outgoing`` or ``incoming``; a slot's policy never changes, so what was opened stays allowed.
    The table netdev sees what the other does not: frames of packet sockets, and ARP. The table arp
    keeps a slot that waits from answering whoever still looks for the last user of its address: the
    next one would see in its neighbours who that was.
    Errors of a connection are incoming like its packets: they carry what their sender likes. The
    loopback is not tracked, nor looked at again on its way in: no limit holds there, and the kernel's
    hash table of connections is everybody's.
    """
    address = config.address(slot)
    mac = ":".join(f"{byte:02x}" for byte in config.mac(slot))
    v6 = _closed_rules_ipv6(config, slot)
    return f"""
table inet cellblock {{
    counter sent {{ }}
    counter received {{ }}
    counter refused {{ }}
    counter throttled {{ }}
    counter over_bytes {{ }}
    counter over_connections {{ }}
    set denied {{
        type ipv4_addr
        flags interval
        elements = {{ {", ".join(map(str, config.all_denied()))} }}
    }}{v6.sets}
    chain allowed {{
    }}
    chain opening {{
    }}
    chain outgoing {{
    }}
    chain incoming {{
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oif "lo" accept{v6.output_first}
        ct state established goto outgoing
        ip saddr != {address} counter name refused drop
        ip saddr {address} jump allowed{v6.output}
        counter name refused reject with icmpx admin-prohibited
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iif "lo" accept
        ct state established ct direction reply goto incoming
        ct state related icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} goto incoming{v6.input}
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
    }}
    chain untracked {{
        type filter hook output priority raw; policy accept;
        oif "lo" notrack
    }}
}}
table arp cellblock {{
    chain input {{
        type filter hook input priority filter; policy drop;
    }}
}}
table netdev cellblock {{
    chain egress {{
        type filter hook egress device "{INTERFACE}" priority filter; policy drop;
        ether saddr {mac} ip saddr {address} accept
        ether saddr {mac} ether type arp arp saddr ether {mac} arp saddr ip {address} accept{v6.egress}
    }}
}}
"""


class _IPv6Lines(NamedTuple):
    """What a slot's closed rules have more where slots have IPv6."""

    sets: str = ""
    output_first: str = ""
    output: str = ""
    input: str = ""
    egress: str = ""


def _closed_rules_ipv6(config: NetworkConfig, slot: int) -> _IPv6Lines:
    """A routing header may be set by anybody, and hides where a packet is bound for: none leaves.
    Of ICMPv6 the kernel sends what finds neighbours, which are the gateway and whom the policy
    allows; its reports on multicast groups are no attempt of the job's, and not counted.
    """
    address = config.ipv6_address(slot)
    if address is None:
        return _IPv6Lines()
    mac = ":".join(f"{byte:02x}" for byte in config.mac(slot))
    denied = ", ".join(map(str, config.all_denied_ipv6()))
    return _IPv6Lines(
        sets=f"""
    set denied_v6 {{
        type ipv6_addr
        flags interval
        elements = {{ {denied} }}
    }}""",
        output_first="""
        exthdr rt exists counter name refused drop""",
        output=f"""
        icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report }} drop
        ip6 saddr != {address} counter name refused drop
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        ip6 saddr {address} jump allowed""",
        input="""
        ct state related icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } goto incoming""",
        egress=f"""
        ether saddr {mac} ip6 saddr {address} accept""",
    )


def open_rules(config: NetworkConfig, access: Access, constraints: StageConstraints) -> str:
    """What opens a closed slot for one stage, to be loaded in one transaction.

    In both directions, what is throttled costs no quota.
    """
    table = "inet cellblock"
    rate = constraints.network_bytes_per_second
    flow = [
        f"limit rate over {rate} bytes/second counter name throttled drop",
        "quota name volume counter name over_bytes drop",
    ]
    # Packets of a connection that is neither new nor tracked any more are nothing that was allowed.
    # Without an answer, every packet of an exchange is "new": the mark tells the first. One of TCP
    # that is dropped here is sent again a second later.
    opens = constraints.network_connections_per_second
    opening = [
        "ct state != new counter name refused drop",
        f"ct mark 0 limit rate over {opens}/second burst {opens} packets counter name throttled drop",
        f"ct count over {constraints.network_connections} counter name over_connections "
        "reject with icmpx admin-prohibited",
        "ct mark set 1",
        "goto outgoing",
    ]
    # The rule that opens comes last; the kernel takes all of them at once anyway.
    commands = [
        "add rule arp cellblock input accept",
        f"add quota {table} volume {{ over {constraints.network_bytes} bytes }}",
    ]
    commands += [f"add rule {table} opening {rule}" for rule in opening]
    commands += [f"add rule {table} outgoing {rule}" for rule in flow]
    commands += [f"add rule {table} incoming {rule}" for rule in flow]
    commands.append(f"add rule {table} outgoing counter name sent accept")
    commands.append(f"add rule {table} incoming counter name received accept")
    if config.ipv6 is not None:
        # The hop limit tells what comes from the segment itself (RFC 4861).
        commands.append(
            f"add rule {table} input icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} "
            "ip6 hoplimit 255 accept"
        )
    allowed = [rule for reach in access.before_denied for rule in _matches(reach)]
    if access.after_denied:
        allowed.append("ip daddr @denied return")
        allowed += [] if config.ipv6 is None else ["ip6 daddr @denied_v6 return"]
    allowed += [rule for reach in access.after_denied for rule in _matches(reach)]
    commands += [f"add rule {table} allowed {rule}" for rule in allowed]
    return "\n".join(commands)


def _matches(reach: Reach) -> list[str]:
    """Rules, one for each version of IP unless it is everywhere."""
    ports = f"{reach.protocol} dport {_one_or_set(sorted(set(reach.ports)))} goto opening"
    if reach.to is None:
        return [ports]
    v4 = list(collapse_addresses(_of_version(IPv4Network, reach.to)))
    v6 = list(collapse_addresses(_of_version(IPv6Network, reach.to)))
    to = [f"ip daddr {_one_or_set(v4)}"] if v4 else []
    to += [f"ip6 daddr {_one_or_set(v6)}"] if v6 else []
    return [f"{match} {ports}" for match in to]


def _one_or_set(values: Sequence[object]) -> str:
    return str(values[0]) if len(values) == 1 else f"{{ {', '.join(map(str, values))} }}"


# --- Configuration --------------------------------------------------------------------------------


def _without_zone(value: object) -> str:
    """The text; "", which is no address, for another type and where it has a zone (fe80::1%eth0), which
    is an interface of one host and would reach the rules as it stands."""
    return value if isinstance(value, str) and "%" not in value else ""


class _Config:
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
            slots=self._integer(fields.get("slots"), ".slots", 1, 4096),
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
        if not isinstance(prefix, IPv6Network) or prefix.prefixlen > MAX_IPV6_PREFIX_LENGTH:
            raise self._wrong(
                ".ipv6.prefix",
                str(prefix),
                f"write an IPv6 network of at most /{MAX_IPV6_PREFIX_LENGTH}",
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
            raise self._wrong(".mac_prefix", value, "write three bytes such as 02:cb:00")
        if int(value[:2], 16) & 3 != 2:
            raise self._wrong(
                ".mac_prefix", value, "choose a locally administered unicast one such as 02:cb:00"
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

    def _policies(self, value: object) -> dict[NetworkPolicy, HostPolicy]:
        ours = (NetworkPolicy.CACHE.value, NetworkPolicy.INTERNET.value)
        policies = {}
        for name, entry in self._mapping(value, ".policies", ours).items():
            where = f".policies.{name}"
            fields = self._mapping(entry, where, ("allow", "internet"))
            policies[NetworkPolicy(name)] = HostPolicy(
                allow=tuple(
                    self._reach(reach, f"{where}.allow[{i}]", with_to=True)
                    for i, reach in enumerate(self._list(fields.get("allow", []), f"{where}.allow"))
                ),
                internet=tuple(
                    self._reach(reach, f"{where}.internet[{i}]", with_to=False)
                    for i, reach in enumerate(
                        self._list(fields.get("internet", []), f"{where}.internet")
                    )
                ),
            )
        return policies

    def _reach(self, value: object, where: str, *, with_to: bool) -> Reach:
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
        return Reach(
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
        return HostSetupError(f"{self._where}{where}", shown, f"{remedy}, or run the macvlan role")


def load_config(data: Mapping[str, Any], path: Path) -> NetworkConfig | None:
    """The section ``network`` of the configuration in ``path``; None where it is absent."""
    section = data.get("network")
    return None if section is None else NetworkConfig.parse(section, f"{path}: network")
