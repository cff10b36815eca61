"""Loads, guards and rolls back one nftables table of the host's own.

A new rule set is loaded on trial: a timer of systemd's brings the earlier one back unless
`confirm` comes first. Only a confirmed one survives a reboot. Other tables are never touched.

    apply [FILE]   check the rules, start the rollback timer, load them
    confirm        keep them: stop the timer, write them down
    rollback       back to the confirmed rules, or to no table where there are none
    check [FILE]   only check the rules, in a network namespace that is thrown away
    load           load the confirmed rules (at boot)
    guard          repair the table whenever it is not what was loaded (a unit runs it)
    status         what is loaded, and how the kernel's table differs from it
    remove         take away the table and what is recorded of it

In the rules @mac:NAME@ stands for the hardware address that interface NAME has when they are loaded.

Exit status: 0 done; 1 failed; 2 wrong use; 3 rules refused; 4 the host or its kernel lacks
something that the rules need; 5 nothing waits for confirmation (any more); 6 (status) the kernel's
table is not what was loaded; 7 (load) the confirmed rules did not load, a minimal set is in place;
8 busy: other rules wait for confirmation, or these are not loaded yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TypedDict

from . import host
from .compare import Item, compare
from .instance import ROOT, Instance, RulesError, Status
from .records import digest
from .trial import GuardedTable


def main(instance: Instance, arguments: list[str], root: Path = ROOT) -> int:
    """Does what ``arguments`` say with the rules of ``instance``; returns the exit status."""
    options = _parser(instance).parse_args(arguments)
    try:
        if os.geteuid() != 0:
            raise RulesError(
                Status.LACKING, "Only root may look at and change the rules; run it as root."
            )
        return _do(GuardedTable(instance, root), options)
    except RulesError as failure:
        print(f"{instance.name}: {failure}", file=sys.stderr)
        return failure.status
    except OSError as error:
        print(f"{instance.name}: {error}.", file=sys.stderr)
        return Status.FAILED


def _do(rules: GuardedTable, options: argparse.Namespace) -> Status:
    if options.command == "apply":
        _apply(rules, options)
    elif options.command == "check":
        rules.table.check(_rules_from(options.file))
    elif options.command == "confirm":
        rules.confirm(options.token)
    elif options.command == "rollback":
        print(f"Rolled back: {rules.rollback(options.token)}.")
    elif options.command == "load-pending":
        rules.load_pending(options.token)
    elif options.command == "load":
        rules.load_confirmed()
    elif options.command == "guard":
        from .watch import Guard  # what other commands need not wait for

        Guard(rules, options.foreign_rules).run()
    elif options.command == "remove":
        rules.remove()
    else:
        found = status(rules)
        if options.json:
            print(json.dumps(found))
        else:
            _print_status(found)
        in_place = found["state"] in ("loaded", "pending")
        if not in_place or found["missing"] or found["added"]:
            return Status.DIFFERS
    return Status.DONE


def _apply(rules: GuardedTable, options: argparse.Namespace) -> None:
    after = options.rollback_after
    if after < options.load_after + 1:
        raise RulesError(Status.USAGE, f"--rollback-after {after:g} leaves no time to confirm.")
    rules.apply(
        _rules_from(options.file),
        {"controllers": options.controllers.split(","), "ssh_port": options.ssh_port}
        if options.controllers
        else None,
        after,
        options.load_after,
        options.token or os.urandom(16).hex(),
    )
    name = rules.instance.name
    print(f"On trial: over a new connection, say '{name} confirm' within {after:g} s.")


def _rules_from(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RulesError(Status.USAGE, f"The rules in {file} cannot be read: {error}.") from error


# --- Status ---------------------------------------------------------------------------------------


class PendingStatus(TypedDict):
    token: str
    phase: str
    error: str | None
    seconds_left: float


class RulesStatus(TypedDict):
    """What `status --json` prints."""

    state: str
    """none, loaded, pending, or fallback."""
    table: bool
    """Whether there is one in the kernel."""
    missing: list[Item]
    added: list[Item]
    drops: dict[str, dict[str, int]]
    """Named counters: packets and bytes."""
    sha256: str | None
    confirmed_sha256: str | None
    pending: PendingStatus | None
    rolled_back: str | None
    """The token of the trial that was rolled back last."""


def status(rules: GuardedTable) -> RulesStatus:
    """Read-only, and so without the lock: it may be asked for at any time."""
    records = rules.records
    loaded, confirmed = records.loaded(), records.confirmed()
    pending, back = records.pending(), records.rolled_back()
    table = rules.table.name_of(loaded["text"] if loaded else confirmed or "")
    live = rules.table.listing(table)
    missing: list[Item] = []
    added: list[Item] = []
    if loaded:
        missing, added = compare(table, loaded["listing"], live)
    elif live is not None:
        missing, added = compare(table, f"{table} {{\n}}", live)
    return {
        "state": loaded["state"] if loaded else "none",
        "table": live is not None,
        "missing": missing,
        "added": added,
        "drops": rules.table.drops(table) if live is not None else {},
        "sha256": loaded["sha256"] if loaded else None,
        "confirmed_sha256": digest(confirmed) if confirmed is not None else None,
        "pending": {
            "token": pending["token"],
            "phase": pending["phase"],
            "error": pending["error"],
            "seconds_left": round(max(0.0, pending["deadline"] - host.uptime()), 1),
        }
        if pending
        else None,
        "rolled_back": back["token"] if back else None,
    }


def _print_status(found: RulesStatus) -> None:
    words = {
        "loaded": "The confirmed rules are loaded.",
        "pending": "New rules are loaded and wait for confirmation.",
        "fallback": "The confirmed rules did not load; only ssh from the controllers is admitted.",
        "none": "No rules are loaded.",
    }
    print(words[found["state"]])
    if found["pending"] and found["state"] == "pending":
        print(f"Without confirmation they roll back in {found['pending']['seconds_left']:.0f} s.")
    for kind, items in (("missing", found["missing"]), ("added", found["added"])):
        for item in items:
            print(f"{kind}: {item['object']}: {item['text']}")
    for name, counter in found["drops"].items():
        print(f"{name}: {counter['packets']} packets, {counter['bytes']} bytes")


# --- Command line ---------------------------------------------------------------------------------


def _parser(instance: Instance) -> argparse.ArgumentParser:
    def seconds(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 3600:
            raise ValueError
        return value

    def token(text: str) -> str:
        if not re.fullmatch("[0-9a-f]{16,64}", text):
            raise ValueError
        return text

    tables = " or ".join(f"table {table}" for table in instance.tables)
    top = argparse.ArgumentParser(
        prog=instance.name,
        description=f"{__doc__}\nHere the table is {tables}, its confirmed rules are in {instance.rules}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("apply", help="load rules on trial")
    command.add_argument(
        "file", nargs="?", default="-", help="the rules; - or none: standard input"
    )
    command.add_argument(
        "--controllers",
        metavar="ADDRESS,...",
        help="who keeps ssh if the rules do not load at a boot; without it, who did before",
    )
    command.add_argument("--ssh-port", type=int, default=22, help="with --controllers")
    command.add_argument("--rollback-after", type=seconds, default=30.0, metavar="SECONDS")
    command.add_argument(
        "--load-after",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="load them in the background",
    )
    command.add_argument(
        "--token", type=token, default=None, help="name of this trial (hex digits)"
    )
    command = commands.add_parser("check", help="only check rules")
    command.add_argument("file", nargs="?", default="-")
    for name in ("confirm", "rollback"):
        command = commands.add_parser(name)
        command.add_argument("--token", type=token, default=None)
    command = commands.add_parser("load-pending")
    command.add_argument("--token", type=token, required=True)
    command = commands.add_parser("guard")
    command.add_argument(
        "--foreign-rules",
        choices=("remove", "report"),
        default="remove",
        help="what to do with what somebody adds to the table",
    )
    for name in ("load", "remove"):
        commands.add_parser(name)
    command = commands.add_parser("status")
    command.add_argument("--json", action="store_true")
    return top
