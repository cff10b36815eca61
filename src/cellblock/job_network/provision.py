"""Puts a slave's network for jobs in place, or takes it off: interface, what makes it at boot, forwarding.

The interface is made at once, whoever makes it at the next boot: nothing reconfigures the parent, over
which Ansible comes. A run with nothing to do changes nothing; ``check`` tells what would be done.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .decision import Decision
from .host import Manager
from .plan import HOST_END, Mode

UNIT = "cellblock-interface.service"
_ETC = Path("/etc")
_PROC_SYS = Path("/proc/sys")
_NETWORKD = "systemd/network"
_FORWARDING = {
    "IPv4": ("before us", "net/ipv4/ip_forward", "net.ipv4.ip_forward"),
    "IPv6": ("IPv6 before us", "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
}
# As Ansible's ansible.builtin.to_uuid makes them.
_NAMESPACE = uuid.UUID("361E6D51-FAEC-444A-9079-341386DA8E2E")
_MANAGED = "#\n# Ansible managed\n#\n"


class ProvisionError(Exception):
    """A step failed; one sentence."""


@dataclass
class Changes:
    """What was done, or would be in check mode."""

    done: list[str] = field(default_factory=list)
    diff: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    content: str
    mode: int = 0o644


class Provisioner:
    """One host. ``etc`` and ``proc_sys`` are its /etc and /proc/sys."""

    def __init__(
        self, interface: str, *, check: bool, etc: Path = _ETC, proc_sys: Path = _PROC_SYS
    ) -> None:
        self.changes = Changes()
        self._interface = interface
        self._check = check
        self._etc = etc
        self._proc_sys = proc_sys
        self._sysctl = etc / "sysctl.d/90-cellblock-jobs.conf"
        self._unit = etc / "systemd/system" / UNIT
        self._connection = etc / "NetworkManager/system-connections/cellblock.nmconnection"
        self._ifupdown = etc / "network/interfaces.d/cellblock"

    def provide(self, decision: Decision, has_networkd: bool) -> None:
        """Makes everything as ``decision`` says; raises :class:`ProvisionError`."""
        is_macvlan = decision.mode is Mode.MACVLAN
        manager = decision.parent.manager if is_macvlan else None
        files, drop_ins = self._files(decision, has_networkd)
        if manager is not Manager.OWN:
            self._end_own_unit()
        written = [self._write(path, file) for path, file in files.items()]
        # Before the interface is there: a file of the host that matches it too would give it the host's
        # own addresses. And while the parent's drop-in is not there yet, or still there: networkd sets up
        # an interface anew whose files have changed.
        if any(written) and any(self._is_networkds(path) for path in files):
            self._run("networkd reads its files", "networkctl", "reload")
        connection_was_there = self._connection.exists()
        self._remove_all_but({*files, *drop_ins})
        for path, file in drop_ins.items():
            self._write(path, file)
        if is_macvlan:
            self._make_link(decision.parent.name)
        if manager is Manager.OWN:
            self._start_own_unit(any(written))
        if not is_macvlan:
            self._delete_link()
        if connection_was_there and self._connection not in files:
            self._forget_connection()
        wanted = ["IPv4", "IPv6"] if decision.has_ipv6 else ["IPv4"]
        self._forward(wanted if decision.mode is Mode.ROUTED else [])

    def remove(self) -> None:
        """Takes everything off and sets forwarding to what it was; raises :class:`ProvisionError`."""
        self._forward([])
        self._end_own_unit()
        connection_was_there = self._connection.exists()
        self._remove_all_but(set())
        self._delete_link()
        if connection_was_there:
            self._forget_connection()

    # --- Files that make it come back at boot ---

    def _files(
        self, decision: Decision, has_networkd: bool
    ) -> tuple[dict[Path, _File], dict[Path, _File]]:
        """By path: what whoever manages the parent makes the interface with, and of that what lies in a
        directory of the parent's own file."""
        networkd = self._etc / _NETWORKD
        network = networkd / "25-cellblock.network"
        name, parent = self._interface, decision.parent
        if decision.mode is Mode.ROUTED:
            # Where there is none to make, networkd must be told to leave those alone that the engine makes.
            return ({network: _File(_ROUTED_NETWORK)} if has_networkd else {}), {}
        if parent.manager is Manager.NETWORKD:
            drop_in = networkd / f"{Path(parent.network_file).name}.d/cellblock.conf"
            return {
                networkd / "25-cellblock.netdev": _File(_NETDEV.format(interface=name)),
                network: _File(_NETWORK.format(interface=name)),
            }, {drop_in: _File(_PARENT_DROP_IN.format(interface=name))}
        made = {"interface": name, "parent": parent.name}
        if parent.manager is Manager.NETWORKMANAGER:
            content = _CONNECTION.format(uuid=self._connection_uuid(), **made)
            return {self._connection: _File(content, 0o600)}, {}
        if parent.manager is Manager.IFUPDOWN:
            return {self._ifupdown: _File(_INTERFACES.format(**made))}, {}
        return {self._unit: _File(_UNIT.format(**made))}, {}

    def _connection_uuid(self) -> str:
        """NetworkManager's name for what makes it."""
        return str(uuid.uuid5(_NAMESPACE, f"cellblock {self._interface}"))

    def _is_networkds(self, path: Path) -> bool:
        return (self._etc / _NETWORKD) in path.parents

    def _remove_all_but(self, wanted: set[Path]) -> None:
        """What another manager, or another mode, would make it with."""
        networkd = self._etc / _NETWORKD
        found = {self._unit, self._connection, self._ifupdown}
        found |= {*networkd.rglob("25-cellblock.*"), *networkd.rglob("cellblock.conf")}
        for path in sorted(found - wanted):
            if not path.exists():
                continue
            self._note(path, path.read_text(), "")
            if self._check:
                continue
            path.unlink()
            if path.name == "cellblock.conf":
                with contextlib.suppress(OSError):  # somebody else's file is in it
                    path.parent.rmdir()
            if path == self._unit:
                self._do("systemctl", "daemon-reload")

    def _write(self, path: Path, file: _File) -> bool:
        """Whether it was not so before."""
        try:
            before = path.read_text()
            is_right = before == file.content and path.stat().st_mode & 0o7777 == file.mode
        except FileNotFoundError:
            before, is_right = "", False
        if is_right:
            return False
        self._note(path, before, file.content)
        if not self._check:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(descriptor, "w") as stream:
                os.fchmod(descriptor, file.mode)
                stream.write(file.content)
            Path(temporary).replace(path)
        return True

    def _note(self, path: Path, before: str, after: str) -> None:
        self.changes.done.append(f"{path} is {'written' if after else 'removed'}")
        self.changes.diff.append(
            {
                "before_header": str(path),
                "after_header": str(path),
                "before": before,
                "after": after,
            }
        )

    # --- The interface ---

    def _link(self) -> Mapping[str, Any] | None:
        try:
            listed = self._ask("ip", "-details", "-json", "link", "show", "dev", self._interface)
        except ProvisionError:
            return None
        found: list[Mapping[str, Any]] = json.loads(listed or "[]")
        return found[0] if found else None

    def _make_link(self, parent: str) -> None:
        link = self._link()
        if link is not None:
            info = link.get("linkinfo", {})
            if (
                link.get("link") == parent
                and "UP" in link.get("flags", [])
                and info.get("info_kind") == "macvlan"
                and info.get("info_data", {}).get("mode") == "private"
            ):
                return
        self.changes.done.append(f"{self._interface} is made of {parent}")
        if self._check:
            return
        if link is not None:
            self._do("ip", "link", "delete", "dev", self._interface)
        kind = ("type", "macvlan", "mode", "private")
        self._do("ip", "link", "add", "link", parent, "name", self._interface, *kind)
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            path = self._proc_sys / "net/ipv6/conf" / self._interface / "disable_ipv6"
            path.write_text("1")
        self._do("ip", "link", "set", "dev", self._interface, "up")

    def _delete_link(self) -> None:
        if self._link() is not None:
            name = self._interface
            self._run(f"{name} is removed", "ip", "link", "delete", "dev", name)

    def _start_own_unit(self, is_written: bool) -> None:
        states = (self._state("is-enabled"), self._state("is-active"))
        if is_written and not self._check:
            self._do("systemctl", "daemon-reload")
        if states != ("enabled", "active"):
            self._run(f"{UNIT} is started", "systemctl", "enable", "--now", UNIT)

    def _end_own_unit(self) -> None:
        if self._unit.exists():
            states = (self._state("is-enabled"), self._state("is-active"))
            if states != ("disabled", "inactive"):
                self._run(f"{UNIT} is ended", "systemctl", "disable", "--now", UNIT)

    def _state(self, question: str) -> str:
        return _output("systemctl", question, UNIT)[1].strip()

    def _forget_connection(self) -> None:
        """It keeps in memory what it has read. No other connection is read again, as `reload` would."""
        known = _output("nmcli", "-g", "UUID", "connection", "show")[1].split()
        if self._connection_uuid() in known:
            command = ("nmcli", "connection", "delete", "uuid", self._connection_uuid())
            self._run("NetworkManager forgets the interface", *command)

    # --- Forwarding ---

    def _forward(self, versions: list[str]) -> None:
        """On for these versions of IP, now and at boot, and for the others as it was before us."""
        try:
            text = self._sysctl.read_text()
        except FileNotFoundError:
            text = ""
        lines = [
            "# Jobs' traffic is routed by this host (role job_network); what else may pass, its rules say."
        ]
        to_turn_on = []
        for version, (label, path, name) in _FORWARDING.items():
            found = re.search(rf"(?m)^# {label}: (.+)$", text)
            before = found[1].strip() if found else None
            if version in versions:
                now = (self._proc_sys / path).read_text().strip()
                lines += [f"# {label}: {before or now}", f"{name} = 1"]
                if now != "1":
                    to_turn_on.append((path, name))
            elif before is not None:
                self._set(path, name, before)
        if versions:
            self._write(self._sysctl, _File("".join(f"{line}\n" for line in lines)))
        elif text:
            self._note(self._sysctl, text, "")
            if not self._check:
                self._sysctl.unlink()
        # After it is written down what it was: an end in between must not make it ours for ever.
        for path, name in to_turn_on:
            self._set(path, name, "1")

    def _set(self, path: str, name: str, value: str) -> None:
        self.changes.done.append(f"{name} is set to {value}")
        if not self._check:
            (self._proc_sys / path).write_text(value)

    # --- Commands ---

    def _run(self, what: str, *command: str) -> None:
        self.changes.done.append(what)
        if not self._check:
            self._do(*command)

    def _do(self, *command: str) -> None:
        self._ask(*command)

    def _ask(self, *command: str) -> str:
        code, output, errors = _output(*command)
        if code:
            raise ProvisionError(f"{' '.join(command)} failed: {' '.join(errors.split()) or code}.")
        return output


def _output(*command: str) -> tuple[int, str, str]:
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return 127, "", str(problem)
    return done.returncode, done.stdout, done.stderr


_NETDEV = (
    _MANAGED
    + """\
[NetDev]
Name={interface}
Kind=macvlan

[MACVLAN]
Mode=private
"""
)
_NETWORK = (
    _MANAGED
    + """\
# The slots of jobs are made from it; it has no addresses itself.
[Match]
Name={interface}

[Link]
RequiredForOnline=no

[Network]
DHCP=no
LinkLocalAddressing=no
IPv6AcceptRA=no
LLDP=no
ConfigureWithoutCarrier=yes
"""
)
_ROUTED_NETWORK = (
    _MANAGED
    + f"""\
# The host's ends of jobs' networks, which the engine sets up.
[Match]
Name={HOST_END}*

[Link]
Unmanaged=yes
"""
)
_PARENT_DROP_IN = (
    _MANAGED
    + """\
[Network]
MACVLAN={interface}
"""
)
_CONNECTION = (
    _MANAGED
    + """\
# The slots of jobs are made from it; it has no addresses itself.
[connection]
id=cellblock
uuid={uuid}
type=macvlan
interface-name={interface}
autoconnect=true

[macvlan]
# 3: private (libnm's NMSettingMacvlanMode).
mode=3
parent={parent}

[ipv4]
method=disabled

[ipv6]
method=disabled
"""
)
_MAKE = (
    "ip link show dev {interface} >/dev/null 2>&1 ||"
    " ip link add link {parent} name {interface} type macvlan mode private"
)
_WITHOUT_IPV6 = (
    "[ ! -e /proc/sys/net/ipv6/conf/{interface} ] ||"
    " echo 1 >/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
)
_INTERFACES = (
    _MANAGED
    + f"""\
# The slots of jobs are made from it; it has no addresses itself.
auto {{interface}}
iface {{interface}} inet manual
    pre-up {_MAKE}
    pre-up {_WITHOUT_IPV6}
    up ip link set dev {{interface}} up
    post-down ip link delete dev {{interface}} || true
"""
)
_UNIT = (
    _MANAGED
    + f"""\
[Unit]
Description=Cellblock: the interface {{interface}}, which jobs' networks are made from
Wants=network.target
After=network-pre.target sys-subsystem-net-devices-{{parent}}.device
Before=cellblock.service

[Service]
Type=oneshot
TimeoutStartSec=60
RemainAfterExit=yes
ExecStart=/bin/sh -ec '{_MAKE}; {_WITHOUT_IPV6}; ip link set dev {{interface}} up'
ExecStop=-/bin/sh -c 'ip link delete dev {{interface}}'

[Install]
WantedBy=multi-user.target
"""
)
