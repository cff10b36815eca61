"""A captured host answers with whatever it likes: it becomes that host's problem and nobody else's.

The fleet is that of test_isolation_sandboxes: s and t are slaves, s is the one that is captured.
"""

from __future__ import annotations

import copy
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.filter import isolation

from cellblock.fleet import answers, report, verdict

from .test_isolation_report import HOSTILE, RUN, parsed
from .test_isolation_sandboxes import World, declared

WORLD = World()
Change = Callable[[dict[str, Any]], Any]


def responses(change: Change | None = None) -> dict[str, Any]:
    """What all hosts answered; ``change`` is done to the answers of s.

    Who tried what follows from the first answers, as in the playbook: no host answers more than the
    filter had it asked.
    """
    seen = copy.deepcopy(WORLD.seen)
    if change:
        change(seen["s"])
    first = {host: parts["listening"] for host, parts in seen.items()}
    given = isolation.probe_targets(isolation.probe_plan(declared()), first)
    for host, parts in seen.items():
        if host == "s" and first["s"] == WORLD.seen["s"]["listening"]:
            continue
        asked = {box["name"]: box["targets"] for box in given[host]["sandboxes"]}
        asked[""] = given[host]["targets"]
        boxes = parts["probed"]["sandboxes"]
        parts["probed"]["sandboxes"] = {name: boxes[name] for name in boxes if name in asked}
        for name, probed in {**parts["probed"]["sandboxes"], "": parts["probed"]}.items():
            wanted = [target["id"] for target in asked[name]]
            probed["results"] = [r for r in probed["results"] if r["id"] in wanted]
    return seen


def judge(seen: dict[str, Any]) -> verdict.Report:
    return verdict.judge(*answers.observe(WORLD.plan, seen))


def at(path: str, value: Any) -> Change:
    """Sets what is at a path such as listening.interfaces.0.mac; DROP removes it."""

    def change(of_s: dict[str, Any]) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        place: Any = of_s
        for step in steps:
            place = place[step]
        if value is DROP:
            del place[last]
        elif callable(value):
            place[last] = value(place[last])
        else:
            place[last] = value

    return change


DROP = object()
LINK = "listening.interfaces.0"
JOBS = "listening.job_network"
RESULT = "probed.results.0"
BOX = "probed.sandboxes.slot"
SIBLING = "collected.sandboxes.sibling"
RECORD = {"listener": "x", "source": "10.0.0.1", "source_port": 1, "payload": ""}


def one_more_address(number: int) -> dict[str, Any]:
    return {"address": f"10.0.{number >> 8}.{number & 255}", "prefix_length": 16}


ELSEWHERE = [{"address": f"198.18.{n >> 8}.{n & 255}", "prefix_length": 32} for n in range(3000)]

CASES: list[tuple[str, Any, str]] = [
    # where, what is there, what is said of it
    ("listening", "text", "the answer is no mapping"),
    ("listening", [1], "the answer is no mapping"),
    ("listening.interfaces", DROP, "interfaces is missing"),
    ("listening.interfaces", None, "interfaces is no list"),
    ("listening.interfaces", {"0": 1}, "interfaces is no list"),
    ("listening.interfaces", lambda i: i * 1025, "interfaces has 1025 entries, at most 1024"),
    (LINK, 7, "interfaces[0] is no mapping"),
    (f"{LINK}.mac", DROP, "interfaces[0].mac is missing"),
    (f"{LINK}.mac", "02:00:00:00:00:01\n", "interfaces[0].mac is no hardware address"),
    (f"{LINK}.mac", 5, "interfaces[0].mac is no hardware address"),
    (f"{LINK}.name", None, "interfaces[0].name is no text"),
    (f"{LINK}.name", "x" * 100_000, "interfaces[0].name has 100000 characters, at most 200"),
    (f"{LINK}.addresses", "10.0.0.1", "interfaces[0].addresses is no list"),
    (f"{LINK}.addresses.0", [], "interfaces[0].addresses[0] is no mapping"),
    (f"{LINK}.addresses.0.address", 1, "interfaces[0].addresses[0].address is no address"),
    (f"{LINK}.addresses.0.address", "10.0.0", "interfaces[0].addresses[0].address is no address"),
    (f"{LINK}.addresses.2.address", "fe80::1%$(id)", "addresses[2].address is no address"),
    (f"{LINK}.addresses.0.address", "224.0.0.1", "addresses[0].address is none that an interface"),
    (f"{LINK}.addresses.0.address", "127.0.0.1", "addresses[0].address is none that an interface"),
    (f"{LINK}.addresses.0.prefix_length", DROP, "addresses[0].prefix_length is missing"),
    (f"{LINK}.addresses.0.prefix_length", 33, "addresses[0].prefix_length does not fit"),
    (f"{LINK}.addresses.0.prefix_length", True, "prefix_length is no number from 0 to 128"),
    (f"{LINK}.addresses.0.prefix_length", "24", "prefix_length is no number from 0 to 128"),
    (f"{LINK}.addresses", lambda a: a + [one_more_address(n) for n in range(5000)],
     "interfaces[0].addresses has 5003 entries, at most 4096"),
    (f"{LINK}.addresses", lambda a: a + [one_more_address(n) for n in range(3, 70)],
     "interfaces has 70 addresses on interfaces of the fleet's networks, at most 64"),
    ("listening.interfaces", lambda i: [{**i[0], "addresses": ELSEWHERE}] * 2,
     "interfaces has 6000 addresses, at most 4096"),
    ("listening.interfaces", lambda i: i * 30, "interfaces has 90 addresses on interfaces of"),
    ("listening.own_addresses", DROP, "own_addresses is missing"),
    ("listening.own_addresses.0", ["10.0.0.1"], "own_addresses[0] is no address"),
    ("listening.listeners", DROP, "listeners is missing"),
    ("listening.listeners.0.id", DROP, "listeners[0].id is missing"),
    ("listening.listeners.0.id", ["a"], "listeners[0].id is no text"),
    ("listening.listeners.0.ipv6", DROP, "listeners[0].ipv6 is missing"),
    ("listening.listeners.1.port", 70000, "listeners[1].port is no number from 1 to 65535"),
    ("listening.listeners.1.port", 1, "listeners[1] was not asked for"),
    ("listening.listeners", lambda e: e + e, "listeners[2] was not asked for, or is there twice"),
    ("listening.handle", {}, "handle is no text"),
    (JOBS, "cbj0", "job_network is no mapping"),
    (JOBS, {}, "job_network.interfaces is missing"),
    (JOBS, {"problem": ["x"]}, "job_network.problem is no text"),
    (JOBS, {"problem": "x", "handle": "h"}, "job_network has an unknown field"),
    (JOBS, {"problem": "x", "listeners": []}, "job_network has an unknown field"),
    (f"{JOBS}.problem", 5, "job_network.problem is no text"),
    (f"{JOBS}.handle", DROP, "job_network.handle is missing"),
    (f"{JOBS}.interfaces.0.mac", DROP, "job_network.interfaces[0].mac is missing"),
    (f"{JOBS}.interfaces.0.addresses.0.address", "x",
     "job_network.interfaces[0].addresses[0].address is no address"),
    (f"{JOBS}.listeners.0.protocol", DROP, "job_network.listeners[0].protocol is missing"),
    ("probed", 3, "the answer is no mapping"),
    ("probed.results", DROP, "results is missing"),
    ("probed.results", {}, "results is no list"),
    (RESULT, "open", "results[0] is no mapping"),
    (f"{RESULT}.id", DROP, "results[0].id is missing"),
    (f"{RESULT}.id", {}, "results[0].id is no text"),
    (f"{RESULT}.id", "c/ping/ipv4/99", "results[0] was not asked for"),
    ("probed.results", lambda r: [*r, r[0]], "was not asked for, or is there twice"),
    ("probed.results", lambda r: r * 20_000, "entries, at most 20000 are taken"),
    (f"{RESULT}.outcome", DROP, "results[0].outcome is missing"),
    (f"{RESULT}.outcome", "fine", "results[0].outcome is none of open, refused"),
    (f"{RESULT}.outcome", [], "results[0].outcome is none of open, refused"),
    (f"{RESULT}.evidence", DROP, "results[0].evidence is missing"),
    (f"{RESULT}.evidence", None, "results[0].evidence is no text"),
    (f"{RESULT}.evidence", "x" * 1_000_000, "results[0].evidence has 1000000 characters"),
    (f"{RESULT}.payload", {}, "results[0].payload is no text"),
    (f"{RESULT}.source_port", 40000, "results[0].source is missing"),
    (f"{RESULT}.source_port", "40000", "results[0].source_port is no number"),
    ("probed.sandboxes", [], "sandboxes is no mapping"),
    ("probed.sandboxes.other", {"results": []}, "sandboxes has a name that was not asked for"),
    (BOX, "x", "sandboxes.slot is no mapping"),
    (BOX, {}, "sandboxes.slot.results is missing"),
    (BOX, {"problem": 7}, "sandboxes.slot.problem is no text"),
    (f"{BOX}.results.0.evidence", 7, "sandboxes.slot.results[0].evidence is no text"),
    (f"{BOX}.results", lambda r: r + r, "was not asked for, or is there twice"),
    ("collected", [], "the answer is no mapping"),
    ("collected.was_running", "yes", "was_running is neither true nor false"),
    ("collected.received", DROP, "received is missing"),
    ("collected.received", [RECORD] * 20_001, "received has 20001 entries, at most 20000"),
    ("collected.received", [{**RECORD, "payload": []}], "received[0].payload is no text"),
    ("collected.received", [{**RECORD, "listener": []}], "received[0].listener is no text"),
    ("collected.received", [{"payload": "x"}], "received[0].listener is missing"),
    ("collected.received", [{**RECORD, "source_port": -1}], "received[0].source_port is no number"),
    ("collected.half_open", DROP, "half_open is missing"),
    ("collected.half_open", [{}], "half_open[0].source is missing"),
    ("collected.half_open", [{"source": "x", "source_port": 1, "port": [1]}], "half_open[0].port"),
    ("collected.is_incomplete", 0, "is_incomplete is neither true nor false"),
    ("collected.handle", 7, "handle is no text"),
    ("collected.sandboxes", "x", "sandboxes is no mapping"),
    (SIBLING, "x", "sandboxes.sibling is no mapping"),
    (f"{SIBLING}.received", None, "sandboxes.sibling.received is no list"),
]  # fmt: skip


def test_honest_answers_are_taken_as_they_are() -> None:
    seen = responses()
    full, observations = answers.observe(WORLD.plan, seen)
    assert observations == seen
    assert full == WORLD.full
    judged = judge(seen)
    assert judged.is_green, judged.differences()


@pytest.mark.parametrize(("path", "value", "says"), CASES)
def test_what_makes_no_sense_is_that_hosts_problem(path: str, value: Any, says: str) -> None:
    seen = responses(at(path, value))
    _, observations = answers.observe(WORLD.plan, seen)
    problem = observations["s"]["problem"]
    assert problem.startswith("what it returned makes no sense (")
    assert says in problem
    assert not any("problem" in observations[host] for host in ("controller", "c", "t"))
    assert path.split(".")[0] not in observations["s"]
    judged = judge(seen)
    assert not judged.is_green
    assert any(says in sentence for sentence in judged.differences())
    # All that s has no part in is judged as if nothing were.
    for finding in judged.findings:
        if "s" not in (finding.cell.vantage.split("/")[0], finding.cell.target.split("/")[0]):
            assert finding.verdict == "as_declared", finding.sentence


@pytest.mark.parametrize("part", ["listening", "probed", "collected"])
def test_a_leak_that_others_saw_stays_one(part: str) -> None:
    """What a captured host gets by talking nonsense is no better verdict on what it did."""
    seen = responses(at(part, {"nonsense": 1}))
    (result,) = [r for r in seen["t"]["probed"]["results"] if r["id"] == "c/quiet/ipv4/0"]
    result["outcome"] = "open"
    judged = judge(seen)
    assert judged.counts["leak"] == 1


def test_a_host_that_failed_its_task_made_no_plan_either() -> None:
    """Filter and report agree on who is left out; else all others would have answered too much."""
    seen = responses(at("listening.failed", True))
    full = answers.observe(WORLD.plan, seen)[0]
    first = {host: parts["listening"] for host, parts in seen.items()}
    assert "s" not in answers.listening(WORLD.plan, first)
    given = isolation.probe_targets(isolation.probe_plan(declared()), first)
    assert given["t"]["targets"] == full.targets()["t"]
    assert not any(t["id"].startswith("s/sibling") for t in given["t"]["targets"])


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (None, None),
        ({}, None),
        ({"skipped": True}, None),
        ({"failed": True, "msg": "targets: x"}, "probed failed (targets: x)"),
        ({"failed": True, "msg": ["x"]}, "probed failed (no reason given)"),
        ({"unreachable": True, "msg": "Task failed: no route\nmore"}, "unreachable (no route)"),
        ({"unreachable": True, "msg": "x" * 10_000}, f"unreachable ({'x' * 300})"),
        ({"unreachable": True}, "unreachable (no reason given)"),
        ("nothing", "what it returned makes no sense (the answer is no mapping)"),
    ],
)
def test_results_of_tasks(result: Any, problem: str | None) -> None:
    _, observations = answers.observe(WORLD.plan, {"c": {"probed": result}})
    assert observations["c"] == ({"problem": problem} if problem else {})


def test_a_large_answer_takes_no_time() -> None:
    change = at("collected.received", [RECORD] * 20_000)
    began = time.monotonic()
    judge(responses(change))
    assert time.monotonic() - began < 5


def text_fields(value: Any, path: str = "") -> Iterator[str]:
    """Where text is in an answer; of a list, in its first entry."""
    if isinstance(value, str):
        yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, entry in entries:
        yield from text_fields(entry, f"{path}.{key}" if path else str(key))


@pytest.mark.parametrize("path", list(text_fields({**WORLD.seen["s"], "rules": ["x"]})))
def test_no_text_of_a_host_acts_anywhere(path: str) -> None:
    """Whatever text it is, it is refused, or shown, but never acted upon."""
    seen = responses()
    seen["s"]["rules"] = ["x"]
    at(path, HOSTILE)(seen["s"])
    full, observations = answers.observe(WORLD.plan, seen)
    judged = verdict.judge(full, observations, {"s": seen["s"]["rules"]})
    as_json = report.to_json(judged, RUN)
    page, picture = report.to_html(judged, RUN, as_json), report.to_svg(judged)
    ElementTree.fromstring(picture)
    for text in (page, picture):
        assert "script" not in {tag for tag, _ in parsed(text).tags}
        assert not any("onload" in attributes for _, attributes in parsed(text).tags)
    for text in (page, picture, as_json, report.to_text(judged, colour=False)):
        assert not {"\x1b", "\u202e"} & set(text)


def test_nothing_that_a_host_said_acts_in_the_report() -> None:
    """In every place whose text the report shows."""
    seen = responses(at(f"{JOBS}", {"problem": HOSTILE}))
    seen["t"]["probed"]["sandboxes"]["cache"] = {"problem": HOSTILE}
    seen["t"]["listening"]["interfaces"][0]["name"] = HOSTILE
    for result in seen["t"]["probed"]["results"]:
        result["evidence"] = HOSTILE
    seen["c"]["probed"] = {"failed": True, "msg": HOSTILE}
    judged = judge(seen)
    shown = report.to_text(judged, colour=False)
    assert shown.count("\\x1b[2J") > 2
    assert "\x1b" not in shown
    page = report.to_html(judged, RUN, report.to_json(judged, RUN))
    assert "&lt;script&gt;" in page
    assert "script" not in {tag for tag, _ in parsed(page).tags}
    assert not any("onload" in attributes for _, attributes in parsed(page).tags)
    for text in (page, report.to_svg(judged), report.to_json(judged, RUN)):
        assert not {"\x1b", "\u202e"} & set(text)
