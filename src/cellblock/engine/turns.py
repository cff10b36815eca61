"""Waiting in turn: users one after the other, and the requests of each in the order of their arrival.

For one event loop; who waits costs nothing but memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Ticket(Generic[T]):
    wanted: T
    called: asyncio.Event = field(default_factory=asyncio.Event)


class Turns(Generic[T]):
    """Gives out shares of something: to the first of the user whose turn it is, as soon as ``fits`` says that
    there is room for what it wants. Nobody overtakes, so nobody starves: before a user's first request come
    at most one of each other user, whatever else these have waiting.

    ``take`` and ``give`` are told what is given out and comes back.
    """

    def __init__(
        self, fits: Callable[[T], bool], take: Callable[[T], None], give: Callable[[T], None]
    ) -> None:
        self._fits, self._take, self._give = fits, take, give
        self.may: Callable[[int], bool] = lambda uid: True
        """Users of whom it says no are passed over; whoever changes that calls :meth:`call`."""
        self._waiting: OrderedDict[int, deque[_Ticket[T]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def share(self, uid: int, wanted: T) -> AsyncIterator[T]:
        """Waits for ``wanted``, and holds it while the context lasts."""
        ticket = _Ticket(wanted)
        self._waiting.setdefault(uid, deque()).append(ticket)
        self.call()
        try:
            await ticket.called.wait()
            yield wanted
        finally:
            if ticket.called.is_set():
                self._give(wanted)
            else:
                self._forget(uid, ticket)
            self.call()

    def _forget(self, uid: int, ticket: _Ticket[T]) -> None:
        self._waiting[uid].remove(ticket)
        if not self._waiting[uid]:
            del self._waiting[uid]

    def call(self) -> None:
        """Gives out what there is room for."""
        while (uid := next(filter(self.may, self._waiting), None)) is not None:
            tickets = self._waiting[uid]
            if not self._fits(tickets[0].wanted):
                return
            ticket = tickets.popleft()
            if tickets:
                self._waiting.move_to_end(uid)
            else:
                del self._waiting[uid]
            self._take(ticket.wanted)
            ticket.called.set()


class Places:
    """So many at a time, users in turn."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._turns: Turns[int] = Turns(
            lambda _: self._free > 0, self._change, lambda _: self._change(1)
        )

    def place(self, uid: int) -> contextlib.AbstractAsyncContextManager[int]:
        """Waits for one, and holds it while the context lasts."""
        return self._turns.share(uid, -1)

    def _change(self, by: int) -> None:
        self._free += by
