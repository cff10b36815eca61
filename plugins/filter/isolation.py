"""Filters behind playbooks/verify-isolation.yml: what the hosts are to try."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import answers
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet.completion import (
    complete,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet.model import (
    FleetError,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet.probe_plan import (
    involved_hosts,
    plan_of,
)

# Of what a host says about its firewall.
MOST_DIFFERENCES = 100
LONGEST_LINE = 500


def probe_plan(
    data: Mapping[str, Any],
    vantages: Sequence[str] | str | None = None,
    spoof_frames: bool = False,
) -> dict[str, Any]:
    """Who takes part in a probe of the fleet `data` (see the filter cellblock.fleet.fleet_model).

    Returns `hosts` (names in the inventory), `vantages` (those of them, `controller` and sandboxes
    that try), `listeners`: by host, what the module network_probe is to listen on, `siblings`: by
    slave, what in a network slot there, and `request`, from which the filter probe_targets and the
    module isolation_report make the same plan again. `vantages` limits who tries to a list of names,
    or a text with commas. Raises AnsibleFilterError for a name that is no vantage.

    What is declared is read here once, before any host was asked anything: a captured host may
    return facts, which Ansible by default puts above the inventory's variables.
    """
    if isinstance(vantages, str):
        vantages = [name.strip() for name in vantages.split(",") if name.strip()]
    request = {"fleet": data, "vantages": list(vantages or ()), "spoof_frames": spoof_frames}
    try:
        plan = plan_of(request)
    except FleetError as problem:
        raise AnsibleFilterError(str(problem)) from None
    except ValueError as problem:
        raise AnsibleFilterError(
            f"verify_isolation_vantages: {problem}; name some of these, or leave it out"
        ) from None
    return {
        "request": request,
        "hosts": list(involved_hosts(plan.fleet)),
        "vantages": list(plan.vantages),
        "listeners": plan.listeners(),
        "siblings": plan.siblings(),
    }


def probe_plan_problem(data: Mapping[str, Any], vantages: Any = None) -> str:
    """Why there is no such plan, as probe_plan would say it; empty when there is one."""
    try:
        probe_plan(data, vantages)
    except AnsibleFilterError as problem:
        return str(problem)
    return ""


def probe_targets(
    plan: Mapping[str, Any], listening: Mapping[str, Any]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By host (and `controller`), the `targets` and `sandboxes` for the module network_probe.

    `plan` is what probe_plan returned. `listening`: by host (and `controller`), what the module
    returned for `state: listening`. What a host returned that the module never would is left out
    here and named in the report.
    """
    made = plan_of(plan["request"])
    full = complete(made, answers.listening(made, listening))
    targets, sandboxes = full.targets(), full.sandboxes()
    return {
        name: {"targets": targets.get(name, []), "sandboxes": sandboxes.get(name, [])}
        for name in {**targets, **sandboxes}
    }


def probe_observations(
    hosts: Sequence[str], hostvars: Mapping[str, Any], prefix: str
) -> dict[str, dict[str, Any]]:
    """What was registered on `hosts` and, as `controller`, on localhost, for isolation_report.

    `prefix` is what the names of the variables begin with; `listening`, `probed`, `collected` and
    `firewall` follow.
    """
    found = {}
    for host in ("localhost", *hosts):
        variables = hostvars[host]
        seen = {
            name: variables[f"{prefix}{name}"]
            for name in ("listening", "probed", "collected")
            if f"{prefix}{name}" in variables
        }
        seen["rules"] = firewall_differences(variables.get(f"{prefix}firewall") or {})
        found["controller" if host == "localhost" else host] = seen
    return found


def firewall_differences(result: Any) -> list[str]:
    """How the rules in force on a host differ from those installed there, one sentence each.

    `result` is that of the command `cellblock-firewall status --json`, or what a captured host says
    instead.
    """
    if not isinstance(result, Mapping):
        return ["cellblock-firewall status failed: what came back is no result of a command"]
    if str(result.get("stdout") or "").startswith("skipped, since"):  # option `removes`
        return ["The firewall is not installed: cellblock-firewall is missing."]
    if result.get("unreachable") or result.get("start") is None:
        return []  # the host is reported otherwise, or has no firewall of ours to have
    try:
        status = json.loads(result.get("stdout") or "")
        state, missing, added = (
            str(status["state"]),
            _lines(status["missing"]),
            _lines(status["added"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        words = str(result.get("stderr") or result.get("msg") or "").strip().splitlines()
        said = words[0][:LONGEST_LINE] if words else "it said nothing"
        return [f"cellblock-firewall status failed: {said}"]
    sentences = []
    if state != "loaded":
        sentences.append(f"The state of the firewall is {state[:LONGEST_LINE]}, not loaded.")
    sentences += [f"A rule of the firewall is missing: {rule}" for rule in missing]
    sentences += [f"A rule was added by hand: {rule}" for rule in added]
    if len(sentences) > MOST_DIFFERENCES:
        more = len(sentences) - MOST_DIFFERENCES
        sentences[MOST_DIFFERENCES:] = [f"{more} more differences between its rules are not shown."]
    return sentences


def _lines(items: Any) -> list[str]:
    """What a host names, {object: "chain input", text: the rule}, each of bounded length.

    Raises TypeError for anything else.
    """
    if not isinstance(items, list) or not all(
        isinstance(item, Mapping)
        and isinstance(item.get("object"), str)
        and isinstance(item.get("text"), str)
        for item in items
    ):
        raise TypeError("no list of rules")
    return [f"{item['object']}: {item['text']}"[:LONGEST_LINE] for item in items]


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "probe_observations": probe_observations,
            "probe_plan": probe_plan,
            "probe_plan_problem": probe_plan_problem,
            "probe_targets": probe_targets,
        }
