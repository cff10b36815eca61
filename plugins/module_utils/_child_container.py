# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""The experiment with child containers: who asks whom, under which rules, and what is expected.

Plain data: what touches the host is in :mod:`_child_container_lab`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

RUNTIMES = ("runc", "userns", "sysbox-runc")

# --- Who is there ---------------------------------------------------------------------------------

# Who asks: the worker itself, and three of its child containers, by the network that each has.
SENDERS = ("worker", "child_default_bridge", "child_user_network", "child_workers_network")
# Those that have the worker's own network namespace.
IN_WORKERS_NAMESPACE = frozenset({"worker", "child_workers_network"})

# The networks of the experiment: two bridges of the engine, and the segment on which other hosts are.
FRONT, BACK, WIRE = "cbx-front", "cbx-back", "cbx-wire"
NETWORKS = {FRONT: "10.77.1", BACK: "10.77.2", WIRE: "10.77.0"}
# WORKER is what the engine gives it, OTHER what it takes itself.
SLAVE, WORKER, OTHER = 21, 50, 51


@dataclass(frozen=True)
class Target:
    """A host that serves on a port."""

    name: str
    number: int
    port: int


CACHE = Target("cache_server", 14, 3142)
METADATA = Target("metadata", 0, 80)
METADATA_ADDRESS = "169.254.169.254"
TARGETS = (
    CACHE,
    Target("request_handler", 11, 8443),
    Target("database", 12, 5432),
    Target("memory_database", 13, 6379),
    Target("master_other_port", 15, 9999),
    Target("other_slave", 22, 22),
    METADATA,
)
# Where an engine that nobody told of other networks puts its first one, and more addresses of the cache server there:
# one that nobody has in that network, and that of the network's gateway, which is the worker itself.
HIDING_NETWORK, HIDDEN_ADDRESSES = "172.18.0.0/16", ("172.18.0.14", "172.18.0.1")
NAMES_PORT = 53
# The cache server's: with a dot, and without.
NAME, BARE_NAME = "cache.cellblock.internal", "cache"


def link_local(number: int) -> str:
    """The IPv6 address on FRONT, of which no network's setting knows."""
    return f"fe80::{number}"


def address(target: Target, network: str) -> str:
    return METADATA_ADDRESS if target is METADATA else f"{NETWORKS[network]}.{target.number}"


# --- What is tried --------------------------------------------------------------------------------

REACHED, DENIED = "reached", "denied"
# What a denial is proven by. DROPPED: it arrived on the slave, and a rule there counted it. STAYED: it did not
# arrive, so nothing on the slave can have denied it. NAMELESS: there is no address for the name.
DROPPED, STAYED, NAMELESS = "dropped", "stayed", "nameless"
# Settings of the engine within: what it takes by itself, or what the role worker_container gives it.
UNTOLD, TOLD = "as it comes", "as the role sets it"


@dataclass(frozen=True)
class Request:
    """What a sender asks for in a step. ``host`` is an address or a name."""

    target: Target
    host: str
    expected: str
    evidence: str = ""

    @property
    def address(self) -> str:
        """The names are those of the address on the bridge of both."""
        if self.host in (NAME, BARE_NAME):
            return address(self.target, FRONT)
        return self.host.partition("%")[0]


@dataclass(frozen=True)
class Step:
    """One arrangement, in which every sender asks every target."""

    name: str
    topology: str
    inner_engine: str = TOLD
    filter: str = "none"
    bridge_nf: int = 0

    def requests(self, sender: str) -> list[Request]:
        return list(_requests(self, sender))


# The worker's root gives it another address of the network: it may, and so may the root of any container of its own.
FORGED = "same bridge, under another address"
# It may turn IPv6 on as well, where the network has none.
LINK_LOCAL = "same bridge, IPv6 link-local"
BY_ADDRESS = "slave bridge forward, by address"
STEPS = (
    Step("false denial", "other host", UNTOLD),
    Step("names, engine's resolver", "same bridge, by name", UNTOLD),
    Step("no false denial", "other host"),
    Step("names, cache server's resolver", "same bridge, by name"),
    Step("same bridge", "same bridge"),
    Step("slave's forward chain, bridges not filtered", "same bridge", filter="slave inet forward"),
    Step("slave's forward chain, bridges filtered", "same bridge", filter="slave inet forward", bridge_nf=1),
    Step("slave's bridge table", "same bridge", filter="slave bridge forward"),
    Step("another address, table by address", FORGED, filter=BY_ADDRESS),
    Step("another address, table by port", FORGED, filter="slave bridge forward"),
    Step("IPv6, slave's forward chain", LINK_LOCAL, filter="slave inet forward", bridge_nf=1),
    Step("IPv6, slave's bridge table", LINK_LOCAL, filter="slave bridge forward"),
    Step("engine's isolation", "other bridge", filter="engine's isolation"),
    Step("engine's isolation lifted", "other bridge", filter="DOCKER-USER lets through"),
    Step("other host", "other host"),
    Step("worker's output chain", "other host", filter="worker inet output"),
    Step("slave's forward chain", "other host", filter="slave inet forward"),
    Step("several networks", "several networks"),
    Step("several networks, slave's bridge table", "several networks", filter="slave bridge forward"),
)  # fmt: skip


def _requests(step: Step, sender: str) -> Iterator[Request]:
    if step.name in ("false denial", "no false denial"):
        hidden = step.inner_engine == UNTOLD
        # Beside it the same server at an address that nothing hides: it and the way to it are fine.
        yield Request(CACHE, address(CACHE, WIRE), REACHED)
        for host in HIDDEN_ADDRESSES:
            yield (
                Request(CACHE, host, DENIED, STAYED) if hidden else Request(CACHE, host, REACHED)
            )
    elif step.topology == "same bridge, by name":
        told, own = step.inner_engine == TOLD, sender in IN_WORKERS_NAMESPACE
        # The engine within has a resolver of its own for its user networks. It asks further for NAME alone, and
        # the outer engine's where it was not told of another.
        for name, known in (
            (NAME, own or told or sender == "child_user_network"),
            (BARE_NAME, own or (told and sender == "child_default_bridge")),
        ):
            yield Request(CACHE, name, REACHED if known else DENIED, "" if known else NAMELESS)
        yield Request(CACHE, address(CACHE, FRONT), REACHED)
    elif step.topology == LINK_LOCAL:
        # Children on inner bridges have no IPv6, and no interface on that bridge.
        for target in TARGETS if sender in IN_WORKERS_NAMESPACE else ():
            if target is not METADATA:
                host = f"{link_local(target.number)}%eth0"
                yield Request(target, host, *_expected(step, sender, target))
    else:
        for target, host in _hosts(step.topology):
            yield Request(target, host, *_expected(step, sender, target))


def _hosts(topology: str) -> Iterator[tuple[Target, str]]:
    networks = {
        "same bridge": (FRONT,),
        FORGED: (FRONT,),
        "other bridge": (BACK,),
        "other host": (WIRE,),
        "several networks": (FRONT, BACK),
    }[topology]
    for network in networks:
        for target in TARGETS:
            # On a bridge nobody has the metadata address: it is always beyond the slave.
            if target is not METADATA or network == WIRE:
                yield target, address(target, network)


def _expected(step: Step, sender: str, target: Target) -> tuple[str, str]:
    """(what is expected, by what a denial is proven)."""
    if step.filter == "engine's isolation":
        return DENIED, DROPPED
    if step.topology == LINK_LOCAL:
        # Nothing is let through by IPv6, and what filters bridges for IPv4 does not for IPv6.
        return (REACHED, "") if step.bridge_nf else (DENIED, DROPPED)
    if target is CACHE or step.filter in ("none", "DOCKER-USER lets through", BY_ADDRESS):
        return REACHED, ""
    if step.filter == "worker inet output":
        return (DENIED, STAYED) if sender in IN_WORKERS_NAMESPACE else (REACHED, "")
    if (
        step.filter == "slave inet forward"
        and step.topology == "same bridge"
        and not step.bridge_nf
    ):
        return REACHED, ""
    return DENIED, DROPPED


# --- Rules ----------------------------------------------------------------------------------------

# Attempts alone are counted: the end of a connection may come when the next sender's turn has begun.
_NEIGHBOURS = (
    "ether type arp accept\nicmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
)
_OPENING = "tcp flags & (syn | ack) == syn"


def _matches() -> Iterator[tuple[str, str]]:
    """(address, what matches attempts for it) of every target."""
    hosts = {host for topology in ("same bridge", "other bridge", "other host") for _, host in _hosts(topology)}  # fmt: skip
    for host in sorted(hosts):
        yield host, f"ip daddr {host} {_OPENING}"
    for target in TARGETS:
        if target is not METADATA:
            host = link_local(target.number)
            yield host, f"ip6 daddr {host} {_OPENING}"


def counting_rules() -> str:
    """Counts the attempts that arrive on the slave for each target, at whatever bridge; decides nothing."""
    hidden = [(host, f"ip daddr {host} {_OPENING}") for host in HIDDEN_ADDRESSES]
    rules = "\n".join(f'{match} counter comment "{host}"' for host, match in [*_matches(), *hidden])
    return f"table bridge arrived {{ chain c {{ type filter hook prerouting priority -400; policy accept;\n{rules}\n}}\n}}\n"


def filter_rules(name: str, ports: Sequence[str]) -> str:
    """A filter that lets the worker reach the cache server alone, and counts the attempts that it drops.

    ``ports``: the worker's interfaces on the slave, that is ports of bridges.
    """
    caches = ", ".join([*(address(CACHE, network) for network in NETWORKS), *HIDDEN_ADDRESSES])
    let_through = (
        f"ip daddr {{ {caches} }} tcp dport {{ {CACHE.port}, {NAMES_PORT} }} accept\n"
        f"ip daddr {{ {caches} }} udp dport {NAMES_PORT} accept\n"
    )
    drop = "\n".join(f'{match} counter drop comment "{host}"' for host, match in _matches())
    if name == "worker inet output":
        head, family, hook = 'oifname "lo" accept', "inet", "output"
    elif name == "slave inet forward":
        head = f'iifname != {{ "{FRONT}", "{BACK}" }} accept\nct state established,related accept'
        family, hook = "inet", "forward"
    elif name == BY_ADDRESS:
        workers = ", ".join(f"{NETWORKS[network]}.{WORKER}" for network in (FRONT, BACK))
        head = f"{_NEIGHBOURS}\nip saddr != {{ {workers} }} accept"
        family, hook = "bridge", "forward"
    elif name == "slave bridge forward":
        # By port, as a container's root may take any address. No port, no rule: the worker would be let through.
        if not ports:
            raise ValueError("the worker has no port")
        names = ", ".join(f'"{port}"' for port in ports)
        head = f"iifname != {{ {names} }} accept\n{_NEIGHBOURS}"
        family, hook = "bridge", "forward"
    else:
        raise ValueError(name)
    return (
        f"table {family} flows {{ chain c {{ type filter hook {hook} priority filter; policy accept;\n"
        f"{head}\n{let_through}{drop}\ndrop\n}}\n}}\n"
    )


# --- What was seen --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """One request: a row of the report (docs/experiments/child_container.md has the fields)."""

    runtime: str
    step: str
    topology: str
    inner_engine: str
    filter: str
    bridge_nf: int
    sender: str
    target: str
    host: str
    port: int
    expected: str
    observed: str
    how: str
    """``payload``, or the error of the sender."""
    answered_by: str
    """What the server calls itself."""
    seen_as: str
    """Which address the server saw."""
    arrived_packets: int
    arrived_bytes: int
    dropped_packets: int
    as_expected: bool


def observation(
    runtime: str,
    step: Step,
    sender: str,
    request: Request,
    answer: Mapping[str, Any],
    arrived: tuple[int, int],
    dropped: int,
) -> Observation:
    """``answer`` is the sender's: {"answered_by", "seen_as"} or {"error"}."""
    by = str(answer.get("answered_by", ""))
    # Connected is not reached: whoever else answers at that address is not the target.
    observed = REACHED if by == request.target.name else DENIED
    error = "" if by else str(answer.get("error", "no answer"))
    return Observation(
        runtime=runtime,
        step=step.name,
        topology=step.topology,
        inner_engine=step.inner_engine,
        filter=step.filter,
        bridge_nf=step.bridge_nf,
        sender=sender,
        target=request.target.name,
        host=request.host,
        port=request.target.port,
        expected=request.expected,
        observed=observed,
        how=error or "payload",
        answered_by=by,
        seen_as=str(answer.get("seen_as", "")),
        arrived_packets=arrived[0],
        arrived_bytes=arrived[1],
        dropped_packets=dropped,
        as_expected=observed == request.expected
        and _proven(step, request, error, arrived[0], dropped),
    )


def _proven(step: Step, request: Request, error: str, arrived: int, dropped: int) -> bool:
    """Whether the counters bear out what was expected and seen."""
    if request.evidence == DROPPED:
        return arrived > 0 and dropped > 0
    if request.evidence == STAYED:
        return arrived == 0 and (dropped > 0) == (step.filter == "worker inet output")
    if request.evidence == NAMELESS:
        return error == "name not known"
    return arrived > 0 and dropped == 0


def differences(observations: Iterable[Observation]) -> list[str]:
    """What is not as expected, a sentence each."""
    found = []
    for one in observations:
        if one.as_expected:
            continue
        words = f"{one.runtime}, {one.step}: {one.sender} to {one.target} at {one.host} was {one.observed} ({one.how})"
        if one.observed != one.expected:
            found.append(f"{words}, expected {one.expected}.")
        else:
            found.append(
                f"{words} as expected, but {one.arrived_packets} packets arrived on the slave and"
                f" {one.dropped_packets} were dropped there, which does not prove it."
            )
    return found


def not_as_called(workers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where a worker was not what its runtime's name says, a sentence each. ``workers``: {runtime: what the kernel
    says of its first process}."""
    found = []
    for runtime, seen in workers.items():
        mapped = str(seen["uid_map"]).split()[:2] != ["0", "0"]
        if mapped and runtime == "runc":
            found.append(
                f"runc: the worker's root is mapped ({seen['uid_map']}), so that it is no control."
            )
        if not mapped and runtime != "runc":
            found.append(f"{runtime}: the worker's root is the slave's ({seen['uid_map']}).")
        if runtime == "sysbox-runc" and not seen["sysbox_mounts"]:
            found.append(
                "sysbox-runc: the worker has no mounts of sysbox-fs, so that this is not Sysbox."
            )
        if seen["seccomp"] != 2:
            found.append(f"{runtime}: the worker's first process filters no system calls.")
    return found


def missing(observations: Iterable[Observation], runtimes: Iterable[str]) -> list[str]:
    """What was to be tried and was not."""
    seen = {(one.runtime, one.step, one.sender, one.host) for one in observations}
    return [
        f"{runtime}, {step.name}: {sender} to {request.host} was not tried."
        for runtime in runtimes
        for step in STEPS
        for sender in SENDERS
        for request in step.requests(sender)
        if (runtime, step.name, sender, request.host) not in seen
    ]


def table(observations: Sequence[Observation]) -> list[str]:
    """A line for each step and runtime: how many targets each sender reached, in the order of SENDERS, and how many
    packets rules dropped. With an exclamation mark, something in it is not as expected."""
    lines = [
        f"{'':44}  {'':11}  reached of the cache's | of what is forbidden",
        f"{'step':44}  {'runtime':11}  {'(worker, child: bridge, network, worker`s)':44}  dropped",
    ]
    for step in STEPS:
        for runtime in RUNTIMES:
            rows = [one for one in observations if (one.step, one.runtime) == (step.name, runtime)]
            if not rows:
                continue
            cells = " | ".join(
                _cell([one for one in rows if (one.target == CACHE.name) is cache])
                for cache in (True, False)
            )
            mark = "" if all(one.as_expected for one in rows) else " !"
            # The engine has one counter for all the targets of a sender.
            shared = step.filter == "engine's isolation"
            counted = [one for one in rows if one.target == CACHE.name] if shared else rows
            dropped = sum(one.dropped_packets for one in counted)
            lines.append(f"{step.name:44}  {runtime:11}  {cells:44}  {dropped:>7}{mark}".rstrip())
    return lines


def _cell(rows: Sequence[Observation]) -> str:
    if not rows:
        return "-"
    of = [[one for one in rows if one.sender == sender] for sender in SENDERS]
    # A dash for whoever has no way to ask.
    reached = [str(sum(one.observed == REACHED for one in mine)) if mine else "-" for mine in of]
    return f"{' '.join(f'{count:>2}' for count in reached)} of {max(map(len, of))}"


def as_row(one: Observation) -> dict[str, Any]:
    return asdict(one)


# --- How the worker is made -----------------------------------------------------------------------

# Which of the worker container's options are its place and not what it is: the experiment has its own.
_PLACE = frozenset(
    "--name --hostname --network --network-alias --ip --mac-address --dns --volume --restart".split()
)


def boundary_options(create: Sequence[str]) -> list[str]:
    """What makes the worker container a worker, of the arguments that the role makes it with: capabilities, system
    call filter, limits. Not its name, networks and volumes, and not the image and what runs in it."""
    found: list[str] = []
    words = iter(create)
    for word in words:
        if not word.startswith("--"):
            return found
        key, joined, _ = word.partition("=")
        option = [word] if joined else [word, next(words, "")]
        if key not in _PLACE:
            found += option
    return found


# --- Whether it can be run ------------------------------------------------------------------------


def refusals(
    host: str,
    asked: Sequence[str],
    programs: Mapping[str, bool],
    engine: Mapping[str, Any] | None,
    ipv6: bool = True,
) -> list[str]:
    """Why the experiment cannot be run on ``host``. ``engine`` is /info of its API; None without an answer."""
    unknown = [name for name in asked if name not in RUNTIMES]
    if unknown:
        return [
            f"child_container_runtimes has {', '.join(unknown)}; write any of {', '.join(RUNTIMES)}."
        ]
    if engine is None or not programs.get("dockerd", False):
        return [
            f"{host} has no Docker engine that answers; provide one with the role docker (docker_enabled), or name"
            " another slave with child_container_host."
        ]
    found = [
        f"{host} has no {name}; install it, as the roles firewall and worker_slave do."
        for name, there in sorted(programs.items())
        if not there
    ]
    if not ipv6:
        found.append(
            f"{host}'s kernel has no IPv6, which a part of the experiment tries; boot it without ipv6.disable."
        )
    if "sysbox-runc" in asked and "sysbox-runc" not in (engine.get("Runtimes") or {}):
        found.append(
            f"{host}'s engine has no runtime sysbox-runc; provide it with the role sysbox, or leave it out of"
            " child_container_runtimes."
        )
    return found


def chosen(asked: Sequence[str], registered: Collection[str]) -> list[str]:
    """The runtimes to try: those asked for, or all that there are."""
    there = [name for name in RUNTIMES if name != "sysbox-runc" or name in registered]
    return [name for name in RUNTIMES if name in asked] if asked else there
