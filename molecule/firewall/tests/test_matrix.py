"""Who reaches whom on the live fleet, against verdicts that are written down here by hand: rules and
expectations come from one filter, so that filter must not be its own judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

testinfra_hosts = ["ansible://master1"]

Playbook = Callable[..., CompletedProcess[str]]

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


@pytest.fixture
def opened(host: Any) -> Iterator[Callable[[str, str], None]]:
    """Adds a rule by hand at the front of a chain of a host."""
    hosts = []

    def add(name: str, rule: str) -> None:
        machine = host.get_host(f"ansible://{name}")
        machine.check_output(f"nft insert rule inet cellblock {rule}")
        hosts.append(machine)

    yield add
    for machine in hosts:
        machine.check_output("/usr/local/sbin/cellblock-firewall load")


def test_rules_opened_by_hand_are_found_and_named(
    opened: Callable[[str, str], None], verify: Callable[..., Any]
) -> None:
    opened("slave1", "output tcp dport 9999 accept")
    opened("slave1", "input tcp sport 9999 accept")
    opened("master1", "input tcp dport 9999 accept")
    opened("master1", "output tcp sport 9999 accept")
    status, printed, report = verify("-e", "verify_isolation_vantages=slave1,database1")
    assert status != 0
    sentences = report["differences"]
    for family in ("IPv4", "IPv6"):
        start = f"slave1 -> master1 undeclared_tcp (tcp 9999) over {family}: reached"
        assert any(s.startswith(start) for s in sentences), sentences
        assert start in printed
    for machine in ("slave1", "master1"):
        assert any(machine in s and "9999 accept" in s for s in sentences), sentences


def test_the_report_is_one_page_without_anything_from_elsewhere(
    verify: Callable[..., Any], tmp_path: Path, playbook: Playbook
) -> None:
    done = playbook(
        "verify-isolation.yml",
        *("-e", f"verify_isolation_report_dir={tmp_path}"),
        *("-e", "verify_isolation_vantages=slave1"),
    )
    assert "slave1" in done.stdout
    page = (tmp_path / "isolation.html").read_text()
    assert "<svg" in page
    for outside in ("http://", "https://", "<script src", "<link"):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")
    assert (tmp_path / "isolation.svg").read_text().startswith("<svg")
