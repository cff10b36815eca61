"""The worker container: what is refused, and its system call filter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils import _worker_container as worker

INFO = {"SecurityOptions": ["name=seccomp,profile=default", "name=userns"]}
WANTED = worker.Wanted(
    runtime="userns", networks=["bridge"], ids=131072, first_job_id=65536, parallel_jobs=8
)
FOUND = worker.Found(
    engine=INFO,
    networks={"bridge": "bridge", "host": "host", "none": "null", "jobs": "bridge"},
    subordinate=[
        ("/etc/subuid", "containers", 300000, 131072),
        ("/etc/subgid", "containers", 300000, 131072),
    ],
    remap="containers",
)


def test_what_is_in_order_is_not_refused() -> None:
    assert worker.problems(WANTED, FOUND) == []


@pytest.mark.parametrize(
    ("wanted", "found", "named"),
    [
        ({"runtime": "sysbox-runc"}, {}, "not among its runtimes (none)"),
        (
            {"runtime": "sysbox-runc"},
            {"engine": {**INFO, "Runtimes": {"runc": {}, "io.containerd.runc.v2": {}}}},
            "not among its runtimes (io.containerd.runc.v2, runc)",
        ),
        ({}, {"foreign": "the engine is podman's; remove it."}, "podman's"),
        ({}, {"missing": ["/opt/cellblock/bin/nsjail"]}, "provide it with the role nsjail"),
        ({}, {"missing": ["/usr/bin/docker"]}, "docker-cli"),
        (
            {"min_free_bytes": 2**30},
            {"free": {"/var/lib/docker": 2**20}},
            "/var/lib/docker has 1 MiB free",
        ),
        (
            {"inner": {"bip": "172.16.0.9/24"}},
            {"used": [("the engine's network bridge", "172.16.0.0/24")]},
            "collides with 172.16.0.0/24 (the engine's network bridge)",
        ),
        (
            {
                "inner": {"default-address-pools": [{"base": "10.0.0.0/8", "size": 24}]},
                "avoided": ["10.215.0.0/24"],
            },
            {},
            "collides with 10.215.0.0/24 (the fleet's); choose another network with worker_container_address_pools",
        ),
        (
            {"inner": {"default-address-pools": [{"base": "10.0.0.0/8"}]}},
            {},
            "worker_container_bip and worker_container_address_pools",
        ),
        ({"runtime": "kata"}, {}, "worker_container_runtime is 'kata'"),
        ({}, {"engine": None}, "no Docker engine answers"),
        ({"networks": ["host"]}, {}, "worker_container_networks has host"),
        (
            {"networks": ["jobs"]},
            {"networks": {"jobs": "host"}},
            "worker_container_networks has jobs",
        ),
        ({"networks": ["container:other"]}, {}, "worker_container_networks has container:other"),
        ({"networks": ["none"]}, {}, "would reach no cache"),
        ({"networks": ["missing"]}, {}, "no such network"),
        ({"networks": []}, {}, "worker_container_networks is empty"),
        ({}, {"engine": {"SecurityOptions": ["name=seccomp"]}}, "set docker_userns_remap"),
        ({}, {"engine": {"SecurityOptions": ["name=userns"]}}, "filters no system calls"),
        ({}, {"masked_sys": True}, "/sys"),
        ({"ids": 65536}, {}, "worker_container_ids is 65536"),
        ({}, {"subordinate": []}, "/etc/subuid gives containers 0 ids"),
        ({}, {"subordinate": FOUND.subordinate[:1]}, "/etc/subgid gives containers 0 ids"),
        (
            {},
            {"subordinate": [FOUND.subordinate[0], ("/etc/subgid", "containers", 500000, 131072)]},
            "let both begin with the same",
        ),
        (
            {},
            {"subordinate": [("/etc/subuid", "containers", 200000, 65536), *FOUND.subordinate]},
            "/etc/subuid gives containers 65536 ids at first",
        ),
        (
            {},
            {"subordinate": [*FOUND.subordinate, ("/etc/subuid", "lxd", 400000, 65536)]},
            "/etc/subuid gives ids from 400000 to both",
        ),
    ],
)
def test_refusals(wanted: dict[str, Any], found: dict[str, Any], named: str) -> None:
    problems = worker.problems(
        dataclasses.replace(WANTED, **wanted), dataclasses.replace(FOUND, **found)
    )
    assert any(named in problem for problem in problems), problems
    assert all(problem.endswith(".") and ";" in problem for problem in problems)


def test_the_containers_root_is_the_first_of_its_ids() -> None:
    assert worker.owner(FOUND) == 300000


def test_the_negative_control_needs_no_mapping() -> None:
    found = dataclasses.replace(
        FOUND, engine={"SecurityOptions": ["name=seccomp"]}, subordinate=[], masked_sys=True
    )
    wanted = dataclasses.replace(WANTED, runtime="runc")
    assert worker.problems(wanted, found) == worker.problems(wanted, FOUND) == []


DEFAULT = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [
        {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}],
        },
    ],
}


def test_the_filter_differs_from_the_engines_only_where_it_is_stated() -> None:
    less, more = worker.differences(DEFAULT, worker.tailored(DEFAULT))
    assert less == []
    assert more == [
        "add_key: SCMP_ACT_ERRNO 38",
        "keyctl: SCMP_ACT_ERRNO 38",
        "pivot_root: SCMP_ACT_ALLOW",
        "request_key: SCMP_ACT_ERRNO 38",
    ]


def test_the_default_itself_is_left_alone() -> None:
    before = str(DEFAULT)
    worker.tailored(DEFAULT)["syscalls"][0]["names"].append("reboot")
    assert str(DEFAULT) == before


@pytest.mark.parametrize(
    "change",
    [
        {"defaultAction": "SCMP_ACT_ALLOW"},
        {"syscalls": [{"names": ["keyctl"], "action": "SCMP_ACT_ALLOW"}]},
    ],
)
def test_a_default_that_the_additions_would_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(worker.WorkerError):
        worker.tailored({**DEFAULT, **change})


def test_a_changed_rule_is_seen() -> None:
    changed = worker.tailored(DEFAULT)
    changed["syscalls"][1]["args"][0]["value"] = 9
    less, more = worker.differences(worker.tailored(DEFAULT), changed)
    assert (len(less), len(more)) == (1, 1)
