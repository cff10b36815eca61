"""Check mode and errors as Ansible sees them; the builds are tested with the module's utilities."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.cellblock.fleet.plugins.modules import environment_archive


def call(capsys: pytest.CaptureFixture[str], cache: Path, **args: Any) -> dict[str, Any]:
    given = {
        "definitions": {"base": {"packages": [], "description": "shell"}},
        "suite": "bookworm",
        "architectures": ["x86_64"],
        "cache_dir": str(cache),
        **args,
    }
    with patch_module_args(given), pytest.raises(SystemExit):
        environment_archive.main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_check_mode_predicts_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = call(capsys, tmp_path / "cache", _ansible_check_mode=True)
    assert result["changed"]
    (environment,) = result["environments"]
    assert environment["name"] == "base"
    assert environment["sha256"] is None
    assert environment["built"]
    assert "to be built" in result["diff"]["before"]
    assert not (tmp_path / "cache").exists()


def test_bad_definition_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = call(capsys, tmp_path, definitions={"x": {"pakages": []}})
    assert result["failed"]
    assert "unknown field 'pakages'" in result["msg"]


def test_archives_built_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = call(capsys, tmp_path, archives_dir=str(tmp_path))
    assert "does not exist; put it there" in missing["msg"]
    (tmp_path / "base-bookworm-x86_64.tar.zst").write_bytes(b"archive")
    found = call(capsys, tmp_path, archives_dir=str(tmp_path))
    assert not found["changed"]
    assert found["environments"][0]["size_bytes"] == 7


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a mmdebstrap that knows all packages but 'nopkg'."""
    directory = tmp_path / "programs"
    directory.mkdir()
    script = """#!/bin/sh
for a; do
  case $a in
    --include=*nopkg*) echo 'E: Unable to locate package nopkg'; exit 1 ;;
    *.tar.zst) target=$a ;;
    *--showformat*) manifest=${a##*> } ;;
  esac
done
echo archive > "$target"
printf 'bash\\t5.2\\tamd64\\n' > "$manifest"
"""
    for name in ("mmdebstrap", "zstd", "dpkg-query"):
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return directory


def test_one_that_cannot_be_built_does_not_block_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, programs: Path
) -> None:
    definitions = {
        "bad": {"packages": ["nopkg"], "description": "d"},
        "good": {"packages": ["bash"], "description": "d"},
        "worse": {"packages": ["nopkg", "bash"], "description": "d"},
    }
    result = call(capsys, tmp_path / "cache", definitions=definitions)
    assert result["failed"]
    assert result["changed"]
    assert [e["name"] for e in result["environments"]] == ["good"]
    assert [(f["name"], f["architecture"]) for f in result["failures"]] == [
        ("bad", "x86_64"),
        ("worse", "x86_64"),
    ]
    assert all("no package 'nopkg'" in f["message"] for f in result["failures"])
    assert result["msg"] == "\n".join(f["message"] for f in result["failures"])
    # What was good is there the next time.
    again = call(capsys, tmp_path / "cache", definitions={"good": definitions["good"]})
    assert (again.get("failed", False), again["changed"]) == (False, False)
    assert again["failures"] == []


def test_a_machine_that_can_build_none_says_so_once(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    definitions = {name: {"packages": [], "description": "d"} for name in ("one", "two")}
    result = call(capsys, tmp_path / "cache", definitions=definitions)
    assert result["failed"]
    assert "environments" not in result
    assert "ordinary user" in result["msg"]
    assert "two" not in result["msg"]
