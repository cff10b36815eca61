"""Programs and files of the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from .instance import RulesError, Status

_SEARCH = "/usr/sbin:/sbin:/usr/bin:/bin"


def find_program(name: str, package: str) -> str:
    """Its path; raises :class:`RulesError` naming the package that is missing."""
    path = shutil.which(name, path=_SEARCH)
    if path is None:
        raise RulesError(
            Status.LACKING,
            f"The program '{name}' is missing; install it (apt-get install {package}).",
        )
    return path


def run(
    command: list[str], stdin: str = "", timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env={"PATH": _SEARCH, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise RulesError(
            Status.FAILED, f"'{' '.join(command[:3])}' did not end within {timeout_s:g} s."
        ) from error


def uptime() -> float:
    """Seconds since the boot, also those of sleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole; after a crash there is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            os.chmod(temporary, 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
