"""Whom jobs reach on the live fleet, against verdicts that are written down here by hand: filters and
expectations come from the same declared flows, so these must not be their own judge.
"""

from __future__ import annotations

from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

# vantage (a job with that policy, or root in a slot), target, service, paths over which it is reached
BY_HAND = """
    slave1/internet  cache1          package_cache   4
    slave1/internet  cache1          dns             4
    slave2/internet  cache1          dns_tcp         4
    slave1/internet  internet        web             4
    slave2/internet  internet        web_tls         4
    slave1/cache     cache1          package_cache   4
    slave2/slot      cache1          package_cache   4
    slave1/slot      internet        web             4
    slave1/internet  cache1          ssh             -
    slave1/internet  cache1          ping            -
    slave1/internet  database1       postgresql      -
    slave2/internet  memory1         redis           -
    slave1/internet  handler1        submissions     -
    slave1/internet  master1         job_channel     -
    slave1/internet  slave1          ssh             -
    slave1/internet  slave1          undeclared_tcp  -
    slave1/internet  slave2          undeclared_udp  -
    slave1/internet  slave1/sibling  undeclared_tcp  -
    slave1/internet  slave2/sibling  undeclared_udp  -
    slave2/slot      slave1/sibling  ping            -
    slave1/slot      slave1/sibling  ssh             -
    slave1/internet  metadata        web             -
    slave1/internet  internet        dns             -
    slave1/internet  internet        undeclared_tcp  -
    slave2/internet  time_server     ntp             -
    slave1/cache     cache1          dns             -
    slave2/cache     internet        web             -
    slave1/none      cache1          package_cache   -
    slave1/none      internet        web             -
    slave2/slot      database1       postgresql      -
    slave2/slot      master1         ping            -
    master1          slave1/sibling  undeclared_tcp  -
    controller       slave2/sibling  ping            -
    outside1         slave1/sibling  ssh             -
"""
PATHS = {"4": "ipv4", "6": "ipv6", "l": "link_local"}


def test_everything_is_as_declared(report: dict[str, Any]) -> None:
    assert report["is_green"], report["differences"]
    policies = ("none", "cache", "internet", "slot")
    assert {f"slave{n}/{policy}" for n in (1, 2) for policy in policies} <= set(report["vantages"])


@pytest.mark.parametrize("line", [line.strip() for line in BY_HAND.strip().splitlines()])
def test_by_hand(report: dict[str, Any], line: str) -> None:
    vantage, target, service, paths = line.split()
    seen = {
        cell["path"]: cell["is_reached"]
        for cell in report["cells"]
        if (cell["kind"], cell["vantage"], cell["target"], cell["service"])
        == ("service", vantage, target, service)
    }
    assert seen, "was not tried"
    assert {path for path, reached in seen.items() if reached} == {
        PATHS[path] for path in paths if path != "-"
    }


def test_no_job_has_ipv6_and_every_no_has_its_control(report: dict[str, Any]) -> None:
    cells = [c for c in report["cells"] if c["kind"] == "service" and "/" in c["vantage"]]
    over_ipv6 = [c for c in cells if c["path"] != "ipv4"]
    assert len(over_ipv6) > 100
    assert not any(c["is_reached"] for c in over_ipv6)
    assert all(c["control"] for c in cells if not c["is_reached"])


def test_root_in_a_slot_forged_and_nothing_arrived(report: dict[str, Any]) -> None:
    forged = [c for c in report["cells"] if c["claimed"] and c["vantage"].endswith("/slot")]
    assert {c["kind"] for c in forged} == {"spoofed", "spoofed_frame"}
    assert {c["verdict"] for c in forged} == {"as_declared"}
