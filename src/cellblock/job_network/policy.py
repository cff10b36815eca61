"""What a policy is: its name, and the rules of what a job under it may open connections to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, ip_network

from .plan import Network

PROTOCOLS = ("tcp", "udp")
HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
    r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*",
    re.ASCII,
)


class NetworkPolicy(str, Enum):
    """Whom a stage may reach. Hosts without job networks enforce ``none`` only."""

    NONE = "none"
    CACHE = "cache"
    INTERNET = "internet"
    ALLOW = "allow"


DECLARED_POLICIES = (NetworkPolicy.NONE, NetworkPolicy.CACHE, NetworkPolicy.INTERNET)
"""Those that the inventory says the meaning of (``cellblock_job_flows``); ``allow`` is the job's own."""
HOST_POLICIES = (NetworkPolicy.CACHE, NetworkPolicy.INTERNET)
"""Of these, those that open anything: what the configuration of a slave has rules for."""


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
    def network(self) -> Network:
        """Of an address or network."""
        return ip_network(self.to)


@dataclass(frozen=True)
class EgressRule:
    """Ports of networks that connections may be opened to."""

    to: tuple[Network, ...] | None
    """None: everywhere."""
    protocol: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class EgressRules:
    """What a policy opens: ``services`` of the fleet whatever is denied, and of the ``internet`` what
    is not denied."""

    services: tuple[EgressRule, ...]
    internet: tuple[EgressRule, ...]


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
