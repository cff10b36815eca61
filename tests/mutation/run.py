"""Mutation test of the rules that isolate jobs: is there a rule whose loss nobody would notice?

    python tests/mutation/run.py [LAYER [MUTANT]]

One layer at a time, alone, in namespaces of a container without a network: mutants of its real text
are loaded, and only packets decide whether one is noticed. Exit status 1 lists the survivors.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

from equivalent import reason  # noqa: E402

from cellblock_fleet.jobs import job_network  # noqa: E402
from cellblock_fleet.model import NOT_INTERNET, parse_fleet  # noqa: E402
from cellblock_fleet.rules import host_rules  # noqa: E402

NUMBERS = {"handler1": 11, "database1": 12, "memory1": 13, "cache1": 14, "master1": 15,
           "slave1": 21, "slave2": 22}  # fmt: skip
GROUPS = {
    "request_handlers": ["handler1"],
    "databases": ["database1"],
    "memory_databases": ["memory1"],
    "cache_servers": ["cache1"],
    "worker_masters": ["master1"],
    "worker_slaves": ["slave1", "slave2"],
}
MUTATED = ("slave1", "database1", "cache1", "master1")


def facts() -> dict[str, Any]:
    """The tiny fleet, with the flows of inventory/local, and every text made of it."""
    declared = yaml.safe_load((ROOT / "inventory/local/group_vars/all/flows.yml").read_text())
    data: dict[str, Any] = {
        "groups": GROUPS,
        "addresses": {h: [f"10.213.0.{n}", f"fd00:cb::{n}"] for h, n in NUMBERS.items()},
        "services": declared["cellblock_services"],
        "networks": {
            # The last two are elsewhere: not behind the interface that is probed.
            "controllers": ["10.213.0.2", "fd00:cb::2", "10.99.0.5", "fd00:99::5"],
            "time_servers": ["198.51.100.123", "2001:db8:113::123"],
            "dns_upstreams": ["10.77.0.53", "fd00:77::53"],
        },
        "flows": declared["cellblock_flows"],
        "job_flows": declared["cellblock_job_flows"],
        "job_networks": {"slave1": "10.213.0.128/27"},
    }
    fleet = parse_fleet(data)
    jobs = job_network(fleet, "slave1", 4)
    policies = {name: p for name, p in jobs["policies"].items() if name != "none"}
    engine = {
        "mode": "macvlan",
        "parent": "cellblock0",
        "slots": 4,
        "addresses": "10.213.0.128/27",
        "prefix_length": 24,
        "gateway": "10.213.0.30",
        "mac_prefix": "02:cb:00",
        "resolvers": jobs["resolvers"],
        "denied": jobs["denied"],
        "policies": policies,
    }
    return {
        **data,
        "job_address": "10.213.0.128",
        "job_network": "10.213.0.128/27",
        "internet": ["198.51.100.10", "2001:db8:113::10"],
        "unroutable": ["10.99.0.5", "fd00:99::5"],
        "special": [str(network) for network in NOT_INTERNET],
        "engine": {**engine, "resolvers": [a for a in engine["resolvers"] if ":" not in a]},
        "firewalls": {host: firewall(host_rules(fleet, host)) for host in MUTATED},
    }


def firewall(rules: dict[str, Any]) -> str:
    """The text of role firewall, as Ansible would render it."""
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.tests["search"] = lambda value, pattern: bool(re.search(pattern, value))
    path = ROOT / "roles/firewall/templates/etc/cellblock/firewall.nft.j2"
    return environment.from_string(path.read_text()).render(
        firewall_rules=rules,
        firewall_ipv6_routers=["fe80::30"],
        firewall_dhcp_client=True,
        firewall_reverse_path="strict",
    )


def in_container(arguments: list[str], stdin: str) -> subprocess.Popen[str]:
    listed = ["docker", "image", "ls", "--quiet", "cellblock-host"]
    images = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    if not images:
        sys.exit("There is no image cellblock-host; run playbooks/local-fleet-create.yml first.")
    unconfined = [f"--security-opt={o}=unconfined" for o in ("seccomp", "apparmor", "systempaths")]
    capabilities = ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "DAC_OVERRIDE"]
    command = ["docker", "run", "--rm", "-i", "--network=none", "--cap-drop=ALL", *unconfined]
    command += [f"--cap-add={name}" for name in capabilities]
    command += [f"--volume={ROOT}/src:/src:ro", f"--volume={ROOT}/tests/mutation:/mutation:ro"]
    command += ["--env=PYTHONPATH=/src", "--env=PYTHONDONTWRITEBYTECODE=1", "--entrypoint=timeout"]
    command += [images[0], "600", "python3", "/mutation/inside.py", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    return process


def main() -> int:
    started = time.monotonic()
    process = in_container(sys.argv[1:], json.dumps(facts()))
    assert process.stdout is not None
    mutated = killed = excused = 0
    failed = []
    for line in process.stdout:
        layer = json.loads(line)
        survivors = []
        for where, what, rule in layer["survivors"]:
            if reason(layer["layer"], where, what, rule):
                excused += 1
            else:
                survivors.append(f"{layer['layer']}: {where}: {what}: {rule}")
        total = layer["killed"] + layer["refused_by_nft"] + len(layer["survivors"])
        mutated, killed = mutated + total, killed + layer["killed"] + layer["refused_by_nft"]
        print(
            f"{layer['layer']}: {layer['cells']} cells, {total} mutants, {layer['killed']} killed, "
            f"{layer['refused_by_nft']} refused by nft, {len(layer['survivors']) - len(survivors)} "
            f"equivalent, {len(survivors)} survived ({layer['seconds']} s)",
            flush=True,
        )
        failed += [f"survivor: {text}" for text in survivors]
        failed += [f"{layer['layer']}: without a mutation: {text}" for text in layer["control"]]
        if not layer["empty"]:
            failed.append(f"{layer['layer']}: an empty ruleset is not noticed")
        if len(sys.argv) > 2:
            failed += layer.get("refused", [])
    if process.wait():
        failed.append("the container failed")
    print(*failed, sep="\n")
    print(
        f"{mutated} mutants, {killed} killed, {excused} equivalent, {time.monotonic() - started:.0f} s"
    )
    return 1 if failed or not mutated else 0


if __name__ == "__main__":
    sys.exit(main())
