"""Modes of macvlan clones: who reaches whom, with a switch that does and does not reflect frames."""

from __future__ import annotations

from typing import Any

import lab


def experiment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for hairpin in ("off", "on"):
        for mode in ("private", "bridge", "vepa"):
            wire = lab.Wire()
            slave, database = lab.new(), lab.new()
            wire.attach(slave, 21)
            wire.attach(database, 12)
            lab.sh(wire.namespace, f"bridge link set dev p21 hairpin {hairpin}")
            job, sibling = wire.clone(slave, 200, mode), wire.clone(slave, 201, mode)
            spaces = {"job": job, "sibling": sibling, "slave": slave, "database": database}
            for namespace in spaces.values():
                lab.serve(namespace)
            targets = {
                name: (
                    wire.address({"job": 200, "sibling": 201, "slave": 21, "database": 12}[name]),
                    lab.link_local(space, "job0" if name in ("job", "sibling") else "eth0"),
                )
                for name, space in spaces.items()
            }
            row = {}
            for source, target in (
                *(("job", "database"), ("database", "job"), ("job", "sibling")),
                *(("job", "slave"), ("slave", "job")),
            ):
                interface = "job0" if source == "job" else "eth0"
                v4, local = targets[target]
                row[f"{source} to {target}"] = {
                    "IPv4": lab.reaches(spaces[source], v4),
                    "fe80": lab.reaches(spaces[source], local, interface),
                }
            found.setdefault(f"reflecting switch port {hairpin}", {})[mode] = row
    return found


if __name__ == "__main__":
    lab.main(experiment)
