"""Takes plain data (from JSON, YAML or Ansible) apart, and names every mistake by its place.

A :class:`Value` is a piece of data and where it stands. Its accessors give it as what it must be, or
raise the caller's error with subject (the place, as ``stages[0].constraints.cpus``), what is wrong, and
the remedy:

    fields = Value(data, "job", InvalidJobError, prefix="").fields(required=("stages",))
    for stage in fields["stages"].list(least=1):
        name = stage.fields(required=("name",))["name"].text(most=64)

Data of someone who may be hostile can be taken apart with ``quote=False``: no error has any of it then,
except for the keys of :meth:`Value.entries` (they are places) and what a converter says.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MakeError = Callable[[str, str, str], Exception]
"""(subject, what is wrong, remedy) -> what is raised; for example a class of :mod:`cellblock.errors`."""
_MAX_SHOWN = 60


class Value:
    """A piece of data at a place; ``raw`` is the data, of which nothing is known yet."""

    __slots__ = ("_at", "_error", "_quote", "_within", "raw")

    def __init__(
        self,
        raw: Any,
        subject: str,
        error: MakeError,
        *,
        prefix: str | None = None,
        quote: bool = True,
    ) -> None:
        """The whole. ``prefix``: what the places within it begin with, unless it is ``subject``.
        ``quote``: whether errors may show what is there."""
        self.raw = raw
        self._at: str | int = subject
        self._within: Value | str = subject if prefix is None else prefix
        self._error = error
        self._quote = quote

    @property
    def path(self) -> str:
        """Where it stands. Put together only when asked: most values have nothing wrong."""
        if isinstance(self._within, str):
            return str(self._at)
        around = self._within._prefix
        if isinstance(self._at, int):
            return f"{around}[{self._at}]"
        # "file.json: field", but "field.part".
        return (
            f"{around}.{self._at}" if around and not around.endswith(" ") else f"{around}{self._at}"
        )

    @property
    def _prefix(self) -> str:
        return self._within if isinstance(self._within, str) else self.path

    def within(self, at: str | int, raw: Any) -> Value:
        """``raw`` as the part of this value that is called ``at``."""
        part = type(self).__new__(type(self))
        part.raw, part._at, part._within = raw, at, self
        part._error, part._quote = self._error, self._quote
        return part

    def instead(self, raw: Any) -> Value:
        """``raw`` in the place of this value: the key of a mapping, or a part of what is there."""
        other = type(self).__new__(type(self))
        other.raw, other._at, other._within = raw, self._at, self._within
        other._error, other._quote = self._error, self._quote
        return other

    # --- Errors: made here, raised by whoever asked ---

    def error(self, message: str, remedy: str) -> Exception:
        """The caller's error about this value."""
        return self._error(self.path, message, remedy)

    def wrong(self, what: str, remedy: str | None = None) -> Exception:
        """It is not ``what`` ("a port"), which its error says to write, unless by ``remedy``."""
        if self._quote:
            return self.error(f"is {show(self.raw)}", remedy or f"write {what}")
        return self.error(f"is no {_without_article(what)}", remedy or f"write {what}")

    def unknown(self, name: str, known: Sequence[str]) -> Exception:
        """It has a field ``name``, which is none of ``known``."""
        remedy = f"the fields here are {', '.join(known)}"
        if not self._quote:
            return self.error("has an unknown field", remedy)
        return self.within(name, None).error("is not a known field", remedy)

    def _not(self, what: str, remedy: str | None) -> Exception:
        """It is of another type than ``what``."""
        if self._quote:
            return self.error(f"is {show(self.raw)}, not {what}", remedy or f"write {what}")
        return self.wrong(what, remedy)

    # --- What is made of parts ---

    def fields(
        self,
        required: Sequence[str] = (),
        optional: Mapping[str, Any] | None = None,
        *,
        others: bool = False,
        remedy: str | None = None,
    ) -> dict[str, Value]:
        """The fields of a mapping by name; an absent one of ``optional`` has its value there.

        Fields besides these are refused, or with ``others`` not looked at.
        """
        defaults = optional or {}
        known = (*required, *defaults)
        if not isinstance(self.raw, Mapping):
            raise self._not("a mapping", remedy or f"write the fields {', '.join(known)}")
        if not others:
            for name in self.raw:
                if name not in known:
                    raise self.unknown(str(name), known)
        for name in required:
            if name not in self.raw:
                raise self.within(name, None).error("is missing", "add it")
        return {name: self.within(name, self.raw.get(name, defaults.get(name))) for name in known}

    def entries(
        self, *, what: str = "a mapping", most: int | None = None, remedy: str | None = None
    ) -> dict[str, Value]:
        """The parts of a mapping whose keys are anybody's, by key."""
        if not isinstance(self.raw, Mapping):
            raise self._not(what, remedy)
        self._refuse_more_than(most, "entries")
        parts: dict[str, Value] = {}
        for key, raw in self.raw.items():
            part = self.within(str(key), raw)
            if not isinstance(key, str):
                raise part.error("has a name that is not text", "quote it")
            parts[key] = part
        return parts

    def list(
        self,
        *,
        least: int = 0,
        most: int | None = None,
        what: str | None = None,
        remedy: str | None = None,
    ) -> list[Value]:
        """The parts of a list, at least ``least``. ``what`` and ``remedy`` say what it should be."""
        name = what or ("a list of one or more" if least else "a list")
        if not isinstance(self.raw, list) or len(self.raw) < least:
            raise self._not(name, remedy)
        if what is not None and most is not None and len(self.raw) > most:
            raise self._not(name, remedy)
        self._refuse_more_than(most, "entries")
        return [self.within(number, raw) for number, raw in enumerate(self.raw)]

    def or_none(self) -> Value | None:
        """None for a null."""
        return None if self.raw is None else self

    # --- What is not ---

    def text(self, *, most: int | None = None, remedy: str = "quote it") -> str:
        """Text of at most ``most`` characters."""
        if not isinstance(self.raw, str):
            raise self._not("text", remedy)
        self._refuse_more_than(most, "characters")
        return self.raw

    def matching(self, pattern: re.Pattern[str], what: str, remedy: str | None = None) -> str:
        """Text that ``pattern`` matches as a whole."""
        if not isinstance(self.raw, str) or not pattern.fullmatch(self.raw):
            raise self.wrong(what, remedy)
        return self.raw

    def integer(self, least: int, most: int, remedy: str | None = None) -> int:
        """A whole number from ``least`` to ``most``."""
        # True is an int to Python.
        if (
            not isinstance(self.raw, int)
            or isinstance(self.raw, bool)
            or not least <= self.raw <= most
        ):
            raise self.wrong(f"a number from {least} to {most}", remedy)
        return self.raw

    def boolean(self) -> bool:
        if not isinstance(self.raw, bool):
            message = f"is {show(self.raw)}" if self._quote else "is neither true nor false"
            raise self.error(message, "write true or false")
        return self.raw

    def choice(self, options: Sequence[str], remedy: str | None = None) -> str:
        """One of ``options``."""
        if not isinstance(self.raw, str) or self.raw not in options:
            message = f"is {show(self.raw)}" if self._quote else f"is none of {', '.join(options)}"
            raise self.error(message, remedy or f"write {one_of(options)}")
        return str(self.raw)

    def converted(self, convert: Callable[[Any], T], remedy: str | None = None) -> T:
        """What ``convert`` makes of it, whose ValueError has "what is wrong; the remedy"."""
        try:
            return convert(self.raw)
        except ValueError as problem:
            message, _, advice = str(problem).partition("; ")
            raise self.error(message, remedy or advice) from None

    def address(self, remedy: str | None = None) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """An IP address, without a zone: in fe80::1%eth0 that is an interface of one host, and may
        be any text."""
        return self._ip(ipaddress.ip_address, "an address", remedy)

    def ipv4_address(self, remedy: str | None = None) -> ipaddress.IPv4Address:
        return self._ip(ipaddress.IPv4Address, "an IPv4 address", remedy)

    def network(self, remedy: str | None = None) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """An IP network without bits of a host in it, and without a zone."""
        return self._ip(ipaddress.ip_network, "a network such as 192.0.2.0/24", remedy)

    def ipv4_network(self, remedy: str | None = None) -> ipaddress.IPv4Network:
        return self._ip(ipaddress.IPv4Network, "an IPv4 network such as 192.0.2.0/24", remedy)

    def _ip(self, convert: Callable[[str], T], what: str, remedy: str | None) -> T:
        if isinstance(self.raw, str) and "%" not in self.raw:
            try:
                return convert(self.raw)
            except ValueError:
                pass
        raise self.wrong(what, remedy)

    def _refuse_more_than(self, most: int | None, of_what: str) -> None:
        if most is not None and len(self.raw) > most:
            raise self.error(
                f"has {len(self.raw)} {of_what}, at most {most} are taken", "write fewer"
            )


def show(raw: object) -> str:
    """``raw`` for an error, cut where it is long."""
    shown = repr(raw)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."


def one_of(options: Sequence[str]) -> str:
    """``a, b or c``."""
    *others, last = options
    return f"{', '.join(others)} or {last}" if others else last


def _without_article(what: str) -> str:
    return what.removeprefix("a ").removeprefix("an ")
