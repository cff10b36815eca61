"""A report of who was found to reach whom: for terminals, as JSON, as a picture and as a page.

What hosts answered is in it. A hostile one may have answered with what a terminal or a browser
would act upon, so everything is escaped where it is shown: for terminals by ``printable``, in the page
and the picture by the templates' environment, which escapes whatever a template inserts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..text import printable
from .probe_plan import PATH_NAMES, PATHS, SERVICE
from .verdict import AS_DECLARED, BROKEN, LEAK, UNPROVEN, VERDICTS, Finding, Report

WIDTH = 120

_OPEN, _CLOSED, _NONE = "●", "·", " "
_LETTERS = {LEAK: "L", BROKEN: "B", UNPROVEN: "?"}
_NAMES = {
    AS_DECLARED: "as declared",
    LEAK: "leaks",
    BROKEN: "broken",
    UNPROVEN: "unproven",
}
# ANSI: bold white on red, bold yellow, bold magenta, green, grey.
_COLOURS = {"L": "1;97;41", "B": "1;33", "?": "1;35", _OPEN: "32", _CLOSED: "90"}
_FILLS = {"L": "#c62828", "B": "#ef6c00", "?": "#7b1fa2", _OPEN: "#2e7d32", _CLOSED: "#dfe3e6"}
_LEGEND = (
    (_OPEN, "reached, as declared"),
    (_CLOSED, "not reached, as declared"),
    ("L", "leak: reached, not declared"),
    ("B", "broken: declared, not reached"),
    ("?", "unproven"),
)

METHOD = (
    "Every vantage tried every service of every host at each of its addresses, over IPv4, IPv6 and"
    " IPv6 link-local, all at the same time; ports without a service had a listener meanwhile.",
    "Reached: the target itself answered: a TCP handshake, a datagram or an echo. A refusal (RST,"
    " ICMP port unreachable) counts as reached, for the packet arrived. So does a packet that the"
    " target's listener received, or a TCP handshake that it began, although no answer came back.",
    "A vantage tells what it saw itself: of a host that is in an attacker's hands, its own row proves"
    " nothing where a real service, and not the prober, listens at the other end.",
    "Not reached: no answer within the time although it was sent more than once, or word of the"
    " sender's own stack or of another box that there is no way.",
    "Not reached counts as proven only when somebody else got an answer from the same address,"
    " protocol and port in the same run (the control): another vantage or, failing that, the target"
    " host itself. Otherwise it is unproven.",
    "Forged packets claimed the address of a host that is let in. That none got in is known from the"
    " target's listener, which did receive what that host sent itself.",
    "SLAVE/POLICY is a real job on that slave, submitted as any job, with that network policy;"
    " SLAVE/slot is root in a network slot as jobs have it, which forges packets and frames too;"
    " SLAVE/sibling is another job, with listeners. That a job may open no socket for a packet counts"
    " as not reached.",
    "What should be reached follows from the declared flows alone. Firewall rules were not read for"
    " it; rules in force that differ from those that were installed are listed apart.",
)


@dataclass(frozen=True)
class Run:
    """What is known of a run besides its outcome."""

    fleet_name: str
    created: datetime
    version: str = __version__

    @property
    def created_text(self) -> str:
        return self.created.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# As data.


def to_json(report: Report, run: Run) -> str:
    """The whole report as JSON, with every cell and how it is known."""
    plan, fleet = report.plan, report.plan.fleet
    data = {
        "format": 1,
        "cellblock": run.version,
        "fleet": run.fleet_name,
        "created": run.created.astimezone(UTC).isoformat(timespec="seconds"),
        "is_green": report.is_green,
        "counts": report.counts,
        "differences": report.differences(),
        "vantages": list(plan.vantages),
        "hosts": [
            {
                "name": host.name,
                "groups": list(host.groups),
                "addresses": [str(address) for address in host.addresses],
                "external": host.external,
            }
            for host in fleet.hosts.values()
        ],
        "flows": [
            {"index": flow.index, "flow": str(flow), "purpose": flow.purpose}
            for flow in fleet.flows
        ],
        "method": list(METHOD),
        "gaps": list(plan.gaps),
        "notes": list(plan.notes),
        "drift": {host: list(texts) for host, texts in report.drift.items()},
        "cells": [_finding_data(finding) for finding in (*report.findings, *report.controls)],
    }
    return json.dumps(data, indent=1, ensure_ascii=True) + "\n"


def _finding_data(finding: Finding) -> dict[str, Any]:
    cell = finding.cell
    return {
        "kind": cell.kind,
        "vantage": cell.vantage,
        "target": cell.target,
        "service": cell.service.name,
        "protocol": cell.service.protocol,
        "port": cell.service.port,
        "path": cell.path,
        "flow": cell.flow.index if cell.flow else None,
        "claimed": cell.claimed,
        "verdict": finding.verdict,
        "is_reached": finding.is_reached,
        "sentence": finding.sentence,
        "control": finding.control,
        "seen": [
            {
                "address": seen.probe.address,
                "interface": seen.probe.interface,
                "outcome": seen.outcome,
                "evidence": seen.evidence,
                "arrived": seen.arrived,
            }
            for seen in finding.seen
        ],
    }


# The matrix, common to the terminal and the picture.


@dataclass(frozen=True)
class _Group:
    """One target's columns."""

    target: str
    services: tuple[str, ...]


class _Matrix:
    def __init__(self, report: Report) -> None:
        self.vantages = report.plan.vantages
        self.cells: dict[tuple[str, str, str, str], Finding] = {}
        columns: dict[str, dict[str, None]] = {}
        for finding in report.findings:
            if finding.cell.kind == SERVICE:
                cell = finding.cell
                self.cells[cell.vantage, cell.target, cell.service.name, cell.path] = finding
                columns.setdefault(cell.target, {})[cell.service.name] = None
        fleet = report.plan.fleet
        self.groups = [
            _Group(host, tuple(name for name in fleet.services if name in columns[host]))
            for host in fleet.hosts
            if host in columns
        ]
        self.paths = [path for path in PATHS if any(key[3] == path for key in self.cells)]

    def glyphs(self, vantage: str, target: str, service: str) -> list[tuple[str, Finding | None]]:
        """One glyph for each path."""
        found = (self.cells.get((vantage, target, service, path)) for path in self.paths)
        return [(_glyph(finding), finding) for finding in found]

    def blocks(self, room: float, width_of: Callable[[_Group], float]) -> Iterator[list[_Group]]:
        """The groups of columns, as many beside each other as there is room for.

        A group that is too wide by itself is divided.
        """
        block: list[_Group] = []
        used = 0.0
        for group in self._divided(room, width_of):
            width = width_of(group)
            if block and used + width > room:
                yield block
                block, used = [], 0.0
            block.append(group)
            used += width
        if block:
            yield block

    def _divided(self, room: float, width_of: Callable[[_Group], float]) -> Iterator[_Group]:
        for group in self.groups:
            rest = list(group.services)
            while rest:
                count = len(rest)
                while count > 1 and width_of(_Group(group.target, tuple(rest[:count]))) > room:
                    count -= 1
                yield _Group(group.target, tuple(rest[:count]))
                rest = rest[count:]


def _glyph(finding: Finding | None) -> str:
    if finding is None:
        return _NONE
    if finding.verdict == AS_DECLARED:
        return _OPEN if finding.is_reached else _CLOSED
    return _LETTERS[finding.verdict]


def summary(report: Report) -> str:
    """The outcome in one line."""
    counts = report.counts
    parts = [
        f"{counts[verdict]} {'leak' if verdict == LEAK and counts[LEAK] == 1 else _NAMES[verdict]}"
        for verdict in VERDICTS
    ]
    drift = sum(len(texts) for texts in report.drift.values())
    if drift:
        parts.append(f"{drift} differences in rules")
    outcome = "Isolation is as declared" if report.is_green else "Isolation is NOT as declared"
    if not report.is_green and not counts[LEAK] and not counts[BROKEN] and not drift:
        outcome = "Isolation is not proven"
    return f"{outcome}: {', '.join(parts)}."


def forged_line(report: Report) -> str | None:
    forged = [finding for finding in report.findings if finding.cell.kind != SERVICE]
    if not forged:
        return None
    got_in = sum(finding.verdict == LEAK for finding in forged)
    unproven = sum(finding.verdict == UNPROVEN for finding in forged)
    return f"Forged sources: {len(forged)} tried, {got_in} got in, {unproven} unproven."


# For terminals.


def to_text(report: Report, colour: bool, limit: int | None = None) -> str:
    """The matrix for a terminal, and under it all that is not as declared (at most ``limit``)."""
    matrix = _Matrix(report)
    paint = _paint if colour else lambda text, _code: text
    first = max([len(printable(name)) for name in matrix.vantages] + [4])
    lines: list[str] = []
    for block in matrix.blocks(WIDTH - first, lambda group: _text_width(group, matrix) + 3):
        lines += _text_block(matrix, block, first, paint)
    names = ", ".join(PATH_NAMES[path] for path in matrix.paths)
    lines += [
        f"Rows reach columns, over {names}, in this order." if matrix.paths else "Nothing tried.",
        "   ".join(f"{_painted(glyph, paint)} {text}" for glyph, text in _LEGEND),
    ]
    if any("/" in vantage for vantage in matrix.vantages):
        lines.append(
            "SLAVE/POLICY: a job there with that network policy; SLAVE/slot: root in its network."
        )
    forged = forged_line(report)
    if forged:
        lines.append(forged)
    if report.plan.notes:
        lines += ["Not tried, and no part of the verdict:"]
        lines += [f"  {printable(note)}" for note in report.plan.notes]
    code = "1;32" if report.is_green else "1;31"
    lines += ["", paint(summary(report), code)]
    differences = report.differences()
    shown = differences if limit is None else differences[:limit]
    lines += [f"  {printable(sentence)}" for sentence in shown]
    if len(shown) < len(differences):
        lines.append(f"  ... and {len(differences) - len(shown)} more, in the report.")
    return "\n".join(lines)


def _text_width(group: _Group, matrix: _Matrix) -> int:
    columns = sum(_column_width(name, matrix) for name in group.services)
    return max(columns + 2 * (len(group.services) - 1), len(printable(group.target)))


def _column_width(service: str, matrix: _Matrix) -> int:
    return max(len(printable(service)), len(matrix.paths))


def _text_block(
    matrix: _Matrix, block: Sequence[_Group], first: int, paint: Callable[[str, str], str]
) -> list[str]:
    heads, services = [" " * first], [" " * first]
    for group in block:
        width = _text_width(group, matrix)
        heads.append(paint(printable(group.target).ljust(width), "1"))
        names = "  ".join(printable(s).ljust(_column_width(s, matrix)) for s in group.services)
        services.append(names.ljust(width))
    lines = ["   ".join(heads).rstrip(), "   ".join(services).rstrip()]
    for vantage in matrix.vantages:
        parts = [printable(vantage).ljust(first)]
        for group in block:
            columns = []
            for service in group.services:
                glyphs = matrix.glyphs(vantage, group.target, service)
                text = "".join(_painted(glyph, paint) for glyph, _ in glyphs)
                columns.append(text + " " * (_column_width(service, matrix) - len(glyphs)))
            pad = _text_width(group, matrix) - sum(
                _column_width(s, matrix) + 2 for s in group.services
            )
            parts.append("  ".join(columns) + " " * (pad + 2))
        lines.append("   ".join(parts).rstrip())
    return [*lines, ""]


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


def _painted(glyph: str, paint: Callable[[str, str], str]) -> str:
    return paint(glyph, _COLOURS[glyph]) if glyph in _COLOURS else glyph


# The templates of picture and page.


def _shown(value: Any) -> Any:
    """What becomes of each value that a template inserts, before it is escaped for HTML."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


# As a picture.

_BOX, _ROW, _COLUMN_GAP, _GROUP_GAP, _CHARACTER = 11, 20, 8, 16, 6.6
_PICTURE_WIDTH = 1180


class _Picture:
    """Shapes for the template, in the order in which they are drawn; lengths are in pixels."""

    def __init__(self) -> None:
        self.shapes: list[dict[str, Any]] = []
        self.width = self.height = ""

    def text(
        self, x: float, y: float, text: str, *, is_bold: bool = False, is_slanted: bool = False
    ) -> None:
        self.shapes.append(
            {
                "kind": "text",
                "x": f"{x:.0f}",
                "y": f"{y:.0f}",
                "text": text,
                "is_bold": is_bold,
                "is_slanted": is_slanted,
            }
        )

    def box(self, x: float, y: float, glyph: str, title: str) -> None:
        self.shapes.append(
            {
                "kind": "box",
                "x": f"{x:.0f}",
                "y": f"{y:.0f}",
                "size": _BOX,
                "fill": _FILLS[glyph],
                "title": title,
                # The letter says it too: colours alone do not reach everybody.
                "letter": glyph if glyph in _LETTERS.values() else "",
                "letter_x": f"{x + _BOX / 2:.1f}",
                "letter_y": f"{y + 9:.0f}",
            }
        )


def to_svg(report: Report) -> str:
    """The matrix as a picture: a box for each cell, with its sentence as its title."""
    return _TEMPLATES.get_template("isolation.svg.j2").render(picture=_picture(report))


def _picture(report: Report) -> _Picture:
    matrix = _Matrix(report)
    first = 12 + max([len(name) for name in matrix.vantages] + [4]) * _CHARACTER
    column = max(1, len(matrix.paths)) * (_BOX + 1) + _COLUMN_GAP

    # The names of services stand at a slant above their columns.
    longest = max([len(name) for group in matrix.groups for name in group.services] + [8])
    head = 36 + longest * _CHARACTER * 0.82

    def width_of(group: _Group) -> float:
        return max(column * len(group.services), len(group.target) * _CHARACTER) + _GROUP_GAP

    picture = _Picture()
    top, width = 10.0, 720.0
    for block in matrix.blocks(_PICTURE_WIDTH - first - head * 0.6, width_of):
        left = first
        for group in block:
            picture.text(left, top + 12, group.target, is_bold=True)
            for number, service in enumerate(group.services):
                x = left + number * column
                picture.text(x + 8, top + head - 6, service, is_slanted=True)
                for row, vantage in enumerate(matrix.vantages):
                    y = top + head + row * _ROW
                    glyphs = matrix.glyphs(vantage, group.target, service)
                    for place, (glyph, finding) in enumerate(glyphs):
                        if finding is not None:
                            picture.box(x + place * (_BOX + 1), y, glyph, finding.sentence)
            left += width_of(group)
        for row, vantage in enumerate(matrix.vantages):
            picture.text(4, top + head + row * _ROW + 10, vantage)
        width = max(width, left + head * 0.6)
        top += head + len(matrix.vantages) * _ROW + 16
    x = 4.0
    for glyph, text in _LEGEND:
        picture.box(x, top, glyph, text)
        picture.text(x + _BOX + 5, top + 10, text)
        x += _BOX + 24 + len(text) * 5.8
    names = ", ".join(PATH_NAMES[path] for path in matrix.paths)
    picture.text(4, top + 30, f"Rows reach columns; boxes: {names}.")
    picture.text(4, top + 48, summary(report), is_bold=True)
    picture.width, picture.height = f"{max(width, x):.0f}", f"{top + 60:.0f}"
    return picture


# As a page.


def to_html(report: Report, run: Run, json_text: str) -> str:
    """A page that needs nothing else, for somebody who was not there."""
    plan, fleet = report.plan, report.plan.fleet
    outcome = summary(report)
    colour = "green" if report.is_green else "red"
    if outcome.startswith("Isolation is not proven"):
        colour = "grey"
    return _TEMPLATES.get_template("isolation.html.j2").render(
        METHOD=METHOD,
        VERDICTS=VERDICTS,
        run=run,
        colour=colour,
        summary=outcome,
        differences=_differences(report),
        # Rendered by the same environment, so everything in it is escaped already.
        picture=Markup(to_svg(report)),
        forged=forged_line(report),
        notes=plan.notes,
        hosts=[
            (
                host.name,
                ", ".join(host.groups)
                or ("outside" if host.external else "a job" if host.slot_of else "none"),
                ", ".join(str(address) for address in host.addresses),
            )
            for host in fleet.hosts.values()
        ],
        flows=[
            (
                flow.index,
                flow.source,
                flow.destination,
                ", ".join(
                    str(fleet.services[name]) if name in fleet.services else name
                    for name in flow.services
                ),
                flow.purpose,
            )
            for flow in fleet.flows
        ],
        findings=[_evidence(finding) for finding in report.findings],
        controls=[_evidence(finding) for finding in report.controls],
        digest=hashlib.sha256(json_text.encode()).hexdigest(),
    )


def _differences(report: Report) -> list[tuple[str, str]]:
    rows = [
        (finding.verdict, finding.sentence)
        for verdict in (LEAK, BROKEN)
        for finding in report.findings
        if finding.verdict == verdict
    ]
    rows += [("rules", f"{host}: {text}") for host, texts in report.drift.items() for text in texts]
    rows += [(UNPROVEN, gap) for gap in report.plan.gaps]
    rows += [(UNPROVEN, f.sentence) for f in report.findings if f.verdict == UNPROVEN]
    return rows


def _evidence(finding: Finding) -> tuple[str, ...]:
    """A row of the table of evidence."""
    cell = finding.cell
    return (
        finding.verdict,
        cell.vantage,
        cell.target,
        str(cell.service) + (" forged" if cell.claimed else ""),
        PATH_NAMES[cell.path],
        str(cell.flow.index) if cell.flow else "none",
        "; ".join(
            f"{seen.probe.address}: {seen.evidence}"
            + (f" [{seen.arrived}]" if seen.arrived else "")
            for seen in finding.seen
        )
        or finding.sentence,
        finding.control or "",
    )
