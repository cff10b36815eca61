"""A fleet's network segment on this machine, in network namespaces that no route leads out of.

For measurements and tests of the job network as root: a bridge, hosts on it that answer, and the
slave on which slots are made. Everything ends with the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Network
from typing import Any

from cellblock.errors import HostSetupError
from cellblock.job_network.plan import MAC_PREFIX
from cellblock.linux.netlink import inside, new_namespace
from cellblock.linux.nft import Nft

PARENT = "cellblock0"
SLAVE, CACHE, DATABASE, GATEWAY = "10.213.0.21", "10.213.0.14", "10.213.0.12", "10.213.0.30"
INTERNET, OTHER_INTERNET, METADATA = "198.51.100.10", "203.0.113.10", "169.254.169.254"
"""Addresses of the gateway."""
PREFIX_IPV6, INTERNET_IPV6 = "fd00:cb::/64", "2001:db8:113::10"


def ipv6(address: str) -> str:
    """The IPv6 address of the host with this IPv4 address."""
    return str(IPv6Network(PREFIX_IPV6)[int(IPv4Address(address))])


def obstacle() -> str:
    """Why there can be none here; empty where there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    try:
        os.close(new_namespace())
        Nft().close()
    except (OSError, HostSetupError) as problem:
        return f"no network namespaces here: {problem}"
    return ""


class Segment:
    """The segment. ``slave``, ``cache``, ``database`` and ``gateway`` are descriptors of the
    namespaces of its hosts."""

    def __init__(self) -> None:
        self._wire = new_namespace()
        self.ip(self._wire, "link add wire type bridge mcast_snooping 0")
        self.ip(self._wire, "link set wire up")
        self.slave = self._host("slave", SLAVE, PARENT)
        self.cache = self._host("cache", CACHE)
        self.database = self._host("database", DATABASE)
        self.gateway = self._host("gateway", GATEWAY)
        for address in (INTERNET, OTHER_INTERNET, METADATA):
            self.ip(self.gateway, f"address add {address}/32 dev lo")
        self.ip(self.gateway, f"address add {INTERNET_IPV6}/128 dev lo")

    def _host(self, name: str, address: str, interface: str = "eth0") -> int:
        namespace = new_namespace()
        path = f"/proc/{os.getpid()}/fd/{namespace}"
        self.ip(self._wire, f"link add {name} type veth peer name {interface} netns {path}")
        self.ip(self._wire, f"link set {name} master wire up")
        self.ip(namespace, "link set lo up")
        self.ip(namespace, f"link set {interface} up")
        self.ip(namespace, f"address add {address}/24 dev {interface}")
        self.ip(namespace, f"address add {ipv6(address)}/64 dev {interface} nodad")
        if address != GATEWAY:
            self.ip(namespace, f"route add default via {GATEWAY}")
            self.ip(namespace, f"route add default via {ipv6(GATEWAY)}")
        return namespace

    def ip(self, namespace: int, arguments: str) -> str:
        """Runs iproute2's ``ip`` there and returns what it prints."""
        with inside(namespace):
            return subprocess.run(
                ["ip", *arguments.split()], check=True, capture_output=True, text=True
            ).stdout

    def config(self, **changes: Any) -> dict[str, Any]:
        """A section ``network`` of engine.json for the slave; ``ipv6=True`` for slots with IPv6."""
        with_ipv6 = changes.pop("ipv6", False)
        caches = [f"{CACHE}/32", *([f"{ipv6(CACHE)}/128"] if with_ipv6 else [])]
        cache = {"to": caches, "protocol": "tcp", "ports": [3142]}
        dns = {"to": [f"{CACHE}/32"], "protocol": "udp", "ports": [53]}
        return {
            "mode": "macvlan",
            "parent": PARENT,
            "slots": 4,
            "addresses": "10.213.0.128/27",
            "prefix_length": 24,
            "gateway": GATEWAY,
            "mac_prefix": MAC_PREFIX,
            "resolvers": [CACHE],
            "denied": ["192.0.2.0/24"],
            "policies": {
                "cache": {"services": [cache]},
                "internet": {
                    "services": [cache, dns],
                    "internet": [{"protocol": "tcp", "ports": [80, 443]}],
                },
            },
            **(self._ipv6_of(str(changes.get("mode", "macvlan"))) if with_ipv6 else {}),
            **changes,
        }

    def _ipv6_of(self, mode: str) -> dict[str, Any]:
        if mode == "routed":
            return {"ipv6": {"prefix": "fd00:77::/64"}}
        return {
            "ipv6": {"prefix": PREFIX_IPV6, "prefix_length": 64, "gateway": ipv6(GATEWAY)},
        }


@contextlib.contextmanager
def serving(
    namespace: int, port: int, handle: Callable[[socket.socket], None], address: str = ""
) -> Iterator[None]:
    """A TCP server in ``namespace``; every connection is handled in a thread of its own."""
    with inside(namespace):
        if address:
            listener = socket.create_server((address, port), backlog=1024)
        else:  # over both versions of IP
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            handle(connection)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def hello(connection: socket.socket) -> None:
    """Says hello and waits until the client has gone."""
    connection.sendall(b"hello")
    while connection.recv(1 << 16):
        pass
