"""The engine's archive: equal sources, equal bytes; everything that slaves need and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from ansible_collections.cellblock.fleet.plugins.plugin_utils import engine_archive
from ansible_collections.cellblock.fleet.plugins.plugin_utils.engine_archive import (
    BuildError,
    build,
)

ARCHITECTURE = "x86_64"


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_archive, "find_compiler", lambda architecture: "cc")
    monkeypatch.setattr(engine_archive, "compile_jobinit", lambda compiler, sources: b"jobinit")


def make_sources(directory: Path, **more: str) -> Path:
    texts = {
        "cellblock/__init__.py": "",
        "cellblock/engine/cli.py": "def main(): ...\n",
        "cellblock/fleet/model.py": "",
        "jobinit/jobinit.c": "int main;\n",
        **more,
    }
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def test_equal_sources_give_equal_archives(tmp_path: Path) -> None:
    one = build(ARCHITECTURE, tmp_path / "1", make_sources(tmp_path / "a"))
    two = build(ARCHITECTURE, tmp_path / "2", make_sources(tmp_path / "b"))
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.built and one.sha256 == two.sha256


def test_an_archive_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "sources")
    first = build(ARCHITECTURE, tmp_path, sources)
    assert build(ARCHITECTURE, tmp_path, sources).built is False
    for changed in ("cellblock/engine/cli.py", "jobinit/jobinit.c", "cellblock/engine/more.py"):
        (sources / changed).write_text("# another\n")
        again = build(ARCHITECTURE, tmp_path, sources)
        assert again.built and again.path != first.path
    # What runs elsewhere does not touch the slaves.
    (sources / "cellblock/fleet/model.py").write_text("# another\n")
    assert build(ARCHITECTURE, tmp_path, sources).built is False


def test_the_package_of_this_collection_is_complete(tmp_path: Path) -> None:
    """The command starts with what is in the archive, and a host's bare Python."""
    archive = build(ARCHITECTURE, tmp_path)
    with tarfile.open(archive.path) as members:
        names = members.getnames()
        members.extractall(tmp_path / "engine", filter="data")
    assert "bin/jobinit" in names
    assert not [name for name in names if name.startswith(("cellblock/fleet", "src"))]
    command = tmp_path / "engine/bin/cellblock"
    assert command.stat().st_mode & 0o777 == 0o755
    done = subprocess.run(
        [sys.executable, "-I", str(command), "--help"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "cellblock" in done.stdout


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="lacks the engine's sources"):
        build(ARCHITECTURE, tmp_path, tmp_path / "nothing")


def test_unknown_architectures_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    with pytest.raises(BuildError, match="no engine is made for riscv64"):
        build("riscv64", tmp_path)
