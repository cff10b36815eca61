"""First process of a worker container: mounts cgroups, runs an engine, and starts jails for the slave.

It trusts the slave and is not trusted by it: what it says of a job counts only where the slave cannot see for itself.
Runs with the standard library alone, by its path.

Over the socket ``boot`` (argument) it says that it waits; the slave gives its groups away and answers with the command of the
engine and a listening socket. Each connection to that is of one job's runner, messages are JSON:

    {"argv": [...], "descriptors": [number, ...], "mounts": [path, ...], "namespace": bool}
        with the descriptors of the mounts, then that of a network namespace, then the others
    -> {"pid": n}, and when it has ended {"status": n}; or {"failed": reason}

A connection that is closed ends what was started for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_MESSAGE_BYTES = 2**17
MAX_DESCRIPTORS = 64
JOBS = "/run/cellblock/jobs/"
ENGINE_PAUSE_S = 1.0
_CGROUPS = "/sys/fs/cgroup"
_SYS_MOVE_MOUNT = 429  # the same on every architecture
_MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD = 4, -100
_CLONE_NEWNET, _MNT_DETACH = 0x40000000, 2
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
# Above whatever a runner asks for, so that none is overwritten before it is handed on.
_FIRST_DESCRIPTOR = 512

_libc = ctypes.CDLL(None, use_errno=True)


class RequestError(Exception):
    """A request that cannot be served, and why."""


def _check(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def v1_hierarchies(proc_cgroup: str) -> list[tuple[str, str, str]]:
    """(file system, options, directory below /sys/fs/cgroup) of each hierarchy in ``/proc/self/cgroup``."""
    found = []
    for line in proc_cgroup.splitlines():
        _, controllers, _ = line.split(":", 2)
        if not controllers:
            found.append(("cgroup2", "", "unified"))
        elif controllers.startswith("name="):
            found.append(("cgroup", f"none,{controllers}", controllers.removeprefix("name=")))
        else:
            found.append(("cgroup", controllers, controllers))
    return found


def mount_cgroups() -> None:
    """On cgroup v1 the engine gives a container its groups read-only; mounted afresh they are its own."""
    hierarchies = v1_hierarchies(Path("/proc/self/cgroup").read_text(encoding="ascii"))
    if [kind for kind, _, _ in hierarchies] == ["cgroup2"]:
        _check(_libc.mount(None, _CGROUPS.encode(), None, 32 | 4096, None), "cgroup2 writable")
        return
    _check(_libc.umount2(_CGROUPS.encode(), _MNT_DETACH), f"unmounting {_CGROUPS}")
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _check(_libc.mount(b"cgroup", _CGROUPS.encode(), b"tmpfs", flags, b"mode=755"), _CGROUPS)
    for kind, options, directory in hierarchies:
        path = Path(_CGROUPS, directory)
        path.mkdir()
        _check(
            _libc.mount(kind.encode(), str(path).encode(), kind.encode(), flags, options.encode()),
            str(path),
        )
        if "," in directory:
            for name in directory.split(","):
                Path(_CGROUPS, name).symlink_to(directory)


def leave_root_group(root: Path = Path(_CGROUPS)) -> None:
    """On cgroup v2 a group limits nothing below it as long as it has processes of its own: these get one beside those of
    the engine's containers.
    """
    if not (root / "cgroup.controllers").exists():
        return
    own = root / "worker"
    own.mkdir(exist_ok=True)
    for pid in (root / "cgroup.procs").read_text(encoding="ascii").split():
        (own / "cgroup.procs").write_text(pid, encoding="ascii")
    for name in (root / "cgroup.controllers").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):  # one that can only be used on top
            (root / "cgroup.subtree_control").write_text(f"+{name}", encoding="ascii")


@dataclass(frozen=True)
class Request:
    """A jail that is to be started."""

    argv: tuple[str, ...]
    descriptors: tuple[int, ...]
    mounts: tuple[str, ...]
    namespace: bool

    @classmethod
    def parse(cls, text: bytes) -> Request:
        data = json.loads(text)
        request = cls(
            argv=tuple(map(str, data["argv"])),
            descriptors=tuple(map(int, data["descriptors"])),
            mounts=tuple(map(str, data["mounts"])),
            namespace=bool(data["namespace"]),
        )
        if any(not 3 <= number < _FIRST_DESCRIPTOR for number in request.descriptors):
            raise RequestError(f"descriptors are numbers from 3 to {_FIRST_DESCRIPTOR - 1}")
        if any(not path.startswith(JOBS) or ".." in path.split("/") for path in request.mounts):
            raise RequestError(f"mounts are below {JOBS}")
        return request

    def received(self) -> int:
        """How many descriptors come with it."""
        return len(self.mounts) + self.namespace + len(self.descriptors)


def attach_mount(descriptor: int, path: str) -> None:
    """Puts a mount that nobody has attached yet to a directory."""
    os.makedirs(path, mode=0o711, exist_ok=True)
    _check(
        _libc.syscall(
            _SYS_MOVE_MOUNT, descriptor, b"", _AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH
        ),
        f"mounting {path}",
    )


def detach_mount(path: str) -> None:
    with contextlib.suppress(OSError):
        _check(_libc.umount2(path.encode(), _MNT_DETACH), path)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def start(request: Request, descriptors: Sequence[int]) -> int:
    """Starts what is asked for; returns its pid. The descriptors stay the caller's."""
    mounts = descriptors[: len(request.mounts)]
    others = descriptors[len(mounts) :]
    attached: list[str] = []
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    moved: list[int] = []
    try:
        for path, descriptor in zip(request.mounts, mounts, strict=True):
            attach_mount(descriptor, path)
            attached.append(path)
        if request.namespace:
            _check(_libc.setns(others[0], _CLONE_NEWNET), "entering the network namespace")
            others = others[1:]
        moved = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR) for one in others]
        actions = [(os.POSIX_SPAWN_DUP2, null, number) for number in range(3)]
        actions += [
            (os.POSIX_SPAWN_DUP2, have, wanted)
            for have, wanted in zip(moved, request.descriptors, strict=True)
        ]
        return os.posix_spawn(
            request.argv[0], request.argv, {}, file_actions=actions,
            setsigmask=(), setsigdef=(signal.SIGPIPE, signal.SIGCHLD, signal.SIGTERM),
        )  # fmt: skip
    except BaseException:
        for path in attached:
            detach_mount(path)
        raise
    finally:
        if request.namespace:
            _check(_libc.setns(own, _CLONE_NEWNET), "leaving the network namespace")
        for one in (own, null, *moved):
            os.close(one)


@dataclass
class Jail:
    """One that runs, and for whom."""

    connection: socket.socket
    mounts: tuple[str, ...] = ()
    pid: int = 0


@dataclass
class Init:
    """What the first process looks after."""

    engine: list[str]
    listener: socket.socket
    jails: dict[int, Jail] = field(default_factory=dict)
    engine_process: subprocess.Popen[bytes] | None = None
    engine_started: float = 0.0

    def run(self) -> None:
        """Until it is told to end."""
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ, "child")
            selector.register(self.listener, selectors.EVENT_READ, "runner")
            self._start_engine()
            while True:
                for key, _ in selector.select(ENGINE_PAUSE_S):
                    if key.data == "child":
                        with contextlib.suppress(BlockingIOError):
                            while os.read(wake, 4096):
                                pass
                    elif key.data == "runner":
                        self._accept(selector)
                    else:
                        self._serve(selector, key.data)
                self._reap()

    def _start_engine(self) -> None:
        self.engine_started = time.monotonic()
        self.engine_process = subprocess.Popen(self.engine, stdin=subprocess.DEVNULL)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, Jail(connection))

    def _serve(self, selector: selectors.BaseSelector, jail: Jail) -> None:
        message: bytes = b""
        descriptors: list[int] = []
        with contextlib.suppress(OSError):
            message, descriptors, _, _ = socket.recv_fds(
                jail.connection, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS
            )
        try:
            # One request for each connection; whatever else it says ends it.
            if not message or jail.pid:
                self._end(selector, jail)
                return
            request = Request.parse(message)
            if request.received() != len(descriptors):
                raise RequestError(f"{len(descriptors)} of {request.received()} descriptors came")
            jail.pid, jail.mounts = start(request, descriptors), request.mounts
            self.jails[jail.pid] = jail
            _say(jail.connection, {"pid": jail.pid})
        except (OSError, RequestError, ValueError, KeyError, TypeError) as problem:
            _say(jail.connection, {"failed": str(problem)})
        finally:
            for one in descriptors:
                os.close(one)

    def _end(self, selector: selectors.BaseSelector, jail: Jail) -> None:
        selector.unregister(jail.connection)
        jail.connection.close()
        if self.jails.get(jail.pid) is jail:
            os.kill(jail.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own

    def _reap(self) -> None:
        """Of all children, as whatever loses its parent here becomes one."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if not pid:
                break
            jail = self.jails.pop(pid, None)
            if jail is not None:
                for path in jail.mounts:
                    detach_mount(path)
                _say(jail.connection, {"status": status})
            elif self.engine_process is not None and pid == self.engine_process.pid:
                self.engine_process = None
        # One that ends at once is not to keep this process busy.
        if self.engine_process is None and time.monotonic() >= self.engine_started + ENGINE_PAUSE_S:
            self._start_engine()


def _say(connection: socket.socket, what: Mapping[str, Any]) -> None:
    # A runner that is gone, or does not listen, misses it.
    with contextlib.suppress(OSError):
        connection.send(json.dumps(what).encode())


def main() -> None:
    """``init.py BOOT_SOCKET``"""
    mount_cgroups()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as boot:
        boot.connect(sys.argv[1])
        boot.send(b'{"waits": 1}')
        message, descriptors, _, _ = socket.recv_fds(boot, MAX_MESSAGE_BYTES, 1)
    if not descriptors:
        sys.exit("the slave gave no socket")
    leave_root_group()
    Init(json.loads(message)["engine"], socket.socket(fileno=descriptors[0])).run()


if __name__ == "__main__":
    main()
