"""What to try on the live fleet, from where, and which flow lets it through.

``plan`` makes it from what is declared alone; ``completion.complete`` adds what only the hosts know.
Nothing here looks at firewall rules: a mistake in them cannot excuse itself.

A cell is one vantage, target, service and path. Beside the hosts and the controller, the sandboxes of
slaves that give jobs a network are vantages: ``SLAVE/POLICY`` is a real job there, ``SLAVE/slot`` is
root in a network slot as jobs have it. And they are targets: ``SLAVE/sibling`` is a slot with
listeners, which stands for another job. ``SLAVE/worker_container`` is root in a slave's worker container,
``SLAVE/child_container`` root in a container that its own engine runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..job_network.plan import Address
from .model import (
    CONTROLLER,
    EVERY_HOST,
    INTERNET,
    Fleet,
    Flow,
    Host,
    Service,
    parse_fleet,
)

IPV4, IPV6, LINK_LOCAL = "ipv4", "ipv6", "link_local"
PATHS = (IPV4, IPV6, LINK_LOCAL)
PATH_NAMES = {IPV4: "IPv4", IPV6: "IPv6", LINK_LOCAL: "IPv6 link-local"}

# Kinds of cells. A forged one must never arrive; a control one has no verdict of its own.
SERVICE, CONTROL, SPOOFED, SPOOFED_FRAME = "service", "control", "spoofed", "spoofed_frame"

# Kinds of sandboxes of network_probe.
JOB, SLOT, SIBLING = "job", "slot", "sibling"
WORKER, CHILD = "worker_container", "child_container"
CONTAINERS = (WORKER, CHILD)


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
    policies = [policy for policy in fleet.job_flows if not fleet.opens_nothing(policy)]
    widest = max(policies, key=lambda policy: len(fleet.job_flows[policy]), default=None)
    found = []
    for slave in fleet.groups.get(fleet.slaves_group, ()):
        if widest is not None and fleet.job_flows[widest]:
            found += [Sandbox(slave, policy, JOB, policy) for policy in policies]
            found += [Sandbox(slave, kind, kind, widest) for kind in (SLOT, SIBLING)]
        if slave in fleet.worker_containers:
            found += [Sandbox(slave, kind, kind, "") for kind in CONTAINERS]
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
        services = [self.fleet.services[name] for name in sibling_services(self.fleet)]
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
                sandbox = everything[name]
                found.setdefault(sandbox.slave, []).append(
                    {
                        "name": sandbox.what,
                        "kind": sandbox.kind,
                        "policy": sandbox.policy,
                        "targets": targets,
                    }
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
    everywhere = every_vantage(fleet)
    wanted = everywhere if vantages is None else tuple(vantages)
    for name in wanted:
        if name not in everywhere:
            raise ValueError(f"{name} is no vantage; there are {', '.join(everywhere)}")
    from_ = tuple(name for name in everywhere if name in wanted)
    cells = service_cells(fleet, from_, {})
    return Plan(
        fleet,
        from_,
        ordered(cells, everywhere, fleet),
        tuple(_gaps(fleet)),
        tuple(_notes(fleet)),
        spoof_frames,
    )


def plan_of(request: Mapping[str, Any]) -> Plan:
    """The plan for a request as the playbook hands it on: ``fleet`` (what ``parse_fleet`` takes),
    ``vantages`` (names; empty means all) and ``spoof_frames``.

    The request is handed on and not the plan: to make it takes a fifth of a second, and to read its
    2,000 cells back would take a parser. Raises FleetError, or ValueError for a name that is no vantage.
    """
    return plan(
        parse_fleet(request["fleet"]),
        request["vantages"] or None,
        spoof_frames=request["spoof_frames"],
    )


def involved_hosts(fleet: Fleet) -> tuple[str, ...]:
    """The inventory's hosts that take part: vantages, targets and owners of external targets."""
    owners = {host.owner for host in fleet.hosts.values() if host.owner}
    return tuple(
        host.name
        for host in fleet.hosts.values()
        if not host.external and (host in fleet.fleet_hosts() or host.name in owners)
    )


def every_vantage(fleet: Fleet) -> tuple[str, ...]:
    # The hosts that play the outside are tried from as well: no flow lets them in.
    everywhere = [CONTROLLER]
    inside = [sandbox for sandbox in sandboxes(fleet).values() if sandbox.kind != SIBLING]
    for host in fleet.hosts.values():
        if not host.external and host.slot_of is None:
            everywhere.append(host.name)
            everywhere += [sandbox.name for sandbox in inside if sandbox.slave == host.name]
    return tuple(everywhere)


def sibling_services(fleet: Fleet) -> tuple[str, ...]:
    """What is tried at a job's address: what is tried at every host's."""
    return tuple(s.name for s in fleet.services.values() if EVERY_HOST in s.groups)


def allowing_flow(fleet: Fleet, vantage: str, target: str, service: str) -> Flow | None:
    sandbox = sandboxes(fleet).get(vantage) if "/" in vantage else None
    if sandbox is None:
        return fleet.allowing(vantage, target, service)
    if sandbox.kind in CONTAINERS:
        return fleet.allowing_container(target, service)
    return fleet.allowing_job(sandbox.policy, target, service)


def service_cells(
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
            for vantage in vantages_for(target, wanted):
                yield _cell(fleet, vantage, target, service, path, addresses, wanted)


def _targets(fleet: Fleet) -> Iterator[tuple[Host, Service]]:
    for service in fleet.services.values():
        for host in fleet.serving(service.name):
            yield host, service


def vantages_for(target: Host, wanted: Sequence[str]) -> list[str]:
    """The vantages for a target, and who is tried for a control only."""
    if not target.external:
        return [*wanted, *(() if target.name in wanted else (target.name,))]
    # The controller is not the fleet's: what it reaches outside is nobody's business, but a proof
    # that there is something. Never where a host plays the outside: the controller's way to those
    # addresses would be the real one.
    others = [name for name in wanted if name not in (CONTROLLER, target.owner)]
    return [*others, target.owner if target.owner else CONTROLLER]


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


def kind_of(vantage: str, target: Host, wanted: Sequence[str]) -> str:
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
    kind = kind_of(vantage, target, wanted)
    flow = _declared(fleet, vantage, target, service, path) if kind == SERVICE else None
    probes = tuple(
        service_probe(target.name, service, path, number, str(address))
        for number, address in enumerate(addresses)
    )
    return Cell(kind, vantage, target.name, service, path, flow, probes)


def _declared(fleet: Fleet, vantage: str, target: Host, service: Service, path: str) -> Flow | None:
    """The flow that lets a vantage use a service; networks are declared for IPv4 and IPv6 apart."""
    flow = allowing_flow(fleet, vantage, target.name, service.name)
    sandbox = sandboxes(fleet).get(vantage) if path == IPV6 else None
    if sandbox and (sandbox.kind in CONTAINERS or sandbox.slave not in fleet.job_ipv6_networks):
        return None  # containers, and jobs there, have no IPv6, whatever they are allowed
    if flow is not None and vantage == CONTROLLER and flow.source in fleet.networks:
        version = 4 if path == IPV4 else 6
        if all(network.version != version for network in fleet.networks[flow.source]):
            return None
    return flow


def service_probe(
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


def ordered(cells: Iterable[Cell], everywhere: Sequence[str], fleet: Fleet) -> tuple[Cell, ...]:
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
