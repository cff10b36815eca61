"""What hosts answered to network_probe, taken with care: a captured host may answer with anything.

Each answer must have the shape that network_probe gives it, and nothing in it that was not asked
for. One that does not fit is left out, and the host has a ``problem``, one phrase that names what does
not fit; so what depends on that host is unproven and everything else is judged. Nothing that a host
said is quoted in it.

Numbers are bounded where they multiply: every address that a host says it has is tried by all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any

from ..validate import Value
from .completion import complete
from .probe_plan import SIBLING, Plan

# No module returns more: a listener notes at most so much, evidence is a sentence.
MOST_RECORDS = 20_000
LONGEST_TEXT = 2000
LONGEST_NAME = 200
LONGEST_ADDRESS = 64
LONGEST_REASON = 300
# A slave has an interface for each of its slots.
MOST_INTERFACES = 1024
MOST_ADDRESSES = 4096
# Of interfaces on a network of the fleet, which are tried from everywhere.
MOST_ON_THE_FLEETS_NETWORKS = 64

_MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}")
OUTCOMES = ("open", "refused", "filtered", "unreachable", "sent", "denied", "error")

# In the order in which they are asked.
_PARTS = ("listening", "probed", "collected")


class Misfit(Exception):
    """An answer is not what network_probe returns; the text names the place."""

    def __init__(self, where: str, what: str, _remedy: str = "") -> None:
        super().__init__(f"{where} {what}")


def listening(plan: Plan, responses: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Those of the hosts' answers to ``listening`` that ``completion.complete`` may be given.

    ``responses``: by host (and ``controller``), what the task returned.
    """
    request = _Request(plan)
    taken = {
        host: _taken("listening", result, request, host)[0] for host, result in responses.items()
    }
    return {host: answer for host, answer in taken.items() if answer is not None}


def observe(
    plan: Plan, responses: Mapping[str, Mapping[str, Any]]
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The completed plan, and the observations for ``verdict.judge``.

    ``responses``: by host (and ``controller``), what the tasks returned as ``listening``, ``probed`` and
    ``collected``. The plan is the same that the hosts' targets were made from: it depends on
    ``listening`` alone.
    """
    full = complete(
        plan, listening(plan, {host: parts.get("listening") for host, parts in responses.items()})
    )
    request = _Request(full)
    found: dict[str, dict[str, Any]] = {}
    for host, parts in responses.items():
        seen: dict[str, Any] = {}
        for part in _PARTS:
            answer, problem = _taken(part, parts.get(part), request, host)
            if answer is not None:
                seen[part] = answer
            if problem is not None:
                seen.setdefault("problem", problem)
        found[host] = seen
    return full, found


def _taken(
    part: str, result: Any, request: _Request, host: str
) -> tuple[Mapping[str, Any] | None, str | None]:
    """A task's result if it is an answer that fits; else None, and why where there is a reason."""
    if result is None:
        return None, None
    if isinstance(result, Mapping):
        if result.get("unreachable"):
            return None, f"unreachable ({_reason(result)})"
        if result.get("failed"):
            return None, f"{part} failed ({_reason(result)})"
        if not result or result.get("skipped"):
            return None, None
    try:
        whole = Value(result, "the answer", Misfit, prefix="", quote=False)
        _CHECKS[part](whole, request, host)
    except Misfit as misfit:
        return None, f"what it returned makes no sense ({misfit})"
    return result, None


def _reason(result: Mapping[str, Any]) -> str:
    message = result.get("msg")
    lines = message.strip().splitlines() if isinstance(message, str) else []
    return lines[0].removeprefix("Task failed: ")[:LONGEST_REASON] if lines else "no reason given"


class _Request:
    """What hosts were asked: their answers must not have more."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def listeners(self) -> dict[str, list[dict[str, Any]]]:
        return self.plan.listeners()

    @cached_property
    def siblings(self) -> dict[str, dict[str, Any]]:
        return self.plan.siblings()

    @cached_property
    def targets(self) -> dict[str, list[dict[str, Any]]]:
        return self.plan.targets()

    @cached_property
    def sandboxes(self) -> dict[str, list[dict[str, Any]]]:
        return self.plan.sandboxes()


# The three answers: each check raises Misfit.


def _check_listening(answer: Value, request: _Request, host: str) -> None:
    fields = answer.fields(
        ("interfaces", "own_addresses", "listeners"),
        {"handle": None, "job_network": None},
        others=True,
    )
    for address in fields["own_addresses"].list(most=MOST_ADDRESSES):
        address.address()
    _check_links(fields, request.listeners.get(host, ()), request.plan)
    network = fields["job_network"].or_none()
    if network is None:
        return
    if _has_problem(network) and "interfaces" not in network.raw:
        network.fields(("problem",))  # nothing was started that anything else could be about
        return
    own = network.fields(("interfaces", "listeners", "handle"), others=True)
    _check_links(own, request.siblings.get(host, {}).get("listeners", ()), request.plan)


def _check_probed(answer: Value, request: _Request, host: str) -> None:
    fields = answer.fields(("results",), {"sandboxes": None}, others=True)
    _check_results(fields["results"], request.targets.get(host, ()))
    if fields["sandboxes"].or_none() is None:
        return
    sandboxes = fields["sandboxes"].entries()
    targets = {sandbox["name"]: sandbox["targets"] for sandbox in request.sandboxes.get(host, ())}
    if not set(sandboxes) <= set(targets):
        raise fields["sandboxes"].error("has a name that was not asked for", "")
    for name, sandbox in sandboxes.items():
        if not _has_problem(sandbox):
            _check_results(sandbox.fields(("results",), others=True)["results"], targets[name])


def _check_collected(answer: Value, _request: _Request, _host: str) -> None:
    _check_account(answer)
    sandboxes = answer.fields((), {"sandboxes": None}, others=True)["sandboxes"].or_none()
    if sandboxes is None:
        return
    sibling = sandboxes.fields((), {SIBLING: None}, others=True)[SIBLING].or_none()
    if sibling is not None:
        _check_account(sibling)


_CHECKS: dict[str, Callable[[Value, _Request, str], None]] = {
    "listening": _check_listening,
    "probed": _check_probed,
    "collected": _check_collected,
}


# What they are made of.


def _has_problem(value: Value) -> bool:
    """Whether it says why there is nothing else, or not all."""
    if not isinstance(value.raw, Mapping) or not value.raw.get("problem"):
        return False
    value.within("problem", value.raw["problem"]).text(most=LONGEST_TEXT)
    return True


def _check_handle(handle: Value) -> None:
    if handle.or_none() is not None:
        handle.text(most=LONGEST_NAME)


def _check_links(
    fields: Mapping[str, Value], requested: Sequence[Mapping[str, Any]], plan: Plan
) -> None:
    """The interfaces of a host or slot, and the listeners of the process there."""
    _check_handle(fields["handle"])
    _check_interfaces(fields["interfaces"], plan)
    wanted = {(entry["id"], entry["protocol"], entry.get("port")) for entry in requested}
    for entry in fields["listeners"].list(most=MOST_RECORDS):
        own = entry.fields(("id", "protocol", "ipv4", "ipv6"), {"port": None}, others=True)
        ident, protocol = (own[name].text(most=LONGEST_NAME) for name in ("id", "protocol"))
        for name in ("ipv4", "ipv6"):
            own[name].text(most=LONGEST_NAME)
        port = None if own["port"].or_none() is None else own["port"].integer(1, 65535)
        _strike_off(entry, (ident, protocol, port), wanted)


def _check_interfaces(interfaces: Value, plan: Plan) -> None:
    """Also how many addresses there are at all, and how many that others, or it itself, would try."""
    links = [_addresses(interface) for interface in interfaces.list(most=MOST_INTERFACES)]
    count = sum(map(len, links))
    if count > MOST_ADDRESSES:
        raise interfaces.error(f"has {count} addresses, at most {MOST_ADDRESSES} are taken", "")
    known = [a for host in plan.fleet.fleet_hosts() for a in host.addresses]
    tried = 0
    for own in links:
        networks = [address.network for address in own]
        if any(a in network for network in networks for a in known if a.version == network.version):
            tried += max(1, len(networks))
    if tried > MOST_ON_THE_FLEETS_NETWORKS:
        raise interfaces.error(
            f"has {tried} addresses on interfaces of the fleet's networks, at most"
            f" {MOST_ON_THE_FLEETS_NETWORKS} are tried",
            "",
        )


def _addresses(interface: Value) -> list[IPv4Interface | IPv6Interface]:
    fields = interface.fields(("name", "mac", "addresses"), others=True)
    fields["name"].text(most=LONGEST_NAME)
    fields["mac"].matching(_MAC, "a hardware address")
    found = []
    for entry in fields["addresses"].list(most=MOST_ADDRESSES):
        own = entry.fields(("address", "prefix_length"), others=True)
        address, length = own["address"].address(), own["prefix_length"].integer(0, 128)
        if length > address.max_prefixlen:
            raise own["prefix_length"].error("does not fit the address", "")
        if address.is_multicast or address.is_unspecified or address.is_loopback:
            raise own["address"].error("is none that an interface can have", "")
        found.append(ip_interface(f"{address}/{length}"))
    return found


def _check_results(results: Value, targets: Sequence[Mapping[str, Any]]) -> None:
    wanted = {target["id"] for target in targets}
    optional = {"payload": "", "source": "", "source_port": 0}
    for result in results.list(most=MOST_RECORDS):
        fields = result.fields(("id", "outcome", "evidence"), optional, others=True)
        fields["outcome"].choice(OUTCOMES)
        fields["evidence"].text(most=LONGEST_TEXT)
        fields["payload"].text(most=LONGEST_NAME)
        _check_source(fields)
        if "source_port" in result.raw and "source" not in result.raw:
            raise fields["source"].error("is missing", "")
        _strike_off(result, fields["id"].text(most=LONGEST_NAME), wanted)


def _strike_off(entry: Value, key: Any, wanted: set[Any]) -> None:
    if key not in wanted:
        raise entry.error("was not asked for, or is there twice", "")
    wanted.remove(key)


def _check_account(account: Value) -> None:
    fields = account.fields(
        ("was_running", "received", "half_open"),
        {"handle": None, "is_incomplete": False},
        others=True,
    )
    fields["was_running"].boolean()
    fields["is_incomplete"].boolean()
    _check_handle(fields["handle"])
    for record in fields["received"].list(most=MOST_RECORDS):
        own = record.fields(("listener", "source", "source_port", "payload"), others=True)
        own["listener"].text(most=LONGEST_NAME)
        own["payload"].text(most=LONGEST_NAME)
        _check_source(own)
    for record in fields["half_open"].list(most=MOST_RECORDS):
        own = record.fields(("source", "source_port", "port"), others=True)
        own["port"].integer(0, 65535)
        _check_source(own)


def _check_source(fields: Mapping[str, Value]) -> None:
    fields["source"].text(most=LONGEST_ADDRESS)  # only compared
    fields["source_port"].integer(0, 65535)
