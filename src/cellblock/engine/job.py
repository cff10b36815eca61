"""What a job is. :mod:`cellblock.engine.job_parser` makes one from plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network

from .limits import StageConstraints

PROTOCOLS = ("tcp", "udp")

HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
    r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*",
    re.ASCII,
)


@dataclass(frozen=True)
class JobFile:
    """A file that the job finds below its work directory; ``name`` is a relative path."""

    name: str
    content: bytes
    executable: bool = False


class NetworkPolicy(str, Enum):
    """Whom a stage may reach. Hosts without job networks enforce ``none`` only."""

    NONE = "none"
    CACHE = "cache"
    INTERNET = "internet"
    ALLOW = "allow"


@dataclass(frozen=True)
class Destination:
    """Ports of an address, a network or a host name, for the policy ``allow``."""

    to: str
    protocol: str
    ports: tuple[int, ...]

    @property
    def name(self) -> str | None:
        """The host name, None where ``to`` is an address or a network."""
        return None if is_address(self.to) else self.to

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """Of an address or network."""
        return ip_network(self.to)


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
    stdin: bytes = b""
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    working_directory: str = "."
    constraints: StageConstraints = field(default_factory=StageConstraints)
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


def is_address(text: str) -> bool:
    """Whether it is meant as an address or network, right or wrong in its length or bits."""
    address = text.partition("/")[0]
    if ":" in address:
        return True
    try:
        IPv4Address(address)
    except ValueError:
        return False
    return True
