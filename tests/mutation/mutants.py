"""Mutants of nftables texts: one small change each, as a mistake in a template would be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

UNDECLARED = "9999"
"""A port that no rule names."""

_VERDICT = re.compile(
    r"\b(accept|drop|return|masquerade|reject(?: with [\w -]+?)?|(?:goto|jump) \w+)(?= comment|$)"
)
_FIELD = r"\w+(?: \w+){0,2}"
_CONCATENATION = re.compile(rf"{_FIELD}(?: \. {_FIELD})+ (?:!= )?@\w+ ")
_MATCHES = (
    re.compile(r"\b(?:ip6?|ether) [sd]addr (?:!= )?(?:@\S+|\{[^}]*\}|[\w.:/]+) "),
    re.compile(r"\barp saddr (?:ip|ether) (?:!= )?(?:@\S+|[\w.:/]+) "),
    re.compile(r"\barp daddr ip (?:@\S+|[\w.:/]+) "),
    re.compile(r"\barp operation \w+ "),
    re.compile(r"\bether type (?:!= )?\w+ "),
    re.compile(r"\b(?:iif|oif|iifname|oifname) (?!oif |missing |exists )(?:!= )?[\w\"*]+ "),
    re.compile(r"\bmeta nfproto != \w+ "),
    re.compile(r"\bmeta l4proto (?:\{[^}]*\}|\w+) "),
    re.compile(r"\bct direction \w+ "),
    re.compile(r"\bfib [\w .]+ (?:missing|exists|!= local) "),
    re.compile(r"\btcp flags & [^=]+== \w+ "),
    re.compile(r"\bip6 hoplimit \d+ "),
    re.compile(r"\bexthdr \w+ exists "),
)
_BITS = re.compile(r"((?:ether saddr \. )?@th,\d+,\d+) \{ ([^}]*) \} ")
"""Bits of a packet that nft has no word for, among the elements of a set without a name."""
_WIDER = re.compile(r"\bip6? [sd]addr (?:!= )?(?:\{ )?([0-9a-f:][0-9a-f.:]*(?:/\d+)?) ")
_PROTOCOLS = re.compile(r"\bmeta l4proto \{([^}]*,[^}]*)\}")
_PORT = re.compile(r"\b(tcp|udp|th) ([sd]port) (\{[^}]*\}|\d+) ")
_TYPES = re.compile(r"\b(icmp|icmpv6) type (?:\{ ([^}]*) \}|([\w-]+)) ")
_HEADER = re.compile(r"\s*(chain|set|table)\s+(?:\w+\s+)?(\w+)\s*\{")
_ADDED = re.compile(r"(add rule \w+ \w+ (\w+)) (.*)")
_IPV6 = re.compile(r"ip6|ipv6|icmpv6|_v6\b|exthdr")


@dataclass(frozen=True)
class Mutant:
    """``what`` was done to ``rule`` of ``where`` (a chain or set), and the whole text with it."""

    where: str
    rule: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.rule}"


def mutants(text: str, strangers: Mapping[str, Sequence[str]]) -> Iterator[Mutant]:
    """``strangers``: by a set's name, elements that do not belong into it."""
    lines = text.split("\n")
    where, kind, interval = "", "", False

    def changed(index: int, line: str | None) -> str:
        return "\n".join([*lines[:index], *([] if line is None else [line]), *lines[index + 1 :]])

    for index, line in enumerate(lines):
        header = _HEADER.match(line)
        stripped = line.strip()
        if header:
            kind, where = header.groups()
            interval = False
        elif "flags interval" in stripped:
            interval = True
        elif stripped.startswith("elements ="):
            for what, mutated in _elements(line, strangers.get(where, ()), interval):
                yield Mutant(where, "", what, changed(index, mutated))
        elif added := _ADDED.fullmatch(stripped):
            for what, rule in _rule(added.group(3), strangers):
                whole = None if rule is None else f"{added.group(1)} {rule}"
                yield Mutant(added.group(2), added.group(3), what, changed(index, whole))
        elif kind == "chain" and (policy := re.search(r"policy (accept|drop);", line)):
            other = "drop" if policy.group(1) == "accept" else "accept"
            mutated = line.replace(policy.group(0), f"policy {other};")
            yield Mutant(where, policy.group(0), "swapped", changed(index, mutated))
        elif kind == "chain" and stripped and stripped[0] not in "#}":
            for what, rule in _rule(stripped, strangers):
                yield Mutant(where, stripped, what, changed(index, rule))
        if stripped == "}":
            kind = ""
    if _IPV6.search(text):
        yield Mutant("everything", "", "IPv6 half removed", _without_ipv6(text))
    if "table inet" in text:
        yield Mutant("everything", "", "IPv4 only", _ipv4_only(text))


def _rule(rule: str, strangers: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str | None]]:
    if not _VERDICT.search(rule):
        # It counts or writes, and decides nothing.
        return
    yield "removed", None
    verdict = _VERDICT.search(rule)
    assert verdict is not None
    swapped = "accept" if verdict.group(1).startswith(("drop", "reject", "return")) else "drop"
    yield "verdict swapped", rule[: verdict.start()] + swapped + rule[verdict.end() :]
    rest = rule
    for match in _CONCATENATION.finditer(rule):
        yield f"without {match.group().strip()}", rule[: match.start()] + rule[match.end() :]
        # What is within it is no match of its own.
        rest = rest[: match.start()] + "\0" * len(match.group()) + rest[match.end() :]
    for match in _BITS.finditer(rule):
        field, listed = match.groups()
        before, after = rule[: match.start()], rule[match.end() :]
        yield f"without {field}", before + after
        elements = listed.split(", ")
        for element in elements:
            others = ", ".join(entry for entry in elements if entry != element)
            yield f"{field} without {element}", f"{before}{field} {{ {others} }} {after}"
        for stranger in strangers.get(field, ()):
            yield f"{field} also {stranger}", f"{before}{field} {{ {listed}, {stranger} }} {after}"
        rest = rest[: match.start()] + "\0" * len(match.group()) + rest[match.end() :]
    for pattern in _MATCHES:
        for match in pattern.finditer(rest):
            mutated = rule[: match.start()] + rule[match.end() :]
            yield f"without {match.group().strip()}", mutated
    for match in _WIDER.finditer(rest):
        network = ip_network(match.group(1))
        if network.prefixlen > 1:
            wider = str(network.supernet())
            mutated = rule[: match.start(1)] + wider + rule[match.end(1) :]
            yield f"{network} widened to {wider}", mutated
    for match in _PROTOCOLS.finditer(rest):
        protocols = [entry.strip() for entry in match.group(1).split(",")]
        for protocol in protocols:
            others = ", ".join(entry for entry in protocols if entry != protocol)
            mutated = f"{rule[: match.start(1)]} {others} {rule[match.end(1) :]}"
            yield f"meta l4proto without {protocol}", mutated
    for match in _PORT.finditer(rest):
        protocol, side, ports = match.groups()
        wider = f"{protocol} {side} {{ {ports.strip('{} ')}, {UNDECLARED} }} "
        for what, new in (
            (f"{side} widened", wider),
            (f"any {side}", f"meta l4proto {protocol} " if protocol != "th" else ""),
        ):
            yield what, rule[: match.start()] + new + rule[match.end() :]
    for match in _TYPES.finditer(rest):
        family = match.group(1)
        types = [entry.strip() for entry in (match.group(2) or match.group(3)).split(",")]
        every = {f"without {t}": [u for u in types if u != t] for t in types if len(types) > 1}
        more = "echo-request" if "echo-request" not in types else "echo-reply"
        if "destination-unreachable" in types:
            more = "redirect" if family == "icmp" else "5"  # another that tells of a connection
        every[f"also {more}"] = [*types, more]
        for what, entries in every.items():
            new = f"{family} type {{ {', '.join(entries)} }} "
            yield f"{family} type {what}", rule[: match.start()] + new + rule[match.end() :]


def _elements(line: str, strangers: Sequence[str], interval: bool) -> Iterator[tuple[str, str]]:
    before, _, rest = line.partition("{")
    elements = [entry.strip() for entry in rest.rpartition("}")[0].split(",")]

    def written(entries: list[str]) -> str:
        return f"{before}{{ {', '.join(entries)} }}"

    for element in elements:
        others = [entry for entry in elements if entry != element]
        yield f"{element} removed", written(others) if others else ""
        if interval and strangers:
            network = ip_network(element)
            if network.prefixlen > 0:
                wider = str(network.supernet())
                yield f"{element} widened to {wider}", written([*others, wider])
            if network.prefixlen < network.max_prefixlen:
                narrower = str(next(network.subnets()))
                yield f"{element} narrowed to {narrower}", written([*others, narrower])
    for stranger in strangers:
        yield f"{stranger} added", written([*elements, stranger])


def _without_ipv6(text: str) -> str:
    """Neither a rule nor a set for IPv6 is left."""
    text = re.sub(r"[\t ]+set (?:\w+6|ipv6_\w+) \{[^{}]*(?:\{[^}]*\}\s*)?\}\n", "", text)
    return "\n".join(
        line
        for line in text.split("\n")
        if not _IPV6.search(line.partition(" comment ")[0]) and "nfproto != ipv4" not in line
    )


def _ipv4_only(text: str) -> str:
    """As if the table were written for IPv4: nobody looks at IPv6."""
    text = _without_ipv6(text).replace("table inet ", "table ip ").replace("rule inet ", "rule ip ")
    return (
        re.sub(r"(add quota) inet", r"\1 ip", text)
        .replace("icmpx ", "icmp ")
        .replace("meta nfproto ipv4 ", "")
    )
