"""A job's scratch file system: files in, without ever trusting what a job left behind.

The scratch is one tmpfs per job, mounted in the service's own mount namespace, with a size and an
inode cap. It holds ``work/`` (the job's /work) and ``tmp/`` (its /tmp).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from cellblock.errors import InternalError, InvalidJobError
from cellblock.job import JobFile

_MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 2, 4, 32
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Scratch:
    """The scratch of one job at ``directory``; use as a context manager to be sure of its end."""

    def __init__(self, directory: Path, job_id: int, size_bytes: int, max_files: int) -> None:
        """Mounts it. ``job_id`` is the host uid and gid that will own what is in it."""
        self._dir = directory
        self._job_id = job_id
        directory.mkdir(mode=0o711)
        try:
            _mount_tmpfs(directory, _options(size_bytes, max_files), _MS_NOSUID | _MS_NODEV)
            for path, mode in ((self.work, 0o700), (self.tmp, 0o1777)):
                path.mkdir()
                os.chown(path, job_id, job_id)
                path.chmod(mode)
        except BaseException:
            self.close()
            raise

    @property
    def work(self) -> Path:
        """What the job sees as /work."""
        return self._dir / "work"

    @property
    def tmp(self) -> Path:
        """What the job sees as /tmp."""
        return self._dir / "tmp"

    def resize(self, size_bytes: int, max_files: int) -> None:
        """Sets the caps of the next stage; what is already in it stays."""
        _mount_tmpfs(
            self._dir, _options(size_bytes, max_files), _MS_REMOUNT | _MS_NOSUID | _MS_NODEV
        )

    def put(self, files: Iterable[JobFile]) -> None:
        """Writes the job's input files, owned by the job. Only before its first stage.

        Raises :class:`InvalidJobError` when they do not fit into the scratch.
        """
        root = os.open(self.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for file in files:
                self._put(root, file)
        except OSError as problem:
            raise InvalidJobError(
                f"files.{file.name}",
                f"does not fit into the scratch: {problem.strerror}",
                "raise scratch_bytes or scratch_files of the first stage, or send less",
            ) from None
        finally:
            os.close(root)

    def _put(self, root: int, file: JobFile) -> None:
        *parents, name = file.name.split("/")
        directory = os.dup(root)
        try:
            for parent in parents:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent, 0o755, dir_fd=directory)
                    os.chown(parent, self._job_id, self._job_id, dir_fd=directory)
                below = os.open(
                    parent,
                    os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                    dir_fd=directory,
                )
                os.close(directory)
                directory = below
            fd = os.open(
                name,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o755 if file.executable else 0o644,
                dir_fd=directory,
            )
            with open(fd, "wb") as target:
                target.write(file.content)
                os.fchown(target.fileno(), self._job_id, self._job_id)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Unmounts and removes it; nothing in it can be reached afterwards."""
        if _libc.umount2(os.fsencode(self._dir), _MNT_DETACH) < 0 and os.path.ismount(self._dir):
            raise InternalError(
                str(self._dir),
                f"cannot be unmounted: {os.strerror(ctypes.get_errno())}",
                "unmount it",
            )
        with contextlib.suppress(FileNotFoundError):
            self._dir.rmdir()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep(jobs_dir: Path) -> int:
    """Removes scratches that an earlier service left behind; returns how many.

    Its mounts went with its mount namespace, so only empty directories are expected; anything else
    is removed without following links.
    """
    jobs_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    jobs_dir.chmod(0o711)
    leftovers = list(jobs_dir.iterdir())
    for directory in leftovers:
        _libc.umount2(os.fsencode(directory), _MNT_DETACH)
        shutil.rmtree(directory)
    return len(leftovers)


def _options(size_bytes: int, max_files: int) -> str:
    # The three inodes are the tmpfs root, work/ and tmp/.
    return f"size={size_bytes},nr_inodes={max_files + 3},mode=0711"


def _mount_tmpfs(directory: Path, options: str, flags: int) -> None:
    if _libc.mount(b"cellblock", os.fsencode(directory), b"tmpfs", flags, options.encode()) < 0:
        raise InternalError(
            str(directory),
            f"tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}",
            "the service needs CAP_SYS_ADMIN in its mount namespace",
        )
