"""Mutants that change nothing that anybody could see, each with the reason."""

from __future__ import annotations

import re

# layer, chain or set, what was done, rule; regular expressions for the whole of each
_ALL = ".*"
_SLOT = "slot, policy .*"
_TABLE: tuple[tuple[str, str, str, str, str], ...] = (
    (
        *("slot, policy (cache|allow)", "denied", _ALL, _ALL),
        "no rule of this policy lets anything through that is in it",
    ),
    (
        *(_SLOT, "output", "swapped", _ALL),
        "the chain's last rule refuses all that gets to it, so that its policy is never asked",
    ),
    (
        *(_SLOT, "output", "removed|.* widened to .*", "ip saddr != .*"),
        "the rule after it lets only the slot's own address into `allowed`; the rest is refused",
    ),
    (
        *(_SLOT, "output", r"without ip6? saddr .*|.* widened to .*", "ip6? saddr .* jump allowed"),
        "the rule before it has dropped every other source",
    ),
    (
        *(
            _SLOT,
            "output",
            "removed|icmpv6 type without .*",
            "icmpv6 type .*mld-listener-report.* drop",
        ),
        "the rule after it drops them too, and counts them as refused, which tests/unit/test_slots.py sees",
    ),
    (
        *(_SLOT, "(outgoing|incoming|opening)", "(removed|verdict swapped)"),
        ".* counter name (throttled|over_bytes|over_connections) .*",
        "a limit of how much, not of whom; limits are proven in tests/unit/test_slots.py",
    ),
    (
        *(_SLOT, "outgoing", _ALL, "tcp flags & rst == rst counter name sent accept"),
        "what is used up does not hold back an ending; tests/unit/test_slots.py proves it",
    ),
    (
        *("firewall of .*", "connections", _ALL, _ALL),
        "a limit of how much, not of whom; molecule/fleet/tests/job_networks/test_shares.py proves it",
    ),
    (
        *("firewall of .*", "input", "removed", "ct state new jump connections"),
        "only counts; molecule/fleet/tests/job_networks/test_shares.py proves it",
    ),
    (
        *("slot, policy allow", "allowed", "removed", "ip daddr @denied return"),
        "the one address of this list is none of those; the layer with all of 0.0.0.0/0 proves the rule",
    ),
    (
        *("firewall of cache1", "fleet_v[46]", r".*15/\d+ widened to .*", ""),
        "the address that it adds is the host's own",
    ),
    (
        *("firewall of master1", "cache_servers_v[46]", r".*14/\d+ widened to .*", ""),
        "the address that it adds is the host's own",
    ),
    (
        *("firewall of cache1", "input|output", "removed", '.* "jobs, policy cache(: replies)?"'),
        "the rule of policy internet opens the same to the same addresses",
    ),
    (
        *("firewall of .*", "controllers_v[46]", r"(10\.99\.0\.|fd00:99::)5.*", ""),
        "this controller is not behind the interface that is probed; the rule against spoofing closes it",
    ),
    (
        *("firewall of .*", "input|output", "icmp(v6)? type also echo-(reply|request)"),
        ".* ct direction (original|reply) accept .*",
        "connection tracking finds no connection for a reply without a request, nor for a request "
        "the other way",
    ),
    (
        *("firewall of .*", "input|output", "without meta l4proto tcp", ".* with tcp reset .*"),
        "nft adds this match by itself to a rule that resets",
    ),
    (
        *(
            "firewall of .*",
            "input|output",
            "without ct direction .*",
            "ip6? .* icmp(v6)? type echo-.*",
        ),
        "connection tracking takes a request for the one direction and a reply for the other, always",
    ),
    (
        *(
            "forward of .*",
            "forward",
            "(without ip6? daddr|(10.213.0.128/27|fd00:cb::ad5:80/123) widened).*",
            'oifname "cbj.*',
        ),
        "the host has no routes to jobs' interfaces but those of the slots' addresses",
    ),
    (
        *("slot, frames", "egress", "without ether type arp", _ALL),
        "a match on an address of that protocol looks at its packets only",
    ),
    (
        *(
            "(firewall|forward) of .*",
            "input|output|forward",
            "swapped|removed",
            "policy drop;|drop",
        ),
        "the chain's last rule and its policy drop the same; the rule is there for the moment while the "
        "table is being replaced",
    ),
    (
        *("firewall of .*", "input|output", "without ip6? [sd]addr @resets_v[46]", ".*"),
        "the set holds every address; it is there for the moment while the table is being replaced",
    ),
)


_FRAMES, _ROUTED = "guard, mode macvlan(, IPv6)?", "guard, mode routed(, IPv6)?"
_COUNTED = "what comes to it comes to a drop anyway; the rule counts it under another name"
_TABLE += (
    (
        *(_FRAMES, "host", r"without ether type \w+", _ALL),
        "a match on an address of that protocol looks at its packets only",
    ),
    (
        *("guard, mode .*", "(outgoing|incoming)6?", "without ip6? [sd]addr @everywhere6?", _ALL),
        "the set holds every address; it is there for the moment while the table is being replaced",
    ),
    (*(_FRAMES, "outgoing6?", "removed", "counter name refused_out drop"), _COUNTED),
    (*(_FRAMES, "egress", "removed|without .*", "ether saddr @slot_macs .* drop"), _COUNTED),
    (*("guard, mode macvlan", "everything", "IPv6 half removed", ""), _COUNTED),
    (
        *(_FRAMES, "egress", "swapped", "policy drop;"),
        "the chain's last rule drops all that gets to it, so that its policy is never asked",
    ),
    (
        *(_FRAMES, "egress", "removed", "counter name spoofed drop"),
        "the chain's policy drops it as well; the rule counts it",
    ),
    (
        *(_ROUTED, "denied", "127.0.0.0/8 (removed|narrowed .*)", ""),
        "the host has these addresses itself, so that the chain input refuses them",
    ),
    (
        *(_ROUTED, "prerouting", "removed|verdict swapped", ".* meta nfproto != ipv4 .*"),
        "what slots send is let through by its IPv4 address only, and to the host nothing is; the rule "
        "says so once more",
    ),
    (
        *(_ROUTED, "input|output", r'without [io]ifname "cbj\*"', ".* icmp(v6)? type .* accept.*"),
        "the chain's policy accepts whatever is not of a job or for one",
    ),
    (
        *(_ROUTED, "incoming", "icmp type also redirect", _ALL),
        "the kernel drops redirects about connections whose address it translates, and it does so "
        "with all of them",
    ),
    (
        *(_ROUTED, "forward", "removed", '.* comment "job to job"'),
        "slots' addresses are in `denied` as well; the rule says so once more, whatever that has",
    ),
    (
        *(_ROUTED, "postrouting", 'without oifname != "cbj\\*"', _ALL),
        "nothing of a job's comes to another one, under whatever address",
    ),
)


def reason(layer: str, where: str, what: str, rule: str) -> str:
    """Why it changes nothing; empty for a mutant that must be noticed."""
    for *patterns, why in _TABLE:
        if all(
            re.fullmatch(p, v) for p, v in zip(patterns, (layer, where, what, rule), strict=True)
        ):
            return why
    return ""


def reasons() -> set[str]:
    """All that are given: one that no mutant needs is to be removed."""
    return {row[-1] for row in _TABLE}
