"""What job networks cost: start of a stage, change of policy, making of slots, throughput.

Run as root. Everything happens in network namespaces of this process, on a segment that no route
leads out of. Prints Markdown tables; every comparison is of interleaved runs.

    python bench/network_slots.py --nsjail FILE --jobinit FILE --environment DIRECTORY
    python bench/network_slots.py            # without the start of stages
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from cellblock.engine.host import Host
from cellblock.engine.job_parser import parse_job
from cellblock.engine.limits import StageConstraints
from cellblock.engine.run import Engine
from cellblock.engine.runner import Runner
from cellblock.engine.workers import ForkServer, Workers
from cellblock.job_network.access import Access
from cellblock.job_network.plan import INTERFACE
from cellblock.job_network.section import NetworkConfig
from cellblock.job_network.slots import SlotPool
from cellblock.linux.netlink import Netlink, inside, new_namespace
from cellblock.linux.nft import Nft
from cellblock.units import Bytes
from segment import CACHE, INTERNET, PARENT, Segment

START_RUNS = 200
POLICY_RUNS = 60
THROUGHPUT_RUNS = 200
THROUGHPUT_S = 0.1
PACKET_RUNS = 100
PACKETS = 3000
MANY_SLOTS = 256
PORT = 443
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 1 << 14, 1 << 18


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nsjail", type=Path, help="of a host, to measure the start of stages")
    parser.add_argument("--jobinit", type=Path)
    parser.add_argument("--environment", type=Path, help="a root file system with the program date")
    parser.add_argument("--cgroup", default="cellblock-bench", help="group to make and to run in")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("only root can make network namespaces; run it with sudo")
    _say_where()
    segment = Segment()
    # A tmpfs, as a host's /run is.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        directory.chmod(0o755)
        policy_switch(segment, directory)
        many_slots(segment, directory)
        for congestion_control in _congestion_controls():
            throughput(segment, directory, congestion_control)
        packets(segment, directory)
        if options.nsjail:
            starts(segment, directory, options)
            # The engine's mounts end with this process's mount namespace, and this is its last act.
            sys.stdout.flush()
            os._exit(0)
    return 0


def _say_where() -> None:
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {load}\n"
    )
    print("| what | p50 | 95 % interval of p50 | p90 | min | max | runs |")
    print("|---|---|---|---|---|---|---|")


def row(what: str, values: Sequence[float], unit: str = "ms") -> None:
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)]
    # By resampling: what other runs of this length could have given.
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ordered, k=len(ordered))) for _ in range(1000))
    figures = (f"{value:.2f} {unit}" for value in (p90, ordered[0], ordered[-1]))
    interval = f"{medians[25]:.2f} to {medians[975]:.2f} {unit}"
    middle = f"{statistics.median(ordered):.2f} {unit} | {interval}"
    print(f"| {what} | {middle} | {' | '.join(figures)} | {len(ordered)} |", flush=True)


def pool_of(
    segment: Segment, directory: Path, slots: int, addresses: str = "10.213.0.128/27"
) -> SlotPool:
    length = 24 if addresses.startswith("10.213.0.") else 16
    fields = segment.config(slots=slots, addresses=addresses, prefix_length=length)
    with inside(segment.slave):
        return SlotPool(NetworkConfig.parse(fields, "network"), directory / "network")


def access_of(config: NetworkConfig, policy: str) -> Access:
    stage = {"name": "run", "command": ["true"], "network": policy}
    parsed = parse_job({"environment": "base", "stages": [stage]}).stages[0]
    return Access.of(parsed.network, parsed.network_allow, "stages[0]", config, "bench")


def policy_switch(segment: Segment, directory: Path) -> None:
    """From closed to `internet`, on slots that were made for it."""
    pool = pool_of(segment, directory, 20)
    took: list[float] = []
    looked: list[float] = []
    access = access_of(pool.config, "internet")
    while len(took) < POLICY_RUNS:
        pool.wait_until_ready(30)
        for slot in list(pool._ready):
            started = time.perf_counter()
            slot.open(access, StageConstraints())
            took.append((time.perf_counter() - started) * 1000)
            started = time.perf_counter()
            slot.traffic()
            looked.append((time.perf_counter() - started) * 1000)
        with pool._changed:  # used, so that they are made anew
            pool._used.extend(pool._ready)
            pool._ready.clear()
            pool._changed.notify_all()
        time.sleep(0.05)
    pool.close()
    row("policy set on a ready slot", took)
    row("counters of a slot read", looked)


def many_slots(segment: Segment, directory: Path) -> None:
    """Time until all are ready, and the memory that they take."""
    Path(directory / "network").mkdir(exist_ok=True)
    own_before, free_before = _resident(), _available()
    started = time.monotonic()
    pool = pool_of(segment, directory, MANY_SLOTS, "10.213.2.0/23")
    if not pool.wait_until_ready(120):
        sys.exit(f"bench: {MANY_SLOTS} slots were not ready after 120 s: {pool._problem}")
    took = time.monotonic() - started
    own = (_resident() - own_before) / MANY_SLOTS
    everything = (free_before - _available()) / MANY_SLOTS
    started = time.monotonic()
    pool.close()
    removed = time.monotonic() - started
    print(f"| {MANY_SLOTS} slots made | {took:.1f} s | | | | | 1 |")
    print(f"| {MANY_SLOTS} slots removed, one after the other | {removed:.1f} s | | | | | 1 |")
    print(f"| memory of a slot, in the service | {own:.0f} KiB | | | | | {MANY_SLOTS} |")
    print(f"| memory of a slot, with the kernel's | {everything:.0f} KiB | | | | | {MANY_SLOTS} |")


def _resident() -> float:
    fields = Path("/proc/self/smaps_rollup").read_text().split()
    return float(fields[fields.index("Rss:") + 1])


def _available() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1])
    raise AssertionError("no MemAvailable")


def throughput(segment: Segment, directory: Path, congestion_control: str) -> None:
    """TCP from a slot with `internet`, and from a bare clone: a connection each, in turns."""
    server = _sink(segment.gateway)
    pool = pool_of(segment, directory, 2)
    pool.wait_until_ready(30)
    limits = StageConstraints(network_bytes=Bytes(2**50), network_bytes_per_second=Bytes(2**34))
    bare = _bare_clone(segment)
    results: dict[str, list[float]] = {"bare": [], "filtered": []}
    access = access_of(pool.config, "internet")
    with (
        _on_processor(0),
        pool.take(access, limits, lambda: False) as slot,
        _connected(bare, congestion_control) as unfiltered,
        _connected(slot.namespace, congestion_control) as filtered,
    ):
        for number in range(THROUGHPUT_RUNS + 5):
            pairs = [("bare", unfiltered), ("filtered", filtered)]
            for name, connection in pairs if number % 2 else reversed(pairs):
                _send(connection, THROUGHPUT_S / 4)  # what the other one left in buffers
                rate = _send(connection, THROUGHPUT_S)
                if number >= 5:  # the first are a warm-up
                    results[name].append(rate)
        traffic = slot.traffic()
    os.kill(server, 9)
    os.waitpid(server, 0)
    os.close(bare)
    pool.close()
    row(f"TCP ({congestion_control}), bare macvlan clone", results["bare"], "Gbit/s")
    row(f"TCP ({congestion_control}), slot with `internet`", results["filtered"], "Gbit/s")
    ratios = [f / b for f, b in zip(results["filtered"], results["bare"], strict=True)]
    row(f"TCP ({congestion_control}), ratio of each pair", ratios, "")
    assert traffic.throttled_packets == traffic.over_bytes_packets == 0


def packets(segment: Segment, directory: Path) -> None:
    """What a packet costs that belongs to an open exchange, sent from a slot and from a bare clone."""
    pool = pool_of(segment, directory, 2)
    pool.wait_until_ready(30)
    limits = StageConstraints(network_bytes=Bytes(2**50), network_bytes_per_second=Bytes(2**34))
    bare = _bare_clone(segment)
    took: dict[str, list[float]] = {"bare": [], "filtered": []}
    with inside(segment.cache):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((CACHE, 53))
    data = bytes(1000)
    access = access_of(pool.config, "internet")
    with _on_processor(0), pool.take(access, limits, lambda: False) as slot:
        clients = {}
        for name, namespace in (("bare", bare), ("filtered", slot.namespace)):
            with inside(namespace):
                clients[name] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            clients[name].connect((CACHE, 53))
            clients[name].send(b"?")
            server.sendto(b"!", server.recvfrom(1)[1])
            clients[name].recv(1)
        for number in range(PACKET_RUNS + 5):
            order = ["bare", "filtered"]
            for name in order if number % 2 else reversed(order):
                send = clients[name].send
                started = time.perf_counter()
                for _ in range(PACKETS):
                    send(data)
                if number >= 5:
                    took[name].append((time.perf_counter() - started) / PACKETS * 1e6)
    for closing in (server, *clients.values()):
        closing.close()
    os.close(bare)
    pool.close()
    row("packet sent, bare macvlan clone", took["bare"], "µs")
    row("packet sent, slot with `internet`", took["filtered"], "µs")
    pairs_of = zip(took["filtered"], took["bare"], strict=True)
    row("packet sent, difference of each pair", [f - b for f, b in pairs_of], "µs")


@contextlib.contextmanager
def _on_processor(number: int) -> Iterator[None]:
    """Keeps this thread on one of the processors it may use, so that it does not wander."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(all_of_them)[number % len(all_of_them)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def _bare_clone(segment: Segment) -> int:
    """As a slot is connected, without a filter."""
    namespace = new_namespace()
    with inside(segment.slave):
        host = Netlink()
    with inside(namespace):
        own = Netlink()
    parent = host.link(PARENT)
    assert parent is not None
    host.add_macvlan(parent.index, INTERFACE, bytes.fromhex("02cb00d500fa"), namespace)
    segment.ip(namespace, f"address add 10.213.0.250/24 dev {INTERFACE}")
    segment.ip(namespace, f"link set {INTERFACE} up")
    segment.ip(namespace, "route add default via 10.213.0.30")
    host.close()
    own.close()
    return namespace


def _sink(namespace: int) -> int:
    """A process that reads what it is sent, on the internet's address."""
    with inside(namespace):
        listener = socket.create_server((INTERNET, PORT))
    child = os.fork()
    if child:
        listener.close()
        return child

    def read(connection: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        while connection.recv_into(buffer):
            pass

    with _on_processor(1):
        while True:
            threading.Thread(target=read, args=(listener.accept()[0],), daemon=True).start()


def _congestion_controls() -> list[str]:
    """What Debian's kernels have by default, and what this machine is set to."""
    chosen = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return list(dict.fromkeys(["cubic", chosen]))


def _connected(namespace: int, congestion_control: str) -> socket.socket:
    with inside(namespace):
        connection = socket.create_connection((INTERNET, PORT), 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())
    return connection


def _send(connection: socket.socket, duration_s: float) -> float:
    """Gbit/s."""
    data, sent = bytes(1 << 18), 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < duration_s:
        sent += connection.send(data)
    return sent * 8 / elapsed / 1e9


def starts(segment: Segment, directory: Path, options: argparse.Namespace) -> None:
    """A job that does nothing, with `none` and with `internet`, slots ready."""
    with _OwnGroup(options.cgroup):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.unshare(_CLONE_NEWNS)
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        environments = directory / "environments.json"
        environments.write_text(
            json.dumps(
                {"base": {"path": str(options.environment), "default_path": "/usr/bin:/bin"}}
            )
        )
        fields = segment.config(slots=8, guard={"tables": [["inet", "cellblock"]]})
        with inside(segment.slave):
            guard = Nft()
        guard.run("table inet cellblock { chain output { type filter hook output priority 0; }\n}")
        host = Host(
            nsjail=options.nsjail,
            jobinit=options.jobinit,
            environments_file=environments,
            run_dir=directory / "run",
            spool_dir=directory / "spool",
            first_id=1_900_200_000,
            parallel_jobs=2,
            network=NetworkConfig.parse(fields, "network"),
        )
        with inside(segment.slave):
            runner = Runner(host)
            workers = Workers(ForkServer(runner), runner, kept=1)
            engine = Engine(host, workers)
        pool = engine._network.slots if engine._network else None
        assert pool is not None
        started_after: dict[str, list[float]] = {"none": [], "internet": []}
        done_after: dict[str, list[float]] = {"none": [], "internet": []}
        for number in range(START_RUNS + 5):
            pairs = ["none", "internet"] if number % 2 else ["internet", "none"]
            for policy in pairs:
                pool.wait_until_ready(10)
                time.sleep(0.05)  # the kernel removes the last run's namespace in the background
                stage = {"name": "run", "command": ["date", "+%s.%N"], "network": policy}
                job = parse_job({"environment": "base", "stages": [stage]})
                began = time.time()
                running = engine.run(engine.check(job), 0, directory / "record")
                record = json.loads(cast(bytes, asyncio.run(running)))
                done = time.time()
                assert record["verdict"] == "ok", record
                if number >= 5:
                    said = float(record["stages"][0]["stdout"]["text"])
                    started_after[policy].append((said - began) * 1000)
                    done_after[policy].append((done - began) * 1000)
        for what, taken in (
            ("until the program runs", started_after),
            ("job of one stage", done_after),
        ):
            for policy, values in taken.items():
                row(f"{what}, `{policy}`", values)
            pairs_of = zip(taken["internet"], taken["none"], strict=True)
            row(f"{what}, difference of each pair", [i - n for i, n in pairs_of])
        pool.close()


class _OwnGroup:
    """A control group of its own for the engine, which sweeps the one that it is in."""

    def __init__(self, name: str) -> None:
        root = Path("/sys/fs/cgroup")
        v1 = [root / controller for controller in ("cpu", "cpuacct", "memory", "pids")]
        mounts = [root] if (root / "cgroup.controllers").exists() else v1
        self._groups = [mount / name for mount in mounts]

    def __enter__(self) -> None:
        for group in self._groups:
            group.mkdir(exist_ok=True)
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        for group in self._groups:
            (group.parent / "cgroup.procs").write_text(str(os.getpid()))
            for below in sorted(group.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    below.rmdir()
            with contextlib.suppress(OSError):
                group.rmdir()


if __name__ == "__main__":
    sys.exit(main())
