"""Network namespaces for the experiments, inside a container that has no network.

Standard library only: this runs on the image of the local fleet's hosts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNET = 0x40000000
PORT = 7000
TIMEOUT_S = 0.4


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread, and what it starts, in a network namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(_libc.setns, namespace, _NEWNET)
        try:
            yield
        finally:
            _call(_libc.setns, before, _NEWNET)
    finally:
        os.close(before)


def _call(function: Any, *arguments: int) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), function.__name__)


def sh(namespace: int, command: str, text: str | None = None) -> str:
    with inside(namespace):
        done = subprocess.run(
            command.split(), input=text, capture_output=True, text=True, check=False, timeout=60
        )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()} {text or ''}")
    return done.stdout


def new() -> int:
    """A descriptor of a new namespace with its loopback up."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _call(_libc.unshare, _NEWNET)
    try:
        made = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        _call(_libc.setns, before, _NEWNET)
        os.close(before)
    sh(made, "ip link set lo up")
    # Addresses are usable at once.
    with inside(made):
        for where in ("all", "default"):
            _write(f"/proc/sys/net/ipv6/conf/{where}/accept_dad", "0")
            _write(f"/proc/sys/net/ipv6/conf/{where}/accept_ra", "0")
        # New namespaces take this from the machine, where Docker turns it on.
        _write("/proc/sys/net/ipv4/ip_forward", "0")
    return made


def sysctl(namespace: int, name: str, value: str) -> None:
    with inside(namespace):
        _write(f"/proc/sys/net/{name}", value)


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def path(namespace: int) -> str:
    """What ip(8) takes for the namespace."""
    return f"/proc/{os.getpid()}/fd/{namespace}"


class Wire:
    """A bridge with hosts on it: 10.77.<number>.N/24, fd77:<number>::N/64 and what fe80::/10 gives."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.namespace = new()
        sh(self.namespace, "ip link add wire type bridge mcast_snooping 0")
        sh(self.namespace, "ip link set wire up")

    def address(self, host: int) -> str:
        return f"10.77.{self.number}.{host}"

    def attach(self, namespace: int, host: int, interface: str = "eth0") -> None:
        port = f"p{host}"
        sh(
            self.namespace,
            f"ip link add {port} type veth peer name {interface} netns {path(namespace)}",
        )
        sh(self.namespace, f"ip link set {port} master wire up")
        self.configure(namespace, host, interface)

    def clone(self, parent_namespace: int, host: int, mode: str, parent: str = "eth0") -> int:
        """A namespace with a macvlan clone of ``parent``."""
        made = new()
        command = f"ip link add link {parent} name job0 netns {path(made)} type macvlan mode {mode}"
        sh(parent_namespace, command)
        self.configure(made, host, "job0")
        return made

    def configure(self, namespace: int, host: int, interface: str) -> None:
        sh(namespace, f"ip link set {interface} up")
        sh(namespace, f"ip address add {self.address(host)}/24 dev {interface}")
        sh(namespace, f"ip address add fd77:{self.number}::{host}/64 dev {interface}")


def link_local(namespace: int, interface: str) -> str:
    """The address that the kernel made by itself; waits for it."""
    for _ in range(50):
        listed = json.loads(sh(namespace, f"ip -j -6 address show dev {interface} scope link"))
        found = [
            entry["local"]
            for link in listed
            for entry in link.get("addr_info", [])
            if "local" in entry and not entry.get("tentative")
        ]
        if found:
            return str(found[0])
        time.sleep(0.05)
    raise RuntimeError(f"{interface} has no link-local address")


def serve(namespace: int, port: int = PORT) -> None:
    """Says hello to whoever connects, over IPv4 and IPv6, until this process ends."""
    with inside(namespace):
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        listener.listen(128)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"hello")

    threading.Thread(target=accept, daemon=True).start()


def reaches(
    namespace: int, address: str, interface: str = "", port: int = PORT, source: str = ""
) -> bool:
    """Whether a connection is answered with the server's hello."""
    with inside(namespace):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = socket.socket(family)
        scope = socket.if_nametoindex(interface) if interface else 0
    with connection:
        connection.settimeout(TIMEOUT_S)
        try:
            if source:
                connection.bind((source, 0))
            to = (address, port, 0, scope) if family == socket.AF_INET6 else (address, port)
            connection.connect(to)
            return connection.recv(5) == b"hello"
        except OSError:
            return False


def machine() -> dict[str, str]:
    """What figures depend on."""
    with open("/proc/cpuinfo") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    nft = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "kernel": platform.release(),
        "processors": f"{os.cpu_count()} x {', '.join(sorted(models)) or platform.machine()}",
        "nft": nft.split()[1],
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
    }


def main(experiment: Callable[[], dict[str, Any]]) -> None:
    """Runs it and prints its results as JSON."""
    started = time.monotonic()
    results = experiment()
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**results, "machine": machine(), "seconds": seconds}, indent=1))
