"""Paths that the documents name lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = "|".join(
    re.escape(path.name)
    for path in ROOT.iterdir()
    if path.is_dir() and (path.name == ".ci" or not path.name.startswith("."))
)
# `src/cellblock/units.py`, `playbooks/`, `tests/*/run.py`.
NAMED = re.compile(rf"`((?:{TOP})/[\w./*-]*)`")
LINKED = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
# What the reader makes.
OWN = re.compile("inventory/mine|reports/|.*NAME")


def documents() -> list[Path]:
    """All of the project's, but those of programs that were installed into the checkout."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(
            part.startswith(".") or part == "collections" for part in path.relative_to(ROOT).parts
        )
    )


def dangling(document: Path) -> Iterator[str]:
    text = document.read_text(encoding="utf-8")
    for name in NAMED.findall(text):
        # Within a role's README, from there.
        found = any(any(root.glob(name.rstrip("/"))) for root in (ROOT, document.parent))
        if not found and not OWN.match(name):
            yield name
    for target in LINKED.findall(text):
        if not (document.parent / target).exists():
            yield target


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_exist(document: Path) -> None:
    assert not list(dangling(document))
