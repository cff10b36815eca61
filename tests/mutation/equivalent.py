"""Mutants that change nothing that anybody could see, each with the reason."""

from __future__ import annotations

import re

# layer, chain or set, what was done, rule; regular expressions for the whole of each
_TABLE: tuple[tuple[str, str, str, str, str], ...] = ()


def reason(layer: str, where: str, what: str, rule: str) -> str:
    """Why it changes nothing; empty for a mutant that must be noticed."""
    for *patterns, why in _TABLE:
        if all(re.fullmatch(p, v) for p, v in zip(patterns, (layer, where, what, rule), strict=True)):
            return why
    return ""
