# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""Runs the experiment with child containers on a slave, and prints what was seen as JSON.

It runs in a transient unit (:func:`run_in_unit`) with a network namespace that has no way out, mounts of its own and
an engine of its own, a second one of the slave's: the slave's engine, rules, settings and networks are not used,
and whatever ends the unit ends all of it. What is left then is empty cgroups, and the next run removes these.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import pkgutil
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _child_container as plan,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _child_container_peer as peer,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _worker_container as worker,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.worker_container import (
    host as worker_host,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.worker_container import (
    init as worker_init,
)

UNIT = "cellblock-child-container"
LAB = Path("/run") / UNIT
LONGEST_S = 600
# Each attempt; on the slave itself an answer takes less than a millisecond.
TIMEOUT_S, PATIENT_S = 0.8, 5.0
IMAGE = "cellblock-child-container"
# Beyond what systemd and distributions give to users, containers and services.
FIRST_ID, IDS = 2013265920, 131072
# Engines look its ids up in /etc/subuid by user and group; these are on every distribution, under one name.
REMAP_USER = "daemon"
_CHILD_MOUNTS = ("--volume", "/usr:/usr:ro", "--volume", "/lab:/lab")
_ETC = (
    "alternatives",
    "group",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "nsswitch.conf",
    "passwd",
)
# Where engines keep what a running container was made of, when they have a containerd of their own.
_BUNDLES = Path("/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby")


class LabError(Exception):
    """What could not be made, in one sentence."""


def sh(*command: str, text: str | bytes | None = None, timeout: float = 60) -> str:
    data = text.encode() if isinstance(text, str) else text
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"'{' '.join(command)}' took more than {timeout:.0f} s.") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise LabError(f"'{' '.join(command)}' failed: {words}")
    return done.stdout.decode(errors="replace").strip()


def docker(*arguments: str, text: bytes | None = None) -> str:
    return sh("docker", *arguments, text=text)


def until(what: str, seen: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(LabError, OSError):
            if seen():
                return
        if time.monotonic() > deadline:
            raise LabError(f"{what} did not happen within {seconds:.0f} s.")
        time.sleep(0.03)


# --- The slave ------------------------------------------------------------------------------------


def own_group() -> str:
    """The unit's cgroup, below which the containers' are, so that its end is theirs."""
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    paths = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    found = paths.get("name=systemd", paths.get("", "/"))
    if Path(found).name != f"{UNIT}.service":
        raise LabError(f"this runs in the cgroup {found} and not in that of the unit {UNIT}.")
    return found


def settle_group(group: str) -> None:
    """On cgroup v2 a group with groups below it has no processes of its own."""
    if Path("/sys/fs/cgroup/cgroup.procs").exists():
        leaf = Path(f"/sys/fs/cgroup{group}/experiment")
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


def files_of(root: Path) -> bytes:
    """A root file system without /usr, which every container mounts: a tar archive."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in "dev etc lab peer proc root run sys tmp usr var/lib var/run".split():
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib64"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(entry)
        for name in _ETC:
            path = root / "etc" / name
            if path.exists():
                archive.add(path, f"etc/{name}")
    return made.getvalue()


@dataclass
class Lab:
    """The engine, its networks, the servers, and the segment with the other hosts."""

    config: Mapping[str, Any]
    group: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return Path(self.config["root"])

    def prepare(self) -> None:
        mounts: list[tuple[str, ...]] = [
            ("mount", "-t", "tmpfs", "-o", "mode=711,size=2g", UNIT, str(LAB)),
            # The engine takes the containerd of the host where it sees one.
            ("mount", "-t", "tmpfs", "-o", "mode=711", UNIT, "/run/docker"),
            ("mount", "-t", "tmpfs", "-o", "mode=711", UNIT, "/run/containerd"),
        ]
        for path in (LAB, Path("/run/docker"), Path("/run/containerd")):
            path.mkdir(exist_ok=True)
        for mount in mounts:
            sh(*mount)
        for name in ("subuid", "subgid"):
            own = LAB / name
            own.write_text(f"{REMAP_USER}:{FIRST_ID}:{IDS}\n", encoding="ascii")
            sh("mount", "--bind", str(own), f"/etc/{name}")
        (LAB / "peer").mkdir(mode=0o755)
        for name, package in (("peer", peer), ("init", worker_init)):
            source = pkgutil.get_data(
                package.__package__ or "", f"{package.__name__.rpartition('.')[2]}.py"
            )
            (LAB / "peer" / f"{name}.py").write_bytes(source or b"")
        os.environ["DOCKER_HOST"] = f"unix://{LAB}/docker.sock"
        os.environ["DOCKER_CONFIG"] = f"{LAB}/client"
        sh("ip", "link", "set", "lo", "up")

    def start_engine(self) -> None:
        (LAB / "daemon.json").write_text("{}", encoding="ascii")
        runtimes = [
            part for name, path in self.config["engine_runtimes"].items()
            for part in ("--add-runtime", f"{name}={path}")
        ]  # fmt: skip
        with (LAB / "engine.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    ["dockerd", "--config-file", f"{LAB}/daemon.json", "--data-root", f"{LAB}/data",
                     "--exec-root", "/run/docker", "--pidfile", f"{LAB}/engine.pid", "--host", os.environ["DOCKER_HOST"],
                     "--userns-remap", REMAP_USER, "--bip", "10.77.255.1/24", "--exec-opt", "native.cgroupdriver=cgroupfs",
                     "--cgroup-parent", f"{self.group}/containers", *runtimes],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )
            )  # fmt: skip
        try:
            until("the engine's answer", lambda: docker("version"), 30)
        except LabError as error:
            lines = (LAB / "engine.log").read_text(errors="replace").splitlines()
            raise LabError(f"{error} It says: {lines[-1:]}") from None
        docker("import", "-", IMAGE, text=files_of(self.root))

    def make_networks(self) -> None:
        for network in (plan.FRONT, plan.BACK):
            subnet = plan.NETWORKS[network]
            docker("network", "create", "--subnet", f"{subnet}.0/24", "--gateway", f"{subnet}.1",
                   "--opt", f"com.docker.network.bridge.name={network}", network)  # fmt: skip
        sh("ip", "link", "add", plan.WIRE, "type", "bridge")
        sh("ip", "link", "set", plan.WIRE, "up")
        sh("ip", "address", "add", f"{plan.NETWORKS[plan.WIRE]}.{plan.SLAVE}/24", "dev", plan.WIRE)
        sh("ip", "route", "add", plan.METADATA_ADDRESS, "dev", plan.WIRE)
        sh("ip", "route", "add", plan.HIDING_NETWORK, "dev", plan.WIRE)

    def serve(self, target: plan.Target) -> None:
        networks = ["--network", "none"]
        if target is not plan.METADATA:
            networks = ["--network", plan.FRONT, "--ip", plan.address(target, plan.FRONT)]
        names = []
        if target is plan.CACHE:
            networks += [f"--network-alias={name}" for name in (plan.NAME, plan.BARE_NAME)]
            names = [
                json.dumps(
                    dict.fromkeys((plan.NAME, plan.BARE_NAME), plan.address(target, plan.FRONT))
                )
            ]
        container = docker(
            "run", "--detach", "--name", target.name, *networks, "--pids-limit", "64", "--memory", "64m",
            "--volume", f"{self.root / 'usr'}:/usr:ro", "--volume", f"{LAB}/peer:/peer:ro", IMAGE,
            "/usr/bin/python3", "-I", "/peer/peer.py", "serve", target.name, str(target.port), *names,
        )  # fmt: skip
        if target is not plan.METADATA:
            docker(
                "network", "connect", "--ip", plan.address(target, plan.BACK), plan.BACK, container
            )
        self.attach(container, target)

    def attach(self, container: str, target: plan.Target) -> None:
        """To the segment beyond the slave, as another host is."""
        pid = pid_of(container)
        port = f"w{target.number}"
        sh("ip", "link", "add", port, "type", "veth", "peer", "name", "wire0", "netns", pid)
        sh("ip", "link", "set", port, "master", plan.WIRE, "up")
        inside = ("nsenter", "--target", pid, "--net", "ip")
        if target is not plan.METADATA:
            sh("nsenter", "--target", pid, "--net", "/bin/sh", "-ec", ipv6_on(target.number))
        sh(*inside, "link", "set", "wire0", "up")
        addresses = [f"{plan.address(target, plan.WIRE)}/{32 if target is plan.METADATA else 24}"]
        if target is plan.CACHE:
            addresses += [f"{one}/16" for one in plan.HIDDEN_ADDRESSES]
        for one in addresses:
            sh(*inside, "address", "add", one, "dev", "wire0")
        if target is plan.METADATA:
            sh(*inside, "route", "add", f"{plan.NETWORKS[plan.WIRE]}.0/24", "dev", "wire0")

    def system_call_filter(self) -> Path:
        """That of the worker container, derived as the role does from what this engine filters by default."""
        capabilities = [f"--cap-add={name}" for name in worker.CAPABILITIES]
        container = docker("run", "--detach", "--network", "none", *capabilities,
                           "--volume", f"{self.root / 'usr'}:/usr:ro", IMAGE, "/usr/bin/sleep", "60")  # fmt: skip
        text = (_BUNDLES / container / "config.json").read_text(encoding="utf-8")
        docker("rm", "--force", container)
        path = LAB / "seccomp.json"
        path.write_text(
            json.dumps(worker.tailored(json.loads(text)["linux"]["seccomp"])), encoding="utf-8"
        )
        return path

    def build(self) -> None:
        self.prepare()
        self.start_engine()
        self.make_networks()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(self.serve, plan.TARGETS))
        sh("nft", "-f", "-", text=plan.counting_rules())
        set_bridge_nf(0)


def ipv6_on(number: int) -> str:
    """Shell words; networks of the engine have none unless told."""
    return (
        "echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6;"
        f" ip -6 address add {plan.link_local(number)}/64 dev eth0 nodad"
    )


def pid_of(container: str) -> str:
    return docker("inspect", "--format", "{{.State.Pid}}", container)


def set_bridge_nf(value: int) -> None:
    """Whether the slave's inet rules see what one bridge passes on of IPv4 (of IPv6 never); settings of each network
    namespace."""
    for name, now in (("iptables", value), ("ip6tables", 0)):
        path = Path(f"/proc/sys/net/bridge/bridge-nf-call-{name}")
        try:
            path.write_text(str(now), encoding="ascii")
        except FileNotFoundError:
            raise LabError(f"there is no {path}; load the kernel's module br_netfilter.") from None


def counters(*inside: str, table: str) -> dict[str, tuple[int, int]]:
    """{comment: (packets, bytes)} of a table's counters."""
    listed = json.loads(sh(*inside, "nft", "--json", "list", "table", *table.split()))
    found = {}
    for entry in listed["nftables"]:
        rule = entry.get("rule", {})
        for part in rule.get("expr", ()):
            if "counter" in part and "comment" in rule:
                found[rule["comment"]] = (part["counter"]["packets"], part["counter"]["bytes"])
    return found


def isolated() -> int:
    """Packets that the engine's own isolation of its networks dropped."""
    lines = sh("iptables", "-w", "-nvxL", "DOCKER-ISOLATION-STAGE-2").splitlines()
    return sum(int(line.split()[0]) for line in lines if line.split()[2:3] == ["DROP"])


# --- The worker -----------------------------------------------------------------------------------


@dataclass
class Worker:
    """Container A: an engine within, and three child containers."""

    lab: Lab
    runtime: str
    seccomp: Path
    program: subprocess.Popen[bytes] | None = None
    name: str = "worker"

    @property
    def home(self) -> Path:
        return LAB / f"worker-{self.runtime}"

    def enter(self) -> tuple[str, ...]:
        return ("nsenter", "--target", pid_of(self.name), "--net")

    def start(self) -> None:
        self.home.mkdir(mode=0o755)
        owner = 0 if self.runtime == "runc" else FIRST_ID
        # Its senders make their sockets here.
        shared = self.home / "lab"
        shared.mkdir()
        os.chown(shared, owner, owner)
        shutil.copy(LAB / "peer" / "peer.py", shared)
        (shared / "child.tar").write_bytes(files_of(self.lab.root))
        # What the engine within finds of an earlier one is in the way of another address.
        (shared / "engine").write_text(
            "ip link delete docker0 2>/dev/null\nexec /usr/sbin/dockerd $(cat /lab/flags)\n"
        )
        path = self.home / "container.json"
        path.write_text(json.dumps(self.described(owner)), encoding="utf-8")
        self.set_flags(plan.UNTOLD)
        log = (self.home / "log").open("wb")
        # The program that runs the worker container of a slave.
        self.program = subprocess.Popen(
            [sys.executable, "-s", "-m", worker_host.__name__, str(path)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        self.lab.processes.append(self.program)
        self.wait_for_engine()
        self.start_sender("worker", "exec", "--detach", self.name)

    def described(self, owner: int) -> dict[str, Any]:
        """As the role describes the worker container to the program that runs it."""
        return {
            "name": self.name,
            "create": self.create_arguments(),
            "networks": [],
            "engine": ["/bin/sh", "/lab/engine"],
            "directory": str(self.home / "run"),
            "owner": owner,
            "runtime": self.runtime,
            "ids": 131072,
            "first_job_id": 65536,
            "start_timeout_s": 30,
        }

    def create_arguments(self) -> list[str]:
        options = [
            f"seccomp={self.seccomp}" if word.startswith("seccomp=") else word
            for word in plan.boundary_options(self.lab.config["create"][self.runtime])
        ]
        if self.runtime == "sysbox-runc" and "--runtime" not in options:
            options += ["--runtime", "sysbox-runc"]
        volumes = {
            self.lab.root / "usr": "/usr:ro", LAB / "peer": "/peer:ro",
            self.home / "lab": "/lab", self.home / "run" / "boot": "/run/cellblock-boot:ro",
        }  # fmt: skip
        return [
            "--name", self.name, "--hostname", self.name, *options, "--network", plan.FRONT,
            "--ip", f"{plan.NETWORKS[plan.FRONT]}.{plan.WORKER}", "--dns", plan.address(plan.CACHE, plan.FRONT),
            *(part for have, there in volumes.items() for part in ("--volume", f"{have}:{there}")),
            "--volume", "/var/lib/docker", IMAGE,
            "/usr/bin/python3", "-I", "/peer/init.py", "/run/cellblock-boot/socket",
        ]  # fmt: skip

    def nature(self) -> dict[str, Any]:
        """What the kernel says of its first process."""
        process = Path("/proc") / pid_of(self.name)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return {
            "uid_map": " ".join((process / "uid_map").read_text().split()),
            "sysbox_mounts": (process / "mounts").read_text().count(" fuse.sysboxfs "),
            "seccomp": int(status["Seccomp"]),
        }

    def set_flags(self, kind: str) -> None:
        flags = self.lab.config["inner_engine"][1:] if kind == plan.TOLD else []
        own = ["--dns", plan.address(plan.CACHE, plan.FRONT)] if kind == plan.TOLD else []
        (self.home / "lab" / "flags").write_text(" ".join([*without_dns(flags), *own]))

    def wait_for_engine(self) -> None:
        try:
            until(f"an answer of the engine within ({self.runtime})",
                  lambda: self.inner("version", "--format", "{{.Server.Version}}"), 40)  # fmt: skip
        except LabError as error:
            said = (self.home / "log").read_text(errors="replace").splitlines()[-3:]
            with contextlib.suppress(LabError):
                done = subprocess.run(["docker", "logs", "--tail", "4", self.name], capture_output=True, text=True, check=False, timeout=10)  # fmt: skip
                said += (done.stdout + done.stderr).splitlines()
            raise LabError(f"{error} Last words: {' | '.join(said)}") from None

    def inner(self, *arguments: str) -> str:
        return docker("exec", self.name, "docker", *arguments)

    def start_sender(self, sender: str, *by: str) -> None:
        path = self.home / "lab" / f"{sender}.sock"
        path.unlink(missing_ok=True)
        # A name that nobody knows is not waited for longer than an answer.
        docker(*by, "/usr/bin/env", "RES_OPTIONS=timeout:1 attempts:1", "/usr/bin/python3", "-I",
               "/lab/peer.py", "send", f"/lab/{sender}.sock")  # fmt: skip
        until(f"the start of {sender}", path.exists, 15)

    def start_children(self) -> None:
        self.inner("import", "/lab/child.tar", "child")
        self.inner("network", "create", "inner")
        for sender, network in (
            ("child_default_bridge", "bridge"),
            ("child_user_network", "inner"),
            ("child_workers_network", "host"),
        ):
            self.start_sender(
                sender, "exec", self.name, "docker", "run", "--detach", "--name", sender,
                "--network", network, *_CHILD_MOUNTS, "child",
            )  # fmt: skip

    def tell_engine(self) -> None:
        """The engine within anew, with the settings of the role."""
        self.inner("rm", "--force", *(sender for sender in plan.SENDERS if sender != "worker"))
        self.inner("network", "rm", "inner")
        self.set_flags(plan.TOLD)
        docker("exec", self.name, "/bin/sh", "-c", "kill $(cat /var/run/docker.pid)")
        until("the end of the engine within", lambda: not self.answers(), 15)
        self.wait_for_engine()

    def answers(self) -> bool:
        try:
            self.inner("version")
        except LabError:
            return False
        return True

    def ports(self) -> list[str]:
        """Its interfaces on the slave: the bridges' ports."""
        links = json.loads(sh(*self.enter(), "ip", "-json", "link", "show", "type", "veth"))
        # The others are ports of the inner engine's bridges: the number of their other end is one of a child's namespace.
        outside = {link["link_index"] for link in links if "master" not in link}
        own = json.loads(sh("ip", "-json", "link", "show", "type", "veth"))
        return [
            link["ifname"] for link in own
            if link["ifindex"] in outside and link.get("master") in (plan.FRONT, plan.BACK)
        ]  # fmt: skip

    @contextlib.contextmanager
    def under(self, topology: str) -> Iterator[None]:
        """Its own root, with what it may do, gives it another address or IPv6, and what was before again."""
        if topology == plan.FORGED:
            self.take_address(plan.OTHER)
            try:
                yield
            finally:
                self.take_address(plan.WORKER)
        elif topology == plan.LINK_LOCAL:
            docker("exec", self.name, "/bin/sh", "-ec", ipv6_on(plan.WORKER))
            try:
                yield
            finally:
                docker("exec", self.name, "/bin/sh", "-ec", "echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6")  # fmt: skip
        else:
            yield

    def take_address(self, address: int) -> None:
        subnet = plan.NETWORKS[plan.FRONT]
        docker("exec", self.name, "/bin/sh", "-ec",
               f"ip address flush dev eth0; ip address add {subnet}.{address}/24 dev eth0;"
               f" ip route add default via {subnet}.1")  # fmt: skip

    def ask(
        self, sender: str, requests: Sequence[plan.Request], timeout_s: float
    ) -> list[dict[str, Any]]:
        wanted = {
            "timeout_s": timeout_s,
            "requests": [(one.host, one.target.port) for one in requests],
        }
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self.home / "lab" / f"{sender}.sock"))
            connection.sendall(json.dumps(wanted).encode() + b"\n")
            with connection.makefile() as stream:
                answers: list[dict[str, Any]] = json.loads(stream.readline())
                return answers

    def stop(self) -> None:
        if self.program is not None:
            self.program.terminate()
            self.program.wait(30)


def without_dns(flags: Sequence[str]) -> list[str]:
    """The role's flags without its resolvers, which are none of the experiment's."""
    found, words = [], iter(flags)
    for word in words:
        if word == "--dns":
            next(words, None)
        else:
            found.append(word)
    return found


# --- Steps ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def rules_of(step: plan.Step, container: Worker) -> Iterator[Callable[[], Mapping[str, int]]]:
    """The step's rules, while they last; gives what counts {address: packets that they dropped}."""
    inside = container.enter() if step.filter == "worker inet output" else ()
    if step.filter == "DOCKER-USER lets through":
        lifted = [
            ("-i", a, "-o", b, "-j", "ACCEPT")
            for a, b in ((plan.FRONT, plan.BACK), (plan.BACK, plan.FRONT))
        ]
        for rule in lifted:
            sh("iptables", "-w", "-I", "DOCKER-USER", *rule)
        try:
            yield lambda: {}
        finally:
            for rule in lifted:
                sh("iptables", "-w", "-D", "DOCKER-USER", *rule)
    elif step.filter == "engine's isolation":
        # One counter for all: what it grows by is each target's.
        yield lambda: {request.host: isolated() for request in step.requests("worker")}
    elif step.filter == "none":
        yield lambda: {}
    else:
        text = plan.filter_rules(step.filter, container.ports())
        family = text.split()[1]
        sh(*inside, "nft", "-f", "-", text=text)
        try:
            yield lambda: {
                host: packets
                for host, (packets, _) in counters(*inside, table=f"{family} flows").items()
            }
        finally:
            sh(*inside, "nft", "delete", "table", family, "flows")


def take(step: plan.Step, container: Worker) -> Iterator[plan.Observation]:
    """Every sender in turn: what the counters grow by in its turn is its own."""
    set_bridge_nf(step.bridge_nf)
    with container.under(step.topology), rules_of(step, container) as dropped:
        for sender in plan.SENDERS:
            requests = step.requests(sender)
            if not requests:
                continue
            before = counters(table="bridge arrived"), dropped()
            answers = container.ask(sender, requests, TIMEOUT_S)
            if any(
                "error" in answer and request.expected == plan.REACHED
                for request, answer in zip(requests, answers, strict=True)
            ):
                # A machine with much to do: who answers late is reached all the same. What is to be denied is not
                # denied by time alone, but by what counted it.
                answers = container.ask(sender, requests, PATIENT_S)
            after = counters(table="bridge arrived"), dropped()
            for request, answer in zip(requests, answers, strict=True):
                at = request.address
                arrived = [new - old for new, old in zip(after[0][at], before[0][at], strict=True)]
                yield plan.observation(
                    container.runtime, step, sender, request, answer, (arrived[0], arrived[1]),
                    after[1].get(at, 0) - before[1].get(at, 0),
                )  # fmt: skip
    set_bridge_nf(0)


def observe(
    lab: Lab, runtime: str, seccomp: Path, natures: dict[str, Any]
) -> Iterator[plan.Observation]:
    container = Worker(lab, runtime, seccomp)
    try:
        container.start()
        natures[runtime] = container.nature()
        container.start_children()
        told = several = False
        for step in plan.STEPS:
            if step.inner_engine == plan.TOLD and not told:
                container.tell_engine()
                container.start_children()
                told = True
            if step.topology == "several networks" and not several:
                docker("network", "connect", "--ip", f"{plan.NETWORKS[plan.BACK]}.{plan.WORKER}", plan.BACK, container.name)  # fmt: skip
                several = True
            yield from take(step, container)
    finally:
        container.stop()


def end_with_caller() -> None:
    """Nobody reads what is found any more when the other end of the input is closed."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    threading.Thread(target=end_with_caller, daemon=True).start()
    started = time.monotonic()
    group = own_group()
    settle_group(group)
    lab = Lab(config, group)
    answer: dict[str, Any] = {"observations": [], "workers": {}}
    try:
        if not OWN_OF_CONTAINERD[-1].exists():
            MADE_BY_CONTAINERD.touch()
        lab.build()
        seccomp = lab.system_call_filter()
        answer["built_s"] = round(time.monotonic() - started, 1)
        for runtime in config["runtimes"]:
            for one in observe(lab, runtime, seccomp, answer["workers"]):
                answer["observations"].append(plan.as_row(one))
    except (LabError, worker.WorkerError, OSError, ValueError, KeyError) as error:
        answer["failed"] = str(error) or type(error).__name__
    answer["seconds"] = round(time.monotonic() - started, 1)
    with contextlib.suppress(LabError):
        answer["engine"] = docker("version", "--format", "{{.Server.Version}}")
    print(json.dumps(answer), flush=True)
    # The engine and whatever else runs end with the unit.
    os._exit(0)


# --- In the module --------------------------------------------------------------------------------


# A containerd of an engine's own makes them, whatever else it is told about places.
OWN_OF_CONTAINERD = tuple(Path("/opt/containerd", name) for name in ("bin", "lib", ""))
MADE_BY_CONTAINERD = LAB / "made-by-containerd"


def clean_up() -> bool:
    """Ends what an earlier run left; returns whether there was anything."""
    left = subprocess.run(["systemctl", "is-active", "--quiet", f"{UNIT}.service"], check=False).returncode == 0  # fmt: skip
    if left:
        subprocess.run(["systemctl", "stop", f"{UNIT}.service"], check=False, timeout=60)
    subprocess.run(
        ["systemctl", "reset-failed", f"{UNIT}.service"], check=False, capture_output=True
    )
    for group in groups():
        left = True
        for directory, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    if MADE_BY_CONTAINERD.exists():
        for path in OWN_OF_CONTAINERD:
            with contextlib.suppress(OSError):
                path.rmdir()
    if LAB.exists():
        left = True
        shutil.rmtree(LAB, ignore_errors=True)
    return left


def groups() -> list[Path]:
    """The unit's cgroups: systemd leaves those of hierarchies that it does not use."""
    root = Path("/sys/fs/cgroup")
    patterns = (f"system.slice/{UNIT}.service", f"*/system.slice/{UNIT}.service")
    return [path for pattern in patterns for path in root.glob(pattern)]


def run_in_unit(config: Mapping[str, Any]) -> dict[str, Any]:
    """Runs :func:`main` in a unit of its own and returns what it printed."""
    clean_up()
    LAB.mkdir(mode=0o711)
    path = LAB.with_suffix(".json")
    path.write_text(json.dumps(dict(config)), encoding="utf-8")
    # Where this was imported from: a directory, or the archive by which Ansible brings modules.
    source = __file__.partition("/ansible_collections/")[0]
    properties = {
        "PrivateNetwork": "yes", "PrivateMounts": "yes", "Delegate": "yes", "RuntimeMaxSec": str(LONGEST_S),
        "TimeoutStopSec": "5", "MemoryMax": "4G", "TasksMax": "4096",
    }  # fmt: skip
    try:
        done = subprocess.run(
            ["systemd-run", "--wait", "--pipe", "--quiet", "--collect", f"--unit={UNIT}",
             "--description=Cellblock: experiment with child containers", f"--setenv=PYTHONPATH={source}",
             *(f"--property={name}={value}" for name, value in properties.items()),
             "/usr/bin/python3", "-s", "-m", __name__, str(path)],
            # Open as long as this waits: the unit ends when it closes.
            stdin=os.pipe()[0], capture_output=True, text=True, check=False, timeout=LONGEST_S + 30,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        if not lines:
            words = done.stderr.strip().splitlines()[-3:]
            raise LabError(
                f"the experiment ended without a word ({' | '.join(words) or done.returncode})."
            )
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    except subprocess.TimeoutExpired:
        raise LabError(f"the experiment took more than {LONGEST_S} s.") from None
    finally:
        path.unlink(missing_ok=True)
        clean_up()


if __name__ == "__main__":
    main()
