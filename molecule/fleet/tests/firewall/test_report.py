"""The report of who reaches whom: it names what somebody opened by hand, and it is complete in itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

testinfra_hosts = ["ansible://master1"]

Verify = Callable[..., Any]


@pytest.fixture
def opened(host: Any) -> Iterator[Callable[[str, str], None]]:
    """Adds a rule by hand at the front of a chain of a host whose guard is stopped."""
    hosts = []

    def add(name: str, rule: str) -> None:
        machine = host.get_host(f"ansible://{name}")
        machine.check_output(
            f"systemctl stop cellblock-firewall-guard && nft insert rule inet cellblock {rule}"
        )
        hosts.append(machine)

    yield add
    for machine in hosts:
        machine.check_output(
            "/usr/local/sbin/cellblock-firewall load && systemctl start cellblock-firewall-guard"
        )


def test_rules_opened_by_hand_are_found_and_named(
    opened: Callable[[str, str], None], verify_isolation: Verify
) -> None:
    opened("slave1", "output tcp dport 9999 accept")
    opened("slave1", "input tcp sport 9999 accept")
    opened("master1", "input tcp dport 9999 accept")
    opened("master1", "output tcp sport 9999 accept")
    done = verify_isolation("-e", "verify_isolation_vantages=slave1,database1")
    assert done.status != 0
    sentences = done.report["differences"]
    for family in ("IPv4", "IPv6"):
        start = f"slave1 -> master1 undeclared_tcp (tcp 9999) over {family}: reached"
        assert any(s.startswith(start) for s in sentences), sentences
        assert start in done.printed
    for machine in ("slave1", "master1"):
        assert any(machine in s and "9999 accept" in s for s in sentences), sentences


def test_the_report_is_one_page_without_anything_from_elsewhere(isolation: Any) -> None:
    assert "slave1" in isolation.printed
    page = (isolation.directory / "isolation.html").read_text()
    assert "<svg" in page
    for outside in ("http://", "https://", "<script src", "<link"):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")
    assert (isolation.directory / "isolation.svg").read_text().startswith("<svg")
