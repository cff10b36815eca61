"""Jobs and network slots as vantages and targets: what is tried from them, and what it means.

s and t are slaves, c a cache server that jobs with the policies `cache` and `internet` may use, and
`far` is outside, for `internet` only. The controller may ping every host.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.filter import isolation

from cellblock.fleet import completion, probe_plan, report
from cellblock.fleet.model import parse_fleet
from cellblock.fleet.verdict import Finding, Report, judge

NUMBERS = {"controller": 1, "c": 14, "s": 21, "t": 22}
SLOTS = {"s": "10.0.0.128", "t": "10.0.0.192"}
SANDBOXES = ("cache", "internet", "none", "slot")


def declared(**more: Any) -> dict[str, Any]:
    return {
        "groups": {"worker_slaves": ["s", "t"], "caches": ["c"], "outside": []},
        "addresses": {
            name: [f"10.0.0.{NUMBERS[name]}", f"fd00::{NUMBERS[name]}"] for name in ("c", "s", "t")
        },
        "services": {
            "ping": {"groups": ["fleet"], "protocol": "icmp"},
            "quiet": {"groups": ["fleet"], "protocol": "udp", "port": 9999},
            "cache": {"groups": ["caches"], "protocol": "tcp", "port": 3142, "jobs": True},
            "web": {"groups": [], "protocol": "tcp", "port": 80},
        },
        "networks": {"controllers": ["10.0.0.1", "fd00::1"]},
        "flows": [{"from": "controllers", "to": "fleet", "services": ["ping"]}],
        "job_flows": {
            "none": [],
            "cache": [{"to": "caches", "services": ["cache"]}],
            "internet": [
                {"to": "caches", "services": ["cache"]},
                {"to": "internet", "services": ["web"]},
            ],
        },
        "external": {"far": {"addresses": ["203.0.113.1"], "services": ["web"]}},
        **more,
    }


def interface(name: str, number: int, *addresses: str) -> dict[str, Any]:
    return {
        "name": name,
        "mac": f"02:00:00:00:00:{number:02x}",
        "addresses": [
            {"address": a.split("/")[0], "prefix_length": int(a.split("/")[1])} for a in addresses
        ],
    }


def heard(listeners: list[dict[str, Any]], handle: str) -> dict[str, Any]:
    return {
        "handle": handle,
        "listeners": [{**e, "ipv4": "listening", "ipv6": "listening"} for e in listeners],
    }


def account(handle: str) -> dict[str, Any]:
    return {
        "was_running": True,
        "handle": handle,
        "is_incomplete": False,
        "received": [],
        "half_open": [],
    }


class World:
    """Observations of a fleet that is as declared, to be changed in one place."""

    def __init__(self, network: Callable[[str], Any] | None = None, **more: Any) -> None:
        self.plan = probe_plan.plan(parse_fleet(declared(**more)))
        self.seen: dict[str, dict[str, Any]] = {}
        for name, number in NUMBERS.items():
            addresses = [f"10.0.0.{number}/24", f"fd00::{number}/64", f"fe80::{number}/64"]
            told = heard(self.plan.listeners().get(name, []), f"at {name}")
            told |= {
                "interfaces": [interface("eth0", number, *addresses)],
                "own_addresses": [a.split("/")[0] for a in addresses],
                "job_network": None,
            }
            self.seen[name] = {
                "listening": told,
                "probed": {"results": [], "sandboxes": {}},
                "collected": {**account(f"at {name}"), "sandboxes": {}},
            }
        for slave, address in SLOTS.items():
            own = {
                **heard(self.plan.siblings()[slave]["listeners"], f"in {slave}"),
                "interfaces": [interface("job0", NUMBERS[slave] + 100, f"{address}/24")],
            }
            self.seen[slave]["listening"]["job_network"] = network(slave) if network else own
            self.seen[slave]["collected"]["sandboxes"]["sibling"] = account(f"in {slave}")
        self.full = completion.complete(self.plan, self.listening())
        for cell in self.full.cells:
            for probe in cell.probes:
                self.add(cell, probe, cell.flow is not None or cell.kind == probe_plan.CONTROL)

    def listening(self) -> dict[str, Any]:
        return {name: seen["listening"] for name, seen in self.seen.items()}

    def results(self, vantage: str) -> list[dict[str, Any]]:
        host, _, what = vantage.partition("/")
        probed = self.seen[host]["probed"]
        found: list[dict[str, Any]] = (
            probed["sandboxes"].setdefault(what, {"results": []})["results"]
            if what
            else probed["results"]
        )
        return found

    def add(self, cell: probe_plan.Cell, probe: probe_plan.Probe, is_open: bool) -> None:
        result = {
            "id": probe.id,
            "outcome": "open" if is_open else "filtered",
            "evidence": "answered" if is_open else "no answer",
            "payload": f"{cell.vantage}>{probe.id}",
        }
        if cell.kind in (probe_plan.SPOOFED, probe_plan.SPOOFED_FRAME):
            result |= {"outcome": "sent", "evidence": "sent twice"}
        self.results(cell.vantage).append(result)
        if is_open:
            self.arrive(cell.target, result)

    def arrive(self, target: str, result: dict[str, Any]) -> None:
        host, _, what = target.partition("/")
        if host in self.seen:
            collected = self.seen[host]["collected"]
            received = (collected["sandboxes"][what] if what else collected)["received"]
            received.append({"listener": "x", "payload": result["payload"], "source": "x",
                             "source_port": 0})  # fmt: skip

    def result(self, vantage: str, ident: str) -> dict[str, Any]:
        (found,) = [entry for entry in self.results(vantage) if entry["id"] == ident]
        return found

    def judge(self) -> Report:
        return judge(completion.complete(self.plan, self.listening()), self.seen)

    def finding(self, vantage: str, ident: str) -> Finding:
        (found,) = [
            f
            for f in self.judge().findings
            if f.cell.vantage == vantage and any(p.id == ident for p in f.cell.probes)
        ]
        return found


def test_a_fleet_that_is_as_declared() -> None:
    judged = World().judge()
    assert judged.differences() == []
    assert judged.is_green
    # Written down by hand.
    assert {
        (f.cell.vantage, f.cell.target, f.cell.service.name, f.cell.path)
        for f in judged.findings
        if f.is_reached and f.cell.vantage != "controller"
    } == {
        (f"{slave}/{what}", *rest)
        for slave in "st"
        for what, *rest in (
            ("cache", "c", "cache", "ipv4"),
            ("internet", "c", "cache", "ipv4"),
            ("internet", "far", "web", "ipv4"),
            ("slot", "c", "cache", "ipv4"),
            ("slot", "far", "web", "ipv4"),
        )
    }


def ranges_for_jobs(**prefixes: str) -> dict[str, Any]:
    """What a fleet declares whose jobs have addresses, IPv6 as well on slaves with a prefix."""
    # With a range for jobs, the policy `internet` must name a resolver.
    dns = {"groups": ["caches"], "protocol": "tcp", "port": 53, "jobs": True}
    flows = declared()["job_flows"]
    return {
        "job_networks": {"s": "10.0.0.128/26", "t": "10.0.0.192/26"},
        "job_ipv6_prefixes": prefixes,
        "services": {**declared()["services"], "dns": dns},
        "external": {"far": {"addresses": ["203.0.113.1", "2001:db8:113::1"], "services": ["web"]}},
        "job_flows": {
            **flows,
            "internet": [*flows["internet"], {"to": "caches", "services": ["dns"]}],
        },
    }


IPV6_OF_S = "fd00::a00:80"


def slot_with(*addresses: str) -> Callable[[str], Any]:
    """The slot that s holds has these addresses too."""

    def network(slave: str) -> dict[str, Any]:
        listeners = probe_plan.plan(parse_fleet(declared())).siblings()[slave]["listeners"]
        more = addresses if slave == "s" else ()
        return {
            **heard(listeners, f"in {slave}"),
            "interfaces": [
                interface("job0", NUMBERS[slave] + 100, f"{SLOTS[slave]}/24", *more),
            ],
        }

    return network


def reached_over_ipv6(judged: Report) -> set[tuple[str, str, str]]:
    return {
        (f.cell.vantage, f.cell.target, f.cell.service.name)
        for f in judged.findings
        if f.is_reached and f.cell.path == probe_plan.IPV6 and "/" in f.cell.vantage
    }


def test_where_a_slave_has_ipv6_for_jobs_they_reach_what_their_policy_allows() -> None:
    world = World(slot_with(f"{IPV6_OF_S}/64"), **ranges_for_jobs(s="fd00::/64"))
    judged = world.judge()
    assert judged.differences() == []
    assert judged.is_green
    # Written down by hand; t has none.
    assert reached_over_ipv6(judged) == {
        ("s/cache", "c", "cache"),
        ("s/internet", "c", "cache"),
        ("s/internet", "c", "dns"),
        ("s/internet", "far", "web"),
        ("s/slot", "c", "cache"),
        ("s/slot", "c", "dns"),
        ("s/slot", "far", "web"),
    }
    assert not any(f.is_reached for f in judged.findings if f.cell.path == probe_plan.LINK_LOCAL)
    # Without the setting, with slots that are the same: nothing.
    without = World(slot_with(f"{IPV6_OF_S}/64"), **ranges_for_jobs()).judge()
    assert reached_over_ipv6(without) == set()
    assert without.is_green


@pytest.mark.parametrize(
    ("change", "vantage", "ident", "verdict"),
    [
        (lambda w: None, "s/cache", "c/cache/ipv6/0", "as_declared"),
        ("filtered", "s/cache", "c/cache/ipv6/0", "broken"),
        ("open", "s/cache", "c/dns/ipv6/0", "leak"),
        ("open", "s/none", "c/cache/ipv6/0", "leak"),
        ("open", "s/internet", "c/ping/ipv6/0", "leak"),
        ("open", "s/internet", "s/quiet/ipv6/0", "leak"),
        ("open", "s/internet", "c/ping/link_local/0", "leak"),
        ("open", "t/cache", "c/cache/ipv6/0", "leak"),
        ("open", "s/slot", "s/sibling/quiet/ipv6/0", "leak"),
        ("open", "c", "s/sibling/quiet/ipv6/0", "leak"),
        (lambda w: None, "t/slot", "s/sibling/quiet/ipv6/0", "as_declared"),
    ],
)
def test_verdict_over_ipv6(change: Any, vantage: str, ident: str, verdict: str) -> None:
    world = World(slot_with(f"{IPV6_OF_S}/64"), **ranges_for_jobs(s="fd00::/64"))
    (changed(vantage, ident, change) if isinstance(change, str) else change)(world)
    assert world.finding(vantage, ident).verdict == verdict


def test_another_job_is_tried_at_its_ipv6_address_and_at_no_link_local_one() -> None:
    world = World(slot_with("fe80::80/64", f"{IPV6_OF_S}/64"), **ranges_for_jobs(s="fd00::/64"))
    assert [str(a) for a in world.full.fleet.hosts["s/sibling"].addresses] == [
        SLOTS["s"],
        IPV6_OF_S,
    ]
    cells = [c for c in world.full.cells if c.target == "s/sibling"]
    assert {c.path for c in cells} == {probe_plan.IPV4, probe_plan.IPV6}
    assert {c.vantage for c in cells if c.path == probe_plan.IPV6} == {
        *("controller", "c", "s", "t", "s/sibling"),
        *(f"{slave}/{what}" for slave in "st" for what in SANDBOXES),
    }
    assert not any(c.flow for c in cells)
    assert {c.path for c in world.full.cells if c.target == "t/sibling"} == {probe_plan.IPV4}
    # From a slot without an IPv6 address that is declared, too.
    undeclared = World(slot_with(f"{IPV6_OF_S}/64"))
    assert any(c.target == "s/sibling" and c.path == probe_plan.IPV6 for c in undeclared.full.cells)


def test_a_slot_without_the_ipv6_address_that_is_declared_is_a_gap() -> None:
    world = World(slot_with(), **ranges_for_jobs(s="fd00::/64"))
    assert world.full.gaps == (
        "Whether jobs on s can be reached over IPv6 was not tried: a slot there has no IPv6 address,"
        " though fd00::a00:80/122 is declared as their range; provision it (playbooks/site.yml), or"
        " leave it out of cellblock_job_ipv6_prefix.",
    )
    # It is tried over IPv4 all the same.
    assert any(c.target == "s/sibling" for c in world.full.cells)
    assert not world.judge().is_green


def test_every_vantage_tries_every_job_and_no_flow_leads_there() -> None:
    cells = [c for c in World().full.cells if c.target == "s/sibling"]
    assert {c.vantage for c in cells if c.kind == probe_plan.SERVICE} == {
        *("controller", "c", "s", "t"),
        *(f"{slave}/{what}" for slave in "st" for what in SANDBOXES),
    }
    assert {c.vantage for c in cells if c.kind == probe_plan.CONTROL} == {"s/sibling"}
    assert not any(c.flow for c in cells)
    assert {c.service.name for c in cells} == {"ping", "quiet"}


def test_jobs_try_every_path_of_their_own_slave() -> None:
    cells = {
        (c.service.name, c.path): c.probes
        for c in World().full.cells
        if (c.vantage, c.target) == ("s/internet", "s")
    }
    assert set(cells) == {(s, p) for s in ("ping", "quiet") for p in probe_plan.PATHS}
    (probe,) = cells["quiet", "link_local"]
    assert (probe.address, probe.interface) == ("fe80::21", "job0")


def test_without_an_interface_link_local_addresses_are_tried_without_one() -> None:
    probes = [
        p for c in World().full.cells if c.vantage == "s/none" and c.path == probe_plan.LINK_LOCAL
        for p in c.probes
    ]  # fmt: skip
    assert probes
    assert {p.interface for p in probes} == {None}


def test_only_root_in_a_slot_forges() -> None:
    world = World()
    forged = [
        c for c in world.full.cells if c.kind in (probe_plan.SPOOFED, probe_plan.SPOOFED_FRAME)
    ]
    assert {c.vantage for c in forged if "/" in c.vantage} == {"s/slot", "t/slot"}
    from_slot = [c for c in forged if (c.vantage, c.target) == ("s/slot", "c")]
    macs = {(p.protocol, p.mac, p.source_mac) for c in from_slot for p in c.probes}
    assert macs == {
        ("spoofed_icmp", None, None),
        ("spoofed_frame", "02:00:00:00:00:0e", None),
        # As its own slave.
        ("spoofed_frame", "02:00:00:00:00:0e", "02:00:00:00:00:15"),
    }
    assert {c.claimed for c in from_slot} == {"controller"}
    # Frames of hosts are tried on demand only.
    assert not any(c.kind == probe_plan.SPOOFED_FRAME for c in forged if c.vantage == "s")


QUIET, PING, CACHE, CACHE6 = "c/quiet/ipv4/0", "c/ping/ipv4/0", "c/cache/ipv4/0", "c/cache/ipv6/0"
OTHER = "t/sibling/quiet/ipv4/0"
Change = Callable[[World], Any]


def changed(vantage: str, ident: str, outcome: str) -> Change:
    return lambda world: world.result(vantage, ident).update(
        outcome=outcome, evidence=f"<{outcome}>"
    )


def arrived(vantage: str, ident: str, target: str) -> Change:
    return lambda world: world.arrive(target, world.result(vantage, ident))


def failed(slave: str, what: str) -> Change:
    return lambda world: world.seen[slave]["probed"]["sandboxes"].update(
        {what: {"problem": "the job's verdict is internal_error"}}
    )


def forgotten(slave: str, what: str) -> Change:
    return lambda world: world.seen[slave]["probed"]["sandboxes"].pop(what)


def down(slave: str) -> Change:
    return lambda world: world.seen.update({slave: {"problem": "unreachable (no route)"}})


def silent(target: str) -> Change:
    return lambda world: world.seen[target]["collected"]["sandboxes"].clear()


CASES: list[tuple[str, Change, str, str, str, str]] = [
    # name, what differs, vantage, cell, verdict, what the sentence says
    ("nothing", lambda w: None, "s/cache", QUIET, "as_declared", "and no flow allows it"),
    ("undeclared and open", changed("s/cache", QUIET, "open"), "s/cache", QUIET, "leak", "reached"),
    ("undeclared and refused", changed("s/none", CACHE, "refused"), "s/none", CACHE, "leak", ""),
    ("undeclared and arrived", arrived("s/cache", QUIET, "c"), "s/cache", QUIET, "leak",
     "c received it"),
    ("allowed over IPv4 is not over IPv6", changed("s/cache", CACHE6, "open"), "s/cache", CACHE6,
     "leak", "over IPv6"),
    ("declared and silent", changed("s/cache", CACHE, "filtered"), "s/cache", CACHE, "broken",
     "though flow 1 (cache -> caches: cache) allows it"),
    ("a job may not ask", changed("s/cache", PING, "denied"), "s/cache", PING, "as_declared",
     "not reached (<denied>)"),
    ("root in a slot may", changed("s/slot", PING, "denied"), "s/slot", PING, "unproven", "<denied>"),
    ("so may a host", changed("s", PING, "denied"), "s", PING, "unproven", "<denied>"),
    ("a declared service that may not be asked for", changed("s/cache", CACHE, "denied"), "s/cache",
     CACHE, "broken", ""),
    ("the job failed", failed("s", "cache"), "s/cache", QUIET, "unproven", "verdict is internal"),
    ("the job failed, declared", failed("s", "cache"), "s/cache", CACHE, "unproven", "internal"),
    ("another's job failed", failed("s", "cache"), "s/internet", QUIET, "as_declared", ""),
    ("the job was not run", forgotten("s", "cache"), "s/cache", QUIET, "unproven", "no result"),
    ("the slave is down", down("s"), "s/cache", QUIET, "unproven", "s: unreachable (no route)"),
    ("a job reached another", changed("s/none", OTHER, "open"), "s/none", OTHER, "leak", ""),
    ("a job got a packet through", arrived("s/slot", OTHER, "t/sibling"), "s/slot", OTHER, "leak",
     "t/sibling received it"),
    ("a host reached a job", changed("c", OTHER, "open"), "c", OTHER, "leak", ""),
    ("the other job never listened", changed("t/sibling", OTHER, "filtered"), "s/none", OTHER,
     "unproven", "nobody else"),
    ("the other job gave no account", silent("t"), "s/none", OTHER, "unproven", "its listener"),
    ("a forged packet", arrived("s/slot", "c/ping/ipv4/forged", "c"), "s/slot",
     "c/ping/ipv4/forged", "leak", "a forged packet got in"),
    ("a forged frame", arrived("s/slot", "c/ping/ipv4/frame", "c"), "s/slot", "c/ping/ipv4/frame",
     "leak", "(frame): a forged"),
    ("a frame of another's", arrived("s/slot", "c/ping/ipv4/frame_mac", "c"), "s/slot",
     "c/ping/ipv4/frame_mac", "leak", "another's hardware address): a forged"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "vantage", "ident", "verdict", "says"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_verdict(change: Change, vantage: str, ident: str, verdict: str, says: str) -> None:
    world = World()
    change(world)
    if "problem" in world.seen["s"]:
        judged = judge(world.full, world.seen)
        (finding,) = [
            f
            for f in judged.findings
            if f.cell.vantage == vantage and any(p.id == ident for p in f.cell.probes)
        ]
    else:
        finding = world.finding(vantage, ident)
    assert finding.verdict == verdict, finding.sentence
    assert says in finding.sentence


def test_a_slave_without_job_networks_gives_no_vantages_but_a_note() -> None:
    world = World(lambda slave: None)
    assert world.full.vantages == ("controller", "c", "s", "t")
    assert not any("/" in cell.vantage + cell.target for cell in world.full.cells)
    assert any(n.startswith("s gives jobs no network") for n in world.full.notes)
    assert world.full.gaps == ()
    assert world.judge().is_green


def test_a_slave_that_hides_its_job_network_is_a_gap() -> None:
    """One that has a range for jobs must show what they reach; it is only a captured one's word."""
    ranged = {**ranges_for_jobs(), "job_networks": {"t": "10.0.0.192/26"}}
    world = World(lambda slave: None, **ranged)
    assert world.full.gaps == (
        "t gives jobs no network: nothing was tried from jobs there, though 10.0.0.192/26 is declared"
        " as the range of its jobs; provision it (playbooks/site.yml), or write cellblock_job_range as"
        " {slave: network} without it.",
    )
    # s has none: that is as it should be.
    assert [n for n in world.full.notes if "jobs" in n] == [
        "s gives jobs no network: nothing was tried from jobs there."
    ]
    assert world.judge().counts["unproven"] == 1
    assert not world.judge().is_green
    # One that shows it is green.
    assert World(**ranged).judge().is_green


def test_a_slave_that_cannot_hold_a_slot_is_a_gap() -> None:
    world = World(lambda slave: {"problem": "no slot is free"} if slave == "t" else None)
    assert world.full.gaps == ("Whether jobs on t can be reached was not tried: no slot is free.",)
    assert "t/internet" in world.full.vantages
    assert not world.judge().is_green


def test_without_flows_of_jobs_there_are_no_sandboxes() -> None:
    assert probe_plan.sandboxes(parse_fleet(declared(job_flows={}))) == {}
    assert probe_plan.sandboxes(parse_fleet(declared(job_flows={"none": []}))) == {}


def test_sandboxes_can_be_chosen_as_vantages() -> None:
    plan = probe_plan.plan(parse_fleet(declared()), ["s/internet", "t"])
    assert plan.vantages == ("s/internet", "t")
    with pytest.raises(ValueError, match="s/sibling is no vantage"):
        probe_plan.plan(parse_fleet(declared()), ["s/sibling"])


def test_what_the_module_is_given() -> None:
    world = World()
    given = isolation.probe_targets(isolation.probe_plan(declared()), world.listening())
    json.dumps(given)
    assert set(given) == {"controller", "c", "s", "t"}
    assert given["c"]["sandboxes"] == []
    boxes = {box["name"]: box for box in given["s"]["sandboxes"]}
    assert {name: (box["kind"], box["policy"]) for name, box in boxes.items()} == {
        "none": ("job", "none"),
        "cache": ("job", "cache"),
        "internet": ("job", "internet"),
        "slot": ("slot", "internet"),
        "sibling": ("sibling", "internet"),
    }
    assert {t["address"] for t in boxes["sibling"]["targets"]} == {SLOTS["s"]}
    plan = isolation.probe_plan(declared())
    assert plan["siblings"]["t"] == {
        "policy": "internet",
        "listeners": [
            {"id": "ping", "protocol": "icmp"},
            {"id": "quiet", "protocol": "udp", "port": 9999, "payload": "nonce"},
        ],
    }
    assert plan["hosts"] == ["c", "s", "t"]


def test_the_report_has_them() -> None:
    judged = World().judge()
    run = report.Run("x", datetime(2030, 1, 1, tzinfo=UTC))
    text = report.to_text(judged, False)
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("s")]
    assert rows[:5] == ["s", "s/none", "s/cache", "s/internet", "s/slot"]
    assert all(len(line) <= report.WIDTH for line in text.split("Rows reach")[0].splitlines())
    as_json = report.to_json(judged, run)
    assert {"name": "s/sibling", "groups": [], "addresses": [SLOTS["s"]], "external": False} in (
        json.loads(as_json)["hosts"]
    )
    page = report.to_html(judged, run, as_json)
    assert "<td>s/sibling</td><td>a job</td>" in page
