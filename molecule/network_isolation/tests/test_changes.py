"""An operator changes a slave's mode, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from subprocess import CompletedProcess
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Playbook = Callable[..., CompletedProcess[str]]


@pytest.fixture
def provision(host: Any, playbook: Playbook) -> Iterator[Callable[..., None]]:
    def run(*settings: str) -> None:
        where = ("--limit=slave1,localhost", "--tags=macvlan,worker_slave_config")
        done = playbook("site.yml", *where, *settings)
        assert done.returncode == 0, done.stdout + done.stderr

    yield run
    if mode(host) != "macvlan":
        run()


def mode(host: Any) -> str:
    return str(json.loads(host.check_output("cat /etc/cellblock/engine.json"))["network"]["mode"])


def test_macvlan_routed_and_back(
    host: Any, provision: Callable[..., None], run_stage: Callable[..., dict[str, Any]]
) -> None:
    cache = host.get_host("ansible://cache1").ansible.get_variables()["ansible_host"]
    connect = f"import socket; socket.create_connection(('{cache}', 3142), 5)"

    def reached() -> bool:
        stage = run_stage("python3", "-c", connect, environment="python", network="cache")
        return bool(stage["verdict"] == "ok")

    assert (mode(host), reached()) == ("macvlan", True)
    provision("--extra-vars=macvlan_mode=routed")
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
