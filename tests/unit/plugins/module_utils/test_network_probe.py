"""The prober with real sockets: on loopback, and between two throw-away network namespaces.

In the namespaces packets are dropped, rejected and let through by routing rules, because nft need
not be there. Every probe that must find nothing has a twin that must find something.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _network_listener as listener,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import _network_probe as prober

COLLECTIONS = Path(__file__).parents[4] / "collections"

Lab = Callable[..., Any]


def one(target: dict[str, Any], timeout_ms: int = 500) -> dict[str, Any]:
    (result,) = prober.probe([{"id": "t", **target}], timeout_ms)
    return result


@pytest.fixture
def tcp_server() -> Iterator[Callable[[bytes], int]]:
    """Starts a server on loopback that greets with the bytes given; returns its port."""
    servers: list[socket.socket] = []

    def start(greeting: bytes) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve() -> None:
            try:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(greeting)
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        return int(server.getsockname()[1])

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[str]:
    directory = str(tmp_path / "probe")
    yield directory
    listener.collect(directory)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# On loopback.


def test_an_open_port_and_what_its_service_says(tcp_server: Callable[[bytes], int]) -> None:
    port = tcp_server(b"SSH-2.0-x\r\nmore")
    result = one({"address": "127.0.0.1", "protocol": "tcp", "port": port})
    assert result["outcome"] == "open"
    assert result["evidence"].endswith(", it said 'SSH-2.0-x'")
    assert (result["source"], result["source_port"] > 0) == ("127.0.0.1", True)


def test_what_a_hostile_service_says_is_escaped_and_cut(
    tcp_server: Callable[[bytes], int],
) -> None:
    port = tcp_server(b"\x1b[2J<b>\\\xff" + b"x" * 500)
    evidence = one({"address": "127.0.0.1", "protocol": "tcp", "port": port})["evidence"]
    assert "it said '\\x1b[2J<b>\\x5c\\xffxxx" in evidence
    assert evidence.isascii()
    assert len(evidence) < 120


def test_a_silent_service_is_open_all_the_same(tcp_server: Callable[[bytes], int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = {"address": "127.0.0.1", "protocol": "tcp", "port": server.getsockname()[1]}
        assert one(target)["outcome"] == "open"


def test_a_closed_port_refuses() -> None:
    for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
        result = one({"address": "127.0.0.1", "protocol": protocol, "port": free_port(kind)})
        assert result["outcome"] == "refused", protocol
    assert result["evidence"].startswith("ICMP port unreachable from 127.0.0.1 in ")


def test_a_datagram_is_sent_twice_and_silence_is_filtered() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        target = {"address": "127.0.0.1", "protocol": "udp", "port": sock.getsockname()[1]}
        result = one(target, 200)
        first, second = sock.recv(100), sock.recv(100)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
    assert first == second
    assert prober.digest(first) == result["payload"]
    assert (result["outcome"], result["evidence"]) == ("filtered", "no answer in 200 ms")


@pytest.mark.parametrize("kind", prober.PAYLOADS)
def test_every_payload_gets_its_answer_and_answers_get_none(kind: str) -> None:
    message, key = prober.payload(kind)
    answer = prober.answer_to(kind, message)
    assert answer is not None
    assert key in answer
    # Two listeners must not talk to each other forever, whoever forged the first datagram.
    for other in prober.PAYLOADS:
        assert prober.answer_to(other, answer) is None
    assert prober.payload(kind)[0] != message


def test_a_name_query_is_valid() -> None:
    message, _ = prober.payload("dns")
    assert message[2:12] == bytes.fromhex("0100 0001 0000 0000 0000")
    assert message[12] == 16
    assert message[29:] == b"\x07invalid\x00\x00\x02\x00\x01"


def test_an_own_address_that_is_none_is_an_error_and_not_silence() -> None:
    target = {"address": "127.0.0.1", "protocol": "tcp", "port": 1, "source": "192.0.2.9"}
    result = one(target)
    assert (result["outcome"], result["evidence"]) == (
        "error",
        "192.0.2.9 is no address of this host (EADDRNOTAVAIL)",
    )


def test_an_interface_that_is_none_is_an_error() -> None:
    target = {"address": "fe80::1", "protocol": "icmp", "interface": "nosuch0"}
    assert one(target)["outcome"] == "error"


def test_more_targets_than_files_are_tried_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "_raise_file_limit", lambda: prober._SPARE_FILES + 2)
    port = free_port()
    targets = [
        {"id": str(n), "address": "127.0.0.1", "protocol": "tcp", "port": port} for n in range(5)
    ]
    assert [result["id"] for result in prober.probe(targets, 500)] == list("01234")


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ({"address": "slave1", "protocol": "icmp"}, "address 'slave1' is not an IPv4"),
        ({"address": "192.0.2.1", "protocol": "tcp"}, "port is missing; tcp needs one"),
        ({"address": "192.0.2.1", "protocol": "udp", "port": 0}, "port is 0"),
        ({"address": "192.0.2.1", "protocol": "neighbour"}, "interface is missing"),
        ({"address": "192.0.2.1", "protocol": "spoofed_icmp"}, "source is missing"),
        (
            {"address": "192.0.2.1", "protocol": "spoofed_icmp", "source": "2001:db8::1"},
            "source 2001:db8::1 is not of the same kind",
        ),
        (
            {
                "address": "192.0.2.1",
                "protocol": "spoofed_frame",
                "source": "192.0.2.2",
                "interface": "eth0",
                "mac": "02:42",
            },
            "mac '02:42' is no hardware address",
        ),
    ],
)
def test_targets_that_make_no_sense(target: dict[str, Any], named: str) -> None:
    with pytest.raises(prober.ProbeError) as caught:
        prober.check_targets([{"id": "t", **target}])
    assert str(caught.value).startswith(f"target t: {named}")


def test_ids_must_differ() -> None:
    target = {"id": "t", "address": "192.0.2.1", "protocol": "icmp"}
    prober.check_targets([target])
    with pytest.raises(prober.ProbeError):
        prober.check_targets([target, target])


def test_checksum_of_rfc_1071() -> None:
    assert prober.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    packet = prober._ip_packet(
        ipaddress.ip_address("192.0.2.1"),
        ipaddress.ip_address("192.0.2.2"),
        9,
        b"odd",
    )
    assert prober.checksum(packet[:20]) == 0


# The listener.


def test_listener_answers_and_tells_what_came(state_dir: str) -> None:
    tcp, udp = free_port(), free_port(socket.SOCK_DGRAM)
    started = listener.listen(
        [
            {"id": "a", "protocol": "tcp", "port": tcp},
            {"id": "b", "protocol": "udp", "port": udp},
        ],
        20,
        state_dir,
    )
    assert {(entry["id"], entry["ipv4"]) for entry in started["listeners"]} == {
        ("a", "listening"),
        ("b", "listening"),
    }
    results = prober.probe(
        [
            {"id": "a", "address": "127.0.0.1", "protocol": "tcp", "port": tcp},
            {"id": "b", "address": "127.0.0.1", "protocol": "udp", "port": udp},
        ],
        2000,
    )
    assert [result["outcome"] for result in results] == ["open", "open"]
    assert results[1]["evidence"].endswith("by a listener of the prober")
    told = listener.collect(state_dir)
    assert (told["was_running"], told["handle"]) == (True, started["handle"])
    received = {entry["listener"]: entry for entry in told["received"]}
    assert received["b"]["payload"] == results[1]["payload"]
    assert received["b"]["source_port"] == results[1]["source_port"]
    assert received["a"]["source_port"] == results[0]["source_port"]
    assert not Path(state_dir).exists()


def test_the_port_of_a_service_is_left_to_it(
    state_dir: str, tcp_server: Callable[[bytes], int]
) -> None:
    taken = tcp_server(b"mine")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        # A service that would share its port with whoever asks, and so lose its datagrams.
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind(("0.0.0.0", 0))
        udp = service.getsockname()[1]
        started = listener.listen(
            [
                {"id": "a", "protocol": "tcp", "port": taken},
                {"id": "b", "protocol": "udp", "port": udp},
                {"id": "free", "protocol": "tcp", "port": free_port()},
            ],
            20,
            state_dir,
        )
    assert [entry["ipv4"] for entry in started["listeners"]] == ["busy", "busy", "listening"]
    result = one({"address": "127.0.0.1", "protocol": "tcp", "port": taken})
    assert result["evidence"].endswith("it said 'mine'")


def test_listener_ends_by_itself_and_leaves_nothing(state_dir: str) -> None:
    port = free_port()
    listener.listen([{"id": "a", "protocol": "tcp", "port": port}], 1, state_dir)
    target = {"address": "127.0.0.1", "protocol": "tcp", "port": port}
    assert one(target)["outcome"] == "open"
    assert Path(state_dir).exists()
    assert eventually(lambda: not Path(state_dir).exists(), 4)
    assert one(target)["outcome"] == "refused"
    assert listener.collect(state_dir)["was_running"] is False


def test_an_expected_answer_is_waited_for_longer() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as slow:
        slow.bind(("127.0.0.1", 0))

        def answer_late() -> None:
            begun = time.monotonic()
            came = {slow.recvfrom(100)[1] for _ in range(2)}
            time.sleep(max(0.0, begun + 0.6 - time.monotonic()))
            for peer in came:
                slow.sendto(b"late", peer)

        threading.Thread(target=answer_late, daemon=True).start()
        target = {"address": "127.0.0.1", "protocol": "udp", "port": slow.getsockname()[1]}
        targets = [{"id": "expected", **target, "expected": True}, {"id": "other", **target}]
        results = {r["id"]: r for r in prober.probe(targets, 300)}
    assert results["expected"]["outcome"] == "open"
    assert 500 < results["expected"]["elapsed_ms"] < prober.PATIENCE * 300
    assert results["other"]["outcome"] == "filtered"
    assert results["other"]["elapsed_ms"] < 500


def test_listening_twice_goes_on_and_with_others_starts_anew(state_dir: str) -> None:
    first = [{"id": "a", "protocol": "tcp", "port": free_port()}]
    begun = listener.listen(first, 1, state_dir)
    again = listener.listen(first, 20, state_dir)
    assert again == begun
    time.sleep(1.5)  # its first time would be over
    other = [{"id": "b", "protocol": "tcp", "port": free_port()}]
    assert listener._ask(state_dir, {"do": "renew", "listeners": other, "duration_s": 20})
    changed = listener.listen(other, 20, state_dir)
    assert changed["handle"] != begun["handle"]
    refused = {"address": "127.0.0.1", "protocol": "tcp", "port": first[0]["port"]}
    assert one(refused)["outcome"] == "refused"


def test_what_a_killed_listener_leaves_is_removed(state_dir: str) -> None:
    listener.listen([{"id": "a", "protocol": "tcp", "port": free_port()}], 20, state_dir)
    pid = peer_of(f"{state_dir}/control")
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: listener._ask(state_dir, {"do": "collect"}) is None, 20)
    assert Path(state_dir).exists()
    assert listener.collect(state_dir)["was_running"] is False
    assert not Path(state_dir).exists()


def test_a_listener_that_is_told_to_end_leaves_nothing(state_dir: str) -> None:
    listener.listen([{"id": "a", "protocol": "tcp", "port": free_port()}], 20, state_dir)
    os.kill(peer_of(f"{state_dir}/control"), signal.SIGTERM)
    assert eventually(lambda: not Path(state_dir).exists(), 20)


def test_nothing_to_listen_on_starts_nothing(state_dir: str) -> None:
    assert listener.listen([], 20, state_dir) == {"handle": None, "listeners": []}
    assert not Path(state_dir).exists()


def peer_of(path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    # Those of who called listen(): the process that started it, whose child it is not any more.
    owner = int.from_bytes(credentials[:4], sys.byteorder)
    candidates: list[int] = []

    def is_found() -> bool:
        # Not the process in between, which may not have ended yet.
        candidates[:] = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and int(entry.name) != owner and holds(entry, path)
            if parent_of(entry) != owner
        ]
        return len(candidates) == 1

    assert eventually(is_found, 20), candidates
    return candidates[0]


def parent_of(process: Path) -> int:
    """Its parent's process id; that of a process which has ended is not known."""
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def holds(process: Path, path: str) -> bool:
    """Whether a process has the listening socket at ``path`` open."""
    inodes = {
        line.split()[6]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if line.endswith(f" {path}")
    }
    try:
        links = {os.readlink(entry) for entry in (process / "fd").iterdir()}
    except OSError:
        return False
    return any(f"socket:[{inode}]" in links for inode in inodes)


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


# Between two namespaces.

IP = shutil.which("ip")
IN_NAMESPACE = """
import json, sys
from ansible_collections.cellblock.fleet.plugins.module_utils import _network_listener as listener
from ansible_collections.cellblock.fleet.plugins.module_utils import _network_probe as prober
import time
name, arguments = json.loads(sys.argv[1])
function = getattr(listener if hasattr(listener, name) else prober, name)
begun = time.monotonic()
returned = function(*arguments)
print(json.dumps([time.monotonic() - begun, returned]))
"""
OPEN, DROPPED, REJECTED, UNREACHABLE, HALF, IPV4_ONLY, CLOSED = range(8001, 8008)
PORTS = (OPEN, DROPPED, REJECTED, UNREACHABLE, HALF, IPV4_ONLY)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two namespaces, ``a`` (192.0.2.1) and ``b`` (192.0.2.2), and what is open between them.

    ``lab("a", "probe", targets, timeout)`` calls a function of the prober in one of them.
    """
    if os.geteuid() != 0 or IP is None:
        pytest.skip("needs root and iproute2, to make network namespaces")
    holders = {
        name: subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 300"], stdout=-1)
        for name in ("a", "b")
    }

    def inside(name: str, *command: str) -> str:
        pid = str(holders[name].pid)
        done = subprocess.run(
            ["nsenter", "-t", pid, "-n", *command],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        )
        return done.stdout

    try:
        for holder in holders.values():
            assert holder.stdout is not None
            holder.stdout.readline()  # it is in its namespace now
        inside("a", *f"ip link add va type veth peer name vb netns {holders['b'].pid}".split())
        for name, number in (("a", 1), ("b", 2)):
            for line in (
                "link set lo up",
                f"link set v{name} address 02:00:00:00:00:0{number} up",
                f"address add 192.0.2.{number}/24 dev v{name}",
                f"address add 2001:db8::{number}/64 dev v{name} nodad",
                f"address add fe80::{number}/64 dev v{name} nodad",
                # Packets that wait for the other end's address come too late on a busy machine.
                *(
                    f"neighbour add {address}{3 - number} dev v{name}"
                    f" lladdr 02:00:00:00:00:0{3 - number} nud permanent"
                    for address in ("192.0.2.", "2001:db8::", "fe80::")
                ),
            ):
                inside(name, "ip", *line.split())
        # Or else a kernel sends few refusals per second to one host.
        for path in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):
            inside("b", "sh", "-c", f"echo 0 > /proc/sys/net/{path}")
        for family in ("-4", "-6"):
            # The table of own addresses comes first of all, unless it is moved.
            for name in ("a", "b"):
                inside(name, "ip", family, *"rule add pref 100 lookup local".split())
                inside(name, "ip", family, *"rule del pref 0".split())
            for protocol in ("tcp", "udp"):
                for port, what in (
                    (DROPPED, "blackhole"),
                    (REJECTED, "prohibit"),
                    (UNREACHABLE, "unreachable"),
                    *(((IPV4_ONLY, "blackhole"),) if family == "-4" else ()),
                ):
                    rule = f"rule add pref 10 iif vb ipproto {protocol} dport {port} {what}"
                    inside("b", "ip", family, *rule.split())
                rule = f"rule add pref 10 iif va ipproto {protocol} sport {HALF} blackhole"
                inside("a", "ip", family, *rule.split())

        def call(name: str, function: str, *arguments: Any) -> Any:
            asked = json.dumps([function, arguments])
            call.took, returned = json.loads(  # type: ignore[attr-defined]
                inside(name, sys.executable, "-c", IN_NAMESPACE, asked)
            )
            return returned

        state = str(tmp_path_factory.mktemp("lab") / "probe")
        call.state = state  # type: ignore[attr-defined]
        yield call
    finally:
        for holder in holders.values():
            holder.kill()
            holder.wait()


@pytest.fixture
def served(lab: Lab) -> Iterator[Lab]:
    """The lab, with every port of b served; ``collect`` returns what came in."""
    state = lab.state  # type: ignore[attr-defined]
    listeners = [
        {"id": f"{protocol}{port}", "protocol": protocol, "port": port}
        for protocol in ("tcp", "udp")
        for port in PORTS
    ]
    listeners.append({"id": "echo", "protocol": "icmp"})
    lab("b", "listen", listeners, 60, state)

    def collect() -> Any:
        # On a busy machine what was sent takes a moment to be where it is counted.
        time.sleep(1)
        return lab("b", "collect", state)

    lab.collect = collect  # type: ignore[attr-defined]
    yield lab
    lab("b", "collect", state)


def outcomes(lab: Lab, address: str, protocol: str, **more: Any) -> dict[int, str]:
    targets = [
        {"id": str(port), "address": address, "protocol": protocol, "port": port, **more}
        for port in (*PORTS, CLOSED)
    ]
    # A TCP socket that is still sending when the refusal comes hears only that of the second SYN.
    timeout_ms = 1400 if protocol == "tcp" else 600
    return {int(r["id"]): r["outcome"] for r in lab("a", "probe", targets, timeout_ms)}


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2", "fe80::2"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_outcomes_across_a_link(served: Lab, protocol: str, address: str) -> None:
    more = {"interface": "va"} if address.startswith("fe80") else {}
    is_v4 = address == "192.0.2.2"
    assert outcomes(served, address, protocol, **more) == {
        OPEN: "open",
        DROPPED: "filtered",
        REJECTED: "unreachable",
        UNREACHABLE: "unreachable",
        HALF: "filtered",
        # Rules that forget IPv6 are seen through, also over link-local addresses.
        IPV4_ONLY: "filtered" if is_v4 else "open",
        CLOSED: "refused",
    }


def test_what_arrived_without_an_answer_is_known(served: Lab) -> None:
    targets = [
        {"id": f"{protocol}{port}", "address": "192.0.2.2", "protocol": protocol, "port": port}
        for protocol in ("tcp", "udp")
        for port in (OPEN, HALF, DROPPED)
    ]
    results = {r["id"]: r for r in served("a", "probe", targets, 700)}
    told = served.collect()  # type: ignore[attr-defined]
    payloads = {entry["payload"] for entry in told["received"]}
    assert results[f"udp{OPEN}"]["payload"] in payloads
    assert results[f"udp{HALF}"]["payload"] in payloads
    assert results[f"udp{DROPPED}"]["payload"] not in payloads
    half = results[f"tcp{HALF}"]
    assert told["half_open"] == [
        {"source": "192.0.2.1", "source_port": half["source_port"], "port": HALF}
    ]


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2", "fe80::2"])
def test_echo(served: Lab, address: str) -> None:
    target = {"id": "e", "address": address, "protocol": "icmp", "interface": "va"}
    (result,) = served("a", "probe", [target], 1000)
    assert result["outcome"] == "open"
    told = served.collect()  # type: ignore[attr-defined]
    assert result["payload"] in {entry["payload"] for entry in told["received"]}


def test_what_this_host_itself_cannot_send(lab: Lab) -> None:
    targets = [
        {"id": "no route", "address": "203.0.113.1", "protocol": "udp", "port": 9},
        {"id": "no route tcp", "address": "203.0.113.1", "protocol": "tcp", "port": 9},
        {"id": "nobody", "address": "192.0.2.77", "protocol": "udp", "port": 9},
        {"id": "no interface", "address": "fe80::2", "protocol": "udp", "port": 9},
    ]
    results = {r["id"]: r for r in lab("a", "probe", targets, 4000)}
    for name in ("no route", "no route tcp"):
        assert results[name]["outcome"] == "unreachable"
        assert "this host has no route" in results[name]["evidence"]
    assert results["nobody"]["outcome"] == "unreachable"
    assert "this host itself (no neighbour answered)" in results["nobody"]["evidence"]
    assert results["no interface"]["outcome"] != "filtered"


def test_neighbours(lab: Lab) -> None:
    targets = [
        {"id": address, "address": address, "protocol": "neighbour", "interface": "va"}
        for address in ("192.0.2.2", "192.0.2.77", "2001:db8::2", "fe80::2", "2001:db8::77")
    ]
    results = {r["id"]: r for r in lab("a", "probe", targets, 800)}
    for address in ("192.0.2.2", "2001:db8::2", "fe80::2"):
        assert results[address]["outcome"] == "open"
        assert results[address]["mac"] == "02:00:00:00:00:02"
    for address in ("192.0.2.77", "2001:db8::77"):
        assert results[address]["outcome"] == "filtered"


@pytest.mark.parametrize(
    ("address", "forged"), [("192.0.2.2", "192.0.2.66"), ("2001:db8::2", "2001:db8::66")]
)
def test_forged_packets_arrive_with_their_forged_source(
    served: Lab, address: str, forged: str
) -> None:
    common = {"address": address, "source": forged, "interface": "va", "mac": "02:00:00:00:00:02"}
    frame = {**common, "protocol": "spoofed_frame", "source_mac": "02:00:00:00:00:66"}
    targets = [
        {"id": "udp", **common, "protocol": "spoofed_udp", "port": OPEN},
        {"id": "dropped", **common, "protocol": "spoofed_udp", "port": DROPPED},
        {"id": "icmp", **common, "protocol": "spoofed_icmp"},
        {"id": "frame", **frame, "port": OPEN},
        {"id": "frame echo", **frame},
        {"id": "frame dropped", **frame, "port": DROPPED},
        {"id": "honest", "address": address, "protocol": "udp", "port": OPEN},
    ]
    results = {r["id"]: r for r in served("a", "probe", targets, 800)}
    assert {r["outcome"] for n, r in results.items() if n != "honest"} == {"sent"}
    told = served.collect()  # type: ignore[attr-defined]
    sources = {entry["payload"]: entry["source"] for entry in told["received"]}
    for name in ("udp", "icmp", "frame", "frame echo"):
        assert sources.get(results[name]["payload"]) == forged, name
    for name in ("dropped", "frame dropped"):
        assert results[name]["payload"] not in sources
    assert sources[results["honest"]["payload"]] != forged


def test_interfaces(lab: Lab) -> None:
    (found,) = lab("a", "interfaces")
    assert (found["name"], found["mac"]) == ("va", "02:00:00:00:00:01")
    assert {"address": "192.0.2.1", "prefix_length": 24} in found["addresses"]
    assert {"address": "fe80::1", "prefix_length": 64} in found["addresses"]
    assert {"127.0.0.1", "192.0.2.1", "fe80::1"} <= set(lab("a", "own_addresses"))


def test_a_hundred_targets_take_no_longer_than_the_slowest(served: Lab) -> None:
    targets = [
        {
            "id": str(number),
            "address": "192.0.2.2",
            "protocol": ("tcp", "udp")[number % 2],
            "port": OPEN if number < 20 else DROPPED,
        }
        for number in range(100)
    ]
    results = served("a", "probe", targets, 1500)
    assert [r["outcome"] for r in results] == ["open"] * 20 + ["filtered"] * 80
    assert served.took < 2.0  # type: ignore[attr-defined]
