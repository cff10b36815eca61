# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0

"""The record of packages against a host that is made up: packages with what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils._package_record import (
    Record,
    RecordError,
    State,
    Store,
    added,
    carry_out,
    parse_packages,
    plan_removal,
    read_state,
)


class Host:
    """Answers dpkg and apt-get. `needs` are the dependencies of the installed packages."""

    def __init__(self, needs: dict[str, list[str]]) -> None:
        self.needs = needs
        self.ran: list[list[str]] = []

    def removed_with(self, names: set[str]) -> set[str]:
        gone = set(names)
        while True:
            more = {name for name, needed in self.needs.items() if gone & set(needed)} - gone
            if not more:
                return gone
            gone |= more

    def __call__(self, command: Sequence[str]) -> tuple[int, str, str]:
        self.ran.append(list(command))
        if command[0] == "dpkg":
            return 0, "amd64\n", ""
        if command[0] == "dpkg-query" and "--listfiles" in command:
            return 0, "/usr\n/usr/lib/new\n/usr/lib/new/file\n", ""
        if command[0] == "dpkg-query":
            return 0, "".join(f"installed {name} amd64\n" for name in self.needs), ""
        if "--simulate" in command:
            names = set(command[command.index("purge") + 1 :])
            gone = self.removed_with(names)
            return 0, "".join(f"Purg {name} [1.0]\n" for name in sorted(gone)), ""
        return 0, "", ""


def state(host: Host) -> State:
    return State(packages=frozenset(host.needs))


def test_names_as_apt_understands_them() -> None:
    installed, configuration = parse_packages(
        "installed libpq5 amd64\ninstalled zlib1g i386\ninstalled netbase all\n"
        "config-files old amd64\nnot-installed never amd64\nhalf-configured broken amd64\n",
        "amd64",
    )
    assert installed == {"libpq5", "zlib1g:i386", "netbase", "broken"}
    assert configuration == {"old"}


def test_reading_a_host(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "var/lib/redis/a/b").mkdir(parents=True)
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nadm:x:4:\n")
    found = read_state(Host({"bash": []}), tmp_path)
    assert found.packages == {"bash"}
    assert found.users == {"root"}
    assert found.groups == {"root", "adm"}
    assert str(tmp_path / "var/lib/redis/a") in found.directories
    assert str(tmp_path / "var/lib/redis/a/b") not in found.directories


def test_only_what_came_is_recorded() -> None:
    before = State(
        packages=frozenset({"bash"}),
        configuration=frozenset({"old"}),
        users=frozenset({"root"}),
        directories=frozenset({"/usr"}),
    )
    after = State(
        packages=frozenset({"bash", "new", "old"}),
        users=frozenset({"root", "new"}),
        groups=frozenset({"new"}),
        directories=frozenset({"/usr", "/usr/lib/new", "/usr/lib/others"}),
    )
    record = added(Host({}), Record(packages={"earlier"}), before, after)
    assert record == Record(
        packages={"earlier", "new"},
        kept={"old"},
        users={"new"},
        groups={"new"},
        directories={"/usr/lib/new"},
    )


def test_the_store_keeps_everything(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep")
    assert (store.noted(), store.read()) == (None, Record())
    first = State(packages=frozenset({"bash"}), users=frozenset({"root"}))
    assert store.note(first)
    # An interrupted installation's note counts on.
    assert not store.note(State(packages=frozenset({"bash", "half"})))
    assert store.noted() == first
    record = Record({"a", "b:i386"}, {"c"}, {"user"}, {"group"}, {"/usr/lib/a"})
    store.write(record)
    store.settle()
    assert (store.noted(), store.read()) == (None, record)
    store.clear()
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("packages", "--allow-remove-essential\n"),
        ("packages", "a b\n"),
        ("accounts", "root\n"),
        ("directories", "usr\n"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(RecordError, match=f"{file}, line 1"):
        Store(tmp_path).read()


def test_everything_goes_where_nobody_needs_it() -> None:
    host = Host({"bash": [], "server": ["lib"], "lib": []})
    removal = plan_removal(host, Record(packages={"server", "lib", "gone"}), state(host))
    assert (removal.purge, removal.leave) == ({"server", "lib"}, {})


def test_what_others_need_stays_with_what_it_needs() -> None:
    host = Host({"server": ["lib"], "lib": ["deep"], "deep": [], "tool": [], "theirs": ["lib"]})
    record = Record(packages={"server", "lib", "deep", "tool"}, users={"server"})
    there = State(packages=frozenset(host.needs), users=frozenset({"server"}))
    removal = plan_removal(host, record, there)
    assert removal.purge == {"server", "tool"}
    assert removal.leave == {"lib": ["theirs"], "deep": ["theirs"]}
    assert removal.users == set()


def test_nothing_recorded_nothing_run() -> None:
    host = Host({"bash": []})
    removal = plan_removal(host, Record(), state(host))
    carry_out(host, removal)
    assert host.ran == []


def test_how_it_goes(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("server:x:101:101::/:/bin/sh\n")
    (tmp_path / "etc/group").write_text("server:x:101:\n")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/full/file").mkdir(parents=True)
    host = Host({"server": [], "old": []})
    record = Record(
        packages={"server"},
        kept={"old"},
        users={"server"},
        directories={str(tmp_path / name) for name in ("a", "a/b", "a/full")},
    )
    there = State(
        packages=frozenset(host.needs),
        users=frozenset({"server"}),
        directories=frozenset(record.directories),
    )
    carry_out(host, plan_removal(host, record, there), tmp_path)
    asked = [command for command in host.ran if "--simulate" not in command]
    assert [command[-2:] for command in asked] == [
        ["remove", "old"],
        ["purge", "server"],
        ["userdel", "server"],
    ]
    assert all("--option=APT::Get::AutomaticRemove=false" in command for command in asked[:2])
    assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/full/file").exists()


def test_a_command_that_fails_says_why() -> None:
    def run(command: Sequence[str]) -> tuple[int, str, str]:
        return 100, "", "E: dpkg was interrupted"

    with pytest.raises(RecordError, match="dpkg was interrupted.*fix-broken"):
        plan_removal(run, Record(packages={"a"}), State(packages=frozenset({"a"})))
