"""remove.yml leaves the hosts as they were before Cellblock came. (After test_matrix.py: the names of
the files are the order.)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

testinfra_hosts = [
    f"ansible://{group}"
    for group in (
        "cache_servers",
        "databases",
        "memory_databases",
        "request_handlers",
        "worker_masters",
        "worker_slaves",
    )
]

Playbook = Callable[..., CompletedProcess[str]]

SNAPSHOT = Path(__file__).resolve().parents[2] / "snapshot_host.py"
BEFORE = Path(os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY", "/nonexistent"))


@pytest.fixture(scope="module")
def removed(playbook: Playbook) -> CompletedProcess[str]:
    """The fleet after remove.yml, which first refuses to lose data."""
    refused = playbook("remove.yml")
    assert refused.returncode != 0
    assert "remove_data" in refused.stdout
    assert "changed=0" in refused.stdout
    done = playbook("remove.yml", "-e", "remove_data=true")
    assert done.returncode == 0, done.stdout[-5000:]
    return done


def test_the_host_is_as_it_was(host: Any, removed: CompletedProcess[str]) -> None:
    name = host.backend.get_pytest_id().removeprefix("ansible://")
    before = (BEFORE / f"before-{name}").read_text().splitlines()
    assert len(before) > 1000, "a snapshot that says little proves little"
    after = host.run(f"python3 - <<'END_OF_SNAPSHOT'\n{SNAPSHOT.read_text()}\nEND_OF_SNAPSHOT")
    assert after.rc == 0, after.stderr
    changes = [
        line
        for line in difflib.unified_diff(before, after.stdout.splitlines(), n=0, lineterm="")
        if line[0] in "+-" and not line.startswith(("+++", "---"))
    ]
    assert not changes, "\n".join(changes[:40])


def test_no_rules_are_left(host: Any, removed: CompletedProcess[str]) -> None:
    listed = host.run("nft list tables")
    assert listed.rc == 0
    assert "cellblock" not in listed.stdout


def test_a_second_run_changes_nothing(playbook: Playbook, removed: CompletedProcess[str]) -> None:
    again = playbook("remove.yml", "-e", "remove_data=true")
    assert again.returncode == 0, again.stdout[-5000:]
    assert "changed=0" in again.stdout
    assert "changed=1" not in again.stdout
