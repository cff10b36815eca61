"""What the tests of the scenarios share: submitting jobs on a slave, and running playbooks."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellblock.engine.limits import LIMITS
from cellblock.units import parse_milliseconds

ROOT = Path(__file__).resolve().parents[1]
# Molecule says which fleet is being tested.
INVENTORIES = os.environ.get("ANSIBLE_INVENTORY", str(ROOT / "inventory" / "local")).split(",")

Record = dict[str, Any]


@pytest.fixture(scope="session")
def slowness() -> int:
    """How many times slower than a real machine the slave is taken to be; 1 for a real one.

    The time limits of submitted jobs are multiplied by it, and so are times that tests expect.
    """
    return int(os.environ.get("CELLBLOCK_TEST_SLOWNESS", "1"))


@pytest.fixture(scope="session")
def repetitions(slowness: int) -> Callable[[int], int]:
    """How often to do what a test does many times: a tenth of it where everything is slow."""
    return lambda count: count if slowness == 1 else count // 10


def _slowed_down(stage: Record, slowness: int) -> Record:
    """The stage with its time limits, or the defaults, multiplied as far as a host allows."""
    constraints = stage.get("constraints", {})
    times = {
        name: min(
            parse_milliseconds(constraints.get(name, LIMITS[name].default)) * slowness,
            LIMITS[name].maximum,
        )
        for name in ("wall_time_ms", "cpu_time_ms")
    }
    return {**stage, "constraints": {**constraints, **times}}


@pytest.fixture
def submit(host: Any, slowness: int) -> Callable[..., Record]:
    """Runs one job on the slave with the cellblock command and returns its record."""

    def run(job: Record, *, user: str | None = None) -> Record:
        if slowness > 1:
            job = {**job, "stages": [_slowed_down(stage, slowness) for stage in job["stages"]]}
        encoded = base64.b64encode(json.dumps(job).encode()).decode()
        # A service that hangs fails the test instead of holding up all of them.
        command = f"timeout {120 * slowness} cellblock run -"
        if user is not None:
            command = f"su {user} -s /bin/sh -c '{command}'"
        done = host.run(f"echo {encoded} | base64 -d | {command}")
        assert done.stdout, done
        record: Record = json.loads(done.stdout.splitlines()[0])
        return record

    return run


@pytest.fixture
def run_stage(submit: Callable[..., Record]) -> Callable[..., Record]:
    """Runs one command in a job of one stage and returns the stage's record."""

    def run(*command: str, environment: str = "base", **fields: Any) -> Record:
        files = fields.pop("files", {})
        record = submit(
            {
                "environment": environment,
                "files": files,
                "stages": [{"name": "run", "command": list(command), **fields}],
            }
        )
        assert "stages" in record, record
        stage: Record = record["stages"][0]
        return stage

    return run


@pytest.fixture(scope="session")
def playbook() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a playbook of the project on the test fleet, as an operator would."""

    def run(name: str, *arguments: str, inventory: Path | None = None) -> Any:
        command = playbook_command(name, *arguments, inventory=inventory)
        return subprocess.run(command, capture_output=True, text=True, check=False, **ENVIRONMENT)

    return run


@pytest.fixture(scope="session")
def verify(
    playbook: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[int, str, Record]]:
    """Runs verify-isolation.yml; its exit status, what it printed and the report as data."""

    def run(*arguments: str) -> tuple[int, str, Record]:
        reports = tmp_path_factory.mktemp("reports")
        done = playbook(
            "verify-isolation.yml", "-e", f"verify_isolation_report_dir={reports}", *arguments
        )
        path = reports / "isolation.json"
        return done.returncode, done.stdout, json.loads(path.read_text()) if path.exists() else {}

    return run


@pytest.fixture(scope="module")
def report(verify: Callable[..., tuple[int, str, Record]]) -> Record:
    """The report about the fleet as it stands, which is green."""
    status, printed, written = verify()
    assert status == 0, printed
    return written


@pytest.fixture(scope="session")
def start_playbook() -> Callable[..., subprocess.Popen[bytes]]:
    """As playbook, but does not wait for its end."""

    def start(name: str, *arguments: str) -> Any:
        return subprocess.Popen(
            playbook_command(name, *arguments), stdout=subprocess.DEVNULL, **ENVIRONMENT
        )

    return start


ENVIRONMENT: dict[str, Any] = {
    "cwd": ROOT,
    "env": {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_FORCE_COLOR": "false",  # molecule turns it on
    },
}


def playbook_command(name: str, *arguments: str, inventory: Path | None = None) -> list[str]:
    inventories = [inventory] if inventory else INVENTORIES
    return [
        "ansible-playbook",
        *(f"--inventory={path}" for path in inventories),
        str(ROOT / "playbooks" / name),
        *arguments,
    ]
