"""Which rules it is about, and what can go wrong with them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import NamedTuple


class Instance(NamedTuple):
    """One use of guarded rules on a host."""

    name: str
    """Of the command and its identifier in the journal; units, timers and records are called after it."""
    tables: tuple[str, ...]
    """Family and name, like ``inet cellblock``; the rules are one of these."""
    rules: str
    """Path of the confirmed rules, ending in .nft; the ssh access to keep is beside it, in .json."""
    minimal: bool
    """Whether a minimal set (ssh from the controllers) takes the place of rules that do not load."""

    @property
    def command(self) -> str:
        """Path of the program."""
        return f"/usr/local/sbin/{self.name}"

    def table_of(self, text: str) -> str:
        """``table FAMILY NAME``: the one of the tables that these rules are, or the first."""
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["table"] and " ".join(words[1:3]) in self.tables:
                return " ".join(words[:3])
        return f"table {self.tables[0]}"


class Status(enum.IntEnum):
    """Exit statuses of the program."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    LACKING = 4
    NOT_PENDING = 5
    DIFFERS = 6
    MINIMAL = 7
    BUSY = 8


class RulesError(Exception):
    """An expected failure: one sentence for the operator, and the exit status."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


ROOT = Path("/")
