"""Inside the worker container: its first process; and what it is given of its cgroups."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cellblock.errors import HostSetupError
from cellblock.worker_container import cgroups, init

MOUNTS = {
    "memory": Path("/sys/fs/cgroup/memory"),
    "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
    "": Path("/sys/fs/cgroup/unified"),
}


def test_no_file_with_a_limit_is_given_away() -> None:
    given = cgroups.delegated(
        "3:memory:/docker/a1\n2:cpu,cpuacct:/docker/a1\n0::/docker/a1\n", MOUNTS
    )
    assert {path.name for path in given} == {
        "a1", "cgroup.procs", "tasks", "cgroup.threads", "cgroup.subtree_control",
    }  # fmt: skip
    assert Path("/sys/fs/cgroup/cpu,cpuacct/docker/a1/tasks") in given
    assert Path("/sys/fs/cgroup/unified/docker/a1/tasks") not in given


@pytest.mark.parametrize("path", ["/", "/../x", ""])
def test_a_group_that_is_not_the_containers_own_is_never_given_away(path: str) -> None:
    with pytest.raises(HostSetupError):
        cgroups.delegated(f"3:memory:{path}\n", MOUNTS)


def test_mounts_are_found_by_controller() -> None:
    mountinfo = (
        "30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        "31 24 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
        "32 24 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "33 24 0:29 / /proc rw - proc proc rw\n"
    )
    found = cgroups.mounted(mountinfo)
    assert found["cpuacct"] == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert found["name=systemd"] == Path("/sys/fs/cgroup/systemd")
    assert found[""] == Path("/sys/fs/cgroup/unified")


def test_every_hierarchy_is_mounted_as_the_kernel_joined_it() -> None:
    assert init.v1_hierarchies("4:cpu,cpuacct:/a\n1:name=systemd:/a\n0::/a\n") == [
        ("cgroup", "cpu,cpuacct", "cpu,cpuacct"),
        ("cgroup", "none,name=systemd", "systemd"),
        ("cgroup2", "", "unified"),
    ]


def request(**changes: Any) -> bytes:
    return json.dumps(
        {"argv": ["/bin/true"], "descriptors": [], "mounts": [], "namespace": False} | changes
    ).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"descriptors": [2]},
        {"descriptors": [init._FIRST_DESCRIPTOR]},
        {"mounts": ["/etc"]},
        {"mounts": ["/run/cellblock/jobs/../../etc"]},
    ],
)
def test_what_a_request_may_not_ask_for(changes: dict[str, Any]) -> None:
    with pytest.raises(init.RequestError):
        init.Request.parse(request(**changes))


def test_descriptors_arrive_under_the_numbers_that_were_asked_for() -> None:
    """Also crossed: one asks for the number that another has."""
    ends = [os.pipe() for _ in range(2)]
    asked = init.Request.parse(
        request(
            argv=["/bin/sh", "-c", "echo first >&8; echo second >&7; echo lost"], descriptors=[8, 7]
        )
    )
    assert asked.received() == 2
    pid = init.start(asked, [end for _, end in ends])
    for _, end in ends:
        os.close(end)
    assert os.waitpid(pid, 0)[1] == 0
    assert [os.read(end, 100) for end, _ in ends] == [b"first\n", b"second\n"]
    for end, _ in ends:
        os.close(end)


def test_what_cannot_be_started_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        init.start(init.Request.parse(request(argv=["/missing"])), [])
    assert len(os.listdir("/proc/self/fd")) == before


def test_whoever_does_not_listen_does_not_end_it() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    init._say(here, {"pid": 1})
    here.close()


def test_on_cgroup_v2_its_own_processes_leave_the_top(tmp_path: Path) -> None:
    for name, content in {
        "cgroup.controllers": "cpu memory\n", "cgroup.procs": "1\n", "cgroup.subtree_control": ""
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    init.leave_root_group(tmp_path)
    assert (tmp_path / "worker" / "cgroup.procs").read_text() == "1"
    # A file is written anew with each controller; the kernel adds it.
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"


def test_on_cgroup_v1_there_is_no_such_rule(tmp_path: Path) -> None:
    init.leave_root_group(tmp_path)
    assert list(tmp_path.iterdir()) == []
