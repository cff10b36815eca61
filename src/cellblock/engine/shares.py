"""Bounds on what users hold of something, each and all together."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

from ..errors import ServiceUnavailableError


class Shares:
    """Counts what is held of ``in_all``, of which a user but root may have ``per_user``. For one event loop."""

    def __init__(self, what: str, in_all: int, per_user: int, remedy: str) -> None:
        """``what`` and ``remedy`` are for messages."""
        self._what, self._remedy = what, remedy
        self._in_all, self._per_user = in_all, per_user
        self._of: collections.Counter[int] = collections.Counter()

    def held(self, uid: int) -> int:
        """What ``uid`` has."""
        return self._of[uid]

    def take(self, uid: int, amount: int = 1) -> None:
        """Raises :class:`ServiceUnavailableError` when that would be too much."""
        if not self.has_room(uid, amount):
            raise ServiceUnavailableError(
                "service", f"has too {self._what} of this user or in all", self._remedy
            )
        self._of[uid] += amount

    def take_anyway(self, uid: int, amount: int) -> None:
        """For what is there already; see :meth:`has_room`."""
        self._of[uid] += amount

    def give(self, uid: int, amount: int = 1) -> None:
        """It is not held any more."""
        self._of[uid] -= amount
        if not self._of[uid]:
            del self._of[uid]

    def has_room(self, uid: int, amount: int = 0) -> bool:
        """Whether ``uid`` could have so much more."""
        fits = self._of.total() + amount <= self._in_all
        return fits and (uid == 0 or self._of[uid] + amount <= self._per_user)

    @contextlib.contextmanager
    def of(self, uid: int, amount: int = 1) -> Iterator[None]:
        """:meth:`take` while the context lasts."""
        self.take(uid, amount)
        try:
            yield
        finally:
            self.give(uid, amount)
