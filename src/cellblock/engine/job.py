"""What a job is. :mod:`cellblock.engine.job_parser` makes one from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..job_network.policy import Destination, NetworkPolicy
from .content import Content
from .limits import StageConstraints


class Target(str, Enum):
    """Where on its slave a job runs."""

    HOST = "host"
    WORKER_CONTAINER = "worker_container"


@dataclass(frozen=True)
class JobFile:
    """A file that the job finds below its work directory; ``name`` is a relative path."""

    name: str
    content: Content
    executable: bool = False


@dataclass(frozen=True)
class JobMount:
    """One of the mounts that the host offers; the job sees it as ``/mnt/NAME``."""

    name: str
    writable: bool = False


@dataclass(frozen=True)
class Stage:
    """One command. ``run_always``: also when an earlier stage did not end well."""

    name: str
    command: tuple[str, ...]
    stdin: Content = b""
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    working_directory: str = "."
    constraints: StageConstraints = field(default_factory=StageConstraints)
    chosen: frozenset[str] = frozenset()
    """The limits that the job names; the others are defaults, which follow a host's maxima."""
    run_always: bool = False
    network: NetworkPolicy = NetworkPolicy.NONE
    network_allow: tuple[Destination, ...] = ()
    """For the policy ``allow``, and for no other."""


@dataclass(frozen=True)
class Job:
    """A unit of work: files and stages, run in order in one environment."""

    environment: str
    stages: tuple[Stage, ...]
    name: str = "job"
    labels: Mapping[str, str] = field(default_factory=dict)
    files: tuple[JobFile, ...] = ()
    mounts: tuple[JobMount, ...] = ()
    collect: tuple[str, ...] = ()
    """Files and directories below the work directory that come back with the record."""
    target: Target = Target.HOST
