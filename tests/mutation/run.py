"""Mutation test of the rules that isolate jobs: is there a rule whose loss nobody would notice?

    python tests/mutation/run.py [LAYER [MUTANT]]

Each layer alone, in namespaces of a container without a network: mutants of its real text are loaded,
and only packets decide whether one is noticed. Exit status 1 lists the survivors.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

import equivalent  # noqa: E402

from cellblock.fleet.jobs import job_network  # noqa: E402
from cellblock.fleet.model import parse_fleet  # noqa: E402
from cellblock.job_network.guard import GuardedHost, guard_rules  # noqa: E402
from cellblock.job_network.plan import SPECIAL_NETWORKS, probe_mac  # noqa: E402
from cellblock.job_network.section import (  # noqa: E402
    NetworkConfig,
    SegmentEnd,
    compose_section,
)

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
MUTATED = ["slave1", "master1", "cache1", "database1"]  # the longest first
SLOTS, GUARDED_SLOTS = 4, 2
RANGE, IPV6_PREFIX = "10.213.0.128/27", "fd00:cb::/64"
END = SegmentEnd("cellblock0", 24, "10.213.0.30")
SLOTS_IPV6: dict[str, Any] = {"ipv6_prefix_length": 64, "ipv6_gateway": "fd00:cb::30"}
GUARDED_IPV6: dict[str, Any] = {"ipv6_prefix_length": 64, "ipv6_gateway": "fe80::30"}
TIME_LIMIT_S = 900


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
        "job_networks": {"slave1": RANGE},
        "worker_containers": ["slave2"],
    }
    with_ipv6 = {**data, "job_ipv6_prefixes": {"slave1": IPV6_PREFIX}}
    jobs = job_network(parse_fleet(data), "slave1")
    ipv6_jobs = job_network(parse_fleet(with_ipv6), "slave1")
    return {
        **data,
        **prepared(data, with_ipv6),
        "guards": guards(jobs, END),
        "ipv6_guards": guards(ipv6_jobs, replace(END, **GUARDED_IPV6)),
        "probe_mac": probe_mac(RANGE),
        "job_address": "10.213.0.128",
        "job_network": RANGE,
        "internet": ["198.51.100.10", "2001:db8:113::10"],
        "unroutable": ["10.99.0.5", "fd00:99::5"],
        "special": [str(network) for network in SPECIAL_NETWORKS],
        "ipv6_prefix": IPV6_PREFIX,
        "engine": compose_section(jobs, SLOTS, END),
        "ipv6_engine": compose_section(ipv6_jobs, SLOTS, replace(END, **SLOTS_IPV6)),
    }


def guards(declared: Mapping[str, Any], end: SegmentEnd) -> dict[str, str]:
    """The rules around all jobs of a slave, by the mode."""
    host = GuardedHost("slave1", "eth0", ["10.213.0.21", "10.213.0.29"])
    sections = {
        "macvlan": compose_section(declared, GUARDED_SLOTS, end),
        "routed": compose_section(declared, GUARDED_SLOTS, None),
    }
    return {
        mode: guard_rules(NetworkConfig.parse(section, mode), host)
        for mode, section in sections.items()
    }


def prepared(data: Mapping[str, Any], with_ipv6: Mapping[str, Any]) -> dict[str, Any]:
    """The host image and the firewalls that Ansible makes of the fleet ``data``, and of the one whose jobs
    have IPv6: see prepare.yml."""
    with tempfile.TemporaryDirectory() as directory:
        output, options = Path(directory) / "output.json", Path(directory) / "options.json"
        given = {
            "mutation_fleet": data,
            "mutation_ipv6_fleet": with_ipv6,
            "mutation_hosts": MUTATED,
            "mutation_output": str(output),
        }
        options.write_text(json.dumps(given))
        playbook = ROOT / "tests/mutation/prepare.yml"
        command = ["ansible-playbook", "-i", "inventory/local", str(playbook), "-e", f"@{options}"]
        if shutil.which(command[0]) is None:
            sys.exit(f"There is no {command[0]} here; run make setup and activate .venv.")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\nThe rules could not be made: see above.")
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def in_container(image: str, arguments: list[str], stdin: str) -> subprocess.Popen[str]:
    unconfined = [f"--security-opt={o}=unconfined" for o in ("seccomp", "apparmor", "systempaths")]
    capabilities = ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "DAC_OVERRIDE"]
    command = ["docker", "run", "--rm", "-i", "--network=none", "--cap-drop=ALL", *unconfined]
    command += [f"--cap-add={name}" for name in capabilities]
    command += [f"--volume={ROOT}/src:/src:ro", f"--volume={ROOT}/tests/mutation:/mutation:ro"]
    command += ["--env=PYTHONPATH=/src", "--env=PYTHONDONTWRITEBYTECODE=1", "--entrypoint=timeout"]
    command += [image, str(TIME_LIMIT_S), "python3", "/mutation/inside.py", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    return process


COLUMNS = ("cells", "mutants", "killed", "refused", "equivalent", "survived")


def row(name: str, numbers: Sequence[int], seconds: float) -> str:
    return (
        f"{name:32}"
        + "".join(f"{n:>{len(c) + 2}}" for n, c in zip(numbers, COLUMNS, strict=True))
        + (f"{seconds:8.1f} s")
    )


def main() -> int:
    started = time.monotonic()
    data = facts()
    process = in_container(data.pop("image"), sys.argv[1:], json.dumps(data))
    assert process.stdout is not None
    totals = [0] * len(COLUMNS)
    failed: list[str] = []
    unused = equivalent.reasons()
    cpu = 0.0
    print(f"{'layer':36}" + "".join(f"  {name}" for name in COLUMNS) + "      time", flush=True)
    for line in process.stdout:
        layer = json.loads(line)
        name = layer["layer"]
        counts = [len(layer[key]) for key in ("killed", "refused", "equivalent", "survivors")]
        numbers = [layer["cells"], sum(counts) + len(layer["not equivalent"]), *counts]
        numbers[2] += len(layer["not equivalent"])
        totals = [a + b for a, b in zip(totals, numbers, strict=True)]
        cpu += layer["cpu"]
        print(row(name, numbers, layer["seconds"]), flush=True)
        unused -= {m[3] for m in layer["equivalent"]}
        failed += [f"survivor: {name}: {': '.join(m[:3])}" for m in layer["survivors"]]
        failed += [
            f"{name}: {': '.join(m[:3])} is in equivalent.py, and yet noticed: {m[3]}"
            for m in layer["not equivalent"]
        ]
        failed += [f"{name}: without a mutation: {text}" for text in layer["control"]]
        # What is no text of nft's says nothing about the rules.
        failed += [
            f"no mutant: {name}: {': '.join(m)}" for m in layer["refused"] if "syntax" in m[3]
        ]
        if not layer["empty"]:
            failed.append(f"{name}: an empty ruleset is not noticed")
        for text in layer["doubts"]:
            print(f"doubt: {name}: {text}", file=sys.stderr)
        if len(sys.argv) > 2:
            failed += [f"refused: {': '.join(m)}" for m in layer["refused"]]
    if process.wait():
        failed.append(
            f"The container failed or took more than {TIME_LIMIT_S} s (exit status {process.returncode})."
        )
    if len(sys.argv) == 1:
        failed += [f"equivalent.py has a reason that no mutant needs: {why}" for why in unused]
    print(row("all", totals, time.monotonic() - started))
    print(f"The layers took {cpu:.0f} s of CPU time.")
    print(*(failed or ["Survivors: none."]), sep="\n")
    return 1 if failed or not totals[1] else 0


if __name__ == "__main__":
    sys.exit(main())
