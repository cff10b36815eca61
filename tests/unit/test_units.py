"""Quantities: what people write, what it means, and what is refused."""

from __future__ import annotations

import pytest

from cellblock import units


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0, 0),
        (1024, 1024),
        ("1B", 1),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("256MiB", 268_435_456),
        ("10MB", 10_000_000),
        ("1.5GiB", 1_610_612_736),
        (" 2 MiB ", 2_097_152),
    ],
)
def test_bytes(written: object, meant: int) -> None:
    assert units.parse_bytes(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [(250, 250), ("250ms", 250), ("2s", 2000), ("1.5s", 1500), ("2min", 120_000)],
)
def test_milliseconds(written: object, meant: int) -> None:
    assert units.parse_milliseconds(written) == meant


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("256", "no unit"),
        ("256M", "unit 'M'"),
        ("256KB", "unit 'KB'"),
        ("256mib", "unit 'mib'"),
        ("1e3MiB", "not a quantity"),
        ("-1MiB", "not a quantity"),
        ("", "not a quantity"),
        ("٣MiB", "not a quantity"),
        (-1, "negative"),
        (True, "not a quantity"),
        (1.5, "not a quantity"),
        (None, "not a quantity"),
        ([], "not a quantity"),
        ("0.3B", "whole number"),
    ],
)
def test_ambiguous_bytes_are_refused(written: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        units.parse_bytes(written)


@pytest.mark.parametrize("written", ["2", "2m", "2 sec", "0.1ms"])
def test_ambiguous_times_are_refused(written: str) -> None:
    with pytest.raises(ValueError):
        units.parse_milliseconds(written)


@pytest.mark.parametrize("written", ["3", 3.0, True, None, -1])
def test_counts_are_integers(written: object) -> None:
    with pytest.raises(ValueError):
        units.parse_count(written)


@pytest.mark.parametrize(("written", "meant"), [(1, 1.0), (0.5, 0.5), (2.25, 2.25)])
def test_cpus(written: object, meant: float) -> None:
    assert units.parse_cpus(written) == meant


@pytest.mark.parametrize("written", [0, 0.001, 0.555, float("nan"), float("inf"), "1", True])
def test_cpus_refused(written: object) -> None:
    with pytest.raises(ValueError):
        units.parse_cpus(written)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**31, "2.0 GiB")],
)
def test_format_bytes(value: int, shown: str) -> None:
    assert units.format_bytes(value) == shown
