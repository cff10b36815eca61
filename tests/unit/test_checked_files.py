"""The linters read every Python file of the project: nothing is left out by where it is or what it is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from mypy.main import process_options

ROOT = Path(__file__).resolve().parents[2]
SHEBANG = re.compile(rb"#!.*\bpython")


def output(*command: str) -> list[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def ours() -> set[Path]:
    """Every file of the project; links lead to others of them."""
    # Those that are not committed yet count as well.
    names = output("git", "ls-files", "--cached", "--others", "--exclude-standard")
    return {path for name in names if (path := ROOT / name).is_file() and not path.is_symlink()}


def test_programs_in_python_are_named_so(ours: set[Path]) -> None:
    programs = {path for path in ours if SHEBANG.match(path.read_bytes()[:80])}
    assert programs, "the pattern finds nothing"
    assert {path for path in programs if path.suffix != ".py"} == set()


def test_ruff_reads_all_of_it(ours: set[Path]) -> None:
    read = {Path(line).resolve() for line in output("ruff", "check", "--show-files", ".")}
    assert {path for path in ours if path.suffix == ".py"} - read == set()


def test_mypy_reads_all_of_it(ours: set[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sources, options = process_options([])
    read = {Path(source.path).resolve() for source in sources if source.path is not None}
    assert {path for path in ours if path.suffix == ".py"} - read == set()
    assert options.strict_equality and options.disallow_untyped_defs
    assert options.exclude == []
