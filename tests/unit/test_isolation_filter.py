"""The filters behind playbooks/verify-isolation.yml."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import isolation

from .test_isolation_matrix import World, declared


def test_plan() -> None:
    plan = isolation.probe_plan(declared())
    assert plan["hosts"] == ["a", "b", "c"]
    assert plan["vantages"] == ["controller", "a", "b", "c"]
    assert plan["listeners"]["a"][0] == {"id": "ping", "protocol": "icmp"}
    json.dumps(plan)


@pytest.mark.parametrize("vantages", [["controller", "a"], "controller, a", "controller,a,"])
def test_vantages_are_a_list_or_a_text(vantages: Any) -> None:
    assert isolation.probe_plan(declared(), vantages)["vantages"] == ["controller", "a"]


@pytest.mark.parametrize("vantages", [None, [], ""])
def test_no_vantages_are_all(vantages: Any) -> None:
    assert len(isolation.probe_plan(declared(), vantages)["vantages"]) == 4


def test_mistakes_are_named() -> None:
    with pytest.raises(AnsibleFilterError, match="verify_isolation_vantages: d is no vantage"):
        isolation.probe_plan(declared(), "d")
    assert "d is no vantage" in isolation.probe_plan_problem(declared(), "d")
    assert isolation.probe_plan_problem(declared(), "a") == ""
    with pytest.raises(AnsibleFilterError, match="unknown group 'nobody'"):
        isolation.probe_plan(
            declared(flows=[{"from": "nobody", "to": "betas", "services": ["web"]}])
        )


def test_owners_of_outside_addresses_take_part() -> None:
    data = declared()
    data["groups"]["outside"] = ["o"]
    data["addresses"]["o"] = ["10.0.0.30"]
    data["external"]["far"]["owner"] = "o"
    plan = isolation.probe_plan(data)
    assert plan["hosts"] == ["a", "b", "c", "o"]
    assert "o" in plan["vantages"]
    assert [entry["id"] for entry in plan["listeners"]["o"]] == ["web"]


def test_targets_do_without_hosts_that_failed() -> None:
    world = World()
    full = isolation.probe_targets(isolation.probe_plan(declared()), world.listening())
    assert {name: entry["targets"] for name, entry in full.items()} == world.full.targets()
    assert not any(entry["sandboxes"] for entry in full.values())
    seen = {**world.listening(), "b": {"unreachable": True, "msg": "no"}, "c": {}}
    fewer = isolation.probe_targets(isolation.probe_plan(declared()), seen)
    paths = {(t["id"].split("/")[0], t["id"].split("/")[2]) for t in fewer["a"]["targets"]}
    assert paths == {(h, p) for h in "abc" for p in ("ipv4", "ipv6")} | {
        ("a", "link_local"), ("far", "ipv4"),
    }  # fmt: skip


def ran(stdout: str, rc: int = 0, **more: Any) -> dict[str, Any]:
    return {"cmd": ["x"], "rc": rc, "stdout": stdout, "start": "2030-01-01", **more}


LOADED = {"state": "loaded", "missing": [], "added": []}


def item(text: str) -> dict[str, str]:
    """As the program names rules (``compare``)."""
    return {"object": "chain input", "text": text}


@pytest.mark.parametrize(
    ("result", "sentences"),
    [
        ({}, []),
        ({"unreachable": True}, []),
        ({"skipped": True, "skip_reason": "x"}, []),
        (
            {"cmd": [], "rc": 0, "stdout": "skipped, since x does not exist", "start": None},
            ["The firewall is not installed: cellblock-firewall is missing."],
        ),
        ({"changed": False, "skipped": True, "skip_reason": "a condition"}, []),
        (ran(json.dumps(LOADED)), []),
        (
            ran(
                json.dumps(
                    {**LOADED, "added": [item("tcp dport 1 accept")], "missing": [item("drop")]}
                ),
                6,
            ),
            [
                "A rule of the firewall is missing: chain input: drop",
                "A rule was added by hand: chain input: tcp dport 1 accept",
            ],
        ),
        (
            ran(json.dumps({**LOADED, "state": "pending"}), 8),
            ["The state of the firewall is pending, not loaded."],
        ),
        (
            ran("", 1, stderr="cellblock-firewall: no nft\nmore"),
            ["cellblock-firewall status failed: cellblock-firewall: no nft"],
        ),
        (ran("[]", 1), ["cellblock-firewall status failed: it said nothing"]),
        # A captured host says what it likes.
        (ran("[" * 100_000), ["cellblock-firewall status failed: it said nothing"]),
        (
            ran(json.dumps({**LOADED, "missing": "drop"})),
            ["cellblock-firewall status failed: it said nothing"],
        ),
        (
            ran(json.dumps({**LOADED, "added": ["tcp dport 1 accept"]})),
            ["cellblock-firewall status failed: it said nothing"],
        ),
        (
            ran(json.dumps({**LOADED, "added": [item("x" * 1000)] * 1000})),
            [f"A rule was added by hand: {('chain input: ' + 'x' * 500)[:500]}"] * 100
            + ["900 more differences between its rules are not shown."],
        ),
        ("text", ["cellblock-firewall status failed: what came back is no result of a command"]),
    ],
)
def test_firewall_differences(result: Any, sentences: list[str]) -> None:
    assert isolation.firewall_differences(result) == sentences


def test_observations() -> None:
    hostvars = {
        "localhost": {"x_listening": {"interfaces": []}, "x_probed": {"results": []}},
        "a": {"x_collected": {"was_running": True}, "x_firewall": ran(json.dumps(LOADED))},
    }
    assert isolation.probe_observations(["a"], hostvars, "x_") == {
        "controller": {"listening": {"interfaces": []}, "probed": {"results": []}, "rules": []},
        "a": {"collected": {"was_running": True}, "rules": []},
    }
