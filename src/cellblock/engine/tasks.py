"""Waiting for tasks of the event loop to have ended, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any


async def settled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Returns when all have ended. Who waits here is putting things away, and cannot be cancelled: what the tasks
    hold would be given to others while they still use it."""
    running = [task for task in tasks if not task.done()]
    while running:
        with contextlib.suppress(asyncio.CancelledError):  # it is over as soon as they are
            await asyncio.wait(running)
        running = [task for task in running if not task.done()]
