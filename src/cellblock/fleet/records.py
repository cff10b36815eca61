"""The records that slaves returned, taken with care: a captured slave may return anything.

A slave was given a share of the jobs and owes one record for each of them, in their order. What has not the
shape of a record is left out and its job is named as lost; the others are kept. Which host ran a job is
known here, whatever its record says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.result import Verdict
from ..text import printable
from ..validate import Value

LONGEST_REASON = 300
LONGEST_NAME = 200
MOST_STAGES = 1000
# Outputs and files are bounded by what the engine returns at most.
LONGEST_OUTPUT = 512 * 2**20
_VERDICTS = [verdict.value for verdict in Verdict]
_FIGURES_SHOWN = ("wall_time_ms", "cpu_time_ms", "memory_peak_bytes")


class Misfit(Exception):
    """It is no record of that job; the text names the place."""

    def __init__(self, where: str, what: str, _remedy: str = "") -> None:
        super().__init__(f"{where} {what}")


@dataclass(frozen=True)
class Lost:
    """A job without a record, or with one that only says what went wrong: ``host`` was given it, ``reason`` is what is
    known.
    """

    job: Mapping[str, Any]
    host: str
    reason: str

    @property
    def name(self) -> str:
        return str(self.job["name"])

    def __str__(self) -> str:
        return f"{self.name}: no record from {self.host}: {self.reason}"


def collect(
    shares: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Lost]]:
    """The records, and the jobs that have none.

    ``shares``: {host: its jobs (mappings with ``name`` and ``stages``)}; ``results``: {host: what sandbox_job returned}.
    """
    records: list[dict[str, Any]] = []
    lost: list[Lost] = []
    for host, jobs in shares.items():
        answer, problem = _answer(results.get(host), len(jobs))
        for number, job in enumerate(jobs):
            name = str(job["name"])
            if number >= len(answer):
                lost.append(Lost(job, host, problem))
                continue
            try:
                whole = Value(answer[number], "the record", Misfit, prefix="", quote=False)
                _check(whole, name, len(job.get("stages", ())))
            except Misfit as misfit:
                lost.append(Lost(job, host, f"what it returned makes no sense ({misfit})"))
                continue
            records.append({**answer[number], "host": host})
            if answer[number].get("error"):
                lost.append(Lost(job, host, printable(answer[number]["error"]["text"])))
    return records, lost


def _answer(result: Any, count: int) -> tuple[Sequence[Any], str]:
    """The records that a host returned, ``count`` at most and of the first of its jobs, and why there are no more."""
    if not isinstance(result, Mapping):
        return (), "it may have run or not: nothing came back"
    found = result.get("results")
    if not isinstance(found, (list, tuple)):
        found = ()
    if len(found) > count:
        return (), f"{len(found)} records for {count} jobs"
    if result.get("unreachable"):
        return found, f"it may have run or not: the host was lost ({reason(result)})"
    if result.get("msg") or not found:
        return found, reason(result)
    return found, f"{len(found)} records for {count} jobs"


def refusals(results: Mapping[str, Any]) -> dict[str, str]:
    """The hosts that would not run the jobs, by what sandbox_job returned in check mode, and why."""
    refused = {}
    for host, result in results.items():
        if not isinstance(result, Mapping):
            refused[host] = "it was not asked"
        elif result.get("unreachable"):
            refused[host] = f"unreachable ({reason(result)})"
        elif result.get("msg") or not isinstance(result.get("results"), (list, tuple)):
            refused[host] = reason(result)
    return refused


def reason(result: Mapping[str, Any]) -> str:
    """The first line of what a task failed with; a host may have written it."""
    message = result.get("msg")
    lines = message.strip().splitlines() if isinstance(message, str) else []
    if not lines:
        return "no reason given"
    return printable(lines[0].removeprefix("Task failed: "))[:LONGEST_REASON]


def _check(record: Value, name: str, stages: int) -> None:
    fields = record.fields(("name", "verdict", "stages"), {"files": [], "error": None}, others=True)
    if fields["name"].text(most=LONGEST_NAME) != name:
        raise fields["name"].error("is another job's", "")
    fields["verdict"].choice(_VERDICTS)
    if (error := fields["error"].or_none()) is not None:
        error.fields(("text",), others=True)["text"].text(most=LONGEST_OUTPUT)
    recorded = fields["stages"].list(most=MOST_STAGES)
    if fields["error"].raw is None and len(recorded) != stages:
        raise fields["stages"].error("are not those of the job", "")
    for stage in recorded:
        _check_stage(stage)
    for file in fields["files"].list():
        parts = file.fields(("name", "problem"), others=True)
        parts["name"].text()
        if (problem := parts["problem"].or_none()) is not None:
            problem.text(most=LONGEST_NAME)


def _check_stage(stage: Value) -> None:
    fields = stage.fields(
        "name verdict exit_code signal reason violations stdout stderr usage".split(), others=True
    )
    fields["name"].text(most=LONGEST_NAME)
    fields["verdict"].choice(_VERDICTS)
    if (exit_code := fields["exit_code"].or_none()) is not None:
        exit_code.integer(0, 255)
    if (signal := fields["signal"].or_none()) is not None:
        signal.fields(("name",), others=True)["name"].text(most=LONGEST_NAME)
    if (why := fields["reason"].or_none()) is not None:
        why.text(most=LONGEST_OUTPUT)
    for violation in fields["violations"].list(most=MOST_STAGES):
        violation.fields(("limit",), others=True)["limit"].text(most=LONGEST_NAME)
    for stream in ("stdout", "stderr"):
        output = fields[stream].fields(("size_bytes",), {"text": None, "base64": None}, others=True)
        output["size_bytes"].integer(0, 2**63)
        for form in ("text", "base64"):
            if (content := output[form].or_none()) is not None:
                content.text(most=LONGEST_OUTPUT)
    if (usage := fields["usage"].or_none()) is not None:
        for figure in usage.fields(_FIGURES_SHOWN, others=True).values():
            if isinstance(figure.raw, bool) or not isinstance(figure.raw, (int, float)):
                raise figure.wrong("a number")
