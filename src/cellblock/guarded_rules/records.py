"""What is remembered of an instance's rules: the confirmed ones on disk, the rest until the next boot."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from . import host
from .instance import ROOT, Instance


class Lifeline(TypedDict):
    """Who keeps ssh when the confirmed rules do not load."""

    controllers: list[str]
    ssh_port: int


class Loaded(TypedDict):
    """What was loaded into the kernel last."""

    state: str
    """loaded (and confirmed), pending, or fallback (a minimal set)."""
    text: str
    listing: str
    """As nft lists it."""
    sha256: str
    expanded_sha256: str
    """Of the text with interfaces' hardware addresses: another one when an interface has a new one."""


class Pending(TypedDict):
    """Rules on trial."""

    token: str
    phase: str
    """waiting (for being loaded), loaded, or failed."""
    error: str | None
    deadline: float
    """When they roll back, in seconds of uptime."""
    text: str
    listing: str
    lifeline: Lifeline


class RolledBack(TypedDict):
    token: str
    state: str
    """What is loaded since then: none, loaded or fallback."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Records:
    """The files of one instance, below another root in tests."""

    def __init__(self, instance: Instance, root: Path = ROOT) -> None:
        self.confirmed_path = root / instance.rules.lstrip("/")
        self._lifeline = self.confirmed_path.with_suffix(".json")
        self.run = root / "run" / instance.name
        # One word for other programs: loaded, pending or fallback; no file: none.
        self._state = self.run / "state"
        self._loaded = self.run / "loaded.json"
        self._pending = self.run / "pending.json"
        self._rolled_back = self.run / "rolled_back.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Everything that changes the table or the records does so alone."""
        self.run.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Whoever can open a file can lock it, and hold up the rollback and the guard for ever.
        descriptor = os.open(self.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "a", encoding="ascii") as file:
            os.fchmod(descriptor, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- The confirmed rules

    def confirmed(self) -> str | None:
        return host.read(self.confirmed_path)

    def lifeline(self) -> Lifeline:
        found = _read(self._lifeline, ("controllers", "ssh_port"))
        return cast(Lifeline, found or {"controllers": [], "ssh_port": 22})

    def set_confirmed(self, text: str, lifeline: Lifeline) -> None:
        self.confirmed_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write(self._lifeline, lifeline)
        host.write(self.confirmed_path, text)

    # --- What is loaded

    def loaded(self) -> Loaded | None:
        return cast("Loaded | None", _read(self._loaded, Loaded.__required_keys__))

    def set_loaded(self, loaded: Loaded) -> None:
        _write(self._loaded, loaded)
        host.write(self._state, f"{loaded['state']}\n")

    def forget_loaded(self) -> None:
        for path in (self._loaded, self._state):
            path.unlink(missing_ok=True)

    # --- A trial

    def pending(self) -> Pending | None:
        """The rules on trial, also those that failed to load."""
        found = _read(self._pending, Pending.__required_keys__ - {"error"})
        return cast("Pending | None", found and {"error": None, **found})

    def open_pending(self) -> Pending | None:
        """Those that wait for confirmation; those that failed to load no longer do."""
        pending = self.pending()
        return pending if pending and pending["phase"] != "failed" else None

    def set_pending(self, pending: Pending) -> None:
        _write(self._pending, pending)

    def forget_pending(self) -> None:
        self._pending.unlink(missing_ok=True)

    def rolled_back(self) -> RolledBack | None:
        return cast("RolledBack | None", _read(self._rolled_back, RolledBack.__required_keys__))

    def set_rolled_back(self, rolled_back: RolledBack) -> None:
        _write(self._rolled_back, rolled_back)

    def forget_rolled_back(self) -> None:
        self._rolled_back.unlink(missing_ok=True)

    def remove(self) -> None:
        for path in (self.confirmed_path, self._lifeline):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.run)


def _read(path: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """A JSON object that this program wrote; one that is damaged counts as absent."""
    try:
        record = json.loads(host.read(path) or "null")
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() >= set(keys) else None


def _write(path: Path, record: Mapping[str, object]) -> None:
    host.write(path, json.dumps(record) + "\n")
