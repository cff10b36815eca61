"""What the repository says of itself as a collection, and what its artifact holds."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

import build_collection

ROOT = Path(__file__).resolve().parents[2]
# An action is documented by the module of its name.
PLUGINS = sorted(
    path
    for kind in ("modules", "filter", "lookup", "callback")
    for path in (ROOT / "plugins" / kind).glob("*.py")
    if kind != "filter" or "DOCUMENTATION = " in path.read_text(encoding="utf-8")
    # Modules that an action alone calls.
    if not path.name.startswith("_")
)
MODULES = [path.stem for path in PLUGINS if path.parent.name == "modules"]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def documentation(path: Path) -> dict[str, Any]:
    """What a plugin's file says of it, parsed."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id="DOCUMENTATION")], value=ast.Constant(value=str(text))
            ):
                parsed: dict[str, Any] = yaml.safe_load(text)
                return parsed
    return {}


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_one_version() -> None:
    version = load("galaxy.yml")["version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == version
    assert version in load("changelogs/changelog.yaml")["releases"]


def test_the_changelog_is_up_to_date(tmp_path: Path) -> None:
    """CHANGELOG.md is made by `make docs` from changelogs/changelog.yaml."""
    program = Path(sys.executable).with_name("antsibull-changelog")
    made = tmp_path / "CHANGELOG.md"
    subprocess.run([program, "generate", "--output", str(made)], cwd=ROOT, check=True)
    assert (ROOT / "CHANGELOG.md").read_text() == made.read_text()


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_plugins_say_since_when_they_exist(path: Path) -> None:
    added = documentation(path).get("version_added")
    assert added, "says no version_added"
    version = load("galaxy.yml")["version"]
    assert as_numbers(str(added)) <= as_numbers(version), f"{added} is yet to come"


def test_the_action_group_has_every_module() -> None:
    assert load("meta/runtime.yml")["action_groups"] == {"all": MODULES}


def test_actions_are_documented_by_a_module() -> None:
    actions = {path.stem for path in (ROOT / "plugins/action").glob("*.py")} - {"__init__"}
    assert actions <= set(MODULES)


def test_needed_collections_are_the_same_everywhere() -> None:
    needed = {one["name"]: one["version"] for one in load("requirements.yml")["collections"]}
    assert load("galaxy.yml")["dependencies"] == needed


def test_every_playbook_has_a_name_that_a_collection_may_use() -> None:
    """`cellblock.fleet.run_job`: such names have no dashes, those that people type may."""
    names = {path.stem for path in (ROOT / "playbooks").glob("*.yml")}
    assert {name.replace("-", "_") for name in names} <= names


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_collection.build(ROOT, tmp_path_factory.mktemp("artifact"))


def test_the_artifact_is_complete(artifact: Path) -> None:
    with tarfile.open(artifact) as archive:
        members = {member.name: member for member in archive}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    wanted = ("roles/", "plugins/", "playbooks/", "src/", "inventory/", "jobs/", "docs/", "meta/")
    missing = [name for name in tracked if name.startswith(wanted) and name not in members]
    assert not missing
    assert {"README.md", "LICENSE", "CHANGELOG.md", "requirements.yml"} <= set(members)
    links = {name: member.linkname for name, member in members.items() if member.issym()}
    assert links["plugins/module_utils/cellblock"] == "../../src/cellblock"
    assert links["filter_plugins"] == "plugins/filter"
    tests = ("tests", "molecule", "bench", "scripts", "collections", ".")
    assert not [name for name in members if name.startswith(tests)]


def test_equal_sources_give_equal_artifacts(artifact: Path, tmp_path: Path) -> None:
    """Also in another place, with files of another age that were written in another order."""
    with tarfile.open(artifact) as archive:
        names = sorted(member.name for member in archive if not member.isdir())
    for name in ["galaxy.yml", *reversed(names)]:
        source, copy = ROOT / name, tmp_path / "copy" / name
        if name not in (build_collection.MANIFEST, build_collection.FILES):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy, follow_symlinks=False)
    again = build_collection.build(tmp_path / "copy", tmp_path)
    assert again.read_bytes() == artifact.read_bytes()


def test_a_file_that_git_does_not_know_is_refused(tmp_path: Path) -> None:
    for name in ("galaxy.yml", "README.md", "LICENSE", "meta/runtime.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    build_collection.build(tmp_path, tmp_path / ".out")
    (tmp_path / "passwords.yml").write_text("---\n")
    with pytest.raises(build_collection.BuildError, match="passwords.yml: git does not know it"):
        build_collection.build(tmp_path, tmp_path / ".out")


def test_plugins_import_nothing_from_outside_the_collection() -> None:
    own = "ansible_collections.cellblock.fleet.plugins."
    for path in (ROOT / "plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert name.startswith(own) or top == "ansible" or top in sys.stdlib_module_names, (
                    f"{path.relative_to(ROOT)} imports {name}"
                )
