"""What may be declared about a fleet, what is refused, and what firewall rules follow from it."""

from __future__ import annotations

import copy
from ipaddress import ip_address
from typing import Any

import pytest

from cellblock.fleet.model import CONTROLLER, Fleet, FleetError, parse_fleet
from cellblock.fleet.rules import affected_by, clients, host_rules

DECLARED: dict[str, Any] = {
    "groups": {
        "databases": ["db"],
        "cache_servers": ["cache"],
        "worker_masters": ["master"],
        "worker_slaves": ["slave1", "slave2"],
        "request_handlers": [],
        "outside": ["outside1"],
    },
    "addresses": {
        "db": ["10.0.0.12", "fd00::12"],
        "cache": ["10.0.0.14"],
        "master": ["10.0.0.15", "fd00::15"],
        "slave1": ["10.0.0.21", "fd00::21"],
        "slave2": ["10.0.0.22", "fd00::22"],
        "outside1": ["10.0.0.30"],
    },
    "services": {
        "ssh": {"groups": ["fleet"], "protocol": "tcp", "port": 22},
        "ping": {"groups": ["fleet"], "protocol": "icmp"},
        "postgresql": {"groups": ["databases"], "protocol": "tcp", "port": 5432},
        "packages": {"groups": ["cache_servers"], "protocol": "tcp", "port": 3142, "jobs": True},
        "dns": {"groups": ["cache_servers"], "protocol": "udp", "port": 53, "jobs": True},
        "web": {"groups": [], "protocol": "tcp", "port": 80},
    },
    "networks": {"controllers": ["10.0.0.1", "fd00::1"], "clients": ["198.18.0.0/24"]},
    "flows": [
        {"from": "controllers", "to": "fleet", "services": ["ssh", "ping"]},
        {"from": "worker_slaves", "to": "cache_servers", "services": ["packages", "dns"]},
        {"from": "worker_masters", "to": "databases", "services": ["postgresql"]},
        {"from": "worker_masters", "to": "internet", "services": ["web"]},
    ],
    "job_flows": {
        "none": [],
        "internet": [
            {"to": "cache_servers", "services": ["packages", "dns"]},
            {"to": "internet", "services": ["web"]},
        ],
    },
    "external": {
        "internet": {
            "addresses": ["198.51.100.10", "2001:db8:113::10"],
            "services": ["web", "ssh"],
            "owner": "outside1",
        },
        "metadata": {"addresses": ["169.254.169.254"], "services": ["web"]},
    },
}


def declared(**changes: Any) -> dict[str, Any]:
    """DECLARED with some values replaced; a key's dots lead into it."""
    data = copy.deepcopy(DECLARED)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    return data


def with_flow(**flow: Any) -> dict[str, Any]:
    data = declared()
    data["flows"].append({"from" if key == "source" else key: v for key, v in flow.items()})
    return data


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet(declared())


@pytest.mark.parametrize(
    ("source", "destination", "service", "flow"),
    [
        ("slave1", "cache", "packages", "worker_slaves -> cache_servers: packages, dns"),
        ("slave2", "cache", "dns", "worker_slaves -> cache_servers: packages, dns"),
        ("slave1", "cache", "ssh", None),
        ("slave1", "db", "postgresql", None),
        ("slave1", "slave2", "ssh", None),
        ("slave1", "internet", "web", None),
        ("master", "db", "postgresql", "worker_masters -> databases: postgresql"),
        ("master", "cache", "packages", None),
        ("master", "internet", "web", "worker_masters -> internet: web"),
        ("master", "internet", "ssh", None),
        ("master", "metadata", "web", None),
        ("db", "master", "ssh", None),
        (CONTROLLER, "slave1", "ssh", "controllers -> fleet: ssh, ping"),
        (CONTROLLER, "db", "postgresql", None),
        ("outside1", "db", "ssh", None),
    ],
)
def test_allowing(
    fleet: Fleet, source: str, destination: str, service: str, flow: str | None
) -> None:
    allowed = fleet.allowing(source, destination, service)
    assert (str(allowed) if allowed else None) == flow


def test_the_host_that_plays_the_outside_is_not_of_the_fleet(fleet: Fleet) -> None:
    assert [host.name for host in fleet.members("fleet")] == [
        "db",
        "cache",
        "master",
        "slave1",
        "slave2",
    ]
    assert [host.name for host in fleet.serving("web")] == ["internet", "metadata"]


@pytest.mark.parametrize(
    "address",
    """10.9.9.9 100.64.0.1 127.0.0.1 169.254.169.254 172.31.0.1 192.168.1.1 198.18.0.1 168.63.129.16 224.0.0.1
    255.255.255.255 0.0.0.0 ::1 fd00:1::1 fe80::1 ff02::1 64:ff9b::a00:1 ::ffff:10.0.0.1
    2002:a00:1:: 10.0.0.12 10.0.0.1""".split(),
)
def test_not_internet(fleet: Fleet, address: str) -> None:
    assert not fleet.is_internet(ip_address(address))


@pytest.mark.parametrize(
    "address", "9.9.9.9 172.32.0.1 198.51.100.10 100.128.0.1 2001:db8:113::10 2620:fe::fe".split()
)
def test_internet(fleet: Fleet, address: str) -> None:
    assert fleet.is_internet(ip_address(address))


def test_public_addresses_of_the_fleet_are_not_the_internet() -> None:
    fleet = parse_fleet(declared(addresses__db=["203.0.113.12"]))
    assert not fleet.is_internet(ip_address("203.0.113.12"))
    assert fleet.is_internet(ip_address("203.0.113.13"))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            with_flow(source="worker_slave", to="databases", services=["postgresql"]),
            "cellblock_flows, entry 5 (from: worker_slave, to: databases, services: [postgresql]):"
            " from names the unknown group 'worker_slave'; known are cache_servers,",
        ),
        (
            with_flow(source="worker_masters", to="database", services=["postgresql"]),
            "to names the unknown group 'database'",
        ),
        (
            with_flow(source="worker_masters", to="databases", services=["postgres"]),
            "unknown service 'postgres'; known are dns,",
        ),
        (
            with_flow(source="worker_masters", to="databases", services=["packages"]),
            "databases does not serve 'packages'",
        ),
        (with_flow(source="worker_masters", to="databases"), "names no services"),
        (
            with_flow(source="internet", to="databases", services=["postgresql"]),
            "the internet may not be a source",
        ),
        (
            with_flow(source="worker_masters", to="databases", services=["ssh"], port=22),
            "unknown key 'port'",
        ),
        (declared(flows="all"), "cellblock_flows is 'all': write a list"),
        (declared(services__ssh__port=0), "cellblock_services.ssh: port is 0; write a number from"),
        (declared(services__ssh__port=65536), "port is 65536"),
        (declared(services__ssh__port="22"), "port is '22'"),
        (declared(services__ssh__port=True), "port is True"),
        (declared(services__ssh__protocol="sctp"), "protocol is 'sctp'; choose one of tcp, udp"),
        (declared(services__ping__port=1), "icmp has no ports"),
        (declared(services__ssh__groups=["hosts"]), "unknown group 'hosts'"),
        (declared(addresses__db=["db.example.com"]), "db: cellblock_addresses names 'db.example"),
        (declared(addresses__db=["127.0.0.1"]), "at which no other host can reach it"),
        (declared(addresses__db=["fe80::1"]), "link-local address fe80::1"),
        (declared(addresses__db=[]), "db: cellblock_addresses is empty"),
        (
            declared(addresses__slave2=["10.0.0.12"]),
            "slave2: its address 10.0.0.12 is also db's; give each host its own",
        ),
        (
            declared(networks__clients=["198.18.0.0/24", "10.0.0.0/24"]),
            "cellblock_networks.clients: 10.0.0.0/24 overlaps 10.0.0.1/32 of"
            " cellblock_networks.controllers",
        ),
        (
            declared(networks__clients=["fd00::/120"]),
            "cellblock_networks.clients: fd00::/120 overlaps fd00::1/128",
        ),
        (
            declared(networks__clients=["10.0.0.16/28"]),
            "cellblock_networks.clients: 10.0.0.16/28 contains the address 10.0.0.21 of slave1",
        ),
        (declared(networks__clients=["198.18.0.1/24"]), "'198.18.0.1/24' is no network"),
        (declared(networks__databases=["198.18.0.0/24"]), "a group or a built-in peer has that"),
        (
            declared(job_flows__internet=[{"to": "databases", "services": ["postgresql"]}]),
            "cellblock_job_flows.internet, entry 1 (to: databases, services: [postgresql]): would"
            " let a job reach postgresql of databases",
        ),
        (
            declared(job_flows__internet=[{"to": "cache_servers", "services": ["ssh"]}]),
            "would let a job reach ssh of cache_servers",
        ),
        (
            declared(job_flows__internet=[{"to": "fleet", "services": ["dns"]}]),
            "cellblock_job_flows.internet, entry 1 (to: fleet, services: [dns]): fleet does not",
        ),
        (
            declared(job_flows__internet=[{"to": "clients", "services": ["dns"]}]),
            "would let a job reach dns of clients",
        ),
        (
            declared(groups__databases=["db", "slave1"]),
            "slave1: in the group worker_slaves and also in databases",
        ),
        (declared(groups__any=["master"]), "the group 'any' of the inventory: flows and rules use"),
        (declared(groups__jobs=["master"]), "the group 'jobs' of the inventory"),
        (declared(groups__fleet=["master"]), "the group 'fleet' of the inventory"),
        (declared(networks__resets=["198.18.9.0/24"]), "a group or a built-in peer has that name"),
        (
            declared(addresses__controller=["10.0.0.99"]),
            "a host of the fleet is named 'controller'",
        ),
        (declared(external__db={"addresses": []}), "a host of the inventory has that name"),
        (declared(external__internet__owner="nobody"), "owner 'nobody' is no host"),
        (declared(external__internet__services=["gopher"]), "unknown service 'gopher'"),
    ],
)
def test_refused(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FleetError) as caught:
        parse_fleet(data)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rules_of_a_slave(fleet: Fleet) -> None:
    rules = host_rules(fleet, "slave1")
    ssh = {"name": "controllers -> fleet", "peer": "controllers"}
    assert rules["inbound"] == [
        {**ssh, "protocol": "icmp", "ports": []},
        {**ssh, "protocol": "tcp", "ports": [22]},
    ]
    assert [(r["peer"], r["protocol"], r["ports"]) for r in rules["outbound"]] == [
        ("cache_servers", "tcp", [3142]),
        ("cache_servers", "udp", [53]),
    ]
    assert rules["sets"] == {
        "cache_servers": ["10.0.0.14/32"],
        "controllers": ["10.0.0.1/32", "fd00::1/128"],
    }
    assert rules["controller_ports"] == [22]


def test_rules_of_a_master_exclude_what_is_not_the_internet(fleet: Fleet) -> None:
    rules = host_rules(fleet, "master")
    [web] = [rule for rule in rules["outbound"] if rule["ports"] == [80]]
    assert (web["peer"], web["except"]) == ("any", ["not_internet"])
    special = rules["sets"]["not_internet"]
    assert {"10.0.0.0/8", "198.18.0.0/15", "8000::/1"} <= set(special)
    assert not any(entry.startswith("198.51.100.") for entry in special)


def test_an_empty_group_gives_no_address() -> None:
    data = with_flow(source="request_handlers", to="databases", services=["postgresql"])
    rules = host_rules(parse_fleet(data), "db")
    assert rules["sets"]["request_handlers"] == []


def test_jobs_come_to_the_cache_server_alone() -> None:
    data = declared()
    data["job_networks"] = {"slave1": "10.0.0.128/26", "slave2": "10.0.0.192/26"}
    fleet = parse_fleet(data)
    rules = host_rules(fleet, "cache")
    assert rules["sets"]["jobs"] == ["10.0.0.128/25"]
    assert [(r["name"], r["ports"]) for r in rules["inbound"] if r["peer"] == "jobs"] == [
        ("jobs, policy internet", [3142]),
        ("jobs, policy internet", [53]),
    ]
    for name in ("db", "master", "slave1"):
        assert "jobs" not in host_rules(fleet, name)["sets"]
    # Only a slave passes something on, and only for its own jobs.
    assert host_rules(fleet, "slave2")["forward"] == {
        "interfaces": "cbj*",
        "networks": ["10.0.0.192/26"],
    }
    assert "forward" not in rules


def test_who_must_hear_of_a_host() -> None:
    fleet = parse_fleet({**declared(), "job_networks": RANGES})
    assert affected_by(fleet, "slave1") == ["cache"]
    assert affected_by(fleet, "db") == ["master"]
    assert affected_by(fleet, "cache") == ["slave1", "slave2"]
    assert affected_by(fleet, "outside1") == []
    # Its address is not the internet: whoever may reach that has it among the exceptions.
    public = declared()
    public["addresses"]["slave2"] = ["203.0.113.22"]
    assert affected_by(parse_fleet(public), "slave2") == ["cache", "master"]


def test_policies_are_those_that_jobs_can_name() -> None:
    assert set(parse_fleet(declared(job_flows__none=[])).job_flows) >= {"none", "internet"}
    with pytest.raises(FleetError) as caught:
        parse_fleet(declared(job_flows__packages=[]))
    assert str(caught.value) == (
        "cellblock_job_flows.packages: there is no such policy; known are none, cache, internet"
    )


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ({"slave1": "10.0.0.16/28"}, "slave1: its range for jobs 10.0.0.16/28 overlaps slave1's"),
        ({"slave1": "10.0.0.0/29"}, "overlaps cellblock_networks.controllers 10.0.0.1/32"),
        (
            {"slave1": "10.0.0.128/25", "slave2": "10.0.0.192/26"},
            "slave2: its range for jobs 10.0.0.192/26 overlaps slave1's range for jobs",
        ),
        ({"db": "10.0.0.128/25"}, "db: has a network for jobs but is no slave"),
        ({"slave1": "jobs"}, "slave1: its range for jobs 'jobs' is no network"),
    ],
)
def test_ranges_for_jobs_refused(ranges: dict[str, str], complaint: str) -> None:
    with pytest.raises(FleetError) as caught:
        parse_fleet({**declared(), "job_networks": ranges})
    assert complaint in str(caught.value)


RANGES = {"slave1": "10.0.0.128/26", "slave2": "10.0.0.192/26"}
PREFIX = "2001:db8:1:2::/64"


def with_ipv6(prefixes: Any, ranges: Any = RANGES, **more: Any) -> dict[str, Any]:
    return {**declared(**more), "job_networks": ranges, "job_ipv6_prefixes": prefixes}


def test_ipv6_addresses_of_jobs_are_made_from_their_ipv4_addresses() -> None:
    fleet = parse_fleet(with_ipv6({"slave1": PREFIX, "slave2": "fd12::/96"}))
    assert {slave: str(n) for slave, n in fleet.job_ipv6_networks.items()} == {
        "slave1": "2001:db8:1:2::a00:80/122",
        "slave2": "fd12::a00:c0/122",
    }
    assert {slave: str(n) for slave, n in fleet.job_networks.items()} == RANGES
    # Public by their number, and none of them is the internet; their neighbours are.
    assert not fleet.is_internet(ip_address("2001:db8:1:2::a00:80"))
    assert fleet.is_internet(ip_address("2001:db8:1:2::a00:7f"))
    assert fleet.is_internet(ip_address("2001:db8:1:2::a00:c0"))


def test_without_a_prefix_no_job_has_ipv6() -> None:
    fleet = parse_fleet({**declared(), "job_networks": RANGES})
    assert fleet.job_ipv6_networks == {} == fleet.job_ipv6_prefixes
    nothing: Any
    for nothing in ({}, None):
        assert parse_fleet(with_ipv6(nothing)) == fleet


@pytest.mark.parametrize(
    ("prefixes", "complaint"),
    [
        ({"db": PREFIX}, "db: has an IPv6 prefix for jobs but is no slave; remove it"),
        ({"slave1": "jobs"}, "(cellblock_job_ipv6_prefix) 'jobs' is no network ("),
        ({"slave1": None}, "(cellblock_job_ipv6_prefix) None is no network ("),
        ({"slave1": "2001:db8:1:2::1/64"}, "is no network (2001:db8:1:2::1/64 has host bits set)"),
        ({"slave1": "198.18.0.0/16"}, "198.18.0.0/16 is not IPv6; write one such as 2001:db8:1:2"),
        ({"slave1": "fd12::/97"}, "fd12::/97 leaves no room for the 32 bits of an IPv4 address"),
        ({"slave1": "fe80::/64"}, "fe80::/64 is neither global unicast nor unique local"),
        ({"slave1": "ff02::/64"}, "ff02::/64 is neither"),
        ({"slave1": "fec0::/64"}, "fec0::/64 is neither"),
        ({"slave1": "::/64"}, "::/64 is neither"),
        ({"slave1": "4000::/64"}, "4000::/64 is neither"),
        # With an IPv4 address inside, not behind.
        ({"slave1": "64:ff9b::/96"}, "64:ff9b::/96 is neither"),
        ({"slave1": "2002:a00:1::/64"}, "2002:a00:1::/64 is neither"),
        ({"slave1": "2000::/3"}, "2000::/3 is neither"),
    ],
)
def test_ipv6_prefixes_for_jobs_refused(prefixes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FleetError) as caught:
        parse_fleet(with_ipv6(prefixes))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_ipv6_prefix_needs_a_range_of_ipv4_addresses() -> None:
    with pytest.raises(
        FleetError, match="slave2: has an IPv6 prefix for jobs but no range of IPv4"
    ):
        parse_fleet(with_ipv6({"slave2": PREFIX}, {"slave1": RANGES["slave1"]}))
    with pytest.raises(FleetError, match="slave1: its range for jobs fd00:1::/64 is not IPv4"):
        parse_fleet(with_ipv6({}, {"slave1": "fd00:1::/64"}))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            {"addresses__db": ["10.0.0.12", "2001:db8:1:2::a00:90"]},
            "slave1: its IPv6 range for jobs 2001:db8:1:2::a00:80/122 overlaps db's address"
            " 2001:db8:1:2::a00:90/128; choose a cellblock_job_ipv6_prefix where none of these is used",
        ),
        (
            {"networks__clients": ["2001:db8:1::/48"]},
            "overlaps cellblock_networks.clients 2001:db8:1::/48; choose",
        ),
        (
            {"external__metadata__addresses": ["2001:db8:1:2::a00:c1"]},
            "slave2: its IPv6 range for jobs 2001:db8:1:2::a00:c0/122 overlaps metadata's address",
        ),
        # Control.
        ({"addresses__db": ["10.0.0.12", "2001:db8:1:2::a00:7f"]}, ""),
    ],
)
def test_ipv6_ranges_for_jobs_that_overlap(more: dict[str, Any], complaint: str) -> None:
    data = with_ipv6({"slave1": PREFIX, "slave2": PREFIX}, **more)
    if not complaint:
        parse_fleet(data)
        return
    with pytest.raises(FleetError) as caught:
        parse_fleet(data)
    assert complaint in str(caught.value)


def test_rules_where_jobs_have_ipv6() -> None:
    fleet = parse_fleet(with_ipv6({"slave2": PREFIX}))
    before = parse_fleet({**declared(), "job_networks": RANGES})
    assert host_rules(fleet, "cache")["sets"]["jobs"] == [
        "10.0.0.128/25",
        "2001:db8:1:2::a00:c0/122",
    ]
    assert host_rules(fleet, "slave2")["forward"] == {
        "interfaces": "cbj*",
        "networks": ["10.0.0.192/26", "2001:db8:1:2::a00:c0/122"],
    }
    # Another slave's are no reason to pass IPv6 on.
    assert host_rules(fleet, "slave1") == host_rules(before, "slave1")
    special = host_rules(fleet, "master")["sets"]["not_internet"]
    assert set(special) - set(host_rules(before, "master")["sets"]["not_internet"]) == {
        "2001:db8:1:2::a00:c0/122"
    }


def test_clients_of_a_service(fleet: Fleet) -> None:
    assert clients(fleet, "postgresql") == ["10.0.0.15/32", "fd00::15/128"]
    assert clients(fleet, "ssh") == ["10.0.0.1/32", "fd00::1/128"]
    assert clients(fleet, "web")[0] == "10.0.0.15/32"
