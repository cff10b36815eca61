"""Quantities with units, as people write them: ``256MiB``, ``2s``.

Every limit of Cellblock carries its unit in its name (``memory_bytes``, ``wall_time_ms``), so a bare
integer is taken in that unit. Text must name a unit; units whose meaning people disagree about
(``K``, ``M``, ``m``, ``KB``) are refused rather than guessed.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NewType

Milliseconds = NewType("Milliseconds", int)
Bytes = NewType("Bytes", int)
Count = NewType("Count", int)
Cpus = NewType("Cpus", float)

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
TIME_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000}

MAX_QUANTITY = 2**63 - 1
"""No limit of any kernel is larger; and arithmetic on longer numbers is slow enough to be an attack."""
_MAX_TEXT = 32
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


def _parse(value: object, units: dict[str, int], base: str) -> int:
    """``value`` in base units; raises ValueError with a message that says what to write."""
    names = ", ".join(units)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(
            f"is {value!r}, not a quantity; write an integer in {base} or text with one of the units "
            f"{names}"
        )
    if isinstance(value, int):
        _check_range(value)
        return value
    if len(value) > _MAX_TEXT:
        raise ValueError(f"is longer than {_MAX_TEXT} characters; write a shorter quantity")
    match = _QUANTITY.fullmatch(value.strip())
    if match is None:
        raise ValueError(
            f"is {value!r}, not a quantity; write a number and one of the units {names}"
        )
    number, unit = match.groups()
    if unit not in units:
        problem = f"has the unit {unit!r}" if unit else "has no unit"
        raise ValueError(f"is {value!r}, which {problem}; write one of the units {names}")
    exact = Decimal(number) * units[unit]
    if exact != exact.to_integral_value():
        raise ValueError(f"is {value!r}, which is not a whole number of {base}; round it")
    _check_range(int(exact))
    return int(exact)


def _check_range(value: int) -> None:
    if value < 0:
        raise ValueError(f"is {value}, which is negative; write 0 or more")
    if value > MAX_QUANTITY:
        raise ValueError("is larger than 2^63 - 1; write less")


def parse_bytes(value: object) -> Bytes:
    """Bytes from an integer (bytes) or text such as ``256MiB`` or ``10MB``; else ValueError."""
    return Bytes(_parse(value, BYTE_UNITS, "bytes"))


def parse_milliseconds(value: object) -> Milliseconds:
    """Milliseconds from an integer (ms) or text such as ``1.5s`` or ``2min``; else ValueError."""
    return Milliseconds(_parse(value, TIME_UNITS_MS, "milliseconds"))


def parse_count(value: object) -> Count:
    """A whole number of things, written as an integer; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is {value!r}, not a count; write an integer")
    _check_range(value)
    return Count(value)


def parse_cpus(value: object) -> Cpus:
    """A number of CPUs, whole or in hundredths (``0.5``); else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"is {value!r}, not a number of CPUs; write for example 1 or 0.5")
    if not 0.01 <= value <= 4096 or round(value, 2) != value:
        raise ValueError(f"is {value!r}; write between 0.01 and 4096 CPUs, in steps of 0.01")
    return Cpus(float(value))


def format_bytes(value: int) -> str:
    """For people: the largest binary unit that keeps it short, e.g. ``1.4 MiB``."""
    if value < 2**10:
        return f"{value} B"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    raise AssertionError(value)
