"""Whom jobs reach over IPv6 where they have it (cellblock_job_ipv6_prefix), against verdicts that are
written down here by hand; slave1's jobs are on the front network (macvlan), slave2's behind it (routed).
"""

from __future__ import annotations

import json
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

import pytest

testinfra_hosts = ["ansible://master1"]

# Policy (or root in a slot with the widest), target, service: all that is reached over IPv6.
BY_HAND = """
    cache     cache1    package_cache
    internet  cache1    package_cache
    internet  cache1    dns
    internet  cache1    dns_tcp
    internet  internet  web
    internet  internet  web_tls
    slot      cache1    package_cache
    slot      cache1    dns
    slot      cache1    dns_tcp
    slot      internet  web
    slot      internet  web_tls
"""
SLAVES = {"slave1": "macvlan", "slave2": "routed"}
# What has IPv6 addresses and is to be tried from every job.
TARGETS = [
    *("cache1", "database1", "handler1", "master1", "memory1", "slave1", "slave2"),
    *("internet", "time_server", "slave1/sibling", "slave2/sibling"),
]

Cell = dict[str, Any]


@pytest.fixture(scope="module")
def cells(report: dict[str, Any]) -> list[Cell]:
    """What jobs and slots tried over IPv6."""
    return [
        cell
        for cell in report["cells"]
        if cell["kind"] == "service" and "/" in cell["vantage"] and cell["path"] == "ipv6"
    ]


def test_everything_is_as_declared(report: dict[str, Any]) -> None:
    assert report["is_green"], report["differences"]
    assert report["counts"]["unproven"] == 0


@pytest.mark.parametrize("slave", SLAVES)
def test_each_slave_has_its_mode(host: Any, slave: str) -> None:
    """One of each kind, or half of this file shows nothing."""
    machine = host.get_host(f"ansible://{slave}")
    network = json.loads(machine.check_output("cat /etc/cellblock/engine.json"))["network"]
    assert network["mode"] == SLAVES[slave]
    assert network["ipv6"]["prefix"].endswith("::/64")


@pytest.mark.parametrize("slave", SLAVES)
@pytest.mark.parametrize("what", ["none", "cache", "internet", "slot"])
def test_jobs_reach_what_their_policy_allows_and_nothing_else(
    cells: list[Cell], slave: str, what: str
) -> None:
    wanted = {
        (target, service)
        for policy, target, service in (line.split() for line in BY_HAND.strip().splitlines())
        if policy == what
    }
    tried = [cell for cell in cells if cell["vantage"] == f"{slave}/{what}"]
    assert {c["target"] for c in tried} == set(TARGETS)
    assert {(c["target"], c["service"]) for c in tried if c["is_reached"]} == wanted


def test_every_no_has_its_control(cells: list[Cell]) -> None:
    noes = [cell for cell in cells if not cell["is_reached"]]
    assert len(noes) > 100
    assert all(cell["control"] for cell in noes)


@pytest.mark.parametrize("slave", SLAVES)
def test_nobody_reaches_a_job_over_ipv6(report: dict[str, Any], slave: str) -> None:
    """At the address that is made from its IPv4 address."""
    (sibling,) = [host for host in report["hosts"] if host["name"] == f"{slave}/sibling"]
    v4, v6 = map(ip_address, sibling["addresses"])
    (own,) = [host for host in report["hosts"] if host["name"] == slave]
    (front,) = [
        IPv6Network((a, 64), strict=False)
        for a in map(ip_address, own["addresses"])
        if isinstance(a, IPv6Address)
    ]
    assert v6 == front.network_address + int(v4)
    tried = [
        cell
        for cell in report["cells"]
        if (cell["kind"], cell["target"], cell["path"]) == ("service", f"{slave}/sibling", "ipv6")
    ]
    assert {seen["address"] for cell in tried for seen in cell["seen"]} == {str(v6)}
    from_hosts = {"controller", "cache1", "master1", "slave1", "slave2", "outside1"}
    from_jobs = {f"{slave}/{what}" for slave in SLAVES for what in ("cache", "internet", "slot")}
    assert from_hosts | from_jobs <= {cell["vantage"] for cell in tried}
    assert not any(cell["is_reached"] for cell in tried)


def test_link_local_addresses_are_never_reached_from_jobs(report: dict[str, Any]) -> None:
    tried = [
        cell
        for cell in report["cells"]
        if "/" in cell["vantage"] and cell["path"] == "link_local" and cell["kind"] == "service"
    ]
    assert {f"{slave}/internet" for slave in SLAVES} <= {cell["vantage"] for cell in tried}
    assert len(tried) > 100
    assert not any(cell["is_reached"] for cell in tried)


def test_root_in_a_slot_forged_over_ipv6_and_nothing_arrived(report: dict[str, Any]) -> None:
    forged = [
        cell
        for cell in report["cells"]
        if cell["claimed"] and cell["vantage"].endswith("/slot") and cell["path"] == "ipv6"
    ]
    assert {cell["vantage"] for cell in forged} == {f"{slave}/slot" for slave in SLAVES}
    assert {cell["verdict"] for cell in forged} == {"as_declared"}
