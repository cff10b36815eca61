"""The inventories to copy, as Ansible reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cellblock.fleet import variables

ROOT = Path(__file__).parents[2]


def evaluated(inventory: Path, expression: str, *options: str) -> Any:
    """What ``expression`` is for every host, {host: value}."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ansible", "adhoc", "-i", str(inventory), "all"),
            *("-c", "local", "-m", "ansible.builtin.debug", "-a", f"msg={{{{ {expression} }}}}"),
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_NOCOLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = re.findall(r"^(\S+) \| SUCCESS => (\{.*?^\})", done.stdout, re.MULTILINE | re.DOTALL)
    return {host: json.loads(result)["msg"] for host, result in results}


RULES = "firewall_rules if cellblock_fleet.problem is undefined else cellblock_fleet.problem"


def test_the_smallest_fleet_is_one_slave_whose_packages_come_from_the_internet() -> None:
    (rules,) = evaluated(ROOT / "inventory/minimal", RULES).values()
    outbound = [(rule["peer"], rule["protocol"], rule["ports"]) for rule in rules["outbound"]]
    assert ("any", "tcp", [80, 443]) in outbound
    assert ("dns_upstreams", "udp", [53]) in outbound
    assert rules["sets"]["dns_upstreams"] == ["192.0.2.53/32"]
    assert rules["sets"]["cache_servers"] == []


def test_the_example_has_a_way_to_packages_for_all_hosts(tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(ROOT / "inventory/example", copy)
    without = "cellblock_fleet | cellblock.fleet.without_packages"
    found = evaluated(copy, without)
    assert len(found) == 6
    assert all(hosts == [] for hosts in found.values())
    # The control: without its cache server nobody but what the flows let out has one.
    hosts = copy / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("    cache_servers:", "    bastions:"))
    others = {"slave1.example.com", "slave2.example.com", "database1.example.com"}
    others |= {"memory1.example.com", "cache1.example.com"}
    assert set(next(iter(evaluated(copy, without).values()))) == others


@pytest.mark.parametrize("name", ["example", "minimal"])
def test_a_host_in_no_group_is_refused_by_name(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(ROOT / "inventory" / name, copy)
    (copy / "more.yml").write_text("all: {hosts: {bastion1: {ansible_host: 192.0.2.9}}}\n")
    found = set(evaluated(copy, RULES).values())
    assert found == {
        "bastion1: in no group of the inventory; put it into those that say what it does, or into"
        " outside to have it left alone"
    }


PROBLEMS = "groups.all | cellblock.fleet.variable_problems(hostvars)"


@pytest.mark.parametrize(
    "inventory",
    ["inventory/local", "inventory/example", "inventory/minimal", "molecule/vm/inventory"],
)
def test_every_variable_of_our_inventories_is_read(inventory: str) -> None:
    assert next(iter(evaluated(ROOT / inventory, PROBLEMS).values())) == []


def test_variables_that_nothing_reads_are_named(tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(ROOT / "inventory/minimal", copy)
    (copy / "host_vars").mkdir()
    (copy / "host_vars/slave1.example.com.yml").write_text(
        "cellblock_job_rang: 192.0.2.128/25\n"
        "ansible_hosts: 192.0.2.21\n"
        "macvlan_mode: routed\n"
        "worker_slave_maximas: {}\n"
        "database_of_my_own_role: 1\n"
        "cellblock_xyzzy: 1\n"
    )
    (problems,) = evaluated(copy, PROBLEMS).values()
    assert [problem.removeprefix("slave1.example.com: ") for problem in problems] == [
        "ansible_hosts is not read; write ansible_host",
        "cellblock_job_rang is unknown; did you mean cellblock_job_range?",
        "cellblock_xyzzy is unknown; known are " + ", ".join(variables.FLEET_VARIABLES),
        "macvlan_mode is not read; write job_network_mode",
        "worker_slave_maximas is unknown; did you mean worker_slave_maxima?",
    ]


def test_the_list_of_the_fleets_variables_is_complete() -> None:
    """What our inventories set or offer in a comment."""
    offered = {
        name
        for path in (ROOT / "inventory").rglob("*.yml")
        for name in re.findall(r"^(?:# )?(cellblock_\w+):", path.read_text(), re.MULTILINE)
    }
    assert {"cellblock_networks", "cellblock_job_range"} <= offered
    assert offered <= set(variables.FLEET_VARIABLES)


AMBIGUOUS = "query('cellblock.fleet.ambiguous_variables')"


@pytest.mark.parametrize("name", ["example", "minimal", "local"])
def test_what_is_to_be_copied_means_what_it_says(name: str) -> None:
    assert not any(evaluated(ROOT / "inventory" / name, AMBIGUOUS).values())


def test_values_that_yaml_makes_something_else_of_are_refused_with_their_place(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(ROOT / "inventory/minimal", copy)
    (copy / "group_vars/worker_slaves.yml").write_text("worker_slave_parallel_jobs: 010\nx: 010\n")
    (copy / "group_vars/nobody.yml").write_text("worker_slave_parallel_jobs: 010\n")
    (copy / "host_vars").mkdir()
    (copy / "host_vars/slave1.example.com").write_text("a: 1\na: 2\n")
    (copy / "more.yml").write_text("all:\n  vars:\n    cellblock_more_flows: [22:22]\n")
    (tmp_path / "extra.yml").write_text("job_network_slots: 1_0\n")
    extra = ("-e", f"@{tmp_path}/extra.yml", "-e", "{firewall_dhcp_client: no}", "-e", "a=010")
    found = evaluated(copy, AMBIGUOUS, *extra)
    assert {tuple(sentences) for sentences in found.values()} == {
        (
            f"{copy}/more.yml: line 3, column 28: '22:22' {READERS}",
            f"{copy}/group_vars/worker_slaves.yml: line 1, column 29: '010' {READERS}",
            f"{copy}/host_vars/slave1.example.com: line 2, column 1: 'a' is there twice; leave one out",
            f"{tmp_path}/extra.yml: line 1, column 20: '1_0' {READERS}",
            f"--extra-vars: line 1, column 24: 'no' {READERS}",
        )
    }


READERS = (
    "means different things to different readers of YAML; quote it, or write a plain number, true or"
    " false"
)
