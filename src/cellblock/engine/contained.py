"""Starts jails in the worker container instead of on the host itself.

Only the start is another: jobinit's socket, the log, pipes and cgroups are the host's, and so is the record.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import select
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import InternalError
from .host import JobUids
from .jail import JailProcess, JailSpec, jail_command

# As in ``worker_container/init.py``, which runs by itself.
_JOBS = Path("/run/cellblock/jobs")
_MAX_MESSAGE_BYTES = 2**17
_CONTROL, _LOG = 3, 4
_START_TIMEOUT_S = 20.0

_SYS_OPEN_TREE = 428  # the same on every architecture
_AT_FDCWD, _OPEN_TREE_CLONE, _AT_RECURSIVE = -100, 1, 0x8000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class WorkerContainer:
    """The host's worker container; an instance's :meth:`start` is for :class:`Jail`."""

    socket: Path
    """Where its first process takes requests."""
    first_id: int
    """The host's id of its root."""

    def start(self, spec: JailSpec, control: int, log: int) -> JailProcess:
        """Raises :class:`InternalError`."""
        inner, sources = self._inside(spec)
        trees: list[int] = []
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(_START_TIMEOUT_S)
            connection.connect(str(self.socket))
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
            raise InternalError(
                "worker container",
                f"starts no jail: {problem}",
                "see 'journalctl -u cellblock-worker'",
            ) from None
        finally:
            for tree in trees:
                os.close(tree)
        if "pid" not in answer:
            connection.close()
            reason = str(answer.get("failed", "it ended"))[:200]
            raise InternalError(
                "worker container",
                f"started no jail: {reason}",
                "see 'journalctl -u cellblock-worker'",
            )
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
    """A mount of ``path`` that is nowhere attached."""
    tree: int = _libc.syscall(
        _SYS_OPEN_TREE,
        _AT_FDCWD,
        str(path).encode(),
        _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC,
    )
    if tree < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"cloning the mount of {path}: {os.strerror(error)}")
    return tree
