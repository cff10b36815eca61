"""How the kernel's table differs from the one that was loaded, from nft's listings of both."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypedDict

Listing = dict[str, list[str]]


class Item(TypedDict):
    """One difference."""

    object: str
    """Like ``chain input`` or ``set masters_v4``."""
    text: str
    """The rule, the element as ``element 10.0.0.1``, or a description."""


def compare(table: str, recorded: str, live: str | None) -> tuple[list[Item], list[Item]]:
    """What of the recorded table the live one lacks, and what it has besides.

    Rules that changed places are both missing and added, because places matter. The elements of sets
    that rules themselves fill while packets pass are nobody's doing and not looked at.
    """
    if live is None:
        return [{"object": table, "text": "the whole table"}], []
    wanted, found = parse_listing(recorded), parse_listing(live)
    filled_by_rules = _filled_by_rules(wanted)
    for name in filled_by_rules & found.keys():
        for objects in (wanted, found):
            objects[name] = [line for line in objects[name] if not line.startswith("element ")]
    missing: list[Item] = []
    added: list[Item] = []
    flags = found.pop("", [])
    if flags != wanted.pop("", []):
        # `flags dormant` switches the table off.
        missing.append({"object": table, "text": f"being without '{'; '.join(flags)}'"})
    for name, lines in wanted.items():
        if name not in found:
            missing.append({"object": name, "text": f"the whole {name}"})
        elif name.startswith("chain "):
            lacking, new = _differences(lines, found[name])
            missing += [{"object": name, "text": text} for text in lacking]
            added += [{"object": name, "text": text} for text in new]
        else:
            missing += [{"object": name, "text": t} for t in lines if t not in found[name]]
            added += [{"object": name, "text": t} for t in found[name] if t not in lines]
    for name, lines in found.items():
        if name not in wanted:
            added += [{"object": name, "text": text} for text in lines or ["(empty)"]]
    return missing, added


def shown(items: Iterable[Item]) -> str:
    return "; ".join(f"{item['object']}: {item['text']}" for item in items)


def parse_listing(listing: str) -> Listing:
    """nft's listing of one table as object ('chain input', 'set a_v4') -> its lines in order.

    The elements of a set become a line each. Rules as they were written can be taken apart as well, and differ from
    any listing.
    """
    objects: Listing = {}
    name = ""
    statement = ""
    depth = 0
    for raw in listing.splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        bare = re.sub(r'"[^"]*"', '""', line)
        change = bare.count("{") - bare.count("}")
        if statement:
            statement += f" {line}"
            depth += change
        elif not objects and not name and line.startswith("table "):
            objects[""] = []
            continue
        elif line == "}":
            name = ""
            continue
        elif not name and change == 1 and line.endswith("{"):
            name = line[:-1].strip()
            objects[name] = []
            continue
        else:
            statement, depth = line, change
        if depth <= 0:
            objects.setdefault(name, []).extend(_lines_of(statement))
            statement = ""
    return {key: lines for key, lines in objects.items() if key or lines}


def _lines_of(statement: str) -> Iterable[str]:
    if re.match(r"packets \d+ bytes \d+$", statement):
        return []
    elements = re.match(r"elements = \{ ?(.*?) ?\}$", statement)
    if elements is None:
        return [statement]
    parts = re.findall(r'(?:"[^"]*"|\{[^}]*\}|[^,"{])+', elements[1])
    return [f"element {' '.join(part.split())}" for part in parts]


def _differences(wanted: list[str], found: list[str]) -> tuple[list[str], list[str]]:
    if wanted == found:
        return [], []
    import difflib  # not needed by most calls, and each of them pays for its import

    missing: list[str] = []
    added: list[str] = []
    matcher = difflib.SequenceMatcher(None, wanted, found, autojunk=False)
    for _, start, end, other_start, other_end in matcher.get_opcodes():
        if wanted[start:end] != found[other_start:other_end]:
            missing += wanted[start:end]
            added += found[other_start:other_end]
    return missing, added


def _filled_by_rules(objects: Listing) -> set[str]:
    """The sets and maps to which rules add while packets pass (`add @seen { ip saddr }`)."""
    names = {
        name
        for name, lines in objects.items()
        if any(re.match(r"flags\b.*\bdynamic\b", line) for line in lines)
    }
    rules = "\n".join(
        line for name, lines in objects.items() if name.startswith("chain ") for line in lines
    )
    for name in re.findall(r"\b(?:add|update|delete) @(\S+) \{", re.sub(r'"[^"]*"', '""', rules)):
        names |= {f"set {name}", f"map {name}"} & objects.keys()
    return names
