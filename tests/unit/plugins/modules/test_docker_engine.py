# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0

"""docker_engine: what daemon.json becomes, what is refused, and what a host is found to be."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils._docker_engine import (
    MISSING,
    Engine,
    EngineError,
    Host,
    Record,
    collisions,
    engine_problems,
    flag_conflicts,
    format_daemon,
    merge,
    parse_daemon,
    subordinate_problem,
)

OURS = {"bip": "172.16.0.1/24", "log-opts": {"max-size": "10m"}, "live-restore": True, "dns": None}
THEIRS = {"log-opts": {"max-size": "5m", "tag": "operator"}, "labels": ["rack=7"]}


# --- daemon.json ---


def test_settings_of_others_survive_and_ours_win() -> None:
    new, record = merge(THEIRS, Record(), OURS)
    assert new == {
        "bip": "172.16.0.1/24",
        "log-opts": {"max-size": "10m", "tag": "operator"},
        "live-restore": True,
        "labels": ["rack=7"],
    }
    assert record.settings["log-opts", "max-size"] == ("10m", "5m")
    assert record.settings["bip",] == ("172.16.0.1/24", MISSING)


def test_a_second_merge_changes_nothing() -> None:
    new, record = merge(THEIRS, Record(), OURS)
    again, record_again = merge(new, Record.parse(record.format()), OURS)
    assert again == new
    assert record_again.format() == record.format()


@pytest.mark.parametrize("found", [{}, THEIRS, {"log-opts": {}}])
def test_taken_back_it_is_as_it_was(found: dict[str, Any]) -> None:
    new, record = merge(found, Record(), OURS)
    back, _ = merge(new, Record.parse(record.format()), {})
    assert back == {key: value for key, value in found.items() if value != {}}


def test_what_is_set_no_more_gets_its_earlier_value() -> None:
    new, record = merge(THEIRS, Record(), OURS)
    new, record = merge(new, record, {"bip": "172.16.0.1/24"})
    assert new == {**THEIRS, "bip": "172.16.0.1/24"}
    assert list(record.settings) == [("bip",)]


def test_what_somebody_changed_since_is_theirs() -> None:
    new, record = merge(THEIRS, Record(), OURS)
    new["log-opts"]["max-size"] = "7m"
    back, _ = merge(new, record, {})
    assert back == {**THEIRS, "log-opts": {"max-size": "7m", "tag": "operator"}}
    # Set by us once more, it is what comes back at the end.
    new, record = merge(new, record, OURS)
    assert new["log-opts"]["max-size"] == "10m"
    assert merge(new, record, {})[0]["log-opts"]["max-size"] == "7m"


def test_other_packages_find_what_they_look_for() -> None:
    """Sysbox's package looks with these patterns, and stops where it finds nothing."""
    text = format_daemon({"bip": "172.16.0.1/24", "default-address-pools": []})
    assert '\n    "bip": "172.16.0.1/24",\n    "default-address-pools"' in text


@pytest.mark.parametrize("text", ["{", "[]", "# nothing"])
def test_a_file_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match=r"/etc/docker/daemon.json is no JSON"):
        parse_daemon(text, "/etc/docker/daemon.json")


def test_a_setting_that_is_no_object_is_refused() -> None:
    with pytest.raises(EngineError, match="log-opts is 'x', not an object"):
        merge({"log-opts": "x"}, Record(), OURS)


# --- Networks ---

POOLS = {
    "bip": "172.16.0.1/24",
    "default-address-pools": [{"base": "172.16.128.0/17", "size": 24}],
}


def test_networks_apart() -> None:
    assert collisions(POOLS, [("a route", "172.17.0.0/16"), ("a host", "fd00::1")]) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("172.16.0.77", ["bip 172.16.0.0/24 collides with 172.16.0.77 (it)", "docker_bip"]),
        ("172.16.200.0/24", ["default-address-pools 172.16.128.0/17", "docker_address_pools"]),
        ("172.16.0.0/12", ["bip", "default-address-pools"]),
    ],
)
def test_networks_that_collide(other: str, words: list[str]) -> None:
    told = " ".join(collisions(POOLS, [("it", other)]))
    for word in words:
        assert word in told


def test_own_networks_that_overlap() -> None:
    (told,) = collisions({**POOLS, "bip": "172.16.128.1/24"}, [])
    assert "bip 172.16.128.0/24 and default-address-pools 172.16.128.0/17 overlap" in told


@pytest.mark.parametrize(
    "pool",
    [
        {"base": "172.16.128.0/17"},
        {"base": "172.16.128.0/17", "size": 16},
        {"base": "x", "size": 24},
    ],
)
def test_pools_that_make_no_sense(pool: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="default-address-pools"):
        collisions({"default-address-pools": [pool]}, [])


# --- Other reasons to refuse ---


def test_flags_that_say_the_same() -> None:
    line = "DOCKER_OPTS --dns 192.0.2.1 --log-opt max-size 1m { path /usr/sbin/dockerd ; -H fd:// }"
    told = flag_conflicts({"dns": ["192.0.2.2"], "log-opts": {}, "bip": "172.16.0.1/24"}, line)
    assert [text.split()[0] for text in told] == ["dns", "log-opts"]
    assert flag_conflicts({"bip": "172.16.0.1/24"}, line) == []


FILES = {
    "/etc/passwd": "root:x:0:0::/:/bin/sh\ncontainers:x:998:998::/:/bin/sh\n",
    "/etc/subuid": "containers:300000:65536\n",
    "/etc/subgid": "containers:300000:65536\n",
}


@pytest.mark.parametrize(
    ("remap", "files", "words"),
    [
        ("containers", {}, None),
        ("998", {}, None),
        ("default", {}, None),  # made by the engine
        ("nobody2", {}, "names the user nobody2, whom the host does not have"),
        ("containers", {"/etc/subuid": ""}, "/etc/subuid gives containers 0 ids"),
        ("containers", {"/etc/subgid": "containers:300000:1000\n"}, "gives containers 1000 ids"),
        (
            "default",
            {"/etc/passwd": "dockremap:x:997:997::/:/bin/false\n"},
            "/etc/subuid gives dockremap 0 ids",
        ),
    ],
)
def test_subordinate_ids(remap: str, files: dict[str, str], words: str | None) -> None:
    told = subordinate_problem(remap, {**FILES, **files}.get)
    assert told is None if words is None else words in str(told)


NEW = {"bip": "172.16.0.1/24", "live-restore": True}


@pytest.mark.parametrize(
    ("engine", "found", "new", "words"),
    [
        (Engine(running=2, containers=2), NEW, NEW, None),
        (Engine(running=2, containers=2), {"bip": "172.16.0.1/24"}, NEW, None),
        (Engine(running=2, containers=2), {}, NEW, "would not take the bip"),
        (
            Engine(running=2),
            NEW,
            {"bip": "172.16.0.1/24"},
            "2 containers run, and the engine's restart",
        ),
        (Engine(containers=1), NEW, {**NEW, "userns-remap": "default"}, "would not find any more"),
        (Engine(swarm=True), {}, NEW, "swarm"),
        (Engine(), {}, {**NEW, "userns-remap": "default"}, None),
    ],
)
def test_what_an_engine_cannot_take(
    engine: Engine, found: dict[str, Any], new: dict[str, Any], words: str | None
) -> None:
    told = engine_problems(engine, found, new, stop_containers=False)
    assert told == [] if words is None else words in " ".join(told)


def test_containers_may_be_stopped_where_it_is_said() -> None:
    assert engine_problems(Engine(running=2), NEW, {}, stop_containers=True) == []


# --- What a host is found to be ---


class Machine:
    """A directory that is a host's /, and what its commands print."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.printed: dict[str, str] = {}
        self.host = Host(self.run, root)
        self.put("/proc/self/mounts", "/dev/vda / ext4 rw 0 0\n")

    def run(self, command: list[str]) -> tuple[int, str, str]:
        for beginning, text in self.printed.items():
            if " ".join(command).startswith(beginning):
                return 0, text, ""
        return 1, "", "no such command"

    def put(self, name: str, text: str) -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_host_without_any_engine(machine: Machine) -> None:
    assert machine.host.foreign_engine("distribution") is None
    assert machine.host.engine() is None
    assert machine.host.data_problems({}, 1, None) == []


def test_an_engine_from_snap(machine: Machine) -> None:
    path = machine.root / "snap/bin/docker"
    path.parent.mkdir(parents=True)
    path.symlink_to("/usr/bin/snap")
    assert "snap remove" in str(machine.host.foreign_engine("distribution"))


@pytest.mark.parametrize("how", ["script", "link", "package"])
def test_podmans_stand_in(machine: Machine, how: str) -> None:
    podman = machine.put("/usr/bin/podman", "\x7fELF")
    if how == "link":
        (machine.root / "usr/bin/docker").symlink_to(podman)
    else:
        text = '#!/bin/sh\nexec /usr/bin/podman "$@"\n' if how == "script" else "\x7fELF"
        machine.put("/usr/bin/docker", text)
    if how == "package":
        machine.printed["dpkg-query"] = "podman-docker installed\n"
    assert "podman's stand-in" in str(machine.host.foreign_engine("distribution"))


def test_another_engine_than_is_asked_for(machine: Machine) -> None:
    machine.put("/usr/bin/docker", "\x7fELF")
    machine.printed["dpkg-query"] = "docker-ce installed\ndocker.io not-installed\n"
    assert "docker-ce is installed" in str(machine.host.foreign_engine("distribution"))
    assert machine.host.foreign_engine("upstream") is None


def test_networks_of_the_host_but_not_of_its_engines(machine: Machine) -> None:
    machine.printed["ip -4 -json route"] = json.dumps(
        [
            {"dst": "default", "dev": "eth0"},
            {"dst": "10.0.0.0/24", "dev": "eth0"},
            {"dst": "172.16.0.0/24", "dev": "docker0"},
            {"dst": "172.16.128.0/24", "dev": "br-0123456789ab"},
        ]
    )
    machine.printed["ip -4 -json address"] = json.dumps(
        [
            {"ifname": "eth0", "addr_info": [{"local": "10.0.0.5"}]},
            {"ifname": "docker0", "addr_info": [{"local": "172.16.0.1"}]},
        ]
    )
    assert machine.host.networks() == [
        ("a route of the host by eth0", "10.0.0.0/24"),
        ("an address of the host on eth0", "10.0.0.5"),
    ]


def test_a_full_data_directory(machine: Machine) -> None:
    (told,) = machine.host.data_problems({}, 2**62, None)
    assert "/var/lib/docker" in told
    assert "docker_min_free_bytes" in told


def test_a_data_directory_on_overlayfs(machine: Machine) -> None:
    machine.put(
        "/proc/self/mounts", f"overlay / overlay rw 0 0\noverlay {machine.root} overlay rw 0 0\n"
    )
    (told,) = machine.host.data_problems({}, 1, None)
    assert "overlayfs" in told
    assert machine.host.data_problems({"storage-driver": "vfs"}, 1, None) == []
    assert machine.host.data_problems({}, 1, Engine(storage_driver="btrfs")) == []
    where = machine.root / "var/lib/docker"
    where.mkdir(parents=True)
    with (machine.root / "proc/self/mounts").open("a") as mounts:
        mounts.write(f"/dev/vdb {where} ext4 rw 0 0\n")
    assert machine.host.data_problems({}, 1, None) == []


def test_an_engine_is_older_than_its_configuration(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine.put("/etc/docker/daemon.json", "{}")
    written = path.stat().st_mtime
    monkeypatch.setattr(time, "time", lambda: written + 50)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    # It was written 950 s after the machine began.
    for began, older in ((949, True), (951, False)):
        unit = {"ExecMainStartTimestampMonotonic": str(began * 1_000_000)}
        assert machine.host.outdated("/etc/docker/daemon.json", unit) is older
