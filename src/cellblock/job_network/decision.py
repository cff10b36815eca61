"""How the jobs of a slave get onto the network: from what is declared and what was seen of the host.

Pure; what cannot work is refused here, before anything of the host is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface
from typing import Any

from .guard import GuardedHost, guard_rules
from .host import ENGINE_CONFIG, HostNetwork, Parent
from .plan import (
    HOST_END,
    MAX_SLOTS,
    Misfit,
    Mode,
    SegmentProblem,
    capacity,
    ipv6_segment_problem,
    segment_problem,
)
from .section import NetworkConfig, SegmentEnd, compose_section

AUTO, NONE = "auto", "none"
MODES = (AUTO, Mode.MACVLAN.value, Mode.ROUTED.value, NONE)
_SLOTS_BESIDES_JOBS = 2
"""One slot is being made anew, one is the prober's."""


class RefusalError(Exception):
    """The host cannot give its jobs the network that is asked for; one sentence with the remedy."""


@dataclass(frozen=True)
class Wishes:
    """What the inventory says; texts are empty, and numbers None, where the host is to decide."""

    host: str
    """Its name in the inventory."""
    mode: str
    interface: str
    """The name of the interface that slots are cloned from."""
    parent: str
    gateway: str
    gateway_ipv6: str
    slots: int | None
    parallel_jobs: int | None
    """How many jobs run at once; None: one per CPU."""
    declared: Mapping[str, Any] | None
    """As ``section.compose_section`` takes it; None: there is no range for jobs here."""
    renumber: bool
    """Whether jobs may get other addresses than they have, which ends those that run."""

    def check(self) -> None:
        """Raises :class:`RefusalError` for a setting that makes no sense anywhere."""
        for name, value, remedy, is_right in (
            ("mode", self.mode, "auto, macvlan, routed or none", self.mode in MODES),
            (
                "interface",
                self.interface,
                f"up to 15 letters, digits, _ and -, not beginning with {HOST_END}",
                re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_-]{0,14}", self.interface)
                and not self.interface.startswith(HOST_END),
            ),
            (
                "slots",
                self.slots,
                f"null, or a number from 1 to {MAX_SLOTS}",
                self.slots is None or 0 < self.slots <= MAX_SLOTS,
            ),
            ("gateway", self.gateway, "an IPv4 address, or nothing", _is(4, self.gateway)),
            (
                "gateway_ipv6",
                self.gateway_ipv6,
                "an IPv6 address, or nothing",
                _is(6, self.gateway_ipv6),
            ),
        ):
            if not is_right:
                raise RefusalError(f"{self.host}: job_network_{name} is {value}; write {remedy}.")
        if self.mode not in (AUTO, NONE) and self.declared is None:
            raise RefusalError(
                f"{self.host}: job_network_mode is {self.mode}, but there is no range of addresses for"
                " its jobs; set cellblock_job_range, or set job_network_mode to none."
            )


@dataclass(frozen=True)
class Decision:
    """How jobs are connected."""

    mode: Mode
    parent: Parent
    section: Mapping[str, Any]
    """``network`` of the engine's configuration."""
    rules: str
    """Of the guard around all jobs, as nftables text."""
    has_ipv6: bool


def decide(wishes: Wishes, seen: HostNetwork) -> Decision:
    """The mode, and what follows from it; raises :class:`RefusalError`.

    What a clone was once seen to do is not tried again: a gateway that is away for a moment must not
    change the mode of the host. Where nft is still to be installed, the hook is taken to be there.
    """
    assert wishes.declared is not None
    declared = wishes.declared
    parent = _parent(wishes, seen)
    network = IPv4Network(declared["addresses"])
    slots = wishes.slots or (wishes.parallel_jobs or seen.cpus) + _SLOTS_BESIDES_JOBS
    _refuse_other_addresses(wishes, seen, network)
    if slots > capacity(network):
        raise RefusalError(
            f"{wishes.host}: its range for jobs {network} has {capacity(network)} addresses for {slots}"
            " slots; give a larger range (cellblock_job_range, cellblock_job_range_prefix_length) or"
            " fewer slots (job_network_slots)."
        )
    misfit = segment_problem(network, slots, parent.cidr, parent.gateway)
    mode = _mode(wishes, seen, parent, misfit)
    if misfit and (mode is Mode.MACVLAN or misfit.kind is Misfit.TAKEN):
        raise RefusalError(f"{wishes.host}: {misfit.text}.")
    prefix = IPv6Network(declared["ipv6_prefix"]) if "ipv6_prefix" in declared else None
    if mode is Mode.MACVLAN:
        _refuse_macvlan(wishes, seen, parent, prefix, network, slots)
        end = SegmentEnd(
            parent=wishes.interface,
            prefix_length=ip_interface(parent.cidr).network.prefixlen,
            gateway=parent.gateway,
            ipv6_prefix_length=ip_interface(parent.cidr_ipv6).network.prefixlen if prefix else None,
            ipv6_gateway=parent.gateway_ipv6 if prefix else None,
            link=parent.name,
        )
        section = compose_section(declared, slots, end)
    else:
        if prefix:
            _refuse_to_route_ipv6(wishes, seen)
        section = compose_section(declared, slots, None)
    config = NetworkConfig.parse(section, "network")
    guarded = GuardedHost(wishes.host, parent.name, seen.addresses)
    return Decision(mode, parent, section, guard_rules(config, guarded), prefix is not None)


def _parent(wishes: Wishes, seen: HostNetwork) -> Parent:
    if seen.parent is not None:
        return seen.parent
    what = (
        f"job_network_parent is {wishes.parent}, which the host does not have"
        if wishes.parent
        else "no interface has the host's first IPv4 address of cellblock_addresses"
    )
    raise RefusalError(
        f"{wishes.host}: {what}; it has {', '.join(seen.interfaces)}: set job_network_parent to one of"
        " these, or correct the addresses."
    )


def _refuse_other_addresses(wishes: Wishes, seen: HostNetwork, network: IPv4Network) -> None:
    if wishes.renumber or seen.current_range in ("", str(network)):
        return
    raise RefusalError(
        f"{wishes.host}: its jobs have the addresses {seen.current_range} ({ENGINE_CONFIG}), and by the"
        f" inventory they would get {network}, which ends running jobs; keep them by writing"
        f" cellblock_job_range as {{{wishes.host}: {seen.current_range}, ...}}, or let them change with"
        " -e job_network_renumber=true, for all slaves and the hosts that let jobs in at once."
    )


def _mode(wishes: Wishes, seen: HostNetwork, parent: Parent, misfit: SegmentProblem | None) -> Mode:
    if wishes.mode != AUTO:
        return Mode(wishes.mode)
    clone_works = seen.current is Mode.MACVLAN or not parent.clone_problem
    is_outside = misfit is not None and misfit.kind is Misfit.OUTSIDE
    can_be_cloned = clone_works and not seen.egress_problem and not is_outside
    return Mode.MACVLAN if can_be_cloned else Mode.ROUTED


def _refuse_macvlan(
    wishes: Wishes,
    seen: HostNetwork,
    parent: Parent,
    prefix: IPv6Network | None,
    network: IPv4Network,
    slots: int,
) -> None:
    if prefix is not None:
        misfit = ipv6_segment_problem(prefix, network, slots, parent.cidr_ipv6, parent.gateway_ipv6)
        if misfit:
            raise RefusalError(f"{wishes.host}: {misfit.text}.")
    if seen.egress_problem:
        raise RefusalError(
            f"{wishes.host}: its kernel lacks the netdev egress hook ({seen.egress_problem}), without"
            " which jobs' frames cannot be guarded; use Linux 5.16 or newer with"
            " CONFIG_NETFILTER_EGRESS, or set job_network_mode to routed."
        )
    if parent.clone_problem and seen.current is not Mode.MACVLAN:
        raise RefusalError(
            f"{wishes.host}: job_network_mode is macvlan, but {parent.clone_problem}; most clouds and"
            " Wi-Fi do not pass frames of other hardware addresses on: set job_network_mode to routed,"
            " or correct job_network_parent and job_network_gateway."
        )


def _refuse_to_route_ipv6(wishes: Wishes, seen: HostNetwork) -> None:
    if not seen.has_ipv6:
        raise RefusalError(
            f"{wishes.host}: jobs are to have IPv6 (cellblock_job_ipv6_prefix), but the host's kernel"
            " runs without it; boot it without ipv6.disable=1, or leave the host out of"
            " cellblock_job_ipv6_prefix."
        )
    if seen.lost_by_forwarding:
        raise RefusalError(
            f"{wishes.host}: its IPv6 default route comes from router advertisements on"
            f" {seen.lost_by_forwarding}, and the kernel drops it as soon as the host routes IPv6 for"
            f" jobs; set net.ipv6.conf.{seen.lost_by_forwarding}.accept_ra to 2 (in /etc/sysctl.d as"
            " well), or give the host a fixed route."
        )


def _is(version: int, address: str) -> bool:
    kind = IPv4Address if version == 4 else IPv6Address
    try:
        return not address or bool(kind(address))
    except ValueError:
        return False
