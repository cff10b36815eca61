"""One flat network against several (N7): what segmentation alone gives, without rules on hosts.

As molecule/segmented_networks/inventory has it: slaves in front, databases and request handlers at
the back, masters and caches on both.
"""

from __future__ import annotations

from typing import Any

import lab

HOSTS = {"handler": 11, "database": 12, "memory": 13, "cache": 14, "master": 15, "gateway": 30}
BOTH, FRONT_ONLY = ("cache", "master", "gateway"), ("slave", "job")
OUTSIDE = "198.51.100.10"


def build(segmented: bool) -> tuple[dict[str, int], dict[str, list[tuple[str, str]]], lab.Wire]:
    """Namespaces, and for each host its addresses with the segment they are on."""
    front = lab.Wire(0)
    back = lab.Wire(1) if segmented else front
    spaces, addresses = {}, {}
    for name, host in {**HOSTS, "slave": 21}.items():
        spaces[name] = lab.new()
        wires = []
        if not segmented or name in (*BOTH, *FRONT_ONLY):
            wires.append((front, "eth0"))
        if segmented and name not in FRONT_ONLY:
            wires.append((back, "eth1"))
        for wire, interface in wires:
            wire.attach(spaces[name], host, interface)
        addresses[name] = [
            (wire.address(host), lab.link_local(spaces[name], interface))
            for wire, interface in wires
        ]
        gateway = wires[0][0].address(30)
        if name != "gateway":
            lab.sh(spaces[name], f"ip route add default via {gateway}")
        lab.serve(spaces[name])
    lab.sh(spaces["gateway"], f"ip address add {OUTSIDE}/32 dev lo")
    spaces["job"] = front.clone(spaces["slave"], 200, "private")
    lab.sh(spaces["job"], f"ip route add default via {front.address(30)}")
    return spaces, addresses, front


def reached(
    spaces: dict[str, int], addresses: dict[str, list[tuple[str, str]]], source: str
) -> dict[str, dict[str, bool]]:
    interface = {"job": "job0", "database": "eth1" if len(addresses["cache"]) > 1 else "eth0"}
    device = interface.get(source, "eth0")
    seen = {}
    for name in HOSTS:
        if name != source:
            seen[name] = {
                "IPv4": any(lab.reaches(spaces[source], v4) for v4, _ in addresses[name]),
                "fe80": any(lab.reaches(spaces[source], own, device) for _, own in addresses[name]),
            }
    seen["outside"] = {"IPv4": lab.reaches(spaces[source], OUTSIDE)}
    return seen


def experiment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout in ("flat", "segmented"):
        spaces, addresses, front = build(layout == "segmented")
        found[layout] = {
            source: reached(spaces, addresses, source) for source in ("job", "slave", "database")
        }
        if layout == "flat":
            continue
        # A gateway on both networks that forwards, as routers do.
        lab.sysctl(spaces["gateway"], "ipv4/ip_forward", "1")
        found["segmented, the gateway forwards"] = {"job": reached(spaces, addresses, "job")}
        lab.sysctl(spaces["gateway"], "ipv4/ip_forward", "0")
        # Whoever has root on a slave may send to a host on both networks what is for the back.
        lab.sh(spaces["slave"], f"ip route add 10.77.1.0/24 via {front.address(15)}")
        lab.sh(spaces["database"], "ip route add 10.77.0.0/24 via 10.77.1.15")
        past = {}
        for forwarding in ("0", "1"):
            lab.sysctl(spaces["master"], "ipv4/ip_forward", forwarding)
            past[f"ip_forward={forwarding} on the master"] = {
                "master's address at the back": lab.reaches(spaces["slave"], "10.77.1.15"),
                "database": lab.reaches(spaces["slave"], "10.77.1.12"),
            }
        found["segmented, slave routes by the master"] = past
    return found


if __name__ == "__main__":
    lab.main(experiment)
