"""Addresses and subnets of the inventory: which are given, and which are refused."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import addresses


@pytest.mark.parametrize(
    ("subnet", "number", "address"),
    [
        ("10.213.0.0/24", 2, "10.213.0.2"),
        ("10.213.0.0/24", 254, "10.213.0.254"),
        ("192.0.2.64/26", 21, "192.0.2.85"),
        ("10.0.0.0/16", 258, "10.0.1.2"),
        ("fd12:3456:789a:1::/64", 21, "fd12:3456:789a:1::15"),
    ],
)
def test_nth_address(subnet: str, number: int, address: str) -> None:
    assert addresses.nth_address(subnet, number) == address


@pytest.mark.parametrize(
    ("subnet", "number", "complaint"),
    [
        ("10.213.0.0/24", 0, "no host address number 0; choose one from 2 to 254"),
        ("10.213.0.0/24", 1, "no host address number 1;"),
        ("10.213.0.0/24", 255, "no host address number 255;"),
        ("192.0.2.64/26", 63, "choose one from 2 to 62"),
        ("10.213.0.0/24", -3, "no host address number -3;"),
        ("10.213.0.0/24", "21", "'21' is not a whole number"),
        ("10.213.0.0/24", True, "True is not a whole number"),
        ("10.213.0.7/24", 21, "'10.213.0.7/24' is not a subnet"),
        ("fd00::/64", 1, "no host address number 1; choose one from 2 to"),
        ("10.213.0.0", 21, "10.213.0.0 has no room for hosts; use a larger one"),
        (None, 21, "None is not a subnet"),
    ],
)
def test_nth_address_refuses(subnet: Any, number: Any, complaint: str) -> None:
    with pytest.raises(AnsibleFilterError, match="cellblock.fleet.nth_address: ") as caught:
        addresses.nth_address(subnet, number)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("given", "networks", "left"),
    [
        (["10.0.0.1", "fd00::1"], [], ["10.0.0.1", "fd00::1"]),
        (["10.0.0.1", "10.0.0.2"], ["10.0.0.2/32"], ["10.0.0.1"]),
        # However an address is written.
        (["FD00:0::2", "fd00::3"], ["fd00::2/128"], ["fd00::3"]),
        # A network that an address is in does not name it.
        (["10.0.0.1"], ["10.0.0.0/24", "10.0.0.0/31", "fd00::1/128"], ["10.0.0.1"]),
        ([], ["10.0.0.1/32"], []),
    ],
)
def test_without_hosts(given: list[str], networks: list[str], left: list[str]) -> None:
    assert addresses.without_hosts(given, networks) == left


@pytest.mark.parametrize(
    ("given", "networks"), [(["cache1"], []), (["10.0.0.1"], ["10.0.0.1/24"]), (["x/y"], [])]
)
def test_without_hosts_refuses(given: list[str], networks: list[str]) -> None:
    with pytest.raises(
        AnsibleFilterError, match="cellblock.fleet.without_hosts: .* is not a subnet"
    ):
        addresses.without_hosts(given, networks)


def test_derived_subnet_depends_on_the_name_alone() -> None:
    assert addresses.derived_subnet("test-f2af6c", "10.214.0.0/15") == "10.214.161.0/24"


def test_derived_subnets_spread_over_the_whole_network() -> None:
    within = ipaddress.IPv4Network("10.214.0.0/15")
    subnets = [
        ipaddress.IPv4Network(addresses.derived_subnet(f"fleet-{n}", str(within)))
        for n in range(300)
    ]
    assert all(subnet.prefixlen == 24 and subnet.subnet_of(within) for subnet in subnets)
    assert {subnet.network_address.packed[1] for subnet in subnets} == {214, 215}
    # 300 of 512 at random: about 227 different ones are to be expected.
    assert len(set(subnets)) > 200


def test_derived_subnet_of_a_single_24_is_that_24() -> None:
    assert addresses.derived_subnet("any", "192.0.2.0/24") == "192.0.2.0/24"


def test_derived_subnet_refuses_a_network_without_room() -> None:
    with pytest.raises(AnsibleFilterError, match=r"192\.0\.2\.0/25 is smaller than the /24"):
        addresses.derived_subnet("any", "192.0.2.0/25")


def test_derived_subnet_of_ipv6_is_a_64() -> None:
    subnet = ipaddress.IPv6Network(addresses.derived_subnet("local", "fd00::/8"))
    assert subnet.prefixlen == 64
    assert subnet.subnet_of(ipaddress.IPv6Network("fd00::/8"))
    assert addresses.derived_subnet("other", "fd00::/8") != str(subnet)


def test_bridge_address() -> None:
    assert addresses.bridge_address("10.213.0.0/24") == "10.213.0.1"
    assert addresses.bridge_address("fd00:1::/64") == "fd00:1::1"


SEGMENTS = {
    "front": {"ipv4": "10.0.1.0/24", "ipv6": "fd00:1::/64"},
    "back": {"ipv4": "10.0.2.0/24", "ipv6": "fd00:2::/64"},
}


def test_container_networks() -> None:
    assert addresses.container_networks(["back", "front"], SEGMENTS, 21, "cellblock-x-") == [
        {"name": "cellblock-x-back", "ipv4_address": "10.0.2.21", "ipv6_address": "fd00:2::15"},
        {"name": "cellblock-x-front", "ipv4_address": "10.0.1.21", "ipv6_address": "fd00:1::15"},
    ]


def test_container_networks_refuses_an_unknown_network() -> None:
    with pytest.raises(AnsibleFilterError, match="'side', which is none of the fleet's networks"):
        addresses.container_networks(["front", "side"], SEGMENTS, 21, "x-")


def test_upper_half() -> None:
    assert addresses.upper_half("10.213.0.0/24") == "10.213.0.128/25"
    with pytest.raises(AnsibleFilterError, match="no halves"):
        addresses.upper_half("10.213.0.1/32")
