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

from . import matrix
from .matrix import SIBLING, Plan

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


def listening(made: Plan, told: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Those of the hosts' answers to ``listening`` that ``matrix.complete`` may be given.

    ``told``: by host (and ``controller``), what the task returned.
    """
    asked = _Asked(made)
    taken = {host: _taken("listening", result, asked, host)[0] for host, result in told.items()}
    return {host: answer for host, answer in taken.items() if answer is not None}


def observe(
    made: Plan, told: Mapping[str, Mapping[str, Any]]
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The completed plan, and the observations for ``matrix.judge``.

    ``told``: by host (and ``controller``), what the tasks returned as ``listening``, ``probed`` and
    ``collected``. The plan is the same that the hosts' targets were made from: it depends on
    ``listening`` alone.
    """
    full = matrix.complete(
        made, listening(made, {host: parts.get("listening") for host, parts in told.items()})
    )
    asked = _Asked(full)
    found: dict[str, dict[str, Any]] = {}
    for host, parts in told.items():
        seen: dict[str, Any] = {}
        for part in _PARTS:
            answer, problem = _taken(part, parts.get(part), asked, host)
            if answer is not None:
                seen[part] = answer
            if problem is not None:
                seen.setdefault("problem", problem)
        found[host] = seen
    return full, found


def _taken(
    part: str, result: Any, asked: _Asked, host: str
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
        _CHECKS[part](result, asked, host)
    except Misfit as misfit:
        return None, f"what it returned makes no sense ({misfit})"
    return result, None


def _reason(result: Mapping[str, Any]) -> str:
    told = result.get("msg")
    lines = told.strip().splitlines() if isinstance(told, str) else []
    return lines[0].removeprefix("Task failed: ")[:LONGEST_REASON] if lines else "no reason given"


class _Asked:
    """What hosts were asked: their answers must not have more."""

    def __init__(self, made: Plan) -> None:
        self.made = made

    @cached_property
    def listeners(self) -> dict[str, list[dict[str, Any]]]:
        return self.made.listeners()

    @cached_property
    def siblings(self) -> dict[str, dict[str, Any]]:
        return self.made.siblings()

    @cached_property
    def targets(self) -> dict[str, list[dict[str, Any]]]:
        return self.made.targets()

    @cached_property
    def sandboxes(self) -> dict[str, list[dict[str, Any]]]:
        return self.made.sandboxes()


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
        raise Misfit(f"{where}.address is none that an interface has")


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


def _check_listening(answer: Any, asked: _Asked, host: str) -> None:
    _LISTENING(answer, "")
    _check_listeners(answer["listeners"], asked.listeners.get(host, ()), "listeners")
    _check_interfaces(answer["interfaces"], asked.made, "interfaces")
    network = answer.get("job_network")
    if network is None:
        return
    if isinstance(network, Mapping) and network.get("problem"):
        _PROBLEM(network["problem"], "job_network.problem")
        if "interfaces" not in network:
            return
    _JOB_NETWORK(network, "job_network")
    sibling = asked.siblings.get(host, {}).get("listeners", ())
    _check_listeners(network["listeners"], sibling, "job_network.listeners")
    _check_interfaces(network["interfaces"], asked.made, "job_network.interfaces")


def _check_probed(answer: Any, asked: _Asked, host: str) -> None:
    _PROBED(answer, "")
    _check_results(answer["results"], asked.targets.get(host, ()), "results")
    boxes = answer.get("sandboxes")
    if boxes is None:
        return
    if not isinstance(boxes, Mapping):
        raise Misfit("sandboxes is no mapping")
    targets = {box["name"]: box["targets"] for box in asked.sandboxes.get(host, ())}
    if not set(boxes) <= set(targets):
        raise Misfit("sandboxes has a name that was not asked for")
    for name in targets:
        if name in boxes:
            _check_sandbox(boxes[name], targets[name], f"sandboxes.{name}")


def _check_sandbox(box: Any, targets: Sequence[Mapping[str, Any]], where: str) -> None:
    if isinstance(box, Mapping) and box.get("problem"):
        _PROBLEM(box["problem"], f"{where}.problem")
        return
    _PROBED(box, where)
    _check_results(box["results"], targets, f"{where}.results")


def _check_collected(answer: Any, _asked: _Asked, _host: str) -> None:
    _ACCOUNT(answer, "")
    boxes = answer.get("sandboxes")
    if boxes is None:
        return
    if not isinstance(boxes, Mapping):
        raise Misfit("sandboxes is no mapping")
    if boxes.get(SIBLING) is not None:
        _ACCOUNT(boxes[SIBLING], f"sandboxes.{SIBLING}")


_CHECKS: dict[str, Callable[[Any, _Asked, str], None]] = {
    "listening": _check_listening,
    "probed": _check_probed,
    "collected": _check_collected,
}


def _check_listeners(
    told: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]], where: str
) -> None:
    wanted = {(entry["id"], entry["protocol"], entry.get("port")) for entry in asked}
    for number, entry in enumerate(told):
        key = (entry["id"], entry["protocol"], entry.get("port"))
        if key not in wanted:
            raise Misfit(f"{where}[{number}] was not asked for, or is there twice")
        wanted.remove(key)


def _check_results(
    told: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]], where: str
) -> None:
    wanted = {target["id"] for target in asked}
    for number, result in enumerate(told):
        if result["id"] not in wanted:
            raise Misfit(f"{where}[{number}] was not asked for, or is there twice")
        wanted.remove(result["id"])
        if "source_port" in result and "source" not in result:
            raise Misfit(f"{where}[{number}].source is missing")


def _check_interfaces(told: Sequence[Mapping[str, Any]], made: Plan, where: str) -> None:
    """How many addresses there are at all, and how many that others, or it itself, would try."""
    every = [[own["address"] for own in entry["addresses"]] for entry in told]
    count = sum(map(len, every))
    if count > MOST_ADDRESSES:
        raise Misfit(f"{where} has {count} addresses, at most {MOST_ADDRESSES} are taken")
    known = [a for host in made.fleet.fleet_hosts() for a in host.addresses]
    tried = 0
    for entry in told:
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
