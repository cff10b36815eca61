"""Slots by macvlan against slots by routed veth pairs: reachability, latency, throughput.

Runs alternate, so that a busy machine slows both; figures are medians.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from typing import Any

import lab

RUNS, SECONDS, ROUNDS = 11, 0.5, 2000
SINK, ECHO = 7001, 7002


def server(namespace: int) -> None:
    """In a process of its own: reads what comes, or answers each byte."""
    if os.fork():
        return
    with lab.inside(namespace):
        sink, echo = (socket.create_server(("", port), backlog=64) for port in (SINK, ECHO))
        if os.fork():
            while True:
                connection, _ = sink.accept()
                while connection.recv(1 << 20):
                    pass
        while True:
            connection, _ = echo.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(1):
                connection.sendall(data)


def connected(namespace: int, address: str, port: int) -> socket.socket:
    with lab.inside(namespace):
        made = socket.socket()
    made.settimeout(20)
    made.connect((address, port))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def throughput(namespace: int, address: str) -> float:
    """Gbit/s that the job can send."""
    data = bytes(1 << 18)
    with connected(namespace, address, SINK) as connection:
        started, sent = time.monotonic(), 0
        while (now := time.monotonic()) < started + SECONDS:
            sent += connection.send(data)
        return sent * 8 / (now - started) / 1e9


def latency(namespace: int, address: str) -> float:
    """Median of a byte's way there and back, in microseconds."""
    times = []
    with connected(namespace, address, ECHO) as connection:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def routed(slave: int, number: int) -> int:
    made = lab.new()
    lab.sh(slave, f"ip link add cbj{number} type veth peer name job0 netns {lab.path(made)}")
    lab.sh(slave, f"ip link set cbj{number} up")
    lab.sh(slave, f"ip address add 169.254.203.1/32 dev cbj{number}")
    lab.sh(slave, f"ip route add 10.77.9.{number}/32 dev cbj{number}")
    lab.sh(made, "ip link set job0 up")
    lab.sh(made, f"ip address add 10.77.9.{number}/32 dev job0")
    lab.sh(made, "ip route add default via 169.254.203.1 dev job0 onlink")
    return made


def experiment() -> dict[str, Any]:
    wire = lab.Wire()
    slave, database = lab.new(), lab.new()
    wire.attach(slave, 21)
    wire.attach(database, 12)
    lab.sh(database, f"ip route add 10.77.9.0/24 via {wire.address(21)}")
    lab.sysctl(slave, "ipv4/ip_forward", "1")
    modes = {
        "macvlan": (wire.clone(slave, 200, "private"), wire.clone(slave, 201, "private")),
        "routed": (routed(slave, 1), routed(slave, 2)),
    }
    siblings = {"macvlan": wire.address(201), "routed": "10.77.9.2"}
    for namespace in (slave, database, *(pair[1] for pair in modes.values())):
        lab.serve(namespace)
    server(database)
    time.sleep(0.3)
    drop = 'ip saddr { 10.77.0.200, 10.77.9.1 } drop; meta nfproto ipv6 iifname "cbj*" drop;'
    rules = (
        f"table inet host {{ chain i {{ type filter hook input priority filter; {drop} }}\n"
        f" chain f {{ type filter hook forward priority filter; {drop} }}\n }}"
    )
    found: dict[str, Any] = {"reached": {}, "throughput Gbit/s": {}, "latency us": {}}
    for rule, text in (("no rules", ""), ("slave's inet input and forward drop the job", rules)):
        lab.sh(slave, "nft -f -", f"flush ruleset\n{text}")
        for mode, (job, _) in modes.items():
            found["reached"].setdefault(rule, {})[mode] = {
                "database": lab.reaches(job, wire.address(12)),
                "database, fe80": lab.reaches(job, lab.link_local(database, "eth0"), "job0"),
                "slave": lab.reaches(job, wire.address(21)),
                "sibling": lab.reaches(job, siblings[mode]),
            }
    lab.sh(slave, "nft flush ruleset")
    figures: dict[str, dict[str, list[float]]] = {}
    for run in range(RUNS):
        for mode in sorted(modes, reverse=run % 2 == 1):
            seen = figures.setdefault(mode, {"throughput Gbit/s": [], "latency us": []})
            seen["throughput Gbit/s"].append(throughput(modes[mode][0], wire.address(12)))
            seen["latency us"].append(latency(modes[mode][0], wire.address(12)))
    for mode, seen in figures.items():
        for what, values in seen.items():
            found[what][mode] = {
                "median": round(statistics.median(values), 2),
                "least": round(min(values), 2),
                "most": round(max(values), 2),
                "runs": len(values),
            }
    return found


if __name__ == "__main__":
    lab.main(experiment)
