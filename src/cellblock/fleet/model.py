"""Who may reach whom, as declared: hosts, services, named networks and the flows between them.

``parse_fleet`` turns the inventory's variables into a ``Fleet`` or raises ``FleetError`` with one
sentence that quotes the entry that is wrong. Everything else (firewall rules, the expected matrix,
the table in the documents) is derived from the ``Fleet`` and from nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from itertools import combinations
from typing import Any, ClassVar

from ..job_network.plan import (
    LONGEST_IPV6_PREFIX,
    SPECIAL_NETWORKS,
    Address,
    Network,
    ipv6_network,
)
from ..job_network.policy import DECLARED_POLICIES

# Peers of a flow that are neither a group of the inventory nor a declared network.
EVERY_HOST = "fleet"
INTERNET = "internet"
CONTROLLERS = "controllers"
CONTROLLER = "controller"
# The source of flows of the containers on slaves that have a worker container: of that one and of its own.
WORKER_CONTAINERS = "worker_containers"

# The group of the inventory whose hosts run untrusted jobs.
SLAVES_GROUP = "worker_slaves"

# The groups that roles, playbooks and flows name. One that an inventory leaves out has no hosts.
OUTSIDE_GROUP = "outside"
GROUPS = (
    SLAVES_GROUP,
    "worker_masters",
    "cache_servers",
    "databases",
    "memory_databases",
    "request_handlers",
    OUTSIDE_GROUP,
)

# Of IPv6, what may be a job's address: global unicast and unique local.
GLOBAL_UNICAST = IPv6Network("2000::/3")
UNIQUE_LOCAL = IPv6Network("fc00::/7")
# Names that mean something in flows or in the rules derived from them.
RESERVED = (
    EVERY_HOST,
    INTERNET,
    WORKER_CONTAINERS,
    "any",
    "not_internet",
    "jobs",
    "resets",
    "ipv6_routers",
)

PROTOCOLS = ("tcp", "udp", "icmp")


class FleetError(ValueError):
    """What is declared makes no sense; the text is one sentence with the entry and the remedy."""


@dataclass(frozen=True)
class Host:
    """A host of the inventory, or an address that is none of ours (``external``).

    ``owner`` names the inventory host that answers at an external address, where there is one: on
    the local fleet a host plays the internet.
    """

    name: str
    groups: tuple[str, ...]
    addresses: tuple[Address, ...]
    external: bool = False
    owner: str | None = None
    # Of an external target or a job: what is known to be served there.
    services: tuple[str, ...] = ()
    # The address is a job's, on this slave. No flow leads to jobs.
    slot_of: str | None = None


@dataclass(frozen=True)
class Service:
    """What the hosts of some groups serve, at which port; ``port`` is None for icmp (echo)."""

    name: str
    groups: tuple[str, ...]
    protocol: str
    port: int | None
    # Whether a flow of jobs may name it.
    jobs: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.protocol}{'' if self.port is None else f' {self.port}'})"


@dataclass(frozen=True)
class Flow:
    """One declared permission: ``source`` may open connections to ``destination``'s services."""

    index: int
    source: str
    destination: str
    services: tuple[str, ...]
    purpose: str = ""

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}: {', '.join(self.services)}"


@dataclass(frozen=True)
class Fleet:
    """Everything declared, checked."""

    hosts: Mapping[str, Host]
    services: Mapping[str, Service]
    networks: Mapping[str, tuple[Network, ...]]
    flows: tuple[Flow, ...]
    # Flows of jobs by policy; their source is the policy's name.
    job_flows: Mapping[str, tuple[Flow, ...]] = field(default_factory=dict)
    # Groups of the inventory (name -> hosts), those without hosts as well.
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # The addresses that each slave gives its jobs.
    job_networks: Mapping[str, IPv4Network] = field(default_factory=dict)
    # Of slaves whose jobs have IPv6 besides: what their addresses begin with.
    job_ipv6_prefixes: Mapping[str, IPv6Network] = field(default_factory=dict)
    # The slaves that have a worker container.
    worker_containers: tuple[str, ...] = ()
    slaves_group: ClassVar[str] = SLAVES_GROUP
    outside_group: str = OUTSIDE_GROUP

    @cached_property
    def job_ipv6_networks(self) -> Mapping[str, IPv6Network]:
        """The IPv6 addresses that each slave gives its jobs, of those that give any."""
        return {
            slave: ipv6_network(prefix, self.job_networks[slave])
            for slave, prefix in self.job_ipv6_prefixes.items()
        }

    def networks_of_jobs(self) -> tuple[Network, ...]:
        """All addresses of jobs, IPv4 first."""
        return (*self.job_networks.values(), *self.job_ipv6_networks.values())

    def fleet_hosts(self) -> tuple[Host, ...]:
        """The hosts that are the fleet: neither external nor a stand-in for the outside."""
        return tuple(
            host
            for host in self.hosts.values()
            if not host.external and host.slot_of is None and self.outside_group not in host.groups
        )

    def members(self, peer: str) -> tuple[Host, ...]:
        """The inventory's hosts that a flow's peer means; none for a network."""
        if peer == EVERY_HOST:
            return self.fleet_hosts()
        if peer in self.networks or peer == INTERNET:
            return ()
        return tuple(host for host in self.fleet_hosts() if peer in host.groups)

    def serving(self, service: str) -> tuple[Host, ...]:
        """The hosts and external targets at which ``service`` is to be tried."""
        declared = self.services[service]
        inside = [
            host
            for host in self.fleet_hosts()
            if EVERY_HOST in declared.groups or set(declared.groups) & set(host.groups)
        ]
        others = [h for h in self.hosts.values() if service in h.services]
        return tuple(inside + others)

    def is_internet(self, address: Address) -> bool:
        """Whether an address is public and not one of the fleet's own."""
        if any(address in network for network in SPECIAL_NETWORKS):
            return False
        ours = any(address in host.addresses for host in self.fleet_hosts())
        ours = ours or any(address in network for network in self.networks_of_jobs())
        return not ours and not any(
            address in network for networks in self.networks.values() for network in networks
        )

    def allowing(self, source: str, destination: str, service: str) -> Flow | None:
        """The first flow that lets host ``source`` (or ``controller``) use ``service`` there."""
        for flow in self.flows:
            if (
                service in flow.services
                and self._is_source(flow.source, source)
                and self._is_destination(flow.destination, self.hosts[destination])
            ):
                return flow
        return None

    def allowing_job(self, policy: str, destination: str, service: str) -> Flow | None:
        """The first flow that lets jobs with a network policy use ``service`` there."""
        for flow in self.job_flows.get(policy, ()):
            if service in flow.services and self._is_destination(
                flow.destination, self.hosts[destination]
            ):
                return flow
        return None

    def allowing_container(self, destination: str, service: str) -> Flow | None:
        """The first flow that lets worker containers and their own containers use ``service`` there."""
        for flow in self.flows:
            if (
                flow.source == WORKER_CONTAINERS
                and service in flow.services
                and self._is_destination(flow.destination, self.hosts[destination])
            ):
                return flow
        return None

    def opens_nothing(self, policy: str) -> bool:
        """Whether flows are declared for the jobs' policy, but nobody serves what they name: a job with
        it would find out by an error of its own.
        """
        flows = self.job_flows[policy]
        return bool(flows) and not any(
            flow.destination == INTERNET
            or any(
                host in self.serving(service)
                for service in flow.services
                for host in self.members(flow.destination)
            )
            for flow in flows
        )

    def job_resolvers(self) -> list[str]:
        """Where jobs ask for names: the IPv4 addresses of what their policies name on port 53."""
        return sorted(
            {
                str(address)
                for flows in self.job_flows.values()
                for flow in flows
                for service in flow.services
                if self.services[service].port == 53
                for host in self.members(flow.destination)
                if host in self.serving(service)
                for address in host.addresses
                if address.version == 4
            }
        )

    def _is_source(self, peer: str, source: str) -> bool:
        if source == CONTROLLER:
            return peer == CONTROLLERS
        host = self.hosts[source]
        if host in self.members(peer):
            return True
        networks = self.networks.get(peer, ())
        return bool(networks) and any(a in network for a in host.addresses for network in networks)

    def _is_destination(self, peer: str, host: Host) -> bool:
        if host.slot_of is not None:
            return False
        if peer == INTERNET:
            return all(self.is_internet(address) for address in host.addresses)
        if peer in self.networks:
            return all(any(a in n for n in self.networks[peer]) for a in host.addresses)
        return host in self.members(peer)


def parse_fleet(data: Mapping[str, Any]) -> Fleet:
    """Checks what is declared and returns it as a ``Fleet``.

    ``data``: ``groups`` {group: [host]}, ``addresses`` {host: [IPv4 or IPv6 literal]}, ``services``
    {name: {groups, protocol, port, jobs}}, ``networks`` {name: [CIDR]}, ``flows`` [{from, to,
    services, purpose}], ``job_flows`` {policy: [{to, services}]}, ``external`` {name: {addresses,
    services, owner}}, ``job_networks`` {slave: CIDR}, ``job_ipv6_prefixes`` {slave: CIDR},
    ``worker_containers`` [slave], ``outside_group``. Or only ``problem``: what was found wrong while that was put together.
    """
    if "problem" in data:
        raise FleetError(data["problem"])
    groups = {name: tuple(hosts) for name, hosts in data["groups"].items()}
    for name in groups:
        if name in RESERVED:
            raise FleetError(
                f"the group {name!r} of the inventory: flows and rules use that name for something"
                " else; rename the group"
            )
    slaves = groups.get(SLAVES_GROUP, ())
    outside = data.get("outside_group", OUTSIDE_GROUP)
    networks = _networks(data.get("networks") or {}, groups)
    services = _services(data.get("services") or {}, groups)
    hosts = {**_hosts(data["addresses"], groups), **_external(data, services)}
    for host in slaves:
        if problem := slave_problem(host, groups):
            raise FleetError(problem)
    job_networks = _job_networks(data.get("job_networks") or {}, slaves)
    fleet = Fleet(
        hosts=hosts,
        services=services,
        networks=networks,
        flows=tuple(
            _flow("cellblock_flows", index, entry, services, networks, groups, None)
            for index, entry in enumerate(_list(data.get("flows"), "cellblock_flows"), start=1)
        ),
        job_flows={
            policy: tuple(
                _job_flow(policy, index, entry, services, networks, groups)
                for index, entry in enumerate(
                    _list(entries, f"cellblock_job_flows.{policy}"), start=1
                )
            )
            for policy, entries in _job_policies(data.get("job_flows") or {}).items()
        },
        groups=groups,
        job_networks=job_networks,
        job_ipv6_prefixes=_job_ipv6_prefixes(
            data.get("job_ipv6_prefixes") or {}, slaves, job_networks
        ),
        worker_containers=tuple(data.get("worker_containers") or ()),
        outside_group=outside,
    )
    _refuse_more_than_slaves_may(fleet)
    _refuse_shared_addresses(fleet)
    _refuse_shared_job_networks(fleet)
    _refuse_internet_without_resolver(fleet)
    return fleet


def slave_problem(host: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """Why ``host`` may not run untrusted jobs, or None: slaves are presumed hostile, so one that is in
    any other group of the inventory (``groups``, {name: hosts}) is refused.
    """
    own = {group for group, members in groups.items() if host in members}
    others = sorted(own - {SLAVES_GROUP, "all", "ungrouped"})
    if SLAVES_GROUP not in own or not others:
        return None
    return (
        f"{host}: in the group {SLAVES_GROUP} and also in {', '.join(others)}; a host that runs"
        " untrusted jobs may have no other purpose: take it out of one of them"
    )


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FleetError(f"{name} is {value!r}: write a mapping of names")
    return value


def _list(value: Any, name: str) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FleetError(f"{name} is {value!r}: write a list")
    return value


def _refuse_unknown_keys(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(entry) - known):
        raise FleetError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )


def _hosts(
    addresses: Mapping[str, Sequence[str]], groups: Mapping[str, tuple[str, ...]]
) -> dict[str, Host]:
    hosts = {}
    for name, literals in addresses.items():
        where = f"{name}: cellblock_addresses"
        if name in (CONTROLLER, "localhost"):
            raise FleetError(
                f"a host of the fleet is named {name!r}: rename it, that is the controller"
            )
        parsed = []
        for literal in _list(literals, where):
            try:
                address = ip_address(literal)
            except ValueError:
                raise FleetError(
                    f"{where} names {literal!r}, which is no IPv4 or IPv6 address: write the"
                    " addresses that the host has on the fleet's networks"
                ) from None
            if address.is_loopback or address.is_unspecified or address.is_multicast:
                raise FleetError(
                    f"{where} names {literal}, at which no other host can reach it: write the"
                    " addresses that the host has on the fleet's networks"
                )
            if address.is_link_local:
                raise FleetError(
                    f"{where} names the link-local address {literal}: leave it out, no flow may"
                    " rest on link-local addresses"
                )
            parsed.append(address)
        if not parsed:
            raise FleetError(f"{where} is empty: write at least one address")
        member_of = tuple(sorted(group for group, members in groups.items() if name in members))
        hosts[name] = Host(name, member_of, tuple(parsed))
    return hosts


def _external(data: Mapping[str, Any], services: Mapping[str, Service]) -> dict[str, Host]:
    targets = {}
    for name, entry in _mapping(data.get("external") or {}, "cellblock_external_targets").items():
        where = f"cellblock_external_targets.{name}"
        _refuse_unknown_keys(entry, {"addresses", "services", "owner"}, where)
        if name in data["addresses"]:
            raise FleetError(f"{where}: a host of the inventory has that name; choose another")
        try:
            addresses = tuple(ip_address(a) for a in _list(entry.get("addresses"), where))
        except ValueError as error:
            raise FleetError(f"{where}: {error}; write addresses") from None
        served = tuple(_list(entry.get("services"), where))
        for service in served:
            if service not in services:
                raise FleetError(f"{where}: unknown service {service!r}; {_known(services)}")
        owner = entry.get("owner")
        if owner is not None and owner not in data["addresses"]:
            raise FleetError(f"{where}: owner {owner!r} is no host of the inventory")
        targets[name] = Host(name, (), addresses, external=True, owner=owner, services=served)
    return targets


def _networks(
    declared: Mapping[str, Any], groups: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Network, ...]]:
    networks: dict[str, tuple[Network, ...]] = {}
    for name, cidrs in _mapping(declared, "cellblock_networks").items():
        where = f"cellblock_networks.{name}"
        if name in groups or name in RESERVED:
            raise FleetError(f"{where}: a group or a built-in peer has that name; choose another")
        parsed = []
        for cidr in _list(cidrs, where):
            try:
                parsed.append(ip_network(cidr))
            except ValueError as error:
                raise FleetError(
                    f"{where}: {cidr!r} is no network ({error}); write an address or CIDR such as"
                    " 192.0.2.0/24"
                ) from None
        networks[name] = tuple(parsed)
    for (first, some), (second, others) in combinations(networks.items(), 2):
        for network in some:
            for other in others:
                if network.version == other.version and network.overlaps(other):
                    raise FleetError(
                        f"cellblock_networks.{second}: {other} overlaps {network} of"
                        f" cellblock_networks.{first}; an address may belong to one network only"
                    )
    return networks


def _services(
    declared: Mapping[str, Any], groups: Mapping[str, tuple[str, ...]]
) -> dict[str, Service]:
    services = {}
    for name, entry in _mapping(declared, "cellblock_services").items():
        where = f"cellblock_services.{name}"
        _mapping(entry, where)
        _refuse_unknown_keys(entry, {"groups", "protocol", "port", "jobs"}, where)
        served_by = tuple(_list(entry.get("groups"), f"{where}.groups"))
        for group in served_by:
            if group != EVERY_HOST and group not in groups:
                raise FleetError(f"{where}: unknown group {group!r}; {_known(groups, EVERY_HOST)}")
        protocol, port = entry.get("protocol"), entry.get("port")
        if protocol not in PROTOCOLS:
            raise FleetError(
                f"{where}: protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}"
            )
        if protocol == "icmp" and port is not None:
            raise FleetError(f"{where}: icmp has no ports; leave port out")
        if protocol != "icmp" and (
            isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535
        ):
            raise FleetError(f"{where}: port is {port!r}; write a number from 1 to 65535")
        services[name] = Service(name, served_by, protocol, port, bool(entry.get("jobs", False)))
    return services


def _known(names: Mapping[str, Any], *more: str) -> str:
    return "known are " + ", ".join(sorted([*names, *more]))


def _flow(
    variable: str,
    index: int,
    entry: Any,
    services: Mapping[str, Service],
    networks: Mapping[str, Any],
    groups: Mapping[str, Any],
    source: str | None,
) -> Flow:
    where = f"{variable}, entry {index} ({_quoted(entry)})"
    _mapping(entry, where)
    known = {"to", "services", "purpose"} | (set() if source else {"from"})
    _refuse_unknown_keys(entry, known, where)
    source = source or _peer(entry, "from", where, networks, groups)
    destination = _peer(entry, "to", where, networks, groups)
    named = tuple(_list(entry.get("services"), f"{where}: services"))
    if not named:
        raise FleetError(f"{where}: names no services; {_known(services)}")
    for name in named:
        if name not in services:
            raise FleetError(f"{where}: unknown service {name!r}; {_known(services)}")
        served_by = services[name].groups
        inside = destination == EVERY_HOST or destination in groups
        if inside and EVERY_HOST not in served_by and destination not in served_by:
            raise FleetError(
                f"{where}: {destination} does not serve {name!r} (cellblock_services.{name}.groups);"
                " name a service of the destination"
            )
    return Flow(index, source, destination, named, str(entry.get("purpose", "")))


def _quoted(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return repr(entry)
    return ", ".join(f"{key}: {_plain(value)}" for key, value in entry.items() if key != "purpose")


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(str(item) for item in value)}]"
    return str(value)


def _peer(
    entry: Mapping[str, Any],
    key: str,
    where: str,
    networks: Mapping[str, Any],
    groups: Mapping[str, Any],
) -> str:
    peer = entry.get(key)
    if peer == INTERNET and key == "from":
        raise FleetError(
            f"{where}: the internet may not be a source; declare the addresses in"
            " cellblock_networks and name that network"
        )
    built_in = (EVERY_HOST, INTERNET, *([WORKER_CONTAINERS] if key == "from" else []))
    if peer not in groups and peer not in networks and peer not in built_in:
        raise FleetError(
            f"{where}: {key} names the unknown group {peer!r};"
            f" {_known({**groups, **networks}, *built_in)}"
        )
    return str(peer)


def _job_policies(declared: Any) -> Mapping[str, Any]:
    known = [policy.value for policy in DECLARED_POLICIES]
    for policy in _mapping(declared, "cellblock_job_flows"):
        if policy not in known:
            raise FleetError(
                f"cellblock_job_flows.{policy}: there is no such policy; known are {', '.join(known)}"
            )
    return declared  # type: ignore[no-any-return]


def _job_flow(
    policy: str,
    index: int,
    entry: Any,
    services: Mapping[str, Service],
    networks: Mapping[str, Any],
    groups: Mapping[str, Any],
) -> Flow:
    flow = _flow(
        f"cellblock_job_flows.{policy}", index, entry, services, networks, groups, source=policy
    )
    if flow.destination == INTERNET:
        return flow
    for name in flow.services:
        if (
            flow.destination == EVERY_HOST
            or flow.destination in networks
            or not services[name].jobs
        ):
            raise FleetError(
                f"cellblock_job_flows.{policy}, entry {index} ({_quoted(entry)}): would let a job"
                f" reach {name} of {flow.destination}; jobs may reach services with `jobs: true`"
                " (of the cache servers) and the internet, nothing else of the fleet"
            )
    return flow


def _job_networks(declared: Mapping[str, Any], slaves: Sequence[str]) -> dict[str, IPv4Network]:
    networks: dict[str, IPv4Network] = {}
    for slave, cidr in declared.items():
        if slave not in slaves:
            raise FleetError(f"{slave}: has a network for jobs but is no slave; remove it")
        try:
            network = ip_network(cidr)
        except ValueError as error:
            raise FleetError(
                f"{slave}: its range for jobs {cidr!r} is no network ({error}); write a CIDR such"
                " as 192.0.2.128/27"
            ) from None
        if not isinstance(network, IPv4Network):
            raise FleetError(
                f"{slave}: its range for jobs {network} is not IPv4; write a CIDR such as"
                " 192.0.2.128/27, and what is IPv6 as cellblock_job_ipv6_prefix"
            )
        networks[slave] = network
    return networks


def _job_ipv6_prefixes(
    declared: Mapping[str, Any], slaves: Sequence[str], ranges: Mapping[str, IPv4Network]
) -> dict[str, IPv6Network]:
    prefixes: dict[str, IPv6Network] = {}
    for slave, cidr in declared.items():
        if slave not in slaves:
            raise FleetError(f"{slave}: has an IPv6 prefix for jobs but is no slave; remove it")
        if slave not in ranges:
            raise FleetError(
                f"{slave}: has an IPv6 prefix for jobs but no range of IPv4 addresses, which they are"
                " made from; give it one in cellblock_job_range, or no cellblock_job_ipv6_prefix"
            )
        where = f"{slave}: its IPv6 prefix for jobs (cellblock_job_ipv6_prefix)"
        try:
            prefix = ip_network(cidr)
        except ValueError as error:
            raise FleetError(
                f"{where} {cidr!r} is no network ({error}); write one such as 2001:db8:1:2::/64"
            ) from None
        if not isinstance(prefix, IPv6Network):
            raise FleetError(f"{where} {prefix} is not IPv6; write one such as 2001:db8:1:2::/64")
        if prefix.prefixlen > LONGEST_IPV6_PREFIX:
            raise FleetError(
                f"{where} {prefix} leaves no room for the 32 bits of an IPv4 address; write one of at"
                f" most /{LONGEST_IPV6_PREFIX}"
            )
        special = any(prefix.overlaps(n) for n in SPECIAL_NETWORKS if isinstance(n, IPv6Network))
        if not prefix.subnet_of(UNIQUE_LOCAL) and (special or not prefix.subnet_of(GLOBAL_UNICAST)):
            raise FleetError(
                f"{where} {prefix} is neither global unicast nor unique local; write one of your own"
                f" within {GLOBAL_UNICAST} or {UNIQUE_LOCAL}"
            )
        prefixes[slave] = prefix
    return prefixes


def _refuse_shared_job_networks(fleet: Fleet) -> None:
    taken: list[tuple[str, Network]] = [
        (f"{host.name}'s address", ip_network(address))
        for host in fleet.hosts.values()
        for address in host.addresses
    ]
    taken += [
        (f"cellblock_networks.{name}", network)
        for name, networks in fleet.networks.items()
        for network in networks
    ]
    ranges: list[tuple[str, Network, str]] = [
        *((slave, n, "range for jobs") for slave, n in fleet.job_networks.items()),
        *((slave, n, "IPv6 range for jobs") for slave, n in fleet.job_ipv6_networks.items()),
    ]
    for slave, network, kind in ranges:
        for what, other in taken:
            if network.version == other.version and network.overlaps(other):
                choose = (
                    "a range in which no address is used"
                    if network.version == 4
                    else "a cellblock_job_ipv6_prefix where none of these is used"
                )
                raise FleetError(
                    f"{slave}: its {kind} {network} overlaps {what} {other}; choose {choose}"
                )
        taken.append((f"{slave}'s {kind}", network))


def _refuse_internet_without_resolver(fleet: Fleet) -> None:
    """The engine would not start with it."""
    if fleet.job_networks and "internet" in fleet.job_flows and not fleet.job_resolvers():
        raise FleetError(
            "cellblock_job_flows.internet: no policy names a resolver for jobs (a service on port 53 of"
            " a group that has hosts); add a host that serves it, or leave the policy internet out"
        )


def _refuse_more_than_slaves_may(fleet: Fleet) -> None:
    """What leaves a container has its slave's address, so nobody else can let in more than what slaves may."""
    for flow in fleet.flows:
        if flow.source != WORKER_CONTAINERS:
            continue
        for slave in fleet.worker_containers:
            own = [
                f
                for f in fleet.flows
                if f.source != WORKER_CONTAINERS and fleet.hosts[slave] in fleet.members(f.source)
            ]
            for service in flow.services:
                if not any(
                    service in f.services and f.destination in (flow.destination, EVERY_HOST)
                    for f in own
                ):
                    raise FleetError(
                        f"cellblock_flows, entry {flow.index} ({flow}): {slave} itself may not use {service}"
                        " there, and its containers have its address; declare a flow from"
                        " worker_slaves, or leave this one out"
                    )


def _refuse_shared_addresses(fleet: Fleet) -> None:
    owners: dict[Address, str] = {}
    for host in fleet.hosts.values():
        for address in host.addresses:
            if address in owners:
                raise FleetError(
                    f"{host.name}: its address {address} is also {owners[address]}'s; give each"
                    " host its own"
                )
            owners[address] = host.name
    for name, network, host_name, address in _hosts_in_networks(fleet):
        raise FleetError(
            f"cellblock_networks.{name}: {network} contains the address {address} of"
            f" {host_name}; a network may not overlap the fleet's hosts"
        )


def _hosts_in_networks(fleet: Fleet) -> Iterator[tuple[str, Network, str, Address]]:
    for name, networks in fleet.networks.items():
        for network in networks:
            for host in fleet.fleet_hosts():
                for address in host.addresses:
                    # A controller may itself be a host of the fleet; then it is that one address.
                    whole = network.num_addresses == 1 and name == CONTROLLERS
                    if address in network and not whole:
                        yield name, network, host.name, address
