"""What the mapped root of a worker container is given of the container's groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import HostSetupError

# Files by which a group is given away: who may put processes into it, and make groups below it. Files
# with limits are not among them.
DELEGATED_V1 = (".", "cgroup.procs", "tasks")
DELEGATED_V2 = (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control")


def mounted(mountinfo: str) -> dict[str, Path]:
    """The host's hierarchies: by controller (``memory``), by name (``name=systemd``), and by "" that of v2."""
    found: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point, (kind, _, options) = Path(left.split()[4]), right.split(" ", 2)
        if kind == "cgroup2":
            found[""] = point
        elif kind == "cgroup":
            found.update((option, point) for option in options.split(","))
    return found


def delegated(proc_cgroup: str, mounts: Mapping[str, Path]) -> list[Path]:
    """What is given away. ``proc_cgroup`` is ``/proc/PID/cgroup`` of its first process, as the host sees it."""
    found: list[Path] = []
    for line in proc_cgroup.splitlines():
        _, names, path = line.split(":", 2)
        if path in ("", "/") or path.startswith("/.."):
            # It would be given the host's own groups.
            raise HostSetupError(
                "worker container",
                f"is in the cgroup {path or '/'} of {names or 'cgroup v2'}, which is not its own",
                "run it with an engine that makes one for each container",
            )
        mount = mounts.get(names.split(",")[0])
        if mount is None:
            continue  # A hierarchy that the host has not mounted, so nobody uses it.
        files = DELEGATED_V1 if names else DELEGATED_V2
        found += [mount / path.lstrip("/") / name for name in files]
    return found


def delegate(proc_cgroup: str, mountinfo: str, owner: int) -> None:
    """Gives it away to the host's user ``owner``, to which the container's root is mapped."""
    for path in delegated(proc_cgroup, mounted(mountinfo)):
        os.chown(path, owner, -1, follow_symlinks=False)
