#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: _guarded_rules
short_description: Internal part of cellblock.fleet.guarded_rules
version_added: 0.1.0
description:
  - One step on the host. The action of M(cellblock.fleet.guarded_rules) takes them in the right order; do not
    use this module by itself.
options: {}
author:
  - The Cellblock authors
"""

EXAMPLES = ""

RETURN = ""

import base64  # noqa: E402
import contextlib  # noqa: E402
import hashlib  # noqa: E402
import ipaddress  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import stat  # noqa: E402
import tempfile  # noqa: E402
import zlib  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

SEARCH = "/usr/sbin:/sbin:/usr/bin:/bin"
# The program's status on a host that has nothing yet.
NOTHING_LOADED: dict[str, Any] = {
    "state": "none",
    "missing": [],
    "added": [],
    "sha256": None,
}
# The answer to "load them" must be with the controller before the rules can cut its connection.
LOAD_AFTER_S = 1


class HostError(Exception):
    """An expected failure; the text is one sentence with the remedy."""


def ssh_connection(proc: str = "/proc", pid: int | None = None) -> str:
    """sshd's SSH_CONNECTION of the connection that runs us, or an empty string.

    become's sudo removes it from the environment, so the processes above us are asked too.
    """
    pid = os.getpid() if pid is None else pid
    for _ in range(64):
        try:
            with open(f"{proc}/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
            with open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            return ""
        for variable in variables:
            if variable.startswith(b"SSH_CONNECTION="):
                return variable.split(b"=", 1)[1].decode("ascii", "replace")
        if parent <= 1:
            return ""
        pid = parent
    return ""


def networks(controllers: list[str]) -> list[Any]:
    found = []
    for text in controllers:
        try:
            found.append(ipaddress.ip_network(text, strict=False))
        except ValueError as error:
            raise HostError(
                f"controllers: '{text}' is no IP address or network ({error}); write one like "
                "192.0.2.10 or 2001:db8::/64."
            ) from error
    return found


def check_controllers(controllers: list[str], ports: list[int] | None, connection: str) -> None:
    """The connection that does all this must be one that the rules are said to admit."""
    known = networks(controllers)
    if not known:
        raise HostError(
            "controllers is empty, so nobody could administer the host any more; give the "
            "controllers' addresses."
        )
    if not connection:
        return
    source = connection.split()[0].split("%")[0]
    address = ipaddress.ip_address(source)
    address = getattr(address, "ipv4_mapped", None) or address
    if not any(address in network for network in known):
        raise HostError(
            f"This very connection comes from {source}, which is in none of the controllers "
            f"({', '.join(controllers)}); the new rules would cut it off: add the address to them."
        )
    # The port that sshd itself sees, so one that is forwarded on the way here does not matter.
    port = int(connection.split()[3])
    if ports is not None and port not in ports:
        raise HostError(
            f"This very connection came to port {port}, and the flows let the controllers open "
            f"{', '.join(map(str, ports)) or 'no port'}; the new rules would cut it off: give the "
            f"service ssh port {port}, or have sshd listen on another."
        )


def addresses_in(rules: str) -> set[Any]:
    """Those that the rules name, comments left out."""
    found = set()
    for line in rules.splitlines():
        for word in re.findall(r"[0-9A-Fa-f:.]+", re.sub(r'"[^"]*"', "", line).partition("#")[0]):
            with contextlib.suppress(ValueError):
                found.add(ipaddress.ip_address(word))
    return found


def read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def content_of(file: dict[str, str]) -> bytes:
    return zlib.decompress(base64.b64decode(file["content"]))


def shown(file: dict[str, str], content: bytes | None) -> str:
    """For the difference; a program would bury the rules."""
    if content is None:
        return ""
    if int(file["mode"], 8) & 0o111:
        return f"sha256:{hashlib.sha256(content).hexdigest()}\n"
    return content.decode(errors="backslashreplace")


def is_as_installed(path: str, mode: str) -> bool:
    """A file of root's own, no link, that nobody else can write to."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == found.st_gid == 0
        and f"0{found.st_mode & 0o7777:03o}" == mode
    )


class Host:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.name: str = self.params["name"]
        self.program_path: str = next(
            file["path"]
            for file in self.params["files"]
            if os.path.basename(file["path"]) == self.name
        )
        # In the order in which they are started; the last is the guard's.
        self.units: list[str] = self.params["units"]
        self.reasons: list[str] = []
        self.diff: list[dict[str, str]] = []

    # --- Asking the host

    def run(self, command: list[str], data: str | None = None) -> tuple[int, str, str]:
        code, out, err = self.module.run_command(command, data=data, binary_data=True)
        return code, out, err

    def program(self, *arguments: str, data: str | None = None, path: str = "") -> str:
        """What the program prints; its sentence becomes ours."""
        code, out, err = self.run([path or self.program_path, *arguments], data)
        if code != 0:
            raise HostError(err.strip().replace(f"{self.name}: ", "") or out.strip())
        return out

    def status(self, path: str) -> dict[str, Any]:
        code, out, err = self.run([path, "status", "--json"])
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError:
            raise HostError(err.strip().replace(f"{self.name}: ", "")) from None
        return answer

    def unit_problem(self, unit: str) -> str:
        for verb, wanted in (("is-enabled", "enabled"), ("is-active", "active")):
            _, out, _ = self.run(["systemctl", verb, unit])
            if out.strip() != wanted:
                return f"{unit} is {out.strip() or 'absent'}, not {wanted}"
        return ""

    # --- Finding out

    def files_to_write(self) -> list[dict[str, str]]:
        wrong = []
        for file in self.params["files"]:
            path = file["path"]
            before = read(path)
            content = content_of(file)
            if before == content and is_as_installed(path, file["mode"]):
                continue
            wrong.append(file)
            self.reasons.append(f"{path} {'is absent' if before is None else 'differs'}")
            self.show(path, shown(file, before), shown(file, content))
        return wrong

    def show(self, what: str, before: str, after: str) -> None:
        self.diff.append(
            {"before_header": what, "after_header": what, "before": before, "after": after}
        )

    def plan(self) -> dict[str, Any]:
        """What has to be changed; changes nothing itself, so it is also the whole of check mode."""
        rules = self.params["rules"]
        has_nft = bool(shutil.which("nft", path=SEARCH))
        if not has_nft and not self.module.check_mode:
            raise HostError(
                "The program nft is missing on this host; install it (apt-get install nftables)."
            )
        if not os.path.isdir("/run/systemd/system"):
            raise HostError(
                "This host does not run systemd, which starts the rollback's timer and loads the "
                "rules at boot; use a host that boots with it."
            )
        if self.params["controllers"] is not None:
            check_controllers(
                self.params["controllers"], self.params["controller_ports"], ssh_connection()
            )
        files = self.files_to_write()
        if not has_nft:
            self.module.warn("nft is still to be installed, so the rules were not checked.")
            return self.planned(self.rules_to_load(rules, NOTHING_LOADED), NOTHING_LOADED)
        with tempfile.TemporaryDirectory(prefix=f".{self.name}-") as directory:
            program = self.usable_program(directory, files)
            status = self.status(program)
            trial = status["pending"]
            if trial and trial["phase"] != "failed":
                raise HostError(
                    "Other rules wait for confirmation on this host and roll back in "
                    f"{trial['seconds_left']:.0f} s; wait until then and run again."
                )
            load = self.rules_to_load(rules, status)
            if load:
                if self.params["controllers"] is not None:
                    self.check_routers(rules)
                self.program("check", "-", data=rules, path=program)
        return self.planned(load, status)

    def planned(self, load: bool, status: dict[str, Any]) -> dict[str, Any]:
        self.reasons += [problem for problem in map(self.unit_problem, self.units) if problem]
        return {
            "changed": bool(self.reasons),
            "load": load,
            "reasons": self.reasons,
            "missing": status["missing"] if status["state"] != "none" else [],
            "added": status["added"],
            "diff": self.diff,
        }

    def check_routers(self, rules: str) -> None:
        """A default route from router advertisements outlives the trial and ends when it expires."""
        code, out, _ = self.run(["ip", "-6", "-json", "route", "show", "default", "proto", "ra"])
        try:
            routes = json.loads(out or "[]") if code == 0 else []
        except ValueError:
            routes = []
        named = addresses_in(rules)
        for route in routes:
            for hop in route.get("nexthops") or [route]:
                router = hop.get("gateway")
                if router and ipaddress.ip_address(router) not in named:
                    raise HostError(
                        f"This host has its IPv6 default route from the router {router}, whose "
                        "advertisements the new rules drop, so that it would expire; let them admit "
                        "it (role firewall: firewall_ipv6_routers)."
                    )

    def usable_program(self, directory: str, files: list[dict[str, str]]) -> str:
        """The program as it will be installed, from a temporary place where it is not yet."""
        for file in files:
            if file["path"] == self.program_path:
                path = os.path.join(directory, self.name)
                with open(path, "wb") as copy:
                    copy.write(content_of(file))
                os.chmod(path, 0o700)
                return path
        return self.program_path

    def rules_to_load(self, rules: str, status: dict[str, Any]) -> bool:
        found = read(self.params["path"])
        confirmed = None if found is None else found.decode(errors="backslashreplace")
        digest = hashlib.sha256(rules.encode()).hexdigest()
        load = False
        if confirmed != rules:
            load = True
            self.reasons.append(
                "there are no rules yet" if confirmed is None else "the rules differ"
            )
            self.show(self.params["path"], confirmed or "", rules)
        elif status["state"] != "loaded" or status["sha256"] != digest:
            load = True
            self.reasons.append(f"the rules are not loaded (state: {status['state']})")
        missing, added = status["missing"], status["added"]
        if missing or added:
            load = True
            self.reasons.append("the kernel's table is not what was loaded")

            def lines(items: list[dict[str, str]]) -> str:
                return "".join(f"{item['object']}: {item['text']}\n" for item in items)

            self.show("the table in the kernel", lines(added), lines(missing))
        return load

    # --- Changing

    def apply(self) -> dict[str, Any]:
        """Files, and the rules on trial: in a second, so that this answer arrives in any case."""
        files = self.files_to_write()
        for file in files:
            self.write(file)
        if any(file["path"].startswith("/etc/systemd/") for file in files):
            self.systemctl("daemon-reload")
        if self.params["token"]:
            self.program(
                "apply",
                "-",
                f"--token={self.params['token']}",
                *self.lifeline(),
                f"--rollback-after={self.params['rollback_after_s']}",
                f"--load-after={LOAD_AFTER_S}",
                data=self.params["rules"],
            )
        else:
            self.start_units(restart_guard=bool(files))
        return {
            "changed": True,
            "connection": ssh_connection(),
            "load_after_s": LOAD_AFTER_S,
        }

    def lifeline(self) -> list[str]:
        if self.params["controllers"] is None:
            return []
        connection = ssh_connection()
        return [
            f"--controllers={','.join(map(str, networks(self.params['controllers'])))}",
            f"--ssh-port={connection.split()[3] if connection else 22}",
        ]

    def look(self) -> dict[str, Any]:
        """How the trial stands."""
        status = self.status(self.program_path)
        trial = status["pending"] or {}
        ours = trial.get("token") == self.params["token"]
        return {
            "connection": ssh_connection(),
            "phase": trial["phase"] if ours else "none",
            "error": trial.get("error") if ours else None,
            "rolled_back": status["rolled_back"] == self.params["token"],
            "state": status["state"],
        }

    def confirm(self) -> dict[str, Any]:
        connection = ssh_connection()
        if connection and connection in self.params["earlier_connections"]:
            raise HostError(
                "The confirmation came over a connection that is older than the new rules and "
                "proves nothing; it is not accepted: look at Ansible's ssh_args (ControlMaster)."
            )
        self.program("confirm", f"--token={self.params['token']}")
        # The guard may be of the version before; it is quick to start.
        self.start_units(restart_guard=True)
        return {"changed": True}

    def start_units(self, restart_guard: bool) -> None:
        self.systemctl("enable", "--quiet", *self.units)
        self.systemctl("start", *self.units)
        if restart_guard:
            self.systemctl("restart", self.units[-1])

    def systemctl(self, *arguments: str) -> None:
        code, out, err = self.run(["systemctl", *arguments])
        if code != 0:
            reason = " ".join((err or out).split())
            raise HostError(
                f"'systemctl {' '.join(arguments)}' failed ({reason}); look at 'journalctl -u "
                f"{' -u '.join(self.units)}'."
            )

    def write(self, file: dict[str, str]) -> None:
        directory = os.path.dirname(file["path"])
        os.makedirs(directory, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{self.name}-")
        with os.fdopen(handle, "wb") as copy:
            copy.write(content_of(file))
            copy.flush()
            os.fsync(copy.fileno())
        os.chmod(temporary, int(file["mode"], 8))
        os.replace(temporary, file["path"])

    # --- Removing

    def remove(self) -> dict[str, Any]:
        rules = self.params["path"]
        paths = [file["path"] for file in self.params["files"]]
        records = [rules, f"{os.path.splitext(rules)[0]}.json", f"/run/{self.name}"]
        there = [path for path in [*paths, *records] if os.path.lexists(path)]
        tables: list[str] = []
        if shutil.which("nft", path=SEARCH):
            tables = [
                table
                for table in self.params["tables"]
                if self.run(["nft", "list", "table", *table.split()])[0] == 0
            ]
        units = [unit for unit in self.units if self.unit_known(unit)]
        before = [*there, *(f"table {table}" for table in tables), *units]
        if before and not self.module.check_mode:
            if units:
                self.systemctl("disable", "--quiet", "--now", *units)
            if os.path.exists(self.program_path):
                self.program("remove")
            else:
                for table in tables:
                    self.run(["nft", "delete", "table", *table.split()])
            for path in there:
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                elif os.path.lexists(path):
                    os.unlink(path)
            self.systemctl("daemon-reload")
            self.run(["systemctl", "reset-failed", *self.units])
            with contextlib.suppress(OSError):
                # Ours alone or shared with other roles, whose files are still in it then.
                os.rmdir(os.path.dirname(rules))
        return {
            "changed": bool(before),
            "reasons": [f"{name} is there" for name in before],
            "diff": {"before": "".join(f"{name}\n" for name in before), "after": ""},
        }

    def unit_known(self, unit: str) -> bool:
        _, out, _ = self.run(["systemctl", "is-enabled", unit])
        _, active, _ = self.run(["systemctl", "is-active", unit])
        return out.strip() == "enabled" or active.strip() in ("active", "activating")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "step": {
                "type": "str",
                "choices": ["plan", "apply", "look", "confirm", "remove"],
                "required": True,
            },
            "name": {"type": "str", "required": True},
            "tables": {"type": "list", "elements": "str", "required": True},
            "path": {"type": "path", "required": True},
            "rules": {"type": "str"},
            "controllers": {"type": "list", "elements": "str"},
            "controller_ports": {"type": "list", "elements": "int"},
            "rollback_after_s": {"type": "int", "required": True},
            # Content is compressed and in base64.
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                    "mode": {"type": "str", "required": True},
                },
            },
            "units": {"type": "list", "elements": "str", "required": True},
            # Of this trial; none where only files have changed.
            "token": {"type": "str", "default": "", "no_log": False},
            "earlier_connections": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    host = Host(module)
    try:
        if os.geteuid() != 0:
            raise HostError("Only root can change the rules; run the task with become.")
        if not 10 <= module.params["rollback_after_s"] <= 600:
            raise HostError(
                f"rollback_after_s is {module.params['rollback_after_s']}; a new connection needs "
                "some time, and nobody should be cut off for long: set 10 to 600."
            )
        result = getattr(host, module.params["step"])()
    except HostError as error:
        module.fail_json(msg=str(error))
    except (OSError, UnicodeError) as error:
        module.fail_json(msg=f"{error}.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
