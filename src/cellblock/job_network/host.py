"""What must be known about a slave before its jobs get a network. Looks only: changes nothing.

A clone is tried in a network namespace that ends with the attempt.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import Any

from ..errors import HostSetupError
from ..linux.netlink import Netlink, inside, new_namespace
from ..linux.nft import Nft, NftError
from .plan import HOST_END, Mode

GUARD_RULES = Path("/etc/cellblock/jobs.nft")
ENGINE_CONFIG = Path("/etc/cellblock/engine.json")

_ENVIRONMENT = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}
_EGRESS = "table netdev probe { chain egress { type filter hook egress device lo priority 0; }; }"
_PROBE = "probe0"
_ANSWER_S = 0.5
_ATTEMPTS = 4


class Manager(str, Enum):
    """Who configures an interface, and so will make ours at boot."""

    NETWORKD = "networkd"
    NETWORKMANAGER = "networkmanager"
    IFUPDOWN = "ifupdown"
    OWN = "own"
    """Nobody: a unit of ours does."""


@dataclass(frozen=True)
class Parent:
    """The interface that jobs' networks are made of; texts are empty where there is none."""

    name: str
    cidr: str
    """Its address and length, the declared one first."""
    gateway: str
    cidr_ipv6: str
    """As ``cidr``, beside which jobs' addresses are; never link-local."""
    gateway_ipv6: str
    manager: Manager
    network_file: str
    """networkd's own file for it, where that manages it."""
    clone_problem: str | None
    """Why a clone of it does not work; "" when it does, None where none was tried."""


@dataclass(frozen=True)
class HostNetwork:
    """What was seen."""

    cpus: int
    interfaces: Sequence[str]
    """But for the loopback and those that are ours."""
    addresses: Sequence[str]
    """Their IPv4 addresses."""
    parent: Parent | None
    current: Mode | None
    """How jobs are connected already."""
    current_range: str
    """Which addresses they have already (CIDR); empty where they have none."""
    has_ipv6: bool
    lost_by_forwarding: str
    """The interface whose IPv6 default route the kernel takes from router advertisements, and would drop
    as soon as the host forwards; empty if none."""
    has_networkd: bool
    egress_problem: str | None
    """Why the kernel lacks the netdev egress hook; "" when it has it, None where nft is not there yet."""


def look(
    *,
    parent: str,
    interface: str,
    addresses: Sequence[str],
    gateway: str,
    gateway_ipv6: str,
    ipv6_prefix: str,
    probe_mac: str,
    try_clone: bool,
) -> HostNetwork:
    """Looks at this host, or the one whose network namespace the thread is in.

    ``parent``, ``gateway`` and ``gateway_ipv6`` are empty where they are to be found; ``interface`` is
    the jobs'; ``addresses`` are the host's declared ones; ``ipv6_prefix`` (CIDR) is the jobs', or empty.
    """
    every = {link["ifname"]: link for link in _ip("address", "show")}
    interfaces = sorted(
        name for name in every if name not in ("lo", interface) and not name.startswith(HOST_END)
    )
    inet = {name: _of_family(link, "inet") for name, link in every.items()}
    wanted = [address for address in addresses if ":" not in address]
    if parent:
        found = parent if parent in every else ""
    else:
        having = ((a, n) for a in wanted for n in interfaces if a in [i["local"] for i in inet[n]])
        found = next((name for _, name in having), "")
    seen: Parent | None = None
    if found:
        own = sorted(inet[found], key=lambda a: a["local"] not in wanted)
        way = gateway or next(iter(_gateways(found, 4)), "")
        manager, network_file = _manager(found)
        inet6 = _of_family(every[found], "inet6")
        seen = Parent(
            name=found,
            cidr=f"{own[0]['local']}/{own[0]['prefixlen']}" if own else "",
            gateway=way,
            cidr_ipv6=_own_ipv6(found, inet6, addresses, ipv6_prefix),
            gateway_ipv6=gateway_ipv6 or next(iter(_gateways(found, 6)), ""),
            manager=manager,
            network_file=network_file,
            clone_problem=_clone_problem(found, way, probe_mac) if try_clone else None,
        )
    return HostNetwork(
        cpus=len(os.sched_getaffinity(0)),
        interfaces=interfaces,
        addresses=sorted({a["local"] for name in interfaces for a in inet[name]}),
        parent=seen,
        current=_current_mode(),
        current_range=_current_range(),
        has_ipv6=_setting("net/ipv6/conf/all/forwarding") != "",
        lost_by_forwarding=_lost_by_forwarding(),
        has_networkd=_is_active("systemd-networkd.service"),
        egress_problem=_egress_problem(),
    )


def _current_mode() -> Mode | None:
    try:
        return Mode.MACVLAN if "table netdev" in GUARD_RULES.read_text() else Mode.ROUTED
    except OSError:
        return None


def _current_range() -> str:
    try:
        section = json.loads(ENGINE_CONFIG.read_text()).get("network") or {}
        return str(section.get("addresses", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _of_family(link: Mapping[str, Any], family: str) -> list[dict[str, Any]]:
    return [address for address in link["addr_info"] if address.get("family") == family]


def _run(*command: str) -> str:
    """What it prints; "" where it is missing or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=20, env=_ENVIRONMENT
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _ip(*arguments: str) -> list[dict[str, Any]]:
    # None without iproute2, which check mode may find before it is installed.
    found: list[dict[str, Any]] = json.loads(_run("ip", "-json", *arguments) or "[]")
    return found


def _which(program: str) -> str | None:
    return shutil.which(program, path=_ENVIRONMENT["PATH"])


def _is_active(unit: str) -> bool:
    return _run("systemctl", "is-active", unit).strip() == "active"


def _setting(name: str) -> str:
    """A setting of the kernel's; "" where there is none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _manager(parent: str) -> tuple[Manager, str]:
    """Who configures the interface, and with which file where that is networkd."""
    if _which("nmcli") and _is_active("NetworkManager.service"):
        state = _run("nmcli", "-g", "GENERAL.STATE", "device", "show", parent)
        # 10: unmanaged. Externally: it shows what somebody else has set up.
        if state and not state.startswith("10 ") and "externally" not in state:
            return Manager.NETWORKMANAGER, ""
    if _is_active("systemd-networkd.service"):
        status = _run("networkctl", "--no-pager", "status", parent)
        found = re.search(r"Network File: (/\S+)", status)
        if found:
            return Manager.NETWORKD, found[1]
    text = ""
    for name in ("/etc/network/interfaces", *glob.glob("/etc/network/interfaces.d/*")):
        with contextlib.suppress(OSError):
            text += Path(name).read_text()
    has_it = re.search(rf"(?m)^\s*iface\s+{re.escape(parent)}\s", text)
    sources = re.search(r"(?m)^\s*source(-directory)?\s+(/etc/network/)?interfaces\.d", text)
    if has_it and sources and _which("ifup"):
        return Manager.IFUPDOWN, ""
    return Manager.OWN, ""


def _gateways(parent: str, version: int) -> list[str]:
    """Where the default routes over an interface lead, the preferred one first."""
    found = []
    for route in _ip(f"-{version}", "route", "show", "default", "dev", parent):
        hops = [hop for hop in route.get("nexthops", []) if hop.get("dev") == parent]
        found += [str(hop["gateway"]) for hop in (route, *hops) if "gateway" in hop]
    return found


def _own_ipv6(
    parent: str, addresses: Sequence[Mapping[str, Any]], declared: Sequence[str], prefix: str
) -> str:
    """The address of the parent that jobs' addresses are beside, with its segment's length; "" if none."""
    ours = IPv6Network(prefix) if prefix else None
    candidates = []
    on_link = [
        ip_network(route["dst"])
        for route in _ip("-6", "route", "show", "dev", parent)
        if "/" in route["dst"] and "gateway" not in route and "nexthops" not in route
    ]
    for entry in addresses:
        own = ip_interface(f"{entry['local']}/{entry['prefixlen']}")
        if entry.get("scope") != "global" or own.ip.is_link_local:
            continue
        if own.network.prefixlen == 128:
            # From DHCPv6: routers say elsewhere what the segment is.
            longer = [n for n in on_link if own.ip in n and n.prefixlen < 128]
            length = max((n.prefixlen for n in longer), default=128)
            own = ip_interface(f"{own.ip}/{length}")
        candidates.append(
            (
                not (ours and own.network.overlaps(ours)),
                entry["local"] not in declared,
                bool(entry.get("deprecated") or entry.get("temporary")),
                str(own),
            )
        )
    return min(candidates)[-1] if candidates else ""


def _lost_by_forwarding() -> str:
    """Where the kernel does not listen to router advertisements (0), networkd or NetworkManager does, and
    keeps the route."""
    for route in _ip("-6", "route", "show", "default", "proto", "ra"):
        for hop in (route, *route.get("nexthops", [])):
            if "dev" in hop and _setting(f"net/ipv6/conf/{hop['dev']}/accept_ra") == "1":
                return str(hop["dev"])
    return ""


def _egress_problem() -> str | None:
    namespace = None
    try:
        namespace = new_namespace()
        with inside(namespace):
            nft = Nft()
            try:
                nft.run(_EGRESS)
            finally:
                nft.close()
    except HostSetupError:
        return None
    except (OSError, NftError) as problem:
        return str(problem)
    finally:
        if namespace is not None:
            os.close(namespace)
    return ""


def _clone_problem(parent: str, gateway: str, mac: str) -> str:
    if not gateway:
        return f"{parent} has no default route whose gateway could be asked"
    try:
        namespace = new_namespace()
    except OSError as problem:
        return f"a network namespace cannot be made ({problem.strerror})"
    host = Netlink()
    try:
        link = host.link(parent)
        if link is None:
            return f"a clone of {parent} cannot be made (it has vanished)"
        try:
            host.add_macvlan(link.index, _PROBE, bytes.fromhex(mac.replace(":", "")), namespace)
        except OSError as problem:
            return f"a clone of {parent} cannot be made ({problem.strerror})"
        with inside(namespace):
            try:
                _bring_up_probe()
            except OSError as problem:
                return f"a clone of {parent} cannot be brought up ({problem.strerror})"
            try:
                is_answered = _asks(mac, gateway)
            except OSError as problem:
                return f"a clone of {parent} cannot ask for the gateway ({problem.strerror})"
        if not is_answered:
            return f"the gateway {gateway} does not answer a clone of {parent}"
        return ""
    finally:
        host.close()
        os.close(namespace)


def _bring_up_probe() -> None:
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    netlink = Netlink()
    try:
        link = netlink.link(_PROBE)
        if link is not None:
            netlink.set_up(link.index)
    finally:
        netlink.close()


def _asks(mac: str, gateway: str) -> bool:
    """Whether somebody answers who has the gateway's address. It is asked as a host does before it takes an
    address (RFC 5227): no address is used up.
    """
    own, target = bytes.fromhex(mac.replace(":", "")), socket.inet_aton(gateway)
    frame = struct.pack("!6s6sH", b"\xff" * 6, own, 0x0806)
    frame += struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, own, bytes(4), bytes(6), target)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as wire:
        wire.bind((_PROBE, 0x0806))
        for _ in range(_ATTEMPTS):
            wire.send(frame)
            end = time.monotonic() + _ANSWER_S
            while (left := end - time.monotonic()) > 0:
                wire.settimeout(max(0.01, left))
                try:
                    got = wire.recv(2048)
                except TimeoutError:
                    break
                if got[:6] == own and got[20:22] == b"\x00\x02" and got[28:32] == target:
                    return True
    return False
