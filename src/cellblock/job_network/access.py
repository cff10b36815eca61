"""Whom a stage may reach: its policy made into rules, and the names that it resolves.

Nothing here touches an interface.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network

from ..errors import ForbiddenDestinationError, UnresolvedNameError, UnsupportedNetworkError
from .plan import Address, Network
from .policy import Destination, EgressRule, EgressRules, NetworkPolicy
from .section import NetworkConfig

RESOLVE_TIMEOUT_S = 5.0
"""For all host names of a stage together."""
MAX_LOOKUPS = 64
"""Host names that are being resolved at a time, of all stages: each takes a thread and sockets, and
may hang for longer than its stage waits."""
MAX_ADDRESSES = 64
"""Of one host name. Whoever runs its zone says how many it has, and every one costs a rule's element."""

_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)
_MEND = "correct the name, or name its addresses"
_LATER = "try again later, or name its addresses"
_OUTAGE = "see whether the name servers of this host answer, and try again; or name its addresses"


@dataclass(frozen=True)
class _Unresolved:
    reason: str
    remedy: str


@dataclass(frozen=True)
class Access:
    """A stage's policy, ready to be loaded: names are resolved, everything is checked."""

    policy: NetworkPolicy
    rules: EgressRules
    hosts: str
    """The job's /etc/hosts."""
    resolv_conf: str
    """The job's /etc/resolv.conf."""

    @classmethod
    def of(
        cls,
        policy: NetworkPolicy,
        wanted: Sequence[Destination],
        where: str,
        config: NetworkConfig,
        host_name: str,
        resolve: Callable[[Sequence[str], bool], Mapping[str, Sequence[Address]]] | None = None,
    ) -> Access:
        """What a stage with ``policy``, and with the list ``wanted`` if that is ``allow``, may reach; names
        in it are resolved now and pinned. ``where`` is the stage in messages.

        Raises :class:`UnsupportedNetworkError` for a policy that this host does not have,
        :class:`ForbiddenDestinationError` and :class:`UnresolvedNameError` for its allow list.
        """
        if policy is NetworkPolicy.ALLOW:
            return cls._of_list(
                wanted,
                f"{where}.network_allow",
                config,
                host_name,
                resolve or resolve_names,
            )
        rules = config.policies.get(policy)
        if rules is None:
            known = ["none", *sorted(p.value for p in config.policies), "allow"]
            raise UnsupportedNetworkError(
                f"{where}.network",
                f"is {policy.value!r}, and cellblock_job_flows opens nothing for it to jobs on {host_name}",
                f"use one of {', '.join(known)}, or give the fleet a host that serves what it names (as cache servers "
                "do) and run playbooks/site.yml",
            )
        internet = policy is NetworkPolicy.INTERNET
        return cls(
            policy=policy,
            rules=rules,
            hosts=_hosts_file(config.names),
            resolv_conf=_resolv_conf(config.resolvers if internet else ()),
        )

    @classmethod
    def _of_list(
        cls,
        wanted: Sequence[Destination],
        where: str,
        config: NetworkConfig,
        host_name: str,
        resolve: Callable[[Sequence[str], bool], Mapping[str, Sequence[Address]]],
    ) -> Access:
        denied = config.all_denied()
        names = list(dict.fromkeys(entry.name for entry in wanted if entry.name is not None))
        try:
            pinned = dict(resolve(names, config.ipv6 is not None)) if names else {}
        except UnresolvedNameError as problem:
            index = [entry.name for entry in wanted].index(problem.subject)
            raise UnresolvedNameError(
                f"{where}[{index}].to", problem.message, problem.remedy
            ) from None
        rules = []
        for index, entry in enumerate(wanted):
            networks: tuple[Network, ...]
            if entry.name is None:
                networks = (entry.network,)
            else:
                networks = tuple(ip_network(address) for address in pinned[entry.name])
            for network in networks:
                if network.version == 6 and config.ipv6 is None:
                    raise UnsupportedNetworkError(
                        f"{where}[{index}].to",
                        f"is {entry.to}, and jobs on {host_name} have no IPv6",
                        "name an IPv4 address or a host name",
                    )
                _refuse_denied(network, entry, denied, f"{where}[{index}].to")
            rules.append(EgressRule(networks, entry.protocol, entry.ports))
        return cls(
            policy=NetworkPolicy.ALLOW,
            rules=EgressRules(services=(), internet=tuple(rules)),
            hosts=_hosts_file(pinned),
            resolv_conf=_resolv_conf(()),
        )


def _refuse_denied(
    network: Network, entry: Destination, denied: Iterable[Network], where: str
) -> None:
    for other in denied:
        if network.version == other.version and network.overlaps(other):
            what = f"is {entry.to}" + ("" if entry.name is None else f" ({network[0]})")
            raise ForbiddenDestinationError(
                where,
                f"{what}, {'in' if network.prefixlen >= other.prefixlen else 'which overlaps'} "
                f"{other}, "
                "which no job may reach",
                "name public addresses only; private, link-local, metadata and the fleet's own "
                "addresses are never open to jobs",
            )


def resolve_names(names: Sequence[str], ipv6: bool) -> Mapping[str, Sequence[Address]]:
    """Addresses of ``names`` by this host's resolver, within :data:`RESOLVE_TIMEOUT_S`; those of
    IPv6 only if ``ipv6``.

    Raises :class:`UnresolvedNameError`; its subject is the name.
    """
    family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
    found: dict[str, list[Address] | _Unresolved] = {}
    # The C library's own timeouts are longer and cannot be set: whoever is late is left behind.
    threads = []
    deadline = time.monotonic() + RESOLVE_TIMEOUT_S
    for name in names:
        if not _lookups.acquire(timeout=max(0.0, deadline - time.monotonic())):
            found[name] = _Unresolved(f"{MAX_LOOKUPS} other names are being resolved", _LATER)
            continue
        thread = threading.Thread(target=_resolve, args=(name, family, found), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            _lookups.release()
            found[name] = _Unresolved("no thread can be started", _LATER)
            continue
        threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    resolved: dict[str, Sequence[Address]] = {}
    for name in names:
        answer = found.get(name) or _Unresolved(
            f"no answer within {RESOLVE_TIMEOUT_S:.0f} s", _OUTAGE
        )
        if isinstance(answer, _Unresolved):
            raise UnresolvedNameError(
                name,
                f"names {name}, which does not resolve to an {'' if ipv6 else 'IPv4 '}address "
                f"({answer.reason})",
                answer.remedy,
            )
        resolved[name] = answer
    return resolved


def _resolve(
    name: str, family: socket.AddressFamily, found: dict[str, list[Address] | _Unresolved]
) -> None:
    try:
        infos = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)
        addresses = {str(info[4][0]).partition("%")[0] for info in infos}
        if len(addresses) > MAX_ADDRESSES:
            found[name] = _Unresolved(
                f"it has {len(addresses)} of them, more than {MAX_ADDRESSES}", _MEND
            )
        else:
            found[name] = sorted(map(ip_address, addresses), key=lambda a: (a.version, int(a)))
    except OSError as problem:
        # Of gaierror, only these say that the name itself is wrong.
        is_wrong = problem.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", -5))
        found[name] = _Unresolved(str(problem.strerror), _MEND if is_wrong else _OUTAGE)
    except UnicodeError:
        found[name] = _Unresolved("it is not a host name", _MEND)
    finally:
        _lookups.release()


def _hosts_file(pinned: Mapping[str, Sequence[Address]]) -> str:
    lines = ["127.0.0.1\tlocalhost cellblock"]
    lines.append("::1\tlocalhost cellblock")
    lines += [f"{address}\t{name}" for name, addresses in pinned.items() for address in addresses]
    return "".join(f"{line}\n" for line in lines)


def _resolv_conf(resolvers: Sequence[IPv4Address]) -> str:
    if not resolvers:
        # Without a nameserver, libc would ask one on the loopback, where there is none.
        return "# This job has no name service; the names it may use are in /etc/hosts.\n"
    return "".join(f"nameserver {address}\n" for address in resolvers)
