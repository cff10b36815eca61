#!/usr/bin/env python3
"""Loads or removes the machine's rules that keep a local fleet's traffic on the machine.

    closure --load FILE      loads the tables of FILE (`-`: standard input) in one transaction, unless
                             exactly these are loaded; prints `loaded` or `unchanged`
    closure --check FILE     says what --load would do, and does nothing
    closure --remove TABLE   removes the tables of that name; prints `removed` or `absent`
    closure --left TABLE     prints the counters of these tables that should be 0 and are not, with
                             their packets; fails where there is no such counter

Counters begin at 0 only when the rules change. The comment of each table has a digest of the rules,
which tells what is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

FAMILIES = ("inet", "netdev")
STAY_0 = ("left_the_machine", "left_by_uplink")


def fail(message: str) -> None:
    print(f"closure: {message}", file=sys.stderr)
    sys.exit(1)


def nft(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["nft", *arguments], input=stdin, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        fail("this machine has no nft: run `make setup`")
        raise


def loaded(family: str, table: str) -> str:
    """The table as it is loaded, without counts; empty where there is none."""
    return nft("--stateless", "list", "table", family, table).stdout


def verdicts(text: str) -> list[str]:
    """The rules in a text that end with one."""
    return re.findall(r"\b(?:accept|drop)(?: comment \".*\")?$", text, re.MULTILINE)


def load(rules: str, only_say: bool) -> None:
    tables = re.findall(r"^table (\w+) (\w+) \{", rules, re.MULTILINE)
    digest = hashlib.sha256(rules.encode()).hexdigest()[:32]
    marked = re.sub(
        r"^(table \w+ \w+ \{)$", rf'\1\n    comment "rules {digest}"', rules, flags=re.MULTILINE
    )
    # A flush leaves the table with its comment, and without rules.
    listed = [loaded(*table) for table in tables]
    is_whole = len(verdicts("".join(listed))) == len(verdicts(rules))
    if is_whole and all(f'comment "rules {digest}"' in text for text in listed):
        print("unchanged")
        return
    if not only_say:
        # Each table is made if it is missing, so that it can be deleted, so that it is new: nft
        # carries out the whole text or nothing of it.
        anew = "".join(f"table {f} {t} {{}}\ndelete table {f} {t}\n" for f, t in tables)
        outcome = nft("-f", "-", stdin=anew + marked)
        if outcome.returncode:
            fail(f"this machine's kernel does not take the rules: {outcome.stderr.strip()}")
    print("loaded")


def remove(table: str) -> None:
    found = [family for family in FAMILIES if loaded(family, table)]
    for family in found:
        nft("delete", "table", family, table)
    print("removed" if found else "absent")


def left(table: str) -> None:
    found: dict[str, int] = {}
    for family in FAMILIES:
        listed = nft("--json", "list", "counters", "table", family, table)
        if listed.returncode == 0:
            entries = [entry.get("counter", {}) for entry in json.loads(listed.stdout)["nftables"]]
            found |= {e["name"]: e["packets"] for e in entries if e.get("name") in STAY_0}
    if not found:
        fail(f"there is no table {table} with a counter {' or '.join(STAY_0)}")
    for name, packets in found.items():
        if packets:
            print(f"{name}: {packets} packets")


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("--load", "--check", "--remove", "--left"):
        print(__doc__)
        sys.exit(2)
    action, argument = sys.argv[1:]
    if action == "--remove":
        remove(argument)
    elif action == "--left":
        left(argument)
    else:
        rules = sys.stdin.read() if argument == "-" else Path(argument).read_text()
        load(rules, only_say=action == "--check")


main()
