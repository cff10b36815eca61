"""The host's configuration: every mistake is named, with the role that writes the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cellblock.engine.host import Host, OfferedMount
from cellblock.engine.job import JobMount
from cellblock.engine.limits import DEFAULT_MAXIMA
from cellblock.errors import HostSetupError


def load(directory: Path, **changes: Any) -> Host:
    settings = {
        "nsjail": "/bin/sh",
        "jobinit": "/bin/sh",
        "environments_file": str(directory / "environments.json"),
        "run_dir": "/run/cellblock",
        "spool_dir": "/var/lib/cellblock/spool",
        "first_id": 1_900_000_000,
        "parallel_jobs": 4,
        "maxima": {"memory_bytes": "4GiB"},
        "mounts": {"data": {"source": "/srv", "writable": True}, "etc": {"source": "/etc"}},
        **changes,
    }
    path = directory / "engine.json"
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != ...}))
    return Host.load(path)


def test_what_the_role_writes(tmp_path: Path) -> None:
    host = load(tmp_path)
    assert (host.first_id, host.parallel_jobs, host.network) == (1_900_000_000, 4, None)
    assert host.maxima == {**DEFAULT_MAXIMA, "memory_bytes": 4 * 2**30}
    assert host.mounts["data"] == OfferedMount(Path("/srv"), writable=True)
    assert not host.mounts["etc"].writable


def test_every_running_job_has_two_uids_to_itself(tmp_path: Path) -> None:
    host = load(tmp_path)
    uids = [id for number in range(4) for id in vars(host.uids(number)).values()]
    assert uids == list(range(1_900_000_000, 1_900_000_008))


def test_parallel_jobs_default_to_the_cpus_and_may_come_from_a_command_line(tmp_path: Path) -> None:
    assert load(tmp_path, parallel_jobs=None).parallel_jobs == len(os.sched_getaffinity(0))
    assert load(tmp_path, parallel_jobs="3").parallel_jobs == 3


@pytest.mark.parametrize(
    ("changes", "place", "complaint"),
    [
        ({"nsjail": ...}, "nsjail", "is missing"),
        ({"nsjail": "/absent/nsjail"}, None, "is missing; run playbooks/site.yml"),
        ({"run_dir": 7}, "run_dir", "is 7, not text"),
        ({"first_id": 0}, "first_id", "write a number from 1 to"),
        ({"parallel_jobs": "many"}, "parallel_jobs", "is 'many'; write a number from 1 to"),
        ({"maxima": []}, "maxima", "not a mapping"),
        ({"maxima": {"memory": "1GiB"}}, "maxima.memory", "is not a limit; write memory_bytes"),
        ({"maxima": {"memory_bytes": "1"}}, "maxima.memory_bytes", "has no unit"),
        ({"mounts": {"data": {}}}, "mounts.data.source", "is missing"),
        # "false" would be true to Python.
        ({"mounts": {"data": {"source": "/srv", "writable": "false"}}}, "mounts.data.writable",
         "is 'false'; write true or false, or run the worker_slave role"),
        ({"network": {"mode": "bridge"}}, "network.mode", "macvlan or routed"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    tmp_path: Path, changes: dict[str, Any], place: str | None, complaint: str
) -> None:
    with pytest.raises(HostSetupError) as caught:
        load(tmp_path, **changes)
    if place is not None:
        assert caught.value.subject == f"{tmp_path}/engine.json: {place}"
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("[]", "is [], not a mapping"), ("{", "is not JSON"), (None, "cannot be read")],
)
def test_files_that_are_none(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "engine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(HostSetupError, match=complaint.replace("[]", r"\[\]")) as caught:
        Host.load(path)
    assert "the worker_slave role" in caught.value.remedy


def test_environments(tmp_path: Path) -> None:
    host = load(tmp_path)
    entry = {"path": "/srv", "default_path": "/bin", "description": "a shell", "digest": "x"}
    host.environments_file.write_text(json.dumps({"base": {**entry, "mounts": ["data"]}}))
    assert host.environments()["base"].mounts == (JobMount("data"),)
    host.environments_file.write_text(json.dumps({"base": {**entry, "mounts": "data"}}))
    with pytest.raises(HostSetupError, match="base.mounts: is 'data', not a list.*environments"):
        host.environments()


def test_what_was_taken_over_is_older_than_what_comes(tmp_path: Path) -> None:
    made = load(tmp_path, run_dir=str(tmp_path))
    made.note_taken_over(1_700_000_000.5)
    made.note_taken_over(1_800_000_000.5)
    assert (tmp_path / "configured").stat().st_mtime == 1_800_000_000.5
