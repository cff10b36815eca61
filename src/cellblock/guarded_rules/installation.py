"""What guarded rules consist of on a host: the program, one file, and systemd's units for it.

The controller's half: it is made from this package's own sources, and the same sources give the same
bytes.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .instance import Instance

_PACKAGE = Path(__file__).resolve().parents[1]
# Of the package; the rest of it never goes to a host in this program.
_PARTS = (
    "__init__",
    *(f"linux/{name}" for name in ("__init__", "journal", "netlink_messages", "nft_monitor")),
    "linux/sd_notify",
    "guarded_rules/__init__",
    *(f"guarded_rules/{name}" for name in ("instance", "host", "records", "compare", "table")),
    *(f"guarded_rules/{name}" for name in ("trial", "watch", "command")),
)
_MAIN = """\
import sys

from cellblock.guarded_rules.command import main
from cellblock.guarded_rules.instance import Instance

sys.exit(main({instance!r}, sys.argv[1:]))
"""
# -I: no environment variable and no user's directory decides what root runs.
_SHEBANG = b"#!/usr/bin/python3 -I\n"


# How long a guard may say nothing (it says so every `watch.ALIVE_S`) before systemd makes it anew.
WATCHDOG_MS = 600


class Units(NamedTuple):
    """How an instance is started."""

    description: str
    """What the rules are: "the host's firewall"."""
    before_network: bool
    """A unit of its own loads the confirmed rules before the network is configured. Otherwise the guard
    does when it starts: the rules need something that comes later, such as an interface."""
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """Other units that the guard's comes after or before."""
    foreign_rules: str = "remove"


class File(NamedTuple):
    path: str
    content: bytes
    mode: str
    """Octal, like ``0644``."""


def files(instance: Instance, units: Units) -> list[File]:
    return [
        File(instance.command, program(instance), "0755"),
        *(
            File(f"/etc/systemd/system/{name}", text.encode(), "0644")
            for name, text in unit_texts(instance, units).items()
        ),
    ]


def program(instance: Instance) -> bytes:
    """A zip archive that Python runs, for this one instance."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in (
            ("__main__.py", _MAIN.format(instance=instance)),
            *(
                (f"cellblock/{part}.py", (_PACKAGE / f"{part}.py").read_text(encoding="utf-8"))
                for part in _PARTS
            ),
        ):
            entry = zipfile.ZipInfo(name)  # of 1980, whenever this is
            # As if made on Unix, wherever this is.
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            # Not compressed: zlib's versions differ in what they make of the same bytes.
            entry.compress_type = zipfile.ZIP_STORED
            archive.writestr(entry, text)
    return _SHEBANG + packed.getvalue()


def load_unit(instance: Instance) -> str:
    return f"{instance.name}.service"


def guard_unit(instance: Instance, units: Units) -> str:
    return f"{instance.name}-guard.service" if units.before_network else load_unit(instance)


def unit_texts(instance: Instance, units: Units) -> dict[str, str]:
    """Name -> text, in the order in which they are started."""
    guard = guard_unit(instance, units)
    if not units.before_network:
        return {guard: _guard_text(instance, units, ("nftables.service", "systemd-sysctl.service"))}
    loads = load_unit(instance)
    return {loads: _load_text(instance, units), guard: _guard_text(instance, units, (loads,))}


def _load_text(instance: Instance, units: Units) -> str:
    return f"""\
# Part of Cellblock, installed by cellblock.fleet.guarded_rules.
[Unit]
Description=Cellblock: loads {units.description}
# Before any interface is configured; after the distribution's own service, whose file usually
# begins with `flush ruleset`.
DefaultDependencies=no
RequiresMountsFor={_directories(instance)}
After=local-fs.target systemd-modules-load.service systemd-sysctl.service nftables.service
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target

[Service]
Type=oneshot
# Of itself such a unit has no limit, and all that comes later at boot would wait.
TimeoutStartSec=60
RemainAfterExit=yes
ExecStart={instance.command} load
# No ExecStop: the rules stay until the machine is off.

[Install]
WantedBy=sysinit.target
"""


def _guard_text(instance: Instance, units: Units, after: tuple[str, ...]) -> str:
    does = "keeps" if units.before_network else "loads and keeps"
    return f"""\
# Part of Cellblock, installed by cellblock.fleet.guarded_rules.
[Unit]
Description=Cellblock: {does} {units.description}, whoever changes the rules
DefaultDependencies=no
RequiresMountsFor={_directories(instance)}
After={" ".join((*after, *units.after))}
Before={" ".join((*units.before, "shutdown.target"))}
Conflicts=shutdown.target
# However often it is killed, it comes back.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={instance.command} guard --foreign-rules={units.foreign_rules}
Restart=always
RestartSec=20ms
# One that was stopped (SIGSTOP) is missed as soon as one that was killed.
WatchdogSec={WATCHDOG_MS}ms
WatchdogSignal=SIGKILL
# However busy the host is: a look takes some 0.05 s of a processor.
CPUWeight=10000
MemoryMax=64M
TasksMax=16
RuntimeDirectory={instance.name}
# The records of what is loaded outlive the guard.
RuntimeDirectoryPreserve=yes

CapabilityBoundingSet=CAP_NET_ADMIN
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_NETLINK AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0022

[Install]
WantedBy=sysinit.target
"""


def _directories(instance: Instance) -> str:
    return " ".join(str(PurePosixPath(path).parent) for path in (instance.command, instance.rules))
