"""The JSON shape of records."""

from __future__ import annotations

import base64
import json

import pytest

from cellblock.engine.limits import StageConstraints
from cellblock.engine.result import (
    CollectedFile,
    JobResult,
    Output,
    StageResult,
    Verdict,
    content,
    signal_name,
)


@pytest.mark.parametrize("data", [b"", b"text\n", "é\t\r\n".encode(), b"\x1b[1mbold text\x1b[0m"])
def test_text_is_text(data: bytes) -> None:
    assert content(data) == {"text": data.decode()}


@pytest.mark.parametrize("data", [b"\xff", b"a\0b", b"\x01" * 5000, b"\x1b" * 5000 + b"a" * 5000])
def test_the_rest_is_base64_and_nothing_is_lost(data: bytes) -> None:
    assert base64.b64decode(content(data)["base64"]) == data


def stage(verdict: Verdict, **fields: object) -> StageResult:
    return StageResult("run", verdict, StageConstraints(), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        ([Verdict.OK], "ok"),
        ([Verdict.OK, Verdict.NONZERO_EXIT, Verdict.SKIPPED], "nonzero_exit"),
        ([Verdict.SIGNALED, Verdict.SKIPPED, Verdict.OK], "signaled"),
    ],
)
def test_a_jobs_verdict_is_that_of_its_first_stage_that_failed(
    verdicts: list[Verdict], verdict: str
) -> None:
    result = JobResult("id", "n", "e", "h", {}, tuple(stage(v) for v in verdicts))
    assert result.as_dict()["verdict"] == verdict


def test_exit_code_and_signal_are_separate() -> None:
    shape = stage(Verdict.SIGNALED, signal=6).as_dict()
    assert (shape["exit_code"], shape["signal"]) == (None, {"name": "SIGABRT", "number": 6})
    shape = stage(Verdict.NONZERO_EXIT, exit_code=134).as_dict()
    assert (shape["exit_code"], shape["signal"]) == (134, None)


def test_output_says_what_was_cut() -> None:
    assert Output(b"ab", truncated=True).as_dict() == {
        "text": "ab",
        "size_bytes": 2,
        "truncated": True,
    }


def test_a_file_that_was_not_taken_has_no_content() -> None:
    refused = CollectedFile("a", None, "symbolic_link", b"", None).as_dict()
    assert refused == {"name": "a", "problem": "symbolic_link"}
    odd = CollectedFile("\\xff", "/w==", None, b"x", "digest").as_dict()
    assert (odd["name_base64"], odd["text"], odd["size_bytes"]) == ("/w==", "x", 1)
    json.dumps(odd)


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (34, "SIGRTMIN"), (40, "SIGRTMIN+6")])
def test_names_of_signals(number: int, name: str) -> None:
    assert signal_name(number) == name
