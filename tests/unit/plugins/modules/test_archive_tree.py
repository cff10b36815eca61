"""The module's two phases, as Ansible calls them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.cellblock.fleet.plugins.modules import archive_tree


def call(capsys: pytest.CaptureFixture[str], **args: Any) -> dict[str, Any]:
    with patch_module_args(args), pytest.raises(SystemExit):
        archive_tree.main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.fixture
def wanted(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "f").write_text("content")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "f", "f")
    digest = hashlib.sha256((tmp_path / "x.tar").read_bytes()).hexdigest()
    return {"src": str(tmp_path / "x.tar"), "sha256": digest, "dest": str(tmp_path / "deep/tree")}


def test_plan_then_apply_then_nothing(
    capsys: pytest.CaptureFixture[str], wanted: dict[str, str]
) -> None:
    plan = call(capsys, trees=[wanted])
    assert plan["changed"]
    assert plan["trees"][0]["reason"] == "absent"
    assert not Path(wanted["dest"]).exists()

    staged = {wanted["sha256"]: wanted["src"]}
    done = call(capsys, trees=[wanted], phase="apply", staged=staged)
    assert done["trees"][0]["after"] == wanted["sha256"]
    assert (Path(wanted["dest"]) / "f").read_text() == "content"

    assert not call(capsys, trees=[wanted])["changed"]


def test_check_mode_never_applies(
    capsys: pytest.CaptureFixture[str], wanted: dict[str, str]
) -> None:
    staged = {wanted["sha256"]: wanted["src"]}
    done = call(capsys, trees=[wanted], phase="apply", staged=staged, _ansible_check_mode=True)
    assert done["changed"]
    assert not Path(wanted["dest"]).exists()


def test_unknown_digest_is_predicted_but_not_applied(
    capsys: pytest.CaptureFixture[str], wanted: dict[str, str]
) -> None:
    unbuilt = {**wanted, "sha256": ""}
    assert "does not exist yet" in call(capsys, trees=[unbuilt])["trees"][0]["reason"]
    failed = call(capsys, trees=[unbuilt], phase="apply")
    assert failed["failed"]
    assert "sha256 of" in failed["msg"]


def test_wrong_digest_fails_with_one_sentence(
    capsys: pytest.CaptureFixture[str], wanted: dict[str, str]
) -> None:
    wrong = {**wanted, "sha256": "0" * 64}
    failed = call(capsys, trees=[wrong], phase="apply", staged={"0" * 64: wanted["src"]})
    assert failed["failed"]
    assert "is expected" in failed["msg"]
    assert not Path(wanted["dest"]).exists()
