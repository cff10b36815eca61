"""The experiment with child containers: it runs as a play, shows what it says, and leaves nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

PLAY = "experiments/child_container.yml"
UNIT = "cellblock-child-container"
# What a host shows of the experiment, and of what it must not touch.
LEFT = (
    f"find /sys/fs/cgroup /run /var/lib/docker /etc/systemd /run/systemd/transient -maxdepth 4 -name '{UNIT}*';"
    " ip -o link | grep cbx-; ps ax | grep -E 'peer[.]py|cbx-front' | grep -v grep;"
    " docker ps -aq; docker image ls -q --filter reference=cellblock-child-container; ls -d /opt/containerd 2>/dev/null"
)
UNTOUCHED = (
    "docker network ls -q; sysctl -n net.bridge.bridge-nf-call-iptables net.ipv4.ip_forward; iptables-save | grep -v '^#' | sed 's/[[].*//';"
    " nft list tables; cat /etc/subuid /etc/subgid /etc/docker/daemon.json; ip -o address; ip route; systemctl show docker -p MainPID"
)
# One runtime in the tests of every day: what both share is most of it.
RUNTIME = "userns"


@pytest.fixture(scope="module")
def experiment(
    lab: Any, playbook: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    where = tmp_path_factory.mktemp("experiment")
    # As if an earlier run had been killed with all that could clean up after it.
    lab.output(
        "slave1",
        f"mkdir -p /run/{UNIT}/data /sys/fs/cgroup/freezer/system.slice/{UNIT}.service/containers/x;"
        f" systemd-run --quiet --unit={UNIT} sleep 600",
    )
    before = lab.output("slave1", UNTOUCHED)
    done = playbook(PLAY, "-e", "child_container_host=slave1", "-e", f"child_container_runtimes={RUNTIME}",
                    "-e", f"experiment_dir={where}")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert lab.output("slave1", UNTOUCHED) == before
    yield {"printed": done.stdout, **json.loads((where / "child_container.json").read_text())}


def rows(found: dict[str, Any], step: str, **wanted: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in found["observations"]
        if row["step"] == step and all(row[name] == value for name, value in wanted.items())
    ]


def test_it_is_as_expected(experiment: dict[str, Any]) -> None:
    assert experiment["differences"] == []
    assert all(row["as_expected"] for row in experiment["observations"])
    assert {row["runtime"] for row in experiment["observations"]} == {RUNTIME}
    assert "worker's output chain" in experiment["printed"]
    assert experiment["seconds"] < 300  # 40 on a quiet machine


def test_the_worker_is_what_it_is_called(experiment: dict[str, Any]) -> None:
    assert experiment["workers"] == {
        RUNTIME: {"uid_map": "0 2013265920 131072", "seccomp": 2, "sysbox_mounts": 0}
    }


def test_a_table_by_address_is_passed_under_another(experiment: dict[str, Any]) -> None:
    passed = rows(experiment, "another address, table by address", target="database")
    assert {(row["observed"], row["seen_as"]) for row in passed} == {("reached", "10.77.1.51")}
    stopped = rows(experiment, "another address, table by port", target="database")
    assert {(row["observed"], row["dropped_packets"] > 0) for row in stopped} == {("denied", True)}


def test_ipv6_that_the_worker_turned_on_passes_what_filters_ipv4(
    experiment: dict[str, Any],
) -> None:
    passed = rows(experiment, "IPv6, slave's forward chain", target="database")
    assert {(row["observed"], row["seen_as"]) for row in passed} == {("reached", "fe80::50")}
    stopped = rows(experiment, "IPv6, slave's bridge table", target="database")
    assert {(row["observed"], row["dropped_packets"] > 0) for row in stopped} == {("denied", True)}


def test_a_child_reaches_what_its_worker_reaches(experiment: dict[str, Any]) -> None:
    found = rows(experiment, "other host", target="database")
    assert [row["answered_by"] for row in found] == ["database"] * 4
    # The server cannot tell them apart.
    assert len({row["seen_as"] for row in found}) == 1


def test_rules_in_the_worker_do_not_stop_its_children(experiment: dict[str, Any]) -> None:
    found = {
        row["sender"]: row["observed"]
        for row in rows(experiment, "worker's output chain", target="database")
    }
    assert found == {
        "worker": "denied",
        "child_workers_network": "denied",
        "child_default_bridge": "reached",
        "child_user_network": "reached",
    }


def test_the_slaves_forward_chain_sees_a_bridge_only_when_told(experiment: dict[str, Any]) -> None:
    unseen = rows(experiment, "slave's forward chain, bridges not filtered", target="database")
    seen = rows(experiment, "slave's forward chain, bridges filtered", target="database")
    always = rows(experiment, "slave's bridge table", target="database")
    assert {(row["observed"], row["dropped_packets"]) for row in unseen} == {("reached", 0)}
    for found in (seen, always):
        assert {row["observed"] for row in found} == {"denied"}
        assert all(row["arrived_packets"] and row["dropped_packets"] for row in found)


def test_a_false_denial_never_arrives(experiment: dict[str, Any]) -> None:
    hidden = rows(experiment, "false denial", expected="denied")
    assert len(hidden) == 8
    assert {(row["observed"], row["arrived_packets"]) for row in hidden} == {("denied", 0)}
    # Where the worker itself has the address, it answers.
    assert "connection refused" in {row["how"] for row in hidden}
    for host in {row["host"] for row in hidden}:
        shown = rows(experiment, "no false denial", host=host)
        assert {row["observed"] for row in shown} == {"reached"}


def test_nothing_is_left(lab: Any, experiment: dict[str, Any]) -> None:
    assert lab.run("slave1", LEFT).stdout.strip() == ""


def test_what_is_killed_leaves_nothing(lab: Any, start_playbook: Callable[..., Any]) -> None:
    process = start_playbook(PLAY, "-e", "child_container_host=slave1")
    try:
        deadline = time.monotonic() + 40
        while "peer.py send" not in lab.run("slave1", "ps ax").stdout:
            assert time.monotonic() < deadline, "it did not begin"
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while left := lab.run("slave1", LEFT).stdout.strip():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_refusals_and_dry_runs_make_nothing(
    lab: Any, playbook: Callable[..., Any], tmp_path: Path
) -> None:
    where = ("-e", f"experiment_dir={tmp_path}")
    for arguments, named in (
        (["-e", "child_container_host=cache1"], "cache1 is no worker slave"),
        (["-e", '{"docker_enabled": false}'], "no slave of the inventory has docker_enabled"),
        (["-e", "child_container_runtimes=podman"], "child_container_runtimes has podman"),
        (["--limit", "slave2"], "name the slave with -e child_container_host=slave2"),
        (["--check"], "several networks, slave's bridge table"),
    ):
        done = playbook(PLAY, *where, *arguments)
        assert named in " ".join(done.stdout.split()), done.stdout
        assert (done.returncode == 0) == (arguments == ["--check"])
    assert list(tmp_path.iterdir()) == []
