"""Text for people."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with everything escaped that a terminal could act upon."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
