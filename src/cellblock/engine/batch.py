"""Runs the jobs of one request side by side, and hands out their records in order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import CellblockError, InternalError
from .tasks import settled

MAX_UNSENT = 64
"""Jobs of a request that run, or are done while an earlier one is not: their records are kept until then."""
_log = logging.getLogger("cellblock")

J = TypeVar("J")
R = TypeVar("R")


async def run_all(
    jobs: Sequence[J], run: Callable[[J], Awaitable[R]], at_a_time: int
) -> AsyncGenerator[R | CellblockError, None]:
    """What ``run`` returns for each job, in the order of ``jobs``, or the error for which it has nothing.

    At most ``at_a_time`` run or wait for admission: who comes later than a large request is not behind all of
    it. To close the iterator ends what still runs, and returns when it has ended.
    """
    waiting = deque(jobs)
    unsent: deque[asyncio.Task[R | CellblockError]] = deque()
    try:
        while waiting or unsent:
            running = [task for task in unsent if not task.done()]
            if waiting and len(running) < at_a_time and len(unsent) < MAX_UNSENT:
                unsent.append(asyncio.create_task(_run(run, waiting.popleft())))
            elif unsent[0].done():
                yield unsent.popleft().result()
            else:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in unsent:
            task.cancel()
        await settled(unsent)
        for task in unsent:
            if not task.cancelled():
                task.exception()  # nobody asks for it any more


async def _run(run: Callable[[J], Awaitable[R]], job: J) -> R | CellblockError:
    """A failure with one job must not lose the records of the others."""
    try:
        return await run(job)
    except CellblockError as problem:
        return problem
    except Exception:
        # A defect of ours must end neither the service nor the caller without a word.
        _log.exception("job failed")
        return InternalError(
            "service", "failed unexpectedly", "see the journal of cellblock.service"
        )
