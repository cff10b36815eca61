"""Network slots: namespaces with one address each, made ahead of the stages that run in them.

A slot is closed (its filter drops everything) until :meth:`Slot.open` loads a stage's policy in one
transaction. It serves one stage; then it is removed and one with the same address is made anew, so
that nothing of a job is ever seen by the next: no socket, counter, neighbour or tracked connection.

The namespaces belong to the host's user namespace: a job has no power over the rules around it. They
have no name and live by the service's descriptors, so that they end with the service.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from ..errors import Cancelled, HostSetupError
from ..linux.netlink import (
    Link,
    Netlink,
    NetlinkError,
    inside,
    new_namespace,
    new_namespace_of,
)
from ..linux.nft import Nft, NftError
from .access import Access
from .ending import end_connections
from .plan import HOST_END, INTERFACE, ROUTED_GATEWAY, ROUTED_GATEWAY_IPV6, Mode, host_end
from .policy import Destination, NetworkPolicy
from .rules import TrafficLimits, closed_rules, open_rules
from .section import NetworkConfig

TAKE_TIMEOUT_S = 10.0
"""How long a stage may wait for a slot that is being made; admission has seen to it that one is."""
RETRY_S = 2.0
"""How long after a failure the next attempt to make a slot is."""
_KEEPERS = 2
_KEPT_CONTEXTS = 64
"""With more slots than that, those that wait have no filter context: one takes 0.6 MiB, ten times
what else a slot takes here, and saves the first command of a stage 0.7 ms."""
_POLL_S = 0.1
_RECORD_S = 0.01
_GUARD_SEEN_S = 0.02
_ADDRESS_BUSY_S = 10.0
_log = logging.getLogger("cellblock")

# Before there is an interface, so that none ever has an address of its own making.
# On the loopback programs find both versions of IP, as with no network at all; `all` comes first, since it sets
# every one.
_SYSCTLS_WITHOUT_IPV6 = {
    f"ipv6/conf/{name}/disable_ipv6": value
    for name, value in (("all", "1"), ("default", "1"), ("lo", "0"))
}
# One address, which we give it; no link-local one, and nothing that a router says.
_SYSCTLS_WITH_IPV6 = {
    f"ipv6/conf/{name}/{key}": value
    for name in ("all", "default")
    for key, value in {
        "disable_ipv6": "0",
        "forwarding": "0",
        "accept_ra": "0",
        "autoconf": "0",
        "accept_redirects": "0",
        "accept_source_route": "-1",
        "addr_gen_mode": "1",
    }.items()
}
_SYSCTLS = {
    "ipv4/ip_forward": "0",
    "ipv4/ping_group_range": "1 0",
    # Refusals are ICMP errors, to the job itself and nobody else; without a limit each of them is told at once.
    "ipv4/icmp_ratemask": "0",
    **{
        f"ipv4/conf/{name}/{key}": value
        for name in ("all", "default")
        for key, value in {
            "rp_filter": "1",
            "accept_redirects": "0",
            "send_redirects": "0",
            "accept_source_route": "0",
            "route_localnet": "0",
            "arp_ignore": "1",
            "arp_announce": "2",
        }.items()
    },
}
_HOST_END_WITH_IPV6 = {
    "disable_ipv6": "0",
    "accept_ra": "0",
    "accept_redirects": "0",
    "addr_gen_mode": "1",
}
# A packet from the middle of an unknown connection is none of the job's.
_CONNTRACK_SYSCTLS = {"netfilter/nf_conntrack_tcp_loose": "0"}
_COUNTERS = {"sent", "received", "refused", "throttled", "over_bytes", "over_connections"}
# Sockets that a job left unsent data in would keep the namespace for minutes.
_END_SYSCTLS = {"ipv4/tcp_orphan_retries": "1", "ipv4/tcp_fin_timeout": "1"}


@dataclass(frozen=True)
class Traffic:
    """What went through a slot, from its filter's counters: IP packets, headers included.

    Segments that the kernel hands over as one packet count as one. ``refused`` is what the policy
    forbade, ``throttled`` what the limits of bandwidth and of new connections dropped.
    """

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int
    refused_packets: int
    throttled_packets: int
    over_bytes: int
    """Refused by the byte quota."""
    over_bytes_packets: int
    over_connections: int
    """Packets that would have opened one connection too many."""


class Slot:
    """One network namespace with its address and filter; made by :class:`SlotPool` only."""

    def __init__(
        self,
        index: int,
        config: NetworkConfig,
        host: Netlink,
        directory: Path,
        owner: int | None = None,
    ) -> None:
        """Makes it, closed. ``host`` is a socket in the host's namespace. It belongs to the user namespace of the
        process ``owner``, or else to this one's."""
        self._nft: Nft | None = None
        self._opened = self._closed = False
        self.index = index
        self.owner = owner
        self._config = config
        self.address: IPv4Address = config.address(index)
        self.ipv6_address: IPv6Address | None = config.ipv6_address(index)
        self._directory = directory
        self._cleanup = contextlib.ExitStack()
        try:
            self.namespace = new_namespace() if owner is None else new_namespace_of(owner)
            self._cleanup.callback(os.close, self.namespace)
            self._cleanup.callback(self._forget_filter)
            with inside(self.namespace):
                _write_sysctls(
                    _SYSCTLS
                    | (_SYSCTLS_WITHOUT_IPV6 if config.ipv6 is None else _SYSCTLS_WITH_IPV6)
                )
                self._netlink = Netlink()
                self._cleanup.callback(self._netlink.close)
            _set_up(self._netlink, "lo")
            self._connect(config, host)
            with inside(self.namespace), contextlib.suppress(FileNotFoundError):
                _write_sysctls(_CONNTRACK_SYSCTLS)
        except BaseException:
            self._cleanup.close()
            raise

    @property
    def files(self) -> tuple[tuple[Path, str], ...]:
        """Files of the host that the jail gets, and where."""
        return (
            (self._directory / "hosts", "/etc/hosts"),
            (self._directory / "resolv.conf", "/etc/resolv.conf"),
        )

    def open(self, access: Access, limits: TrafficLimits) -> None:
        """Lets ``access`` through, in one transaction; raises :class:`HostSetupError`."""
        (self._directory / "hosts").write_text(access.hosts)
        (self._directory / "resolv.conf").write_text(access.resolv_conf)
        self._opened = True
        try:
            self._filter().run(open_rules(self._config, access, limits))
        except NftError as problem:
            raise HostSetupError(
                f"network slot {self.index}",
                f"cannot be given its rules: {problem}",
                "see whether this kernel has nf_tables with quota, limit, connlimit and reject",
            ) from None

    def traffic(self) -> Traffic:
        """What went through it so far; raises :class:`HostSetupError`."""
        try:
            listed = self._filter().ask("list counters table inet cellblock")
        except NftError as problem:
            raise HostSetupError(
                f"network slot {self.index}",
                f"has lost its filter: {problem}",
                "nobody but the engine may change what is in its namespaces",
            ) from None
        packets = {e["counter"]["name"]: e["counter"]["packets"] for e in listed}
        size = {e["counter"]["name"]: e["counter"]["bytes"] for e in listed}
        if not set(packets) >= _COUNTERS:
            # Root of the worker container, in a namespace of its own.
            raise HostSetupError(
                f"network slot {self.index}",
                f"has lost its counters {', '.join(sorted(_COUNTERS - set(packets)))}",
                "nobody but the engine may change what is in its namespaces",
            )
        return Traffic(
            sent_bytes=size["sent"],
            sent_packets=packets["sent"],
            received_bytes=size["received"],
            received_packets=packets["received"],
            refused_packets=packets["refused"],
            throttled_packets=packets["throttled"],
            over_bytes=size["over_bytes"],
            over_bytes_packets=packets["over_bytes"],
            over_connections=packets["over_connections"],
        )

    def is_sound(self) -> bool:
        """Whether its interface is still there: with its parent, the kernel removes the clones."""
        try:
            link = self._netlink.link(INTERFACE)
        except OSError:
            return False
        return link is not None and link.up

    def close(self) -> None:
        """Removes it, having ended the connections that its stage left open. Its address is free for another
        slot then, whoever is still inside."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._opened:
                self._end_connections()
            with contextlib.suppress(OSError):
                with inside(self.namespace):
                    _write_sysctls(_END_SYSCTLS)
                link = self._netlink.link(INTERFACE)
                if link is not None:
                    self._netlink.delete(link.index)
        finally:
            self._cleanup.close()

    def _end_connections(self) -> None:
        try:
            with inside(self.namespace):
                left = end_connections(self._filter())
        except (OSError, NftError) as problem:
            _log.warning("network slot %d: connections cannot be ended: %s", self.index, problem)
        else:
            if left:
                _log.info("network slot %d: %d connections got no answer", self.index, left)

    def _connect(self, config: NetworkConfig, host: Netlink) -> None:
        mac = bytes.fromhex(config.mac(self.index).replace(":", ""))
        if config.mode is Mode.MACVLAN:
            parent = host.link(config.parent) or _make_parent(config, host)
            if parent is None:
                raise HostSetupError(
                    f"interface {config.parent}",
                    "is missing, which the job network is made of",
                    "run the job_network role on this host, or bring the interface up",
                )
            host.add_macvlan(parent.index, INTERFACE, mac, self.namespace)
        else:
            self._connect_routed(config, host, mac)
        # From here on a failure must take the interface with it: its address is to be free again.
        self._cleanup.callback(self._delete_interface)
        link = self._netlink.link(INTERFACE)
        if link is None:
            raise NetlinkError(errno.ENODEV, f"{INTERFACE} vanished")
        self._filter().run(closed_rules(config, self.index))
        if config.slots > _KEPT_CONTEXTS:
            self._forget_filter()
        self._netlink.add_address(link.index, self.address, config.prefix_length)
        _retry_while_busy(lambda: self._netlink.set_up(link.index))
        self._netlink.add_default_route(link.index, config.gateway)
        if config.ipv6 is not None and self.ipv6_address is not None:
            self._netlink.add_address(link.index, self.ipv6_address, config.ipv6.prefix_length)
            self._netlink.add_default_route(link.index, config.ipv6.gateway)

    def _connect_routed(self, config: NetworkConfig, host: Netlink, mac: bytes) -> None:
        name = host_end(self.index)
        host.add_veth(name, INTERFACE, mac, self.namespace)
        try:
            _write_sysctls(
                {
                    **(
                        {f"ipv6/conf/{name}/disable_ipv6": "1"}
                        if config.ipv6 is None
                        else {
                            f"ipv6/conf/{name}/{key}": value
                            for key, value in _HOST_END_WITH_IPV6.items()
                        }
                    ),
                    f"ipv4/conf/{name}/rp_filter": "1",
                    f"ipv4/conf/{name}/accept_redirects": "0",
                    f"ipv4/conf/{name}/send_redirects": "0",
                }
            )
            index = _set_up(host, name)
            host.add_address(index, ROUTED_GATEWAY, 32)
            host.add_host_route(index, self.address)
            if self.ipv6_address is not None:
                host.add_address(index, ROUTED_GATEWAY_IPV6, 64)
                host.add_host_route(index, self.ipv6_address)
        except BaseException:
            self._delete_interface()
            raise

    def _filter(self) -> Nft:
        if self._nft is None:
            with inside(self.namespace):
                self._nft = Nft()
        return self._nft

    def _forget_filter(self) -> None:
        if self._nft is not None:
            self._nft.close()
            self._nft = None

    def _delete_interface(self) -> None:
        with contextlib.suppress(OSError):
            link = self._netlink.link(INTERFACE)
            if link is not None:
                self._netlink.delete(link.index)


class SlotPool:
    """All slots of this host: kept ready, given out, removed and made again in the background."""

    def __init__(self, config: NetworkConfig, directory: Path) -> None:
        """Clears what an earlier service left and begins to make the slots.

        Raises :class:`HostSetupError` when the filter library is missing.
        """
        self.config = config
        self._directory = directory
        self._guard = Nft()
        self._guarded_until = 0.0
        self._changed = threading.Condition()
        self._absent = collections.deque(range(config.slots))
        self._ready: collections.deque[Slot] = collections.deque()
        self._used: collections.deque[Slot] = collections.deque()
        self._problem: HostSetupError | None = None
        self._closing = False
        directory.mkdir(mode=0o755, exist_ok=True)
        for index in range(config.slots):
            (directory / str(index)).mkdir(mode=0o755, exist_ok=True)
        _remove_leftovers()
        self._keepers = [
            threading.Thread(target=self._keep, name=f"slots-{n}", daemon=True)
            for n in range(_KEEPERS)
        ]
        for keeper in self._keepers:
            keeper.start()

    def require_ready(self) -> None:
        """Raises :class:`HostSetupError` while no job with a network may start here."""
        with self._changed:
            if self._problem is not None and not self._ready:
                raise self._problem
        self.require_guard()

    def require_guard(self) -> None:
        """Raises :class:`HostSetupError` unless the host's own rules are in place.

        They are the layer around the slots' own filters: running jobs stay filtered without them,
        but none is started.
        """
        wanted = set(self.config.guard_tables)
        # A job asks several times on its way; its own last answer is good enough.
        if not wanted or time.monotonic() < self._guarded_until:
            return
        try:
            listed = self._guard.ask("list chains")
        except NftError as problem:
            raise HostSetupError(
                "the host's firewall", f"cannot be read: {problem}", "see the service's journal"
            ) from None
        hooked = {
            (chain["family"], chain["table"])
            for entry in listed
            if (chain := entry.get("chain")) and "hook" in chain
        }
        for family, name in sorted(wanted - hooked):
            raise HostSetupError(
                f"table {family} {name}",
                "is not loaded on this host, and no job with a network starts without it",
                "run playbooks/site.yml, or start the unit that loads it",
            )
        self._guarded_until = time.monotonic() + _GUARD_SEEN_S

    def reconfigure(self, config: NetworkConfig) -> None:
        """Slots are made by ``config`` from now on, and those that wait are made anew; it may differ from the
        one before in what is denied only. Those in use stay as they are until their stage ends.
        """
        with self._changed:
            self.config = config
            self._used.extend(self._ready)
            self._ready.clear()
            self._changed.notify_all()

    @contextlib.contextmanager
    def take(
        self,
        access: Access,
        limits: TrafficLimits,
        cancelled: Callable[[], bool],
        owner: int | None = None,
    ) -> Iterator[Slot]:
        """An open slot, for one use; raises :class:`HostSetupError` or :class:`Cancelled`.

        With ``owner`` it belongs to the user namespace of that process, which could not enter others, and could change
        it: nobody else gets it.

        The one that was unused for longest comes first: what is still under way to an address
        should find nobody there.
        """
        slot = self._take(cancelled, owner)
        try:
            if slot.owner != owner:
                slot = self._made_for(owner, slot)
            self.require_guard()
            slot.open(access, limits)
            yield slot
        finally:
            with self._changed:
                self._used.append(slot)
                self._changed.notify_all()

    def _made_for(self, owner: int | None, slot: Slot) -> Slot:
        """In the place of ``slot``, with its address. What follows it in that place is made for the same owner."""
        slot.close()
        host = Netlink()
        try:
            return Slot(slot.index, self.config, host, self._directory / str(slot.index), owner)
        except (OSError, NftError) as problem:
            raise _as_setup_error(problem) from None
        finally:
            host.close()

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Waits until every slot is ready; False when they are not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._ready) == self.config.slots, timeout_s)

    def close(self) -> None:
        """Removes all slots that are not in use."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for keeper in self._keepers:
            keeper.join()
        for slot in (*self._ready, *self._used):
            slot.close()
        self._guard.close()

    def _take(self, cancelled: Callable[[], bool], owner: int | None) -> Slot:
        deadline = time.monotonic() + TAKE_TIMEOUT_S
        with self._changed:
            while True:
                while self._ready:
                    slot = next((one for one in self._ready if one.owner == owner), self._ready[0])
                    self._ready.remove(slot)
                    if slot.is_sound():
                        return slot
                    self._used.append(slot)
                    self._changed.notify_all()
                if cancelled():
                    raise Cancelled
                if self._problem is not None:
                    raise self._problem
                if time.monotonic() >= deadline:
                    raise HostSetupError(
                        "network slots",
                        f"were not ready within {TAKE_TIMEOUT_S:.0f} s",
                        "see the journal of cellblock.service",
                    )
                self._changed.wait(_POLL_S)

    def _keep(self) -> None:
        """Removes used slots, before all so that their addresses are free, and makes new ones."""
        host = Netlink()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._used or self._absent or self._closing)
                if self._closing:
                    host.close()
                    return
                slot = self._used.popleft() if self._used else None
                config = self.config
                index = slot.index if slot is not None else self._absent.popleft()
            try:
                if slot is not None:
                    # Its stage's record comes first; both need the interpreter's lock.
                    time.sleep(_RECORD_S)
                    slot.close()
                made = self._make(index, config, host, None if slot is None else slot.owner)
            except (OSError, NftError, HostSetupError) as problem:
                self._failed(index, problem)
                continue
            with self._changed:
                # It is made once more where it was overtaken by another configuration.
                (self._ready if config is self.config else self._used).append(made)
                self._problem = None
                self._changed.notify_all()

    def _make(self, index: int, config: NetworkConfig, host: Netlink, owner: int | None) -> Slot:
        directory = self._directory / str(index)
        if owner is not None:
            # Whoever it was made for may be gone.
            with contextlib.suppress(OSError):
                return Slot(index, config, host, directory, owner)
        return Slot(index, config, host, directory)

    def _failed(self, index: int, problem: Exception) -> None:
        with self._changed:
            before = self._problem
            self._problem = _as_setup_error(problem)
            self._absent.append(index)
            self._changed.notify_all()
            if str(before) != str(self._problem):
                _log.warning("%s", self._problem)
            # A used slot is worth an attempt at once, a failure is not.
            self._changed.wait_for(lambda: self._closing, RETRY_S)


class JobNetwork:
    """The job network of this host: its slots, and what environments need to be run in them."""

    def __init__(self, config: NetworkConfig, host_name: str, directory: Path) -> None:
        """``directory`` is for the slots' files. Raises :class:`HostSetupError` when the host lacks the
        filter library."""
        self._host_name = host_name
        self._config = config
        self.slots = SlotPool(config, directory)

    def access(
        self, policy: NetworkPolicy, destinations: Sequence[Destination], where: str
    ) -> Access:
        """What a stage may reach; raises as :meth:`Access.of`."""
        return Access.of(policy, destinations, where, self._config, self._host_name)

    def reconfigure(self, config: NetworkConfig) -> bool:
        """Goes by ``config`` from now on; False, and as before, where it differs in more than what is denied."""
        if not self._config.is_same_but_for_denied(config):
            return False
        self._config = config
        self.slots.reconfigure(config)
        return True

    def require_ready(self) -> None:
        """Raises :class:`HostSetupError` while no job with a network may start here."""
        self.slots.require_ready()

    def prepare(self, environment: Path) -> None:
        """Makes the empty files that a stage's own ones are bound over, where an environment's root has
        none.

        Environments come without a resolv.conf, and jails' roots are read-only.
        """
        for name in ("hosts", "resolv.conf"):
            path = environment / "etc" / name
            try:
                with contextlib.suppress(FileExistsError):
                    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
                    os.close(os.open(path, flags, 0o644))
                regular = stat.S_ISREG(path.lstat().st_mode)
            except OSError as problem:
                raise HostSetupError(
                    str(path), f"cannot be made: {problem.strerror}", "run the environments role"
                ) from None
            if not regular:
                # A link would be followed on the host, before the jail has its own root.
                raise HostSetupError(
                    str(path), "is not a regular file", "make it one in the environment's archive"
                )


def _as_setup_error(problem: Exception) -> HostSetupError:
    if isinstance(problem, HostSetupError):
        return problem
    reason = getattr(problem, "strerror", None) or str(problem)
    remedy = (
        "see whether this kernel has macvlan, veth, nf_tables and the netdev egress hook (5.16)"
    )
    return HostSetupError("network slots", f"cannot be made: {reason}", remedy)


def _set_up(netlink: Netlink, name: str) -> int:
    link = netlink.link(name)
    if link is None:
        raise NetlinkError(errno.ENODEV, f"{name} is missing")
    netlink.set_up(link.index)
    return link.index


def _make_parent(config: NetworkConfig, host: Netlink) -> Link | None:
    """The interface that slots are cloned from, made again as the role makes it (`provision.py`): somebody has
    deleted it, and who made it at boot does not notice. None where what it is made of is missing, too."""
    link = host.link(config.link) if config.link else None
    if link is None:
        return None
    with contextlib.suppress(FileExistsError, NetlinkError):  # another keeper was faster
        host.add_macvlan(link.index, config.parent)
        _log.warning("interface %s was missing; it is made of %s again", config.parent, config.link)
    with contextlib.suppress(FileNotFoundError):
        _write_sysctls({f"ipv6/conf/{config.parent}/disable_ipv6": "1"})
    _set_up(host, config.parent)
    return host.link(config.parent)


def _retry_while_busy(act: Callable[[], None]) -> None:
    """The kernel frees the addresses of a killed service's clones with some delay."""
    deadline = time.monotonic() + _ADDRESS_BUSY_S
    while True:
        try:
            return act()
        except NetlinkError as problem:
            if problem.errno not in (errno.EBUSY, errno.EADDRINUSE) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _remove_leftovers() -> None:
    """The host's ends of veth pairs, in case that their other ends outlived the service."""
    netlink = Netlink()
    try:
        for link in netlink.links():
            if re.fullmatch(rf"{HOST_END}\d+", link.name):
                with contextlib.suppress(NetlinkError):
                    netlink.delete(link.index)
    finally:
        netlink.close()


def _write_sysctls(values: dict[str, str]) -> None:
    """In the thread's network namespace."""
    for key, value in values.items():
        path = Path("/proc/sys/net") / key
        if key.startswith("ipv6/") and not Path("/proc/sys/net/ipv6").exists():
            continue  # a kernel without IPv6
        try:
            path.write_text(value)
        except FileNotFoundError:
            raise  # the caller knows whether that is one that may be missing
        except OSError as problem:
            raise HostSetupError(
                str(path),
                f"cannot be written: {problem.strerror}",
                "the service needs /proc/sys writable",
            ) from None
