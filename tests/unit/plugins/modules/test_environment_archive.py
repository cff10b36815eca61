"""Check mode and errors as Ansible sees them; the builds are tested with the module's utilities."""

from __future__ import annotations

import json
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
