# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""Which packages came to a host because of us, with their accounts and directories; kept on the host
until they are removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Runs a command and gives its exit code, output and errors, as AnsibleModule.run_command does.
Run = Callable[[Sequence[str]], "tuple[int, str, str]"]

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*(:[a-z0-9-]+)?\Z")


class RecordError(Exception):
    """What is wrong, in one sentence, and what to do."""


@dataclass(frozen=True)
class State:
    """What is on the host: packages that are installed, those of which only configuration is left,
    and the accounts."""

    packages: frozenset[str] = frozenset()
    configuration: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    directories: frozenset[str] = frozenset()


@dataclass
class Record:
    """What came because of us. ``kept`` are packages whose configuration had been there before."""

    packages: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    # Where packages put something, and which purging does not always take away.
    directories: set[str] = field(default_factory=set)


@dataclass
class Removal:
    """What a removal takes away, and what it must leave: other packages need it."""

    purge: set[str] = field(default_factory=set)
    remove: set[str] = field(default_factory=set)
    leave: dict[str, list[str]] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    directories: set[str] = field(default_factory=set)


def checked(run: Run, command: Sequence[str]) -> str:
    code, output, errors = run(command)
    if code != 0:
        last = (errors.strip() or output.strip() or "no message").splitlines()[-1]
        raise RecordError(
            f"{' '.join(command[:2])} failed with exit code {code} ({last});"
            " put the host's packages in order with 'apt-get --fix-broken install' and run again."
        )
    return output


def parse_packages(listing: str, native: str) -> tuple[frozenset[str], frozenset[str]]:
    """dpkg-query's lines 'status package architecture', as names that apt understands."""
    installed, configuration = set(), set()
    for line in listing.splitlines():
        status, package, architecture = line.split()
        name = package if architecture in (native, "all") else f"{package}:{architecture}"
        if status == "config-files":
            configuration.add(name)
        elif status != "not-installed":
            installed.add(name)
    return frozenset(installed), frozenset(configuration)


def read_state(run: Run, root: Path = Path("/")) -> State:
    native = checked(run, ["dpkg", "--print-architecture"]).strip()
    shown = "--showformat=${db:Status-Status} ${Package} ${Architecture}\n"
    installed, configuration = parse_packages(checked(run, ["dpkg-query", "--show", shown]), native)
    return State(
        packages=installed,
        configuration=configuration,
        # The files, not getent: accounts of a directory service are none of this host's.
        users=_names(root / "etc/passwd"),
        groups=_names(root / "etc/group"),
        directories=frozenset(_directories(root)),
    )


def _directories(root: Path) -> Iterable[str]:
    """The directories in which packages put things."""
    for top in ("etc", "opt", "usr"):
        for path, _, _ in os.walk(root / top):
            yield path
    # Data may be large here. What a package brings along itself is near the top.
    for top in ("var/cache", "var/lib", "var/log", "var/spool"):
        for pattern in ("*", "*/*"):
            for found in (root / top).glob(pattern):
                if found.is_dir() and not found.is_symlink():
                    yield str(found)


def _names(path: Path) -> frozenset[str]:
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return frozenset(line.split(":")[0] for line in lines if ":" in line)


class Store:
    """The files in the directory of the record, written so that each is whole or absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.before = directory / "before-installation.json"
        self.packages = directory / "packages"
        self.accounts = directory / "accounts"
        self.directories = directory / "directories"

    def note(self, state: State) -> bool:
        """Keeps what there is before an installation. What an interrupted one left counts on."""
        if self.before.exists():
            return False
        content = {name: sorted(getattr(state, name)) for name in State.__dataclass_fields__}
        self._write(self.before, json.dumps(content) + "\n")
        return True

    def noted(self) -> State | None:
        try:
            content = json.loads(self.before.read_text(encoding="utf-8"))
            return State(**{name: frozenset(content[name]) for name in State.__dataclass_fields__})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{self.before} is damaged ({error}): it says what was installed before us; remove"
                " it and add by hand to the file 'packages' beside it what should be purged with us."
            ) from error

    def read(self) -> Record:
        record = Record()
        for number, words in self._lines(self.packages):
            good = len(words) in (1, 2) and _NAME.match(words[0])
            if not good or words[1:] not in ([], ["configuration-was-there"]):
                raise self._damaged(self.packages, number)
            (record.kept if words[1:] else record.packages).add(words[0])
        for number, words in self._lines(self.accounts):
            if len(words) != 2 or words[0] not in ("user", "group"):
                raise self._damaged(self.accounts, number)
            (record.users if words[0] == "user" else record.groups).add(words[1])
        for number, words in self._lines(self.directories):
            if len(words) != 1 or not words[0].startswith("/"):
                raise self._damaged(self.directories, number)
            record.directories.add(words[0])
        return record

    def write(self, record: Record) -> None:
        packages = {*record.packages, *(f"{name} configuration-was-there" for name in record.kept)}
        accounts = {f"user {name}" for name in record.users} | {
            f"group {name}" for name in record.groups
        }
        self._write(self.packages, "".join(f"{line}\n" for line in sorted(packages)))
        self._write(self.accounts, "".join(f"{line}\n" for line in sorted(accounts)))
        directories = sorted(record.directories)
        self._write(self.directories, "".join(f"{line}\n" for line in directories))

    def settle(self) -> None:
        self.before.unlink(missing_ok=True)

    def clear(self) -> None:
        for path in (self.packages, self.accounts, self.directories, self.before):
            path.unlink(missing_ok=True)

    @staticmethod
    def _lines(path: Path) -> Iterable[tuple[int, list[str]]]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]

    @staticmethod
    def _damaged(path: Path, number: int) -> RecordError:
        return RecordError(
            f"{path}, line {number}, is none of ours; correct it, as the removal purges what the"
            " file names."
        )

    def _write(self, path: Path, content: str) -> None:
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(content, encoding="utf-8")
        scratch.chmod(0o644)
        with scratch.open("rb") as opened:
            os.fsync(opened.fileno())
        scratch.replace(path)


def added(run: Run, record: Record, before: State, after: State) -> Record:
    """The record with what an installation added to the host."""
    new = after.packages - before.packages
    contents = checked(run, ["dpkg-query", "--listfiles", *sorted(new)]) if new else ""
    directories = set(contents.splitlines()) & (after.directories - before.directories)
    return Record(
        packages=record.packages | (new - before.configuration),
        kept=record.kept | (new & before.configuration),
        users=record.users | (after.users - before.users),
        groups=record.groups | (after.groups - before.groups),
        # A name with white space would not fit into the record; no package has one.
        directories=record.directories | {name for name in directories if not name.split()[1:]},
    )


def removed_with(run: Run, names: Iterable[str]) -> set[str]:
    """All packages that apt would remove together with these."""
    wanted = sorted(names)
    if not wanted:
        return set()
    output = checked(run, [*APT_GET, "--simulate", "purge", *wanted])
    found = (re.match(r"(?:Remv|Purg) (\S+)", line) for line in output.splitlines())
    return {match[1] for match in found if match}


APT_GET = (
    "apt-get",
    "--yes",
    "--quiet",
    "--option=APT::Get::AutomaticRemove=false",
    "--option=DPkg::Lock::Timeout=120",
)


def plan_removal(run: Run, record: Record, state: State) -> Removal:
    """What of the record can go without taking anything away that is not in the record."""
    there = state.packages | state.configuration
    ours = (record.packages | record.kept) & there
    # Asked one by one only when something else would go with them: then each that something else
    # needs stays, and so do those that it needs itself, since they would take the same with them.
    leave: dict[str, list[str]] = {}
    if removed_with(run, ours) - ours:
        for name in sorted(ours):
            others = removed_with(run, [name]) - ours
            if others:
                leave[name] = sorted(others)
    go = ours - set(leave)
    return Removal(
        purge=go & record.packages,
        remove=go & record.kept & state.packages,
        leave=leave,
        # Whose account is whose is not known; where a package stays, its account must.
        users=set() if leave else record.users & state.users,
        groups=set() if leave else record.groups & state.groups,
        directories=set() if leave else record.directories & state.directories,
    )


def carry_out(run: Run, removal: Removal, root: Path = Path("/")) -> None:
    for action, names in (("remove", removal.remove), ("purge", removal.purge)):
        if names:
            checked(run, [*APT_GET, action, *sorted(names)])
    for name in sorted(removal.users & _names(root / "etc/passwd")):
        checked(run, ["userdel", name])
    # A user's own group goes with the user.
    for name in sorted(removal.groups):
        if name in _names(root / "etc/group"):
            checked(run, ["groupdel", name])
    # The deepest first; what holds something else by now stays.
    for name in sorted(removal.directories, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(name)


def lines(removal: Removal) -> list[str]:
    """What goes, as text for a diff."""
    return [
        *(f"package {name}" for name in sorted(removal.purge | removal.remove)),
        *(f"user {name}" for name in sorted(removal.users)),
        *(f"group {name}" for name in sorted(removal.groups)),
    ]


def as_result(removal: Removal) -> dict[str, Any]:
    return {
        "packages": sorted(removal.purge | removal.remove),
        "users": sorted(removal.users),
        "groups": sorted(removal.groups),
        "left": removal.leave,
    }
