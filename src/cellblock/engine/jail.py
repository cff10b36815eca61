"""A jail: nsjail around jobinit, and the conversation with jobinit.

``Jail`` starts a jail that waits; ``Jail.begin`` tells it what to run. The two are apart so that
jails can be started ahead of their jobs. The protocol is described in ``jobinit.c``.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import HostOverloadedError, InternalError
from ..linux.netlink import inside
from .host import BoundMount, JobUids
from .limits import StageConstraints

PROTOCOL_VERSION = 2
JOB_ID = 1000
"""uid and gid of the job inside the jail, as in jobinit.c."""
START_TIMEOUT_S = 20.0
MAX_QUEUED_SIGNALS = 1024
"""Signals with a queue, and POSIX timers, of all processes of a job together."""

_CREDENTIALS = struct.Struct("iII")
_FAILED = struct.Struct("=IIiI")
_ENDED = struct.Struct("=Ii11Q")
_TAG_FAILED, _TAG_ENDED = 0x4C494146, 0x45444E45
_STEPS = {
    1: "reading the specification",
    2: "forking",
    3: "setting up descriptors",
    4: "setting a resource limit",
    5: "changing to the working directory",
    6: "dropping privileges",
    7: "executing",
    8: "loading the system call filter",
}
_STEP_RLIMIT, _STEP_CHDIR, _STEP_EXEC, _STEP_CONFINE = 4, 5, 7, 8
_ENOTSUPP = 524
"""The kernel's, not in errno(3): here, that its memory for compiled BPF programs is used up."""


@dataclass(frozen=True)
class Begun:
    """The program was executed."""


@dataclass(frozen=True)
class Failed:
    """The program was not executed. ``by_job``: the job named something that is not there."""

    reason: str
    by_job: bool


@dataclass(frozen=True)
class Ended:
    """The program's raw wait status, and the usage of all processes that jobinit reaped."""

    wait_status: int
    user_us: int
    system_us: int
    max_rss_kib: int
    voluntary_switches: int
    involuntary_switches: int
    blocks_in: int
    blocks_out: int
    minor_faults: int
    major_faults: int
    started_ns: int
    ended_ns: int
    """When the program was started and when it ended, on the clock of ``time.monotonic``."""

    @property
    def signal(self) -> int | None:
        """Of the signal that ended the program, else None."""
        return os.WTERMSIG(self.wait_status) if os.WIFSIGNALED(self.wait_status) else None

    @property
    def exit_code(self) -> int | None:
        """None where a signal ended it: never guessed from one another."""
        return None if os.WIFSIGNALED(self.wait_status) else os.WEXITSTATUS(self.wait_status)


@dataclass(frozen=True)
class Gone:
    """jobinit is no more and did not report; it was killed."""


Event = Begun | Failed | Ended | Gone


@dataclass(frozen=True)
class JailSpec:
    """What a jail is made of, known before its job."""

    nsjail: Path
    jobinit: Path
    root: Path
    dev: Path
    work: Path
    tmp: Path
    uids: JobUids
    mounts: tuple[BoundMount, ...] = ()
    namespace: int | None = None
    """Descriptor of the network namespace that it runs in; None: one of its own, without a network."""
    files: tuple[tuple[Path, str], ...] = ()
    """Files of the host, and the files of the root that they are bound over."""


class JailProcess(Protocol):
    """nsjail, wherever it was started; as :class:`subprocess.Popen` has it."""

    @property
    def returncode(self) -> int | Any: ...

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended; raises :class:`subprocess.TimeoutExpired`."""

    def kill(self) -> None: ...


Start = Callable[[JailSpec, int, int], JailProcess]
"""Starts nsjail for a specification, with jobinit's socket and the descriptor of its log."""


def start_here(spec: JailSpec, control: int, log: int) -> JailProcess:
    """On this host, as a child of the caller."""
    # A process starts in the network namespace of the thread that starts it.
    network = contextlib.nullcontext() if spec.namespace is None else inside(spec.namespace)
    with network:
        return subprocess.Popen(
            jail_command(spec, control, log),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(control, log),
            env={},
            cwd="/",
        )


class Jail:
    """One jail, from its start to its end; ``pid`` is jobinit's in the caller's pid namespace."""

    def __init__(self, spec: JailSpec, start: Start = start_here) -> None:
        """Starts it and waits until jobinit is ready; raises :class:`InternalError`."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = os.memfd_create("nsjail-log", os.MFD_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with theirs:
                self._process = start(spec, theirs.fileno(), self._log)
            self.pid = self._await_hello()
            self._pidfd = os.pidfd_open(self.pid)
            self._io_before = self._io()
        except BaseException:
            self.close()
            raise

    def lives(self) -> bool:
        """Whether jobinit has not ended; then ``pid`` is no other process's."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def fileno(self) -> int:
        """Readable when :meth:`event` will not block."""
        return self._socket.fileno()

    def begin(
        self,
        *,
        command: Sequence[str],
        working_directory: str,
        environment_variables: Mapping[str, str],
        constraints: StageConstraints,
        stdio: tuple[int, int, int],
    ) -> None:
        """Starts the program; the caller keeps (and should close) its ``stdio`` descriptors."""
        spec = os.memfd_create("jobinit-spec", os.MFD_CLOEXEC)
        try:
            with open(spec, "wb", closefd=False) as target:
                target.write(
                    _encode_spec(command, working_directory, environment_variables, constraints)
                )
            socket.send_fds(self._socket, [b"START"], [spec, *stdio])
        except OSError as problem:
            raise InternalError(
                "jail", f"jobinit cannot be reached: {problem.strerror}", self._log_text()
            ) from None
        finally:
            os.close(spec)

    def kill(self) -> None:
        """Asks jobinit to kill everything and report; it may already be gone."""
        with contextlib.suppress(OSError):
            self._socket.send(b"KILL")

    def destroy(self) -> None:
        """Kills jobinit itself: the kernel then ends every process of the jail. No report."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def event(self) -> Event:
        """The next message from jobinit; blocks until there is one.

        Raises :class:`HostOverloadedError` when the host could not start the program now.
        """
        try:
            message = self._socket.recv(4096)
        except ConnectionResetError:
            return Gone()
        if not message:
            return Gone()
        if message == b"BEGUN":
            return Begun()
        if len(message) == _ENDED.size and message[:4] == _ENDED.pack(_TAG_ENDED, *[0] * 12)[:4]:
            _, *fields = _ENDED.unpack(message)
            return Ended(*fields)
        if len(message) == _FAILED.size:
            tag, step, error, detail = _FAILED.unpack(message)
            if (tag, step, error) == (_TAG_FAILED, _STEP_CONFINE, _ENOTSUPP):
                raise HostOverloadedError(
                    "jail",
                    f"{_STEPS[step]}: the kernel's memory for compiled filters is used up",
                    "see what holds it on the host (net.core.bpf_jit_limit), and run the job again",
                )
            if tag == _TAG_FAILED:
                return _failed(step, error, detail)
        raise InternalError("jail", "jobinit sent something unknown", "reinstall the engine")

    def failure(self) -> str:
        """Why the jail ended without a report, in nsjail's words, for operators."""
        self._process.wait()
        return f"nsjail exited with {self._process.returncode}. {self._log_text()}".strip()

    def close(self) -> None:
        """Ends the jail, whatever its state, and waits until none of it is left."""
        self._socket.close()
        if hasattr(self, "_process"):
            try:
                # With its socket closed jobinit kills all and exits, and nsjail follows.
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                if hasattr(self, "_pidfd"):
                    self.destroy()
                self._process.kill()
                self._process.wait()
        if hasattr(self, "_pidfd"):
            os.close(self._pidfd)
        os.close(self._log)

    def io(self) -> tuple[int, int] | None:
        """Bytes that reaped processes have read and written by calls; None once jobinit is gone.

        To be asked after :class:`Ended`: jobinit stays until :meth:`close`.
        """
        now = self._io()
        if now is None or self._io_before is None:
            return None
        return now[0] - self._io_before[0], now[1] - self._io_before[1]

    def _io(self) -> tuple[int, int] | None:
        try:
            text = Path(f"/proc/{self.pid}/io").read_text()
        except OSError:
            return None
        fields = dict(line.split(": ") for line in text.splitlines())
        return int(fields["rchar"]), int(fields["wchar"])

    def _await_hello(self) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        poller = select.poll()  # select(2) knows descriptors below 1024 only
        poller.register(self._socket, select.POLLIN)
        while not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if time.monotonic() >= deadline:
                self._process.kill()
                raise InternalError(
                    "jail", f"did not start within {START_TIMEOUT_S:.0f} s", self.failure()
                )
        message, ancillary, _, _ = self._socket.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
        if message != b"HELLO" + bytes([PROTOCOL_VERSION]):
            raise InternalError("jail", "did not start", self.failure())
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                return int(_CREDENTIALS.unpack(data)[0])
        raise InternalError("jail", "jobinit has no credentials", "this kernel is not supported")

    def _log_text(self) -> str:
        return os.pread(self._log, 4096, 0).decode("utf-8", "replace").strip().replace("\n", " | ")


def jail_command(spec: JailSpec, control: int, log: int) -> list[str]:
    """What starts it, with jobinit's socket and the log as descriptors of those numbers."""
    init, job = spec.uids.init, spec.uids.job
    return [
        str(spec.nsjail),
        "--mode=o",
        "--quiet",
        f"--log_fd={log}",
        f"--pass_fd={control}",
        f"--chroot={spec.root}",
        # inside:outside:count. Never the short form: `--user N` maps N to the host's root.
        f"--user=0:{init}:1",
        f"--user={JOB_ID}:{job}:1",
        f"--group=0:{init}:1",
        f"--group={JOB_ID}:{job}:1",
        # What jobinit needs to become the job (SETPCAP: to empty the bounding set) and to end
        # processes of another uid; the job gets none.
        "--cap=CAP_SETUID",
        "--cap=CAP_SETGID",
        "--cap=CAP_SETPCAP",
        "--cap=CAP_KILL",
        "--hostname=cellblock",
        "--cwd=/",
        # Limits are the supervisor's (clock, cgroup) and jobinit's (rlimits): nsjail's own are
        # coarse and would also bind jobinit.
        "--time_limit=0",
        "--disable_rlimits",
        "--nice_level=0",
        *(["--enable_clone_newtime"] if Path("/proc/self/ns/time").exists() else []),
        *([] if spec.namespace is None else ["--disable_clone_newnet"]),
        f"--bindmount_ro={spec.dev}:/dev",
        f"--bindmount={spec.work}:/work",
        f"--bindmount={spec.tmp}:/tmp",
        *_mount_options(spec.mounts),
        *(f"--bindmount_ro={source}:{target}" for source, target in spec.files),
        f"--exec_file={spec.jobinit}",
        "--execute_fd",
        "--",
        "jobinit",
        str(control),
    ]


def _mount_options(mounts: Sequence[BoundMount]) -> list[str]:
    if not mounts:
        return []
    # The root is read-only, so the targets are made in a tmpfs of jail root's.
    return [
        "--mount=none:/mnt:tmpfs:size=64k,nr_inodes=1024,mode=755",
        *(
            f"--bindmount{'' if mount.writable else '_ro'}={mount.source}:{mount.target}"
            for mount in mounts
        ),
    ]


def _encode_spec(
    command: Sequence[str],
    working_directory: str,
    environment_variables: Mapping[str, str],
    constraints: StageConstraints,
) -> bytes:
    rlimits = _rlimits(constraints)
    strings = [
        working_directory,
        *command,
        *(f"{name}={value}" for name, value in environment_variables.items()),
    ]
    header = struct.pack(
        "=4I", PROTOCOL_VERSION, len(command), len(environment_variables), len(rlimits)
    )
    limits = b"".join(struct.pack("=2I2Q", which, 0, soft, hard) for which, soft, hard in rlimits)
    text = b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in strings)
    return header + limits + text


def _rlimits(constraints: StageConstraints) -> list[tuple[int, int, int]]:
    """(resource, soft, hard) for every resource limit of a job."""
    # RLIMIT_CPU counts each process alone in whole seconds: only a backstop behind the cgroup.
    cpu_s = -(-constraints.cpu_time_ms // 1000) + 1
    return [
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_STACK, constraints.stack_bytes, constraints.stack_bytes),
        (resource.RLIMIT_FSIZE, constraints.file_size_bytes, constraints.file_size_bytes),
        (resource.RLIMIT_NOFILE, constraints.open_files, constraints.open_files),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 65_536, 65_536),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        # What is queued counts for the owner of the user namespace too, which is the host's root.
        (resource.RLIMIT_SIGPENDING, MAX_QUEUED_SIGNALS, MAX_QUEUED_SIGNALS),
        (resource.RLIMIT_NICE, 0, 0),
        (resource.RLIMIT_RTPRIO, 0, 0),
    ]


def _failed(step: int, error: int, detail: int) -> Failed:
    what = _STEPS.get(step, f"step {step}")
    if step == _STEP_RLIMIT:
        what += f" ({detail})"
    by_job = step in (_STEP_EXEC, _STEP_CHDIR)
    return Failed(reason=f"{what}: {os.strerror(error)}", by_job=by_job)
