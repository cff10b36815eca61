"""Job networks on paper: the host's section, what a stage may reach, and the rules that follow."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest

from cellblock.engine.job import Stage
from cellblock.engine.job_parser import parse_job
from cellblock.engine.limits import StageConstraints
from cellblock.errors import (
    ForbiddenDestinationError,
    HostSetupError,
    InvalidJobError,
    UnresolvedNameError,
    UnsupportedNetworkError,
)
from cellblock.job_network import access as network
from cellblock.job_network.access import Access
from cellblock.job_network.plan import ROUTED_GATEWAY
from cellblock.job_network.rules import open_rules
from cellblock.job_network.section import NetworkConfig

CACHE = {"to": ["10.213.0.14/32"], "protocol": "tcp", "ports": [3142]}

IPV6 = {"prefix": "fd00:cb::/64", "prefix_length": 64, "gateway": "fe80::1"}


def section(**changes: Any) -> dict[str, Any]:
    fields = {
        "mode": "macvlan",
        "parent": "cellblock0",
        "slots": 16,
        "addresses": "10.213.0.128/27",
        "prefix_length": 24,
        "gateway": "10.213.0.30",
        "mac_prefix": "02:CB:00",
        "resolvers": ["10.213.0.14"],
        "denied": ["192.0.2.0/24", "2001:db8::/32"],
        "policies": {
            "cache": {"services": [CACHE]},
            "internet": {
                "services": [CACHE],
                "internet": [{"protocol": "tcp", "ports": [80, 443]}],
            },
        },
        "guard": {"tables": [["inet", "cellblock"]]},
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not ...}


def config(**changes: Any) -> NetworkConfig:
    return NetworkConfig.parse(section(**changes), "engine.json: network")


def stage(**fields: Any) -> Stage:
    return parse_job(
        {"environment": "base", "stages": [{"name": "run", "command": ["true"], **fields}]}
    ).stages[0]


def access_of(wanted: Stage, known: NetworkConfig, resolve: Any = None) -> Access:
    return Access.of(wanted.network, wanted.network_allow, "stages[0]", known, "slave1", resolve)


def names(table: Mapping[str, Sequence[str]]) -> Any:
    return lambda wanted, ipv6: {name: [IPv4Address(a) for a in table[name]] for name in wanted}


def allow(to: str, table: Mapping[str, Sequence[str]] | None = None, **changes: Any) -> Access:
    entry = {"to": to, "protocol": "tcp", "ports": [443]}
    wanted = stage(network="allow", network_allow=[entry])
    return access_of(wanted, config(**changes), names(table or {}))


def test_addresses_of_slots() -> None:
    parsed = config()
    assert str(parsed.address(3)) == "10.213.0.131"
    assert parsed.mac(3) == "02:cb:00:d5:00:83"
    assert len({parsed.mac(slot) for slot in range(parsed.slots)}) == parsed.slots


def test_denied_has_the_segment_and_what_the_host_adds() -> None:
    denied = config(addresses="198.51.100.64/28", gateway="198.51.100.1").all_denied()
    azure = "168.63.129.16"
    for address in (
        "10.1.2.3",
        "169.254.169.254",
        "127.0.0.1",
        "192.0.2.1",
        "198.51.100.200",
        azure,
    ):
        assert any(IPv4Address(address) in entry for entry in denied), address
    assert not any(IPv4Address("8.8.8.8") in entry for entry in denied)
    assert IPv4Network("0.0.0.0/0") not in denied


@pytest.mark.parametrize(
    ("changes", "field", "complaint"),
    [
        ({"mode": "bridge"}, ".mode", "macvlan or routed"),
        ({"parent": ...}, ".parent", "is missing"),
        ({"parent": "a/b"}, ".parent", "name of an interface"),
        ({"slots": 0}, ".slots", "from 1 to"),
        ({"slots": True}, ".slots", "from 1 to"),
        ({"slots": 33}, ".addresses", "has 32 addresses for 33 slots"),
        ({"addresses": "10.213.0.129/27"}, ".addresses", "IPv4 network"),
        ({"addresses": "10.214.0.0/27"}, ".addresses", "not within the segment 10.213.0.0/24"),
        ({"addresses": "10.213.0.0/27"}, ".addresses", "the segment's own address"),
        ({"addresses": "10.213.0.16/28"}, ".addresses", "the gateway"),
        ({"addresses": "10.213.0.240/28"}, ".addresses", "broadcast"),
        ({"gateway": "fe80::1"}, ".gateway", "IPv4 address"),
        ({"mac_prefix": "02:cb"}, ".mac_prefix", "three bytes"),
        ({"mac_prefix": "00:cb:00"}, ".mac_prefix", "locally administered"),
        ({"mac_prefix": "03:cb:00"}, ".mac_prefix", "locally administered"),
        ({"resolvers": []}, ".resolvers", "needs one"),
        ({"names": ["cache"]}, ".names", "by host name"),
        ({"names": {"a b": ["10.213.0.14"]}}, ".names", "host names"),
        ({"names": {"cache": []}}, ".names.cache", "one or more"),
        ({"names": {"cache": ["cache1"]}}, ".names.cache[0]", "an address"),
        ({"denied": "10.0.0.0/8"}, ".denied", "a list"),
        ({"denied": ["10.0.0.1/8"]}, ".denied[0]", "write a network"),
        ({"ipv6": {**IPV6, "prefix": "10.0.0.0/8"}}, ".ipv6.prefix", "IPv6 network of at most /96"),
        ({"ipv6": {**IPV6, "prefix": "fd00::/97"}}, ".ipv6.prefix", "IPv6 network of at most /96"),
        ({"denied": ["fe80::%eth0/64"]}, ".denied[0]", "write a network"),
        ({"names": {"cache": ["fe80::1%eth0"]}}, ".names.cache[0]", "write an address"),
        ({"ipv6": {**IPV6, "prefix": "fd00::1/64"}}, ".ipv6.prefix", "write a network"),
        ({"ipv6": {**IPV6, "prefix_length": 8.5}}, ".ipv6.prefix_length", "from 8 to 126"),
        ({"ipv6": {**IPV6, "gateway": "10.213.0.30"}}, ".ipv6.gateway", "IPv6 address"),
        ({"ipv6": {**IPV6, "gateway": "fd00:1::1"}}, ".ipv6.gateway", "not within the segment"),
        ({"ipv6": {**IPV6, "gateway": "fd00:cb::ad5:81"}}, ".ipv6.prefix", "the gateway, among"),
        ({"ipv6": {"prefix": "fd00::/64"}}, ".ipv6.prefix_length", "is missing"),
        ({"mode": "routed", "ipv6": IPV6}, ".ipv6.prefix_length", "not a known field"),
        ({"policies": {"all": {}}}, ".policies.all", "not a known field"),
        ({"policies": {"cache": {"services": [{**CACHE, "to": []}]}}}, ".to", "one or more"),
        ({"policies": {"cache": {"services": [{**CACHE, "ports": [0]}]}}}, ".ports[0]", "65535"),
        (
            {"policies": {"cache": {"services": [{**CACHE, "protocol": "icmp"}]}}},
            ".protocol",
            "tcp",
        ),
        ({"guard": {"tables": ["inet"]}}, ".guard.tables[0]", "family and name"),
        ({"gate": 1}, ".gate", "not a known field"),
    ],
)
def test_what_is_wrong_in_the_section(changes: Any, field: str, complaint: str) -> None:
    with pytest.raises(HostSetupError) as caught:
        config(**changes)
    assert caught.value.subject.startswith("engine.json: network")
    assert caught.value.subject.endswith(field)
    assert complaint in str(caught.value)


def test_the_hosts_own_policies_have_the_hosts_names() -> None:
    known = config(names={"cache": ["10.213.0.14", "10.213.0.15"]})
    for policy in ("cache", "internet"):
        hosts = access_of(stage(network=policy), known).hosts
        assert hosts.endswith("10.213.0.14\tcache\n10.213.0.15\tcache\n")
    # A list of the job's own reaches nothing of the host's.
    listed = stage(
        network="allow", network_allow=[{"to": "198.51.100.9", "protocol": "tcp", "ports": [1]}]
    )
    assert "\tcache" not in access_of(listed, known).hosts.replace("localhost cellblock", "")


def test_routed_mode_needs_no_segment() -> None:
    parsed = config(mode="routed", parent=..., gateway=..., prefix_length=..., slots=32)
    assert (parsed.prefix_length, parsed.gateway) == (32, ROUTED_GATEWAY)


@pytest.mark.parametrize(
    ("to", "complaint"),
    [
        ("10.1.2.3", "in 10.0.0.0/8"),
        ("169.254.169.254", "in 169.254.0.0/16"),
        ("192.0.2.128/25", "in 192.0.2.0/24"),
        ("8.0.0.0/5", "overlaps 10.0.0.0/8"),
        ("0.0.0.0/0", "overlaps"),
        ("rebinding.example", "is rebinding.example (10.213.0.12), in 10.0.0.0/8"),
    ],
)
def test_destinations_that_no_job_may_reach(to: str, complaint: str) -> None:
    table = {"rebinding.example": ["198.51.100.10", "10.213.0.12"]}
    with pytest.raises(ForbiddenDestinationError, match="no job may reach") as caught:
        allow(to, table)
    assert caught.value.subject == "stages[0].network_allow[0].to"
    assert complaint in str(caught.value)


def test_names_are_pinned() -> None:
    access = allow("mirror.example", {"mirror.example": ["198.51.100.10", "203.0.113.10"]})
    assert "198.51.100.10\tmirror.example\n203.0.113.10\tmirror.example\n" in access.hosts
    assert "nameserver" not in access.resolv_conf
    rules = open_rules(config(), access, StageConstraints())
    assert "ip daddr { 198.51.100.10/32, 203.0.113.10/32 } tcp dport 443 goto opening" in rules


@pytest.mark.parametrize(
    ("code", "says", "remedy"),
    [
        (socket.EAI_NONAME, "Name or service not known", "correct the name"),
        (socket.EAI_AGAIN, "Temporary failure in name resolution", "whether the name servers"),
        (socket.EAI_FAIL, "Non-recoverable failure in name resolution", "whether the name servers"),
    ],
)
def test_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, code: int, says: str, remedy: str
) -> None:
    def nothing(*_: Any) -> Any:
        raise socket.gaierror(code, says)

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    with pytest.raises(UnresolvedNameError, match=rf"mirror\.example.*{says}.*{remedy}"):
        network.resolve_names(["mirror.example"], False)


def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    late = threading.Event()
    monkeypatch.setattr(network, "RESOLVE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [] if late.wait(5) else [])
    with pytest.raises(UnresolvedNameError, match="no answer within"):
        network.resolve_names(["mirror.example"], False)
    late.set()


def test_names_that_hang_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    late = threading.Event()
    hanging: list[str] = []

    def lookup(name: str, *_: Any) -> Any:
        if name.endswith(".fast"):
            return [(0, 0, 0, "", ("198.51.100.10", 0))]
        hanging.append(name)
        late.wait(5)
        return []

    monkeypatch.setattr(network, "RESOLVE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    try:
        for number in range(3):
            names = [f"{number}-{n}.slow" for n in range(network.MAX_LOOKUPS - 4)]
            with pytest.raises(UnresolvedNameError):
                network.resolve_names(names, False)
            assert len(hanging) <= network.MAX_LOOKUPS
        with pytest.raises(UnresolvedNameError, match="other names are being resolved"):
            network.resolve_names(["one.fast"], False)
    finally:
        late.set()
    monkeypatch.setattr(network, "RESOLVE_TIMEOUT_S", 5.0)
    # More names than places, of which each is free again at once.
    many = [f"{n}.fast" for n in range(3 * network.MAX_LOOKUPS)]
    assert len(network.resolve_names(many, False)) == len(many)


@pytest.mark.parametrize("excess", [0, 1])
def test_a_name_with_many_addresses(monkeypatch: pytest.MonkeyPatch, excess: int) -> None:
    count = network.MAX_ADDRESSES + excess
    answer = [(0, 0, 0, "", (f"198.51.100.{n}", 0)) for n in range(count)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
    if not excess:
        assert len(network.resolve_names(["mirror.example"], False)["mirror.example"]) == count
        return
    with pytest.raises(UnresolvedNameError, match=f"it has {count} of them, more than"):
        network.resolve_names(["mirror.example"], False)


def test_policies_of_the_host() -> None:
    internet = access_of(stage(network="internet"), config())
    assert internet.resolv_conf == "nameserver 10.213.0.14\n"
    lines = open_rules(config(), internet, StageConstraints()).splitlines()
    chain = [line.partition(" allowed ")[2] for line in lines if " allowed " in line]
    assert chain == [
        "ip daddr 10.213.0.14/32 tcp dport 3142 goto opening",
        "ip daddr @denied return",
        "tcp dport { 80, 443 } goto opening",
    ]
    with pytest.raises(
        UnsupportedNetworkError, match="opens nothing for it to jobs on slave1; use one of none"
    ):
        access_of(stage(network="cache"), config(policies={}))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"network": "internet", "network_allow": []}, "of no use with the policy internet"),
        ({"network": "allow"}, "is missing"),
        ({"network": "allow", "network_allow": []}, "a list of 1 to"),
        ({"network": "allow", "network_allow": [{"to": "a.example"}]}, "protocol: is missing"),
    ],
)
def test_allow_lists_that_make_no_sense(fields: Any, complaint: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        stage(**fields)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"to": "2001:db8::1/64"}, "to"),
        ({"to": "198.51.100.1/24"}, "to"),
        ({"to": "198.51.100.999"}, "to"),
        ({"to": "198.51.100"}, "to"),
        ({"to": "-a.example"}, "to"),
        ({"to": "a..example"}, "to"),
        ({"to": "a.example; drop"}, "to"),
        ({"to": ""}, "to"),
        ({"protocol": "icmp"}, "protocol"),
        ({"ports": []}, "ports"),
        ({"ports": [0]}, "ports[0]"),
        ({"ports": ["443"]}, "ports[0]"),
        ({"ports": [True]}, "ports[0]"),
        ({"ports": 443}, "ports"),
    ],
)
def test_entries_that_make_no_sense(changes: Any, field: str) -> None:
    entry = {"to": "198.51.100.10", "protocol": "tcp", "ports": [443], **changes}
    with pytest.raises(InvalidJobError) as caught:
        stage(network="allow", network_allow=[entry])
    assert caught.value.subject == f"stages[0].network_allow[0].{field}"


def test_ipv6_of_slots() -> None:
    assert config().ipv6_address(0) is None
    assert {network.version for network in config().all_denied()} == {4}
    parsed = config(ipv6=IPV6)
    assert str(parsed.ipv6_address(3)) == "fd00:cb::ad5:83"
    denied = config(
        ipv6={**IPV6, "prefix": "2001:db8:1:2::/64", "prefix_length": 56}, denied=["2a00::/64"]
    ).all_denied()
    for address in """::1 ::ffff:10.0.0.1 64:ff9b::a00:1 100::1 2001::1 2002:a00:1:: fc00::1 fd00::1
        fe80::1 fec0::1 ff02::1 2001:db8:1:ff::1 2a00::1 8000::1 5f00::1""".split():
        assert any(IPv6Address(address) in network for network in denied), address
    for address in ("2001:db8:2::1", "2606:4700::1", "2a00:0:0:1::1", "2001:200::1", "3fff:8::1"):
        assert not any(IPv6Address(address) in network for network in denied), address
    routed = config(mode="routed", ipv6={"prefix": "2001:db8:1:2::/64"}, denied=[])
    assert IPv6Network("2001:db8:1:2::ad5:80/123") in routed.all_denied()


def test_allow_lists_with_ipv6() -> None:
    with pytest.raises(UnsupportedNetworkError) as caught:
        allow("2001:db8:2::1")
    assert caught.value.subject == "stages[0].network_allow[0].to"
    assert "jobs on slave1 have no IPv6" in caught.value.message
    asked: list[bool] = []

    def resolve(wanted: Sequence[str], ipv6: bool) -> Any:
        asked.append(ipv6)
        return {wanted[0]: [IPv4Address("198.51.100.7"), IPv6Address("2001:db8:2::7")]}

    open_denied: dict[str, Any] = {"ipv6": IPV6, "denied": []}
    entries = [
        {"to": "mirror.example", "protocol": "tcp", "ports": [443]},
        {"to": "2001:db8:3::/48", "protocol": "udp", "ports": [53]},
    ]
    wanted = stage(network="allow", network_allow=entries)
    made = access_of(wanted, config(**open_denied), resolve)
    assert asked == [True]
    assert made.hosts.splitlines() == [
        "127.0.0.1\tlocalhost cellblock",
        "::1\tlocalhost cellblock",
        "198.51.100.7\tmirror.example",
        "2001:db8:2::7\tmirror.example",
    ]
    rules = open_rules(config(**open_denied), made, StageConstraints())
    assert "allowed ip daddr 198.51.100.7/32 tcp dport 443 goto opening" in rules
    assert "allowed ip6 daddr 2001:db8:2::7/128 tcp dport 443 goto opening" in rules
    assert "allowed ip6 daddr 2001:db8:3::/48 udp dport 53 goto opening" in rules
    for to in ("fd00:cb::1", "::/0", "fe80::1", "2002:a00:1::/48", "2000::/3", "::ffff:10.0.0.1"):
        with pytest.raises(ForbiddenDestinationError, match="which no job may reach"):
            allow(to, **open_denied)


def test_names_are_resolved_over_the_versions_that_slots_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families = []

    def answer(name: str, port: None, family: int, kind: int) -> list[Any]:
        families.append(family)
        return [(0, 0, 0, "", ("2001:db8::7%2", 0, 0, 0)), (0, 0, 0, "", ("198.51.100.7", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    for ipv6 in (False, True):
        found = network.resolve_names(["mirror.example"], ipv6)["mirror.example"]
        assert [str(address) for address in found] == ["198.51.100.7", "2001:db8::7"]
    assert families == [socket.AF_INET, socket.AF_UNSPEC]
