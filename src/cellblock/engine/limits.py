"""The limits of a stage: one table that types, parsing, maxima and documentation derive from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from .. import units
from ..errors import InvalidJobError, LimitAboveMaximumError
from ..units import Bytes, Count, Cpus, Milliseconds
from ..validate import Value

MIB = 2**20


@dataclass(frozen=True)
class LimitInfo:
    """What the documentation says of a limit. ``maximum`` is the host's default maximum."""

    unit: str
    default: int | float
    maximum: int | float
    minimum: int | float
    enforced_by: str
    evidence: str
    help: str


@dataclass(frozen=True)
class _UnitKind:
    name: str
    parse: Callable[[object], int | float]


_KINDS: dict[object, _UnitKind] = {
    Milliseconds: _UnitKind("milliseconds", units.parse_milliseconds),
    Bytes: _UnitKind("bytes", units.parse_bytes),
    Count: _UnitKind("count", units.parse_count),
    Cpus: _UnitKind("CPUs", units.parse_cpus),
}


def _limit(
    default: int | float,
    *,
    maximum: int | float,
    minimum: int | float = 1,
    enforced_by: str,
    evidence: str,
    help: str,
) -> Any:
    return field(
        default=default,
        metadata={
            "maximum": maximum,
            "minimum": minimum,
            "enforced_by": enforced_by,
            "evidence": evidence,
            "help": help,
        },
    )


@dataclass(frozen=True)
class StageConstraints:
    """The limits of one stage, every one enforced; the values are what the stage gets."""

    wall_time_ms: Milliseconds = _limit(
        10_000,
        maximum=120_000,
        enforced_by="supervisor's monotonic clock",
        evidence="supervisor's clock",
        help="Time from the start of the program to its end.",
    )
    cpu_time_ms: Milliseconds = _limit(
        5_000,
        maximum=120_000,
        enforced_by="cgroup CPU accounting, read by the supervisor; RLIMIT_CPU behind it",
        evidence="cgroup CPU usage",
        help="CPU time of all processes of the stage together, user and system.",
    )
    memory_bytes: Bytes = _limit(
        256 * MIB,
        maximum=2048 * MIB,
        minimum=4 * MIB,
        enforced_by="cgroup memory limit, swap included",
        evidence="OOM kills counted by the cgroup",
        help="Memory of all processes together: their own, the kernel's for them, page cache, scratch.",
    )
    processes: Count = _limit(
        64,
        maximum=1024,
        enforced_by="cgroup pids limit",
        evidence="forks refused, counted by the cgroup",
        help="Processes and threads at one time.",
    )
    stack_bytes: Bytes = _limit(
        8 * MIB,
        maximum=1024 * MIB,
        minimum=64 * 1024,
        enforced_by="RLIMIT_STACK",
        evidence="none: the program sees SIGSEGV",
        help="Stack of the main thread of each process.",
    )
    file_size_bytes: Bytes = _limit(
        16 * MIB,
        maximum=1024 * MIB,
        minimum=0,
        enforced_by="RLIMIT_FSIZE",
        evidence="SIGXFSZ that ends the program itself; none where it ends a child or is ignored",
        help="Size of any one file that the stage writes. The kernel refuses what is beyond with SIGXFSZ, "
        "or EFBIG where that is ignored, as by Python; it counts neither, so that a stage whose child met the "
        'limit has no violation, and a message such as gcc\'s "internal compiler error".',
    )
    scratch_bytes: Bytes = _limit(
        64 * MIB,
        maximum=1024 * MIB,
        minimum=64 * 1024,
        enforced_by="tmpfs size",
        evidence="none: the program sees ENOSPC",
        help="Everything in /work and /tmp together. Counts in memory_bytes too.",
    )
    scratch_files: Count = _limit(
        4096,
        maximum=65_536,
        minimum=16,
        enforced_by="tmpfs inode limit",
        evidence="none: the program sees ENOSPC",
        help="Files and directories in /work and /tmp together.",
    )
    open_files: Count = _limit(
        256,
        maximum=4096,
        minimum=4,
        enforced_by="RLIMIT_NOFILE",
        evidence="none: the program sees EMFILE",
        help="Open file descriptors of each process.",
    )
    stdout_bytes: Bytes = _limit(
        MIB,
        maximum=16 * MIB,
        minimum=0,
        enforced_by="supervisor's byte counter on the pipe",
        evidence="byte counter",
        help="What the stage may write to standard output; it is ended at the first byte beyond.",
    )
    stderr_bytes: Bytes = _limit(
        MIB,
        maximum=16 * MIB,
        minimum=0,
        enforced_by="supervisor's byte counter on the pipe",
        evidence="byte counter",
        help="What the stage may write to standard error; it is ended at the first byte beyond.",
    )
    network_bytes: Bytes = _limit(
        256 * MIB,
        maximum=16 * 1024 * MIB,
        minimum=0,
        enforced_by="nftables quota in the job's network slot",
        evidence="packets that the quota refused",
        help="Bytes received and sent together, as IP packets; the stage is ended beyond.",
    )
    network_bytes_per_second: Bytes = _limit(
        16 * MIB,
        maximum=1024 * MIB,
        minimum=1024,
        enforced_by="nftables limit in the job's network slot, with one second's worth of burst",
        evidence="none: transfers are slower",
        help="Bandwidth in each direction.",
    )
    network_connections: Count = _limit(
        64,
        maximum=4096,
        minimum=0,
        enforced_by="connection count in the job's network slot",
        evidence="connections refused, counted by the slot's filter",
        help="Connections at one time, and UDP exchanges of the last 30 seconds or so.",
    )
    network_connections_per_second: Count = _limit(
        64,
        maximum=256,
        minimum=1,
        enforced_by="nftables limit in the job's network slot, with one second's worth of burst",
        evidence="none: connections are opened later",
        help="New connections. What ends stays for minutes in the tables of those it went to.",
    )
    cpus: Cpus = _limit(
        1.0,
        maximum=4.0,
        minimum=0.01,
        enforced_by="cgroup CPU bandwidth",
        evidence="none: the stage runs slower",
        help="CPUs' worth of time per second of wall time.",
    )

    @classmethod
    def parse(cls, data: object, where: str) -> StageConstraints:
        """Constraints from a mapping; fields left out take their defaults.

        Raises :class:`InvalidJobError` that names the field below ``where``.
        """
        return cls.of(Value(data, where, InvalidJobError))

    @classmethod
    def of(cls, value: Value) -> StageConstraints:
        """As :meth:`parse`, with the errors of ``value``."""
        values = _quantities(value)
        memory = values.get("memory_bytes", LIMITS["memory_bytes"].default)
        if (
            values.setdefault("scratch_bytes", min(memory, LIMITS["scratch_bytes"].default))
            > memory
        ):
            raise value.within("scratch_bytes", None).error(
                f"is {values['scratch_bytes']}, more than memory_bytes ({memory}), in which it counts",
                "raise memory_bytes or lower scratch_bytes",
            )
        return cls(**values)

    def within(
        self, maxima: Mapping[str, int | float], chosen: Collection[str], where: str
    ) -> StageConstraints:
        """What the stage gets on a host with these ``maxima``: a default above its maximum follows it.

        Raises :class:`LimitAboveMaximumError` naming every limit of those that the job chose and that is above.
        """
        lowered: dict[str, Any] = {
            name: maxima[name]
            for name in LIMITS
            if name not in chosen and getattr(self, name) > maxima[name]
        }
        fitting = dataclasses.replace(self, **lowered)
        if "scratch_bytes" not in chosen and fitting.scratch_bytes > fitting.memory_bytes:
            fitting = dataclasses.replace(fitting, scratch_bytes=fitting.memory_bytes)
        fitting._refuse_above(maxima, where)
        return fitting

    def _refuse_above(self, maxima: Mapping[str, int | float], where: str) -> None:
        above = [
            f"{name} is {getattr(self, name)}, the maximum is {maxima[name]} {LIMITS[name].unit}"
            for name in LIMITS
            if getattr(self, name) > maxima[name]
        ]
        if above:
            raise LimitAboveMaximumError(
                where,
                " and ".join(above),
                "ask for less, or raise worker_slave_maxima for this host",
            )

    def as_dict(self) -> dict[str, int | float]:
        """Every limit as applied, in the unit of its name."""
        return dataclasses.asdict(self)


def _kinds() -> dict[str, _UnitKind]:
    hints = get_type_hints(StageConstraints)
    return {f.name: _KINDS[hints[f.name]] for f in dataclasses.fields(StageConstraints)}


_PARSERS = {name: kind.parse for name, kind in _kinds().items()}

LIMITS: dict[str, LimitInfo] = {
    f.name: LimitInfo(
        unit=_kinds()[f.name].name, default=getattr(StageConstraints(), f.name), **f.metadata
    )
    for f in dataclasses.fields(StageConstraints)
}
"""Every limit by name, in documentation order."""

DEFAULT_MAXIMA: dict[str, int | float] = {name: info.maximum for name, info in LIMITS.items()}


def parse_maxima(value: Value) -> dict[str, int | float]:
    """A host's maxima: the defaults, overridden by ``value`` (limit name -> quantity)."""
    return {**DEFAULT_MAXIMA, **_quantities(value)}


def _quantities(value: Value) -> dict[str, Any]:
    """The limits that are named, in the unit of their names."""
    quantities: dict[str, Any] = {}
    for name, entry in value.entries(
        remedy="write limits as name: value, for example cpu_time_ms: 2s"
    ).items():
        if name not in LIMITS:
            raise entry.error("is not a limit", _suggest_limit(name))
        quantity = entry.converted(_PARSERS[name])
        least = LIMITS[name].minimum
        if quantity < least:
            raise entry.error(
                f"is {quantity} {LIMITS[name].unit}, too little for any program",
                f"write at least {least}",
            )
        quantities[name] = quantity
    return quantities


def _suggest_limit(name: str) -> str:
    stem = name.lower()
    close = [known for known in LIMITS if known.startswith(stem) or stem in known]
    if close:
        return f"write {' or '.join(close)} (the unit is part of the name)"
    return f"the limits are {', '.join(LIMITS)}"
