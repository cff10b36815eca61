"""What an operator, or an accident, changes about a slave's job network, and changes back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from subprocess import CompletedProcess
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Playbook = Callable[..., CompletedProcess[str]]


@pytest.fixture
def provision(host: Any, playbook: Playbook) -> Iterator[Callable[..., str]]:
    def run(*settings: str) -> str:
        where = ("--limit=slave1,localhost", "--tags=job_network,worker_slave_config")
        done = playbook("site.yml", *where, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    if mode(host) != "macvlan":
        run()


def mode(host: Any) -> str:
    return str(json.loads(host.check_output("cat /etc/cellblock/engine.json"))["network"]["mode"])


def test_a_parent_that_is_missing_is_refused_before_anything_is_changed(playbook: Playbook) -> None:
    # As a rename leaves it. The firewall's rules would change too, if it came to that.
    settings = ("--extra-vars=job_network_parent=nosuch0", "--extra-vars=firewall_dhcp_client=true")
    done = playbook("site.yml", "--limit=slave1,localhost", *settings)
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert "slave1: job_network_parent is nosuch0, which the host does not have; it has" in said
    assert "set job_network_parent to one of these" in said
    recap = next(line for line in done.stdout.splitlines() if line.startswith("slave1  "))
    assert "changed=0" in recap
    assert "failed=1" in recap


def test_macvlan_routed_and_back(
    host: Any, provision: Callable[..., str], run_stage: Callable[..., dict[str, Any]]
) -> None:
    cache = host.get_host("ansible://cache1").ansible.get_variables()["ansible_host"]
    connect = f"import socket; socket.create_connection(('{cache}', 3142), 5)"

    def reached() -> bool:
        stage = run_stage("python3", "-c", connect, environment="python", network="cache")
        return bool(stage["verdict"] == "ok")

    assert (mode(host), reached()) == ("macvlan", True)
    provision("--extra-vars=job_network_mode=routed")
    assert (mode(host), reached()) == ("routed", True)
    tables = host.check_output("nft list tables")
    assert "table inet cellblock_jobs" in tables
    assert "table netdev cellblock_jobs" not in tables
    assert not host.interface("cellblock0").exists
    provision()
    assert (mode(host), reached()) == ("macvlan", True)
    tables = host.check_output("nft list tables")
    assert "table netdev cellblock_jobs" in tables
    assert "table inet cellblock_jobs" not in tables
    assert host.check_output("ls /sys/class/net").find("cbj") == -1
    assert host.file("/proc/sys/net/ipv4/ip_forward").content_string == "0\n"


def test_an_interface_that_somebody_deletes_is_made_again(
    host: Any, provision: Callable[..., str], submit: Callable[..., dict[str, Any]]
) -> None:
    slots = json.loads(host.check_output("cat /etc/cellblock/engine.json"))["network"]["slots"]
    host.check_output("ip link delete dev cellblock0")
    assert not host.interface("cellblock0").exists
    stage = {"name": "run", "command": ["true"], "network": "internet"}
    job = {"environment": "base", "stages": [stage]}
    # With slots that were made before and with new ones.
    records = [submit(job) for _ in range(slots + 1)]
    assert [record["verdict"] for record in records] == ["ok"] * len(records), records
    assert host.interface("cellblock0").exists
    # As the role makes it.
    assert re.search(r"^slave1 .* changed=0 ", provision(), re.MULTILINE)
