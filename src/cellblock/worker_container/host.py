"""Runs the worker container on its slave: makes it, gives it its groups, and waits until it ends.

    python3 -m cellblock.worker_container.host /etc/cellblock/worker_container/container.json

What it is made of is in the file, as the role wrote it: ``{"name", "create": [arguments of docker create], "networks":
[more of them], "engine": [command], "directory", "owner", "start_timeout_s"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HostSetupError
from ..linux import sd_notify
from ..linux.netlink import Netlink, inside
from . import cgroups

_REMEDY = "see 'journalctl -u cellblock-worker'"


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        # The engine's reason comes first; the last line may say no more than that it failed.
        words = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise HostSetupError("worker container", f"docker {arguments[0]}: {words}", _REMEDY)
    return done.stdout.strip()


def _listen(path: Path, backlog: int) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def _peer(connection: socket.socket) -> int:
    """The pid of who has connected."""
    size = 3 * 4
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int.from_bytes(credentials[:4], sys.byteorder)


def run(config: Mapping[str, Any]) -> int:
    """Until the container ends; returns what the service is to end with."""
    name, directory = str(config["name"]), Path(config["directory"])
    deadline = time.monotonic() + float(config["start_timeout_s"])
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    # Container root connects to the first; the second is made known to it as a descriptor, and its
    # name, which only the host's root may use, is not below what the container sees.
    boot_path = directory / "boot" / "socket"
    boot_path.parent.mkdir(mode=0o711, exist_ok=True)
    with contextlib.suppress(HostSetupError):
        _docker("rm", "--force", "--volumes", name)
    with (
        contextlib.closing(_listen(boot_path, 1)) as boot,
        contextlib.closing(_listen(directory / "socket", 4096)) as runners,
    ):
        os.chown(boot_path, int(config["owner"]), -1)
        os.chmod(boot_path, 0o600)
        container = _docker("create", *config["create"])
        # Before the start, so that all interfaces are there when the first process begins.
        for network in config["networks"]:
            _docker("network", "connect", network, container)
        _docker("start", container)
        pid = int(_docker("inspect", "--format", "{{.State.Pid}}", container))
        pidfd = os.pidfd_open(pid)
        connection = _accept(boot, pidfd, deadline, container)
        # Unread it would reset the connection when it is closed, and the answer be lost.
        connection.recv(4096)
        if _peer(connection) != pid:
            raise HostSetupError(
                "worker container", "another process than its first connected", _REMEDY
            )
        groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii")
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        cgroups.delegate(groups, mountinfo, int(config["owner"]))
        _name_interfaces(pid, container)
        message = json.dumps({"engine": config["engine"]}).encode()
        socket.send_fds(connection, [message], [runners.fileno()])
        connection.close()
        # For who runs jobs in it, whom its root cannot tell another.
        pid_file = directory / "pid"
        pid_file.write_text(f"{pid}\n")
        sd_notify.notify("READY=1")
        _remove_other_images(container)
        try:
            return _wait(pidfd, container)
        finally:
            pid_file.unlink(missing_ok=True)


def _name_interfaces(pid: int, container: str) -> None:
    """Each interface gets a second name, net- and its network's: which is eth0 is decided anew at each start, and engines
    before 28 take no names. It is found by its address.
    """
    networks = json.loads(
        _docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", container)
    )
    names = {
        bytes.fromhex(one["MacAddress"].replace(":", "")): f"net-{name}"
        for name, one in networks.items()
        if one["MacAddress"]
    }
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with inside(namespace), contextlib.closing(Netlink()) as netlink:
            for link in netlink.links():
                if link.mac in names:
                    netlink.add_name(link.index, names.pop(link.mac))
    finally:
        os.close(namespace)
    if names:
        raise HostSetupError(
            "worker container", f"has no interface for {', '.join(sorted(names.values()))}", _REMEDY
        )


def _remove_other_images(container: str) -> None:
    """Those that it was made of before, some hundred megabytes each."""
    with contextlib.suppress(HostSetupError):
        own = _docker("inspect", "--format", "{{.Config.Image}}", container)
        name = own.partition(":")[0]
        listed = _docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", name)
        for image in set(listed.split()) - {own}:
            with contextlib.suppress(HostSetupError):  # another container's
                _docker("image", "rm", image)


def _accept(boot: socket.socket, pidfd: int, deadline: float, container: str) -> socket.socket:
    poller = select.poll()
    poller.register(boot, select.POLLIN)
    poller.register(pidfd, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)}
    if boot.fileno() not in ready:
        what = "ended at once" if ready else "did not start in time"
        # The container, and what it said, are removed.
        said = subprocess.run(
            ["docker", "logs", "--tail=1", container],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        words = (said.stdout + said.stderr).strip()[-200:]
        what += f" ({words})" if words else ""
        raise HostSetupError("worker container", what, _REMEDY)
    return boot.accept()[0]


def _wait(pidfd: int, container: str) -> int:
    """An engine that restarts keeps the container, so the process is watched and not the engine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        select.select([pidfd], [], [])
    finally:
        with contextlib.suppress(HostSetupError):
            _docker("rm", "--force", "--volumes", container)
    return 1


def main() -> int:
    try:
        return run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except HostSetupError as problem:
        print(problem, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
