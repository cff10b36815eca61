"""This host's configuration, written by the ``worker_slave`` and ``environments`` roles."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HostSetupError, UnknownEnvironmentError, UnknownMountError
from ..job_network.network import NetworkConfig, load_config
from .job import JobMount, parse_mounts
from .limits import DEFAULT_MAXIMA, parse_maxima

DEFAULT_CONFIG_PATH = Path("/etc/cellblock/engine.json")


@dataclass(frozen=True)
class Environment:
    """A read-only root file system that jobs run in."""

    name: str
    path: Path
    default_path: str
    description: str
    mounts: tuple[JobMount, ...] = ()
    """Mounts that every job in it gets."""


@dataclass(frozen=True)
class OfferedMount:
    """A directory of the host that jobs may ask for by name."""

    source: Path
    writable: bool


@dataclass(frozen=True)
class BoundMount:
    """A mount as a jail gets it."""

    source: Path
    target: str
    writable: bool


@dataclass(frozen=True)
class Host:
    """Where things are on this host, and how much of it jobs may have.

    Slot ``n`` owns two host ids: ``first_id + 2n`` for jobinit and ``first_id + 2n + 1`` for the job.
    ``slots`` is how many jobs run at once; null in the file means one per CPU.
    """

    nsjail: Path
    jobinit: Path
    environments_file: Path
    run_dir: Path
    first_id: int
    slots: int
    name: str = field(default_factory=platform.node)
    maxima: Mapping[str, int | float] = field(default_factory=lambda: dict(DEFAULT_MAXIMA))
    mounts: Mapping[str, OfferedMount] = field(default_factory=dict)
    network: NetworkConfig | None = None
    """None: this host has no job networks."""

    @classmethod
    def load(cls, path: Path = DEFAULT_CONFIG_PATH) -> Host:
        """The configuration in the JSON file ``path``; raises :class:`HostSetupError`."""
        data = _load_json(path, "worker_slave")
        try:
            host = cls(
                nsjail=Path(data["nsjail"]),
                jobinit=Path(data["jobinit"]),
                environments_file=Path(data["environments_file"]),
                run_dir=Path(data["run_dir"]),
                first_id=int(data["first_id"]),
                slots=int(data["slots"] or len(os.sched_getaffinity(0))),
                maxima=parse_maxima(data["maxima"], f"{path}: maxima"),
                mounts={
                    name: OfferedMount(Path(entry["source"]), bool(entry.get("writable", False)))
                    for name, entry in data["mounts"].items()
                },
                network=load_config(data, path),
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise HostSetupError(
                str(path),
                f"is not a valid configuration ({problem!r})",
                "run the worker_slave role",
            ) from None
        for program in (host.nsjail, host.jobinit):
            if not program.is_file():
                raise HostSetupError(str(program), "is missing", "run playbooks/site.yml")
        return host

    def environments(self) -> dict[str, Environment]:
        """The environments of this host by name; raises :class:`HostSetupError`."""
        data = _load_json(self.environments_file, "environments")
        return {
            name: Environment(
                name=name,
                path=Path(entry["path"]),
                default_path=str(entry["default_path"]),
                description=str(entry.get("description", "")),
                mounts=parse_mounts(
                    entry.get("mounts", []), f"{self.environments_file}: {name}.mounts"
                ),
            )
            for name, entry in data.items()
        }

    def environment(self, name: str) -> Environment:
        """One environment; raises :class:`UnknownEnvironmentError` that lists the known ones."""
        known = self.environments()
        if name not in known:
            raise UnknownEnvironmentError(
                "environment",
                f"is {name!r}, which {self.name} does not have",
                f"use one of {', '.join(sorted(known)) or '(none installed)'}, or declare it in "
                "environments_definitions",
            )
        if not known[name].path.is_dir():
            raise HostSetupError(
                str(known[name].path), "is missing", "run the environments role again"
            )
        return known[name]

    def bind(self, mounts: Iterable[JobMount]) -> tuple[BoundMount, ...]:
        """What jails get for the ``mounts`` of a job; raises :class:`UnknownMountError`."""
        bound: dict[str, BoundMount] = {}
        for mount in mounts:
            offered = self.mounts.get(mount.name)
            if offered is None:
                raise UnknownMountError(
                    "mounts",
                    f"has {mount.name!r}, which {self.name} does not offer",
                    f"use one of {', '.join(sorted(self.mounts)) or '(none offered)'}, or declare it "
                    "in worker_slave_mounts",
                )
            if mount.writable and not offered.writable:
                raise UnknownMountError(
                    "mounts",
                    f"asks for {mount.name!r} writable, which {self.name} offers read-only",
                    "leave out writable, or set it in worker_slave_mounts",
                )
            if not offered.source.is_dir():
                raise HostSetupError(
                    str(offered.source), "is missing", f"create it, or drop the mount {mount.name}"
                )
            bound[mount.name] = BoundMount(offered.source, f"/mnt/{mount.name}", mount.writable)
        return tuple(bound.values())


def _load_json(path: Path, role: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as problem:
        raise HostSetupError(
            str(path), f"cannot be read: {problem.strerror}", f"run the {role} role on this host"
        ) from None
    except ValueError:
        raise HostSetupError(str(path), "is not JSON", f"run the {role} role again") from None
    if not isinstance(data, dict):
        raise HostSetupError(str(path), "is not a JSON object", f"run the {role} role again")
    return data
