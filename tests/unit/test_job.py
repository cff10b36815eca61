"""Job files: what is accepted, and that every mistake is named with its field and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cellblock.engine.job import Job
from cellblock.engine.job_file import as_request, load_job_data
from cellblock.engine.job_parser import parse_job
from cellblock.engine.limits import DEFAULT_MAXIMA, LIMITS, StageConstraints, parse_maxima
from cellblock.errors import (
    HostSetupError,
    InvalidJobError,
    JobFileError,
    LimitAboveMaximumError,
)
from cellblock.validate import Value

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def load_job(path: Path) -> Job:
    return parse_job(load_job_data(path))


def job(**changes: Any) -> dict[str, Any]:
    return {
        "environment": "base",
        "stages": [{"name": "run", "command": ["true"]}],
        **changes,
    }


def stage(**changes: Any) -> dict[str, Any]:
    return job(stages=[{"name": "run", "command": ["true"], **changes}])


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yml")), ids=lambda path: path.name)
def test_the_example_jobs_are_valid(path: Path) -> None:
    assert load_job(path).stages


def test_defaults() -> None:
    parsed = parse_job(job())
    assert parsed.name == "job"
    assert parsed.stages[0].stdin == b""
    assert parsed.stages[0].constraints == StageConstraints()


def test_everything_that_can_be_written() -> None:
    parsed = parse_job(
        {
            "name": "all",
            "environment": "c",
            "labels": {"tenant": "demo"},
            "files": {
                "a/b.txt": {"text": "é\n"},
                "run": {"base64": "AP8=", "executable": True},
            },
            "stages": [
                {
                    "name": "one",
                    "command": ["sh", "-c", "true"],
                    "stdin": {"text": "in"},
                    "environment_variables": {"A_1": "x=y"},
                    "working_directory": "a",
                    "constraints": {"wall_time_ms": "2s", "memory_bytes": "64MiB", "cpus": 0.5},
                    "run_always": True,
                }
            ],
        }
    )
    assert [(f.name, f.content, f.executable) for f in parsed.files] == [
        ("a/b.txt", "é\n".encode(), False),
        ("run", b"\x00\xff", True),
    ]
    only = parsed.stages[0]
    assert (only.stdin, only.working_directory, only.run_always) == (b"in", "a", True)
    assert only.constraints.wall_time_ms == 2000
    assert only.constraints.memory_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("data", "field", "complaint"),
    [
        (None, "job", "not a mapping"),
        ([], "job", "not a mapping"),
        ({"environment": "base"}, "stages", "missing"),
        ({"stages": []}, "environment", "missing"),
        (job(stages=[]), "stages", "not a list of 1 to"),
        (job(stages="run"), "stages", "not a list"),
        (job(colour="red"), "colour", "not a known field"),
        (job(environment="../etc"), "environment", "is '../etc'"),
        (job(environment=3), "environment", "is 3"),
        (job(name=""), "name", "is ''"),
        (job(labels={"a": 1}), "labels.a", "not text"),
        (job(stages=[{"name": "run", "command": ["a"]}] * 2), "stages[1].name", "earlier stage"),
        (stage(command="true"), "stages[0].command", "not a list of words"),
        (stage(command=[]), "stages[0].command", "not a list of words"),
        (stage(command=["a", 1]), "stages[0].command[1]", "not text"),
        (stage(command=["a\0b"]), "stages[0].command[0]", "NUL"),
        (stage(command=["\ud800"]), "stages[0].command[0]", "surrogate"),
        (stage(timeout=1), "stages[0].timeout", "not a known field"),
        (stage(run_always="yes"), "stages[0].run_always", "is 'yes'"),
        (stage(working_directory="/tmp"), "stages[0].working_directory", "absolute"),
        (stage(working_directory="a/../.."), "stages[0].working_directory", "'..'"),
        (stage(environment_variables={"A=B": "x"}), "stages[0].environment_variables.A=B", "name"),
        (stage(environment_variables={"A": 1}), "stages[0].environment_variables.A", "not text"),
        (stage(stdin="text"), "stages[0].stdin", "is 'text'"),
        (stage(constraints=[]), "stages[0].constraints", "not a mapping"),
        (stage(constraints={"memory": "1MiB"}), "stages[0].constraints.memory", "not a limit"),
        (
            stage(constraints={"memory_bytes": "64"}),
            "stages[0].constraints.memory_bytes",
            "no unit",
        ),
        (
            stage(constraints={"memory_bytes": 1}),
            "stages[0].constraints.memory_bytes",
            "too little",
        ),
        (
            stage(constraints={"memory_bytes": "8MiB", "scratch_bytes": "9MiB"}),
            "stages[0].constraints.scratch_bytes",
            "more than memory_bytes",
        ),
        (job(files=[]), "files", "not a mapping"),
        (job(files={"/etc/passwd": {"text": ""}}), "files./etc/passwd", "absolute"),
        (job(files={"../x": {"text": ""}}), "files.../x", "'..'"),
        (job(files={"a//b": {"text": ""}}), "files.a//b", "not a plain path"),
        (job(files={"./a": {"text": ""}}), "files../a", "not a plain path"),
        (job(files={"": {"text": ""}}), "files.", "not a plain path"),
        (job(files={3: {"text": ""}}), "files.3", "not text"),
        (job(files={"a": {"text": ""}, "a/b": {"text": ""}}), "files.a/b", "both"),
        (job(files={"a/b": {"text": ""}, "a": {"text": ""}}), "files.a", "both"),
        (job(files={"a": "text"}), "files.a", "is 'text'"),
        (job(files={"a": {"text": "", "base64": ""}}), "files.a", "exactly one"),
        (job(files={"a": {"base64": "!"}}), "files.a.base64", "not valid base64"),
        (job(files={"a": {"base64": 3}}), "files.a.base64", "not valid base64"),
        (job(files={"a": {"text": 3}}), "files.a.text", "not text"),
        (job(files={"a": {"text": "\udfff\ud800"}}), "files.a.text", "surrogate"),
        (job(files={"a": {"text": "", "executable": 1}}), "files.a.executable", "is 1"),
        (job(files={"a": {"path": "/etc/shadow"}}), "files.a.path", "not open to the service"),
        (job(files={str(n): {"text": ""} for n in range(257)}), "files", "has 257 entries"),
        (job(labels={str(n): "x" for n in range(33)}), "labels", "too many"),
        (job(labels={"a": "x" * 257}), "labels", "too long"),
        (stage(command=["a"] * 40_000), "stages[0].command", "40000 words"),
        (stage(network="lan"), "stages[0].network", "not a network policy"),
        (job(mounts="data"), "mounts", "not a list"),
        (job(mounts=["data", "data"]), "mounts[1]", "again"),
        (job(mounts=[{"name": "../x"}]), "mounts[0].name", "is '../x'"),
        (job(collect=["/etc/shadow"]), "collect[0]", "absolute"),
        (
            stage(constraints={"memory_bytes": "9" * 1000 + "B"}),
            "stages[0].constraints.memory_bytes",
            "longer than 32 characters",
        ),
        (
            stage(constraints={"processes": 10**4000}),
            "stages[0].constraints.processes",
            "larger than 2^63",
        ),
        (
            job(
                stages=[
                    {"name": f"s{n}", "command": ["true"], "constraints": {"stdout_bytes": "16MiB"}}
                    for n in range(5)
                ]
            ),
            "stages",
            "bytes of output together",
        ),
    ],
)
def test_mistakes_are_named(data: object, field: str, complaint: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse_job(data)
    # The field may be all of the subject; "exactly one" stands in the remedy.
    assert caught.value.subject == field
    assert complaint in str(caught.value)
    assert caught.value.remedy


def test_a_limit_without_its_unit_is_suggested() -> None:
    with pytest.raises(InvalidJobError, match="wall_time_ms"):
        parse_job(stage(constraints={"wall_time": 3}))


def test_less_memory_than_default_scratch_lowers_the_scratch() -> None:
    constraints = StageConstraints.parse({"memory_bytes": "16MiB"}, "x")
    assert constraints.scratch_bytes == 16 * 2**20


def test_all_limits_above_their_maximum_are_listed() -> None:
    constraints = StageConstraints.parse({"cpu_time_ms": "1000s", "processes": 5000}, "x")
    with pytest.raises(LimitAboveMaximumError) as caught:
        constraints.within(DEFAULT_MAXIMA, ("cpu_time_ms", "processes"), "stages[0].constraints")
    assert "cpu_time_ms is 1000000, the maximum is 120000 milliseconds" in str(caught.value)
    assert "processes is 5000" in str(caught.value)


def test_defaults_follow_the_maxima_of_a_host() -> None:
    maxima = {**DEFAULT_MAXIMA, "memory_bytes": 32 * 2**20, "processes": 8}
    constraints = StageConstraints().within(maxima, (), "x")
    assert (constraints.memory_bytes, constraints.processes) == (32 * 2**20, 8)
    # It counts in the memory.
    assert constraints.scratch_bytes == min(32 * 2**20, StageConstraints().scratch_bytes)
    assert constraints.cpu_time_ms == StageConstraints().cpu_time_ms
    # What a job chose stays, or is refused, also where it is the default's value.
    with pytest.raises(LimitAboveMaximumError, match="memory_bytes is"):
        StageConstraints().within(maxima, ("memory_bytes",), "x")


def test_the_parser_notes_which_limits_a_job_chose() -> None:
    job = parse_job(stage(constraints={"wall_time_ms": "1s"}))
    assert job.stages[0].chosen == {"wall_time_ms"}


def test_maxima_of_a_host_override_the_defaults() -> None:
    maxima = parse_maxima(Value({"memory_bytes": "4GiB"}, "maxima", HostSetupError))
    assert maxima["memory_bytes"] == 4 * 2**30
    assert maxima["processes"] == DEFAULT_MAXIMA["processes"]


def test_every_default_is_within_its_bounds() -> None:
    for name, info in LIMITS.items():
        assert info.minimum <= info.default <= info.maximum, name


def test_requests_carry_contents_as_base64_and_mean_the_same() -> None:
    data = job(files={"a": {"text": "é,[{"}, "b": {"base64": "AA==", "executable": True}})
    data["stages"][0]["stdin"] = {"text": "in"}
    request = as_request(data)
    assert "text" not in json.dumps(request)
    assert parse_job(request) == parse_job(data)


@pytest.mark.parametrize(
    "data", [None, [], {"files": 3}, {"files": {"a": {"text": 3}}}, {"stages": [3, {"stdin": 3}]}]
)
def test_requests_keep_what_is_wrong_for_the_parser_to_name(data: Any) -> None:
    assert as_request(data) == data


class TestJobFile:
    def write(self, path: Path, data: object) -> Path:
        path.write_text(json.dumps(data))
        return path

    def test_named_files_are_read_relative_to_the_job(self, tmp_path: Path) -> None:
        (tmp_path / "main.c").write_bytes(b"\xff\x00")
        path = self.write(
            tmp_path / "job.yml",
            job(
                files={"main.c": {"path": "main.c", "executable": True}},
                stages=[{"name": "run", "command": ["true"], "stdin": {"path": "main.c"}}],
            ),
        )
        loaded = load_job(path)
        assert loaded.files[0].content == loaded.stages[0].stdin == b"\xff\x00"
        assert loaded.files[0].executable

    @pytest.mark.parametrize("named", ["missing", ".", "fifo"])
    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path, named: str) -> None:
        import os

        os.mkfifo(tmp_path / "fifo")
        path = self.write(tmp_path / "job.yml", job(files={"a": {"path": named}}))
        with pytest.raises(JobFileError) as caught:
            load_job_data(path)
        assert "files.a.path" in caught.value.subject

    def test_no_job_file(self, tmp_path: Path) -> None:
        with pytest.raises(JobFileError, match="does not exist"):
            load_job(tmp_path / "none.yml")

    @pytest.mark.parametrize("text", ["a: [", "a: b: c", "[" * 100_000, "\x00", "when: 2026-13-45"])
    def test_broken_yaml(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "job.yml"
        path.write_text(text)
        with pytest.raises((JobFileError, InvalidJobError)) as caught:
            load_job(path)
        assert "\n" not in str(caught.value)

    def test_bytes_that_are_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yml"
        path.write_bytes(b"\xff\xfe\x00a: 1")
        with pytest.raises((JobFileError, InvalidJobError)):
            load_job(path)
