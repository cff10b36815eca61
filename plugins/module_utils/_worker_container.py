# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""The worker container of a slave: why it cannot be run, and its system call filter.

Plain data: what touches the host is the module's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.cellblock.fleet.plugins.module_utils._docker_engine import (
    EngineError,
    collisions,
)

# Runtimes, and whether each is a boundary between the container's root and the host.
RUNTIMES = {"userns": True, "runc": False, "sysbox-runc": True}
SYSBOX = "sysbox-runc"
# Files of the host that it is made with, and what brings them.
NEEDED = {
    "/usr/bin/docker": "the role docker (Debian 13 has it in a package of its own, docker-cli)",
    "/opt/cellblock/engine/cellblock/worker_container/init.py": "the role worker_slave",
    "/opt/cellblock/bin/nsjail": "the role nsjail",
}
# Beside the engine's default ones: to mount, and to make networks, within its own user namespace.
CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN")
SUBORDINATE_FILES = ("/etc/subuid", "/etc/subgid")
_ENOSYS = 38
Profile = dict[str, Any]


class WorkerError(Exception):
    """What is wrong, in one sentence, and what to do."""


# --- The system call filter -----------------------------------------------------------------------

# What the engine's default profile has not and a worker needs. Whatever else differs is a mistake.
#
# pivot_root: nsjail, and the inner engine's runtime, give a process another root with it. It changes the
# caller's own mount namespace.
# keyctl and its kin: as on a kernel without keyrings. The inner runtime wants a session keyring of its own and
# ends where that is refused (EPERM), but not where there is none. Keys are counted for the host's user.
ADDITIONS: tuple[Mapping[str, Any], ...] = (
    {"names": ["pivot_root"], "action": "SCMP_ACT_ALLOW"},
    {
        "names": ["keyctl", "add_key", "request_key"],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": _ENOSYS,
    },
)


def tailored(default: Profile) -> Profile:
    """The worker's profile: the engine's default for its capabilities, and :data:`ADDITIONS`.

    ``default`` is what the engine made of its profile for a container with the same capabilities, out of that
    container's ``config.json``: so it is that of this engine, kernel and architecture. An addition that the default
    has already would be ambiguous: :class:`WorkerError`.
    """
    if default.get("defaultAction") != "SCMP_ACT_ERRNO":
        raise WorkerError(
            "the engine's default system call filter does not refuse what it does not name"
            f" ({default.get('defaultAction')}); take seccomp-profile out of its configuration."
        )
    named = {name for rule in default.get("syscalls", []) for name in rule["names"]}
    for addition in ADDITIONS:
        known = named.intersection(addition["names"])
        if known:
            raise WorkerError(
                f"the engine's default system call filter decides about {', '.join(sorted(known))} already;"
                " this version of the engine is not supported."
            )
    profile = copy.deepcopy(default)
    profile["syscalls"] = [*profile["syscalls"], *copy.deepcopy(list(ADDITIONS))]
    return profile


def differences(default: Profile, profile: Profile) -> tuple[list[str], list[str]]:
    """Rules that only one of two profiles has, in words: (of ``default``, of ``profile``)."""
    one, other = _words(default), _words(profile)
    return sorted(one - other), sorted(other - one)


def _words(profile: Profile) -> set[str]:
    found = {f"otherwise: {profile.get('defaultAction')} {profile.get('defaultErrnoRet', 1)}"}
    found |= {f"architecture {name}" for name in profile.get("architectures") or ()}
    for rule in profile.get("syscalls") or ():
        arguments = " and ".join(
            f"argument {one['index']} {one['op']} {one['value']} {one.get('valueTwo', 0)}"
            for one in rule.get("args") or ()
        )
        what = f"{rule['action']} {rule.get('errnoRet') or ''}".strip()
        found |= {f"{name}: {what} {arguments}".strip() for name in rule["names"]}
    return found


# --- Whether it can be run ------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The role's variables, as far as they can be refused."""

    runtime: str
    networks: Sequence[str]
    ids: int
    """How many ids it has: its own 65536, and two for each job."""
    first_job_id: int
    parallel_jobs: int
    inner: Mapping[str, Any] = field(default_factory=dict)
    """Networks of the engine within, as in a ``daemon.json``."""
    avoided: Sequence[str] = ()
    """Networks of the fleet."""
    min_free_bytes: int = 0


@dataclass(frozen=True)
class Found:
    """What the engine and the host say. ``engine`` is what /info of its API returned, None without an answer."""

    engine: Mapping[str, Any] | None
    networks: Mapping[str, str] = field(default_factory=dict)
    """{name: driver} of the engine's networks."""
    subordinate: Sequence[tuple[str, str, int, int]] = ()
    """(file, user, first id, count): lines of /etc/subuid and /etc/subgid."""
    remap: str = ""
    """The user whose ids the engine maps to."""
    masked_sys: bool = False
    """Whether something covers a part of the host's own /sys."""
    foreign: str | None = None
    """Why what is there is not Docker's own engine."""
    missing: Sequence[str] = ()
    """Files that the worker container needs, and the host has not."""
    used: Sequence[tuple[str, str]] = ()
    """(what it is, network) of what containers must be able to reach."""
    free: Mapping[str, int] = field(default_factory=dict)
    """{directory that gets something: bytes that are free in its file system}."""


def problems(wanted: Wanted, found: Found) -> list[str]:
    """Every reason why the worker container cannot be run, with its remedy."""
    if wanted.runtime not in RUNTIMES:
        return [
            f"worker_container_runtime is '{wanted.runtime}'; write {' or '.join(sorted(RUNTIMES))}."
        ]
    if found.foreign:
        return [found.foreign]
    if found.engine is None:
        return [
            "no Docker engine answers at /run/docker.sock; provide it with the role docker (docker_enabled)."
        ]
    return [
        *_network_problems(wanted, found),
        *_boundary_problems(wanted, found),
        *_room_problems(wanted, found),
    ]


def _network_problems(wanted: Wanted, found: Found) -> Iterable[str]:
    for name in wanted.networks:
        driver = found.networks.get(name)
        if name == "host" or driver == "host" or name.startswith("container:"):
            yield (
                f"worker_container_networks has {name}: the engine within would remove the rules of the host's engine;"
                " name a network of the worker's own."
            )
        elif name == "none" or driver == "null":
            yield (
                f"worker_container_networks has {name}, on which it would reach no cache; name another network."
            )
        elif driver is None:
            yield (
                f"worker_container_networks has {name}, and the engine has no such network; make it first, or take"
                " the name out."
            )
    if not wanted.networks:
        yield "worker_container_networks is empty; name a network of the engine, such as bridge."


def _room_problems(wanted: Wanted, found: Found) -> Iterable[str]:
    """What of the host it needs, and what is taken already."""
    for file in found.missing:
        yield f"{file} is missing, and the worker container uses it; provide it with {NEEDED[file]} first."
    used = [*found.used, *(("the fleet's", network) for network in wanted.avoided)]
    try:
        yield from collisions(
            wanted.inner, used, ("worker_container_bip", "worker_container_address_pools")
        )
    except EngineError as problem:
        yield f"worker_container_bip and worker_container_address_pools: {problem}"
    for directory, free in found.free.items():
        if free < wanted.min_free_bytes:
            yield (
                f"{directory} has {free // 2**20} MiB free, and worker_container_min_free_bytes wants"
                f" {wanted.min_free_bytes // 2**20} MiB for the worker's image; free some, or lower it."
            )


def _boundary_problems(wanted: Wanted, found: Found) -> Iterable[str]:
    registered = (found.engine or {}).get("Runtimes") or {}
    if wanted.runtime == SYSBOX and SYSBOX not in registered:
        yield (
            f"worker_container_runtime is {SYSBOX}, which the engine has not among its runtimes"
            f" ({', '.join(sorted(registered)) or 'none'}); provide it with the role sysbox, or write userns."
        )
    options = (found.engine or {}).get("SecurityOptions") or []
    remapped = "name=userns" in options
    if not any(str(option).startswith("name=seccomp") for option in options):
        yield (
            "the engine filters no system calls (no seccomp among its security options); boot a kernel that has"
            " it, or take another build of the engine."
        )
    if not RUNTIMES[wanted.runtime]:
        return  # An engine that maps ids is told not to, for this container.
    if not remapped:
        yield (
            "the engine does not map root in containers to another user, and without that the worker container is no"
            " boundary; set docker_userns_remap."
        )
    if found.masked_sys:
        yield (
            "something covers a part of the host's /sys, so that the kernel refuses a new /sys to a container with a"
            " user namespace; unmount what is below /sys (see /proc/self/mounts)."
        )
    needed = wanted.first_job_id + 2 * wanted.parallel_jobs
    if wanted.ids < needed:
        yield (
            f"worker_container_ids is {wanted.ids}, and jobs have ids from {wanted.first_job_id} to {needed - 1}; set it"
            f" to at least {needed}, or lower worker_slave_parallel_jobs."
        )
    for file in SUBORDINATE_FILES:
        yield from _range_problems(file, wanted, found)
    users, groups = (_own(file, found) for file in SUBORDINATE_FILES)
    if users and groups and users[0][0] != groups[0][0]:
        yield (
            f"/etc/subuid gives {found.remap} ids from {users[0][0]}, and /etc/subgid from {groups[0][0]}; let both begin"
            " with the same, as a job's files have one id for both."
        )


def owner(found: Found) -> int:
    """The host's id of the container's root, once there are no :func:`problems`."""
    own = _own(SUBORDINATE_FILES[0], found)
    return own[0][0] if own else 0


def _own(file: str, found: Found) -> list[tuple[int, int]]:
    """(first, count) of what the engine maps to, in its order."""
    return [
        (first, count)
        for name, user, first, count in found.subordinate
        if name == file and user == found.remap
    ]


def _range_problems(file: str, wanted: Wanted, found: Found) -> Iterable[str]:
    own = _own(file, found)
    # The first, since what a job's id is on the host is counted from its beginning.
    most = own[0][1] if own else 0
    if most < wanted.ids:
        yield (
            f"{file} gives {found.remap or 'nobody'} {most} ids at first, and the worker container needs {wanted.ids}; write"
            f" a line such as {found.remap or 'dockremap'}:300000:{wanted.ids} that overlaps no other."
        )
    for name, user, first, count in found.subordinate:
        for start, length in own if name == file and user != found.remap else ():
            if first < start + length and start < first + count:
                yield (
                    f"{file} gives ids from {max(first, start)} to both {found.remap} and {user}, and processes of either"
                    " could use the other's files; give them ranges of their own."
                )
