"""Where do nftables rules see the traffic of a macvlan clone, and where does a drop stop it?

At one hook after the other: a rule that counts and drops what the clone sends or gets, and attempts
to connect from the clone, to the clone, and to a sibling clone.
"""

from __future__ import annotations

import json
from typing import Any

import lab

JOB, SIBLING = 200, 201


def experiment() -> dict[str, Any]:
    wire = lab.Wire()
    slave, database = lab.new(), lab.new()
    wire.attach(slave, 21)
    wire.attach(database, 12)
    job = wire.clone(slave, JOB, "bridge")
    sibling = wire.clone(slave, SIBLING, "bridge")
    # A container that is itself on a macvlan network, and a job in it that clones its interface.
    container = wire.clone(slave, 50, "bridge")
    nested = wire.clone(container, 202, "bridge", parent="job0")
    for namespace in (slave, database, job, sibling, container, nested):
        lab.serve(namespace)
    parent_of_nested = lab.sh(nested, "ip -o link show job0").split(":")[1].split("@")[1].strip()

    here = {"job": job, "sibling": sibling, "nested": nested, "database": database, "slave": slave}
    ways = {
        "job to database": ("job", wire.address(12)),
        "database to job": ("database", wire.address(JOB)),
        "job to sibling": ("job", wire.address(SIBLING)),
        "nested to database": ("nested", wire.address(12)),
    }
    control = {"slave to database": ("slave", wire.address(12))}
    chain = "chain c {{ type filter hook {hook} priority filter; {rules} }}\n"
    every = [wire.address(h) for h in (JOB, SIBLING, 202)]
    # IPv4 packets of the clones only: ARP and the hosts' own traffic go on.
    clones = ", ".join(every)
    rules = f"ip saddr {{ {clones} }} counter drop; ip daddr {{ {clones} }} counter drop;"
    hosts = f"ip saddr {wire.address(21)} counter drop;"
    hooks: dict[str, tuple[int, str, str]] = {
        "slave: inet output": (slave, "inet", "output"),
        "slave: inet input": (slave, "inet", "input"),
        "slave: inet forward": (slave, "inet", "forward"),
        "slave: inet prerouting": (slave, "inet", "prerouting"),
        "slave: netdev egress of the parent": (slave, "netdev", 'egress device "eth0"'),
        "slave: netdev ingress of the parent": (slave, "netdev", 'ingress device "eth0"'),
        "container: netdev egress of its macvlan": (container, "netdev", 'egress device "job0"'),
        "job's namespace: inet output": (job, "inet", "output"),
        "job's namespace: inet input": (job, "inet", "input"),
        "job's namespace: netdev egress": (job, "netdev", 'egress device "job0"'),
        "switch: bridge forward": (wire.namespace, "bridge", "forward"),
        "database: inet input": (database, "inet", "input"),
    }

    def attempt(way: tuple[str, str]) -> bool:
        return lab.reaches(here[way[0]], way[1])

    seen: dict[str, Any] = {"without rules": {w: attempt(ways[w]) for w in ways}, "hooks": {}}
    for name, (namespace, family, hook) in hooks.items():
        row = {}
        table = f"table {family} seen {{ {chain.format(hook=hook, rules=rules)} }}"
        for way, what in ways.items():
            lab.sh(namespace, "nft -f -", f"flush ruleset\n{table}")
            reached = attempt(what)
            listed = json.loads(lab.sh(namespace, "nft -j list table " + f"{family} seen"))
            packets = sum(
                part["counter"]["packets"]
                for entry in listed["nftables"]
                for part in entry.get("rule", {}).get("expr", [])
                if "counter" in part
            )
            row[way] = {"packets": packets, "stopped": not reached}
        lab.sh(namespace, "nft flush ruleset")
        seen["hooks"][name] = row
    # The same rule does stop the slave's own traffic at its own hook.
    table = f"table inet seen {{ {chain.format(hook='output', rules=hosts)} }}"
    lab.sh(slave, "nft -f -", table)
    seen["control: the slave's own traffic at its inet output"] = {
        "stopped": not attempt(control["slave to database"])
    }
    lab.sh(slave, "nft flush ruleset")
    seen["control: afterwards"] = {
        "everything is reached again": all(attempt(w) for w in [*ways.values(), *control.values()])
    }
    seen["the nested clone's parent"] = parent_of_nested
    return seen


if __name__ == "__main__":
    lab.main(experiment)
