"""The jobs' network of a slave, as it follows from the declared flows."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import flows

from cellblock.fleet.model import Fleet, FleetError, parse_fleet
from cellblock.job_network.plan import (
    ipv6_segment_problem,
    job_network,
    mac_address,
    segment_problem,
    slave_ranges,
)

RANGES = {"slave1": "10.0.0.128/26", "slave2": "10.0.0.192/26"}


DECLARED = {
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


def test_ranges_do_not_depend_on_the_order_of_the_inventory() -> None:
    assert slave_ranges("10.0.0.128/25", ["slave2", "slave1"], 16) == RANGES


def test_ranges_of_many_slaves_do_not_overlap() -> None:
    slaves = [f"s{number}" for number in range(5)]
    ranges = [ip_network(r) for r in slave_ranges("10.1.0.0/24", slaves, 30).values()]
    assert [r.prefixlen for r in ranges] == [27] * 5
    assert len(set(ranges)) == 5


def test_a_fleet_without_slaves_has_no_ranges() -> None:
    assert slave_ranges("10.1.0.0/24", [], 30) == {}


@pytest.mark.parametrize(
    ("whole", "slots", "complaint"),
    [
        (
            "10.0.0.128/25",
            64,
            "has too few addresses: 2 slaves get 64 each, of which 63 are for jobs",
        ),
        ("10.0.0.128/32", 1, "has too few addresses"),
        ("10.0.0.1/25", 1, "is '10.0.0.1/25', which is no network"),
        ("fd00::/64", 1, "write an IPv4 network"),
    ],
)
def test_ranges_refused(whole: str, slots: int, complaint: str) -> None:
    with pytest.raises(FleetError) as caught:
        slave_ranges(whole, ["slave1", "slave2"], slots)
    assert complaint in str(caught.value)


def test_slots_have_addresses_of_their_own(fleet: Fleet) -> None:
    first = job_network(fleet, "slave1", 62)["slots"]
    second = job_network(fleet, "slave2", 62)["slots"]
    assert first[0] == {"address": "10.0.0.128", "mac": "02:cb:00:00:00:80"}
    assert first[-1]["address"] == "10.0.0.189"
    assert len({slot["mac"] for slot in first + second}) == 124


def test_mac_address() -> None:
    assert mac_address(IPv4Address("10.213.7.200")) == "02:cb:00:d5:07:c8"


def test_policies_follow_the_flows(fleet: Fleet) -> None:
    network = job_network(fleet, "slave1", 4)
    packages = {"to": ["10.0.0.14"], "protocol": "tcp", "ports": [3142]}
    names = {"to": ["10.0.0.14"], "protocol": "udp", "ports": [53]}
    assert network["policies"] == {
        "none": {"allow": [], "internet": []},
        "internet": {"allow": [packages, names], "internet": [{"protocol": "tcp", "ports": [80]}]},
    }
    assert network["resolvers"] == ["10.0.0.14"]
    assert network["names"] == {"cache": ["10.0.0.14"]}


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
    assert job_network(fleet, "slave1", 2)["resolvers"] == []
    assert job_network(fleet, "slave1", 2)["names"] == {}


def test_everything_private_and_everything_of_ours_is_denied(fleet: Fleet) -> None:
    denied = [ip_network(cidr) for cidr in job_network(fleet, "slave1", 4)["denied"]]
    for address in "10.0.0.14 10.0.0.130 10.0.0.200 169.254.169.254 192.168.1.1 198.18.0.9 203.0.113.12".split():
        assert any(IPv4Address(address) in network for network in denied), address
    assert not any(IPv4Address("198.51.100.10") in network for network in denied)


def test_a_slave_without_a_range_is_refused() -> None:
    with pytest.raises(FleetError, match="slave1: has no range of addresses for jobs"):
        job_network(parse_fleet(DECLARED), "slave1", 4)


def test_more_slots_than_addresses_are_refused(fleet: Fleet) -> None:
    assert len(job_network(fleet, "slave1", 63)["slots"]) == 63
    with pytest.raises(FleetError) as caught:
        job_network(fleet, "slave1", 64)
    assert "slave1: its range for jobs 10.0.0.128/26 has 63 addresses for 64 slots" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("network", "interface", "gateway", "complaint"),
    [
        ("10.0.0.128/26", "10.0.0.21/24", "10.0.0.1", ""),
        ("10.0.0.192/26", "10.0.0.21/24", "10.0.0.1", ""),
        ("10.0.1.128/26", "10.0.0.21/24", "10.0.0.1", "not within the segment 10.0.0.0/24"),
        ("10.0.0.128/26", "10.0.0.21/24", "10.0.9.1", "gateway 10.0.9.1 is not on the segment"),
        ("10.0.0.128/26", "10.0.0.21/24", "10.0.0.129", "10.0.0.129, the gateway's address"),
        ("10.0.0.128/26", "10.0.0.130/24", "10.0.0.1", "10.0.0.130, the slave's own address"),
        ("10.0.0.0/26", "10.0.0.200/24", "10.0.0.201", "10.0.0.0, the segment's own address"),
    ],
)
def test_ranges_on_their_segment(
    network: str, interface: str, gateway: str, complaint: str
) -> None:
    problem = segment_problem(network, 4, interface, gateway)
    assert complaint in problem
    assert bool(problem) == bool(complaint)


@pytest.mark.parametrize(
    ("interface", "gateway", "complaint"),
    [
        ("2001:db8:1:2::21/64", "fe80::1", ""),
        ("2001:db8:1:2::21/64", "2001:db8:1:2::1", ""),
        ("2001:db8:1:2::21/48", "fe80::1%eth0", ""),
        ("", "fe80::1", "its parent interface has no IPv6 address besides link-local ones"),
        ("2001:db8:1:2::21/64", "", "there is no IPv6 gateway on its parent interface"),
        ("fd00::21/64", "fe80::1", "2001:db8:1:2::a00:80/122 is not within the segment fd00::/64"),
        (
            "2001:db8:1:2::a00:81/128",
            "fe80::1",
            "not within the segment 2001:db8:1:2::a00:81/128 of its parent interface",
        ),
        (
            "2001:db8:1:2::21/64",
            "2001:db8:1:3::1",
            "gateway 2001:db8:1:3::1 is neither link-local nor on the segment 2001:db8:1:2::/64",
        ),
        (
            "2001:db8:1:2::21/64",
            "2001:db8:1:2::a00:83",
            "has 2001:db8:1:2::a00:83, the gateway's address, among the slots' addresses",
        ),
        ("2001:db8:1:2::21/64", "2001:db8:1:2::a00:84", ""),
        ("2001:db8:1:2::a00:80/64", "fe80::1", "2001:db8:1:2::a00:80, the slave's own address"),
        ("2001:db8:1:2::a00:bf/122", "fe80::1", "the address of every router on the segment"),
    ],
)
def test_ipv6_ranges_on_their_segment(interface: str, gateway: str, complaint: str) -> None:
    problem = ipv6_segment_problem("2001:db8:1:2::/64", "10.0.0.128/26", 4, interface, gateway)
    assert complaint in problem
    assert bool(problem) == bool(complaint)
    data = {**DECLARED, "job_networks": RANGES}
    without = flows.job_network(data, "slave1", 4)
    assert flows.job_ipv6_segment_problem(without, interface, gateway) == ""
    data["job_ipv6_prefixes"] = {"slave1": "2001:db8:1:2::/64"}
    network = flows.job_network(data, "slave1", 4)
    assert flows.job_ipv6_segment_problem(network, interface, gateway) == problem


def test_a_gateway_that_is_no_address_is_refused() -> None:
    data = {**DECLARED, "job_networks": RANGES, "job_ipv6_prefixes": {"slave1": "fd12::/64"}}
    with pytest.raises(AnsibleFilterError, match="ipv6_segment_problem: .*'router'"):
        flows.job_ipv6_segment_problem(
            flows.job_network(data, "slave1", 4), "fd12::21/64", "router"
        )


@pytest.mark.parametrize(
    ("address", "number"),
    [
        ("::", "0x00000000000000000000000000000000"),
        ("fe80::1", "0xfe800000000000000000000000000001"),
        ("2001:db8:1:2::a42:3", "0x20010db800010002000000000a420003"),
    ],
)
def test_ipv6_hex(address: str, number: str) -> None:
    assert flows.ipv6_hex(address) == number


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::/64", "cache", ""])
def test_ipv6_hex_of_what_is_none(address: str) -> None:
    with pytest.raises(AnsibleFilterError, match="is no IPv6 address"):
        flows.ipv6_hex(address)


PREFIXES = {"slave1": "2001:db8:1:2::/64"}
IPV6 = {**DECLARED, "job_networks": RANGES, "job_ipv6_prefixes": PREFIXES}


def test_slots_with_ipv6() -> None:
    network = job_network(parse_fleet(IPV6), "slave1", 62)
    assert network["ipv6_prefix"] == "2001:db8:1:2::/64"
    assert network["slots"][0] == {
        "address": "10.0.0.128",
        "mac": "02:cb:00:00:00:80",
        "ipv6": "2001:db8:1:2::a00:80",
    }
    assert network["slots"][61]["ipv6"] == "2001:db8:1:2::a00:bd"
    packages = {"to": ["10.0.0.14", "fd00::14"], "protocol": "tcp", "ports": [3142]}
    names = {"to": ["10.0.0.14", "fd00::14"], "protocol": "udp", "ports": [53]}
    assert network["policies"] == {
        "none": {"allow": [], "internet": []},
        "internet": {"allow": [packages, names], "internet": [{"protocol": "tcp", "ports": [80]}]},
    }
    assert network["resolvers"] == ["10.0.0.14"]
    assert network["names"] == {"cache": ["10.0.0.14", "fd00::14"]}


def test_ipv6_of_one_slave_is_none_of_another() -> None:
    """Only that jobs do not reach each other is known everywhere."""
    with_, without = parse_fleet(IPV6), parse_fleet({**DECLARED, "job_networks": RANGES})
    other = job_network(with_, "slave2", 4)
    before = job_network(without, "slave2", 4)
    assert set(other.pop("denied")) - set(before.pop("denied")) == {"2001:db8:1:2::a00:80/122"}
    assert other == before
    assert "ipv6_prefix" not in before
    assert all(set(slot) == {"address", "mac"} for slot in before["slots"])


@pytest.mark.parametrize("is_with_ipv6", [False, True])
def test_all_special_and_all_of_ours_is_denied_in_both_families(is_with_ipv6: bool) -> None:
    fleet = parse_fleet(IPV6 if is_with_ipv6 else {**DECLARED, "job_networks": RANGES})
    denied = job_network(fleet, "slave1", 4)["denied"]
    versions = [ip_network(cidr).version for cidr in denied]
    assert versions == sorted(versions)
    networks = [ip_network(cidr) for cidr in denied]
    for address in "10.0.0.14 fd00::14 fe80::1 ff02::1 ::1 ::ffff:10.0.0.14 2002:a00:e::".split():
        assert any(ip_address(address) in network for network in networks), address
    job = ip_address("2001:db8:1:2::a00:81")
    assert any(job in network for network in networks) is is_with_ipv6
    assert not any(ip_address("2001:db8:113::10") in network for network in networks)


def test_what_a_guard_must_let_through_and_stop_of_ipv6() -> None:
    network = flows.job_network(IPV6, "slave1", 4)
    assert flows.job_services(network) == [
        ["10.0.0.14", "tcp", 3142],
        ["10.0.0.14", "udp", 53],
        ["fd00::14", "tcp", 3142],
        ["fd00::14", "udp", 53],
    ]
    bare = {**network, "denied": ["fd00::/8"]}
    assert flows.job_denied(bare) == [RANGES["slave1"], "2001:db8:1:2::a00:80/122", "fd00::/8"]
    # The segment of the parent, in each family, has them within.
    own = ["10.0.0.21/24", "2001:db8:1:2::21/64"]
    assert flows.job_denied(bare, own) == ["10.0.0.0/24", "2001:db8:1:2::/64", "fd00::/8"]
    assert flows.job_denied(bare, own[1]) == [RANGES["slave1"], "2001:db8:1:2::/64", "fd00::/8"]
    assert flows.job_denied(bare, ["", own[0]])[0] == "10.0.0.0/24"
    without = flows.job_network({**IPV6, "job_ipv6_prefixes": {}}, "slave1", 4)
    assert [entry[0] for entry in flows.job_services(without)] == ["10.0.0.14"] * 2
    assert "2001:db8:1:2::a00:80/122" not in flows.job_denied(without)


V6 = {**DECLARED["addresses"], "slave2": ["10.0.0.22", "fd00::22"]}  # type: ignore[dict-item]


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
                "groups": {**DECLARED["groups"], "worker_slaves": ["slave2"]},  # type: ignore[dict-item]
                "job_networks": {"slave2": RANGES["slave2"]},
            },
            [RANGES["slave2"], "10.0.0.22/32"],
        ),
    ],
)
def test_where_what_jobs_send_may_come_from(more: dict[str, Any], sources: list[str]) -> None:
    assert flows.job_sources({**DECLARED, **more}) == sources


def test_what_a_guard_must_let_through_and_stop(fleet: Fleet) -> None:
    network = {**job_network(fleet, "slave1", 4), "addresses": "10.0.0.128/26"}
    services = flows.job_services(network)
    assert ["10.0.0.14", "tcp", 3142] in services
    assert all(address == "10.0.0.14" for address, _, _ in services)
    assert "203.0.113.0/24" in flows.job_denied(network, "203.0.113.5/24")
    assert "203.0.113.0/24" not in flows.job_denied(network)


def test_a_clone_is_tried_with_an_address_that_no_slot_has() -> None:
    data = {**DECLARED, "job_networks": RANGES}
    mac = flows.job_probe_mac(data, "slave1")
    assert mac not in [
        slot["mac"] for slot in job_network(parse_fleet(data), "slave1", 63)["slots"]
    ]
    assert flows.job_ranges(data) == RANGES
