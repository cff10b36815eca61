"""Job records as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..text import printable
from ..units import format_bytes

_SHOWN_LINES, _SHOWN_CHARACTERS = 5, 200
_HEADER = ("job", "host", "stage", "verdict", "exit", "wall", "cpu", "memory")


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """One line per stage: job, host, stage, verdict, exit code or signal, times, peak memory.

    ``records`` have the shape of :meth:`cellblock.result.JobResult.as_dict`.
    """
    rows = [_HEADER]
    for record in records:
        for stage in record["stages"]:
            usage = stage["usage"]
            rows.append(
                (
                    str(record["name"]),
                    str(record["host"]),
                    str(stage["name"]),
                    _verdict(stage),
                    _exit(stage),
                    f"{usage['wall_time_ms']:.0f} ms" if usage else "-",
                    f"{usage['cpu_time_ms']:.0f} ms" if usage else "-",
                    format_bytes(usage["memory_peak_bytes"]) if usage else "-",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column > 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def render_output(records: Iterable[Mapping[str, Any]]) -> str:
    """Why a stage was not started, the first lines of what every stage wrote to standard output and the last of
    standard error, and the files that were not collected.

    What a job writes may be made for the terminal that shows it, so anything that is not
    printable is shown escaped.
    """
    lines = []
    for record in records:
        for stage in record["stages"]:
            where = f"{record['name']}/{stage['name']}"
            if stage["reason"] is not None:
                lines.append(f"{where} reason: {printable(stage['reason'])}")
            lines += _shown(stage["stdout"], f"{where} stdout: ", last=False)
            # What went wrong stands at the end.
            lines += _shown(stage["stderr"], f"{where} stderr: ", last=True)
        lines += [
            f"{record['name']} file {printable(file['name'])}: not collected, {printable(file['problem'])}"
            for file in record.get("files", ())
            if file["problem"] is not None
        ]
    return "\n".join(lines)


def _shown(output: Mapping[str, Any], prefix: str, *, last: bool) -> list[str]:
    """The first lines of an output, or its ``last`` ones, and how many are left out."""
    if "text" not in output:
        return [f"{prefix}({output['size_bytes']} bytes that are not text)"]
    lines = output["text"].splitlines()
    kept = lines[-_SHOWN_LINES:] if last else lines[:_SHOWN_LINES]
    shown = [prefix + printable(line)[:_SHOWN_CHARACTERS] for line in kept]
    if (left_out := len(lines) - len(kept)) > 0:
        shown.insert(
            0 if last else len(shown), f"{prefix}({left_out} {'earlier' if last else 'more'} lines)"
        )
    return shown


def _verdict(stage: Mapping[str, Any]) -> str:
    limits = ", ".join(violation["limit"] for violation in stage["violations"])
    return f"{stage['verdict']} ({limits})" if limits else str(stage["verdict"])


def _exit(stage: Mapping[str, Any]) -> str:
    if stage["signal"] is not None:
        return str(stage["signal"]["name"])
    return "-" if stage["exit_code"] is None else str(stage["exit_code"])
