"""local_vm/files/find-machine ends its own virtual machine and never another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FIND_MACHINE = Path(__file__).parents[2] / "roles/local_vm/files/find-machine"
WAIT = "import time; time.sleep(60)"


def find(directory: Path, *options: str) -> str:
    done = subprocess.run(
        ["sh", FIND_MACHINE, directory, *options], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.fixture
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process to which the pid file points; the parameter says whether it is the machine."""
    arguments = [str(tmp_path / "pid")] if request.param else []
    with subprocess.Popen([sys.executable, "-c", WAIT, *arguments]) as started:
        (tmp_path / "pid").write_text(f"{started.pid}\n")
        yield started
        started.kill()


@pytest.mark.parametrize("process", [True], indirect=True)
def test_the_machine_is_found_and_ended(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert find(tmp_path) == str(process.pid)
    assert process.poll() is None
    assert find(tmp_path, "--kill") == str(process.pid)
    assert process.wait(timeout=5) == -9
    assert find(tmp_path, "--kill") == ""


@pytest.mark.parametrize("process", [False], indirect=True)
def test_another_process_of_that_number_is_left_alone(
    process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert find(tmp_path, "--kill") == ""
    assert process.poll() is None


@pytest.mark.parametrize("text", [None, "", "x", "999999999"])
def test_no_process_at_all(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "pid").write_text(text)
    assert find(tmp_path, "--kill") == ""
