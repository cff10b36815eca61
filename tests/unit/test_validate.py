"""The validator: what is wrong is named by its place, in the caller's own error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from cellblock.errors import HostSetupError, InvalidJobError
from cellblock.units import parse_bytes
from cellblock.validate import Value, one_of, show


def value(raw: Any, **options: Any) -> Value:
    return Value(raw, "config", HostSetupError, **options)


def test_parts_know_their_place() -> None:
    stages = value({"stages": [{"env": {"A": 1}}]}).fields(["stages"])["stages"].list()
    variables = stages[0].fields(["env"])["env"].entries()
    assert variables["A"].path == "config.stages[0].env.A"
    bare = value({"stages": [3]}, prefix="").fields(["stages"])["stages"]
    assert (bare.path, bare.list()[0].path) == ("stages", "stages[0]")
    assert value(3, prefix="").path == "config"


def test_the_error_is_the_callers() -> None:
    with pytest.raises(InvalidJobError) as caught:
        Value({"a": 1}, "job", InvalidJobError).fields(["a"])["a"].text()
    assert str(caught.value) == "job.a: is 1, not text; quote it"


def test_what_is_right_comes_out() -> None:
    assert value({"a": 1}).fields(["a"], {"b": 7})["b"].integer(1, 9) == 7
    assert set(value({"a": 1, "c": 3}).fields(["a"], others=True)) == {"a"}
    assert value("x").text(most=1) == "x"
    assert value("ab").matching(re.compile("[a-b]+"), "a word") == "ab"
    assert value(True).boolean() is True
    assert value("tcp").choice(["tcp", "udp"]) == "tcp"
    assert value("2KiB").converted(parse_bytes) == 2048
    assert str(value("fd00::1").address()) == "fd00::1"
    assert str(value("192.0.2.1").ipv4_address()) == "192.0.2.1"
    assert str(value("fd00::/64").network()) == "fd00::/64"
    assert str(value("192.0.2.0/24").ipv4_network()) == "192.0.2.0/24"
    assert value(None).or_none() is None
    assert value(0).or_none() is not None


Access = Callable[[Value], Any]

WRONG: list[tuple[Any, Access, str, str]] = [
    # what is there, what is asked for, what is said, what is said where nothing may be quoted
    ([], lambda v: v.fields(["a"]), ": is [], not a mapping; write the fields a", ": is no mapping"),
    ({}, lambda v: v.fields(["a"]), ".a: is missing; add it", ".a: is missing"),
    ({"b": 1}, lambda v: v.fields([], {"a": 1}), ".b: is not a known field; the fields here are a",
     ": has an unknown field"),
    ([], lambda v: v.entries(), ": is [], not a mapping", ": is no mapping"),
    ({3: 1}, lambda v: v.entries(), ".3: has a name that is not text; quote it",
     ".3: has a name"),
    ({"a": 1, "b": 2}, lambda v: v.entries(most=1), ": has 2 entries, at most 1", ": has 2 entries"),
    ("ab", lambda v: v.list(), ": is 'ab', not a list; write a list", ": is no list"),
    ([], lambda v: v.list(least=1), ": is [], not a list of one or more", ": is no list of one"),
    ([1, 2], lambda v: v.list(most=1), ": has 2 entries, at most 1 are taken", ": has 2 entries"),
    ([1, 2], lambda v: v.list(most=1, what="a list of 1"), ": is [1, 2], not a list of 1; write a",
     ": is no list of 1"),
    (1, lambda v: v.text(), ": is 1, not text", ": is no text"),
    ("abc", lambda v: v.text(most=2), ": has 3 characters, at most 2 are taken", ": has 3 char"),
    ("c\n", lambda v: v.matching(re.compile("c"), "a word"), ": is 'c\\n'; write a word",
     ": is no word"),
    (3, lambda v: v.matching(re.compile("c"), "a word", "mend it"), ": is 3; mend it", ": is no word"),
    (0, lambda v: v.integer(1, 9), ": is 0; write a number from 1 to 9", ": is no number from 1 to 9"),
    (True, lambda v: v.integer(0, 9), ": is True; write a number", ": is no number"),
    (1.0, lambda v: v.integer(0, 9), ": is 1.0; write a number", ": is no number"),
    (1, lambda v: v.boolean(), ": is 1; write true or false", ": is neither true nor false"),
    ("x", lambda v: v.choice(["a", "b", "c"]), ": is 'x'; write a, b or c", ": is none of a, b, c"),
    ([], lambda v: v.choice(["a"]), ": is []; write a", ": is none of a"),
    ("64", lambda v: v.converted(parse_bytes), "has no unit; write one of the units", ""),
    (5, lambda v: v.address(), ": is 5; write an address", ": is no address"),
    ("fe80::1%x", lambda v: v.address(), ": is 'fe80::1%x'; write an address", ": is no address"),
    ("fe80::1", lambda v: v.ipv4_address(), "; write an IPv4 address", ": is no IPv4 address"),
    (5, lambda v: v.network(), ": is 5; write a network such as", ": is no network"),
    ("fe80::%x/64", lambda v: v.network(), "; write a network", ": is no network"),
    ("10.0.0.1/8", lambda v: v.network(), "; write a network", ": is no network"),
    ("::/64", lambda v: v.ipv4_network(), "; write an IPv4 network", ": is no IPv4 network"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "access", "says", "unquoted"), WRONG)
def test_what_is_wrong_is_named(raw: Any, access: Access, says: str, unquoted: str) -> None:
    with pytest.raises(HostSetupError) as caught:
        access(value(raw))
    assert str(caught.value).startswith("config")
    assert says in str(caught.value)
    with pytest.raises(HostSetupError) as caught:
        access(value(raw, quote=False))
    assert unquoted in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda raw: raw, lambda raw: [raw], lambda raw: {raw: raw}])
@pytest.mark.parametrize(
    "access", [case[1] for case in WRONG if "converted" not in case[1].__code__.co_names]
)
def test_nothing_of_what_is_there_is_quoted_unless_wanted(wrap: Any, access: Access) -> None:
    try:
        access(value(wrap("HOSTILE"), quote=False))
    except HostSetupError as problem:
        assert "HOSTILE" not in str(problem)


def test_long_values_are_cut_and_options_are_listed() -> None:
    assert show("x" * 100) == "'" + "x" * 56 + "..."
    assert one_of(["a"]) == "a"
    assert one_of(["a", "b"]) == "a or b"
