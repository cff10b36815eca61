"""What slaves return as records, of which nothing is believed that was not asked for."""

from __future__ import annotations

from typing import Any

import pytest

from cellblock.fleet import records

STREAM = {"text": "", "size_bytes": 0, "truncated": False}


def record(name: str, **stage: Any) -> dict[str, Any]:
    run = {
        "name": "run",
        "verdict": "ok",
        "exit_code": 0,
        "signal": None,
        "reason": None,
        "violations": [],
        "stdout": STREAM,
        "stderr": STREAM,
        "usage": {"wall_time_ms": 1.5, "cpu_time_ms": 1.0, "memory_peak_bytes": 4096},
        **stage,
    }
    return {"name": name, "host": "elsewhere", "verdict": "ok", "stages": [run], "files": []}


def collect(*results: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """What is taken when slave ``a`` returned ``results`` for jobs 1 and 2, and ``b`` did well with 3."""
    jobs = [{"name": name, "stages": [{"command": ["true"]}]} for name in "123"]
    shares = {"a": jobs[:2], "b": jobs[2:]}
    found, lost = records.collect(
        shares, {"a": {"results": list(results)}, "b": {"results": [record("3")]}}
    )
    return found, [str(job) for job in lost]


def test_records_are_known_by_the_host_that_was_asked() -> None:
    found, lost = collect(record("1"), record("2"))
    assert [(entry["name"], entry["host"]) for entry in found] == [
        ("1", "a"),
        ("2", "a"),
        ("3", "b"),
    ]
    assert lost == []


NONSENSE = "1: no record from a: what it returned makes no sense"


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "ok",
        {},
        record("2"),
        record("3"),
        {**record("1"), "verdict": "splendid"},
        {**record("1"), "stages": {}},
        {**record("1"), "stages": []},
        {**record("1"), "stages": record("1")["stages"] * 2},
        {**record("1"), "stages": [None]},
        {**record("1"), "stages": [{}]},
        {**record("1"), "files": [{}]},
        {**record("1"), "error": "no"},
        record("1", verdict=None),
        record("1", exit_code="0"),
        record("1", exit_code=True),
        record("1", signal="SIGKILL"),
        record("1", reason=5),
        record("1", violations=[{}]),
        record("1", violations=None),
        record("1", stdout=None),
        record("1", stdout={"text": "x"}),
        record("1", stderr={**STREAM, "text": 5}),
        record("1", usage={}),
        record("1", usage={"wall_time_ms": "1", "cpu_time_ms": 1, "memory_peak_bytes": 1}),
        record("1", usage={"wall_time_ms": True, "cpu_time_ms": 1, "memory_peak_bytes": 1}),
    ],
)
def test_what_is_no_record_of_the_job_costs_that_job_alone(bad: Any) -> None:
    found, lost = collect(bad, record("2"))
    assert [entry["name"] for entry in found] == ["2", "3"]
    (sentence,) = lost
    assert sentence.startswith(NONSENSE)


def test_others_records_are_not_taken() -> None:
    found, lost = collect(record("1"), record("2"), record("3"))
    assert [(entry["name"], entry["host"]) for entry in found] == [("3", "b")]
    assert lost[0] == "1: no record from a: 3 records for 2 jobs"


def test_a_job_with_which_the_engine_failed_is_recorded_and_named() -> None:
    error = {"text": "service: is full; wait", "code": "service_unavailable"}
    failed = {"name": "1", "verdict": "internal_error", "stages": [], "error": error}
    found, lost = collect(failed, record("2"))
    assert [entry["name"] for entry in found] == ["1", "2", "3"]
    assert lost == ["1: no record from a: service: is full; wait"]


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (None, "it may have run or not: nothing came back"),
        (
            {"unreachable": True, "msg": "gone\nfor good"},
            "it may have run or not: the host was lost (gone)",
        ),
        ({"msg": "Task failed: \x1b[31mred"}, "\\x1b[31mred"),
        ({}, "no reason given"),
    ],
)
def test_a_host_that_returned_nothing(result: Any, says: str) -> None:
    found, lost = records.collect({"a": [{"name": "1"}]}, {"a": result})
    assert found == []
    assert str(lost[0]) == f"1: no record from a: {says}"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"unreachable": True, "msg": "gone"}, "the host was lost (gone)"),
        ({"failed": True, "msg": "the service was stopped"}, "the service was stopped"),
        ({}, "1 records for 2 jobs"),
    ],
)
def test_what_had_come_back_before_a_host_was_lost_is_kept(more: Any, says: str) -> None:
    jobs: list[dict[str, Any]] = [{"name": name, "stages": []} for name in ("1", "2")]
    first = {"name": "1", "verdict": "ok", "stages": [], "files": []}
    found, lost = records.collect({"a": jobs}, {"a": {"results": [first], **more}})
    assert [entry["name"] for entry in found] == ["1"]
    assert [entry.name for entry in lost] == ["2"] and says in str(lost[0])


def test_who_would_not_run_the_jobs() -> None:
    results = {
        "good": {"results": [], "changed": False},
        "refuses": {"msg": "stages: is missing; add it", "failed": False},
        "dead": {"unreachable": True, "msg": "no route"},
        "odd": {"results": "yes"},
        "silent": None,
    }
    assert records.refusals(results) == {
        "refuses": "stages: is missing; add it",
        "dead": "unreachable (no route)",
        "odd": "no reason given",
        "silent": "it was not asked",
    }
