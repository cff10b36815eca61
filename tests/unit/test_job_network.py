"""The jobs' network of a slave, as it follows from the declared flows."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import flows

from cellblock.errors import UnsupportedNetworkError
from cellblock.fleet.jobs import job_network
from cellblock.fleet.model import Fleet, FleetError, parse_fleet
from cellblock.fleet.probe_plan import sandboxes
from cellblock.job_network.access import Access
from cellblock.job_network.plan import (
    SPECIAL_NETWORKS,
    Misfit,
    PlanError,
    SegmentProblem,
    deal_ranges,
    ipv6_segment_problem,
    mac_address,
    probe_mac,
    segment_problem,
)
from cellblock.job_network.policy import NetworkPolicy
from cellblock.job_network.section import NetworkConfig, SegmentEnd, compose_section

RANGES = {"slave1": "10.0.0.128/26", "slave2": "10.0.0.192/26"}


DECLARED: dict[str, Any] = {
    "groups": {
        "databases": ["db"],
        "cache_servers": ["cache"],
        "worker_slaves": ["slave1", "slave2"],
    },
    "addresses": {
        "db": ["203.0.113.12"],
        "cache": ["10.0.0.14", "fd00::14"],
        "slave1": ["10.0.0.21"],
        "slave2": ["10.0.0.22"],
    },
    "services": {
        "packages": {"groups": ["cache_servers"], "protocol": "tcp", "port": 3142, "jobs": True},
        "dns": {"groups": ["cache_servers"], "protocol": "udp", "port": 53, "jobs": True},
        "web": {"groups": [], "protocol": "tcp", "port": 80},
    },
    "job_flows": {
        "none": [],
        "internet": [
            {"to": "cache_servers", "services": ["packages", "dns"]},
            {"to": "internet", "services": ["web"]},
        ],
    },
}


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet({**DECLARED, "job_networks": RANGES})


def test_a_range_depends_on_its_slaves_number_alone() -> None:
    before = deal_ranges("10.0.0.128/25", {"slave1": 1, "slave3": 3}, 27)
    assert before == {"slave1": "10.0.0.128/27", "slave3": "10.0.0.192/27"}
    # One more at the end, one in the middle, and all in another order.
    more = deal_ranges("10.0.0.128/25", {"slave4": 4, "slave3": 3, "slave2": 2, "slave1": 1}, 27)
    assert {slave: more[slave] for slave in before} == before
    assert more["slave2"] == "10.0.0.160/27"
    assert more["slave4"] == "10.0.0.224/27"
    assert len({*more.values()}) == 4
    # One is taken off, and comes back.
    assert deal_ranges("10.0.0.128/25", {"slave3": 3}, 27) == {"slave3": before["slave3"]}
    assert deal_ranges("10.1.0.0/24", {}, 27) == {}


@pytest.mark.parametrize(
    ("whole", "numbers", "prefix_length", "complaint"),
    [
        ("10.0.0.128/25", {"s4": 4, "s5": 5}, 27, "it has 4 ranges of /27, and s5 is number 5"),
        ("10.0.0.128/28", {"s1": 1}, 27, "has too few addresses: it has 0 ranges of /27"),
        (
            "10.0.0.128/25",
            {"a1": 1, "b1": 1},
            27,
            "b1: its number for jobs' addresses is 1, as a1's",
        ),
        ("10.0.0.1/25", {}, 27, "is '10.0.0.1/25', which is no network"),
        ("fd00::/64", {}, 27, "write an IPv4 network"),
    ],
)
def test_ranges_refused(
    whole: str, numbers: dict[str, int], prefix_length: int, complaint: str
) -> None:
    with pytest.raises(PlanError) as caught:
        deal_ranges(whole, numbers, prefix_length)
    assert complaint in str(caught.value)


END = SegmentEnd("cellblock0", 24, "10.0.0.1")
END_IPV6 = SegmentEnd("cellblock0", 24, "10.0.0.1", 64, "fe80::1")


def config(fleet: Fleet, slave: str, slots: int, end: SegmentEnd | None = END) -> NetworkConfig:
    section = compose_section(job_network(fleet, slave), slots, end)
    return NetworkConfig.parse(section, "network")


def test_slots_have_addresses_of_their_own(fleet: Fleet) -> None:
    first, second = config(fleet, "slave1", 62), config(fleet, "slave2", 62)
    assert (str(first.address(0)), first.mac(0)) == ("10.0.0.128", "02:cb:00:00:00:80")
    assert str(first.address(61)) == "10.0.0.189"
    assert len({of.mac(slot) for of in (first, second) for slot in range(62)}) == 124


@pytest.mark.parametrize("is_with_ipv6", [False, True])
@pytest.mark.parametrize("is_routed", [False, True])
def test_what_is_composed_is_what_the_engine_parses(is_routed: bool, is_with_ipv6: bool) -> None:
    fleet = parse_fleet(IPV6 if is_with_ipv6 else {**DECLARED, "job_networks": RANGES})
    end = None if is_routed else END_IPV6 if is_with_ipv6 else END
    parsed = config(fleet, "slave1", 4, end)
    assert (parsed.mode.value, parsed.slots) == ("routed" if is_routed else "macvlan", 4)
    assert str(parsed.addresses) == RANGES["slave1"]
    assert [policy.value for policy in parsed.policies] == ["internet"]
    assert str(parsed.resolvers[0]) == "10.0.0.14"
    jobs = "inet" if is_routed else "netdev"
    assert parsed.guard_tables == (("inet", "cellblock"), (jobs, "cellblock_jobs"))
    assert (parsed.ipv6 is not None) is is_with_ipv6
    if not is_routed:
        assert (parsed.parent, parsed.prefix_length, str(parsed.gateway)) == (
            "cellblock0",
            24,
            "10.0.0.1",
        )
    if parsed.ipv6 is not None and not is_routed:
        assert (parsed.ipv6.prefix_length, str(parsed.ipv6.gateway)) == (64, "fe80::1")


def test_mac_address() -> None:
    assert mac_address(IPv4Address("10.213.7.200")) == "02:cb:00:d5:07:c8"


def test_policies_follow_the_flows(fleet: Fleet) -> None:
    network = job_network(fleet, "slave1")
    packages = {"to": ["10.0.0.14"], "protocol": "tcp", "ports": [3142]}
    names = {"to": ["10.0.0.14"], "protocol": "udp", "ports": [53]}
    assert network["policies"] == {
        "none": {"services": [], "internet": []},
        "internet": {
            "services": [packages, names],
            "internet": [{"protocol": "tcp", "ports": [80]}],
        },
    }
    assert network["resolvers"] == ["10.0.0.14"]
    assert network["names"] == {"cache": ["10.0.0.14"]}


def test_a_policy_whose_services_nobody_has_is_refused_by_the_host() -> None:
    flows = {
        "none": [],
        "cache": [{"to": "cache_servers", "services": ["packages"]}],
    }
    without = {
        **DECLARED,
        "groups": {**DECLARED["groups"], "cache_servers": []},
        "addresses": {n: a for n, a in DECLARED["addresses"].items() if n != "cache"},
        "job_networks": RANGES,
        "job_flows": flows,
    }
    fleet = parse_fleet(without)
    assert fleet.opens_nothing("cache")
    assert list(job_network(fleet, "slave1")["policies"]) == ["none"]
    assert not [name for name in sandboxes(fleet) if name.endswith("/cache")]
    with pytest.raises(UnsupportedNetworkError) as caught:
        Access.of(NetworkPolicy.CACHE, (), "stages[0]", config(fleet, "slave1", 4), "slave1")
    assert str(caught.value).startswith(
        "stages[0].network: is 'cache', and cellblock_job_flows opens nothing for it to jobs on slave1; use"
    )
    # Controls: with a cache server, and with the internet in it, it is there.
    served = parse_fleet({**DECLARED, "job_networks": RANGES, "job_flows": flows})
    assert list(job_network(served, "slave1")["policies"]) == ["none", "cache"]
    assert "slave1/cache" in sandboxes(served)
    assert not served.opens_nothing("none")


def test_the_internet_without_a_resolver_is_refused() -> None:
    without = {
        **DECLARED,
        "groups": {**DECLARED["groups"], "cache_servers": []},
        "addresses": {n: a for n, a in DECLARED["addresses"].items() if n != "cache"},
    }
    with pytest.raises(
        FleetError, match=r"job_flows\.internet: no policy names .* leave the policy"
    ):
        parse_fleet({**without, "job_networks": RANGES})
    # Controls: without networks for jobs, or without that policy, nobody needs one.
    parse_fleet(without)
    fleet = parse_fleet({**without, "job_networks": RANGES, "job_flows": {"none": []}})
    assert job_network(fleet, "slave1")["resolvers"] == []
    assert job_network(fleet, "slave1")["names"] == {}


def test_everything_private_and_everything_of_ours_is_denied(fleet: Fleet) -> None:
    denied = [ip_network(cidr) for cidr in job_network(fleet, "slave1")["denied"]]
    for address in "10.0.0.14 10.0.0.130 10.0.0.200 169.254.169.254 192.168.1.1 198.18.0.9 203.0.113.12".split():
        assert any(IPv4Address(address) in network for network in denied), address
    assert not any(IPv4Address("198.51.100.10") in network for network in denied)


def test_a_slave_without_a_range_is_refused() -> None:
    with pytest.raises(FleetError, match="slave1: has no range of addresses for jobs"):
        job_network(parse_fleet(DECLARED), "slave1")


@pytest.mark.parametrize(
    ("network", "interface", "gateway", "kind", "complaint"),
    [
        ("10.0.0.128/26", "10.0.0.21/24", "10.0.0.1", None, ""),
        ("10.0.0.192/26", "10.0.0.21/24", "10.0.0.1", None, ""),
        ("10.0.0.128/26", "", "10.0.0.1", Misfit.NO_ADDRESS, "the parent has no IPv4 address"),
        ("10.0.0.128/26", "10.0.0.21/24", "", Misfit.NO_GATEWAY, "set job_network_gateway"),
        (
            *("10.0.1.128/26", "10.0.0.21/24", "10.0.0.1", Misfit.OUTSIDE),
            "not within the segment 10.0.0.0/24",
        ),
        (
            *("10.0.0.128/26", "10.0.0.21/24", "10.0.9.1", Misfit.GATEWAY_OUTSIDE),
            "gateway 10.0.9.1 is not on the segment",
        ),
        (
            *("10.0.0.128/26", "10.0.0.21/24", "10.0.0.129", Misfit.TAKEN),
            "10.0.0.129, the gateway's address",
        ),
        (
            *("10.0.0.128/26", "10.0.0.130/24", "10.0.0.1", Misfit.TAKEN),
            "10.0.0.130, the slave's own address",
        ),
        (
            *("10.0.0.0/26", "10.0.0.200/24", "10.0.0.201", Misfit.TAKEN),
            "10.0.0.0, the segment's own address",
        ),
    ],
)
def test_ranges_on_their_segment(
    network: str, interface: str, gateway: str, kind: Misfit | None, complaint: str
) -> None:
    check(segment_problem(IPv4Network(network), 4, interface, gateway), kind, complaint)


def check(problem: SegmentProblem | None, kind: Misfit | None, complaint: str) -> None:
    assert (problem and problem.kind) is kind
    assert complaint in (problem.text if problem else "")


@pytest.mark.parametrize(
    ("interface", "gateway", "kind", "complaint"),
    [
        ("2001:db8:1:2::21/64", "fe80::1", None, ""),
        ("2001:db8:1:2::21/64", "2001:db8:1:2::1", None, ""),
        ("2001:db8:1:2::21/48", "fe80::1%eth0", None, ""),
        (
            *("", "fe80::1", Misfit.NO_ADDRESS),
            "its parent interface has no IPv6 address besides link-local ones",
        ),
        (
            *("2001:db8:1:2::21/64", "", Misfit.NO_GATEWAY),
            "there is no IPv6 gateway on its parent interface",
        ),
        (
            *("fd00::21/64", "fe80::1", Misfit.OUTSIDE),
            "2001:db8:1:2::a00:80/122 is not within the segment fd00::/64",
        ),
        (
            *("2001:db8:1:2::a00:81/128", "fe80::1", Misfit.OUTSIDE),
            "not within the segment 2001:db8:1:2::a00:81/128 of its parent interface",
        ),
        (
            *("2001:db8:1:2::21/64", "2001:db8:1:3::1", Misfit.GATEWAY_OUTSIDE),
            "gateway 2001:db8:1:3::1 is neither link-local nor on the segment 2001:db8:1:2::/64",
        ),
        (
            *("2001:db8:1:2::21/64", "2001:db8:1:2::a00:83", Misfit.TAKEN),
            "has 2001:db8:1:2::a00:83, the gateway's address, among the slots' addresses",
        ),
        ("2001:db8:1:2::21/64", "2001:db8:1:2::a00:84", None, ""),
        (
            *("2001:db8:1:2::a00:80/64", "fe80::1", Misfit.TAKEN),
            "2001:db8:1:2::a00:80, the slave's own address",
        ),
        (
            *("2001:db8:1:2::a00:bf/122", "fe80::1", Misfit.TAKEN),
            "the address of every router on the segment",
        ),
    ],
)
def test_ipv6_ranges_on_their_segment(
    interface: str, gateway: str, kind: Misfit | None, complaint: str
) -> None:
    prefix, network = IPv6Network("2001:db8:1:2::/64"), IPv4Network("10.0.0.128/26")
    check(ipv6_segment_problem(prefix, network, 4, interface, gateway), kind, complaint)


PREFIXES = {"slave1": "2001:db8:1:2::/64"}
IPV6 = {**DECLARED, "job_networks": RANGES, "job_ipv6_prefixes": PREFIXES}


def test_slots_with_ipv6() -> None:
    fleet = parse_fleet(IPV6)
    network = job_network(fleet, "slave1")
    assert network["ipv6_prefix"] == "2001:db8:1:2::/64"
    slots = config(fleet, "slave1", 62, END_IPV6)
    assert str(slots.ipv6_address(0)) == "2001:db8:1:2::a00:80"
    assert str(slots.ipv6_address(61)) == "2001:db8:1:2::a00:bd"
    packages = {"to": ["10.0.0.14", "fd00::14"], "protocol": "tcp", "ports": [3142]}
    names = {"to": ["10.0.0.14", "fd00::14"], "protocol": "udp", "ports": [53]}
    assert network["policies"] == {
        "none": {"services": [], "internet": []},
        "internet": {
            "services": [packages, names],
            "internet": [{"protocol": "tcp", "ports": [80]}],
        },
    }
    assert network["resolvers"] == ["10.0.0.14"]
    assert network["names"] == {"cache": ["10.0.0.14", "fd00::14"]}


def test_ipv6_of_one_slave_is_none_of_another() -> None:
    """Only that jobs do not reach each other is known everywhere."""
    with_, without = parse_fleet(IPV6), parse_fleet({**DECLARED, "job_networks": RANGES})
    other = job_network(with_, "slave2")
    before = job_network(without, "slave2")
    assert set(other.pop("denied")) - set(before.pop("denied")) == {"2001:db8:1:2::a00:80/122"}
    assert other == before
    assert "ipv6_prefix" not in before


@pytest.mark.parametrize("is_with_ipv6", [False, True])
def test_all_special_and_all_of_ours_is_denied_in_both_families(is_with_ipv6: bool) -> None:
    fleet = parse_fleet(IPV6 if is_with_ipv6 else {**DECLARED, "job_networks": RANGES})
    denied = job_network(fleet, "slave1")["denied"]
    versions = [ip_network(cidr).version for cidr in denied]
    assert versions == sorted(versions)
    networks = [ip_network(cidr) for cidr in denied]
    for address in "10.0.0.14 fd00::14 fe80::1 ff02::1 ::1 ::ffff:10.0.0.14 2002:a00:e::".split():
        assert any(ip_address(address) in network for network in networks), address
    job = ip_address("2001:db8:1:2::a00:81")
    assert any(job in network for network in networks) is is_with_ipv6
    assert not any(ip_address("2001:db8:113::10") in network for network in networks)


def test_services_and_denied_of_ipv6() -> None:
    fleet = parse_fleet({**IPV6, "networks": {"n": ["2001:db8:9::/48"]}})
    routed = config(fleet, "slave1", 4, None)
    assert [(str(address), *rest) for address, *rest in routed.services()] == [
        ("10.0.0.14", "tcp", 3142),
        ("10.0.0.14", "udp", 53),
        ("fd00::14", "tcp", 3142),
        ("fd00::14", "udp", 53),
    ]
    denied = [str(network) for network in routed.all_denied()]
    assert "10.0.0.0/8" in denied
    assert denied[-5:-3] == ["2001:db8:1:2::a00:80/122", "2001:db8:9::/48"]
    # The segment of the parent has the slots within.
    on_segment = [str(n) for n in config(fleet, "slave1", 4, END_IPV6).all_denied()]
    assert "2001:db8:1:2::/64" in on_segment
    assert "2001:db8:1:2::a00:80/122" not in on_segment
    without = config(parse_fleet({**IPV6, "job_ipv6_prefixes": {}}), "slave1", 4)
    assert {address.version for address, _, _ in without.services()} == {4}
    assert {network.version for network in without.all_denied()} == {4}


V6 = {**DECLARED["addresses"], "slave2": ["10.0.0.22", "fd00::22"]}


@pytest.mark.parametrize(
    ("more", "sources"),
    [
        ({"job_networks": RANGES}, [*RANGES.values(), "10.0.0.21/32", "10.0.0.22/32"]),
        (
            {"job_networks": RANGES, "job_ipv6_prefixes": {"slave1": "2001:db8:1:2::/64"}},
            [*RANGES.values(), "2001:db8:1:2::a00:80/122", "10.0.0.21/32", "10.0.0.22/32"],
        ),
        # Slaves are no more trusted where jobs have no network.
        ({}, ["10.0.0.21/32", "10.0.0.22/32"]),
        # Neighbouring addresses stay single ones, and both families are there.
        ({"addresses": V6}, ["10.0.0.21/32", "10.0.0.22/32", "fd00::22/128"]),
        ({"groups": {"databases": ["db"], "cache_servers": ["cache"], "worker_slaves": []}}, []),
        (
            {
                "groups": {**DECLARED["groups"], "worker_slaves": ["slave2"]},
                "job_networks": {"slave2": RANGES["slave2"]},
            },
            [RANGES["slave2"], "10.0.0.22/32"],
        ),
    ],
)
def test_where_what_jobs_send_may_come_from(more: dict[str, Any], sources: list[str]) -> None:
    assert flows.job_sources({**DECLARED, **more}) == sources


def test_services_and_denied(fleet: Fleet) -> None:
    end = SegmentEnd("cellblock0", 24, "203.0.113.1")
    data = {**DECLARED, "job_networks": {"slave1": "203.0.113.128/26"}}
    on_segment = config(parse_fleet(data), "slave1", 4, end)
    routed = config(fleet, "slave1", 4, None)
    assert (IPv4Address("10.0.0.14"), "tcp", 3142) in routed.services()
    assert {str(address) for address, _, _ in routed.services()} == {"10.0.0.14"}
    assert IPv4Network("203.0.113.0/24") in on_segment.all_denied()
    assert IPv4Network("203.0.113.0/24") not in routed.all_denied()


def test_a_clone_is_tried_with_an_address_that_no_slot_has(fleet: Fleet) -> None:
    slots = config(fleet, "slave1", 63)
    assert probe_mac(slots.addresses) not in [slots.mac(slot) for slot in range(63)]


def test_what_the_filter_says() -> None:
    data = {**DECLARED, "job_networks": {"slave1": RANGES["slave1"]}}
    assert flows.job_network(data, "slave1") == job_network(parse_fleet(data), "slave1")
    assert flows.job_network(data, "slave2") is None
    assert flows.job_network({}, "slave1") is None
    with pytest.raises(AnsibleFilterError, match="wrong"):
        flows.job_network({"problem": "wrong"}, "slave1")


def test_what_is_not_the_internet() -> None:
    found = flows.not_internet(["203.0.113.5", "203.0.113.4/31", "10.0.0.1", "2a00::1"])
    assert "203.0.113.4/31" in found
    assert "2a00::1/128" in found
    assert "198.18.0.0/15" in found
    assert "192.0.0.0/24" in found
    assert not any(network.startswith("10.0.0.1") for network in found)
    assert flows.not_internet([]) == [str(network) for network in SPECIAL_NETWORKS_IN_ORDER]
    with pytest.raises(AnsibleFilterError, match="cache"):
        flows.not_internet(["cache"])


SPECIAL_NETWORKS_IN_ORDER = sorted(SPECIAL_NETWORKS, key=lambda n: (n.version, n))
