"""Files of the service for what is too large for its memory: requests, their contents, records."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import HostSetupError
from .shares import Shares

MAX_BYTES = 8 * 2**30
"""Of all users together, and at most half of what is free on the file system when the service starts."""
MAX_BYTES_PER_USER = 2**30
"""What requests and unread records of a user but root may take."""


class Spool:
    """One directory, for one event loop. Nothing in it outlives its request, or the service."""

    def __init__(self, directory: Path) -> None:
        """Makes it, empty and for root alone; raises :class:`HostSetupError`."""
        try:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700, parents=True)
            free = os.statvfs(directory)
        except OSError as problem:
            raise HostSetupError(
                str(directory), f"cannot be made: {problem.strerror}", "see what is there"
            ) from None
        self._directory = directory
        self._numbers = itertools.count()
        self._shares = Shares(
            "many bytes in requests and unread records",
            min(MAX_BYTES, free.f_bavail * free.f_frsize // 2),
            MAX_BYTES_PER_USER,
            "read the records, and send less at a time",
        )
        self.on_change: Callable[[], None] = lambda: None
        """Called when somebody has less in it than before."""

    @contextlib.contextmanager
    def part(self, uid: int) -> Iterator[SpoolPart]:
        """Files of one request of ``uid``, removed with the context."""
        part = SpoolPart(self, uid)
        try:
            yield part
        finally:
            part.close()

    def has_room(self, uid: int) -> bool:
        """Whether ``uid`` has read enough of what it has for more to come."""
        return self._shares.has_room(uid)


class SpoolPart:
    """See :meth:`Spool.part`."""

    def __init__(self, spool: Spool, uid: int) -> None:
        self._spool, self._uid = spool, uid
        self._held = 0
        self._paths: set[Path] = set()

    def path(self) -> Path:
        """Of a new file, which is not there yet."""
        path = self._spool._directory / str(next(self._spool._numbers))
        self._paths.add(path)
        return path

    def take(self, amount: int) -> None:
        """Counts bytes that are going to be written; raises :class:`ServiceUnavailableError`."""
        self._spool._shares.take(self._uid, amount)
        self._held += amount

    def count(self, path: Path) -> None:
        """Counts a file that is there."""
        size = path.stat().st_size
        self._spool._shares.take_anyway(self._uid, size)
        self._held += size

    def remove(self, path: Path) -> None:
        """Removes a file that was counted, or is not there."""
        size = 0
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
        self._paths.discard(path)
        self._give(size)

    def close(self) -> None:
        """Removes what is left."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._paths.clear()
        self._give(self._held)

    def _give(self, amount: int) -> None:
        if not amount:
            return
        self._held -= amount
        self._spool._shares.give(self._uid, amount)
        self._spool.on_change()
