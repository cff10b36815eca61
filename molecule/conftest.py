"""What the tests of the scenarios share: submitting jobs on a slave, and running playbooks."""

from __future__ import annotations

import base64
import collections
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cellblock.engine.limits import LIMITS
from cellblock.units import parse_milliseconds

ROOT = Path(__file__).resolve().parents[1]
# How many times slower than a real machine the slave is taken to be; 1 for a real one.
SLOWNESS = int(os.environ.get("CELLBLOCK_TEST_SLOWNESS", "1"))
# Whether also what takes long is tried (`make nightly`).
THOROUGH = bool(os.environ.get("CELLBLOCK_TEST_THOROUGH"))
# Molecule says which fleet is being tested.
INVENTORIES = os.environ.get("ANSIBLE_INVENTORY", str(ROOT / "inventory" / "local")).split(",")

Record = dict[str, Any]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "kernel: decided by the kernel or by cgroups, so tried on an emulated machine too",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests out that say nothing new on an emulated machine, unless all are wanted."""
    if SLOWNESS == 1 or THOROUGH:
        return
    left_out = [item for item in items if item.get_closest_marker("kernel") is None]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


seconds_by_folder: dict[str, float] = collections.defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds_by_folder[Path(report.fspath).parent.name] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the tests of each folder took: a line that the table of steps shows."""
    told = [f"{folder} {seconds:.0f} s" for folder, seconds in sorted(seconds_by_folder.items())]
    if told:
        terminalreporter.write_line("tests by folder: " + ", ".join(told))


@pytest.fixture(scope="session")
def slowness() -> int:
    """The time limits of submitted jobs are multiplied by it, and so are times that tests expect."""
    return SLOWNESS


@pytest.fixture(scope="session")
def thorough() -> bool:
    return THOROUGH


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
def start_playbook() -> Callable[..., subprocess.Popen[bytes]]:
    """As playbook, but does not wait for its end."""

    def start(name: str, *arguments: str) -> Any:
        return subprocess.Popen(
            playbook_command(name, *arguments), stdout=subprocess.DEVNULL, **ENVIRONMENT
        )

    return start


@dataclass(frozen=True)
class Isolation:
    """What a run of verify-isolation.yml left: exit status, output, the report and where it is."""

    status: int
    printed: str
    directory: Path
    report: Record


@pytest.fixture(scope="session")
def verify_isolation(
    playbook: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Isolation]:
    """Runs verify-isolation.yml."""

    def run(*arguments: str) -> Isolation:
        reports = tmp_path_factory.mktemp("reports")
        where = ("-e", f"verify_isolation_report_dir={reports}")
        done = playbook("verify-isolation.yml", *where, *arguments)
        # Of one fleet; there is none when the run was refused.
        latest = next(reports.glob("*/latest"), reports / "none")
        path = latest / "isolation.json"
        report = json.loads(path.read_text()) if path.exists() else {}
        return Isolation(done.returncode, done.stdout, latest, report)

    return run


@pytest.fixture(scope="session")
def isolation(verify_isolation: Callable[..., Isolation]) -> Isolation:
    """Who reaches whom on the fleet as it was provisioned: tried once, for all tests that read it."""
    done = verify_isolation()
    assert done.status == 0, done.printed
    return done


@pytest.fixture(scope="session")
def report(isolation: Isolation) -> Record:
    return isolation.report


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
