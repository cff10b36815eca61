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
        *(_SLOT, "output", "removed", "ip saddr != .*"),
        "the rule after it lets only the slot's own address into `allowed`; the rest is refused",
    ),
    (
        *(_SLOT, "output", "without ip saddr .*", "ip saddr .* jump allowed"),
        "the rule before it has dropped every other source",
    ),
    (
        *(_SLOT, "input", "removed", "ip daddr != .*"),
        "what follows lets replies in only, and those go to the slot's own address",
    ),
    (
        *(_SLOT, "(outgoing|incoming)", "(removed|verdict swapped)"),
        ".* counter name (throttled|over_bytes|over_connections) .*",
        "a limit of how much, not of whom; limits are proven in tests/unit/test_slots.py",
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
        *("firewall of .*", "input|output", "without ip6? saddr @resets_v[46]", ".*"),
        "the set holds every address; it is there for the moment while the table is being replaced",
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
