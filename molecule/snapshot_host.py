#!/usr/bin/env python3
"""Prints what a host consists of, one sorted line for each thing, to be compared with diff.

    ssh host python3 - < molecule/snapshot_host.py > before
    ... provision, remove ...
    ssh host python3 - < molecule/snapshot_host.py > after
    diff before after

Lines: package (with its state and whether it was asked for or is a dependency), file (type, mode,
owner, group, SHA-256 or target), user, group, enabled unit, failed unit, running service,
listening socket, mount, cgroup of ours and of services, kernel parameters about addresses.

Left out, because it changes on a host that nobody touches or is made again from what is compared:
package lists and dpkg's own records (packages are compared by themselves), caches (ld.so.cache,
Python's byte code), the copies that tools keep of their files before the last changes
(/etc/passwd-, /var/lib/ucf/registry.0), what systemd remembers between boots (random seed, timers' stamps), and logs.
Needs root, and nothing but Python.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import re
import stat
import subprocess
from collections.abc import Iterator

TREES = ("/etc", "/usr", "/opt", "/srv", "/var/lib", "/var/spool", "/lib/systemd", "/root")
LEFT_OUT = {
    "/etc/.pwd.lock",
    "/etc/ld.so.cache",
    "/etc/mtab",
    "/root/.ansible",
    "/var/lib/apt/daily_lock",
    "/var/lib/apt/extended_states",
    "/var/lib/apt/lists",
    "/var/lib/apt/periodic",
    "/var/lib/dpkg",
    "/var/lib/logrotate",
    "/var/lib/systemd/catalog",
    "/var/lib/systemd/linger",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/timers",
    *(f"/etc/{name}-" for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")),
}
# ucf keeps the last states of its register.
COPIES = re.compile(r"/var/lib/ucf/(hashfile|registry)\.\d")
# What a service that listens on addresses of its own might be tempted to change.
PARAMETERS = ("net/ipv4/ip_nonlocal_bind", "net/ipv6/ip_nonlocal_bind", "net/ipv4/ip_forward")


def output(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
    return [line for line in done.stdout.splitlines() if line.strip()]


def digest(path: str) -> str:
    with open(path, "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


def name_of(uid: int, gid: int) -> str:
    """By name, as a number may mean another account later; by number where there is no name."""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        group = str(gid)
    return f"{user}:{group}"


def entries(top: str) -> Iterator[str]:
    """The paths below a directory, and itself; other file systems are not entered."""
    if not os.path.lexists(top) or os.path.islink(top):
        return
    device = os.lstat(top).st_dev
    todo = [top]
    while todo:
        path = todo.pop()
        name = os.path.basename(path)
        if (
            path in LEFT_OUT
            or COPIES.fullmatch(path)
            or name == "__pycache__"
            or name.endswith(".pyc")
        ):
            continue
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        yield path
        if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
            todo.extend(entry.path for entry in os.scandir(path))


def files() -> Iterator[str]:
    for path in {path for top in TREES for path in entries(top)}:
        status = os.lstat(path)
        what = ""
        if stat.S_ISREG(status.st_mode):
            what = digest(path)
        elif stat.S_ISLNK(status.st_mode):
            what = f"-> {os.readlink(path)}"
        mode = stat.filemode(status.st_mode)
        yield f"file {path} {mode} {name_of(status.st_uid, status.st_gid)} {what}".rstrip()


def packages() -> Iterator[str]:
    automatic = set(output("apt-mark", "showauto"))
    shown = output("dpkg-query", "--show", "--showformat=${binary:Package} ${db:Status-Abbrev}\n")
    for line in shown:
        name = line.split()[0]
        known = name in automatic or name.split(":")[0] in automatic
        yield f"package {line.strip()} {'automatic' if known else 'manual'}"


def units() -> Iterator[str]:
    # Left out are users' managers (user@): they come and go with whoever looks.
    listed = ("systemctl", "--plain", "--no-legend", "--no-pager")
    for line in output(*listed, "list-unit-files", "--state=enabled,enabled-runtime,masked,linked"):
        yield f"unit file {' '.join(line.split()[:2])}"
    for line in output(*listed, "list-units", "--state=failed"):
        if not line.startswith("user@"):
            yield f"failed unit {line.split()[0]}"
    for line in output(*listed, "list-units", "--type=service", "--state=running"):
        if not line.startswith("user@"):
            yield f"running {line.split()[0]}"


def kernel() -> Iterator[str]:
    for line in output("ss", "-Hlntu"):
        fields = line.split()
        yield f"listening {fields[0]} {fields[4]}"
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            device, place, kind, options = line.split()[:4]
            if not place.startswith(("/run/user/", "/run/credentials/")):
                yield f"mount {place} {device} {kind} {options}"
    for path, folders, _ in os.walk("/sys/fs/cgroup"):
        for folder in folders:
            if "cellblock" in folder or folder.startswith(("postgresql", "redis", "valkey")):
                yield f"cgroup {path}/{folder}"
    for parameter in PARAMETERS:
        with open(f"/proc/sys/{parameter}", encoding="utf-8") as opened:
            yield f"parameter {parameter} {opened.read().strip()}"


def main() -> None:
    lines: list[str] = [*packages(), *files(), *units(), *kernel()]
    lines += [f"user {':'.join(map(str, user))}" for user in pwd.getpwall()]
    lines += [f"group {one.gr_name}:{one.gr_gid}:{sorted(one.gr_mem)}" for one in grp.getgrall()]
    print("\n".join(sorted(set(lines))))


if __name__ == "__main__":
    main()
