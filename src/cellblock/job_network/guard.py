"""The rules around all jobs of a slave, whatever the filter in a slot says: the union of all policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address

from .plan import HOST_END, Address, Mode, host_end, probe_mac
from .section import GUARD_TABLE, NetworkConfig


@dataclass(frozen=True)
class GuardedHost:
    """What the rules must know of the slave besides its section."""

    name: str
    parent: str
    """The host's own interface, on which clones' frames are seen."""
    addresses: Sequence[str]
    """The host's IPv4 addresses."""


def guard_rules(config: NetworkConfig, host: GuardedHost) -> str:
    """The table, as nftables text. ``@mac:INTERFACE@`` stands for that interface's hardware address, which
    whoever loads the text puts there.
    """
    is_macvlan = config.mode is Mode.MACVLAN
    lines = [
        f"# What jobs' networks on {host.name} may send and get at most, whatever the filter in a slot",
        "# says: the union of all policies. Made by the role `job_network`; changes belong there.",
        f"table {'netdev' if is_macvlan else 'inet'} {GUARD_TABLE} {{",
        *_sets(config, host),
        "\tcounter spoofed { }",
        "\tcounter refused_out { }",
        "\tcounter refused_in { }",
        *(_frame_chains(config, host) if is_macvlan else _routed_chains(config)),
        "}",
    ]
    return "".join(f"{line}\n" for line in lines)


def _sets(config: NetworkConfig, host: GuardedHost) -> list[str]:
    is_macvlan = config.mode is Mode.MACVLAN
    slots = range(config.slots)
    addresses = [config.address(slot) for slot in slots]
    senders = [config.mac(slot) if is_macvlan else f'"{host_end(slot)}"' for slot in slots]
    services, services6 = (_services(config, version) for version in (4, 6))
    denied, denied6 = (
        [network for network in config.all_denied() if network.version == version]
        for version in (4, 6)
    )
    lines = _set(
        "slots",
        "typeof ether saddr . ip saddr" if is_macvlan else "type ifname . ipv4_addr",
        _pairs(senders, addresses),
    )
    if is_macvlan:
        lines += _set("slot_macs", "type ether_addr", senders)
    lines += _set("slot_addresses", "type ipv4_addr", addresses)
    if is_macvlan:
        lines += _set("host_addresses", "type ipv4_addr", ["0.0.0.0", *host.addresses])
        lines.append("\t# Whose hardware address a job needs: the gateway's and the services'.")
        neighbours = [config.gateway, *(address for address, _, _ in services)]
        lines += _set("neighbours", "type ipv4_addr", neighbours)
    if services:
        lines += _set("services", "type ipv4_addr . inet_proto . inet_service", _joined(services))
    lines += _set("denied", "type ipv4_addr; flags interval", denied)
    lines += [
        "\t# While the table is being replaced, the kernel shows new rules an instant before the elements of",
        "\t# sets with intervals, one set after the other, and old rules for an instant without them: what is",
        "\t# not in `denied` would be everything. So who asks that asks before and after for this set, which",
        "\t# is the last.",
        *_set("everywhere", "type ipv4_addr; flags interval", ["0.0.0.0/0"]),
    ]
    if config.ipv6 is None:
        return lines
    addresses6 = [config.ipv6_address(slot) for slot in slots]
    lines += _set(
        "slots6",
        "typeof ether saddr . ip6 saddr" if is_macvlan else "type ifname . ipv6_addr",
        _pairs(senders, addresses6),
    )
    lines += _set("slot_addresses6", "type ipv6_addr", addresses6)
    if services6:
        lines += _set("services6", "type ipv6_addr . inet_proto . inet_service", _joined(services6))
    lines += _set("denied6", "type ipv6_addr; flags interval", denied6)
    lines.append("\t# The last one, as `everywhere` is.")
    lines += _set("everywhere6", "type ipv6_addr; flags interval", ["::/0"])
    return lines


def _frame_chains(config: NetworkConfig, host: GuardedHost) -> list[str]:
    """Mode macvlan: on the parent, which sees all frames of its clones."""
    ipv6 = config.ipv6
    has_services = bool(_services(config, 4))
    chains = [
        "\t# Frames of the host itself: under its own addresses only.",
        *_chain(
            "host",
            "ether type ip ip saddr != @host_addresses counter name spoofed drop",
            "ether type arp arp saddr ip != @host_addresses counter name spoofed drop",
            *_if(ipv6, "ip6 saddr @slot_addresses6 counter name spoofed drop"),
            "accept",
        ),
        *_chain(
            "outgoing",
            *_if(has_services, _TO_SERVICES),
            _TO_INTERNET,
            "counter name refused_out drop",
        ),
        "\t# Without connection tracking, what begins a connection can be told for TCP only; the slot's own",
        "\t# filter knows the rest.",
        *_chain(
            "incoming",
            "tcp flags & (syn | ack) == syn counter name refused_in drop",
            f"icmp type {_ERRORS} accept",
            *_if(has_services, "ip saddr . meta l4proto . th sport @services accept"),
            "ip saddr @everywhere ip saddr != @denied ip saddr @everywhere meta l4proto { tcp, udp } accept",
            "counter name refused_in drop",
        ),
        *_frame_chains_ipv6(config),
        *_chain(
            "egress",
            f'type filter hook egress device "{host.parent}" priority filter; policy drop;',
            f"ether saddr @mac:{host.parent}@ goto host",
            "ether saddr . ip saddr @slots goto outgoing",
            "ether saddr . arp saddr ip @slots arp saddr ether . arp saddr ip @slots arp operation request"
            " arp daddr ip @neighbours accept",
            "ether saddr . arp saddr ip @slots arp saddr ether . arp saddr ip @slots arp operation reply accept",
            f"ether saddr {probe_mac(config.addresses)} arp saddr ip 0.0.0.0 arp operation request"
            f' arp daddr ip {config.gateway} accept comment "the role\'s probe"',
            *_if(ipv6, "ether saddr . ip6 saddr @slots6 goto outgoing6"),
            "ether saddr @slot_macs ether type ip6 counter name refused_out drop",
            "ether saddr @slot_macs ether type arp arp saddr ip @slot_addresses counter name refused_out drop",
            "counter name spoofed drop",
        ),
        *_chain(
            "ingress",
            f'type filter hook ingress device "{host.parent}" priority filter; policy accept;',
            "ether saddr @slot_macs counter name spoofed drop",
            "ether daddr . ip daddr @slots goto incoming",
            "ip daddr @slot_addresses counter name spoofed drop",
            *_if(ipv6, "ether daddr . ip6 daddr @slots6 goto incoming6"),
            *_if(ipv6, "ip6 daddr @slot_addresses6 counter name spoofed drop"),
            "ether daddr @slot_macs ether type != arp counter name refused_in drop",
        ),
    ]
    return chains


def _frame_chains_ipv6(config: NetworkConfig) -> list[str]:
    """A routing header would lead past the address that is looked at here. Whose hardware address a slot
    asks for, and for which address it answers, are the 16 bytes after the first 8 of the message
    (RFC 4861): nft 1.0.6 has no word for them, and takes them as numbers only.
    """
    if config.ipv6 is None:
        return []
    slots = range(config.slots)
    services = _services(config, 6)
    asked = [config.ipv6.gateway, *(address for address, _, _ in services)]
    answered = [
        f"{config.mac(slot)} . {_number(address)}"
        for slot in slots
        if (address := config.ipv6_address(slot)) is not None
    ]
    return [
        *_chain(
            "outgoing6",
            "exthdr rt exists counter name refused_out drop",
            f"icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 @th,64,128 {{ {_elements(map(_number, asked))} }}"
            " accept",
            "icmpv6 type nd-neighbor-advert ip6 hoplimit 255 ether saddr . @th,64,128"
            f" {{ {_elements(answered)} }} accept",
            *_if(services, _TO_SERVICES_IPV6),
            _TO_INTERNET_IPV6,
            "counter name refused_out drop",
        ),
        *_chain(
            "incoming6",
            "exthdr rt exists counter name refused_in drop",
            _NEIGHBOURS.format("").lstrip(),
            "tcp flags & (syn | ack) == syn counter name refused_in drop",
            f"icmpv6 type {_ERRORS_IPV6} accept",
            *_if(services, "ip6 saddr . meta l4proto . th sport @services6 accept"),
            "ip6 saddr @everywhere6 ip6 saddr != @denied6 ip6 saddr @everywhere6"
            " meta l4proto { tcp, udp } accept",
            "counter name refused_in drop",
        ),
    ]


def _routed_chains(config: NetworkConfig) -> list[str]:
    """Mode routed: where the host passes on what jobs send."""
    ipv6 = config.ipv6
    ends = f'"{HOST_END}*"'
    neighbours = ' comment "neighbour discovery"'
    return [
        *_chain(
            "prerouting",
            "type filter hook prerouting priority raw; policy accept;",
            *_if(
                ipv6 is None,
                f"iifname {ends} meta nfproto != ipv4 counter name refused_out drop",
            ),
            f"iifname {ends} iifname . ip saddr != @slots counter name spoofed drop",
            f"iifname != {ends} ip saddr @slot_addresses counter name spoofed drop",
            *_if(ipv6, f"iifname {ends} iifname . ip6 saddr != @slots6 counter name spoofed drop"),
            *_if(ipv6, f"iifname != {ends} ip6 saddr @slot_addresses6 counter name spoofed drop"),
        ),
        *_chain(
            "input",
            "type filter hook input priority filter - 20; policy accept;",
            *_if(ipv6, _NEIGHBOURS.format(f"iifname {ends}") + neighbours),
            f'iifname {ends} counter name refused_out drop comment "nothing of the host itself"',
        ),
        *_chain(
            "output",
            "type filter hook output priority filter - 20; policy accept;",
            f"oifname {ends} icmp type {_ERRORS} accept",
            *_if(ipv6, _NEIGHBOURS.format(f"oifname {ends}") + neighbours),
            *_if(ipv6, f"oifname {ends} icmpv6 type {_ERRORS_IPV6} accept"),
            f"oifname {ends} counter name refused_in drop",
        ),
        *_chain(
            "outgoing",
            "ct direction reply counter name refused_out drop",
            *_if(_services(config, 4), _TO_SERVICES),
            _TO_INTERNET,
            *_if(ipv6, "exthdr rt exists counter name refused_out drop"),
            *_if(ipv6 and _services(config, 6), _TO_SERVICES_IPV6),
            *_if(ipv6, _TO_INTERNET_IPV6),
            "counter name refused_out drop",
        ),
        *_chain(
            "incoming",
            "ct state established ct direction reply accept",
            f"ct state related icmp type {_ERRORS} accept",
            *_if(ipv6, f"ct state related icmpv6 type {_ERRORS_IPV6} accept"),
            "counter name refused_in drop",
        ),
        *_chain(
            "forward",
            "type filter hook forward priority filter - 20; policy accept;",
            f'iifname {ends} oifname {ends} counter name refused_out drop comment "job to job"',
            f"iifname {ends} goto outgoing",
            f"oifname {ends} goto incoming",
        ),
        *_chain(
            "postrouting",
            "type nat hook postrouting priority srcnat; policy accept;",
            f"ip saddr @slot_addresses oifname != {ends} masquerade",
            *_if(ipv6, f"ip6 saddr @slot_addresses6 oifname != {ends} masquerade"),
        ),
    ]


_ERRORS = "{ destination-unreachable, time-exceeded, parameter-problem }"
_ERRORS_IPV6 = "{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem }"
_NEIGHBOURS = "{} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 hoplimit 255 accept"
_TO_SERVICES = 'ip daddr . meta l4proto . th dport @services accept comment "services of the fleet"'
_TO_INTERNET = (
    "ip daddr @everywhere ip daddr != @denied ip daddr @everywhere meta l4proto { tcp, udp }"
    ' accept comment "the internet, as far as the slot lets it"'
)
_TO_SERVICES_IPV6 = (
    'ip6 daddr . meta l4proto . th dport @services6 accept comment "services of the fleet"'
)
_TO_INTERNET_IPV6 = (
    "ip6 daddr @everywhere6 ip6 daddr != @denied6 ip6 daddr @everywhere6 meta l4proto { tcp, udp }"
    ' accept comment "the internet, as far as the slot lets it"'
)


def _services(config: NetworkConfig, version: int) -> list[tuple[Address, str, int]]:
    return [entry for entry in config.services() if entry[0].version == version]


def _set(name: str, kind: str, elements: Iterable[object]) -> list[str]:
    return [
        f"\tset {name} {{",
        f"\t\t{kind}",
        f"\t\telements = {{ {_elements(elements)} }}",
        "\t}",
    ]


def _chain(name: str, *rules: str) -> list[str]:
    return [f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"]


def _if(condition: object, rule: str) -> list[str]:
    return [rule] if condition else []


def _elements(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _pairs(firsts: Iterable[object], seconds: Iterable[object]) -> list[str]:
    return [f"{first} . {second}" for first, second in zip(firsts, seconds, strict=True)]


def _joined(entries: Iterable[Iterable[object]]) -> list[str]:
    return [" . ".join(map(str, entry)) for entry in entries]


def _number(address: Address | IPv6Address) -> str:
    """An IPv6 address as nft takes it where it compares bits of a packet."""
    return f"0x{int(address):032x}"
