"""The fleet's hosts, reached without their network, and an image that nobody has to fetch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra

IMAGE = "tiny"
PROGRAMS = ("sh", "cat", "echo", "httpd", "id", "nc", "sleep", "timeout")
# Tries each target over and over until it is told to end; prints how often it succeeded and failed.
WATCH = """
import json, socket, sys, threading, time
targets, seen, ended = json.loads(sys.argv[1]), {}, threading.Event()
def watch(name, address, port):
    counts = seen.setdefault(name, [0, 0])
    while not ended.is_set():
        try:
            socket.create_connection((address, port), 0.5).close()
            counts[0] += 1
        except OSError:
            counts[1] += 1
        time.sleep(0.02)
threads = [threading.Thread(target=watch, args=(n, *t)) for n, t in targets.items()]
[t.start() for t in threads]
print("watching", flush=True)
sys.stdin.read()
ended.set()
[t.join() for t in threads]
print(json.dumps(seen))
"""


# What takes the engine away, after all that needs it.
LAST = ("test_remove.py", "test_upstream.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)


class Lab:
    """Hosts by name, through the engine of this machine: what is tested is their network."""

    def __init__(self, fleet: str, prefix: str) -> None:
        self.fleet = fleet
        self._prefix = prefix

    def address(self, host: str) -> str:
        return (
            self._prefix + {"cache1": "14", "slave1": "21", "slave2": "22", "outside1": "30"}[host]
        )

    def command(self, host: str, *command: str) -> list[str]:
        return ["docker", "exec", "-i", f"cellblock-{self.fleet}-{host}", *command]

    def run(self, host: str, script: str, **more: Any) -> subprocess.CompletedProcess[str]:
        more = {"capture_output": True, "text": True, "timeout": 120, **more}
        return subprocess.run(self.command(host, "sh", "-c", script), check=False, **more)

    def output(self, host: str, script: str) -> str:
        done = self.run(host, script)
        assert done.returncode == 0, f"{host}: {script}: {done.stdout}{done.stderr}"
        return str(done.stdout).strip()

    def reaches(self, host: str, address: str, port: int) -> bool:
        program = f"import socket; socket.create_connection(({address!r}, {port}), 1.5)"
        return self.run(host, f"python3 -c '{program.replace(chr(39), chr(34))}'").returncode == 0

    def container_reaches(self, host: str, container: str, address: str, port: int) -> bool:
        request = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 3 nc {address} {port}"
        done = self.run(host, f'docker exec {container} sh -c "{request}"')
        return "HTTP/1" in done.stdout

    def watch(self, host: str, *before: str, **targets: tuple[str, int]) -> Watch:
        """``before`` is what the program is started by."""
        command = self.command(host, *before, "python3", "-c", WATCH, json.dumps(targets))
        return Watch(command)

    def listen(self, host: str, port: int, address: str = "::") -> None:
        self.output(
            host,
            f"systemctl is-active --quiet test-{port} || systemd-run --quiet --collect --unit=test-{port}"
            f" python3 -m http.server --bind {address} --directory /var/empty {port}",
        )


class Watch:
    """Attempts that go on until :meth:`end`, which returns {target: (successes, failures)}."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "watching\n"

    def end(self) -> dict[str, tuple[int, int]]:
        output, _ = self._process.communicate("", timeout=20)
        return {name: tuple(counts) for name, counts in json.loads(output).items()}


@pytest.fixture(scope="session")
def lab() -> Lab:
    variables = testinfra.get_host("ansible://slave1").ansible.get_variables()
    fleet = Path(variables["ansible_ssh_private_key_file"]).parent.name
    return Lab(fleet, variables["ansible_host"].rpartition(".")[0] + ".")


@pytest.fixture(scope="session")
def root_file_system() -> bytes:
    """A tar archive with a static busybox of the distribution, from this machine's own packages."""
    where = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "busybox"
    where.mkdir(exist_ok=True)
    if not list(where.glob("*.deb")):
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "busybox-static"]
        subprocess.run(command, cwd=where, check=True)
    (package,) = where.glob("*.deb")
    listed = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(listed.stdout)) as archive:
        opened = archive.extractfile("./bin/busybox")
        assert opened is not None
        program = opened.read()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("bin/busybox")
        member.mode, member.size = 0o755, len(program)
        archive.addfile(member, io.BytesIO(program))
        for name in PROGRAMS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        page = tarfile.TarInfo("www/index.html")
        archive.addfile(page)
    return made.getvalue()


@pytest.fixture(scope="session")
def image(lab: Lab, root_file_system: bytes) -> str:
    for slave in ("slave1", "slave2"):
        command = lab.command(slave, "docker", "import", "-", IMAGE)
        subprocess.run(command, input=root_file_system, capture_output=True, check=True)
    return IMAGE


@pytest.fixture
def workload(lab: Lab, image: str) -> Iterator[str]:
    """A container on slave1 that serves on 80, published as 8080."""
    lab.output("slave1", f"docker run -d --name web -p 8080:80 {image} httpd -f -p 80 -h /www")
    yield "web"
    lab.run("slave1", "docker rm -f web")


@pytest.fixture(scope="session")
def role(playbook: Callable[..., Any]) -> Callable[..., Any]:
    """Runs one role's playbook of this scenario on a host."""

    def run(name: str, host: str, *arguments: str) -> Any:
        begun = time.monotonic()
        done = playbook(f"../molecule/docker/{name}.yml", "--limit", host, *arguments)
        done.seconds = time.monotonic() - begun
        return done

    return run
