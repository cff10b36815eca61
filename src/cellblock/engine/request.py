"""Takes a request apart: from the line that a client sent to checked-for-form jobs.

It is done in a worker for all but the smallest: neither its time nor its memory is anybody else's then.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CellblockError, InvalidJobError, ServiceUnavailableError
from ..validate import Value, show
from . import protocol
from .content import Content, Spooled
from .job import Job
from .job_parser import parse_job

MAX_MEMORY_BYTES = 2**30
"""Address space of the process that takes a large request apart: eight times the largest one."""
MAX_CPU_S = 10.0
"""Of that process: no request that is meant well takes a tenth of it."""
MAX_PARSED_BYTES = 4 * 2**20
"""What a request may be without its large contents: names, commands, variables, constraints."""
_KEPT_BYTES = 4096
"""Contents up to that size stay with their job."""


@dataclass(frozen=True)
class Request:
    """``jobs`` are those before the first that is wrong in itself, whose error is ``refused``."""

    op: str
    jobs: tuple[Job, ...] = ()
    refused: CellblockError | None = None
    slot: Any = None


def parse_file(path: Path, contents: Path) -> bytes:
    """As :func:`parse`, for a line in a file, with bounds on memory and time; contents that are large go to the file
    ``contents``. The result is pickled, so that whoever takes it knows before how large it is."""
    with _bounded_memory(), _bounded_time(), contents.open("xb") as file:
        try:
            parsed = pickle.dumps(parse(path.read_bytes(), file))
        except MemoryError:
            raise ServiceUnavailableError(
                "request", "takes too much memory", "send fewer or smaller files at a time"
            ) from None
    if len(parsed) > MAX_PARSED_BYTES:
        raise ServiceUnavailableError(
            "request",
            f"has {len(parsed)} bytes besides files and inputs, and at most {MAX_PARSED_BYTES} are taken",
            "put what is long in commands and variables into files, or send fewer jobs at a time",
        )
    return parsed


def parse(line: bytes, contents: BinaryIO | None = None) -> Request:
    """Raises :class:`ServiceUnavailableError` for what is no request of this version of the protocol, and
    :class:`InvalidJobError` where its jobs are no list."""
    if protocol.structure(line) > protocol.MAX_STRUCTURE:
        raise ServiceUnavailableError(
            "request",
            "has too many parts",
            "send contents as base64, as the cellblock command does",
        )
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise ServiceUnavailableError(
            "request", "is not a line of JSON", "use the cellblock command"
        ) from None
    del line
    version = data.get("version") if isinstance(data, dict) else None
    if version != protocol.VERSION:
        raise ServiceUnavailableError(
            "request",
            f"is in version {show(version)} of the protocol, this service speaks {protocol.VERSION}",
            "use the cellblock command of this host's engine",
        )
    op = data.get("op")
    if op in ("check", "run"):
        return _jobs(op, data.pop("jobs", None), contents)
    if op not in ("environments", "slot"):
        raise ServiceUnavailableError(
            "service", f"does not know the operation {show(op)}", "use a client of the same version"
        )
    return Request(op, slot=data.get("slot") if op == "slot" else None)


def _jobs(op: str, raw: Any, contents: BinaryIO | None) -> Request:
    values = Value(raw, "jobs", InvalidJobError).list()
    if len(values) > protocol.MAX_JOBS:
        raise ServiceUnavailableError(
            "request",
            f"has {len(values)} jobs",
            f"send at most {protocol.MAX_JOBS} at a time, as the cellblock command does",
        )
    jobs: list[Job] = []
    for value in values:
        try:
            job = parse_job(value.raw)
        except CellblockError as problem:
            return Request(op, tuple(jobs), problem)
        jobs.append(job if contents is None else _spooled(job, contents))
    return Request(op, tuple(jobs))


def _spooled(job: Job, target: BinaryIO) -> Job:
    """``job`` with what is large in it moved to ``target``."""

    def move(content: Content) -> Content:
        if isinstance(content, Spooled) or len(content) <= _KEPT_BYTES:
            return content
        offset = target.tell()
        target.write(content)
        return Spooled(Path(target.name), offset, len(content))

    return replace(
        job,
        files=tuple(replace(file, content=move(file.content)) for file in job.files),
        stages=tuple(replace(stage, stdin=move(stage.stdin)) for stage in job.stages),
    )


@contextlib.contextmanager
def _bounded_time() -> Iterator[None]:
    def end(*_: object) -> None:
        raise ServiceUnavailableError(
            "request", "takes too long to be taken apart", "send fewer jobs at a time"
        )

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
