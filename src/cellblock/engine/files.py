"""A job's file systems: its scratch (files in, and out without trusting what a job left), and /dev.

The scratch is one tmpfs per job, mounted in the service's own mount namespace, with a size and an
inode cap. It holds ``work/`` (the job's /work) and ``tmp/`` (its /tmp).
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from ..errors import HostSetupError, InternalError, InvalidJobError
from . import content
from .job import JobFile
from .result import CollectedFile

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)

MAX_COLLECTED_FILES = 256
MAX_COLLECTED_BYTES = 64 * 2**20
"""All collected files of a job together."""
MAX_LISTED_NAMES = 10_000
"""How many names in directories are looked at in all; a job may have made any number."""
_MAX_DEPTH = 32
_DEVICES = ("null", "zero", "full", "random", "urandom")
_OWN_INODES = 3  # the tmpfs root, work/ and tmp/

_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_OPEN_HOW = struct.Struct("=QQQ")


class Scratch:
    """The scratch of one job at ``directory``; use as a context manager to be sure of its end."""

    def __init__(self, directory: Path, owner: int, size_bytes: int, max_files: int) -> None:
        """Mounts it. ``owner`` is the host's uid and gid that what is in it belongs to."""
        self._dir = directory
        self._owner = owner
        directory.mkdir(mode=0o711)
        try:
            _mount_tmpfs(directory, _options(size_bytes, max_files), _MS_NOSUID | _MS_NODEV)
            for path, mode in ((self.work, 0o700), (self.tmp, 0o1777)):
                path.mkdir()
                os.chown(path, owner, owner)
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
        """Sets the caps of the next stage; what is already in it stays, and is the least cap."""
        now = os.statvfs(self._dir)
        used_bytes = (now.f_blocks - now.f_bfree) * now.f_frsize
        used_files = now.f_files - now.f_ffree - _OWN_INODES
        _mount_tmpfs(
            self._dir,
            _options(max(size_bytes, used_bytes), max(max_files, used_files)),
            _MS_REMOUNT | _MS_NOSUID | _MS_NODEV,
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
                    os.chown(parent, self._owner, self._owner, dir_fd=directory)
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
            try:
                content.write(file.content, fd)
                os.fchown(fd, self._owner, self._owner)
            finally:
                os.close(fd)
        finally:
            os.close(directory)

    def collect(self, names: Iterable[str]) -> tuple[CollectedFile, ...]:
        """The files that a job was asked to leave below its work directory; after its last stage.

        A name may be a file or a directory, of which all regular files are taken. Nothing that the
        job made is followed or opened unless it is a regular file: see :class:`CollectedFile`.
        """
        root = os.open(self.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            collector = _Collector(root)
            for name in dict.fromkeys(names):
                collector.take(os.fsencode(name), depth=0)
            return tuple(collector.files)
        finally:
            os.close(root)

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


class _Collector:
    """Reads what a job left, within the caps; every problem is an entry, never an exception."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._bytes_left = MAX_COLLECTED_BYTES
        self._names_left = MAX_LISTED_NAMES
        self.files: list[CollectedFile] = []

    def take(self, name: bytes, depth: int) -> None:
        if len(self.files) >= MAX_COLLECTED_FILES:
            return
        try:
            fd = _open_beneath(self._root, name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as problem:
            self._refuse(name, _open_problem(problem))
            return
        try:
            info = os.fstat(fd)
            if stat.S_ISDIR(info.st_mode):
                self._take_directory(fd, name, depth)
            elif not stat.S_ISREG(info.st_mode):
                self._refuse(name, "not_a_regular_file")
            elif info.st_size > self._bytes_left:
                self._refuse(name, "too_large")
            else:
                self._take_file(fd, name)
        finally:
            os.close(fd)

    def _take_file(self, fd: int, name: bytes) -> None:
        data = bytearray()
        while chunk := os.read(fd, min(1 << 20, self._bytes_left + 1 - len(data))):
            data += chunk
            if len(data) > self._bytes_left:
                self._refuse(name, "too_large")
                return
        self._bytes_left -= len(data)
        self._append(name, None, bytes(data))

    def _take_directory(self, fd: int, name: bytes, depth: int) -> None:
        if depth >= _MAX_DEPTH:
            self._refuse(name, "too_deep")
            return
        children, complete = _names(fd, self._names_left)
        self._names_left -= len(children)
        for child in sorted(children):
            self.take(name + b"/" + child, depth + 1)
        if not complete or len(self.files) >= MAX_COLLECTED_FILES:
            self._refuse(name, "too_many_files")

    def _refuse(self, name: bytes, problem: str) -> None:
        self._append(name, problem, b"")

    def _append(self, name: bytes, problem: str | None, data: bytes) -> None:
        try:
            text, raw = name.decode("utf-8"), None
        except UnicodeDecodeError:
            text = name.decode("utf-8", "backslashreplace")
            raw = base64.b64encode(name).decode("ascii")
        digest = None if problem else hashlib.sha256(data).hexdigest()
        self.files.append(CollectedFile(text, raw, problem, data, digest))


def _names(directory: int, limit: int) -> tuple[list[bytes], bool]:
    """Up to ``limit`` names in an open directory, and whether these are all."""
    names: list[bytes] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if len(names) == limit:
                return names, False
            names.append(os.fsencode(entry.name))
    return names, True


def _open_beneath(root: int, name: bytes, flags: int) -> int:
    """openat2(2) that leaves ``root`` on no path and follows no link; raises OSError."""
    how = _OPEN_HOW.pack(
        flags | os.O_CLOEXEC | os.O_NOFOLLOW,
        0,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
    )
    fd: int = _libc.syscall(_SYS_OPENAT2, root, name, how, _OPEN_HOW.size)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def _open_problem(problem: OSError) -> str:
    if problem.errno in (errno.ENOENT, errno.ENOTDIR):
        return "missing"
    if problem.errno in (errno.ELOOP, errno.EXDEV):
        return "symbolic_link"
    return "not_a_regular_file"  # a socket, or a device without a driver


def sweep(jobs_dir: Path) -> int:
    """Removes scratches that an earlier service left behind; returns how many.

    Its mounts went with its mount namespace, so only empty directories are expected; anything else
    is removed without following links.
    """
    jobs_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    jobs_dir.chmod(0o711)
    leftovers = list(jobs_dir.iterdir())
    for directory in leftovers:
        remove_scratch(directory)
    return len(leftovers)


def remove_scratch(directory: Path) -> None:
    """Removes a scratch that nobody holds any more, if it is there."""
    _libc.umount2(os.fsencode(directory), _MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def make_dev(directory: Path) -> Path:
    """A minimal /dev for all jails: the harmless devices, bound from the host's.

    Each is a read-only mount: one around them would leave their times to the jobs, and so a job something
    for the next one to read. It keeps nobody from writing to the devices.
    """
    directory.mkdir(mode=0o755, exist_ok=True)
    for name in _DEVICES:
        source, target = Path("/dev") / name, directory / name
        if not (target.exists() and stat.S_ISCHR(target.stat().st_mode)):
            target.touch()
            _bind(source, target, _MS_BIND)
        _bind(source, target, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NOEXEC)
    links = {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
        "shm": "/tmp",  # so that shared memory counts in scratch_bytes
    }
    for name, target_path in links.items():
        with contextlib.suppress(FileExistsError):
            (directory / name).symlink_to(target_path)
    return directory


def _bind(source: Path, target: Path, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None) < 0:
        raise HostSetupError(
            str(target),
            f"cannot be bound: {os.strerror(ctypes.get_errno())}",
            "the service needs CAP_SYS_ADMIN in its mount namespace",
        )


def _options(size_bytes: int, max_files: int) -> str:
    return f"size={size_bytes},nr_inodes={max_files + _OWN_INODES},mode=0711"


def _mount_tmpfs(directory: Path, options: str, flags: int) -> None:
    if _libc.mount(b"cellblock", os.fsencode(directory), b"tmpfs", flags, options.encode()) < 0:
        raise InternalError(
            str(directory),
            f"tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}",
            "the service needs CAP_SYS_ADMIN in its mount namespace",
        )
