"""Jobs in documents and in `jobs/` are jobs, and their commands are those of the documents."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.cellblock.fleet.plugins.module_utils._environments import (
    parse_definitions,
)

from cellblock.engine.documents import parse_document
from cellblock.engine.job_file import load_job_data
from cellblock.engine.job_parser import parse_job

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)]
# What a document shows of a stage or of a job is put into this.
STAGE = {"name": "run", "command": ["true"]}
JOB = {"environment": "python", "stages": [STAGE]}


def documented(block: str) -> Any:
    data = parse_document(block, "docs/jobs.md")
    assert isinstance(data, dict)
    if set(data) & {"stages", "files", "mounts", "collect", "labels"}:
        return {**JOB, **data}
    return {**JOB, "stages": [{**STAGE, **data}]}


def test_there_are_jobs_in_the_documents() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS)
def test_documented_jobs_are_accepted(block: str) -> None:
    assert parse_job(documented(block)).stages


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yml")), ids=lambda path: path.name)
def test_example_jobs_are_accepted(path: Path) -> None:
    assert parse_job(load_job_data(path)).name == path.stem


def test_the_documented_pip_is_that_of_the_example() -> None:
    """The example is run on the fleet."""
    (command,) = re.findall(r"^    (pip install .*)$", TEXT, re.M)
    job = load_job_data(ROOT / "jobs/numpy.yml")
    example = job["stages"][0]["command"]
    words = command.removesuffix(" NAME").split()
    assert example[: len(words)] == words


def test_the_environment_of_the_example_has_what_it_needs() -> None:
    path = ROOT / "roles/environments/defaults/main.yml"
    defaults = yaml.safe_load(path.read_text(encoding="utf-8"))
    packages = defaults["environments_definitions"]["python"]["packages"]
    assert {"python3", "python3-pip", "libstdc++6"} <= set(packages)


def test_the_documented_environments_are_accepted() -> None:
    role = ROOT / "roles/environments"
    readme = (role / "README.md").read_text(encoding="utf-8")
    extra, play = (
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", readme, re.M | re.S)
    )
    merged = yaml.safe_load((role / "defaults/main.yml").read_text(encoding="utf-8"))[
        "environments_definitions"
    ]
    for name, definition in extra["environments_extra"].items():
        merged[name] = {**merged.get(name, {}), **definition}
    names = [definition.name for definition in parse_definitions(merged)]
    assert names == ["base", "python", "c", "java", "cpp"]
    own = play[0]["roles"][0]["vars"]["environments_definitions"]
    assert [definition.name for definition in parse_definitions(own)] == ["base"]
