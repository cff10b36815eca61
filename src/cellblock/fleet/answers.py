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
from ipaddress import ip_address, ip_interface
from typing import Any

from .completion import complete
from .probe_plan import SIBLING, Plan

# No module returns more: a listener notes at most so much, evidence is a sentence.
MOST_RECORDS = 20_000
LONGEST_TEXT = 2000
LONGEST_NAME = 200
LONGEST_REASON = 300
# A slave has an interface for each of its slots.
MOST_INTERFACES = 1024
MOST_ADDRESSES = 4096
# Of interfaces on a network of the fleet, which are tried from everywhere.
MOST_ON_THE_FLEETS_NETWORKS = 64

OUTCOMES = ("open", "refused", "filtered", "unreachable", "sent", "denied", "error")

# In the order in which they are asked.
_PARTS = ("listening", "probed", "collected")


class Misfit(Exception):
    """An answer is not what network_probe returns; the text names the place."""


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
        _CHECKS[part](result, request, host)
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


# Checks of shapes: each takes a value and where it stands, and raises Misfit.

_Check = Callable[[Any, str], None]


def _within(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _text(longest: int, *, or_null: bool = False) -> _Check:
    def check(value: Any, where: str) -> None:
        if value is None and or_null:
            return
        if not isinstance(value, str):
            raise Misfit(f"{where} is no text")
        if len(value) > longest:
            raise Misfit(f"{where} has {len(value)} characters, at most {longest} are taken")

    return check


def _number(least: int, most: int, *, or_null: bool = False) -> _Check:
    def check(value: Any, where: str) -> None:
        if value is None and or_null:
            return
        # True is an int to Python.
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Misfit(f"{where} is no number from {least} to {most}")

    return check


def _boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise Misfit(f"{where} is neither true nor false")


def _outcome(value: Any, where: str) -> None:
    if not isinstance(value, str) or value not in OUTCOMES:
        raise Misfit(f"{where} is none of {', '.join(OUTCOMES)}")


def _mac(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", value):
        raise Misfit(f"{where} is no hardware address")


def _address(value: Any, where: str) -> None:
    # A scope (fe80::1%eth0) may be any text.
    if not isinstance(value, str) or "%" in value:
        raise Misfit(f"{where} is no address")
    try:
        ip_address(value)
    except ValueError:
        raise Misfit(f"{where} is no address") from None


def _list_of(check_entry: _Check, most: int) -> _Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise Misfit(f"{where} is no list")
        if len(value) > most:
            raise Misfit(f"{where} has {len(value)} entries, at most {most} are taken")
        for number, entry in enumerate(value):
            check_entry(entry, f"{where}[{number}]")

    return check


def _record(required: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None) -> _Check:
    """A mapping with these keys; others are not looked at."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise Misfit(f"{where or 'the answer'} is no mapping")
        for key, check_value in required.items():
            if key not in value:
                raise Misfit(f"{_within(where, key)} is missing")
            check_value(value[key], _within(where, key))
        for key, check_value in (optional or {}).items():
            if key in value:
                check_value(value[key], _within(where, key))

    return check


def _own_address(value: Any, where: str) -> None:
    _OWN_ADDRESS(value, where)
    try:
        own = ip_interface(f"{value['address']}/{value['prefix_length']}").ip
    except ValueError:
        raise Misfit(f"{where}.prefix_length does not fit the address") from None
    if own.is_multicast or own.is_unspecified or own.is_loopback:
        raise Misfit(f"{where}.address is none that an interface can have")


_NAME = _text(LONGEST_NAME)
_ADDRESS = _text(64)  # only compared
_PORT = _number(0, 65535)
_HANDLE = {"handle": _text(LONGEST_NAME, or_null=True)}
_PROBLEM = _text(LONGEST_TEXT)
_OWN_ADDRESS = _record({"address": _address, "prefix_length": _number(0, 128)})
_INTERFACES = _list_of(
    _record(
        {"name": _NAME, "mac": _mac, "addresses": _list_of(_own_address, MOST_ADDRESSES)},
    ),
    MOST_INTERFACES,
)
_LISTENERS = _list_of(
    _record(
        {"id": _NAME, "protocol": _NAME, "ipv4": _NAME, "ipv6": _NAME},
        {"port": _number(1, 65535, or_null=True)},
    ),
    MOST_RECORDS,
)
_LISTENING = _record(
    {
        "interfaces": _INTERFACES,
        "own_addresses": _list_of(_address, MOST_ADDRESSES),
        "listeners": _LISTENERS,
    },
    _HANDLE,
)
_JOB_NETWORK = _record({"interfaces": _INTERFACES, "listeners": _LISTENERS, **_HANDLE})
_RESULTS = _list_of(
    _record(
        {"id": _NAME, "outcome": _outcome, "evidence": _text(LONGEST_TEXT)},
        {"payload": _NAME, "source": _ADDRESS, "source_port": _PORT},
    ),
    MOST_RECORDS,
)
_PROBED = _record({"results": _RESULTS})
_ACCOUNT = _record(
    {
        "was_running": _boolean,
        "received": _list_of(
            _record(
                {"listener": _NAME, "source": _ADDRESS, "source_port": _PORT, "payload": _NAME}
            ),
            MOST_RECORDS,
        ),
        "half_open": _list_of(
            _record({"source": _ADDRESS, "source_port": _PORT, "port": _PORT}), MOST_RECORDS
        ),
    },
    {"is_incomplete": _boolean, **_HANDLE},
)


# The three answers.


def _check_listening(answer: Any, request: _Request, host: str) -> None:
    _LISTENING(answer, "")
    _check_listeners(answer["listeners"], request.listeners.get(host, ()), "listeners")
    _check_interfaces(answer["interfaces"], request.plan, "interfaces")
    network = answer.get("job_network")
    if network is None:
        return
    if isinstance(network, Mapping) and network.get("problem"):
        _PROBLEM(network["problem"], "job_network.problem")
        if "interfaces" not in network:
            return
    _JOB_NETWORK(network, "job_network")
    sibling = request.siblings.get(host, {}).get("listeners", ())
    _check_listeners(network["listeners"], sibling, "job_network.listeners")
    _check_interfaces(network["interfaces"], request.plan, "job_network.interfaces")


def _check_probed(answer: Any, request: _Request, host: str) -> None:
    _PROBED(answer, "")
    _check_results(answer["results"], request.targets.get(host, ()), "results")
    answered = answer.get("sandboxes")
    if answered is None:
        return
    if not isinstance(answered, Mapping):
        raise Misfit("sandboxes is no mapping")
    targets = {sandbox["name"]: sandbox["targets"] for sandbox in request.sandboxes.get(host, ())}
    if not set(answered) <= set(targets):
        raise Misfit("sandboxes has a name that was not asked for")
    for name in targets:
        if name in answered:
            _check_sandbox(answered[name], targets[name], f"sandboxes.{name}")


def _check_sandbox(sandbox: Any, targets: Sequence[Mapping[str, Any]], where: str) -> None:
    if isinstance(sandbox, Mapping) and sandbox.get("problem"):
        _PROBLEM(sandbox["problem"], f"{where}.problem")
        return
    _PROBED(sandbox, where)
    _check_results(sandbox["results"], targets, f"{where}.results")


def _check_collected(answer: Any, _request: _Request, _host: str) -> None:
    _ACCOUNT(answer, "")
    answered = answer.get("sandboxes")
    if answered is None:
        return
    if not isinstance(answered, Mapping):
        raise Misfit("sandboxes is no mapping")
    if answered.get(SIBLING) is not None:
        _ACCOUNT(answered[SIBLING], f"sandboxes.{SIBLING}")


_CHECKS: dict[str, Callable[[Any, _Request, str], None]] = {
    "listening": _check_listening,
    "probed": _check_probed,
    "collected": _check_collected,
}


def _check_listeners(
    answered: Sequence[Mapping[str, Any]], requested: Sequence[Mapping[str, Any]], where: str
) -> None:
    wanted = {(entry["id"], entry["protocol"], entry.get("port")) for entry in requested}
    for number, entry in enumerate(answered):
        key = (entry["id"], entry["protocol"], entry.get("port"))
        if key not in wanted:
            raise Misfit(f"{where}[{number}] was not asked for, or is there twice")
        wanted.remove(key)


def _check_results(
    answered: Sequence[Mapping[str, Any]], requested: Sequence[Mapping[str, Any]], where: str
) -> None:
    wanted = {target["id"] for target in requested}
    for number, result in enumerate(answered):
        if result["id"] not in wanted:
            raise Misfit(f"{where}[{number}] was not asked for, or is there twice")
        wanted.remove(result["id"])
        if "source_port" in result and "source" not in result:
            raise Misfit(f"{where}[{number}].source is missing")


def _check_interfaces(answered: Sequence[Mapping[str, Any]], plan: Plan, where: str) -> None:
    """How many addresses there are at all, and how many that others, or it itself, would try."""
    every = [[own["address"] for own in entry["addresses"]] for entry in answered]
    count = sum(map(len, every))
    if count > MOST_ADDRESSES:
        raise Misfit(f"{where} has {count} addresses, at most {MOST_ADDRESSES} are taken")
    known = [a for host in plan.fleet.fleet_hosts() for a in host.addresses]
    tried = 0
    for entry in answered:
        networks = [
            ip_interface(f"{own['address']}/{own['prefix_length']}").network
            for own in entry["addresses"]
        ]
        if any(a in network for network in networks for a in known if a.version == network.version):
            tried += max(1, len(networks))
    if tried > MOST_ON_THE_FLEETS_NETWORKS:
        raise Misfit(
            f"{where} has {tried} addresses on interfaces of the fleet's networks, at most"
            f" {MOST_ON_THE_FLEETS_NETWORKS} are tried"
        )
