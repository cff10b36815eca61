"""Network slots for real: namespaces on a segment that no route leads out of. Root only."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

import segment as lab
from cellblock.engine.job_parser import parse_job
from cellblock.engine.limits import StageConstraints
from cellblock.errors import ForbiddenDestinationError, HostSetupError
from cellblock.job_network.access import Access
from cellblock.job_network.plan import INTERFACE
from cellblock.job_network.section import NetworkConfig
from cellblock.job_network.slots import Slot, SlotPool
from cellblock.linux.netlink import Netlink, inside
from cellblock.linux.nft import Nft
from cellblock.units import Bytes, Count

OBSTACLE = lab.obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "-")

FAST = StageConstraints(network_bytes_per_second=Bytes(2**30))
ALLOWED = {"to": lab.INTERNET, "protocol": "tcp", "ports": [8080]}


@pytest.fixture(scope="module")
def segment() -> Iterator[lab.Segment]:
    made = lab.Segment()
    with contextlib.ExitStack() as stack:
        for namespace, ports in (
            (made.cache, (3142, 9999)),
            (made.database, (5432,)),
            (made.gateway, (80, 443, 8080)),
            (made.slave, (22, 9999)),
        ):
            for port in ports:
                stack.enter_context(lab.serving(namespace, port, lab.hello))
        yield made


MakePool = Callable[..., SlotPool]


@pytest.fixture
def make_pool(segment: lab.Segment, tmp_path: Path) -> Iterator[MakePool]:
    pools = []

    def make(*, ready: bool = True, **changes: Any) -> SlotPool:
        config = NetworkConfig.parse(segment.config(**changes), "network")
        with inside(segment.slave):
            pool = SlotPool(config, tmp_path / "network")
        pools.append(pool)
        if ready:
            assert pool.wait_until_ready(20)
        return pool

    yield make
    for pool in pools:
        pool.close()


def access(pool: SlotPool, policy: str, *allow: dict[str, Any]) -> Access:
    fields = {"network": policy, **({"network_allow": list(allow)} if allow else {})}
    stage = {"name": "run", "command": ["true"], **fields}
    parsed = parse_job({"environment": "base", "stages": [stage]}).stages[0]
    return Access.of(parsed.network, parsed.network_allow, "stages[0]", pool.config, "slave1")


@contextlib.contextmanager
def slot(
    pool: SlotPool, policy: str, *allow: dict[str, Any], limits: StageConstraints = FAST
) -> Iterator[Slot]:
    with pool.take(access(pool, policy, *allow), limits, lambda: False) as taken:
        yield taken


def reach(namespace: int, address: str, port: int, *, timeout_s: float = 1.3) -> str:
    """``hello`` where the server answered, else what went wrong.

    The kernel asks a second time after 1 s: a busy machine may miss the first.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(namespace), socket.socket(family) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect((address, port))
            # It was reached; the server is of this process, and slow while the machine is busy.
            connection.settimeout(10)
            return connection.recv(5).decode()
        except OSError as problem:
            return f"{type(problem).__name__} {problem}"


TARGETS = {
    "cache": (lab.CACHE, 3142),
    "cache, another port": (lab.CACHE, 9999),
    "database": (lab.DATABASE, 5432),
    "gateway": (lab.GATEWAY, 80),
    "metadata": (lab.METADATA, 80),
    "the slave": (lab.SLAVE, 22),
    "web": (lab.INTERNET, 80),
    "web, elsewhere": (lab.OTHER_INTERNET, 443),
    "another port": (lab.INTERNET, 8080),
}


@pytest.mark.parametrize(
    ("policy", "allow", "reachable"),
    [
        ("cache", (), {"cache"}),
        ("internet", (), {"cache", "web", "web, elsewhere"}),
        ("allow", (ALLOWED,), {"another port"}),
    ],
)
def test_policies(
    make_pool: MakePool, segment: lab.Segment, policy: str, allow: Any, reachable: set[str]
) -> None:
    for target in TARGETS.values():  # they are there, for whom may reach them
        if target[0] != lab.SLAVE:
            assert reach(segment.slave, *target) == "hello", target
    pool = make_pool()
    with slot(pool, policy, *allow) as taken:
        seen = {name for name, to in TARGETS.items() if reach(taken.namespace, *to) == "hello"}
        assert seen == reachable
        assert taken.traffic().refused_packets >= len(TARGETS) - len(reachable)


def test_a_slot_is_closed_until_it_has_a_policy(make_pool: MakePool) -> None:
    ready = make_pool()._ready[0]
    assert not [name for name, to in TARGETS.items() if reach(ready.namespace, *to) == "hello"]


def test_a_slot_that_waits_does_not_answer(make_pool: MakePool, segment: lab.Segment) -> None:
    """A host that still looks for the last user of the address would leave a trace in the next one's."""
    pool = make_pool(slots=1)
    waiting = pool._ready[0]
    address = str(waiting.address)

    def ask() -> str:
        segment.ip(segment.cache, "neigh flush dev eth0")
        reach(segment.cache, address, 80, timeout_s=0.2)
        return segment.ip(segment.cache, f"neigh show {address}")

    assert "lladdr" not in ask()
    assert traces(waiting.namespace)["neighbours"] == []
    waiting.open(access(pool, "cache"), FAST)
    # Control: it is asked, and answers when it may.
    assert "lladdr" in ask()
    assert traces(waiting.namespace)["neighbours"]


def test_nothing_passes_before_the_policy_is_complete(
    make_pool: MakePool, segment: lab.Segment
) -> None:
    """A constant stream of datagrams to allowed and forbidden places while the rules are loaded."""
    arrived: dict[str, int] = {"cache": 0, "database": 0}
    stop = threading.Event()

    def listen(name: str, namespace: int, address: str) -> None:
        with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind((address, 53))
            receiver.settimeout(0.2)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    receiver.recv(100)
                    arrived[name] += 1

    def stream(namespace: int) -> None:
        with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not stop.is_set():
                for address in (lab.CACHE, lab.DATABASE):
                    with contextlib.suppress(OSError):
                        sender.sendto(b"x", (address, 53))

    pool = make_pool()
    closed = pool._ready[0]
    threads = [
        threading.Thread(target=listen, args=("cache", segment.cache, lab.CACHE)),
        threading.Thread(target=listen, args=("database", segment.database, lab.DATABASE)),
        threading.Thread(target=stream, args=(closed.namespace,)),
    ]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        assert arrived == {"cache": 0, "database": 0}
        closed.open(access(pool, "internet"), FAST)
        time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert arrived["cache"] > 10
    assert arrived["database"] == 0


def test_siblings_do_not_meet(make_pool: MakePool) -> None:
    """Neither through their filters nor, private mode alone, without any."""
    pool = make_pool()
    with slot(pool, "internet") as one, slot(pool, "internet") as other:
        with inside(other.namespace):
            listener = socket.create_server(("", 80))
        with listener:
            assert reach(one.namespace, str(other.address), 80) != "hello"
            for namespace in (one.namespace, other.namespace):
                with inside(namespace):
                    nft = Nft()
                    nft.run("flush ruleset")
                    nft.close()
            assert "timed out" in reach(one.namespace, str(other.address), 80)
            assert "timed out" in reach(one.namespace, lab.SLAVE, 22)
            assert reach(one.namespace, lab.DATABASE, 5432) == "hello"  # without the filter


def test_no_ipv6_but_on_the_loopback(make_pool: MakePool) -> None:
    """`::1` is what a program finds without a network, too."""
    pool = make_pool()
    assert "::1\tlocalhost cellblock\n" in access(pool, "cache").hosts
    with slot(pool, "internet") as taken, inside(taken.namespace):
        (only,) = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
        assert only.split()[0] == f"{1:032x}" and only.split()[-1] == "lo"
        with (
            socket.create_server(("::1", 0), family=socket.AF_INET6) as server,
            socket.create_connection(server.getsockname()[:2], 5) as client,
        ):
            client.sendall(b"x")
            assert server.accept()[0].recv(1) == b"x"
        index = socket.if_nametoindex(INTERFACE)
        for address in ("fe80::1", "ff02::1", "2001:db8::1"):
            sender = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            with sender, pytest.raises(OSError):
                sender.sendto(b"x", (address, 80, 0, index))


def test_spoofed_sources_stay_inside(make_pool: MakePool, segment: lab.Segment) -> None:
    """Sent by root, from raw and packet sockets: what a job has no right to make anyway."""
    with (
        slot(make_pool(), "internet") as taken,
        inside(segment.cache),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire,
    ):
        wire.settimeout(0.3)
        reach(taken.namespace, lab.CACHE, 3142)  # the neighbour is known
        with inside(taken.namespace):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            packets.bind((INTERFACE, 0))
        own_mac = packets.getsockname()[4]
        foreign_mac, own = b"\x02\xcb\0\0\0\1", str(taken.address)
        with raw, packets:
            before = taken.traffic().refused_packets
            with pytest.raises(PermissionError):
                raw.sendto(datagram("10.213.0.99", b"spoofed"), (lab.CACHE, 0))
            assert taken.traffic().refused_packets == before + 1
            broadcast = b"\xff" * 6
            for mac, source in ((own_mac, "10.213.0.99"), (foreign_mac, own)):
                with contextlib.suppress(OSError):
                    packets.send(broadcast + mac + b"\x08\x00" + datagram(source, b"spoofed"))
                with contextlib.suppress(OSError):
                    packets.send(broadcast + mac + b"\x08\x06" + arp(mac, source))
            with contextlib.suppress(OSError):  # a VLAN tag around it
                packets.send(
                    broadcast + own_mac + b"\x81\x00\0\1\x08\x00" + datagram(own, b"spoofed")
                )
            packets.send(broadcast + own_mac + b"\x08\x00" + datagram(own, b"control"))
            seen = list(frames(wire))
    assert any(b"control" in frame for frame in seen)
    assert not any(b"spoofed" in frame for frame in seen)
    assert not any(socket.inet_aton("10.213.0.99") in frame for frame in seen)
    assert not any(foreign_mac in frame for frame in seen)


def datagram(source: str, payload: bytes) -> bytes:
    udp = struct.pack("!4H", 4000, 53, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    header += socket.inet_aton(source) + socket.inet_aton(lab.CACHE)
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + udp


def arp(mac: bytes, source: str) -> bytes:
    fixed = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return fixed + mac + socket.inet_aton(source) + bytes(6) + socket.inet_aton(lab.CACHE)


def frames(wire: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(TimeoutError):
        while True:
            yield wire.recv(2000)


def test_the_byte_quota(make_pool: MakePool, segment: lab.Segment) -> None:
    megabyte = bytes(1_000_000)
    limits = StageConstraints(network_bytes=Bytes(3_000_000), network_bytes_per_second=Bytes(2**30))
    with lab.serving(segment.gateway, 81, lambda c: c.sendall(megabyte)):
        entry = {"to": lab.INTERNET, "protocol": "tcp", "ports": [81]}
        with slot(make_pool(), "allow", entry, limits=limits) as taken:
            for number in (1, 2):
                assert receive_all(taken.namespace, 81) == len(megabyte)
                traffic = taken.traffic()
                passed = traffic.received_bytes + traffic.sent_bytes
                # Headers are little: the kernel hands over many segments as one packet.
                assert number * 1e6 <= passed <= number * 1.03e6
                assert traffic.over_bytes_packets == 0
            assert receive_all(taken.namespace, 81) < len(megabyte)
            traffic = taken.traffic()
            assert traffic.over_bytes_packets > 0
            assert 2_900_000 <= traffic.received_bytes + traffic.sent_bytes <= 3_000_000


def receive_all(namespace: int, port: int) -> int:
    received = 0
    with (
        inside(namespace),
        socket.create_connection((lab.INTERNET, port), 1) as connection,
        contextlib.suppress(TimeoutError),
    ):
        while part := connection.recv(1 << 16):
            received += len(part)
    return received


def test_errors_cost_quota_too(make_pool: MakePool, segment: lab.Segment) -> None:
    """What an ICMP error quotes is for its sender to choose, and a job can read it."""
    limits = StageConstraints(network_bytes=Bytes(10_000), network_bytes_per_second=Bytes(2**30))
    entry = {"to": lab.INTERNET, "protocol": "udp", "ports": [81]}
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(slot(make_pool(), "allow", entry, limits=limits))
        with inside(taken.namespace):
            job = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with inside(segment.gateway):
            server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            server.bind((lab.INTERNET, 81))
            raw = stack.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            )
            raw.bind((lab.INTERNET, 0))
        job.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        job.connect((lab.INTERNET, 81))
        job.send(b"hello")
        server.settimeout(1)
        _, (address, port) = server.recvfrom(16)
        payload = bytes(1000)
        header = struct.pack("!4H", port, 81, 8 + len(payload), 0)
        quoted = packet(address, lab.INTERNET, socket.IPPROTO_UDP, header + payload)
        error = struct.pack("!BBHI", 3, 1, 0, 0) + quoted
        error = error[:2] + struct.pack("!H", checksum(error)) + error[4:]
        read = 0
        for _ in range(50):
            raw.sendto(error, (address, 0))
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline:
                try:
                    message = job.recvmsg(2000, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    time.sleep(0.001)
                    continue
                read += len(message[0])
                break
        traffic = taken.traffic()
        assert 8000 <= read <= traffic.received_bytes <= 10_000
        assert traffic.over_bytes_packets >= 40


_IP_RECVERR = 11


def packet(source: str, target: str, protocol: int, content: bytes) -> bytes:
    """An IPv4 packet."""
    size, addresses = 20 + len(content), socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, size, 0, 0, 64, protocol, 0) + addresses
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + content


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def test_the_loopback_is_not_tracked(make_pool: MakePool) -> None:
    """No limit holds there, and the kernel's table of connections is for everybody."""
    with slot(make_pool(), "cache") as taken, inside(taken.namespace):
        assert tracked() == 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for port in range(2000, 3000):
                with contextlib.suppress(ConnectionRefusedError):
                    sender.sendto(b"x", ("127.0.0.1", port))
        assert tracked() == 0
        # It works all the same, under every address of the slot's own, and refuses at once.
        for address in ("127.0.0.1", str(taken.address)):
            with (
                socket.create_server((address, 4000)) as server,
                socket.create_connection((address, 4000), 1) as client,
            ):
                server.accept()[0].sendall(b"hello")
                assert client.recv(5) == b"hello"
            assert "refused" in reach(taken.namespace, address, 4001)
        assert tracked() == 0
        # Control: what leaves the slot is tracked.
        assert reach(taken.namespace, lab.CACHE, 3142) == "hello"
        assert tracked() == 1


def tracked() -> int:
    """Connections that the thread's network namespace keeps track of."""
    lines = Path("/proc/thread-self/net/stat/nf_conntrack").read_text().splitlines()
    return int(lines[1].split()[0], 16)


def test_the_bandwidth_limit(make_pool: MakePool) -> None:
    limits = StageConstraints(network_bytes_per_second=Bytes(4_000_000))
    entry = {"to": lab.INTERNET, "protocol": "udp", "ports": [81]}
    with (
        slot(make_pool(), "allow", entry, limits=limits) as taken,
        inside(taken.namespace),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sender.connect((lab.INTERNET, 81))

        def flood(duration_s: float) -> float:
            """Bytes per second that got out."""
            before, started = taken.traffic().sent_bytes, time.monotonic()
            while time.monotonic() < started + duration_s:
                with contextlib.suppress(OSError):
                    sender.send(bytes(1000))
            return (taken.traffic().sent_bytes - before) / (time.monotonic() - started)

        for _ in range(20):  # the burst, however slowly it is sent
            flood(0.25)
            if taken.traffic().throttled_packets:
                break
        # Where this machine gives us no time to send, less gets out, and what was saved up comes after.
        rates = [flood(2)]
        while rates[-1] != pytest.approx(4_000_000, rel=0.03) and len(rates) < 6:
            rates.append(flood(2))
        assert rates[-1] == pytest.approx(4_000_000, rel=0.03), rates
        assert taken.traffic().throttled_packets > 0


def test_the_connection_limit(make_pool: MakePool) -> None:
    limits = StageConstraints(network_connections=Count(3))
    with slot(make_pool(), "cache", limits=limits) as taken, inside(taken.namespace):
        held = [socket.create_connection((lab.CACHE, 3142), 1) for _ in range(3)]
        assert taken.traffic().over_connections == 0
        with pytest.raises(OSError):
            socket.create_connection((lab.CACHE, 3142), 1)
        assert taken.traffic().over_connections == 1
        assert held[0].recv(5) == b"hello"
        for connection in held:
            connection.close()
        time.sleep(0.1)
        socket.create_connection((lab.CACHE, 3142), 1).close()


def test_the_limit_of_new_connections(make_pool: MakePool) -> None:
    def opened(within_s: float) -> int:
        """How many a program gets that waits for none for long."""
        count, end = 0, time.monotonic() + within_s
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                socket.create_connection((lab.CACHE, 3142), 0.05).close()
                count += 1
        return count

    pool = make_pool(slots=2)
    limits = StageConstraints(network_connections_per_second=Count(5))
    with slot(pool, "cache", limits=limits) as taken, inside(taken.namespace):
        assert 5 <= opened(0.1) <= 6  # the burst
        assert opened(2) == pytest.approx(10, abs=2)
        assert taken.traffic().throttled_packets > 0
        assert taken.traffic().over_connections == 0
    # Control: with a higher limit, more are opened in the same time.
    limits = StageConstraints(
        network_connections_per_second=Count(1000), network_connections=Count(4000)
    )
    with slot(pool, "cache", limits=limits) as taken, inside(taken.namespace):
        assert opened(0.5) > 20


def test_the_next_user_of_an_address_sees_nothing_of_the_last(make_pool: MakePool) -> None:
    pool = make_pool(slots=1)
    with slot(pool, "internet") as first, inside(first.namespace):
        gone = socket.create_connection((lab.CACHE, 3142), 1)
        gone.close()
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind("\0cellblock-test")
        assert "hello" in reach(first.namespace, lab.INTERNET, 80)
        dirty = traces(first.namespace)
        namespace = os.dup(first.namespace)  # as if somebody had stayed inside
    with slot(pool, "internet") as second:
        assert second.address == first.address
        clean = traces(second.namespace)
        assert reach(second.namespace, lab.CACHE, 3142) == "hello"
        assert "hello" not in reach(namespace, lab.CACHE, 3142)
    abstract.close()
    os.close(namespace)
    assert dirty["sockets"] and dirty["segments"] > 0 and dirty["neighbours"] and dirty["unix"]
    assert clean == {"sockets": [], "segments": 0, "neighbours": [], "unix": [], "tracked": 0}


def traces(namespace: int) -> dict[str, Any]:
    net = Path("/proc/thread-self/net")
    with inside(namespace):
        snmp = [line.split() for line in (net / "snmp").read_text().splitlines()]
        tcp = dict(zip(*(line for line in snmp if line[0] == "Tcp:"), strict=True))
        tracked = Path("/proc/sys/net/netfilter/nf_conntrack_count")
        return {
            "sockets": (net / "tcp").read_text().splitlines()[1:],
            "segments": int(tcp["OutSegs"]) + int(tcp["InSegs"]),
            "neighbours": (net / "arp").read_text().splitlines()[1:],
            "unix": (net / "unix").read_text().splitlines()[1:],
            "tracked": int(tracked.read_text()),
        }


def test_the_longest_unused_slot_comes_first(make_pool: MakePool) -> None:
    pool = make_pool(slots=3)
    order = []
    for _ in range(6):
        with slot(pool, "cache") as taken:
            order.append(taken.index)
        assert pool.wait_until_ready(5)
    assert sorted(order[:3]) == [0, 1, 2]
    assert order[3:] == order[:3]


def test_all_slots_taken(make_pool: MakePool) -> None:
    pool = make_pool(slots=1)
    with slot(pool, "cache"):
        waiting: list[str] = []

        def wait() -> None:
            with slot(pool, "cache") as taken:
                waiting.append(str(taken.address))

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        assert not waiting
    thread.join(5)
    assert waiting


def test_no_start_without_the_guard(make_pool: MakePool, segment: lab.Segment) -> None:
    pool = make_pool(guard={"tables": [["inet", "guard"]]})
    with inside(segment.slave):
        nft = Nft()
    with pytest.raises(HostSetupError, match="table inet guard: is not loaded"):
        pool.require_ready()
    nft.run("table inet guard { chain nothing { }\n}")  # a table that does nothing is none
    with pytest.raises(HostSetupError, match="table inet guard: is not loaded"):
        pool.require_ready()
    nft.run("table inet guard { chain c { type filter hook output priority 0; }\n}")
    pool.require_ready()
    with slot(pool, "cache") as running:
        nft.run("flush ruleset")
        time.sleep(0.05)
        with pytest.raises(HostSetupError), slot(pool, "cache"):
            pass
        # Who runs is still filtered, by rules that the host's ruleset does not hold.
        assert reach(running.namespace, lab.CACHE, 3142) == "hello"
        assert reach(running.namespace, lab.DATABASE, 5432) != "hello"
    nft.close()


def test_a_parent_that_is_missing_and_comes_back(make_pool: MakePool, segment: lab.Segment) -> None:
    pool = make_pool(ready=False, parent="absent0")
    assert not pool.wait_until_ready(0.3)
    with pytest.raises(HostSetupError, match="interface absent0: is missing"):
        pool.require_ready()
    segment.ip(segment.slave, "link add absent0 type veth peer name absent1")
    segment.ip(segment.slave, "link set absent0 up")
    assert pool.wait_until_ready(10)
    pool.require_ready()
    segment.ip(segment.slave, "link delete absent0")  # and with it the clones in the slots
    with pytest.raises(HostSetupError, match="absent0"), slot(pool, "cache"):
        pass


def test_a_parent_that_somebody_deletes_is_made_again(
    make_pool: MakePool, segment: lab.Segment
) -> None:
    pool = make_pool(ready=False, parent="parent0", link=lab.PARENT)
    try:
        assert pool.wait_until_ready(10)
        segment.ip(segment.slave, "link delete parent0")
        # More than there are: each is made anew after its use.
        for _ in range(6):
            with slot(pool, "cache") as taken:
                assert reach(taken.namespace, lab.CACHE, 3142) == "hello"
        assert pool.wait_until_ready(10)
        made = segment.ip(segment.slave, "-d link show dev parent0")
        assert "macvlan mode private" in made and ",UP" in made
        with inside(segment.slave):
            assert Path("/proc/sys/net/ipv6/conf/parent0/disable_ipv6").read_text() == "1\n"
    finally:
        segment.ip(segment.slave, "link delete parent0")


def test_slots_over_routed_pairs(make_pool: MakePool, segment: lab.Segment) -> None:
    with inside(segment.slave):
        nft = Nft()
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    nft.run(
        "table ip nat { chain p { type nat hook postrouting priority 100; "
        'iifname "cbj*" masquerade; }; }'
    )
    # What an earlier service left.
    segment.ip(segment.slave, "link add cbj7 type veth peer name x")
    pool = make_pool(mode="routed", addresses="10.77.0.0/28")
    assert "cbj7" not in segment.ip(segment.slave, "link show")
    try:
        with slot(pool, "internet") as taken:
            seen = {n for n, to in TARGETS.items() if reach(taken.namespace, *to) == "hello"}
        assert seen == {"cache", "web", "web, elsewhere"}
    finally:
        nft.run("flush ruleset")
        nft.close()


def test_a_slot_of_a_container_is_no_others(make_pool: MakePool, segment: lab.Segment) -> None:
    """Clones of the parent, which the container's root may enter: the policy is the same, and no job of the host gets
    it, before or after."""
    pool = make_pool(slots=1)
    limits, cache = FAST, access(pool, "cache")
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "sh", "-c", "echo; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as container:
        assert container.stdin is not None
        assert container.stdout is not None
        container.stdout.readline()
        owners = []
        for owner in (None, container.pid, container.pid, None):
            with (
                inside(segment.slave),
                pool.take(cache, limits, lambda: False, owner) as taken,
            ):
                seen = {n for n, to in TARGETS.items() if reach(taken.namespace, *to) == "hello"}
                owners.append((taken.owner, enters(container.pid, taken.namespace)))
            assert seen == {"cache"}
        assert owners == [
            (None, False), (container.pid, True), (container.pid, True), (None, False)
        ]  # fmt: skip
        with inside(segment.slave), pool.take(cache, limits, lambda: False, container.pid):
            container.stdin.close()
            container.wait()
        # Of one that is gone nothing is kept.
        with inside(segment.slave), slot(pool, "cache") as taken:
            assert taken.owner is None


def enters(container: int, namespace: int) -> bool:
    """Whether root in the container's user namespace may enter the network namespace."""
    done = subprocess.run(
        [
            *("nsenter", f"--target={container}", "--user", "--preserve-credentials"),
            *("nsenter", f"--net=/proc/self/fd/{namespace}", "true"),
        ],
        pass_fds=[namespace],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def test_the_kernel_says_why(segment: lab.Segment) -> None:
    with inside(segment.slave):
        netlink = Netlink()
    assert netlink.link("absent") is None
    loopback = netlink.link("lo")
    assert loopback is not None and loopback.up
    with pytest.raises(OSError) as caught:
        netlink.add_veth("lo", "x0", bytes.fromhex("02cb00000001"), segment.cache)
    assert caught.value.strerror
    netlink.close()


# With IPv6.

TARGETS_IPV6 = {
    "cache": (lab.ipv6(lab.CACHE), 3142),
    "cache, another port": (lab.ipv6(lab.CACHE), 9999),
    "database": (lab.ipv6(lab.DATABASE), 5432),
    "gateway": (lab.ipv6(lab.GATEWAY), 80),
    "the slave": (lab.ipv6(lab.SLAVE), 22),
    "web": (lab.INTERNET_IPV6, 80),
    "another port": (lab.INTERNET_IPV6, 8080),
}
ALLOWED_IPV6 = {"to": lab.INTERNET_IPV6, "protocol": "tcp", "ports": [8080]}


def of_ipv6(taken: Slot) -> str:
    assert taken.ipv6_address is not None
    return str(taken.ipv6_address)


@pytest.mark.parametrize(
    ("policy", "allow", "reachable"),
    [
        ("cache", (), {"cache"}),
        ("internet", (), {"cache", "web"}),
        ("allow", (ALLOWED_IPV6,), {"another port"}),
        ("allow", (ALLOWED,), set()),
    ],
)
def test_policies_over_ipv6(
    make_pool: MakePool, segment: lab.Segment, policy: str, allow: Any, reachable: set[str]
) -> None:
    for target in TARGETS_IPV6.values():
        if target[0] != lab.ipv6(lab.SLAVE):
            end = time.monotonic() + 20
            while reach(segment.cache, *target) != "hello" and time.monotonic() < end:
                time.sleep(0.1)
            assert reach(segment.cache, *target) == "hello", target
    pool = make_pool(ipv6=True)
    with slot(pool, policy, *allow) as taken:
        # What the kernel sends of its own is no attempt of the job's.
        assert taken.traffic().refused_packets == 0
        seen = {n for n, to in TARGETS_IPV6.items() if reach(taken.namespace, *to) == "hello"}
        assert seen == reachable
        assert taken.traffic().refused_packets >= len(TARGETS_IPV6) - len(reachable)
        # IPv4 is as it was.
        over_ipv4 = {name for name, to in TARGETS.items() if reach(taken.namespace, *to) == "hello"}
        assert (
            over_ipv4
            == {
                "cache": {"cache"},
                "internet": {"cache", "web", "web, elsewhere"},
                "allow": {"another port"} if allow == (ALLOWED,) else set(),
            }[policy]
        )


def test_a_slot_has_one_ipv6_address(make_pool: MakePool, segment: lab.Segment) -> None:
    """None of its own making, none that a router offers, and no route but ours."""
    with slot(make_pool(ipv6=True), "internet") as taken:
        before = segment.ip(taken.namespace, "-6 route show table all")
        advertise(segment, of_ipv6(taken))
        listed = segment.ip(taken.namespace, f"-6 -o address show dev {INTERFACE}")
        assert [line.split()[3] for line in listed.splitlines()] == [f"{of_ipv6(taken)}/64"]
        assert segment.ip(taken.namespace, "-6 route show table all") == before
        assert "default via fd00:cb::" in before
        with inside(taken.namespace):
            index = socket.if_nametoindex(INTERFACE)
            for address in ("fe80::1", "ff02::1", "fd00:cb::1", "64:ff9b::a9fe:a9fe"):
                sender = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
                with sender, pytest.raises(OSError):
                    sender.sendto(b"x", (address, 80, 0, index))


def advertise(segment: lab.Segment, listener: str) -> None:
    """A router advertisement with a prefix, to all and to one; the cache, which listens, is control."""
    prefix = socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
    option = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 600, 600, 0) + prefix
    message = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 600, 0, 0) + option
    with inside(segment.cache):
        Path("/proc/sys/net/ipv6/conf/eth0/accept_ra").write_text("2")
    with inside(segment.gateway):
        index = socket.if_nametoindex("eth0")
        router = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        with router:
            link_local: list[str] = []
            deadline = time.monotonic() + 10
            # It can be used when the kernel has looked whether somebody else has it.
            while not link_local and time.monotonic() < deadline:
                link_local = [
                    line.split()[3].partition("/")[0]
                    for line in segment.ip(
                        segment.gateway, "-6 -o address show dev eth0 scope link -tentative"
                    ).splitlines()
                ]
            router.bind((link_local[0], 0, 0, index))
            for hops in (socket.IPV6_MULTICAST_HOPS, socket.IPV6_UNICAST_HOPS):
                router.setsockopt(socket.IPPROTO_IPV6, hops, 255)
            for target in ("ff02::1", listener):
                router.sendto(message, (target, 0, 0, index))
    deadline = time.monotonic() + 5
    while "2001:db8:bad:" not in segment.ip(segment.cache, "-6 address show dev eth0"):
        assert time.monotonic() < deadline, "nobody heard the advertisement"
        time.sleep(0.05)
    with inside(segment.cache):
        Path("/proc/sys/net/ipv6/conf/eth0/accept_ra").write_text("0")
    for what in ("address", "route"):
        for line in segment.ip(segment.cache, f"-6 -o {what} show dev eth0").splitlines():
            if "2001:db8:bad:" in line:
                words = line.split()
                gone = words[3] if what == "address" else words[0]
                segment.ip(segment.cache, f"-6 {what} delete {gone} dev eth0")
            elif what == "route" and line.startswith("default via fe80"):
                segment.ip(
                    segment.cache, "-6 route delete " + " ".join(line.split()[:3]) + " dev eth0"
                )


def test_a_slot_with_ipv6_that_waits_does_not_answer(
    make_pool: MakePool, segment: lab.Segment
) -> None:
    pool = make_pool(slots=1, ipv6=True)
    waiting = pool._ready[0]

    def ask() -> str:
        segment.ip(segment.cache, "-6 neigh flush dev eth0")
        reach(segment.cache, of_ipv6(waiting), 80, timeout_s=0.2)
        return segment.ip(segment.cache, f"neigh show {of_ipv6(waiting)}")

    assert "lladdr" not in ask()
    assert segment.ip(waiting.namespace, f"-6 neigh show dev {INTERFACE}") == ""
    waiting.open(access(pool, "cache"), FAST)
    assert "lladdr" in ask()


def test_siblings_do_not_meet_over_ipv6(make_pool: MakePool) -> None:
    pool = make_pool(ipv6=True)
    with slot(pool, "internet") as one, slot(pool, "internet") as other:
        with inside(other.namespace):
            listener = socket.create_server(("", 80), family=socket.AF_INET6)
        with listener:
            assert reach(one.namespace, of_ipv6(other), 80) != "hello"
            for namespace in (one.namespace, other.namespace):
                with inside(namespace):
                    nft = Nft()
                    nft.run("flush ruleset")
                    nft.close()
            assert "timed out" in reach(one.namespace, of_ipv6(other), 80)
            assert reach(one.namespace, lab.ipv6(lab.DATABASE), 5432) == "hello"  # control


def test_spoofed_ipv6_sources_stay_inside(make_pool: MakePool, segment: lab.Segment) -> None:
    with (
        slot(make_pool(ipv6=True), "internet") as taken,
        inside(segment.cache),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire,
    ):
        wire.settimeout(0.3)
        reach(taken.namespace, lab.ipv6(lab.CACHE), 3142)
        with inside(taken.namespace):
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            packets.bind((INTERFACE, 0))
        own_mac = packets.getsockname()[4]
        foreign_mac = b"\x02\xcb\0\0\0\1"
        target = b"\x33\x33\0\0\0\1"
        with packets:
            for mac, source, payload in (
                (own_mac, "fd00:cb::99", b"spoofed"),
                (own_mac, "fe80::99", b"spoofed"),
                (foreign_mac, of_ipv6(taken), b"spoofed"),
                (own_mac, of_ipv6(taken), b"control"),
            ):
                with contextlib.suppress(OSError):
                    packets.send(target + mac + b"\x86\xdd" + datagram_ipv6(source, payload))
            seen = list(frames(wire))
    assert any(b"control" in frame for frame in seen)
    assert not any(b"spoofed" in frame for frame in seen)


def datagram_ipv6(source: str, payload: bytes) -> bytes:
    udp = struct.pack("!4H", 4000, 53, 8 + len(payload), 0) + payload
    ends = (source, lab.ipv6(lab.CACHE))
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, end) for end in ends)
    return struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + addresses + udp


def test_a_routing_header_does_not_leave(make_pool: MakePool, segment: lab.Segment) -> None:
    """Any program may set one (segment routing, RFC 8754); it names whom the first host is to pass
    the packet on to."""
    _IPV6_RTHDR = 57
    last, first = (
        socket.inet_pton(socket.AF_INET6, lab.ipv6(a)) for a in (lab.DATABASE, lab.CACHE)
    )
    header = struct.pack("!BBBBBBH", 0, 4, 4, 1, 1, 0, 0) + last + first

    def send(namespace: int, payload: bytes) -> None:
        with inside(namespace), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_RTHDR, header)
            with contextlib.suppress(PermissionError):
                sender.sendto(payload, (lab.ipv6(lab.DATABASE), 3142))

    entry = {"to": f"{lab.INTERNET_IPV6}", "protocol": "udp", "ports": [3142]}
    pool = make_pool(ipv6=True)
    with (
        slot(pool, "allow", entry) as taken,
        inside(segment.cache),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire,
    ):
        wire.settimeout(0.3)
        with inside(taken.namespace):
            nft = Nft()
        # Whatever else the rules say of the address: this is what the header's line is for.
        nft.run("add rule inet cellblock allowed accept")
        nft.close()
        before = taken.traffic().refused_packets
        send(taken.namespace, b"from a job")
        assert taken.traffic().refused_packets == before + 1
        send(segment.database, b"control")
        seen = list(frames(wire))
    assert any(b"control" in frame for frame in seen)
    assert not any(b"from a job" in frame for frame in seen)


def test_ipv6_over_routed_pairs(make_pool: MakePool, segment: lab.Segment) -> None:
    with inside(segment.slave):
        nft = Nft()
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    nft.run(
        "table ip6 nat { chain p { type nat hook postrouting priority 100; "
        'iifname "cbj*" masquerade; }; }'
    )
    pool = make_pool(mode="routed", addresses="10.77.0.0/28", ipv6=True)
    try:
        with slot(pool, "internet") as taken:
            assert of_ipv6(taken).startswith("fd00:77::a4d:")
            seen = {n for n, to in TARGETS_IPV6.items() if reach(taken.namespace, *to) == "hello"}
        assert seen == {"cache", "web"}
    finally:
        nft.run("flush ruleset")
        nft.close()
        with inside(segment.slave):
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("0")


def test_the_quota_counts_both_versions_of_ip(make_pool: MakePool, segment: lab.Segment) -> None:
    limits = StageConstraints(network_bytes=Bytes(20_000), network_bytes_per_second=Bytes(2**30))
    entries = [
        {"to": address, "protocol": "udp", "ports": [81]}
        for address in (lab.INTERNET, lab.INTERNET_IPV6)
    ]
    with inside(segment.gateway):  # nobody complains of what is sent
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sink.bind(("", 81))
    with sink, slot(make_pool(ipv6=True), "allow", *entries, limits=limits) as taken:
        for address, headers in ((lab.INTERNET, 28), (lab.INTERNET_IPV6, 48)):
            before = taken.traffic().sent_bytes
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with inside(taken.namespace), socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.connect((address, 81))
                for _ in range(9):
                    sender.send(bytes(1000))
            assert taken.traffic().sent_bytes - before == 9 * (1000 + headers)
        assert taken.traffic().over_bytes_packets == 0
        with inside(taken.namespace), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.connect((lab.INTERNET_IPV6, 81))
            for _ in range(3):
                with contextlib.suppress(OSError):
                    sender.send(bytes(1000))
        assert taken.traffic().over_bytes_packets > 0


def test_another_list_of_what_is_denied_is_taken_over_and_no_stage_ends(
    make_pool: MakePool,
) -> None:
    """As it is when somebody joins the fleet: who runs goes on, and whoever comes has the new list."""
    pool = make_pool(slots=2)
    entry = {"to": lab.INTERNET, "protocol": "tcp", "ports": [80]}
    with slot(pool, "internet") as running:
        assert reach(running.namespace, lab.INTERNET, 80) == "hello"
        pool.reconfigure(replace(pool.config, denied=(ip_network(f"{lab.INTERNET}/32"),)))
        assert reach(running.namespace, lab.INTERNET, 80) == "hello"
        # The other one waited with the old list.
        with slot(pool, "internet") as fresh:
            assert reach(fresh.namespace, lab.INTERNET, 80) != "hello"
            assert reach(fresh.namespace, lab.OTHER_INTERNET, 80) == "hello"
        with pytest.raises(ForbiddenDestinationError):
            access(pool, "allow", entry)
    assert pool.wait_until_ready(20)
    with slot(pool, "internet") as again, slot(pool, "internet") as other:
        for taken in (again, other):
            assert reach(taken.namespace, lab.INTERNET, 80) != "hello"


def test_slots_that_are_being_made_are_made_once_more(make_pool: MakePool) -> None:
    pool = make_pool(slots=2, ready=False)
    pool.reconfigure(replace(pool.config, denied=(ip_network(f"{lab.INTERNET}/32"),)))
    assert pool.wait_until_ready(20)
    with slot(pool, "internet") as one, slot(pool, "internet") as other:
        for taken in (one, other):
            assert reach(taken.namespace, lab.INTERNET, 80) != "hello"
            assert reach(taken.namespace, lab.OTHER_INTERNET, 80) == "hello"


def test_no_other_change_is_taken_over(segment: lab.Segment) -> None:
    config = NetworkConfig.parse(segment.config(), "network")
    assert config.is_same_but_for_denied(replace(config, denied=()))
    changes: Any = ({"slots": 3}, {"resolvers": ()}, {"policies": {}}, {"names": {"a": ()}})
    for change in changes:
        assert not config.is_same_but_for_denied(replace(config, **change))


@pytest.mark.parametrize(
    ("mode", "ipv6"), [("macvlan", False), ("macvlan", True), ("routed", False)]
)
def test_connections_end_with_the_slot(
    make_pool: MakePool, segment: lab.Segment, mode: str, ipv6: bool
) -> None:
    """Whatever the stage has left to send, and however it ended its side: the server knows at once, and so the
    address's next user finds nothing of it."""
    begun: list[int] = []
    ends: list[str] = []
    all_begun, all_ended = threading.Event(), threading.Event()

    def fill(connection: socket.socket) -> None:
        begun.append(1)
        number = len(begun)
        end = "closed"
        all_begun.wait(10)
        try:
            connection.settimeout(10)
            connection.sendall(b"x" * (1 << 20) if number % 2 else b"x")
            while connection.recv(1 << 16):
                pass
        except OSError as problem:
            end = type(problem).__name__
        ends.append(end)
        if len(ends) == 12:
            all_ended.set()

    address = lab.ipv6(lab.CACHE) if ipv6 else lab.CACHE
    policy = {
        "services": [
            {"to": [f"{address}/{128 if ipv6 else 32}"], "protocol": "tcp", "ports": [3143]}
        ]
    }
    changes = {"addresses": "10.77.0.0/28"} if mode == "routed" else {}
    if mode == "routed":
        with inside(segment.slave):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        segment.ip(segment.cache, f"route replace 10.77.0.0/28 via {lab.SLAVE}")
    pool = make_pool(
        mode=mode, policies={"cache": policy, "internet": policy}, **changes, ipv6=ipv6
    )
    limits = StageConstraints(network_bytes=Bytes(120_000), network_bytes_per_second=Bytes(2**30))
    with lab.serving(segment.cache, 3143, fill):
        opened = []
        with slot(pool, "cache", limits=limits) as taken, inside(taken.namespace):
            for _ in range(12):
                connection = socket.create_connection((address, 3143), 5)
                opened.append(connection)
            all_begun.set()
            # The control: the quota is used up, so that nothing but an ending gets out.
            end = time.monotonic() + 5
            while not taken.traffic().over_bytes and time.monotonic() < end:
                opened[0].send(b"y" * 1000)
                time.sleep(0.01)
            assert taken.traffic().over_bytes
            assert not ends
            for connection in opened[:6]:
                connection.close()
        all_ended.wait(2)
        assert ends == ["ConnectionResetError"] * 12
        for connection in opened:
            connection.close()


def test_what_is_refused_is_refused_at_once(make_pool: MakePool) -> None:
    """Also in a scan: by default the kernel sends 1,000 errors a second at most, and 50 at once."""
    unanswered = 0
    with slot(make_pool(), "cache") as taken, inside(taken.namespace):
        for port in range(1, 1501):
            with socket.socket() as connection:
                connection.settimeout(0.02)
                try:
                    connection.connect((lab.INTERNET, port))
                except TimeoutError:
                    unanswered += 1
                except OSError:
                    pass
    # A busy machine may be late now and then.
    assert unanswered < 15


def test_a_counter_that_somebody_took_away_is_named(make_pool: MakePool) -> None:
    pool = make_pool()
    with slot(pool, "cache") as taken:
        taken.traffic()
        with inside(taken.namespace):
            nft = Nft()
        nft.run("flush table inet cellblock")
        nft.run("delete counter inet cellblock refused")
        nft.close()
        with pytest.raises(HostSetupError, match="has lost its counters refused"):
            taken.traffic()
