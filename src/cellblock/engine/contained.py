"""Starts jails in the worker container instead of on the host itself.

Only the start is another: jobinit's socket, the log, pipes and cgroups are the host's, and so is the record. What
the container's root can do all the same is in ``docs/results.md``; what it must not do is looked for here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import HostSetupError, UnsupportedTargetError, WorkerLostError
from ..validate import Value
from .host import JobUids
from .jail import Jail, JailProcess, JailSpec, jail_command

# As in ``worker_container/init.py``, which runs by itself.
_JOBS = Path("/run/cellblock/jobs")
_MAX_MESSAGE_BYTES = 2**17
_CONTROL, _LOG = 3, 4
_START_TIMEOUT_S = 20.0
_REMEDY = "see 'journalctl -u cellblock-worker'"
_PF_EXITING = 0x4
_LIMITING = {"cpu", "cpuacct", "memory", "pids"}

# The same on every architecture.
_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442
_AT_FDCWD, _OPEN_TREE_CLONE, _AT_RECURSIVE, _AT_EMPTY_PATH = -100, 1, 0x8000, 0x1000
_PRIVATE = struct.pack("=QQQQ", 0, 0, 1 << 18, 0)
"""``struct mount_attr`` with the propagation MS_PRIVATE."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class WorkerContainer:
    """The host's worker container; an instance's :meth:`start` is for :class:`Jail`."""

    directory: Path
    """Of the host: ``socket``, where its first process takes requests, and ``pid``, the host's number of that."""
    first_id: int
    """The host's id of its root."""
    first_job_id: int
    """The first id within that jobs may have."""
    ids: int
    """How many it has."""
    runtime: str
    """``runc`` is no boundary, the others are."""

    @classmethod
    def load(cls, path: Path, host: str, parallel_jobs: int) -> WorkerContainer:
        """The one that the role ``worker_container`` described; raises :class:`UnsupportedTargetError` where the host
        has none, and :class:`HostSetupError`."""
        try:
            value = Value(json.loads(path.read_text()), str(path), HostSetupError, prefix="")
        except FileNotFoundError:
            raise UnsupportedTargetError(
                "target",
                f"is 'worker_container', and {host} has none",
                "use host, or set worker_container_enabled for the slave and run playbooks/site.yml",
            ) from None
        except (OSError, ValueError):
            raise HostSetupError(
                str(path), "cannot be read, or is no JSON", "run the role worker_container again"
            ) from None
        fields = value.fields(
            ("directory", "owner", "first_job_id", "ids", "runtime"), {}, others=True
        )
        found = cls(
            directory=Path(fields["directory"].text()),
            first_id=fields["owner"].integer(0, 2**32 - 2),
            first_job_id=fields["first_job_id"].integer(1, 2**32 - 2),
            ids=fields["ids"].integer(1, 2**32 - 2),
            runtime=fields["runtime"].text(),
        )
        room = (found.ids - found.first_job_id) // 2
        if room < parallel_jobs:
            raise HostSetupError(
                "worker_container_ids",
                f"has room for {room} jobs, and {host} runs {parallel_jobs} at once",
                "give it more ids, or lower worker_slave_parallel_jobs",
            )
        return found

    @property
    def is_boundary(self) -> bool:
        return self.runtime != "runc"

    def uids(self, number: int) -> JobUids:
        """The host's ids of the job that runs as number ``number``."""
        first = self.first_id + self.first_job_id + 2 * number
        return JobUids(first, first + 1)

    def pid(self) -> int:
        """Of its first process; raises :class:`WorkerLostError`."""
        try:
            return int((self.directory / "pid").read_text())
        except (OSError, ValueError):
            raise WorkerLostError("worker container", "does not run", _REMEDY) from None

    def require_own(self, jail: Jail) -> None:
        """Raises :class:`WorkerLostError` unless the jail's init is a process of the container that no stage has yet:
        its root could name another one.
        """
        ours, theirs = groups_of(self.pid()), groups_of(jail.pid)
        within = ours and all(
            is_within(path, ours.get(controller, "")) for controller, path in theirs.items()
        )
        # While it lives, its number is no other's.
        if not within or not jail.lives():
            raise WorkerLostError(
                "worker container",
                "names a process that is not its own as that of a jail",
                "have it made anew: 'systemctl restart cellblock-worker'",
            )

    def start(self, spec: JailSpec, control: int, log: int) -> JailProcess:
        """Raises :class:`WorkerLostError`."""
        inner, sources = self._inside(spec)
        trees: list[int] = []
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(_START_TIMEOUT_S)
            connection.connect(str(self.directory / "socket"))
            trees += [_detached(source) for source in sources.values()]
            namespace = [] if spec.namespace is None else [spec.namespace]
            request = {
                "argv": jail_command(inner, _CONTROL, _LOG),
                "descriptors": [_CONTROL, _LOG],
                "mounts": [str(path) for path in sources],
                "namespace": bool(namespace),
            }
            socket.send_fds(
                connection, [json.dumps(request).encode()], [*trees, *namespace, control, log]
            )
            answer = json.loads(connection.recv(_MAX_MESSAGE_BYTES) or b"{}")
        except (OSError, ValueError) as problem:
            connection.close()
            raise WorkerLostError(
                "worker container", f"starts no jail: {problem}", _REMEDY
            ) from None
        finally:
            for tree in trees:
                os.close(tree)
        if "pid" not in answer:
            connection.close()
            reason = str(answer.get("failed", "it ended"))[:200]
            raise WorkerLostError("worker container", f"started no jail: {reason}", _REMEDY)
        return ContainedProcess(connection)

    def _inside(self, spec: JailSpec) -> tuple[JailSpec, dict[Path, Path]]:
        """The specification as it is within, and {path within: source on the host} of what is mounted for it."""
        name = spec.work.parent.name
        scratch, dev = _JOBS / name, _JOBS / f"{name}-dev"
        sources = {scratch: spec.work.parent, dev: spec.dev}
        mounts = []
        for number, mount in enumerate(spec.mounts):
            within = _JOBS / f"{name}-{number}"
            sources[within] = mount.source
            mounts.append(dataclasses.replace(mount, source=within))
        files = []
        for number, (source, target) in enumerate(spec.files):
            within = _JOBS / f"{name}-file-{number}"
            sources[within] = source.parent
            files.append((within / source.name, target))
        inner = dataclasses.replace(
            spec,
            work=scratch / spec.work.name,
            tmp=scratch / spec.tmp.name,
            dev=dev,
            mounts=tuple(mounts),
            files=tuple(files),
            uids=JobUids(
                init=spec.uids.init - self.first_id,
                job=spec.uids.job - self.first_id,
            ),
        )
        return inner, sources


class ContainedProcess:
    """nsjail in the worker container. What is said of its end is that container's word, and used for messages only."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            deadline = None if timeout is None else time.monotonic() + timeout
            poller = select.poll()
            poller.register(self._connection, select.POLLIN)
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poller.poll(left):
                raise subprocess.TimeoutExpired("nsjail", timeout or 0.0)
            try:
                answer = json.loads(self._connection.recv(_MAX_MESSAGE_BYTES) or b"{}")
                self.returncode = os.waitstatus_to_exitcode(int(answer["status"]))
            except (OSError, ValueError, KeyError, TypeError):
                # The container is gone, or talks nonsense.
                self.returncode = -9
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        """The other end kills it when the connection is closed."""
        self._connection.close()
        if self.returncode is None:
            self.returncode = -9


def _detached(path: Path) -> int:
    """A mount of ``path``, with what is mounted below, that is nowhere attached."""
    tree: int = _libc.syscall(
        _SYS_OPEN_TREE,
        _AT_FDCWD,
        str(path).encode(),
        _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC,
    )
    if tree < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"cloning the mount of {path}: {os.strerror(error)}")
    # Otherwise what is unmounted there, by whomever, is unmounted here as well: /dev of all jobs, and scratch.
    if _libc.syscall(
        _SYS_MOUNT_SETATTR,
        tree,
        b"",
        _AT_EMPTY_PATH | _AT_RECURSIVE,
        _PRIVATE,
        len(_PRIVATE),
    ):
        error = ctypes.get_errno()
        os.close(tree)
        raise OSError(error, f"making the mount of {path} private: {os.strerror(error)}")
    return tree


def groups_of(pid: int) -> dict[str, str]:
    """The cgroups by which a process is limited: {controller: path}, ``""`` for v2; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    v1: dict[str, str] = {}
    v2: dict[str, str] = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        if not names:
            v2[""] = path
        v1.update((name, path) for name in _LIMITING.intersection(names.split(",")))
    return v1 or v2


def is_within(path: str, above: str) -> bool:
    """Whether a cgroup is ``above`` itself or below it; never where that is the root."""
    return above not in ("", "/") and (path == above or path.startswith(f"{above}/"))


def has_left(pid: int, groups: dict[str, str]) -> bool:
    """Whether the process, or one that descends from it, is in other cgroups than these."""
    left = [pid]
    while left:
        one = left.pop()
        now = groups_of(one)
        if now and now != groups and _is_alive(one):
            return True
        # It may end at any time, and its threads.
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                with contextlib.suppress(OSError):
                    children = Path(f"/proc/{one}/task/{thread}/children").read_text()
                    left += map(int, children.split())
    return False


def _is_alive(pid: int) -> bool:
    """Of a process that ends, or is dead and not waited for, the kernel says that it is in the root of v1."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    state, *rest = stat.rpartition(")")[2].split()
    return state not in "ZX" and not int(rest[5]) & _PF_EXITING
