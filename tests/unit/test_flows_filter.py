"""The filters that derive things from the declared flows: how they come by hosts' addresses."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.filter import flows


def model_of(hostvars: dict[str, Any], **more: Any) -> dict[str, Any]:
    hosts = list(hostvars)
    return flows.fleet_model(
        [], {}, {}, {}, {}, {"all": hosts, "worker_slaves": hosts}, {"a": {}, **hostvars}, **more
    )


def test_addresses_are_those_declared_or_those_that_ansible_connects_to() -> None:
    hostvars = {
        "a": {"cellblock_addresses": ["10.0.0.1", "fd00::1"], "ansible_host": "nosuch.invalid"},
        "b": {"ansible_host": "10.0.0.2"},
        "fd00::3": {},
    }
    assert model_of(hostvars)["addresses"] == {
        "a": ["10.0.0.1", "fd00::1"],
        "b": ["10.0.0.2"],
        "fd00::3": ["fd00::3"],
    }


def test_a_name_that_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ["10.0.0.2", "10.0.0.2", "fd00::2", "fe80::2%eth0"]

    def resolve(name: str, *_: Any, **__: Any) -> list[Any]:
        assert name == "a.example"
        return [(0, 0, 0, "", (address, 0)) for address in told]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert model_of({"a": {"ansible_host": "a.example"}})["addresses"] == {
        "a": ["10.0.0.2", "fd00::2"]
    }


# No resolver is asked: .invalid does not exist, and the other is no name.
@pytest.mark.parametrize("name", ["a.nosuch.invalid", "a..b", "x" * 70 + ".example"])
def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **more: Any) -> Any:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert model_of({"a": {"ansible_host": name}}) == {
        "problem": (
            f"a: its name {name!r} does not resolve on the controller; set cellblock_addresses to the"
            " addresses that it has on the fleet's networks"
        )
    }


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (["10.0.0.1", "db.example"], "a: cellblock_addresses names 'db.example', which is no IPv4"),
        ("10.0.0.1", "a: cellblock_addresses is '10.0.0.1': write a list"),
        ([], "a: cellblock_addresses is empty: write at least one address"),
    ],
)
def test_declared_addresses_are_literals(declared: Any, says: str) -> None:
    """A name among them is refused, never resolved: what it means could change under the rules."""
    data = model_of({"a": {"cellblock_addresses": declared}})
    assert list(data) == ["problem"]
    assert data["problem"].startswith(says)


def slaves(*names: str, **variables: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"ansible_host": f"10.0.0.{number}", **variables.get(name, {})}
        for number, name in enumerate(names, start=1)
    }


def ranges_of(hostvars: dict[str, Any], **more: Any) -> Any:
    settings = {"job_range": "10.0.1.0/24", **more}
    data = model_of({"a": {"ansible_host": "10.0.9.9"}, **hostvars}, **settings)
    return data.get("job_networks", data.get("problem"))


def test_a_range_for_jobs_is_that_of_the_slaves_number_or_given_to_each() -> None:
    hostvars = slaves("a", "b2", a={"cellblock_job_range_number": 8})
    dealt = {"a": "10.0.1.224/27", "b2": "10.0.1.32/27"}
    assert ranges_of(hostvars) == dealt
    assert ranges_of(hostvars, job_range_prefix_length=28)["b2"] == "10.0.1.16/28"
    # The number that is written counts, not the name's.
    named = slaves(
        "a", "b2", a={"cellblock_job_range_number": 1}, b2={"cellblock_job_range_number": 3}
    )
    assert ranges_of(named)["b2"] == "10.0.1.64/27"
    # Of a full name it is the host's own part that counts.
    full = slaves("slave2.example.com", "a", a={"cellblock_job_range_number": 8})
    assert ranges_of(full)["slave2.example.com"] == "10.0.1.32/27"
    # Whoever comes or goes, in whatever order: the others stay.
    more = slaves("c1", "b2", "d3", "a", a={"cellblock_job_range_number": 8})
    assert {slave: ranges_of(more)[slave] for slave in dealt} == dealt
    assert ranges_of(slaves("a", a={"cellblock_job_range_number": 8})) == {"a": dealt["a"]}
    assert ranges_of(hostvars, job_range={"b2": "10.0.2.0/24"}) == {"b2": "10.0.2.0/24"}
    nothing: Any
    for nothing in (None, "", {}):
        assert ranges_of(hostvars, job_range=nothing) == {}


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "b",
            {},
            "b: its name ends in no number, which would say which part of cellblock_job_range",
        ),
        ("b0", {}, "b0: its name has the number 0"),
        ("b1", {"cellblock_job_range_number": "2"}, "b1: its name has the number '2'"),
        ("b9", {}, "has too few addresses: it has 8 ranges of /27, and b9 is number 9"),
        ("b8", {"prefix_length": 31}, "cellblock_job_range_prefix_length is 31; write a number"),
        ("b8", {"prefix_length": "27"}, "cellblock_job_range_prefix_length is '27'"),
    ],
)
def test_numbers_of_ranges_refused(name: str, settings: dict[str, Any], says: str) -> None:
    length = settings.pop("prefix_length", None)
    found = ranges_of(
        slaves("a", name, **{name: settings, "a": {"cellblock_job_range_number": 7}}),
        job_range_prefix_length=length,
    )
    assert isinstance(found, str)
    assert says in found


def test_an_ipv6_prefix_for_jobs_is_that_of_all_who_have_a_range_or_given_to_each() -> None:
    hostvars = slaves("a", "b2", a={"cellblock_job_range_number": 1})
    prefix = "2001:db8:1:2::/64"

    def prefixes(value: Any, job_range: Any = "10.0.1.0/24") -> Any:
        return model_of(hostvars, job_range=job_range, job_ipv6_prefix=value)["job_ipv6_prefixes"]

    assert prefixes(prefix) == {"a": prefix, "b2": prefix}
    assert prefixes(prefix, {"b2": "10.0.2.0/24"}) == {"b2": prefix}
    assert prefixes({"a": prefix}) == {"a": prefix}
    nothing: Any
    for nothing in (None, "", {}):
        assert prefixes(nothing) == {}
    assert model_of(hostvars, job_range="10.0.1.0/24")["job_ipv6_prefixes"] == {}
    # As for ranges: a fleet without slaves has nothing to share out.
    without = flows.fleet_model(
        *([], {}, {}, {}, {}, {"all": ["a"], "databases": ["a"]}, hostvars),
        job_range="10.0.1.0/24",
        job_ipv6_prefix=prefix,
    )
    assert without["job_ipv6_prefixes"] == {}


@pytest.mark.parametrize(
    ("prefix", "job_range", "says"),
    [
        ("2001:db8:1:2::/64", None, "is 2001:db8:1:2::/64, but no slave has a range of IPv4"),
        (["2001:db8:1:2::/64"], "10.0.1.0/24", "is ['2001:db8:1:2::/64']; write one prefix such"),
        ("2001:db8:1:2::1", "10.0.1.0/24", "2001:db8:1:2::1/128 leaves no room"),
        ({"c": "2001:db8:1:2::/64"}, "10.0.1.0/24", "c: has an IPv6 prefix for jobs but is no"),
    ],
)
def test_ipv6_prefixes_for_jobs_refused(prefix: Any, job_range: Any, says: str) -> None:
    hostvars = {"a": {"ansible_host": "10.0.0.1", "cellblock_job_range_number": 1}}
    data = model_of(hostvars, job_range=job_range, job_ipv6_prefix=prefix)
    assert list(data) == ["problem"]
    assert says in data["problem"]


def test_the_fleets_networks_are_hosts_jobs_and_what_is_declared() -> None:
    data = flows.fleet_model(
        [],
        {},
        {"controllers": ["10.0.1.0/24"]},
        {},
        {},
        {"all": ["slave1"], "worker_slaves": ["slave1"]},
        {"slave1": {"cellblock_addresses": ["10.0.0.1", "fd00::1"]}},
        job_range={"slave1": "10.0.0.128/27"},
    )
    networks = ["10.0.0.1/32", "10.0.0.128/27", "10.0.1.0/24", "fd00::1/128"]
    assert flows.fleet_networks(data) == networks
    assert flows.fleet_networks({}) == []
