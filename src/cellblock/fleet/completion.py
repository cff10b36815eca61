"""The plan with what follows from what the hosts said about their interfaces.

What they answered went through ``answers`` first: here it is taken for well-formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_interface
from typing import Any

from ..job_network.plan import Address
from .model import CONTROLLER, Fleet, Host, Service
from .probe_plan import (
    CONTAINERS,
    IPV4,
    IPV6,
    LINK_LOCAL,
    SIBLING,
    SLOT,
    SPOOFED,
    SPOOFED_FRAME,
    Cell,
    Plan,
    Probe,
    allowing_flow,
    every_vantage,
    kind_of,
    ordered,
    sandboxes,
    service_cells,
    service_probe,
    sibling_services,
    vantages_for,
)


def complete(plan: Plan, listening: Mapping[str, Mapping[str, Any]]) -> Plan:
    """``plan`` with what follows from the hosts' interfaces: link-local paths, addresses that a host
    has beside its declared ones on the same interface, forged packets, and which sandboxes there are.

    ``listening``: by host (and ``controller``), what network_probe returned for ``listening``, as
    ``answers.listening`` let it through.
    """
    plan = _with_sandboxes(plan, listening)
    fleet = plan.fleet
    everywhere = every_vantage(fleet)
    links = {
        name: tuple(_links(name, seen, fleet))
        for name, seen in listening.items()
        # A host that was reached has an interface, whatever it says.
        if seen.get("interfaces")
    }
    links |= _sandbox_links(fleet, listening)
    more: dict[str, list[Address]] = {}
    gaps = list(plan.gaps)
    for host in fleet.fleet_hosts():
        more[host.name], doubtful = _undeclared(host, links, listening)
        gaps += doubtful
    cells = list(service_cells(fleet, plan.vantages, more))
    notes = list(plan.notes)
    apart: dict[str, list[str]] = {}
    for target in fleet.fleet_hosts():
        for vantage in vantages_for(target, plan.vantages):
            found = _link_local(fleet, vantage, target, links, plan.vantages)
            if found is None:
                apart.setdefault(vantage, []).append(target.name)
            else:
                cells += found
    for vantage, names in apart.items():
        notes.append(
            f"{vantage} shares no link with {', '.join(names)}: no link-local path to try."
        )
    all_sandboxes = sandboxes(fleet)
    for vantage in plan.vantages:
        if vantage != CONTROLLER and (
            vantage not in all_sandboxes or all_sandboxes[vantage].kind in (SLOT, *CONTAINERS)
        ):
            for target in fleet.fleet_hosts():
                if target.name != vantage:
                    cells += _forged(plan, vantage, target, links, listening)
    if not plan.spoof_frames:
        notes.append(
            "Forged frames of hosts, which their own rules do not see, were not tried; only the switch"
            " can stop them."
        )
    return dataclasses.replace(
        plan,
        cells=ordered(cells, everywhere, fleet),
        notes=tuple(notes),
        gaps=tuple(gaps),
    )


def _with_sandboxes(plan: Plan, listening: Mapping[str, Mapping[str, Any]]) -> Plan:
    """``plan`` without the sandboxes of slaves that have none, and with siblings as targets."""
    hosts = dict(plan.fleet.hosts)
    gaps, notes = list(plan.gaps), list(plan.notes)
    without = set()
    for sandbox in sandboxes(plan.fleet).values():
        if sandbox.kind != SIBLING or sandbox.slave not in listening:
            continue  # what a slave has that said nothing is not known: that is unproven
        network = listening[sandbox.slave].get("job_network")
        addresses = _slot_addresses(network or {})
        versions = {address.version for address in addresses}
        if network is None:
            without.add(sandbox.slave)
            what = f"{sandbox.slave} gives jobs no network: nothing was tried from jobs there"
            own = plan.fleet.job_networks.get(sandbox.slave)
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
                f"Whether jobs on {sandbox.slave} can be reached was not tried:"
                f" {network.get('problem') or 'a slot there has no address'}."
            )
        else:
            if sandbox.slave in plan.fleet.job_ipv6_networks and 6 not in versions:
                gaps.append(
                    f"Whether jobs on {sandbox.slave} can be reached over IPv6 was not tried: a slot there"
                    f" has no IPv6 address, though {plan.fleet.job_ipv6_networks[sandbox.slave]} is declared"
                    " as their range; provision it (playbooks/site.yml), or leave it out of"
                    " cellblock_job_ipv6_prefix."
                )
            hosts[sandbox.name] = Host(
                sandbox.name,
                (),
                addresses,
                services=sibling_services(plan.fleet),
                slot_of=sandbox.slave,
            )
    all_sandboxes = sandboxes(plan.fleet)
    return dataclasses.replace(
        plan,
        fleet=dataclasses.replace(plan.fleet, hosts=hosts),
        vantages=tuple(
            name
            for name in plan.vantages
            if name not in all_sandboxes
            or all_sandboxes[name].kind in CONTAINERS
            or all_sandboxes[name].slave not in without
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
    for sandbox in sandboxes(fleet).values():
        network = (listening.get(sandbox.slave) or {}).get("job_network") or {}
        if not fleet.job_flows.get(sandbox.policy):
            # There is none: link-local addresses are tried without one.
            found[sandbox.name] = (_Link("", "", (), True),)
        elif network.get("interfaces"):
            found[sandbox.name] = tuple(
                dataclasses.replace(link, is_declared=True)
                for link in _links(sandbox.name, network, fleet)
            )
    return found


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
    kind = kind_of(vantage, target, wanted)
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
                service_probe(target.name, service, LINK_LOCAL, number, str(address), link.name)
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
    plan: Plan,
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
    sandbox = sandboxes(plan.fleet).get(vantage)
    if sandbox is None and plan.fleet.outside_group in plan.fleet.hosts[vantage].groups:
        return
    for service in plan.fleet.services.values():
        if service.protocol == "tcp" or target not in plan.fleet.serving(service.name):
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
            claim = _claim(plan, vantage, target, service, path)
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
            if (plan.spoof_frames or sandbox) and vantage in links and target.name in links:
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
                    slave = next(iter(links.get(sandbox.slave, ())), None) if sandbox else None
                    if slave:
                        framed = dataclasses.replace(
                            framed, id=f"{framed.id}_mac", source_mac=slave.mac
                        )
                        yield dataclasses.replace(cell, kind=SPOOFED_FRAME, probes=(framed,))


def _addresses(host: Host, path: str) -> list[Address]:
    version = 4 if path == IPV4 else 6
    return [address for address in host.addresses if address.version == version]


def _claim(
    plan: Plan, vantage: str, target: Host, service: Service, path: str
) -> tuple[str, str] | None:
    """Somebody else who may use the service, and an address of theirs."""
    if allowing_flow(plan.fleet, vantage, target.name, service.name):
        return None  # it is let in by its own name
    all_sandboxes = sandboxes(plan.fleet)
    for other in plan.vantages:
        if other in (vantage, target.name) or other in all_sandboxes:
            continue
        flow = plan.fleet.allowing(other, target.name, service.name)
        if flow is None:
            continue
        version = 4 if path == IPV4 else 6
        if other == CONTROLLER:
            own = [
                n.network_address
                for n in plan.fleet.networks.get(flow.source, ())
                if n.num_addresses == 1
            ]
        else:
            own = list(plan.fleet.hosts[other].addresses)
        for address in own:
            if address.version == version:
                return other, str(address)
    return None
