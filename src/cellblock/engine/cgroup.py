"""One cgroup per stage, on cgroup v2 or v1 (hybrid included), behind one interface.

All groups live below ``cellblock-jobs/`` in the cgroup that systemd delegated to the service. A controller
that the host does not give is a :class:`HostSetupError` before any job starts.

Sources: kernel Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/{memory,cpuacct,pids}.rst.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import HostSetupError, InternalError

CONTROLLERS = ("cpu", "memory", "pids")
_CPU_PERIOD_US = 100_000
_MAX_SOCKET_BUFFERS = 16 * 2**20
# Not just "jobs": where systemd leaves a v1 controller alone (cpuacct mounted apart from cpu), the
# service is in that hierarchy's root, and so are its groups.
_JOBS = "cellblock-jobs"
_SUPERVISOR = "supervisor"
_SWAPS = Path("/proc/swaps")
_REMEDY = "start the service through systemd with Delegate=yes, or boot the host with this controller enabled"


@dataclass(frozen=True)
class GroupLimits:
    """What a group may use. ``processes`` counts jobinit too."""

    memory_bytes: int
    processes: int
    cpus: float


@dataclass(frozen=True)
class GroupUsage:
    """What a group has used. ``processes_peak`` is None where the kernel does not keep it."""

    cpu_us: int
    cpu_user_us: int
    cpu_system_us: int
    memory_peak_bytes: int
    memory_cache_bytes: int
    processes_peak: int | None
    oom_kills: int
    """Processes that the kernel ended for lack of memory."""
    at_memory_limit: bool
    """Whether the group itself had no memory left; else it was the host, or a group above, that had none."""
    forks_refused: int


# What v1 is asked for at once at most (a huge page): so much may be free when the limit is hit.
_LARGEST_CHARGE_BYTES = 2**21


class Group(ABC):
    """The cgroup of one stage."""

    @abstractmethod
    def make(self, limits: GroupLimits) -> None:
        """Makes the directories and sets every limit."""

    @abstractmethod
    def attach(self, pid: int) -> None:
        """Moves the process ``pid`` (this pid namespace) into the group."""

    @abstractmethod
    def unthrottle(self) -> None:
        """Lifts the CPU limit, so that what is being killed can die at once."""

    @abstractmethod
    def cpu_us(self) -> int:
        """CPU time used so far by all processes of the group, in microseconds."""

    @abstractmethod
    def usage(self) -> GroupUsage:
        """Everything the group has used so far."""

    @abstractmethod
    def pids(self) -> list[int]:
        """The processes in the group."""

    @abstractmethod
    def _directories(self) -> list[Path]: ...

    def remove(self) -> None:
        """Kills what is left in the group and removes it; returns when it is gone."""
        deadline = time.monotonic() + 10
        # It only makes dying quicker; whatever keeps it from that, the group must go.
        with contextlib.suppress(OSError, HostSetupError):
            self.unthrottle()
        while True:
            with contextlib.suppress(OSError):
                for pid in self.pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            left = [directory for directory in self._directories() if not _rmdir(directory)]
            if not left:
                return
            if time.monotonic() > deadline:
                raise InternalError(
                    str(left[0]), "cannot be removed", "look for processes in it that do not die"
                )
            time.sleep(0.002)


class Hierarchy(ABC):
    """Makes the groups of this host's stages."""

    @abstractmethod
    def _group(self, name: str) -> Group: ...

    @abstractmethod
    def _existing(self, prefix: str) -> list[Group]: ...

    def create(self, name: str, limits: GroupLimits) -> Group:
        """A new group with every limit set; raises :class:`HostSetupError` and leaves nothing."""
        group = self._group(name)
        try:
            group.make(limits)
        except BaseException:
            group.remove()
            raise
        return group

    def sweep(self, prefix: str = "") -> int:
        """Removes the groups that a service or process left behind, or of these those whose name begins with
        ``prefix``; returns how many."""
        groups = self._existing(prefix)
        for group in groups:
            group.remove()
        return len(groups)

    @abstractmethod
    def bound_supervisor(self, memory_bytes: int) -> None:
        """Limits the memory of this process, and of those that it starts and puts into no group.

        The limit of the service's unit (``MemoryMax=``) would be one for its jobs as well, whose groups are below.
        """


def detect(
    proc_cgroup: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/proc/self/mountinfo")
) -> Hierarchy:
    """The hierarchy of the calling process; raises :class:`HostSetupError`.

    A controller is taken from where the kernel has it: v1 when /proc/self/cgroup lists it there,
    else the unified hierarchy.
    """
    paths: dict[str, str] = {}
    for line in proc_cgroup.read_text().splitlines():
        _, names, path = line.split(":", 2)
        for controller in names.split(",") if names else [""]:
            paths[controller] = path
    v1_mounts, v2_mount = _cgroup_mounts(mounts)
    if "memory" in paths:
        return _HierarchyV1(paths, v1_mounts)
    if v2_mount is None or "" not in paths:
        raise HostSetupError("cgroup", "no cgroup file system is mounted", "mount cgroup2")
    return _HierarchyV2(_below(v2_mount, paths[""]))


@dataclass(frozen=True)
class _Mount:
    root: str
    point: Path


def _cgroup_mounts(mountinfo: Path) -> tuple[dict[str, _Mount], _Mount | None]:
    v1: dict[str, _Mount] = {}
    v2: _Mount | None = None
    for line in mountinfo.read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (fstype, _, options) = left.split(), right.split(" ", 2)
        mount = _Mount(root=fields[3], point=Path(fields[4]))
        if fstype == "cgroup2":
            v2 = mount
        elif fstype == "cgroup":
            for option in options.split(","):
                v1[option] = mount
    return v1, v2


def _below(mount: _Mount, path: str) -> Path:
    relative = os.path.relpath(path, mount.root)
    # "/.." is how the kernel shows a group above the root of the cgroup namespace.
    if relative.startswith("..") or path.startswith("/.."):
        raise HostSetupError(
            "cgroup",
            f"the service's group {path} is not below the mount {mount.point}",
            "give the host a private cgroup namespace",
        )
    return mount.point / relative


class _HierarchyV2(Hierarchy):
    def __init__(self, own: Path) -> None:
        # A group with processes cannot have controllers enabled for its children ("no internal
        # processes"), so the service itself moves to a leaf.
        available = (own / "cgroup.controllers").read_text().split()
        for controller in CONTROLLERS:
            if controller not in available:
                raise HostSetupError("cgroup", f"controller {controller} is not available", _REMEDY)
        leaf = self._supervisor = own / _SUPERVISOR
        leaf.mkdir(exist_ok=True)
        for pid in (own / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                _write(leaf / "cgroup.procs", pid)
        self._jobs = own / _JOBS
        self._jobs.mkdir(exist_ok=True)
        for directory in (own, self._jobs):
            _write(directory / "cgroup.subtree_control", " ".join(f"+{c}" for c in CONTROLLERS))

    def _group(self, name: str) -> Group:
        return _GroupV2(self._jobs / name)

    def _existing(self, prefix: str) -> list[Group]:
        paths = self._jobs.glob(f"{prefix}*/")
        return [_GroupV2(path) for path in paths]

    def bound_supervisor(self, memory_bytes: int) -> None:
        _write(self._supervisor / "memory.max", memory_bytes)


class _GroupV2(Group):
    def __init__(self, directory: Path) -> None:
        self._dir = directory

    def make(self, limits: GroupLimits) -> None:
        self._dir.mkdir()
        _write(self._dir / "memory.max", limits.memory_bytes)
        if (self._dir / "memory.swap.max").exists():
            _write(self._dir / "memory.swap.max", 0)
        else:
            _refuse_swap("memory.swap.max")
        _write(self._dir / "pids.max", limits.processes)
        _write(self._dir / "cpu.max", f"{int(limits.cpus * _CPU_PERIOD_US)} {_CPU_PERIOD_US}")

    def attach(self, pid: int) -> None:
        _write(self._dir / "cgroup.procs", pid)

    def unthrottle(self) -> None:
        _write(self._dir / "cpu.max", f"max {_CPU_PERIOD_US}")

    def cpu_us(self) -> int:
        return _flat_keyed(self._dir / "cpu.stat")["usage_usec"]

    def usage(self) -> GroupUsage:
        cpu = _flat_keyed(self._dir / "cpu.stat")
        events = _flat_keyed(self._dir / "memory.events")
        peak = self._dir / "pids.peak"  # since Linux 6.1
        return GroupUsage(
            cpu_us=cpu["usage_usec"],
            cpu_user_us=cpu["user_usec"],
            cpu_system_us=cpu["system_usec"],
            memory_peak_bytes=_number(self._dir / "memory.peak"),
            memory_cache_bytes=_flat_keyed(self._dir / "memory.stat")["file"],
            processes_peak=_number(peak) if peak.exists() else None,
            oom_kills=events["oom_kill"],
            at_memory_limit=events["oom"] > 0,
            forks_refused=_flat_keyed(self._dir / "pids.events")["max"],
        )

    def pids(self) -> list[int]:
        return _pids(self._dir)

    def _directories(self) -> list[Path]:
        return [self._dir]


class _HierarchyV1(Hierarchy):
    """Several controllers may be mounted together (cpu,cpuacct), so directories may coincide."""

    def __init__(self, paths: Mapping[str, str], mounts: Mapping[str, _Mount]) -> None:
        self._jobs: dict[str, Path] = {}
        for controller in (*CONTROLLERS, "cpuacct"):
            if controller not in paths or controller not in mounts:
                raise HostSetupError("cgroup", f"controller {controller} is not available", _REMEDY)
            self._jobs[controller] = _below(mounts[controller], paths[controller]) / _JOBS
            self._jobs[controller].mkdir(exist_ok=True)
        self._supervisor = self._jobs["memory"].parent / _SUPERVISOR

    def bound_supervisor(self, memory_bytes: int) -> None:
        self._supervisor.mkdir(exist_ok=True)
        # Lowered from what an earlier service had, or raised: it must hold what is in it.
        _write(self._supervisor / "memory.limit_in_bytes", memory_bytes)
        _write(self._supervisor / "cgroup.procs", os.getpid())

    def _group(self, name: str) -> Group:
        return _GroupV1({controller: jobs / name for controller, jobs in self._jobs.items()})

    def _existing(self, prefix: str) -> list[Group]:
        names = {path.name for jobs in self._jobs.values() for path in jobs.glob(f"{prefix}*/")}
        return [self._group(name) for name in sorted(names)]


class _GroupV1(Group):
    def __init__(self, directories: dict[str, Path]) -> None:
        self._dirs = directories

    def make(self, limits: GroupLimits) -> None:
        for directory in self._directories():
            directory.mkdir()
        memory = self._dirs["memory"]
        _write(memory / "memory.limit_in_bytes", limits.memory_bytes)
        if (memory / "memory.memsw.limit_in_bytes").exists():
            _write(memory / "memory.memsw.limit_in_bytes", limits.memory_bytes)
        else:
            _refuse_swap("memory.memsw.limit_in_bytes")
        # v1 keeps the buffers of sockets in an account of their own, outside the limit above.
        sockets = min(limits.memory_bytes, _MAX_SOCKET_BUFFERS)
        _write(memory / "memory.kmem.tcp.limit_in_bytes", sockets)
        _write(self._dirs["pids"] / "pids.max", limits.processes)
        _write(self._dirs["cpu"] / "cpu.cfs_period_us", _CPU_PERIOD_US)
        _write(self._dirs["cpu"] / "cpu.cfs_quota_us", int(limits.cpus * _CPU_PERIOD_US))

    def attach(self, pid: int) -> None:
        for directory in self._directories():
            _write(directory / "cgroup.procs", pid)

    def unthrottle(self) -> None:
        _write(self._dirs["cpu"] / "cpu.cfs_quota_us", -1)

    def cpu_us(self) -> int:
        return _number(self._dirs["cpuacct"] / "cpuacct.usage") // 1000

    def usage(self) -> GroupUsage:
        total = self.cpu_us()
        split = _flat_keyed(self._dirs["cpuacct"] / "cpuacct.stat")
        ticks = split["user"] + split["system"]
        # The split is kept in clock ticks; the exact total is shared out in its proportion.
        user = total * split["user"] // ticks if ticks else total
        peak = self._dirs["pids"] / "pids.peak"
        memory = self._dirs["memory"]
        most = _number(memory / "memory.max_usage_in_bytes")
        return GroupUsage(
            cpu_us=total,
            cpu_user_us=user,
            cpu_system_us=total - user,
            # The peak of both accounts; they need not have been at it together.
            memory_peak_bytes=most + _number(memory / "memory.kmem.tcp.max_usage_in_bytes"),
            memory_cache_bytes=_flat_keyed(memory / "memory.stat")["cache"],
            processes_peak=_number(peak) if peak.exists() else None,
            oom_kills=_flat_keyed(memory / "memory.oom_control")["oom_kill"],
            # By its usage: recent kernels (6.18) no longer count refusals in failcnt.
            at_memory_limit=most
            >= _number(memory / "memory.limit_in_bytes") - _LARGEST_CHARGE_BYTES,
            forks_refused=_flat_keyed(self._dirs["pids"] / "pids.events")["max"],
        )

    def pids(self) -> list[int]:
        return sorted({pid for directory in self._directories() for pid in _pids(directory)})

    def _directories(self) -> list[Path]:
        return list(dict.fromkeys(self._dirs.values()))


def _write(path: Path, value: int | str) -> None:
    # One write(2): cgroup files take a value whole or not at all.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    except ProcessLookupError:
        raise
    except OSError as problem:
        raise HostSetupError(
            str(path),
            f"refused {value!r}: {problem.strerror}",
            "check the limits of its parent group",
        ) from None
    finally:
        os.close(fd)


def _number(path: Path) -> int:
    return int(path.read_text())


def _flat_keyed(path: Path) -> dict[str, int]:
    return {
        key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())
    }


def _pids(directory: Path) -> list[int]:
    try:
        return [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
    except FileNotFoundError:
        return []


def _rmdir(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _refuse_swap(missing: str) -> None:
    """Without swap the memory limit alone is enough; with swap a job would escape it."""
    if len(_SWAPS.read_text().splitlines()) > 1:
        raise HostSetupError(
            "cgroup",
            f"swap is on but the kernel does not limit it (no {missing})",
            "boot with swapaccount=1 or turn swap off",
        )
