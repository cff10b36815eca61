"""How jobs get onto the network of a host: what is chosen, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cellblock.job_network.decision import Decision, RefusalError, Wishes, decide
from cellblock.job_network.host import HostNetwork, Manager, Parent
from cellblock.job_network.plan import Mode
from cellblock.job_network.section import NetworkConfig

DECLARED: dict[str, Any] = {
    "addresses": "10.0.0.128/27",
    "denied": ["10.0.0.0/8"],
    "policies": {
        "none": {"services": [], "internet": []},
        "cache": {
            "services": [{"to": ["10.0.0.14"], "protocol": "tcp", "ports": [3142]}],
            "internet": [],
        },
    },
    "resolvers": ["10.0.0.14"],
    "names": {"cache": ["10.0.0.14"]},
}
IPV6 = {**DECLARED, "ipv6_prefix": "2001:db8:1:2::/64"}
WISHES = Wishes(
    host="slave1",
    mode="auto",
    interface="cellblock0",
    parent="",
    gateway="",
    gateway_ipv6="",
    slots=None,
    job_slots=None,
    declared=DECLARED,
    renumber=False,
)
PARENT = Parent(
    name="eth0",
    cidr="10.0.0.21/24",
    gateway="10.0.0.1",
    cidr_ipv6="2001:db8:1:2::21/64",
    gateway_ipv6="fe80::1",
    manager=Manager.OWN,
    network_file="",
    clone_problem="",
)
SEEN = HostNetwork(
    cpus=4,
    interfaces=["eth0", "eth1"],
    addresses=["10.0.0.21"],
    parent=PARENT,
    current=None,
    current_range="",
    has_ipv6=True,
    lost_by_forwarding="",
    has_networkd=False,
    egress_problem="",
)


def decided(wishes: dict[str, Any], seen: dict[str, Any]) -> Decision:
    seen = dict(seen)
    parent = {name: seen.pop(name) for name in list(seen) if hasattr(PARENT, name)}
    host = replace(SEEN, parent=replace(PARENT, **parent)) if parent else SEEN
    return decide(replace(WISHES, **wishes), replace(host, **seen))


@pytest.mark.parametrize(
    ("wishes", "seen", "mode"),
    [
        ({}, {}, Mode.MACVLAN),
        ({"mode": "macvlan"}, {}, Mode.MACVLAN),
        ({"mode": "routed"}, {}, Mode.ROUTED),
        ({}, {"clone_problem": "no answer"}, Mode.ROUTED),
        # A gateway that is away for a moment does not change the mode of the host.
        ({}, {"clone_problem": "no answer", "current": Mode.MACVLAN}, Mode.MACVLAN),
        ({}, {"clone_problem": "", "current": Mode.ROUTED}, Mode.MACVLAN),
        ({}, {"egress_problem": "no hook"}, Mode.ROUTED),
        # nft is still to be installed.
        ({}, {"egress_problem": None}, Mode.MACVLAN),
        ({"declared": {**DECLARED, "addresses": "10.9.0.0/27"}}, {}, Mode.ROUTED),
        ({}, {"cidr": "", "gateway": "", "clone_problem": "no way"}, Mode.ROUTED),
        # IPv6 that does not fit is no reason to route.
        ({"declared": IPV6}, {}, Mode.MACVLAN),
        ({"mode": "routed", "declared": IPV6}, {"cidr_ipv6": ""}, Mode.ROUTED),
    ],
)
def test_modes(wishes: dict[str, Any], seen: dict[str, Any], mode: Mode) -> None:
    decision = decided(wishes, seen)
    assert decision.mode is mode
    assert NetworkConfig.parse(decision.section, "network").mode is mode
    assert f"table {'netdev' if mode is Mode.MACVLAN else 'inet'} cellblock_jobs" in decision.rules
    assert ('device "eth0"' in decision.rules) is (mode is Mode.MACVLAN)
    assert decision.has_ipv6 is ("ipv6_prefix" in (wishes.get("declared") or {}))


@pytest.mark.parametrize(
    ("wishes", "slots"),
    [({}, 6), ({"job_slots": 8}, 10), ({"slots": 3}, 3), ({"slots": 31, "job_slots": 1}, 31)],
)
def test_slots(wishes: dict[str, Any], slots: int) -> None:
    assert decided(wishes, {}).section["slots"] == slots


@pytest.mark.parametrize(
    ("wishes", "seen", "says"),
    [
        (
            {"parent": "nosuch0"},
            {"parent": None},
            "job_network_parent is nosuch0, which the host does not have; it has eth0, eth1: set"
            " job_network_parent to one of these, or correct the addresses.",
        ),
        (
            {},
            {"parent": None},
            "no interface has the host's first IPv4 address of cellblock_addresses; it has eth0",
        ),
        (
            {"slots": 32},
            {},
            "its range for jobs 10.0.0.128/27 has 31 addresses for 32 slots; give a larger range",
        ),
        (
            {},
            {"cidr": "10.0.0.130/24"},
            "has 10.0.0.130, the slave's own address, among the slots'",
        ),
        (
            {"mode": "routed"},
            {"cidr": "10.0.0.130/24"},
            "has 10.0.0.130, the slave's own address, among the slots' addresses",
        ),
        ({}, {"gateway": ""}, "there is no gateway on the parent; set job_network_gateway."),
        ({}, {"gateway": "10.0.9.1"}, "its gateway 10.0.9.1 is not on the segment 10.0.0.0/24"),
        (
            {"mode": "macvlan", "declared": {**DECLARED, "addresses": "10.9.0.0/27"}},
            {},
            "its range for jobs 10.9.0.0/27 is not within the segment 10.0.0.0/24",
        ),
        ({"declared": IPV6}, {"cidr_ipv6": ""}, "but its parent interface has no IPv6 address"),
        ({"declared": IPV6}, {"gateway_ipv6": ""}, "set job_network_gateway_ipv6, or give it"),
        (
            {"mode": "routed", "declared": IPV6},
            {"has_ipv6": False},
            "but the host's kernel runs without it; boot it without ipv6.disable=1",
        ),
        (
            {"mode": "routed", "declared": IPV6},
            {"lost_by_forwarding": "eth1"},
            "from router advertisements on eth1, and the kernel drops it as soon as the host routes"
            " IPv6 for jobs; set net.ipv6.conf.eth1.accept_ra to 2",
        ),
        (
            {"mode": "macvlan"},
            {"egress_problem": "Operation not supported"},
            "its kernel lacks the netdev egress hook (Operation not supported), without which",
        ),
        (
            {"mode": "macvlan"},
            {"clone_problem": "the gateway does not answer"},
            "job_network_mode is macvlan, but the gateway does not answer; most clouds and Wi-Fi",
        ),
        (
            {},
            {"current_range": "10.0.0.128/26"},
            "its jobs have the addresses 10.0.0.128/26 (/etc/cellblock/engine.json), and by the"
            " inventory they would get 10.0.0.128/27, which ends running jobs; keep them by writing"
            " cellblock_job_range as {slave1: 10.0.0.128/26, ...}, or let them change with"
            " -e job_network_renumber=true",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    wishes: dict[str, Any], seen: dict[str, Any], says: str
) -> None:
    with pytest.raises(RefusalError) as caught:
        decided(wishes, seen)
    assert str(caught.value).startswith("slave1: ")
    assert says in str(caught.value)
    assert str(caught.value).endswith(".")


def test_addresses_that_jobs_have_change_only_where_that_is_allowed() -> None:
    assert decided({}, {"current_range": "10.0.0.128/27"}).section["addresses"] == "10.0.0.128/27"
    other = decided({"renumber": True}, {"current_range": "10.0.0.128/26"})
    assert other.section["addresses"] == "10.0.0.128/27"


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"mode": "bridge"}, "job_network_mode is bridge; write auto, macvlan, routed or none."),
        ({"interface": "cbj1"}, "job_network_interface is cbj1; write up to 15 letters, digits"),
        ({"interface": "a b"}, "job_network_interface is a b; write"),
        ({"interface": "x" * 16}, "write up to 15 letters"),
        ({"slots": 0}, "job_network_slots is 0; write null, or a number from 1 to 4096."),
        ({"slots": 4097}, "job_network_slots is 4097"),
        ({"gateway": "fe80::1"}, "job_network_gateway is fe80::1; write an IPv4 address"),
        ({"gateway_ipv6": "10.0.0.1"}, "job_network_gateway_ipv6 is 10.0.0.1; write an IPv6"),
        ({"gateway_ipv6": "router"}, "job_network_gateway_ipv6 is router"),
        (
            {"mode": "routed", "declared": None},
            "job_network_mode is routed, but there is no range of addresses for its jobs; set"
            " cellblock_job_range, or set job_network_mode to none.",
        ),
    ],
)
def test_settings_refused(wishes: dict[str, Any], says: str) -> None:
    with pytest.raises(RefusalError) as caught:
        replace(WISHES, **wishes).check()
    assert str(caught.value).startswith("slave1: ")
    assert says in str(caught.value)


def test_settings_that_make_sense() -> None:
    for fields in (
        {},
        {"mode": "none", "declared": None},
        {"declared": None},
        {"gateway": "10.0.0.1", "gateway_ipv6": "fe80::1", "slots": 4096},
    ):
        replace(WISHES, **fields).check()
