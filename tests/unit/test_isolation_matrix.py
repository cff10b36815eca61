"""Every rule by which a verdict is reached, on a small fleet that is as declared but for one thing.

a (group alphas) may use web of b (group betas); the controller may ping all. c (betas too) has two
IPv4 addresses. Nobody may use the datagram service `quiet`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cellblock.fleet import completion, probe_plan, verdict
from cellblock.fleet.model import parse_fleet

NUMBERS = {"controller": 1, "a": 11, "b": 12, "c": 13}


def declared(**more: Any) -> dict[str, Any]:
    return {
        "groups": {"worker_slaves": [], "alphas": ["a"], "betas": ["b", "c"], "outside": []},
        "addresses": {
            "a": ["10.0.0.11", "fd00::11"],
            "b": ["10.0.0.12", "fd00::12"],
            "c": ["10.0.0.13", "10.0.0.113", "fd00::13"],
        },
        "services": {
            "ping": {"groups": ["fleet"], "protocol": "icmp"},
            "web": {"groups": ["betas"], "protocol": "tcp", "port": 80},
            "quiet": {"groups": ["fleet"], "protocol": "udp", "port": 9999},
        },
        "networks": {"controllers": ["10.0.0.1", "fd00::1"]},
        "flows": [
            {"from": "controllers", "to": "fleet", "services": ["ping"]},
            {"from": "alphas", "to": "betas", "services": ["web"]},
        ],
        "external": {"far": {"addresses": ["203.0.113.1"], "services": ["web"]}},
        **more,
    }


def link(name: str, *more: str) -> list[dict[str, Any]]:
    number = NUMBERS[name]
    addresses = [f"10.0.0.{number}/24", f"fd00::{number}/64", f"fe80::{number}/64", *more]
    if name == "c":
        addresses.append("10.0.0.113/24")
    return [
        {
            "name": f"eth-{name}",
            "mac": f"02:00:00:00:00:{number:02x}",
            "addresses": [
                {"address": a.split("/")[0], "prefix_length": int(a.split("/")[1])}
                for a in addresses
            ],
        }
    ]


class World:
    """Observations of a fleet that is as declared, to be changed in one place."""

    def __init__(self, data: dict[str, Any] | None = None, **options: Any) -> None:
        vantages = options.pop("vantages", None)
        self.plan = probe_plan.plan(parse_fleet(data or declared()), vantages, **options)
        self.links = {name: link(name) for name in NUMBERS}
        self.drift: dict[str, list[str]] = {}
        self.changes: list[Callable[[], None]] = []
        self.observe()

    def observe(self) -> None:
        listeners = self.plan.listeners()
        self.seen: dict[str, dict[str, Any]] = {}
        for name, links in self.links.items():
            self.seen[name] = {
                "listening": {
                    "interfaces": links,
                    "own_addresses": [a["address"] for i in links for a in i["addresses"]],
                    "handle": f"handle-{name}",
                    "listeners": [
                        {**entry, "ipv4": "listening", "ipv6": "listening"}
                        for entry in listeners.get(name, [])
                    ],
                },
                "probed": {"results": []},
                "collected": {
                    "was_running": True,
                    "handle": f"handle-{name}",
                    "is_incomplete": False,
                    "received": [],
                    "half_open": [],
                },
            }
        self.full = completion.complete(self.plan, self.listening())
        for cell in self.full.cells:
            is_open = cell.flow is not None or cell.kind == probe_plan.CONTROL
            for probe in cell.probes:
                self.add(cell, probe, is_open)

    def listening(self) -> dict[str, Any]:
        return {name: seen["listening"] for name, seen in self.seen.items() if "listening" in seen}

    def add(self, cell: probe_plan.Cell, probe: probe_plan.Probe, is_open: bool) -> None:
        results = self.seen[cell.vantage]["probed"]["results"]
        result: dict[str, Any] = {
            "id": probe.id,
            "outcome": "open" if is_open else "filtered",
            "evidence": "answered in 1 ms" if is_open else "no answer in 9 ms",
        }
        if cell.kind in (probe_plan.SPOOFED, probe_plan.SPOOFED_FRAME):
            result |= {"outcome": "sent", "evidence": "sent twice"}
        if cell.service.protocol == "tcp":
            result |= {"source": NUMBERS[cell.vantage], "source_port": 40000 + len(results)}
        else:
            result["payload"] = f"{cell.vantage}>{probe.id}"
        results.append(result)
        if is_open and cell.target in self.seen:
            self.arrive(cell.target, result)

    def arrive(self, host: str, result: Mapping[str, Any]) -> None:
        self.seen[host]["collected"]["received"].append(
            {
                "listener": "quiet",
                "source": result.get("source", "x"),
                "source_port": result.get("source_port", 0),
                "payload": result.get("payload", ""),
            }
        )

    def result(self, vantage: str, ident: str) -> dict[str, Any]:
        (found,) = [r for r in self.seen[vantage]["probed"]["results"] if r["id"] == ident]
        assert isinstance(found, dict)
        return found

    def set(self, vantage: str, ident: str, outcome: str) -> dict[str, Any]:
        result = self.result(vantage, ident)
        result |= {"outcome": outcome, "evidence": f"<{outcome}>"}
        return result

    def judge(self) -> verdict.Report:
        return verdict.judge(
            completion.complete(self.plan, self.listening()), self.seen, self.drift
        )

    def finding(self, vantage: str, ident: str, kind: str = probe_plan.SERVICE) -> verdict.Finding:
        target, service, path = ident.split("/")[:3]
        (found,) = [
            f
            for f in self.judge().findings
            if (f.cell.vantage, f.cell.target, f.cell.service.name, f.cell.path, f.cell.kind)
            == (vantage, target, service, path, kind)
        ]
        return found


@pytest.fixture
def world() -> World:
    return World()


def test_a_fleet_that_is_as_declared(world: World) -> None:
    report = world.judge()
    assert report.differences() == []
    assert report.is_green
    reached = {
        (f.cell.vantage, f.cell.target, f.cell.service.name, f.cell.path)
        for f in report.findings
        if f.is_reached
    }
    # Written down by hand: the expectations come from nowhere else.
    assert reached == {
        ("controller", "a", "ping", "ipv4"),
        ("controller", "a", "ping", "ipv6"),
        ("controller", "b", "ping", "ipv4"),
        ("controller", "b", "ping", "ipv6"),
        ("controller", "c", "ping", "ipv4"),
        ("controller", "c", "ping", "ipv6"),
        ("a", "b", "web", "ipv4"),
        ("a", "b", "web", "ipv6"),
        ("a", "c", "web", "ipv4"),
        ("a", "c", "web", "ipv6"),
    }


Change = Callable[[World], Any]


def changed(vantage: str, ident: str, outcome: str) -> Change:
    return lambda world: world.set(vantage, ident, outcome)


def arrived(vantage: str, ident: str, host: str) -> Change:
    return lambda world: world.arrive(host, world.result(vantage, ident))


def both(*changes: Change) -> Change:
    return lambda world: [change(world) for change in changes]


def half_open(vantage: str, ident: str, host: str, port: int = 80, number: int = 0) -> Change:
    def change(world: World) -> None:
        result = world.result(vantage, ident)
        world.seen[host]["collected"]["half_open"].append(
            {
                "source": result["source"],
                "source_port": result["source_port"] + number,
                "port": port,
            }
        )

    return change


def forget(vantage: str, ident: str) -> Change:
    return lambda world: world.seen[vantage]["probed"]["results"].remove(
        world.result(vantage, ident)
    )


def down(host: str) -> Change:
    def change(world: World) -> None:
        world.seen[host] = {"problem": "unreachable (no route)"}

    return change


def account(host: str, **values: Any) -> Change:
    return lambda world: world.seen[host]["collected"].update(values)


def no_account(host: str) -> Change:
    return lambda world: world.seen[host].pop("collected")


def silence(ident: str, *vantages: str) -> Change:
    return both(*(changed(vantage, ident, "filtered") for vantage in vantages))


WEB, WEB6, QUIET, PING = "b/web/ipv4/0", "b/web/ipv6/0", "b/quiet/ipv4/0", "b/ping/ipv4/0"
LINK = "b/quiet/link_local/0"
TWO = "c/web/ipv4/0", "c/web/ipv4/1"
FORGED = "b/ping/ipv4/forged"

CASES: list[tuple[str, Change, str, str, str, str]] = [
    # name, what differs, vantage, cell, verdict, what the sentence says
    ("nothing", both(), "c", WEB, "as_declared", "not reached (no answer in 9 ms), and no flow"),
    ("undeclared and open", changed("c", WEB, "open"), "c", WEB, "leak", "reached (<open>), but"),
    ("undeclared and open over IPv6", changed("c", WEB6, "open"), "c", WEB6, "leak", "over IPv6:"),
    ("undeclared and refused", changed("c", WEB, "refused"), "c", WEB, "leak", "(<refused>)"),
    (
        "undeclared datagram arrived",
        arrived("a", QUIET, "b"),
        "a",
        QUIET,
        "leak",
        "reached without an answer (no answer in 9 ms, but b received it), but no flow allows it",
    ),
    ("datagram arrived elsewhere", arrived("a", QUIET, "c"), "a", QUIET, "as_declared", ""),
    ("first packet arrived", half_open("c", WEB, "b"), "c", WEB, "leak", "its first packet"),
    ("at another port", half_open("c", WEB, "b", port=81), "c", WEB, "as_declared", ""),
    ("of another connection", half_open("c", WEB, "b", number=1), "c", WEB, "as_declared", ""),
    ("link-local is never declared", changed("a", LINK, "open"), "a", LINK, "leak", "link-local:"),
    ("declared and open", both(), "a", WEB, "as_declared", "as flow 2 (alphas -> betas: web)"),
    ("declared and silent", changed("a", WEB, "filtered"), "a", WEB, "broken", "though flow 2 (a"),
    ("declared, no way", changed("a", WEB, "unreachable"), "a", WEB, "broken", "<unreachable>"),
    (
        "declared, arrived, no answer",
        both(changed("a", WEB, "filtered"), half_open("a", WEB, "b")),
        "a",
        WEB,
        "broken",
        "but b received its first packet",
    ),
    (
        "declared and rejected by rules",
        changed("a", WEB, "refused"),
        "a",
        WEB,
        "broken",
        "where others are accepted (b at 10.0.0.12: answered",
    ),
    (
        "declared, and nothing listens",
        both(changed("a", WEB, "refused"), changed("b", WEB, "refused")),
        "a",
        WEB,
        "as_declared",
        "",
    ),
    ("no result", forget("a", WEB), "a", WEB, "unproven", "there is no result of it"),
    ("no result, undeclared", forget("c", WEB), "c", WEB, "unproven", "there is no result"),
    ("could not be tried", changed("a", WEB, "error"), "a", WEB, "unproven", "<error>"),
    ("could not be tried, undeclared", changed("c", WEB, "error"), "c", WEB, "unproven", "<er"),
    ("an outcome of the future", changed("c", WEB, "odd"), "c", WEB, "unproven", "<odd>"),
    ("the vantage is down", down("a"), "a", WEB, "unproven", "unproven: unreachable (no route)"),
    ("the target is down", both(down("b"), changed("a", WEB, "filtered")), "a", WEB, "unproven",
     "unproven: b: unreachable (no route)"),
    ("the target is down, undeclared", down("b"), "c", WEB, "unproven", "b: unreachable"),
    ("a leak counts although the target did not say", both(down("b"), changed("c", WEB, "open")),
     "c", WEB, "leak", ""),
    ("no answer to anybody", silence(WEB, "a", "b"), "c", WEB, "unproven", "nobody else got"),
    ("an answer to the target only", silence(WEB, "a"), "c", WEB, "as_declared", ""),
    ("an answer to a vantage only", silence(WEB, "b"), "c", WEB, "as_declared", ""),
    ("a refusal is an answer", both(silence(WEB, "b"), changed("a", WEB, "refused")), "c", WEB,
     "as_declared", ""),
    ("word of a router is none", both(silence(WEB, "b"), changed("a", WEB, "unreachable")), "c",
     WEB, "unproven", "nobody else"),
    ("an answer from another port", both(silence(QUIET, "b"), changed("a", WEB, "open")), "c",
     QUIET, "unproven", "nobody else"),
    ("the listener's account is missing", no_account("b"), "c", WEB, "unproven", "its listener"),
    ("it had ended", account("b", was_running=False), "c", WEB, "unproven", "its listener"),
    ("it was another's", account("b", handle="other"), "c", WEB, "unproven", "its listener"),
    ("it was full", account("b", is_incomplete=True), "c", WEB, "unproven", "its listener"),
    ("the account matters for negatives only", no_account("b"), "a", WEB, "as_declared", ""),
    ("one of two addresses leaks", changed("b", TWO[1], "open"), "b", TWO[0], "leak", ""),
    ("one of two addresses answers", changed("a", TWO[0], "filtered"), "a", TWO[0],
     "as_declared", "answered"),
    ("neither answers", both(changed("a", TWO[0], "filtered"), changed("a", TWO[1], "filtered")),
     "a", TWO[0], "broken", "10.0.0.13: <filtered>; 10.0.0.113: <filtered>"),
    ("one is silent to all", silence(TWO[1], "a", "c"), "b", TWO[0], "unproven", "10.0.0.113"),
    ("one could not be tried", changed("b", TWO[1], "error"), "b", TWO[0], "unproven", "<error>"),
    ("one could not be tried, declared", both(changed("a", TWO[0], "filtered"),
     changed("a", TWO[1], "error")), "a", TWO[0], "unproven", "<error>"),
    ("the outside answers nobody", changed("controller", "far/web/ipv4/0", "filtered"), "a",
     "far/web/ipv4/0", "unproven", "nobody else"),
    ("the outside is reached", changed("a", "far/web/ipv4/0", "open"), "a", "far/web/ipv4/0",
     "leak", ""),
    ("the outside gave no account, but an answer", both(), "a", "far/web/ipv4/0", "as_declared",
     ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "vantage", "ident", "verdict", "says"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_verdict(
    world: World, change: Change, vantage: str, ident: str, verdict: str, says: str
) -> None:
    change(world)
    finding = world.finding(vantage, ident)
    assert finding.verdict == verdict, finding.sentence
    assert says in finding.sentence
    target, service, _path, _ = ident.split("/")
    assert finding.sentence.startswith(f"{vantage} -> {target} {service} (")
    report = world.judge()
    assert report.is_green is not any(report.counts[bad] for bad in ("leak", "broken", "unproven"))
    assert (finding.sentence in report.differences()) is (verdict != "as_declared")


FORGED_CASES: list[tuple[str, Change, str, str]] = [
    ("it did not arrive", both(), "as_declared", "no forged packet got in"),
    ("it arrived", arrived("a", FORGED, "b"), "leak", "a forged packet got in"),
    ("the own rules refused it", changed("a", FORGED, "unreachable"), "as_declared", ""),
    ("it could not be sent", changed("a", FORGED, "error"), "unproven", "<error>"),
    ("no result", forget("a", FORGED), "unproven", "no result"),
    ("no account", no_account("b"), "unproven", "its listener"),
    ("nothing honest arrived", account("b", received=[]), "unproven", "neither did what controller"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [case[1:] for case in FORGED_CASES],
    ids=[case[0] for case in FORGED_CASES],
)
def test_verdict_on_forged_packets(world: World, change: Change, verdict: str, says: str) -> None:
    change(world)
    finding = world.finding("a", FORGED, probe_plan.SPOOFED)
    assert finding.verdict == verdict
    assert says in finding.sentence
    assert finding.cell.claimed == "controller"


def test_another_vantage_is_the_better_control(world: World) -> None:
    assert world.finding("c", WEB).control == "a at 10.0.0.12: answered in 1 ms"
    world.set("a", WEB, "filtered")
    assert world.finding("c", WEB).control == "b at 10.0.0.12: answered in 1 ms"
    # Also when the target comes first in the list.
    world.set("c", WEB, "open")
    assert world.finding("controller", WEB).control == "c at 10.0.0.12: <open>"


def test_ports_are_told_apart() -> None:
    shut = {"groups": ["betas"], "protocol": "tcp", "port": 81}
    data = declared(services={**declared()["services"], "shut": shut})
    ident = "b/shut/ipv4/0"
    world = World(data)
    assert world.finding("a", ident).verdict == "as_declared"
    half_open("a", ident, "b", port=80)(world)
    assert world.finding("a", ident).verdict == "as_declared"
    half_open("a", ident, "b", port=81)(world)
    assert world.finding("a", ident).verdict == "leak"
    world = World(data)
    world.set("b", ident, "filtered")
    assert world.finding("a", WEB).is_reached
    assert world.finding("a", ident).verdict == "unproven"


def test_rules_that_differ_are_not_green(world: World) -> None:
    world.drift = {"b": ["A rule was added by hand: accept"], "c": []}
    report = world.judge()
    assert not report.is_green
    assert report.differences() == ["b: A rule was added by hand: accept"]


def test_a_run_that_tried_nothing_is_not_green() -> None:
    empty = probe_plan.Plan(parse_fleet(declared()), (), ())
    assert not verdict.judge(empty, {}).is_green


def test_leaks_come_first(world: World) -> None:
    world.set("a", WEB, "filtered")
    world.set("a", QUIET, "error")
    world.set("b", "c/web/ipv6/0", "open")
    kinds = [sentence.split(":")[1] for sentence in world.judge().differences()]
    assert [kind.split()[0] for kind in kinds] == ["reached", "not", "unproven"]


# What cannot be tried is said.


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"external": {}}, "Whether hosts reach the outside was not tried: no external target"),
        (
            {"services": {**declared()["services"], "db": {"groups": ["outside"], "protocol": "tcp",
             "port": 1}}},
            "db (tcp 1) was not tried anywhere: the group outside has no hosts.",
        ),
        (
            {"services": {**declared()["services"], "db": {"groups": [], "protocol": "tcp",
             "port": 1}}},
            "db (tcp 1) was not tried anywhere: no group serves it and no external target",
        ),
        (
            {"flows": [*declared()["flows"], {"from": "worker_slaves", "to": "betas",
             "services": ["web"]}]},
            "Flow 3 (worker_slaves -> betas: web) was not tried: the group worker_slaves has no",
        ),
        (
            {"flows": [*declared()["flows"], {"from": "alphas", "to": "internet",
             "services": ["quiet"]}]},
            "Flow 3 (alphas -> internet: quiet) was not tried for quiet: no external target",
        ),
    ],
)  # fmt: skip
def test_gaps_are_unproven(more: dict[str, Any], says: str) -> None:
    assert probe_plan.plan(parse_fleet(declared())).gaps == ()
    report = World(declared(**more)).judge()
    assert any(gap.startswith(says) for gap in report.plan.gaps), report.plan.gaps
    assert not report.is_green
    assert report.counts["unproven"] == len(report.plan.gaps)


def test_a_flow_to_a_network_without_a_target_is_noted() -> None:
    world = World(
        declared(
            networks={"controllers": ["10.0.0.1"], "clocks": ["198.51.100.1"]},
            flows=[{"from": "alphas", "to": "clocks", "services": ["quiet"]}],
        )
    )
    assert world.plan.notes == (
        "Flow 1 (alphas -> clocks: quiet) was not tried for quiet: no target in the network clocks"
        " is known.",
    )


# The plan.


def test_networks_of_the_controller_are_declared_by_family() -> None:
    world = World(declared(networks={"controllers": ["10.0.0.1"]}))
    assert world.finding("controller", PING).is_reached
    over_ipv6 = world.finding("controller", "b/ping/ipv6/0")
    assert (over_ipv6.verdict, over_ipv6.is_reached) == ("as_declared", False)


def test_a_host_to_itself_is_a_control_and_has_no_verdict(world: World) -> None:
    report = world.judge()
    assert all(f.cell.vantage != f.cell.target for f in report.findings)
    assert {(f.cell.vantage, f.cell.target) for f in report.controls} == {
        ("a", "a"), ("b", "b"), ("c", "c"), ("controller", "far"),
    }  # fmt: skip


def test_the_outside_that_a_host_plays_is_not_tried_from_here() -> None:
    data = declared(
        external={"far": {"addresses": ["203.0.113.1"], "services": ["web"], "owner": "c"}}
    )
    tried = {
        (cell.vantage, cell.kind)
        for cell in probe_plan.plan(parse_fleet(data)).cells
        if cell.target == "far"
    }
    assert tried == {("a", "service"), ("b", "service"), ("c", "control")}


def test_limited_vantages_keep_their_controls() -> None:
    made = probe_plan.plan(parse_fleet(declared()), ["c"])
    vantages = Counter((cell.vantage, cell.kind) for cell in made.cells)
    assert set(vantages) == {
        ("c", "service"), ("c", "control"), ("a", "control"), ("b", "control"),
        ("controller", "control"),
    }  # fmt: skip
    assert World(vantages=["c"]).judge().is_green
    with pytest.raises(ValueError, match="d is no vantage; there are controller, a, b, c"):
        probe_plan.plan(parse_fleet(declared()), ["d"])


def test_listeners_and_targets_are_what_the_module_takes(world: World) -> None:
    assert world.plan.listeners() == {
        "a": [
            {"id": "ping", "protocol": "icmp"},
            {"id": "quiet", "protocol": "udp", "port": 9999, "payload": "nonce"},
        ],
        "b": [
            {"id": "ping", "protocol": "icmp"},
            {"id": "web", "protocol": "tcp", "port": 80, "payload": "nonce"},
            {"id": "quiet", "protocol": "udp", "port": 9999, "payload": "nonce"},
        ],
        "c": [
            {"id": "ping", "protocol": "icmp"},
            {"id": "web", "protocol": "tcp", "port": 80, "payload": "nonce"},
            {"id": "quiet", "protocol": "udp", "port": 9999, "payload": "nonce"},
        ],
    }
    targets = world.full.targets()
    for found in targets.values():
        assert len({target["id"] for target in found}) == len(found)
    assert {
        "id": "b/web/link_local/0",
        "address": "fe80::12",
        "protocol": "tcp",
        "port": 80,
        "interface": "eth-a",
    } in targets["a"]
    assert {
        "id": FORGED,
        "address": "10.0.0.12",
        "protocol": "spoofed_icmp",
        "source": "10.0.0.1",
    } in targets["a"]
    assert not any(target["protocol"].startswith("spoofed") for target in targets["controller"])


def test_only_declared_answers_are_waited_for_longer(world: World) -> None:
    expected = {
        f"{name}: {target['id']}": target.get("expected", False)
        for name, targets in world.full.targets().items()
        for target in targets
    }
    assert expected["a: b/web/ipv4/0"] is True
    assert expected["a: b/quiet/ipv4/0"] is False
    assert expected["b: c/web/ipv4/0"] is False


def test_frames_are_forged_only_when_asked_for(world: World) -> None:
    assert not any(cell.kind == probe_plan.SPOOFED_FRAME for cell in world.full.cells)
    framed = World(spoof_frames=True)
    (target,) = [t for t in framed.full.targets()["a"] if t["id"] == "b/ping/ipv4/frame"]
    assert (target["interface"], target["mac"]) == ("eth-a", "02:00:00:00:00:0c")


def test_nothing_is_forged_that_nobody_could_hear(world: World) -> None:
    for entry in world.seen["b"]["listening"]["listeners"]:
        entry["ipv4"] = "busy"
    forged = {
        (cell.target, cell.path)
        for cell in completion.complete(world.plan, world.listening()).cells
        if cell.kind == probe_plan.SPOOFED
    }
    assert ("b", "ipv4") not in forged
    assert {("b", "ipv6"), ("c", "ipv4")} <= forged


def test_unknown_interfaces_make_link_local_unproven(world: World) -> None:
    world.seen["b"].pop("listening")
    finding = world.finding("a", LINK)
    assert finding.verdict == "unproven"
    assert "the interfaces of b are not known" in finding.sentence


def test_a_host_without_interfaces_is_not_believed(world: World) -> None:
    world.seen["b"]["listening"]["interfaces"] = []
    finding = world.finding("a", LINK)
    assert finding.verdict == "unproven"
    assert "the interfaces of b are not known" in finding.sentence


def test_an_address_that_another_host_claims_is_a_gap(world: World) -> None:
    """Else a captured host could claim another's address, and it would not be tried any more."""
    world.links["b"] = link("b", "fd00::abcd/64")
    world.observe()
    tried = {p.address for cell in world.full.cells for p in cell.probes}
    assert "fd00::abcd" in tried
    assert not world.full.gaps
    world.seen["a"]["listening"]["own_addresses"].append("fd00::abcd")
    claimed = completion.complete(world.plan, world.listening())
    assert "fd00::abcd" not in {p.address for cell in claimed.cells for p in cell.probes}
    [gap] = claimed.gaps
    assert gap.startswith("b has the address fd00::abcd, and a says that it has it too")


def test_a_controller_elsewhere_has_no_link_local_path(world: World) -> None:
    world.links["controller"] = [
        {"name": "wan0", "mac": "02:00:00:00:00:01",
         "addresses": [{"address": "192.0.2.1", "prefix_length": 24},
                       {"address": "fe80::1", "prefix_length": 64}]}
    ]  # fmt: skip
    world.observe()
    paths = {c.path for c in world.full.cells if c.vantage == "controller"}
    assert paths == {"ipv4", "ipv6"}
    assert "controller shares no link with a, b, c: no link-local path to try." in world.full.notes


def test_hosts_of_other_segments_try_link_local_all_the_same(world: World) -> None:
    world.links["a"][0]["addresses"][0] = {"address": "10.0.0.11", "prefix_length": 32}
    world.links["a"][0]["addresses"][1] = {"address": "fd00::11", "prefix_length": 128}
    world.observe()
    assert world.finding("a", LINK).verdict == "as_declared"


def test_addresses_that_nobody_declared_are_tried_too(world: World) -> None:
    world.links["b"] = link("b", "fd00::abcd/64")
    world.links["b"].append(
        {"name": "docker0", "mac": "02:00:00:00:00:99",
         "addresses": [{"address": "172.17.0.1", "prefix_length": 16}]}
    )  # fmt: skip
    world.observe()
    tried = {p.address for c in world.full.cells if c.target == "b" for p in c.probes}
    assert tried == {"10.0.0.12", "fd00::12", "fd00::abcd", "fe80::12"}
    world.set("c", "b/web/ipv6/1", "open")
    assert world.finding("c", WEB6).verdict == "leak"
    # Two hosts have it: who would answer?
    world.links["c"] = link("c", "fd00::abcd/64")
    world.observe()
    assert not any(p.address == "fd00::abcd" for c in world.full.cells for p in c.probes)


def test_plan_of_eight_hosts_takes_no_time_and_is_always_the_same() -> None:
    names = [f"h{number}" for number in range(8)]
    data = declared(
        groups={"alphas": names[:4], "betas": names[4:], "outside": []},
        addresses={n: [f"10.0.0.{i + 11}", f"fd00::{i + 11}"] for i, n in enumerate(names)},
    )
    data["services"] |= {
        f"s{n}": {"groups": ["fleet"], "protocol": "tcp", "port": n} for n in range(1, 9)
    }
    begun = time.perf_counter()
    made = probe_plan.plan(parse_fleet(data))
    assert time.perf_counter() - begun < 1
    assert made.targets() == probe_plan.plan(parse_fleet(data)).targets()
    assert len(made.cells) > 1000
