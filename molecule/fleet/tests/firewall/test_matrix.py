"""Who reaches whom on the live fleet, against verdicts that are written down here by hand: rules and
expectations come from one filter, so that filter must not be its own judge.
"""

from __future__ import annotations

from typing import Any

import pytest

testinfra_hosts = ["ansible://master1"]

# vantage, target, service, paths over which it is reached (4, 6 and l for link-local)
BY_HAND = """
    controller  slave1     ssh             46
    controller  database1  ssh             46
    controller  database1  postgresql      -
    controller  master1    job_channel     -
    slave1      master1    job_channel     46
    slave2      master1    job_channel     46
    slave1      cache1     package_cache   46
    slave1      cache1     dns             46
    slave1      master1    ssh             -
    slave1      cache1     ssh             -
    slave1      database1  postgresql      -
    slave1      memory1    redis           -
    slave1      handler1   submissions     -
    slave1      slave2     ssh             -
    slave2      slave1     undeclared_tcp  -
    slave1      master1    undeclared_udp  -
    slave1      master1    ping            -
    slave1      internet   web             -
    slave2      internet   dns             -
    slave1      metadata   web             -
    master1     database1  postgresql      46
    master1     memory1    redis           46
    master1     handler1   submissions     46
    master1     cache1     package_cache   46
    master1     internet   web             46
    master1     internet   web_tls         46
    master1     internet   undeclared_tcp  -
    master1     metadata   web             -
    master1     slave1     ssh             -
    master1     database1  ssh             -
    cache1      internet   web_tls         46
    cache1      database1  postgresql      -
    cache1      slave1     ssh             -
    handler1    database1  postgresql      -
    handler1    internet   web             -
    database1   master1    job_channel     -
    database1   internet   web             -
    memory1     slave1     ssh             -
    outside1    master1    job_channel     -
    outside1    database1  postgresql      -
    outside1    slave1     ssh             -
    outside1    cache1     package_cache   -
"""
PATHS = {"4": "ipv4", "6": "ipv6", "l": "link_local"}


def test_everything_is_as_declared(report: dict[str, Any]) -> None:
    assert report["is_green"]
    counts = report["counts"]
    assert counts["as_declared"] > 1000
    assert counts == {"as_declared": counts["as_declared"], "leak": 0, "broken": 0, "unproven": 0}


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


def test_every_no_has_its_control(report: dict[str, Any]) -> None:
    """Nothing is called closed that nobody reached."""
    noes = [c for c in report["cells"] if c["kind"] == "service" and not c["is_reached"]]
    assert len(noes) > 800
    assert all(cell["control"] for cell in noes)
