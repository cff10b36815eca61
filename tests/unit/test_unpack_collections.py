"""Collections taken from the 'ansible' package: what is unpacked, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

import unpack_collections


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package with the collections a.one 1.5.0 and a.two 3.0.0."""
    path = tmp_path / "ansible-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, version in (("one", "1.5.0"), ("two", "3.0.0")):
            folder = f"ansible_collections/a/{name}"
            manifest = {"collection_info": {"name": name, "version": version}}
            archive.writestr(f"{folder}/MANIFEST.json", json.dumps(manifest))
            archive.writestr(f"{folder}/plugins/modules/{name}.py", "")
    return path


def run(tmp_path: Path, wheel: Path, requirements: str) -> int:
    path = tmp_path / "requirements.yml"
    path.write_text(requirements, encoding="utf-8")
    destination = tmp_path / "collections"
    return unpack_collections.main(
        ["--requirements", str(path), "--destination", str(destination), str(wheel)]
    )


def unpacked(tmp_path: Path) -> set[str]:
    top = tmp_path / "collections"
    return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}


def test_unpacks_only_what_is_required(tmp_path: Path, wheel: Path) -> None:
    assert run(tmp_path, wheel, "collections: [{name: a.one, version: '>=1.0.0,<2.0.0'}]") == 0
    assert unpacked(tmp_path) == {
        "ansible_collections/a/one/MANIFEST.json",
        "ansible_collections/a/one/plugins/modules/one.py",
    }


def test_replaces_what_was_there(tmp_path: Path, wheel: Path) -> None:
    stale = tmp_path / "collections/ansible_collections/a/gone/MANIFEST.json"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert run(tmp_path, wheel, "collections: [{name: a.two, version: '>=3.0.0'}]") == 0
    assert not stale.exists()
    assert "ansible_collections/a/two/MANIFEST.json" in unpacked(tmp_path)


@pytest.mark.parametrize(
    ("requirements", "complaint"),
    [
        ("collections: [{name: a.one, version: '>=2.0.0'}]", "carries a.one 1.5.0, but '>=2.0.0'"),
        ("collections: [{name: a.three, version: '>=1.0.0'}]", "not carry the collection a.three"),
        ("collections: [{name: a.one}]", "requirements.yml: needs a list 'collections'"),
        ("collections: [{name: a.one, version: new}]", "requirements.yml: needs a list"),
        ("roles: []", "requirements.yml: needs a list 'collections'"),
    ],
)
def test_refuses_and_leaves_the_old_ones(
    tmp_path: Path,
    wheel: Path,
    capsys: pytest.CaptureFixture[str],
    requirements: str,
    complaint: str,
) -> None:
    assert run(tmp_path, wheel, "collections: [{name: a.two, version: '>=3.0.0'}]") == 0
    before = unpacked(tmp_path)
    assert run(tmp_path, wheel, requirements) == 1
    assert complaint in capsys.readouterr().err
    assert unpacked(tmp_path) == before
