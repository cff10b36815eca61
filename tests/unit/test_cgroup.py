"""cgroup v2 and v1 behind one interface, on directory trees that look like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellblock.engine import cgroup
from cellblock.errors import HostSetupError

LIMITS = cgroup.GroupLimits(memory_bytes=64 * 2**20, processes=9, cpus=0.5)


class V2Tree:
    """A unified hierarchy in which the service is in /system.slice/x.service."""

    def __init__(self, root: Path, controllers: str = "cpu memory pids") -> None:
        self.own = root / "system.slice" / "x.service"
        self.own.mkdir(parents=True)
        (self.own / "cgroup.controllers").write_text(controllers)
        (self.own / "cgroup.procs").write_text("")
        (self.own / "cgroup.subtree_control").write_text("")
        for name in ("supervisor", "cellblock-jobs"):
            (self.own / name).mkdir()
        (self.own / "cellblock-jobs" / "cgroup.subtree_control").write_text("")
        self.proc_cgroup = root / "proc_cgroup"
        self.proc_cgroup.write_text("0::/system.slice/x.service\n")
        self.mounts = root / "mountinfo"
        self.mounts.write_text(f"29 23 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw\n")

    def detect(self) -> cgroup.Hierarchy:
        return cgroup.detect(self.proc_cgroup, self.mounts)


V2_FILES = {
    "memory.max": "max",
    "memory.swap.max": "max",
    "pids.max": "max",
    "cpu.max": "max 100000",
    "cgroup.procs": "",
    "cpu.stat": "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\n",
    "memory.peak": "4096\n",
    "memory.stat": "anon 100\nfile 2048\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n",
    "pids.events": "max 4\n",
    "pids.peak": "7\n",
}


def make_group(
    tree: V2Tree, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> cgroup.Group:
    """The kernel fills a new group with files, which do not hinder rmdir; here mkdir and rmdir do."""
    mkdir, rmdir = Path.mkdir, Path.rmdir

    def mkdir_and_fill(self: Path, *args: object, **kwargs: object) -> None:
        mkdir(self)
        for name, content in files.items():
            (self / name).write_text(content)

    def empty_and_rmdir(self: Path) -> None:
        for path in self.iterdir():
            path.unlink()
        rmdir(self)

    hierarchy = tree.detect()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir_and_fill)
        patch.setattr(Path, "rmdir", empty_and_rmdir)
        return hierarchy.create("job-run", LIMITS)


def test_v2_sets_every_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = V2Tree(tmp_path)
    make_group(tree, monkeypatch, V2_FILES)
    group = tree.own / "cellblock-jobs" / "job-run"
    assert (group / "memory.max").read_text() == str(64 * 2**20)
    assert (group / "memory.swap.max").read_text().startswith("0")
    assert (group / "pids.max").read_text().startswith("9")
    assert (group / "cpu.max").read_text().startswith("50000 100000")
    assert (tree.own / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_v2_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_group(V2Tree(tmp_path), monkeypatch, V2_FILES)
    assert group.usage() == cgroup.GroupUsage(
        cpu_us=5000,
        cpu_user_us=3000,
        cpu_system_us=2000,
        memory_peak_bytes=4096,
        memory_cache_bytes=2048,
        processes_peak=7,
        oom_kills=2,
        at_memory_limit=True,
        forks_refused=4,
    )


def test_v2_kills_for_want_of_memory_elsewhere_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = "low 0\nhigh 0\nmax 3\noom 0\noom_kill 2\noom_group_kill 0\n"
    usage = make_group(V2Tree(tmp_path), monkeypatch, {**V2_FILES, "memory.events": events}).usage()
    assert (usage.oom_kills, usage.at_memory_limit) == (2, False)


def test_v2_without_pids_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: text for name, text in V2_FILES.items() if name != "pids.peak"}
    assert make_group(V2Tree(tmp_path), monkeypatch, files).usage().processes_peak is None


@pytest.mark.parametrize("swap_is_on", [False, True])
def test_v2_swap_that_the_kernel_does_not_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap_is_on: bool
) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text(
        "Filename Type Size Used Priority\n" + "/dev/sda2 partition 9 0 -2\n" * swap_is_on
    )
    monkeypatch.setattr(cgroup, "_SWAPS", swaps)
    tree = V2Tree(tmp_path)
    files = {name: text for name, text in V2_FILES.items() if name != "memory.swap.max"}
    if not swap_is_on:
        make_group(tree, monkeypatch, files)
        return
    with pytest.raises(HostSetupError, match="swap is on but the kernel does not limit it"):
        make_group(tree, monkeypatch, files)
    # Nothing of the group that could not be made is left.
    assert list((tree.own / "cellblock-jobs").iterdir()) == [
        tree.own / "cellblock-jobs" / "cgroup.subtree_control"
    ]


def test_v2_service_moves_out_of_the_way(tmp_path: Path) -> None:
    tree = V2Tree(tmp_path)
    (tree.own / "cgroup.procs").write_text("4711\n")
    (tree.own / "supervisor" / "cgroup.procs").write_text("")
    tree.detect()
    assert (tree.own / "supervisor" / "cgroup.procs").read_text() == "4711"
    (tree.own / "supervisor" / "memory.max").touch()
    cgroup.detect(tree.proc_cgroup, tree.mounts).bound_supervisor(2**30)
    assert (tree.own / "supervisor" / "memory.max").read_text() == str(2**30)


@pytest.mark.parametrize("missing", ["cpu", "memory", "pids"])
def test_v2_missing_controller_is_refused(tmp_path: Path, missing: str) -> None:
    controllers = " ".join({"cpu", "memory", "pids"} - {missing})
    with pytest.raises(HostSetupError, match=f"controller {missing} is not available"):
        V2Tree(tmp_path, controllers).detect()


def v1_tree(root: Path, *, joined: bool, leave_out: str = "") -> tuple[Path, Path]:
    """A v1 tree as systemd (cpu,cpuacct joined) or as separate mounts; returns the /proc files."""
    mounts, cgroups = [], []
    names = ["cpu,cpuacct"] if joined else ["cpu", "cpuacct"]
    for number, name in enumerate([*names, "memory", "pids"], 1):
        if leave_out in name.split(","):
            continue
        point = root / name
        (point / "svc" / "cellblock-jobs").mkdir(parents=True)
        mounts.append(f"{number} 1 0:{number} /outer {point} rw - cgroup cgroup rw,{name}")
        cgroups.append(f"{number}:{name}:/outer/svc")
    (root / "mountinfo").write_text("\n".join(mounts))
    (root / "proc_cgroup").write_text("\n".join([*cgroups, "0::/outer/svc"]))
    return root / "proc_cgroup", root / "mountinfo"


@pytest.mark.parametrize("joined", [True, False])
def test_v1_finds_the_groups_below_the_mounts(tmp_path: Path, joined: bool) -> None:
    proc_cgroup, mounts = v1_tree(tmp_path, joined=joined)
    hierarchy = cgroup.detect(proc_cgroup, mounts)
    leftover = tmp_path / "memory" / "svc" / "cellblock-jobs" / "old-run"
    leftover.mkdir()
    assert hierarchy.sweep("older-") == 0
    assert leftover.exists()
    assert hierarchy.sweep("old-") == 1
    assert not leftover.exists()


def test_v1_bounds_the_service_and_not_its_jobs(tmp_path: Path) -> None:
    hierarchy = cgroup.detect(*v1_tree(tmp_path, joined=False))
    supervisor = tmp_path / "memory" / "svc" / "supervisor"
    supervisor.mkdir()
    for name in ("memory.limit_in_bytes", "cgroup.procs"):
        (supervisor / name).touch()
    hierarchy.bound_supervisor(2**30)
    assert (supervisor / "memory.limit_in_bytes").read_text() == str(2**30)
    assert (supervisor / "cgroup.procs").read_text() == str(os.getpid())


@pytest.mark.parametrize(
    "problem", [PermissionError(1, "no"), HostSetupError("cpu.cfs_quota_us", "refused -1", "look")]
)
def test_a_group_goes_whatever_keeps_it_from_being_unthrottled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    hierarchy = cgroup.detect(*v1_tree(tmp_path, joined=True))
    leftover = tmp_path / "memory" / "svc" / "cellblock-jobs" / "old-run"
    leftover.mkdir()

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(cgroup, "_write", fail)
    assert hierarchy.sweep() == 1
    assert not leftover.exists()


@pytest.mark.parametrize("missing", ["cpu", "pids", "cpuacct"])
def test_v1_missing_controller_is_refused(tmp_path: Path, missing: str) -> None:
    proc_cgroup, mounts = v1_tree(tmp_path, joined=False, leave_out=missing)
    with pytest.raises(HostSetupError, match=f"controller {missing} is not available"):
        cgroup.detect(proc_cgroup, mounts)


def test_a_group_outside_the_mount_is_refused(tmp_path: Path) -> None:
    tree = V2Tree(tmp_path)
    tree.proc_cgroup.write_text("0::/../elsewhere\n")
    with pytest.raises(HostSetupError, match="not below the mount"):
        tree.detect()


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("1 1 0:1 / / rw - ext4 x rw\n")
    (tmp_path / "proc_cgroup").write_text("0::/\n")
    with pytest.raises(HostSetupError, match="no cgroup file system"):
        cgroup.detect(tmp_path / "proc_cgroup", tmp_path / "mountinfo")
