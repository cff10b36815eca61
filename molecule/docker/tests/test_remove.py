"""remove.yml takes the engine off the host. (conftest.py has it run after what needs one.)"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1", "ansible://slave2"]

Playbook = Callable[..., Any]

SNAPSHOT = Path(__file__).resolve().parents[2] / "snapshot_host.py"
BEFORE = Path(os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY", "/nonexistent"))


@pytest.fixture(scope="module")
def removed(playbook: Playbook, lab: Any, image: str) -> Any:
    lab.output("slave1", f"docker run -d --name left {image} sleep 600; docker network create left")
    refused = playbook("remove.yml", "--limit", "slave1")
    assert refused.returncode != 0
    told = " ".join(refused.stdout.split())
    assert re.search("has 1 containers, [0-9]+ images and 0 volumes, which would be lost", told)
    assert "changed=0" in refused.stdout
    done = playbook("remove.yml", "--limit", "slave1,slave2", "-e", "remove_data=true")
    assert done.returncode == 0, done.stdout[-5000:]
    return done


def test_the_host_is_as_it_was(host: Any, lab: Any, removed: Any) -> None:
    name = host.backend.get_pytest_id().removeprefix("ansible://")
    before = (BEFORE / f"before-{name}").read_text().splitlines()
    assert len(before) > 1000, "a snapshot that says little proves little"
    after = lab.run(name, "exec python3 -", input=SNAPSHOT.read_text())
    assert after.returncode == 0, after.stderr
    changes = [
        line
        for line in difflib.unified_diff(before, after.stdout.splitlines(), n=0, lineterm="")
        if line[0] in "+-" and not line.startswith(("+++", "---"))
    ]
    # The operator's settings are the same, in our form.
    own = [line for line in changes if not line[1:].startswith("file /etc/docker/daemon.json ")]
    assert not own, "\n".join(own[:40])


def test_the_operators_settings_are_left(lab: Any, removed: Any) -> None:
    assert json.loads(lab.output("slave1", "cat /etc/docker/daemon.json")) == {
        "registry-mirrors": ["http://192.0.2.14:5000"],
        "log-opts": {"max-size": "5m", "tag": "operator"},
        "labels": ["rack=7"],
    }
    assert lab.run("slave2", "test -e /etc/docker/daemon.json").returncode == 1


def test_nothing_runs_and_no_rule_is_left(lab: Any, removed: Any) -> None:
    for slave in ("slave1", "slave2"):
        left = lab.output(slave, "ps -e -o comm=; ip -o link; nft list ruleset")
        for word in ("dockerd", "containerd", "docker0", "br-", "DOCKER"):
            assert word not in left, left


def test_a_second_run_changes_nothing(playbook: Playbook, removed: Any) -> None:
    again = playbook("remove.yml", "--limit", "slave1,slave2", "-e", "remove_data=true")
    assert again.returncode == 0, again.stdout[-5000:]
    assert "changed=1" not in again.stdout
