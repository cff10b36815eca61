"""What a job brings along: bytes in memory, or a part of a file that the service keeps for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Spooled:
    """``size`` bytes of the file ``path`` from ``offset`` on."""

    path: Path
    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


Content = bytes | Spooled


def write(content: Content, target: int) -> None:
    """Writes all of ``content`` to the descriptor ``target``; what is in a file does not pass through memory."""
    if isinstance(content, bytes):
        with open(target, "wb", closefd=False) as file:
            file.write(content)
        return
    source = os.open(content.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset, end = content.offset, content.offset + content.size
        while offset < end:
            sent = os.sendfile(target, source, offset, end - offset)
            if not sent:
                raise OSError(5, "is shorter than it was", str(content.path))
            offset += sent
    finally:
        os.close(source)
