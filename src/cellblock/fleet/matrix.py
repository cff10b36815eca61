"""Which connections a probe of the live fleet must and must not make, and what its outcome means.

``plan`` says what to try from where, ``complete`` adds what only the hosts know (link-local
addresses, hardware addresses), ``judge`` compares what was seen with what is declared. All three
are pure. What hosts answered goes through ``answers`` first: here it is taken for well-formed. Nothing here looks at firewall rules: a mistake in them cannot excuse itself.

A cell is one vantage, target, service and path. Its verdict is one of

- ``as_declared``: reached and a flow allows it, or not reached and none does
- ``leak``: reached, or arrived without an answer, and no flow allows it
- ``broken``: not reached, and a flow allows it
- ``unproven``: not tried, not triable, or not reached without a proof that it could have been

That proof (the control) is an answer from the same address, protocol and port to somebody else in
the same run: to another vantage or, failing that, to the target host itself.

Beside the hosts and the controller, the sandboxes of slaves that give jobs a network are vantages:
``SLAVE/POLICY`` is a real job there, ``SLAVE/slot`` is root in a network slot as jobs have it. And
they are targets: ``SLAVE/sibling`` is a slot with listeners, which stands for another job.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address, ip_interface
from typing import Any

from .model import CONTROLLER, EVERY_HOST, INTERNET, Address, Fleet, Flow, Host, Service

IPV4, IPV6, LINK_LOCAL = "ipv4", "ipv6", "link_local"
PATHS = (IPV4, IPV6, LINK_LOCAL)
PATH_NAMES = {IPV4: "IPv4", IPV6: "IPv6", LINK_LOCAL: "IPv6 link-local"}

AS_DECLARED, LEAK, BROKEN, UNPROVEN = "as_declared", "leak", "broken", "unproven"
VERDICTS = (AS_DECLARED, LEAK, BROKEN, UNPROVEN)

# Kinds of cells. A forged one must never arrive; a control one has no verdict of its own.
SERVICE, CONTROL, SPOOFED, SPOOFED_FRAME = "service", "control", "spoofed", "spoofed_frame"

# Kinds of sandboxes of network_probe.
JOB, SLOT, SIBLING = "job", "slot", "sibling"

_ANSWERED = ("open", "refused")
_SILENT = ("filtered", "unreachable")
# A job may open no raw socket; that root in a slot gets no further is seen there.
_SILENT_IN_JOBS = (*_SILENT, "denied")

Observations = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Probe:
    """One target of the module network_probe."""

    id: str
    address: str
    protocol: str
    port: int | None = None
    interface: str | None = None
    source: str | None = None
    mac: str | None = None
    source_mac: str | None = None
    payload: str | None = None

    def as_target(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Cell:
    """One question, and the probes that answer it: one for each address of the target."""

    kind: str
    vantage: str
    target: str
    service: Service
    path: str
    flow: Flow | None
    probes: tuple[Probe, ...]
    # Of a forged cell: whose address it claims, and why that one would be let in.
    claimed: str | None = None
    # Why there are no probes.
    problem: str | None = None

    def __str__(self) -> str:
        claim = f" with the source of {self.claimed}" if self.claimed else ""
        frame = " (frame)" if self.kind == SPOOFED_FRAME else ""
        if any(probe.source_mac for probe in self.probes):
            frame = " (frame with another's hardware address)"
        return (
            f"{self.vantage} -> {self.target} {self.service} over {PATH_NAMES[self.path]}"
            f"{claim}{frame}"
        )


@dataclass(frozen=True)
class Sandbox:
    """Where untrusted programs run on a slave; ``policy`` is whom they may reach."""

    slave: str
    what: str  # within the slave
    kind: str
    policy: str

    @property
    def name(self) -> str:
        return f"{self.slave}/{self.what}"


def sandboxes(fleet: Fleet) -> dict[str, Sandbox]:
    """Every sandbox that the slaves may have, by name; whether they do is known by the hosts."""
    # The widest policy, so that the slot's other protections have nothing else before them.
    widest = max(fleet.job_flows, key=lambda policy: len(fleet.job_flows[policy]), default=None)
    if widest is None or not fleet.job_flows[widest]:
        return {}
    found = []
    for slave in fleet.groups.get(fleet.slaves_group, ()):
        found += [Sandbox(slave, policy, JOB, policy) for policy in fleet.job_flows]
        found += [Sandbox(slave, kind, kind, widest) for kind in (SLOT, SIBLING)]
    return {sandbox.name: sandbox for sandbox in found}


@dataclass(frozen=True)
class Plan:
    """What to try. ``vantages`` have verdicts; the other keys of ``targets`` are controls."""

    fleet: Fleet
    vantages: tuple[str, ...]
    cells: tuple[Cell, ...]
    gaps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    spoof_frames: bool = False

    def listeners(self) -> dict[str, list[dict[str, Any]]]:
        """For every host that is tried, what the prober listens on there."""
        found: dict[str, dict[tuple[str, int | None], dict[str, Any]]] = {}
        for service in self.fleet.services.values():
            for host in self.fleet.serving(service.name):
                where = host.owner if host.external else host.name
                if where is None:
                    continue
                # Two services may have one port, at different addresses of one host.
                found.setdefault(where, {}).setdefault(
                    (service.protocol, service.port), _listener(service)
                )
        return {host: list(entries.values()) for host, entries in sorted(found.items())}

    def siblings(self) -> dict[str, dict[str, Any]]:
        """For every slave, what is listened on in a slot there, if it has any."""
        services = [self.fleet.services[name] for name in _of_siblings(self.fleet)]
        return {
            sandbox.slave: {
                "policy": sandbox.policy,
                "listeners": [_listener(service) for service in services],
            }
            for sandbox in sandboxes(self.fleet).values()
            if sandbox.kind == SIBLING
        }

    def targets(self) -> dict[str, list[dict[str, Any]]]:
        """For every host and the controller, the targets for the module network_probe."""
        everything = sandboxes(self.fleet)
        return {
            name: targets for name, targets in self._targets().items() if name not in everything
        }

    def sandboxes(self) -> dict[str, list[dict[str, Any]]]:
        """For every slave with sandboxes, these with their targets for the module network_probe."""
        everything = sandboxes(self.fleet)
        found: dict[str, list[dict[str, Any]]] = {}
        for name, targets in self._targets().items():
            if name in everything:
                box = everything[name]
                found.setdefault(box.slave, []).append(
                    {"name": box.what, "kind": box.kind, "policy": box.policy, "targets": targets}
                )
        return found

    def _targets(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.vantages}
        for cell in self.cells:
            # Only how long it is waited for depends on what is declared.
            expected = {"expected": True} if cell.flow or cell.kind == CONTROL else {}
            found.setdefault(cell.vantage, []).extend(
                {**probe.as_target(), **expected} for probe in cell.probes
            )
        return found


def plan(
    fleet: Fleet, vantages: Sequence[str] | None = None, *, spoof_frames: bool = False
) -> Plan:
    """What to try on ``fleet``, from the given vantages or from every host and the controller, and
    from the sandboxes of all slaves.

    ``spoof_frames``: also try whether a host may claim another's address on its link in frames that
    its own rules do not see. On a flat network that is for the switch to prevent.
    """
    everywhere = _everywhere(fleet)
    wanted = everywhere if vantages is None else tuple(vantages)
    for name in wanted:
        if name not in everywhere:
            raise ValueError(f"{name} is no vantage; there are {', '.join(everywhere)}")
    from_ = tuple(name for name in everywhere if name in wanted)
    cells = _service_cells(fleet, from_, {})
    return Plan(
        fleet,
        from_,
        _ordered(cells, everywhere, fleet),
        tuple(_gaps(fleet)),
        tuple(_notes(fleet)),
        spoof_frames,
    )


def complete(made: Plan, listening: Mapping[str, Mapping[str, Any]]) -> Plan:
    """``made`` with what follows from the hosts' interfaces: link-local paths, addresses that a host
    has beside its declared ones on the same interface, forged packets, and which sandboxes there are.

    ``listening``: by host (and ``controller``), what network_probe returned for ``listening``, as
    ``answers.listening`` let it through.
    """
    made = _with_sandboxes(made, listening)
    fleet = made.fleet
    everywhere = _everywhere(fleet)
    links = {
        name: tuple(_links(name, seen, fleet))
        for name, seen in listening.items()
        # A host that was reached has an interface, whatever it says.
        if seen.get("interfaces")
    }
    links |= _sandbox_links(fleet, listening)
    more: dict[str, list[Address]] = {}
    gaps = list(made.gaps)
    for host in fleet.fleet_hosts():
        more[host.name], doubtful = _undeclared(host, links, listening)
        gaps += doubtful
    cells = list(_service_cells(fleet, made.vantages, more))
    notes = list(made.notes)
    apart: dict[str, list[str]] = {}
    for target in fleet.fleet_hosts():
        for vantage in _tried_from(target, made.vantages):
            found = _link_local(fleet, vantage, target, links, made.vantages)
            if found is None:
                apart.setdefault(vantage, []).append(target.name)
            else:
                cells += found
    for vantage, names in apart.items():
        notes.append(
            f"{vantage} shares no link with {', '.join(names)}: no link-local path to try."
        )
    boxes = sandboxes(fleet)
    for vantage in made.vantages:
        if vantage != CONTROLLER and (vantage not in boxes or boxes[vantage].kind == SLOT):
            for target in fleet.fleet_hosts():
                if target.name != vantage:
                    cells += _forged(made, vantage, target, links, listening)
    if not made.spoof_frames:
        notes.append(
            "Forged frames of hosts, which their own rules do not see, were not tried; only the switch"
            " can stop them."
        )
    return dataclasses.replace(
        made,
        cells=_ordered(cells, everywhere, fleet),
        notes=tuple(notes),
        gaps=tuple(gaps),
    )


def _everywhere(fleet: Fleet) -> tuple[str, ...]:
    # The hosts that play the outside are tried from as well: no flow lets them in.
    everywhere = [CONTROLLER]
    boxes = [box for box in sandboxes(fleet).values() if box.kind != SIBLING]
    for host in fleet.hosts.values():
        if not host.external and host.slot_of is None:
            everywhere.append(host.name)
            everywhere += [box.name for box in boxes if box.slave == host.name]
    return tuple(everywhere)


# The sandboxes of the slaves.


def _of_siblings(fleet: Fleet) -> tuple[str, ...]:
    """What is tried at a job's address: what is tried at every host's."""
    return tuple(s.name for s in fleet.services.values() if EVERY_HOST in s.groups)


def _with_sandboxes(made: Plan, listening: Mapping[str, Mapping[str, Any]]) -> Plan:
    """``made`` without the sandboxes of slaves that have none, and with siblings as targets."""
    hosts = dict(made.fleet.hosts)
    gaps, notes = list(made.gaps), list(made.notes)
    without = set()
    for box in sandboxes(made.fleet).values():
        if box.kind != SIBLING or box.slave not in listening:
            continue  # what a slave has that said nothing is not known: that is unproven
        network = listening[box.slave].get("job_network")
        addresses = _slot_addresses(network or {})
        versions = {address.version for address in addresses}
        if network is None:
            without.add(box.slave)
            what = f"{box.slave} gives jobs no network: nothing was tried from jobs there"
            own = made.fleet.job_networks.get(box.slave)
            if own is None:
                notes.append(f"{what}.")
            else:
                gaps.append(
                    f"{what}, though {own} is declared as the range of its jobs; provision it"
                    " (playbooks/site.yml), or write cellblock_job_range as {slave: network}"
                    " without it."
                )
        elif 4 not in versions:
            gaps.append(
                f"Whether jobs on {box.slave} can be reached was not tried:"
                f" {network.get('problem') or 'a slot there has no address'}."
            )
        else:
            if box.slave in made.fleet.job_ipv6_networks and 6 not in versions:
                gaps.append(
                    f"Whether jobs on {box.slave} can be reached over IPv6 was not tried: a slot there"
                    f" has no IPv6 address, though {made.fleet.job_ipv6_networks[box.slave]} is declared"
                    " as their range; provision it (playbooks/site.yml), or leave it out of"
                    " cellblock_job_ipv6_prefix."
                )
            hosts[box.name] = Host(
                box.name,
                (),
                addresses,
                services=_of_siblings(made.fleet),
                slot_of=box.slave,
            )
    boxes = sandboxes(made.fleet)
    return dataclasses.replace(
        made,
        fleet=dataclasses.replace(made.fleet, hosts=hosts),
        vantages=tuple(
            name for name in made.vantages if name not in boxes or boxes[name].slave not in without
        ),
        gaps=tuple(gaps),
        notes=tuple(notes),
    )


def _slot_addresses(network: Mapping[str, Any]) -> tuple[Address, ...]:
    """The address of the slot that network_probe holds on a slave, and its IPv6 address if it has one,
    declared or not.
    """
    found: dict[int, Address] = {}
    for interface in network.get("interfaces") or ():
        for own in interface["addresses"]:
            address = ip_address(own["address"])
            if address.version == 4 or not address.is_link_local:
                found.setdefault(address.version, address)
    return tuple(found[version] for version in sorted(found))


def _sandbox_links(
    fleet: Fleet, listening: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[_Link, ...]]:
    """The interfaces of sandboxes: all slots of a slave are made alike, but for the address."""
    found: dict[str, tuple[_Link, ...]] = {}
    for box in sandboxes(fleet).values():
        network = (listening.get(box.slave) or {}).get("job_network") or {}
        if not fleet.job_flows.get(box.policy):
            # There is none: link-local addresses are tried without one.
            found[box.name] = (_Link("", "", (), True),)
        elif network.get("interfaces"):
            found[box.name] = tuple(
                dataclasses.replace(link, is_declared=True)
                for link in _links(box.name, network, fleet)
            )
    return found


def _allowing(fleet: Fleet, vantage: str, target: str, service: str) -> Flow | None:
    box = sandboxes(fleet).get(vantage) if "/" in vantage else None
    if box is None:
        return fleet.allowing(vantage, target, service)
    return fleet.allowing_job(box.policy, target, service)


def _service_cells(
    fleet: Fleet, wanted: Sequence[str], more: Mapping[str, Sequence[Address]]
) -> Iterator[Cell]:
    """The IPv4 and IPv6 cells; ``more`` addresses of a target join its declared ones."""
    for target, service in _targets(fleet):
        for path in (IPV4, IPV6):
            version = 4 if path == IPV4 else 6
            known = (*target.addresses, *more.get(target.name, ()))
            addresses = [address for address in known if address.version == version]
            if not addresses:
                continue
            for vantage in _tried_from(target, wanted):
                yield _cell(fleet, vantage, target, service, path, addresses, wanted)


def _targets(fleet: Fleet) -> Iterator[tuple[Host, Service]]:
    for service in fleet.services.values():
        for host in fleet.serving(service.name):
            yield host, service


def _tried_from(target: Host, wanted: Sequence[str]) -> list[str]:
    """The vantages for a target, and who is tried for a control only."""
    if not target.external:
        return [*wanted, *(() if target.name in wanted else (target.name,))]
    # The controller is not the fleet's: what it reaches outside is nobody's business, but a proof
    # that there is something. Never where a host plays the outside: the controller's way to those
    # addresses would be the real one.
    others = [name for name in wanted if name not in (CONTROLLER, target.owner)]
    return [*others, target.owner if target.owner else CONTROLLER]


def _addresses(host: Host, path: str) -> list[Address]:
    version = 4 if path == IPV4 else 6
    return [address for address in host.addresses if address.version == version]


def _listener(service: Service) -> dict[str, Any]:
    """What network_probe listens on in the place of a service."""
    entry: dict[str, Any] = {"id": service.name, "protocol": service.protocol}
    if service.port is not None:
        entry |= {"port": service.port, "payload": _payload(service) or "nonce"}
    return entry


def _payload(service: Service) -> str | None:
    """What real services at well-known ports answer to."""
    known = {("udp", 53): "dns", ("udp", 123): "ntp"}
    return known.get((service.protocol, service.port or 0))


def _kind(vantage: str, target: Host, wanted: Sequence[str]) -> str:
    is_own = vantage in (target.name, target.owner)
    outside = target.external and vantage == CONTROLLER
    return CONTROL if is_own or outside or vantage not in wanted else SERVICE


def _cell(
    fleet: Fleet,
    vantage: str,
    target: Host,
    service: Service,
    path: str,
    addresses: Iterable[Address],
    wanted: Sequence[str],
) -> Cell:
    kind = _kind(vantage, target, wanted)
    flow = _declared(fleet, vantage, target, service, path) if kind == SERVICE else None
    probes = tuple(
        _probe(target.name, service, path, number, str(address))
        for number, address in enumerate(addresses)
    )
    return Cell(kind, vantage, target.name, service, path, flow, probes)


def _declared(fleet: Fleet, vantage: str, target: Host, service: Service, path: str) -> Flow | None:
    """The flow that lets a vantage use a service; networks are declared for IPv4 and IPv6 apart."""
    flow = _allowing(fleet, vantage, target.name, service.name)
    box = sandboxes(fleet).get(vantage) if path == IPV6 else None
    if box and box.slave not in fleet.job_ipv6_networks:
        return None  # jobs there have no IPv6, whatever they are allowed
    if flow is not None and vantage == CONTROLLER and flow.source in fleet.networks:
        version = 4 if path == IPV4 else 6
        if all(network.version != version for network in fleet.networks[flow.source]):
            return None
    return flow


def _probe(
    target: str,
    service: Service,
    path: str,
    number: int,
    address: str,
    interface: str | None = None,
) -> Probe:
    name = f"{target}/{service.name}/{path}/{number}"
    return Probe(
        name, address, service.protocol, service.port, interface or None, payload=_payload(service)
    )


def _ordered(cells: Iterable[Cell], everywhere: Sequence[str], fleet: Fleet) -> tuple[Cell, ...]:
    vantages = {name: number for number, name in enumerate(everywhere)}
    hosts = {name: number for number, name in enumerate(fleet.hosts)}
    services = {name: number for number, name in enumerate(fleet.services)}
    kinds = (SERVICE, CONTROL, SPOOFED, SPOOFED_FRAME)
    return tuple(
        sorted(
            cells,
            key=lambda cell: (
                vantages.get(cell.vantage, len(vantages)),
                hosts[cell.target],
                services[cell.service.name],
                kinds.index(cell.kind),
                PATHS.index(cell.path),
            ),
        )
    )


def _gaps(fleet: Fleet) -> Iterator[str]:
    """What cannot be tried at all, because there is nothing to try it on."""
    empty = [name for name in fleet.groups if not fleet.members(name)]
    for service in fleet.services.values():
        if not fleet.serving(service.name):
            groups = [name for name in service.groups if name in empty]
            why = (
                f"the group {groups[0]} has no hosts"
                if groups
                else "no group serves it and no external target is set (cellblock_external_targets)"
            )
            yield f"{service} was not tried anywhere: {why}."
    outside = [host for host in fleet.hosts.values() if host.external]
    for flow in fleet.flows:
        for peer in (flow.source, flow.destination):
            if peer in empty and peer != fleet.outside_group:
                yield f"Flow {flow.index} ({flow}) was not tried: the group {peer} has no hosts."
        if flow.destination == INTERNET:
            only = dataclasses.replace(fleet, flows=(flow,))
            sources = [host.name for host in fleet.members(flow.source)]
            for name in flow.services:
                served = [host for host in outside if name in host.services]
                if sources and not any(only.allowing(sources[0], h.name, name) for h in served):
                    yield (
                        f"Flow {flow.index} ({flow}) was not tried for {name}: no external target"
                        " on the internet serves it (cellblock_external_targets)."
                    )
    if not outside:
        yield (
            "Whether hosts reach the outside was not tried: no external target is set"
            " (cellblock_external_targets)."
        )


def _notes(fleet: Fleet) -> Iterator[str]:
    for flow in fleet.flows:
        if flow.destination in fleet.networks:
            only = dataclasses.replace(fleet, flows=(flow,))
            sources = [host.name for host in fleet.members(flow.source)]
            for name in flow.services:
                served = fleet.serving(name)
                if sources and not any(only.allowing(sources[0], h.name, name) for h in served):
                    yield (
                        f"Flow {flow.index} ({flow}) was not tried for {name}: no target in the"
                        f" network {flow.destination} is known."
                    )


# What the hosts' interfaces tell.


@dataclass(frozen=True)
class _Link:
    """An interface of a host."""

    name: str
    mac: str
    addresses: tuple[Any, ...]  # IPv4Interface or IPv6Interface
    is_declared: bool  # carries a declared address of the host

    def reaches(self, host: Host) -> bool:
        return any(
            address in own.network
            for own in self.addresses
            if not own.ip.is_link_local
            for address in host.addresses
            if address.version == own.version
        )

    def link_local(self) -> list[IPv6Address]:
        return [own.ip for own in self.addresses if own.version == 6 and own.ip.is_link_local]


def _links(name: str, seen: Mapping[str, Any], fleet: Fleet) -> Iterator[_Link]:
    declared = fleet.hosts[name].addresses if name in fleet.hosts else ()
    for entry in seen["interfaces"]:
        own = tuple(
            ip_interface(f"{a['address']}/{a['prefix_length']}") for a in entry["addresses"]
        )
        carries = any(interface.ip in declared for interface in own)
        yield _Link(entry["name"], entry["mac"], own, carries)


def _ways(vantage: str, target: Host, links: Mapping[str, tuple[_Link, ...]]) -> list[_Link]:
    """The vantage's interfaces on the target's link; else those it has declared addresses on."""
    own = links[vantage]
    if vantage == target.name:
        return [link for link in own if link.is_declared]
    return [link for link in own if link.reaches(target)] or [li for li in own if li.is_declared]


def _link_local(
    fleet: Fleet,
    vantage: str,
    target: Host,
    links: Mapping[str, tuple[_Link, ...]],
    wanted: Sequence[str],
) -> list[Cell] | None:
    """Link-local cells from one vantage to one host; None when there is no way to try."""
    services = [s for s in fleet.services.values() if target in fleet.serving(s.name)]
    kind = _kind(vantage, target, wanted)
    unknown = next((name for name in (vantage, target.name) if name not in links), None)
    if unknown:
        problem = f"the interfaces of {unknown} are not known"
        return [
            Cell(kind, vantage, target.name, service, LINK_LOCAL, None, (), problem=problem)
            for service in services
        ]
    addresses = [a for link in links[target.name] if link.is_declared for a in link.link_local()]
    ways = _ways(vantage, target, links)
    if not addresses or not ways:
        return None
    if vantage == target.name:
        pairs = [(a, link) for link in ways for a in link.link_local()]
    else:
        pairs = [(address, link) for address in addresses for link in ways]
    return [
        Cell(
            kind,
            vantage,
            target.name,
            service,
            LINK_LOCAL,
            None,
            tuple(
                _probe(target.name, service, LINK_LOCAL, number, str(address), link.name)
                for number, (address, link) in enumerate(pairs)
            ),
        )
        for service in services
    ]


def _undeclared(
    target: Host,
    links: Mapping[str, tuple[_Link, ...]],
    listening: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Address], list[str]]:
    """The addresses that a host has beside its declared ones, on the same interfaces; and gaps.

    There it may be reached past rules that know the declared ones only. One that another host says
    it has too cannot be tried: who answers would not be known. That is a gap, for otherwise a host
    could have others' addresses left out by claiming them.
    """
    claimed = {
        address: name
        for name, seen in listening.items()
        if name != target.name
        for address in seen.get("own_addresses") or ()
    }
    known: list[Address] = []
    gaps = []
    for link in links.get(target.name, ()):
        for own in link.addresses if link.is_declared else ():
            if own.ip.is_link_local or own.ip in target.addresses:
                continue
            if str(own.ip) in claimed:
                gaps.append(
                    f"{target.name} has the address {own.ip}, and {claimed[str(own.ip)]} says that it"
                    " has it too: who answers there is not known, so it was not tried."
                )
            else:
                known.append(own.ip)
    return known, gaps


def _forged(
    made: Plan,
    vantage: str,
    target: Host,
    links: Mapping[str, tuple[_Link, ...]],
    listening: Mapping[str, Mapping[str, Any]],
) -> Iterator[Cell]:
    """Packets to ``target`` that claim the address of somebody who is let in.

    Only for what the target's listener can see: echo requests, and datagrams at ports that no
    service has. Not from a host that plays the outside: what it sends is not filtered at its end,
    and on a shared segment no other end can tell.
    """
    box = sandboxes(made.fleet).get(vantage)
    if box is None and made.fleet.outside_group in made.fleet.hosts[vantage].groups:
        return
    for service in made.fleet.services.values():
        if service.protocol == "tcp" or target not in made.fleet.serving(service.name):
            continue
        heard = next(
            (
                entry
                for entry in (listening.get(target.name) or {}).get("listeners") or ()
                if (entry["protocol"], entry.get("port")) == (service.protocol, service.port)
            ),
            None,
        )
        for path in (IPV4, IPV6):
            addresses = _addresses(target, path)
            claim = _claim(made, vantage, target, service, path)
            if not addresses or claim is None or heard is None or heard[path] != "listening":
                continue
            claimed, source = claim
            probe = Probe(
                f"{target.name}/{service.name}/{path}/forged",
                str(addresses[0]),
                f"spoofed_{service.protocol}",
                service.port,
                source=source,
            )
            cell = Cell(
                SPOOFED, vantage, target.name, service, path, None, (probe,), claimed=claimed
            )
            yield cell
            # What hosts send past their own rules is for the switch; what jobs send is for us.
            if (made.spoof_frames or box) and vantage in links and target.name in links:
                way = next((li for li in links[vantage] if li.reaches(target)), None)
                to = next((li for li in links[target.name] if li.is_declared), None)
                if way and to:
                    framed = dataclasses.replace(
                        probe,
                        id=f"{target.name}/{service.name}/{path}/frame",
                        protocol="spoofed_frame",
                        interface=way.name,
                        mac=to.mac,
                    )
                    yield dataclasses.replace(cell, kind=SPOOFED_FRAME, probes=(framed,))
                    slave = next(iter(links.get(box.slave, ())), None) if box else None
                    if slave:
                        framed = dataclasses.replace(
                            framed, id=f"{framed.id}_mac", source_mac=slave.mac
                        )
                        yield dataclasses.replace(cell, kind=SPOOFED_FRAME, probes=(framed,))


def _claim(
    made: Plan, vantage: str, target: Host, service: Service, path: str
) -> tuple[str, str] | None:
    """Somebody else who may use the service, and an address of theirs."""
    if _allowing(made.fleet, vantage, target.name, service.name):
        return None  # it is let in by its own name
    boxes = sandboxes(made.fleet)
    for other in made.vantages:
        if other in (vantage, target.name) or other in boxes:
            continue
        flow = made.fleet.allowing(other, target.name, service.name)
        if flow is None:
            continue
        version = 4 if path == IPV4 else 6
        if other == CONTROLLER:
            own = [
                n.network_address
                for n in made.fleet.networks.get(flow.source, ())
                if n.num_addresses == 1
            ]
        else:
            own = list(made.fleet.hosts[other].addresses)
        for address in own:
            if address.version == version:
                return other, str(address)
    return None


# What was seen, and what it means.


@dataclass(frozen=True)
class Seen:
    """What became of one probe."""

    probe: Probe
    outcome: str  # of network_probe, or "missing"
    evidence: str
    # It came in at the target, although nothing came back.
    arrived: str | None = None

    @property
    def is_answered(self) -> bool:
        return self.outcome in _ANSWERED


@dataclass(frozen=True)
class Finding:
    """A cell with its verdict, how it is known, and one sentence that says it."""

    cell: Cell
    verdict: str
    is_reached: bool
    seen: tuple[Seen, ...]
    control: str | None
    sentence: str


@dataclass(frozen=True)
class Report:
    """The outcome of a run."""

    plan: Plan
    findings: tuple[Finding, ...]
    controls: tuple[Finding, ...]
    drift: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        counted = Counter(finding.verdict for finding in self.findings)
        counts = {verdict: counted.get(verdict, 0) for verdict in VERDICTS}
        counts[UNPROVEN] += len(self.plan.gaps)
        return counts

    @property
    def is_green(self) -> bool:
        """Everything as declared, and everything tried; an empty run proves nothing."""
        counts = self.counts
        bad = counts[LEAK] + counts[BROKEN] + counts[UNPROVEN]
        return counts[AS_DECLARED] > 0 and bad == 0 and not any(self.drift.values())

    def differences(self) -> list[str]:
        """All that is not as declared, worst first, as sentences."""
        sentences = [
            finding.sentence
            for verdict in (LEAK, BROKEN)
            for finding in self.findings
            if finding.verdict == verdict
        ]
        sentences += [f"{host}: {text}" for host, texts in self.drift.items() for text in texts]
        sentences += self.plan.gaps
        sentences += [f.sentence for f in self.findings if f.verdict == UNPROVEN]
        return sentences


def judge(
    made: Plan,
    observations: Observations,
    drift: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Compares what was seen with what is declared.

    ``made``: the plan as ``complete`` left it. ``observations``: by host (and ``controller``) a
    mapping with what network_probe returned as ``listening``, ``probed`` and ``collected``, and
    ``problem``, one phrase, where the host could not be asked (``answers.observe``). ``drift``: by host, sentences about
    rules in force that are not the declared ones.
    """
    sight = _Sight(made, observations)
    findings, controls = [], []
    for cell in made.cells:
        seen = tuple(sight.of(cell, probe) for probe in cell.probes)
        if cell.kind == CONTROL:
            controls.append(_control_finding(cell, seen))
        elif cell.kind == SERVICE:
            findings.append(_judge_service(cell, seen, sight))
        else:
            findings.append(_judge_forged(cell, seen, sight))
    told = {host: tuple(texts) for host, texts in sorted((drift or {}).items()) if texts}
    return Report(made, tuple(findings), tuple(controls), told)


def _of_sandboxes(fleet: Fleet, observations: Observations) -> dict[str, dict[str, Any]]:
    """What slaves said about their sandboxes, as if these were hosts."""
    found: dict[str, dict[str, Any]] = {}
    for box in sandboxes(fleet).values():
        seen = observations.get(box.slave) or {}
        own: dict[str, Any] = {}
        if seen.get("problem"):
            own["problem"] = f"{box.slave}: {seen['problem']}"
        probed = ((seen.get("probed") or {}).get("sandboxes") or {}).get(box.what) or {}
        if probed.get("problem"):
            own["problem"] = probed["problem"]
        elif probed:
            own["probed"] = probed
        if box.kind == SIBLING:
            own["listening"] = (seen.get("listening") or {}).get("job_network")
            own["collected"] = ((seen.get("collected") or {}).get("sandboxes") or {}).get(SIBLING)
        found[box.name] = own
    return found


class _Sight:
    """The observations of a run, for looking things up."""

    def __init__(self, made: Plan, observations: Observations) -> None:
        self.made = made
        observations = {**observations, **_of_sandboxes(made.fleet, observations)}
        self.observations = observations
        self.results = {
            (vantage, result["id"]): result
            for vantage, seen in observations.items()
            for result in (seen.get("probed") or {}).get("results") or ()
        }
        self.payloads: dict[str, set[str]] = {}
        self.connections: dict[str, set[tuple[str, int, int | None]]] = {}
        for host in observations:
            account = self._account(host)
            if account is None:
                continue
            ports = {
                entry["id"]: entry.get("port")
                for entry in (observations[host].get("listening") or {}).get("listeners") or ()
            }
            self.payloads[host] = {r["payload"] for r in account["received"] if r["payload"]}
            self.connections[host] = {
                *((r["source"], r["source_port"], r["port"]) for r in account["half_open"]),
                *(
                    (r["source"], r["source_port"], ports.get(r["listener"]))
                    for r in account["received"]
                    if not r["payload"]
                ),
            }
        # (address, protocol, port) -> who got an answer from there, and how.
        self.answers: dict[tuple[str, str, int | None], list[tuple[str, str, str]]] = {}
        for cell in made.cells:
            if cell.kind not in (SERVICE, CONTROL):
                continue
            for probe in cell.probes:
                result = self.results.get((cell.vantage, probe.id))
                if result and result["outcome"] in _ANSWERED:
                    self.answers.setdefault(_place(probe), []).append(
                        (cell.vantage, result["outcome"], result["evidence"])
                    )

    def _account(self, host: str) -> Mapping[str, Any] | None:
        """What the host's listener received, if it is the one that was started for this run."""
        seen = self.observations.get(host) or {}
        account, started = seen.get("collected"), seen.get("listening")
        if not account or not started or not account.get("was_running"):
            return None
        if account.get("is_incomplete") or account.get("handle") != started.get("handle"):
            return None
        return account  # type: ignore[no-any-return]

    def problem(self, host: str) -> str | None:
        """Why a host could not be asked; None when it could."""
        return (self.observations.get(host) or {}).get("problem")

    def missing_account(self, target: str) -> str | None:
        """Why it is not known what arrived at a host of the fleet."""
        host = self.made.fleet.hosts[target]
        if host.external or target in self.payloads:
            return None
        return self.problem(target) or "what its listener received is not known"

    def of(self, cell: Cell, probe: Probe) -> Seen:
        result = self.results.get((cell.vantage, probe.id))
        if result is None:
            why = self.problem(cell.vantage) or "there is no result of it"
            return Seen(probe, "missing", f"not tried: {why}")
        arrived = None
        where = self.made.fleet.hosts[cell.target].owner or cell.target
        if result.get("payload") and result["payload"] in self.payloads.get(where, ()):
            arrived = f"{where} received it"
        elif result.get("source_port"):
            key = (result["source"], result["source_port"], probe.port)
            if cell.service.protocol == "tcp" and key in self.connections.get(where, ()):
                arrived = f"{where} received its first packet"
        return Seen(probe, result["outcome"], result["evidence"], arrived)

    def control(self, cell: Cell, probe: Probe, outcomes: Sequence[str] = _ANSWERED) -> str | None:
        """Who else got an answer from there: another vantage rather than the target itself."""
        own = (cell.target, self.made.fleet.hosts[cell.target].owner)
        found = [
            (vantage in own, f"{vantage} at {probe.address}: {evidence}")
            for vantage, outcome, evidence in self.answers.get(_place(probe), ())
            if vantage != cell.vantage and outcome in outcomes
        ]
        return min(found, key=lambda entry: entry[0])[1] if found else None


def _place(probe: Probe) -> tuple[str, str, int | None]:
    return str(ip_address(probe.address)), probe.protocol, probe.port


def _control_finding(cell: Cell, seen: tuple[Seen, ...]) -> Finding:
    is_reached = any(s.is_answered for s in seen)
    return Finding(cell, "control", is_reached, seen, None, f"{cell}: {_told(seen)}.")


def _judge_service(cell: Cell, seen: tuple[Seen, ...], sight: _Sight) -> Finding:
    answered = [s for s in seen if s.is_answered]
    one_way = [s for s in seen if not s.is_answered and s.arrived]
    box = sandboxes(sight.made.fleet).get(cell.vantage)
    silent = _SILENT_IN_JOBS if box and box.kind == JOB else _SILENT
    unknown = [s for s in seen if not s.is_answered and s.outcome not in silent]
    declared = f"flow {cell.flow.index} ({cell.flow})" if cell.flow else None

    def found(verdict: str, what: str, control: str | None = None) -> Finding:
        is_reached = bool(answered or one_way)
        return Finding(cell, verdict, is_reached, seen, control, f"{cell}: {what}.")

    if cell.flow is None and (answered or one_way):
        how = _told(answered or one_way)
        verb = "reached" if answered else "reached without an answer"
        return found(LEAK, f"{verb} ({how}), but no flow allows it")
    if cell.flow is not None and answered:
        rejected = _rejected(cell, answered, sight)
        if rejected is None:
            return found(AS_DECLARED, f"reached ({_told(answered)}), as {declared} allows")
        return found(
            BROKEN,
            f"refused ({_told(answered)}) where others are accepted ({rejected}), though {declared}"
            " allows it",
        )
    problem = cell.problem or sight.problem(cell.vantage) or (_told(unknown) if unknown else None)
    if problem is None and not seen:
        problem = "there was nothing to try"
    if problem:
        return found(UNPROVEN, f"unproven: {problem}")
    if cell.flow is not None:
        where = sight.made.fleet.hosts[cell.target].owner or cell.target
        if sight.problem(where):
            return found(UNPROVEN, f"unproven: {where}: {sight.problem(where)}")
        return found(BROKEN, f"not reached ({_told(seen)}), though {declared} allows it")
    lacking = sight.missing_account(cell.target)
    if lacking:
        return found(
            UNPROVEN, f"unproven: not reached ({_told(seen)}), but {cell.target}: {lacking}"
        )
    controls = []
    for one in seen:
        control = sight.control(cell, one.probe)
        if control is None:
            return found(
                UNPROVEN,
                f"unproven: not reached ({_told(seen)}), but nobody else got an answer from"
                f" {one.probe.address} either, so that shows nothing",
            )
        controls.append(control)
    return found(
        AS_DECLARED, f"not reached ({_told(seen)}), and no flow allows it", "; ".join(controls)
    )


def _rejected(cell: Cell, answered: Sequence[Seen], sight: _Sight) -> str | None:
    """Who is accepted where this vantage is refused everywhere; a closed port refuses everybody."""
    if any(s.outcome == "open" for s in answered):
        return None
    for one in answered:
        accepted = sight.control(cell, one.probe, ("open",))
        if accepted:
            return accepted
    return None


def _judge_forged(cell: Cell, seen: tuple[Seen, ...], sight: _Sight) -> Finding:
    (one,) = seen

    def found(verdict: str, what: str, control: str | None = None) -> Finding:
        return Finding(cell, verdict, bool(one.arrived), seen, control, f"{cell}: {what}.")

    if one.arrived:
        return found(LEAK, f"a forged packet got in ({one.evidence}; {one.arrived})")
    if one.outcome not in ("sent", *_SILENT):
        return found(UNPROVEN, f"unproven: {one.evidence}")
    lacking = sight.missing_account(cell.target)
    if lacking:
        return found(UNPROVEN, f"unproven: {one.evidence}, but {cell.target}: {lacking}")
    # The honest one, to the same address: it must have come in.
    honest = next(
        (
            s
            for other in sight.made.cells
            if (other.kind, other.vantage, other.target, other.service, other.path)
            == (SERVICE, cell.claimed, cell.target, cell.service, cell.path)
            for probe in other.probes
            if probe.address == one.probe.address and (s := sight.of(other, probe)).arrived
        ),
        None,
    )
    if honest is None:
        return found(
            UNPROVEN,
            f"unproven: {one.evidence} and it did not arrive, but neither did what {cell.claimed}"
            " sent itself",
        )
    return found(
        AS_DECLARED,
        f"no forged packet got in ({one.evidence})",
        f"{cell.claimed} at {one.probe.address}: {honest.arrived}",
    )


def _told(seen: Sequence[Seen]) -> str:
    """What was seen at each address; the address is said where there are several."""
    parts = []
    for one in seen:
        text = one.evidence
        if one.arrived and not one.is_answered:
            text = f"{text}, but {one.arrived}"
        parts.append(f"{one.probe.address}: {text}" if len(seen) > 1 else text)
    return "; ".join(parts) if parts else "nothing was tried"


def involved_hosts(fleet: Fleet) -> tuple[str, ...]:
    """The inventory's hosts that take part: vantages, targets and owners of external targets."""
    owners = {host.owner for host in fleet.hosts.values() if host.owner}
    return tuple(
        host.name
        for host in fleet.hosts.values()
        if not host.external and (host in fleet.fleet_hosts() or host.name in owners)
    )
