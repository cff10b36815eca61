# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""A host's Docker engine: why it cannot be provided, what its daemon.json becomes, and what was there before.

What touches the host goes through :class:`Host`; the rest is plain data.
"""

from __future__ import annotations

import copy
import ipaddress
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Settings = dict[str, Any]
# Exit code, standard output and standard error of a command.
Run = Callable[[list[str]], tuple[int, str, str]]

UNIT = "docker.service"
DATA_ROOT = "/var/lib/docker"
DROP_INS = "/etc/systemd/system/docker.service.d"
# The packages of an engine: the distribution's, and those of Docker's own archive.
ENGINES = {"distribution": "docker.io", "upstream": "docker-ce"}
# Interfaces that engines make themselves.
OWN_INTERFACE = re.compile(r"docker0|docker_gwbridge|br-[0-9a-f]{12}|veth.*")
# Whom an engine makes for userns-remap: default.
REMAP_USER = "dockremap"
# The ids that a container may use.
SUBORDINATE_IDS = 65536
MISSING = object()


class EngineError(Exception):
    """What is wrong, in one sentence, and what to do."""


# --- daemon.json ----------------------------------------------------------------------------------


def parse_daemon(text: str | None, path: str) -> Settings:
    """The contents of a daemon.json; nothing for a file that is missing or empty, which the engine takes too."""
    if text is None or not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EngineError(
            f"{path} is no JSON ({error}); mend it, or move it away if the engine does not need it."
        ) from None
    if not isinstance(found, dict):
        raise EngineError(f"{path} is no JSON object; mend it, or move it away.")
    return found


def format_daemon(settings: Mapping[str, Any]) -> str:
    """One setting to a line and indented with spaces: other packages look into the file with patterns."""
    return json.dumps(settings, indent=4, ensure_ascii=False) + "\n"


def leaves(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The single settings: {path of keys: value}. What is None is not ours to set."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(leaves(value, (*above, key)))
        elif value is not None:
            found[(*above, key)] = value
    return found


def value_at(settings: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = settings
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return MISSING
        found = found[key]
    return found


def put(settings: Settings, path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        settings = settings.setdefault(key, {})
        if not isinstance(settings, dict):
            raise EngineError(
                f"daemon.json: {key} is {settings!r}, not an object; mend it, or take it out."
            )
    settings[path[-1]] = copy.deepcopy(value)


def take_out(settings: Settings, path: Sequence[str]) -> None:
    """Deletes a setting, and what held nothing else."""
    inner = settings.get(path[0])
    if len(path) > 1 and isinstance(inner, dict):
        take_out(inner, path[1:])
        if inner:
            return
    settings.pop(path[0], None)


@dataclass
class Record:
    """What was there before us: of daemon.json by path of keys, and of the host."""

    # (path, what we set, what was there); MISSING where nothing was.
    settings: dict[tuple[str, ...], tuple[Any, Any]] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Record:
        data = json.loads(text)
        settings = {
            tuple(one["path"]): (one["ours"], one.get("before", MISSING))
            for one in data["settings"]
        }
        return cls(settings, data["host"])

    def format(self) -> str:
        settings = [
            {"path": path, "ours": ours, **({} if before is MISSING else {"before": before})}
            for path, (ours, before) in sorted(self.settings.items())
        ]
        return json.dumps({"settings": settings, "host": self.host}, indent=4) + "\n"


def merge(found: Settings, record: Record, wanted: Mapping[str, Any]) -> tuple[Settings, Record]:
    """What daemon.json becomes, and the record with it.

    Settings of others stay. Of ours, one that is wanted no more gets its earlier value back, unless somebody
    has changed it since.
    """
    new, kept = copy.deepcopy(found), Record(host=record.host)
    ours = leaves(wanted)
    for path, (value, before) in record.settings.items():
        if path in ours or value_at(new, path) != value:
            continue
        if before is MISSING:
            take_out(new, path)
        else:
            put(new, path, before)
    for path, value in ours.items():
        there = value_at(new, path)
        recorded, before = record.settings.get(path, (MISSING, MISSING))
        kept.settings[path] = (value, before if there == recorded else there)
        put(new, path, value)
    return new, kept


# --- Reasons to refuse ----------------------------------------------------------------------------


def network_of(value: Any, what: str) -> Network:
    try:
        return ipaddress.ip_network(str(value), strict=False)
    except ValueError:
        raise EngineError(f"{what} is {value!r}; write a network such as 172.16.0.0/24.") from None


def own_networks(settings: Mapping[str, Any]) -> list[tuple[str, Network]]:
    """The networks that the engine gives to containers, each with the setting that says so."""
    found: list[tuple[str, Network]] = []
    if settings.get("bip"):
        found.append(("bip", network_of(settings["bip"], "bip")))
    for pool in settings.get("default-address-pools") or []:
        if not isinstance(pool, Mapping) or "base" not in pool or "size" not in pool:
            raise EngineError(f"default-address-pools has {pool!r}; write base and size for each.")
        network = network_of(pool["base"], "default-address-pools")
        size = pool["size"]
        if not isinstance(size, int) or not network.prefixlen <= size <= network.max_prefixlen - 2:
            raise EngineError(
                f"default-address-pools: size {size!r} does not fit {network}; write a prefix length"
                f" from {network.prefixlen} to {network.max_prefixlen - 2}."
            )
        found.append(("default-address-pools", network))
    return found


def collisions(
    settings: Mapping[str, Any],
    others: Iterable[tuple[str, str]],
    variables: tuple[str, str] = ("docker_bip", "docker_address_pools"),
) -> list[str]:
    """A sentence for each network of the engine that overlaps another: (what it is, network).

    ``variables`` are the role's for the engine's bridge and for its pools.
    """
    problems = []
    own = own_networks(settings)
    for number, (setting, network) in enumerate(own):
        for other_setting, other in own[:number]:
            if network.version == other.version and network.overlaps(other):
                problems.append(
                    f"{other_setting} {other} and {setting} {network} overlap; write networks apart."
                )
        for what, value in others:
            other = network_of(value, what)
            if network.version == other.version and network.overlaps(other):
                problems.append(
                    f"{setting} {network} collides with {value} ({what}); choose another network with"
                    f" {variables[setting != 'bip']}."
                )
    return problems


def flag_conflicts(settings: Mapping[str, Any], command_line: str) -> list[str]:
    """The engine does not start with a setting that its command line has as well."""
    flags = set(re.findall(r"(?<!\S)--([a-z][a-z-]*)", command_line))
    return [
        f"{key} is set by --{flag} on the engine's command line as well, with which it would not start; take it"
        f" out of /etc/default/docker or of the drop-in of {UNIT}."
        for key in sorted(settings)
        for flag in sorted(flags & {key, key.removesuffix("s")})
    ]


def subordinate_problem(remap: str, read: Callable[[str], str | None]) -> str | None:
    """Why the engine cannot map users to subordinate ids of ``remap`` (userns-remap)."""
    user, _, group = remap.partition(":")
    if user == "default":
        user = REMAP_USER
    accounts = {
        line.split(":")[0]: line.split(":")[2]
        for line in (read("/etc/passwd") or "").splitlines()
        if line.count(":") >= 2
    }
    ids = {number: name for name, number in accounts.items()}
    name = ids.get(user, user) if user.isdigit() else user
    if name not in accounts:
        if remap == "default":
            return None  # The engine makes this user, with ranges.
        return f"userns-remap names the user {user}, whom the host does not have; create it, or write default."
    for path, whose, number in (
        ("/etc/subuid", name, accounts[name]),
        ("/etc/subgid", group or name, None),
    ):
        total = 0
        for line in (read(path) or "").splitlines():
            fields = line.strip().split(":")
            if len(fields) == 3 and fields[0] in (whose, number) and fields[2].isdigit():
                total += int(fields[2])
        if total < SUBORDINATE_IDS:
            return (
                f"{path} gives {whose} {total} ids, and userns-remap needs {SUBORDINATE_IDS}; add a line such as"
                f" {whose}:300000:{SUBORDINATE_IDS} that overlaps no other."
            )
    return None


@dataclass(frozen=True)
class Engine:
    """What an engine that answers says of itself."""

    running: int = 0
    containers: int = 0
    images: int = 0
    live_restore: bool = False
    storage_driver: str = ""
    swarm: bool = False
    remapped: bool = False

    @classmethod
    def parse(cls, info: Mapping[str, Any]) -> Engine:
        return cls(
            running=int(info.get("ContainersRunning") or 0),
            containers=int(info.get("Containers") or 0),
            images=int(info.get("Images") or 0),
            live_restore=bool(info.get("LiveRestoreEnabled")),
            storage_driver=str(info.get("Driver") or ""),
            swarm=(info.get("Swarm") or {}).get("LocalNodeState") == "active",
            remapped="name=userns" in (info.get("SecurityOptions") or []),
        )


def engine_problems(
    engine: Engine,
    found: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    stop_containers: bool,
) -> list[str]:
    """Why an engine that runs cannot take its new settings without harm to what runs in it."""
    problems = []
    live_restore = bool(new.get("live-restore"))
    if live_restore and engine.swarm:
        problems.append(
            "the host is part of a swarm, and the engine takes no live-restore there; leave the swarm, or set"
            " docker_live_restore: false."
        )
    if found == new:
        return problems
    if bool(new.get("userns-remap")) != engine.remapped and engine.containers:
        problems.append(
            f"the engine has {engine.containers} containers, which it would not find any more with another"
            " userns-remap; remove them first, or leave docker_userns_remap as it is."
        )
    if engine.running and not live_restore and not stop_containers:
        problems.append(
            f"{engine.running} containers run, and the engine's restart would stop them; set"
            " docker_live_restore: true to keep them, or docker_stop_containers: true."
        )
    elif engine.running and live_restore and found.get("bip") != new.get("bip"):
        problems.append(
            f"{engine.running} containers run, and with them the engine keeps its bridge: it would not take the bip"
            f" {new.get('bip')}; stop them first, or set docker_bip to what the bridge has."
        )
    return problems


# --- The host -------------------------------------------------------------------------------------


class Host:
    """What is read of a host. ``root`` is its /, ``run`` runs a command."""

    def __init__(self, run: Run, root: Path = Path("/"), api: Path | None = None) -> None:
        self._run = run
        self._root = root
        self._api = api or root / "run/docker.sock"

    def path(self, name: str) -> Path:
        return self._root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        try:
            return self.path(name).read_text(encoding="utf-8", errors="surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def output(self, *command: str) -> str:
        """What a command prints; nothing where it fails."""
        return self._run([*command])[1]

    def ask(self, what: str, method: str = "GET") -> Any:
        """The engine's answer; None where none answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            try:
                connection.connect(str(self._api))
                # 1.0, so that the answer comes in one piece.
                connection.sendall(f"{method} {what} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            except OSError:
                return None
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0] + b" ":
            return None
        try:
            return json.loads(body)
        except ValueError:
            return body.decode(errors="replace")

    def has_user(self, name: str) -> bool:
        return any(
            line.startswith(f"{name}:") for line in (self.read("/etc/passwd") or "").splitlines()
        )

    def unit(self) -> dict[str, str]:
        """Properties of the engine's unit."""
        names = "LoadState,ActiveState,UnitFileState,ExecMainStartTimestampMonotonic"
        shown = self.output("systemctl", "show", f"--property={names}", UNIT)
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def engine(self) -> Engine | None:
        """The engine, where one runs. Its socket alone would start it."""
        if self.unit().get("ActiveState") != "active":
            return None
        info = self.ask("/info")
        return Engine.parse(info) if isinstance(info, dict) else None

    def packages(self) -> set[str]:
        """Which packages of those that matter here are installed."""
        names = [*ENGINES.values(), "podman-docker"]
        shown = self.output(
            "dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *names
        )
        return {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}

    def networks(self) -> list[tuple[str, str]]:
        """The host's addresses and routes, but those of engines' own interfaces and the default route."""
        found: list[tuple[str, str]] = []
        for version in ("-4", "-6"):
            text = self.output("ip", version, "-json", "route", "show")
            for route in json.loads(text or "[]"):
                device = route.get("dev", "")
                if route["dst"] != "default" and not OWN_INTERFACE.fullmatch(device):
                    found.append((f"a route of the host by {device}", route["dst"]))
            text = self.output("ip", version, "-json", "address", "show")
            for link in json.loads(text or "[]"):
                if OWN_INTERFACE.fullmatch(link.get("ifname", "")):
                    continue
                found += [
                    (f"an address of the host on {link['ifname']}", one["local"])
                    for one in link.get("addr_info", [])
                    if "local" in one
                ]
        return found

    def mtu(self) -> int:
        """That of the interface of the default route; 1500 where there is none."""
        for route in json.loads(
            self.output("ip", "-4", "-json", "route", "show", "default") or "[]"
        ):
            with_mtu = self.read(f"/sys/class/net/{route.get('dev')}/mtu")
            if with_mtu:
                return int(with_mtu)
        return 1500

    def command_line(self) -> str:
        """What the engine is started with, as far as it is known."""
        options = self.read("/etc/default/docker") or ""
        lines = [line for line in options.splitlines() if not line.lstrip().startswith("#")]
        shown = self.output("systemctl", "show", "--property=ExecStart", UNIT)
        return " ".join(lines).replace('"', " ").replace("'", " ").replace("=", " ") + " " + shown

    def file_system(self, name: str) -> tuple[Path, str]:
        """The part of a path that is there, and what kind of file system it is on."""
        path = self.path(name)
        while not path.exists():
            path = path.parent
        kind, best = "", -1
        for line in (self.read("/proc/self/mounts") or "").splitlines():
            place, mounted = line.split()[1:3]
            inside = f"{path}/".startswith(place.rstrip("/") + "/")
            if inside and len(place) >= best:
                kind, best = mounted, len(place)
        return path, kind

    def foreign_engine(self, source: str) -> str | None:
        """An engine that is not the one to be provided, and stands in its way."""
        installed = self.packages()
        for name in ("/snap/bin/docker", "/var/lib/snapd/snap/bin/docker"):
            if self.path(name).is_symlink() or self.path(name).exists():
                return (
                    f"{name}: the host's Docker comes from snap, which is confined and has its files elsewhere;"
                    " remove it with 'snap remove --purge docker'."
                )
        for folder in ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin"):
            path = self._root / folder / "docker"
            if not path.is_file():
                continue
            with path.open("rb") as opened:
                start = opened.read(4096)
            script = start.startswith(b"#!") and b"podman" in start
            if script or path.resolve().name.startswith("podman") or "podman-docker" in installed:
                return (
                    f"/{folder}/docker is podman's stand-in for Docker; remove the package podman-docker, or that"
                    " file."
                )
        for other, package in ENGINES.items():
            if other != source and package in installed:
                return (
                    f"{package} is installed, and docker_source is {source}; set docker_source: {other}, or remove"
                    f" the package, which ends its containers."
                )
        return None

    def data_problems(
        self, settings: Mapping[str, Any], least: int, engine: Engine | None
    ) -> list[str]:
        """Why the engine could not keep its data."""
        where = str(settings.get("data-root") or DATA_ROOT)
        path, kind = self.file_system(where)
        if not path.is_dir():
            return [
                f"{path}, in which the engine's data directory {where} would be, is no directory; remove it."
            ]
        problems = []
        state = os.statvfs(path)
        free = state.f_bavail * state.f_frsize
        if free < least:
            problems.append(
                f"{where}, the engine's data directory, has {free // 2**20} MiB free, and docker_min_free_bytes wants"
                f" {least // 2**20}; make room, or name another directory with docker_daemon_options: data-root."
            )
        elif state.f_files and state.f_favail < 10_000:
            problems.append(
                f"{where}, the engine's data directory, has {state.f_favail} inodes free; remove files there, or name"
                " another directory with docker_daemon_options: data-root."
            )
        works = engine is not None and engine.storage_driver != "vfs"
        if kind == "overlay" and not works and not settings.get("storage-driver"):
            problems.append(
                f"{where}, the engine's data directory, is on overlayfs, where the engine would copy every layer"
                " (vfs); mount another file system there, a volume where the host is a container."
            )
        return problems

    # --- Its engine's life ---

    def outdated(self, daemon: str, unit: Mapping[str, str]) -> bool:
        """Whether the engine began before its configuration, or a drop-in of its unit, was written."""
        files = [self.path(daemon), *self.path(DROP_INS).glob("*.conf")]
        written = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
        began = int(unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
        return time.time() - time.monotonic() + began < written

    def systemctl(self, verb: str, *units: str) -> None:
        code, _, errors = self._run(["systemctl", verb, *(units or (UNIT,))])
        if code != 0:
            raise EngineError(f"systemctl {verb} {' '.join(units or (UNIT,))}: {errors.strip()}")

    def wait(self, seconds: float) -> Engine | None:
        """The engine as soon as it answers; None when it does not in time."""
        end = time.monotonic() + seconds
        while True:
            info = self.ask("/info")
            if isinstance(info, dict):
                return Engine.parse(info)
            state = self.unit().get("ActiveState")
            if time.monotonic() > end or state == "failed":
                return None
            time.sleep(0.1)

    def restart(self, seconds: float, *, stop_containers: bool) -> Engine | None:
        """Starts the engine, or anew with what runs in it kept alive; None when it does not answer then."""
        # Who starts it often in a row must not meet systemd's limit.
        self._run(["systemctl", "reset-failed", UNIT])
        before = self.engine()
        if before is not None and before.running and not before.live_restore:
            # What the engine does with containers at its end it decides by what it knows until then.
            self._run(["systemctl", "reload", UNIT])
            end = time.monotonic() + 10
            while time.monotonic() < end and not (before and before.live_restore):
                time.sleep(0.1)
                before = self.engine()
            if not (before and before.live_restore) and not stop_containers:
                raise EngineError(
                    "containers run, and the engine did not take live-restore with which they would outlive its"
                    f" restart; see 'journalctl -u {UNIT}', stop them, or set docker_stop_containers: true."
                )
        code, _, _ = self._run(["systemctl", "restart", UNIT])
        return self.wait(seconds) if code == 0 else None

    def last_words(self) -> str:
        shown = self.output(
            "journalctl", "--unit", UNIT, "--lines=40", "--output=cat", "--no-pager"
        )
        lines = [line for line in shown.splitlines() if "failed to" in line or "rror" in line]
        return (lines or ["no message"])[-1].strip()[:400]

    # --- Its end ---

    def remove_containers(self) -> None:
        for one in self.ask("/containers/json?all=1") or []:
            self._run(["docker", "rm", "--force", "--volumes", one["Id"]])

    def remove_networks(self) -> None:
        """The interfaces and rules that an engine leaves behind."""
        for link in json.loads(self.output("ip", "-json", "link", "show") or "[]"):
            if OWN_INTERFACE.fullmatch(link["ifname"]) and not link["ifname"].startswith("veth"):
                self._run(["ip", "link", "delete", link["ifname"]])
        for program in ("iptables", "ip6tables"):
            if shutil.which(program) is None:
                continue
            for table in ("nat", "filter"):
                shown = self.output(program, "--table", table, "--list-rules").splitlines()
                for line in shown:
                    words = line.split()
                    own = any(
                        word.startswith("DOCKER") or OWN_INTERFACE.fullmatch(word)
                        for word in words[1:]
                    )
                    if words[0] == "-A" and own:
                        self._run([program, "--table", table, "-D", *words[1:]])
                for option in ("-F", "-X"):
                    for line in shown:
                        words = line.split()
                        if words[0] == "-N" and words[1].startswith("DOCKER"):
                            self._run([program, "--table", table, option, words[1]])
                if "-P FORWARD DROP" in shown:
                    self._run([program, "--table", table, "-P", "FORWARD", "ACCEPT"])

    def tables(self) -> list[str]:
        """The tables of nftables, as `ip filter`."""
        lines = self.output("nft", "list", "tables").splitlines()
        return [line.removeprefix("table ").strip() for line in lines]

    def remove_empty_tables(self, before: Sequence[str]) -> None:
        """Those that were made for the engine's rules and have none any more."""
        for table in self.tables():
            if table in before or table not in ("ip nat", "ip filter", "ip6 nat", "ip6 filter"):
                continue
            listed = self.output("nft", "--json", "list", "table", *table.split())
            if '"rule"' not in listed:
                self._run(["nft", "delete", "table", *table.split()])
