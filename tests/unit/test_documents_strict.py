"""YAML and JSON as people write them: what is ambiguous is refused, with its place."""

from __future__ import annotations

from typing import Any

import pytest

from cellblock.engine.documents import ambiguities, parse_document
from cellblock.errors import JobFileError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 10", {"a": 10}),
        ("a: -3\nb: +4\nc: 0", {"a": -3, "b": 4, "c": 0}),
        ("a: 1.5\nb: .5\nc: 1.0e+3", {"a": 1.5, "b": 0.5, "c": 1000.0}),
        (
            "a: true\nb: False\nc: null\nd: ~\ne:",
            {"a": True, "b": False, "c": None, "d": None, "e": None},
        ),
        ("a: '1:30'\nb: \"010\"\nc: 'no'", {"a": "1:30", "b": "010", "c": "no"}),
        ("a: 2s\nb: 64MiB\nc: g++\nd: yess", {"a": "2s", "b": "64MiB", "c": "g++", "d": "yess"}),
        ("a: |\n  010\n  no\n", {"a": "010\nno\n"}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ('{"a": {"b": 1}, "c": {"b": 2}}', {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_what_is_plain(text: str, value: Any) -> None:
    assert parse_document(text, "x") == value


@pytest.mark.parametrize(
    "scalar",
    "1:30 22:22 010 0x1F 0b11 1_0 1_000.5 .inf .nan yes No on OFF 2026-11-30 190:20:30.15".split(),
)
def test_what_readers_of_yaml_disagree_about(scalar: str) -> None:
    with pytest.raises(JobFileError) as caught:
        parse_document(f"stages:\n  - {{a: {scalar}}}\n", "job.yml")
    assert caught.value.subject == "job.yml"
    assert caught.value.message.startswith(f"line 2, column 9: {scalar!r} means different things")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: 'a' is there twice"),
        ("a: {b: 1, 'b': 2}", "line 1, column 11: 'b' is there twice"),
        ('{"a": 1,\n "a": 2}', "line 2, column 2: 'a' is there twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "line 1, column 17: 'a' is there twice"),
        ("a: &x {c: 1}\nb: {<<: *x}", "line 2, column 5: merges another mapping"),
    ],
)
def test_keys_that_are_there_twice(text: str, place: str) -> None:
    with pytest.raises(JobFileError) as caught:
        parse_document(text, "job.yml")
    assert caught.value.message == place


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("ours: {ports: [22:22, 80]}\n", ["line 1, column 16: '22:22'"]),
        ("theirs: [22:22, 010, yes]\n", []),
        ("theirs: &x {port: 010}\nours:\n  <<: *x\n  a: b\n", ["line 1, column 19: '010'"]),
        ("ours: [&x {a: 1_0}, *x]", ["line 1, column 15: '1_0'"]),
        ("ours: &x [*x]", []),
        (
            "all: {hosts: {a: {ours: no}}, vars: {ours: no}}",
            ["line 1, column 25", "line 1, column 44"],
        ),
        ("ours: {22:22: a}", ["line 1, column 8: '22:22'"]),
        ("ours: 1\ntheirs: 2\nours: 3\n", ["line 3, column 1: 'ours' is there twice"]),
        ("theirs: {a: 1, a: 2}", ["line 1, column 16: 'a' is there twice"]),
        ("ours: !vault |\n  010\nother: !unsafe 010\n", []),
        ("ours: {a: '010', b: \"{{ x }}\", c: ::1, d: true, e:}", []),
        ('{"ours": 10, "theirs": "010"}', []),
        ("ours: [", []),
        ("", []),
    ],
)
def test_variables_that_somebody_else_parses(text: str, places: list[str]) -> None:
    found = ambiguities(text, {"ours"})
    assert [sentence.startswith(place) for sentence, place in zip(found, places, strict=True)] == [
        True
    ] * len(places), found
