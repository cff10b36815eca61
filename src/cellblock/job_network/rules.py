"""The rules in a slot, as nftables text: closed before it has a policy, opened for one stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .access import Access
from .plan import INTERFACE, Network, collapsed
from .policy import EgressRule
from .section import NetworkConfig


class TrafficLimits(Protocol):
    """Of a stage's constraints, those that its slot enforces."""

    @property
    def network_bytes(self) -> int: ...
    @property
    def network_bytes_per_second(self) -> int: ...
    @property
    def network_connections(self) -> int: ...
    @property
    def network_connections_per_second(self) -> int: ...


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
    mac = config.mac(slot)
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
        elements = {{ {_elements(config.all_denied(), 4)} }}
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
    mac = config.mac(slot)
    denied = _elements(config.all_denied(), 6)
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


def open_rules(config: NetworkConfig, access: Access, limits: TrafficLimits) -> str:
    """What opens a closed slot for one stage, to be loaded in one transaction.

    In both directions, what is throttled costs no quota.
    """
    table = "inet cellblock"
    rate = limits.network_bytes_per_second
    flow = [
        f"limit rate over {rate} bytes/second counter name throttled drop",
        "quota name volume counter name over_bytes drop",
    ]
    # Packets of a connection that is neither new nor tracked any more are nothing that was allowed.
    # Without an answer, every packet of an exchange is "new": the mark tells the first. One of TCP
    # that is dropped here is sent again a second later.
    opens = limits.network_connections_per_second
    opening = [
        "ct state != new counter name refused drop",
        f"ct mark 0 limit rate over {opens}/second burst {opens} packets counter name throttled drop",
        f"ct count over {limits.network_connections} counter name over_connections "
        "reject with icmpx admin-prohibited",
        "ct mark set 1",
        "goto outgoing",
    ]
    # The rule that opens comes last; the kernel takes all of them at once anyway.
    commands = [
        "add rule arp cellblock input accept",
        f"add quota {table} volume {{ over {limits.network_bytes} bytes }}",
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
    allowed = [rule for egress in access.rules.services for rule in _matches(egress)]
    if access.rules.internet:
        allowed.append("ip daddr @denied return")
        allowed += [] if config.ipv6 is None else ["ip6 daddr @denied_v6 return"]
    allowed += [rule for egress in access.rules.internet for rule in _matches(egress)]
    commands += [f"add rule {table} allowed {rule}" for rule in allowed]
    return "\n".join(commands)


def _matches(egress: EgressRule) -> list[str]:
    """Rules, one for each version of IP unless it is everywhere."""
    ports = f"{egress.protocol} dport {_one_or_set(sorted(set(egress.ports)))} goto opening"
    if egress.to is None:
        return [ports]
    to = collapsed(egress.to)
    found = []
    for keyword, version in (("ip", 4), ("ip6", 6)):
        networks = [network for network in to if network.version == version]
        if networks:
            found.append(f"{keyword} daddr {_one_or_set(networks)} {ports}")
    return found


def _elements(networks: Sequence[Network], version: int) -> str:
    return ", ".join(str(network) for network in networks if network.version == version)


def _one_or_set(values: Sequence[object]) -> str:
    return str(values[0]) if len(values) == 1 else f"{{ {', '.join(map(str, values))} }}"
