"""The report in its four forms; and that what a hostile host said cannot act in any of them."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser

import pytest

from cellblock.fleet import report

from .test_isolation_matrix import QUIET, WEB, World, declared

RUN = report.Run("fleet <1>", datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC), "9.9")
HOSTILE = "\x1b[2J</title><script>alert(1)</script>'\" onload='x' \u202e&amp;"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def bad() -> World:
    world = World()
    world.set("c", WEB, "open")["evidence"] = "connected in 1 ms"
    world.set("a", "b/web/ipv6/0", "filtered")["evidence"] = "no answer in 9 ms"
    world.set("a", QUIET, "error")["evidence"] = "not tried"
    return world


SMALL = """\
             a             b                  c                  far
             ping  quiet   ping  web  quiet   ping  web  quiet   web
controller   ●●·   ···     ●●·   ···  ···     ●●·   ···  ···
a                          ···   ●B·  ?··     ···   ●●·  ···     ·
b            ···   ···                        ···   ···  ···     ·
c            ···   ···     ···   L··  ···                        ·

Rows reach columns, over IPv4, IPv6, IPv6 link-local, in this order.
● reached, as declared   · not reached, as declared   L leak: reached, not declared   \
B broken: declared, not reached   ? unproven
Forged sources: 12 tried, 0 got in, 0 unproven.
Not tried, and no part of the verdict:
  Forged frames of hosts, which their own rules do not see, were not tried; only the switch can stop them.

Isolation is NOT as declared: 84 as declared, 1 leak, 1 broken, 1 unproven.
  c -> b web (tcp 80) over IPv4: reached (connected in 1 ms), but no flow allows it.
  a -> b web (tcp 80) over IPv6: not reached (no answer in 9 ms), though flow 2 \
(alphas -> betas: web) allows it.
  a -> b quiet (udp 9999) over IPv4: unproven: not tried."""


def test_text_of_a_small_matrix(bad: World) -> None:
    assert report.to_text(bad.judge(), colour=False) == SMALL


def test_colours_change_nothing_else(bad: World) -> None:
    coloured = report.to_text(bad.judge(), colour=True)
    assert "\x1b[1;97;41mL\x1b[0m" in coloured
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured).replace(" \n", "\n") == re.sub(
        " +\n", "\n", SMALL
    )


def test_green(world: World) -> None:
    judged = world.judge()
    assert report.summary(judged) == (
        "Isolation is as declared: 87 as declared, 0 leaks, 0 broken, 0 unproven."
    )
    assert "class='outcome green'" in report.to_html(judged, RUN, "{}")


def test_unproven_is_neither_green_nor_red(world: World) -> None:
    world.set("a", QUIET, "error")
    judged = world.judge()
    assert report.summary(judged).startswith("Isolation is not proven: ")
    assert "class='outcome grey'" in report.to_html(judged, RUN, "{}")


def test_text_is_narrow_and_long_lists_are_cut(bad: World) -> None:
    text = report.to_text(bad.judge(), colour=False, limit=1)
    assert text.endswith("allows it.\n  ... and 2 more, in the report.")
    services = {
        f"a_service_with_a_long_name_{n}": {"groups": ["betas"], "protocol": "tcp", "port": n}
        for n in range(1, 9)
    }
    many = World(declared(services={**declared()["services"], **services}))
    lines = report.to_text(many.judge(), colour=False).splitlines()
    legend = next(n for n, line in enumerate(lines) if line.startswith("Rows reach"))
    assert max(len(line) for line in lines[:legend]) <= report.WIDTH
    assert sum("a_service_with_a_long_name" in line for line in lines[:legend]) > 2


def test_json_says_everything(bad: World) -> None:
    judged = bad.judge()
    data = json.loads(report.to_json(judged, RUN))
    assert data["counts"] == judged.counts
    assert data["is_green"] is False
    assert data["created"] == "2030-01-02T03:04:05+00:00"
    assert data["differences"] == judged.differences()
    (leak,) = [cell for cell in data["cells"] if cell["verdict"] == "leak"]
    assert (leak["vantage"], leak["target"], leak["service"], leak["path"]) == (
        "c", "b", "web", "ipv4",
    )  # fmt: skip
    assert leak["seen"][0]["evidence"] == "connected in 1 ms"
    assert len(data["cells"]) == len(judged.findings) + len(judged.controls)


def test_times_are_utc() -> None:
    elsewhere = datetime(2030, 1, 2, 5, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    assert report.Run("x", elsewhere).created_text == "2030-01-02 03:04:05 UTC"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def test_page_is_whole_and_needs_nothing_else(bad: World) -> None:
    judged = bad.judge()
    as_json = report.to_json(judged, RUN)
    html = report.to_html(judged, RUN, as_json)
    for text in (
        "2030-01-02 03:04:05 UTC",
        "fleet &lt;1&gt;",
        "Cellblock 9.9",
        "fd00::12",
        "alphas",
        "web (tcp 80)",
        "How it is known",
        hashlib.sha256(as_json.encode()).hexdigest(),
        "Forged sources: 12 tried",
    ):
        assert text in html, text
    order = [html.index(part) for part in ("Not as declared", "<svg", "<details>")]
    assert order == sorted(order)
    assert html.index("over IPv4: reached (connected") < html.index("<svg")
    page = parsed(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html
    assert "@import" not in html
    # Every cell is there with its evidence.
    assert sum(tag == "tr" for tag, _ in page.tags) > len(judged.findings)


def test_picture_is_well_formed_and_has_every_cell(bad: World) -> None:
    root = ElementTree.fromstring(report.to_svg(bad.judge()))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text or "" for title in root.iter(f"{space}title")]
    services = [f for f in bad.judge().findings if f.cell.kind == "service"]
    assert {f.sentence for f in services} <= set(titles)
    letters = letters_of(root, space)
    assert (letters["L"], letters["B"], letters["?"]) == (2, 2, 2)  # one, and one in the legend


def letters_of(root: ElementTree.Element, space: str) -> dict[str, int]:
    texts = [text.text for text in root.iter(f"{space}text")]
    return {letter: texts.count(letter) for letter in "LB?"}


def test_what_a_hostile_host_said_is_shown_and_does_nothing(world: World) -> None:
    world.set("c", WEB, "open")["evidence"] = HOSTILE
    world.set("a", WEB, "open")["evidence"] = HOSTILE
    world.drift = {"b": [HOSTILE]}
    world.seen["a"]["problem"] = HOSTILE
    judged = world.judge()
    plain = report.to_text(judged, colour=False)
    assert "\\x1b[2J" in plain
    assert "\x1b" not in plain
    assert "\u202e" not in plain
    svg = report.to_svg(judged)
    html = report.to_html(judged, RUN, report.to_json(judged, RUN))
    quiet = World().judge()
    for made, harmless in (
        (svg, report.to_svg(quiet)),
        (html, report.to_html(quiet, RUN, "{}")),
    ):
        assert "&lt;script&gt;" in made
        assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", made)
        tags, expected = parsed(made), parsed(harmless)
        assert {tag for tag, _ in tags.tags} <= {tag for tag, _ in expected.tags}
        assert {name for _, attributes in tags.tags for name in attributes} <= {
            name for _, attributes in expected.tags for name in attributes
        }
    ElementTree.fromstring(svg)
    assert report.to_json(judged, RUN).isascii()
