"""Runs the checked jobs of one request side by side, and hands out their records in order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ..errors import Cancelled, CellblockError, InternalError
from .result import JobResult
from .run import CheckedJob, Engine

MAX_UNSENT = 64
"""Jobs of a request that run, or are done while an earlier one is not: their records stay in memory
until then."""
MAX_UNSENT_BYTES = 16 << 20
"""Of what such records hold; beyond that no further job is started."""
_log = logging.getLogger("cellblock")

Outcome = JobResult | CellblockError


def run_all(
    engine: Engine, jobs: Sequence[CheckedJob], cancelled: Callable[[], bool], threads: int
) -> Iterator[Outcome]:
    """The record of each job, in the order of ``jobs``, or the error for which it has none.

    At most ``threads`` run or wait for admission at a time: who comes later than a large request is not
    behind all of it. Raises :class:`Cancelled`; to close the iterator ends what still runs.
    """
    if len(jobs) == 1:
        yield _run(engine, jobs[0], cancelled)
        return
    closed = threading.Event()
    waiting = deque(jobs)
    unsent: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(threads, "job") as pool:
        try:
            while waiting or unsent:
                running = [future for future in unsent if not future.done()]
                room = len(unsent) < MAX_UNSENT and _held_bytes(unsent) < MAX_UNSENT_BYTES
                if waiting and len(running) < threads and room:
                    job = waiting.popleft()
                    unsent.append(
                        pool.submit(_run, engine, job, lambda: closed.is_set() or cancelled())
                    )
                elif unsent[0].done():
                    yield unsent.popleft().result()
                else:
                    wait(running, return_when=FIRST_COMPLETED)
        finally:
            closed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _held_bytes(unsent: Iterable[Future[Outcome]]) -> int:
    """What the records that are there hold of outputs and files."""
    outcomes = (f.result() for f in unsent if f.done() and f.exception() is None)
    return sum(outcome.data_bytes for outcome in outcomes if isinstance(outcome, JobResult))


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
