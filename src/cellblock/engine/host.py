"""This host's configuration, written by the ``worker_slave`` and ``environments`` roles."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HostSetupError, UnknownEnvironmentError, UnknownMountError
from ..job_network.section import NetworkConfig, load_config
from ..validate import Value
from .job import JobMount
from .job_parser import parse_mounts
from .limits import DEFAULT_MAXIMA, parse_maxima

DEFAULT_CONFIG_PATH = Path("/etc/cellblock/engine.json")
_MAX_ID = 2**32 - 2
_WORKER_CONTAINER_FILE = "/etc/cellblock/worker_container/container.json"
_MAX_PARALLEL_JOBS = 65_536


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
class JobUids:
    """What a running job owns of the host's ids, each as uid and gid: one for jobinit, one for the job."""

    init: int
    job: int


@dataclass(frozen=True)
class Host:
    """Where things are on this host, and how much of it jobs may have.

    ``parallel_jobs`` is how many run at once (null in the file means one per CPU);
    each of them has two of the ids from ``first_id`` on.
    """

    nsjail: Path
    jobinit: Path
    environments_file: Path
    run_dir: Path
    spool_dir: Path
    """Where the service keeps what is too large for its memory."""
    first_id: int
    parallel_jobs: int
    name: str = field(default_factory=platform.node)
    maxima: Mapping[str, int | float] = field(default_factory=lambda: dict(DEFAULT_MAXIMA))
    mounts: Mapping[str, OfferedMount] = field(default_factory=dict)
    network: NetworkConfig | None = None
    """None: this host has no job networks."""
    worker_container_file: Path = Path(_WORKER_CONTAINER_FILE)
    """What the host's worker container is made of, where it has one."""

    @property
    def service_memory_bytes(self) -> int:
        """What the service may use, with the processes that take requests apart, supervise jobs and write their
        inputs and records; jobs apart. The largest request takes half of the fixed part, the largest record of
        a job the other."""
        return 2**30 + self.parallel_jobs * 512 * 2**20

    @classmethod
    def load(cls, path: Path = DEFAULT_CONFIG_PATH) -> Host:
        """The configuration in the JSON file ``path``; raises :class:`HostSetupError`."""
        value = _load_json(path, "worker_slave")
        fields = value.fields(
            required=(
                *("nsjail", "jobinit", "environments_file", "run_dir", "spool_dir"),
                *("first_id", "parallel_jobs", "maxima", "mounts"),
            ),
            optional={"worker_container_file": _WORKER_CONTAINER_FILE},
            others=True,
        )
        parallel = fields["parallel_jobs"]
        host = cls(
            nsjail=Path(fields["nsjail"].text()),
            jobinit=Path(fields["jobinit"].text()),
            environments_file=Path(fields["environments_file"].text()),
            run_dir=Path(fields["run_dir"].text()),
            spool_dir=Path(fields["spool_dir"].text()),
            first_id=_number(fields["first_id"], _MAX_ID),
            parallel_jobs=len(os.sched_getaffinity(0))
            if parallel.raw is None
            else _number(parallel, _MAX_PARALLEL_JOBS),
            maxima=parse_maxima(fields["maxima"]),
            mounts={name: _mount(entry) for name, entry in fields["mounts"].entries().items()},
            network=load_config(value.raw, path),
            worker_container_file=Path(fields["worker_container_file"].text()),
        )
        for program in (host.nsjail, host.jobinit):
            if not program.is_file():
                raise HostSetupError(str(program), "is missing", "run playbooks/site.yml")
        return host

    def note_taken_over(self, since: float) -> None:
        """Leaves the time (``time.time``) from which on a change of the configuration has not been taken over, as
        that of the file ``configured`` in ``run_dir``: who provisions this host may have ended before the restart.
        """
        mark = self.run_dir / "configured"
        mark.touch(mode=0o644)
        os.utime(mark, (since, since))

    def uids(self, number: int) -> JobUids:
        """Of the job that runs as number ``number`` of ``parallel_jobs``."""
        return JobUids(self.first_id + 2 * number, self.first_id + 2 * number + 1)

    def environments(self) -> dict[str, Environment]:
        """The environments of this host by name; raises :class:`HostSetupError`."""
        environments = _load_json(self.environments_file, "environments")
        return {name: _environment(name, entry) for name, entry in environments.entries().items()}

    def environment(self, name: str) -> Environment:
        """One environment; raises :class:`UnknownEnvironmentError` that lists the known ones."""
        known = self.environments()
        if name not in known:
            raise UnknownEnvironmentError(
                "environment",
                f"is {name!r}, which {self.name} does not have",
                f"use one of {', '.join(sorted(known)) or '(none installed)'}, or declare it in "
                "environments_extra",
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


def _number(value: Value, most: int) -> int:
    """From 1 to ``most``; as text too, which is how Ansible hands on what came from a command line."""
    raw = value.raw
    return value.instead(int(raw) if isinstance(raw, str) and raw.isdecimal() else raw).integer(
        1, most
    )


def _mount(value: Value) -> OfferedMount:
    fields = value.fields(required=("source",), optional={"writable": False}, others=True)
    return OfferedMount(Path(fields["source"].text()), fields["writable"].boolean())


def _environment(name: str, value: Value) -> Environment:
    fields = value.fields(
        required=("path", "default_path"), optional={"description": "", "mounts": []}, others=True
    )
    return Environment(
        name=name,
        path=Path(fields["path"].text()),
        default_path=fields["default_path"].text(),
        description=fields["description"].text(),
        mounts=parse_mounts(fields["mounts"]),
    )


def _load_json(path: Path, role: str) -> Value:
    """What is in the file, with errors that name the role that writes it."""

    def error(subject: str, message: str, remedy: str) -> HostSetupError:
        return HostSetupError(subject, message, f"{remedy}, or run the {role} role")

    try:
        data = json.loads(path.read_text())
    except OSError as problem:
        raise HostSetupError(
            str(path), f"cannot be read: {problem.strerror}", f"run the {role} role on this host"
        ) from None
    except ValueError:
        raise HostSetupError(str(path), "is not JSON", f"run the {role} role again") from None
    return Value(data, str(path), error, prefix=f"{path}: ")
