"""Job files, as clients read them: with their own rights, so that the service opens no path of a job.

What comes out is plain data that :mod:`cellblock.engine.job_parser` and the service take.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ..errors import InvalidJobError, JobFileError
from .documents import parse_document
from .protocol import MAX_INPUT_BYTES


def load_job_data(path: Path) -> dict[str, Any]:
    """The job file at ``path`` as plain data in which every ``path:`` became ``base64:``.

    Paths are relative to the job file and are opened with the rights of the caller, so that the
    privileged service never opens a path that a job names. Raises :class:`JobFileError` or
    :class:`InvalidJobError`.
    """
    text = _read(path, str(path), "name an existing job file").decode("utf-8", "replace")
    data = parse_document(text, str(path))
    if not isinstance(data, dict):
        raise InvalidJobError(str(path), "is not a mapping", "write environment: and stages:")
    embedded = dict(data)
    files = data.get("files", {})
    if isinstance(files, dict):
        embedded["files"] = {
            name: _embed(content, path, f"files.{name}") for name, content in files.items()
        }
    stages = data.get("stages")
    if isinstance(stages, list):
        embedded["stages"] = [
            {**stage, "stdin": _embed(stage["stdin"], path, f"stages[{index}].stdin")}
            if isinstance(stage, dict) and "stdin" in stage
            else stage
            for index, stage in enumerate(stages)
        ]
    return embedded


def as_request(data: Any) -> Any:
    """A job's data with every ``text`` content as ``base64``, which services parse fast.

    What is not as it should be stays as it is: the service's parser names it.
    """
    if not isinstance(data, dict):
        return data
    request = dict(data)
    if isinstance(data.get("files"), dict):
        request["files"] = {name: _as_base64(file) for name, file in data["files"].items()}
    if isinstance(data.get("stages"), list):
        request["stages"] = [
            {**stage, "stdin": _as_base64(stage["stdin"])}
            if isinstance(stage, dict) and "stdin" in stage
            else stage
            for stage in data["stages"]
        ]
    return request


def _as_base64(content: Any) -> Any:
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        return content
    try:
        encoded = content["text"].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return content
    rest = {key: value for key, value in content.items() if key != "text"}
    return {**rest, "base64": base64.b64encode(encoded).decode("ascii")}


def _embed(content: object, job_path: Path, where: str) -> object:
    if not isinstance(content, dict) or "path" not in content:
        return content
    named = content["path"]
    if not isinstance(named, str) or not named:
        raise InvalidJobError(f"{where}.path", f"is {named!r}, not a path", "write a file's path")
    read = _read(
        job_path.parent / named,
        f"{job_path}: {where}.path ({job_path.parent / named})",
        "name an existing file, relative to the job file",
    )
    rest = {key: value for key, value in content.items() if key != "path"}
    return {**rest, "base64": base64.b64encode(read).decode("ascii")}


def _read(path: Path, subject: str, remedy: str) -> bytes:
    try:
        if not path.is_file():
            raise JobFileError(
                subject,
                "is not a regular file" if path.exists() else "does not exist",
                remedy,
            )
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise JobFileError(subject, "is too large", f"send at most {MAX_INPUT_BYTES} bytes")
        return path.read_bytes()
    except OSError as problem:
        raise JobFileError(
            subject, f"cannot be read: {problem.strerror}", "check its owner and mode"
        ) from None
