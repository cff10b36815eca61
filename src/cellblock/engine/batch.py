"""Runs the checked jobs of one request side by side, and hands out their records in order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from ..errors import Cancelled, CellblockError, InternalError
from .engine import CheckedJob, Engine
from .result import JobResult

MAX_UNSENT = 64
"""Jobs of a request that run, wait, or are done while an earlier one is not: their records stay in
memory until then."""
_log = logging.getLogger("cellblock")

Outcome = JobResult | CellblockError


def run_all(
    engine: Engine, jobs: Sequence[CheckedJob], cancelled: Callable[[], bool]
) -> Iterator[Outcome]:
    """The record of each job, in the order of ``jobs``, or the error for which it has none.

    No more threads than the host runs jobs at a time: who comes later than a large request is not
    behind all of it. Raises :class:`Cancelled`; to close the iterator ends what still runs.
    """
    if len(jobs) == 1:
        yield _run(engine, jobs[0], cancelled)
        return
    closed = threading.Event()
    waiting = iter(jobs)
    unsent: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(min(len(jobs), engine.host.parallel_jobs), "job") as pool:

        def start(count: int) -> None:
            unsent.extend(
                pool.submit(_run, engine, job, lambda: closed.is_set() or cancelled())
                for job in islice(waiting, count)
            )

        try:
            start(MAX_UNSENT)
            while unsent:
                yield unsent.popleft().result()
                start(1)
        finally:
            closed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _run(engine: Engine, job: CheckedJob, cancelled: Callable[[], bool]) -> Outcome:
    """A failure with one job must not lose the records of the others."""
    try:
        return engine.run(job, cancelled)
    except CellblockError as problem:
        return problem
    except Cancelled:
        raise
    except Exception:
        # A defect of ours must end neither the service nor the caller without a word.
        _log.exception("job failed")
        return InternalError(
            "service", "failed unexpectedly", "see the journal of cellblock.service"
        )
