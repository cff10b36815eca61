#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: firewall
short_description: The host's own nftables table, changed without locking anybody out
version_added: 0.1.0
description:
  - Ensures that C(table inet cellblock) holds exactly the given rules, now and after a reboot, and that
    the guard which repairs it is running. Other tables are never touched.
  - New rules are loaded on trial. A timer on the host brings the earlier ones back (or removes the
    table, where there were none) unless this action confirms them over a connection that it opened
    after they were loaded. An established or shared connection proves nothing, so it is never used.
  - When the confirmation does not come through, the action waits until the host is back on the
    earlier rules, makes sure that it answers, and fails saying so. A play that is killed on the way
    leads to the same rollback.
  - Everything that can be wrong with the rules or the host is found before anything is changed;
    the rules are really loaded, in a network namespace that is thrown away.
options:
  state:
    description: Whether the firewall shall be there; V(absent) removes the table, the units and
      O(files), and nothing else.
    type: str
    choices: [present, absent]
    default: present
  rules:
    description: The rules, one C(table inet cellblock { ... }). Needed unless O(state=absent).
    type: str
  controllers:
    description:
      - Addresses or networks from which the host is administered. Needed unless O(state=absent).
      - The address that this very connection comes from must be among them; otherwise the task fails
        before anything is changed. Connections other than ssh are not checked.
      - They keep ssh if the confirmed rules cannot be loaded at a later boot.
    type: list
    elements: str
    default: []
  rollback_after_s:
    description: Seconds after which rules that nobody confirmed are rolled back.
    type: int
    default: 30
  files:
    description: Files that the firewall consists of on the host, the program and its units, with their
      content.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path on the host.
        type: path
        required: true
      content:
        description: What is in it. Not needed with O(state=absent).
        type: str
        default: ""
      mode:
        description: Its mode, an octal string.
        type: str
        default: "0644"
  phase:
    description: Set by the action plugin.
    type: str
    choices: [plan, apply, look, confirm]
    default: plan
  token:
    description: Set by the action plugin.
    type: str
    default: ""
  earlier_connections:
    description: Set by the action plugin.
    type: list
    elements: str
    default: []
requirements:
  - root on the host; Python 3.9 or newer, systemd, C(nft), C(unshare)
attributes:
  check_mode:
    description: Can run in check mode, also on a clean host. The rules are checked as always.
    support: full
  diff_mode:
    description: Shows the change in rules and files, and how the kernel's table differs from what was
      loaded.
    support: full
  idempotent:
    description: A second run with the same rules changes nothing.
    support: full
  action:
    description: Has an action plugin that runs on the controller.
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: none
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Load the rules
  cellblock.fleet.firewall:
    rules: "{{ lookup('ansible.builtin.template', 'firewall.nft.j2') }}"
    controllers: [192.0.2.10, "2001:db8::10"]
    files:
      - path: /usr/local/sbin/cellblock-firewall
        content: "{{ lookup('ansible.builtin.file', 'cellblock-firewall') }}"
        mode: "0755"
"""

RETURN = r"""
reasons:
  description: Why something had to be changed, one fragment each.
  returned: success
  type: list
  elements: str
missing:
  description: What the kernel's table lacked before of what was loaded; each with C(object) and C(text).
  returned: O(state=present)
  type: list
  elements: dict
added:
  description: What somebody had added to the kernel's table; each with C(object) and C(text).
  returned: O(state=present)
  type: list
  elements: dict
confirmed_after_s:
  description: Seconds from the start of loading to the confirmation over a new connection.
  returned: when new rules were loaded
  type: float
"""

import contextlib  # noqa: E402
import hashlib  # noqa: E402
import ipaddress  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

PROGRAM = "/usr/local/sbin/cellblock-firewall"
CONFIRMED = "/etc/cellblock/firewall.nft"
UNITS = ["cellblock-firewall.service", "cellblock-firewall-guard.service"]
GUARD = UNITS[1]
# The answer to "load them" must be with the controller before the rules can cut its connection.
LOAD_AFTER_S = 1


class FirewallError(Exception):
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
            raise FirewallError(
                f"controllers: '{text}' is no IP address or network ({error}); write one like "
                "192.0.2.10 or 2001:db8::/64."
            ) from error
    return found


def check_controllers(controllers: list[str], connection: str) -> None:
    """The connection that does all this must be one that the rules are said to admit."""
    known = networks(controllers)
    if not known:
        raise FirewallError(
            "controllers is empty, so nobody could administer the host any more; give the "
            "controllers' addresses."
        )
    if not connection:
        return
    source = connection.split()[0].split("%")[0]
    address = ipaddress.ip_address(source)
    address = getattr(address, "ipv4_mapped", None) or address
    if not any(address in network for network in known):
        raise FirewallError(
            f"This very connection comes from {source}, which is in none of the controllers "
            f"({', '.join(controllers)}); the new rules would cut it off: add the address to them."
        )


def read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def shown(file: dict[str, str], content: str | None) -> str:
    """For the difference; a program's text would bury the rules."""
    if content is None:
        return ""
    if int(file["mode"], 8) & 0o111:
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}\n"
    return content


def mode_of(path: str) -> str:
    return f"0{os.stat(path).st_mode & 0o7777:03o}"


class Firewall:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.reasons: list[str] = []
        self.diff: list[dict[str, str]] = []

    # --- Asking the host

    def run(self, command: list[str], data: str | None = None) -> tuple[int, str, str]:
        code, out, err = self.module.run_command(command, data=data, binary_data=True)
        return code, out, err

    def program(self, *arguments: str, data: str | None = None, path: str = "") -> str:
        """What the program prints; its sentence becomes ours."""
        code, out, err = self.run([path or PROGRAM, *arguments], data)
        if code != 0:
            raise FirewallError(err.strip().replace("cellblock-firewall: ", "") or out.strip())
        return out

    def status(self, path: str) -> dict[str, Any]:
        code, out, err = self.run([path, "status", "--json"])
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError:
            raise FirewallError(err.strip().replace("cellblock-firewall: ", "")) from None
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
            if before == file["content"] and mode_of(path) == file["mode"]:
                continue
            wrong.append(file)
            self.reasons.append(f"{path} {'is absent' if before is None else 'differs'}")
            self.show(path, shown(file, before), shown(file, file["content"]))
        return wrong

    def show(self, what: str, before: str, after: str) -> None:
        self.diff.append(
            {"before_header": what, "after_header": what, "before": before, "after": after}
        )

    def plan(self) -> dict[str, Any]:
        """What has to be changed; changes nothing itself, so it is also the whole of check mode."""
        rules = self.params["rules"]
        if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            raise FirewallError(
                "The program nft is missing on this host; install it (apt-get install nftables)."
            )
        if not os.path.isdir("/run/systemd/system"):
            raise FirewallError(
                "This host does not run systemd, which starts the rollback's timer and loads the "
                "rules at boot; use a host that boots with it."
            )
        check_controllers(self.params["controllers"], ssh_connection())
        files = self.files_to_write()
        with tempfile.TemporaryDirectory(prefix="cellblock-firewall-") as directory:
            program = self.usable_program(directory, files)
            status = self.status(program)
            trial = status["pending"]
            if trial and trial["phase"] != "failed":
                raise FirewallError(
                    "Other rules wait for confirmation on this host and roll back in "
                    f"{trial['seconds_left']:.0f} s; wait until then and run again."
                )
            load = self.rules_to_load(rules, status)
            if load:
                self.check_routers(rules)
                self.program("check", "-", data=rules, path=program)
        units = [problem for problem in map(self.unit_problem, UNITS) if problem]
        self.reasons += units
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
        for route in routes:
            for hop in route.get("nexthops") or [route]:
                router = hop.get("gateway")
                if router and router not in rules:
                    raise FirewallError(
                        f"This host has its IPv6 default route from the router {router}, whose "
                        "advertisements the new rules drop, so that it would expire; name the router "
                        "in firewall_ipv6_routers."
                    )

    def usable_program(self, directory: str, files: list[dict[str, str]]) -> str:
        """The program as it will be installed, from a temporary place where it is not yet."""
        for file in files:
            if file["path"] == PROGRAM:
                path = os.path.join(directory, os.path.basename(PROGRAM))
                with open(path, "w", encoding="utf-8") as copy:
                    copy.write(file["content"])
                os.chmod(path, 0o700)
                return path
        if not os.path.exists(PROGRAM):
            raise FirewallError(f"{PROGRAM} is neither on the host nor among the files; add it.")
        return PROGRAM

    def rules_to_load(self, rules: str, status: dict[str, Any]) -> bool:
        confirmed = read(CONFIRMED)
        digest = hashlib.sha256(rules.encode()).hexdigest()
        load = False
        if confirmed != rules:
            load = True
            self.reasons.append(
                "there are no rules yet" if confirmed is None else "the rules differ"
            )
            self.show(CONFIRMED, confirmed or "", rules)
        elif status["state"] != "loaded" or status["sha256"] != digest:
            load = True
            self.reasons.append(f"the rules are not loaded (state: {status['state']})")
        missing, added = status["missing"], status["added"]
        if missing or added:
            load = True
            self.reasons.append("the kernel's table is not what was loaded")

            def lines(items: list[dict[str, str]]) -> str:
                return "".join(f"{item['object']}: {item['text']}\n" for item in items)

            self.show("table inet cellblock in the kernel", lines(added), lines(missing))
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
            connection = ssh_connection()
            self.program(
                "apply",
                "-",
                f"--token={self.params['token']}",
                f"--controllers={','.join(map(str, networks(self.params['controllers'])))}",
                f"--ssh-port={connection.split()[3] if connection else 22}",
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

    def look(self) -> dict[str, Any]:
        """How the trial stands."""
        status = self.status(PROGRAM)
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
            raise FirewallError(
                "The confirmation came over a connection that is older than the new rules and "
                "proves nothing; it is not accepted: look at Ansible's ssh_args (ControlMaster)."
            )
        self.program("confirm", f"--token={self.params['token']}")
        # The guard may be of the version before; it is quick to start.
        self.start_units(restart_guard=True)
        return {"changed": True}

    def start_units(self, restart_guard: bool) -> None:
        self.systemctl("enable", "--quiet", *UNITS)
        self.systemctl("start", *UNITS)
        if restart_guard:
            self.systemctl("restart", GUARD)

    def systemctl(self, *arguments: str) -> None:
        code, out, err = self.run(["systemctl", *arguments])
        if code != 0:
            reason = " ".join((err or out).split())
            raise FirewallError(
                f"'systemctl {' '.join(arguments)}' failed ({reason}); look at 'journalctl -u "
                "cellblock-firewall -u cellblock-firewall-guard'."
            )

    def write(self, file: dict[str, str]) -> None:
        directory = os.path.dirname(file["path"])
        os.makedirs(directory, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".cellblock-firewall-")
        with os.fdopen(handle, "w", encoding="utf-8") as copy:
            copy.write(file["content"])
            copy.flush()
            os.fsync(copy.fileno())
        os.chmod(temporary, int(file["mode"], 8))
        os.replace(temporary, file["path"])

    # --- Removing

    def absent(self) -> dict[str, Any]:
        paths = [file["path"] for file in self.params["files"]]
        records = [CONFIRMED, "/etc/cellblock/firewall.json", "/run/cellblock-firewall"]
        there = [path for path in [*paths, *records] if os.path.lexists(path)]
        table = False
        if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin"):
            table = self.run(["nft", "list", "table", "inet", "cellblock"])[0] == 0
        units = [unit for unit in UNITS if self.unit_known(unit)]
        before = [*there, *(["table inet cellblock"] if table else []), *units]
        if before and not self.module.check_mode:
            if units:
                self.systemctl("disable", "--quiet", "--now", *units)
            if os.path.exists(PROGRAM):
                self.program("remove")
            elif table:
                self.run(["nft", "delete", "table", "inet", "cellblock"])
            for path in there:
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                elif os.path.lexists(path):
                    os.unlink(path)
            self.systemctl("daemon-reload")
            self.run(["systemctl", "reset-failed", *UNITS])
            with contextlib.suppress(OSError):
                # Ours alone or shared with other roles, whose files are still in it then.
                os.rmdir("/etc/cellblock")
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
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "rules": {"type": "str"},
            "controllers": {"type": "list", "elements": "str", "default": []},
            "rollback_after_s": {"type": "int", "default": 30},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "default": ""},
                    "mode": {"type": "str", "default": "0644"},
                },
            },
            "phase": {
                "type": "str",
                "choices": ["plan", "apply", "look", "confirm"],
                "default": "plan",
            },
            "token": {"type": "str", "default": "", "no_log": False},
            "earlier_connections": {"type": "list", "elements": "str", "default": []},
        },
        required_if=[("state", "present", ["rules"])],
        supports_check_mode=True,
    )
    firewall = Firewall(module)
    try:
        if os.geteuid() != 0:
            raise FirewallError("Only root can change the rules; run the task with become.")
        if not 10 <= module.params["rollback_after_s"] <= 600:
            raise FirewallError(
                f"rollback_after_s is {module.params['rollback_after_s']}; a new connection needs "
                "some time, and nobody should be cut off for long: set 10 to 600."
            )
        if module.params["state"] == "absent":
            result = firewall.absent()
        elif module.params["phase"] == "plan":
            result = firewall.plan()
        elif module.params["phase"] == "apply":
            result = firewall.apply()
        elif module.params["phase"] == "look":
            result = firewall.look()
        else:
            result = firewall.confirm()
    except FirewallError as error:
        module.fail_json(msg=str(error))
    except (OSError, UnicodeError) as error:
        module.fail_json(msg=f"{error}.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
