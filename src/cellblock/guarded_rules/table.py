"""The kernel's table: rules are checked, loaded and listed, with nft."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from . import host
from .instance import ROOT, Instance, RulesError, Status

_TOKEN = re.compile(r'"[^"]*"|[{};"]|#|[^\s{};"#]+')
_MAC_OF = re.compile(r"@mac:([^@\s]{1,15})@")
_NFT_ERROR = re.compile(r"^\S+?:(\d+):\d+(?:-\d+)?: Error: (.*)$")


class Table:
    """The table of one instance. Its rules may be one of several, of which it has one at a time."""

    def __init__(self, instance: Instance, root: Path = ROOT) -> None:
        self._instance = instance
        self._interfaces = root / "sys/class/net"

    def name_of(self, text: str) -> str:
        """``table FAMILY NAME`` of these rules."""
        return self._instance.table_of(text)

    # --- The kernel

    def load(self, text: str) -> None:
        """Puts these rules in the place of the table, all in one transaction: there is no moment without
        rules. Raises :class:`RulesError`; nothing has changed then."""
        table = self.name_of(text)
        done = host.run([_nft(), "-f", "-"], _delete(table) + self.expanded(text))
        if done.returncode != 0:
            raise nft_failure(done.stderr, text)
        self._delete_others(table)

    def delete(self) -> None:
        table = self.name_of("")
        done = host.run([_nft(), "-f", "-"], _delete(table))
        if done.returncode != 0:
            raise nft_failure(done.stderr, "")
        self._delete_others(table)

    def listing(self, table: str) -> str | None:
        """The kernel's table as nft prints it; None where there is none."""
        done = host.run([_nft(), *_list(table)])
        if done.returncode == 0:
            return done.stdout
        if "No such file or directory" in done.stderr:
            return None
        raise nft_failure(done.stderr, "")

    def drops(self, table: str) -> dict[str, dict[str, int]]:
        """The table's named counters: name -> packets, bytes."""
        done = host.run([_nft(), "-j", "list", "counters", *table.split()])
        if done.returncode != 0:
            return {}
        entries = [
            entry["counter"] for entry in json.loads(done.stdout)["nftables"] if "counter" in entry
        ]
        return {e["name"]: {"packets": e["packets"], "bytes": e["bytes"]} for e in entries}

    def _delete_others(self, table: str) -> None:
        """Rules of the instance's other kinds, from before."""
        for other in self._instance.tables:
            if f"table {other}" != table:
                # Mostly there is none.
                host.run([_nft(), "delete", "table", *other.split()])

    # --- Rules

    def expanded(self, text: str) -> str:
        """The rules with the hardware addresses that interfaces have now, for ``@mac:NAME@``."""
        for name in set(_MAC_OF.findall(text)):
            mac = host.read(self._interfaces / name / "address")
            if mac is None:
                raise RulesError(
                    Status.LACKING,
                    f"The rules are about the interface {name}, which this host does not have; bring "
                    "it up, or run the role that these rules come from.",
                )
            text = text.replace(f"@mac:{name}@", mac.strip())
        return text

    def check(self, text: str) -> str:
        """Refuses everything but one of the instance's tables that this kernel can load.

        Returns how nft lists the rules. They are really loaded, into a network namespace of their
        own: only that shows whether this kernel has everything. The host's table is compared with
        this listing later; nobody else can have changed it.
        """
        self.check_text(text)
        return self.scratch_listing(text)

    def check_text(self, text: str) -> None:
        table = self.name_of(text)
        tokens = _tokens(text)
        if not tokens:
            raise RulesError(
                Status.REFUSED, f"The rules are empty; they must be one '{table} {{ ... }}'."
            )
        if "include" in tokens:
            raise RulesError(
                Status.REFUSED,
                "The rules include another file; write everything into one text instead.",
            )
        if any(tokens[i : i + 2] == ["flush", "ruleset"] for i in range(len(tokens))):
            raise RulesError(
                Status.REFUSED,
                "The rules contain 'flush ruleset', which would delete other programs' tables; "
                f"leave it out, '{table}' is replaced as a whole anyway.",
            )
        if tokens[:4] != [*table.split(), "{"]:
            raise RulesError(
                Status.REFUSED,
                f"The rules begin with '{' '.join(tokens[:4])}'; they must be one '{table} {{ ... }}' "
                "and touch nothing else.",
            )
        depth = 0
        for position, token in enumerate(tokens):
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth < 0 or (depth == 0 and token == "}" and position < len(tokens) - 1):
                rest = " ".join(tokens[position + 1 : position + 5])
                raise RulesError(
                    Status.REFUSED,
                    f"After the end of '{table} {{ ... }}' the rules go on with '{rest}'; they must "
                    "touch nothing else.",
                )
        if depth != 0:
            raise RulesError(
                Status.REFUSED,
                f"The rules end inside a block: {depth} closing '}}' are missing at their end.",
            )

    def scratch_listing(self, text: str) -> str:
        table = self.name_of(text)
        unshare = host.find_program("unshare", "util-linux")
        if host.run([unshare, "-n", "true"]).returncode != 0:
            raise RulesError(
                Status.LACKING,
                "A network namespace to try the rules in cannot be made; run as root, on a kernel "
                "with network namespaces, with CAP_SYS_ADMIN.",
            )
        script = 'nft=$1; shift; "$nft" -f - && "$nft" list tables && echo -- && "$nft" "$@"'
        devices = set(re.findall(r'\bdevice "([^"]+)"', text))
        if len(devices) == 1:
            # Any interface will do; the one that every namespace has, under the name that is needed.
            script = f"ip link set dev lo name {shlex.quote(devices.pop())} && {script}"
        command = [unshare, "-n", "sh", "-c", script, "sh", _nft(), *_list(table)]
        done = host.run(command, _delete(table) + self.expanded(text))
        if done.returncode != 0:
            raise nft_failure(done.stderr, text)
        tables, listing = done.stdout.split("--\n", 1)
        if tables.split("\n") != [table, ""]:
            raise RulesError(
                Status.REFUSED,
                f"The rules make other tables ({' '.join(tables.split())}) than '{table}'.",
            )
        return listing


def nft_failure(stderr: str, text: str) -> RulesError:
    """nft's message in one sentence, with the line of the rules that it is about."""
    for line in stderr.splitlines():
        match = _NFT_ERROR.match(line)
        if match is None:
            continue
        number = int(match[1]) - _delete("").count("\n")
        lines = text.splitlines()
        source = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        reason = match[2].strip().rstrip(".")
        if reason.startswith("Could not process rule: "):
            return RulesError(
                Status.LACKING,
                f"The kernel refuses line {number} of the rules ({source}): "
                f"{reason.split(': ', 1)[1]}; it lacks what that rule needs: load the kernel's "
                "netfilter modules, or use a kernel that has them.",
            )
        return RulesError(
            Status.REFUSED, f"nft refuses line {number} of the rules ({source}): {reason}."
        )
    reason = " ".join(stderr.split()) or "it gave no reason"
    return RulesError(Status.FAILED, f"nft failed: {reason[:400].rstrip('.')}.")


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        for token in _TOKEN.findall(line):
            if token.startswith("#"):
                break
            if token == '"':
                # nft would go on reading the string in the next line, where we see rules.
                raise RulesError(
                    Status.REFUSED, f"A quotation in line {number} of the rules has no end."
                )
            found.append(token)
    return found


def _nft() -> str:
    return host.find_program("nft", "nftables")


def _delete(table: str) -> str:
    """Deletes a table whether there is one or not. (`destroy table` is unknown to nft 1.0.6.)"""
    return f"add {table}; delete {table}\n"


def _list(table: str) -> list[str]:
    # -s leaves out counters' values, -p names no protocols, which depends on /etc/protocols.
    return ["-s", "-p", "list", *table.split()]
