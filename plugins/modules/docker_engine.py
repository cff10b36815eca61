#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_engine
short_description: Configure a host's Docker engine without losing what others configured or what runs in it
version_added: 0.1.0
description:
  - With O(state=checked) it looks at the host and fails with every reason why the engine cannot be provided
    there as O(settings) say. It changes nothing.
  - With O(state=configured) it puts O(settings) into the engine's configuration file. Settings that are not
    among them stay as they are. What was there before is recorded. It reports a change also when the engine
    began before the file was written, so that an interrupted run can be repeated.
  - With O(state=running) it enables and starts the engine, restarts it where it began before its configuration
    was written, and returns when it answers. Containers outlive the restart where C(live-restore) is set, also
    if it was not before. An engine that does not come up gets its earlier configuration back.
  - With O(state=absent) it takes O(settings) that were recorded out again. An engine that was not there before
    is stopped with its containers, and its data, networks and rules are removed; its packages are not.
options:
  state:
    description: What to do; see the description.
    type: str
    choices: [checked, configured, running, absent]
    required: true
  settings:
    description:
      - What the configuration file has to say, by the engine's own keys. Objects are merged, lists are not. What
        is null is left to others. C(mtu) 0 is that of the default route's interface.
    type: dict
    default: {}
  source:
    description: Where the engine comes from, the distribution's packages or those of Docker's own archive.
    type: str
    choices: [distribution, upstream]
    default: distribution
  avoided_networks:
    description: Addresses and networks that the engine's networks must not overlap, such as the fleet's.
    type: list
    elements: str
    default: []
  inner_networks:
    description: Networks that engines within containers use, which the engine's own must not overlap.
    type: list
    elements: str
    default: []
  min_free_bytes:
    description: What the file system of the engine's data directory must have free.
    type: int
    default: 0
  stop_containers:
    description: Whether a restart of the engine may stop containers.
    type: bool
    default: false
  remove_data:
    description: With O(state=absent), whether containers, images and volumes may be removed.
    type: bool
    default: false
  timeout:
    description: Seconds that the engine may take until it answers.
    type: int
    default: 60
  path:
    description: The engine's configuration file.
    type: path
    default: /etc/docker/daemon.json
  record:
    description: Where it is written down what was there before.
    type: path
    default: /var/lib/cellblock/docker.json
requirements:
  - Python 3.10 or newer on the host
  - systemd and iproute2 on the host
attributes:
  check_mode:
    description: Can run in check mode and predict changes.
    support: full
  diff_mode:
    description: Shows what changes in the configuration file.
    support: full
  idempotent:
    description: A second run changes nothing.
    support: full
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Refuse a host that cannot have the engine
  cellblock.fleet.docker_engine:
    state: checked
    settings: {bip: 172.16.0.1/24, live-restore: true}
    avoided_networks: [192.0.2.0/24]

- name: Configure the engine
  cellblock.fleet.docker_engine:
    state: configured
    settings: {bip: 172.16.0.1/24, live-restore: true}
  notify: Restart Docker

- name: Run it
  cellblock.fleet.docker_engine:
    state: running
"""

RETURN = r"""
done:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: ["daemon.json is written", "docker.service is restarted"]
problems:
  description: With O(state=checked), why the engine cannot be provided.
  returned: failure
  type: list
  elements: str
"""

import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import stat  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._docker_engine import (  # noqa: E402
    DATA_ROOT,
    REMAP_USER,
    UNIT,
    EngineError,
    Host,
    Record,
    Settings,
    collisions,
    engine_problems,
    flag_conflicts,
    format_daemon,
    merge,
    parse_daemon,
    subordinate_problem,
)

FORWARDING = "/proc/sys/net/ipv4/ip_forward"
# containerd makes it, and leaves it.
CNI = "/etc/cni"


def owned(path: Path) -> list[int] | None:
    """A directory's mode and owner; None where there is none."""
    if not path.is_dir():
        return None
    state = path.stat()
    return [stat.S_IMODE(state.st_mode), state.st_uid, state.st_gid]


def remove_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


# What the role worker_container calls its container and images.
WORKER = "cellblock-worker"


def held(host: Host) -> tuple[int, int, int]:
    """How many containers, images and volumes an engine has, but for those of the role worker_container, which are made
    anew from nothing whenever it is wanted.
    """
    containers, images = host.ask("/containers/json?all=1") or [], host.ask("/images/json") or []
    volumes = {one["Name"] for one in (host.ask("/volumes") or {}).get("Volumes") or []}
    ours = [one for one in containers if f"/{WORKER}" in (one.get("Names") or [])]
    volumes -= {mount.get("Name") for one in ours for mount in one.get("Mounts") or []}
    others = [
        one
        for one in images
        if not all(tag.startswith(f"{WORKER}:") for tag in one.get("RepoTags") or [""])
    ]
    return len(containers) - len(ours), len(others), len(volumes)


class Task:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.host = Host(lambda command: module.run_command(command))
        self.path: str = module.params["path"]
        self.record_path = Path(module.params["record"])
        # What was in the file and in the record before the last change, until the engine has answered.
        self.before_path = self.record_path.with_suffix(".before.json")
        self.done: list[str] = []
        self.diff: dict[str, str] = {}

    def settings(self) -> Settings:
        wanted = dict(self.module.params["settings"])
        if wanted.get("mtu") == 0:
            wanted["mtu"] = self.host.mtu()
        return wanted

    def record(self) -> Record:
        text = self.host.read(str(self.record_path))
        return Record() if text is None else Record.parse(text)

    def write(self, path: Path, text: str | None, mode: int = 0o644) -> None:
        if text is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.chmod(temporary, mode)
        # Keeps mode and owner of a file that is there.
        self.module.atomic_move(temporary, str(path))

    # --- checked ---

    def check(self) -> None:
        problems = self.problems()
        if problems:
            self.module.fail_json(msg=" ".join(problems), problems=problems)

    def problems(self) -> list[str]:
        params, host = self.module.params, self.host
        foreign = host.foreign_engine(params["source"])
        if foreign:
            return [foreign]  # What follows would be about the wrong one.
        wanted = self.settings()
        found = parse_daemon(host.read(self.path), self.path)
        new, _ = merge(found, self.record(), wanted)
        others = [
            ("the fleet's, docker_avoided_networks", one) for one in params["avoided_networks"]
        ]
        others += [
            ("of engines in containers, docker_inner_networks", one)
            for one in params["inner_networks"]
        ]
        problems = collisions(new, others + host.networks())
        problems += flag_conflicts(new, host.command_line())
        problems += [
            f"dns has {server}, which is each container's own; write a resolver's address with docker_dns."
            for server in new.get("dns") or []
            if str(server).startswith("127.") or server == "::1"
        ]
        if new.get("userns-remap"):
            problem = subordinate_problem(str(new["userns-remap"]), host.read)
            problems += [problem] if problem else []
        engine = host.engine()
        problems += host.data_problems(new, params["min_free_bytes"], engine)
        if engine is not None:
            stop = params["stop_containers"]
            problems += engine_problems(engine, found, new, stop_containers=stop)
        return problems

    # --- configured ---

    def configure(self) -> None:
        host = self.host
        text = host.read(self.path)
        found, record = parse_daemon(text, self.path), self.record()
        recorded = host.read(str(self.record_path))
        new, record = merge(found, record, self.settings())
        if recorded is None:
            record.host = {
                "daemon_json": text is not None,
                "directory": Path(self.path).parent.is_dir(),
                "engine": shutil.which("dockerd", path="/usr/sbin:/usr/bin:/usr/local/bin")
                is not None,
                "ip_forward": (host.read(FORWARDING) or "").strip(),
                "tables": host.tables(),
                "cni": Path(CNI).is_dir(),
                "data": owned(Path(DATA_ROOT)),
                "remap_user": host.has_user(REMAP_USER),
            }
        if new != found or text is None:
            self.done.append(f"{self.path} is written")
            self.diff = {
                "before_header": self.path,
                "after_header": self.path,
                "before": text or "",
                "after": format_daemon(new),
            }
        elif host.outdated(self.path, host.unit()):
            self.done.append("the engine is older than its configuration")
        if self.module.check_mode:
            return
        if recorded != record.format():
            self.write(self.record_path, record.format())
        if self.diff:
            before = json.dumps({"daemon": text, "record": recorded})
            self.write(self.before_path, before, 0o600)
            self.write(Path(self.path), self.diff["after"])

    # --- running ---

    def run(self) -> None:
        host, unit = self.host, self.host.unit()
        there = unit.get("LoadState") == "loaded"
        if not there and not self.module.check_mode:
            raise EngineError(f"the host has no {UNIT}; install the engine first.")
        if there and unit.get("UnitFileState") != "enabled":
            self.done.append(f"{UNIT} is enabled")
            if not self.module.check_mode:
                host.systemctl("enable", UNIT)
        if unit.get("ActiveState") != "active":
            self.done.append(f"{UNIT} is started")
        elif host.outdated(self.path, unit):
            self.done.append(f"{UNIT} is restarted")
        if self.module.check_mode:
            return
        seconds = self.module.params["timeout"]
        if {f"{UNIT} is started", f"{UNIT} is restarted"} & set(self.done):
            stop = self.module.params["stop_containers"]
            engine = host.restart(seconds, stop_containers=stop)
        else:
            engine = host.wait(seconds)
        if engine is None:
            self.go_back(seconds)
        self.before_path.unlink(missing_ok=True)

    def go_back(self, seconds: int) -> None:
        """Says why the engine does not answer, after its earlier configuration came back, where there is one."""
        host, why = self.host, self.host.last_words()
        text = host.read(str(self.before_path))
        after = f"look at 'journalctl -u {UNIT}'."
        if text is not None:
            before = json.loads(text)
            self.write(Path(self.path), before["daemon"])
            if before["record"] is not None:
                self.write(self.record_path, before["record"])
            self.before_path.unlink()
            again = host.restart(seconds, stop_containers=True)
            after = (
                f"its earlier {self.path} is back, with which it"
                f" {'runs' if again else 'does not answer either'}; {after}"
            )
        raise EngineError(f"the engine does not answer with its new settings ({why}); {after}")

    # --- absent ---

    def remove(self) -> None:
        host = self.host
        if host.read(str(self.record_path)) is None:
            return
        record = self.record()
        found = parse_daemon(host.read(self.path), self.path)
        new, _ = merge(found, record, {})
        if not record.host["engine"]:
            self.refuse_loss(host)
        self.done.append("the engine's configuration is taken back")
        if self.module.check_mode:
            return
        if not record.host["engine"]:
            self.remove_engine(record, new)
        else:
            self.give_back(record, found, new)
        self.before_path.unlink(missing_ok=True)
        self.record_path.unlink()

    def refuse_loss(self, host: Host) -> None:
        engine = host.engine()
        if engine is None or self.module.params["remove_data"]:
            return
        containers, images, volumes = held(host)
        if containers or images or volumes:
            raise EngineError(
                f"the engine came with us and has {containers} containers, {images} images and"
                f" {volumes} volumes, which would be lost; save what is needed, and run again with"
                " -e remove_data=true."
            )

    def give_back(self, record: Record, found: Settings, new: Settings) -> None:
        """The engine goes on with what it had."""
        if new == found:
            return
        self.write(
            Path(self.path), format_daemon(new) if new or record.host["daemon_json"] else None
        )
        if self.host.unit().get("ActiveState") == "active":
            stop = self.module.params["stop_containers"]
            if self.host.restart(self.module.params["timeout"], stop_containers=stop) is None:
                raise EngineError(
                    f"the engine does not answer with what {self.path} had before us"
                    f" ({self.host.last_words()}); look at 'journalctl -u {UNIT}'."
                )

    def remove_engine(self, record: Record, new: Settings) -> None:
        host = self.host
        data = str(parse_daemon(host.read(self.path), self.path).get("data-root") or DATA_ROOT)
        if host.unit().get("LoadState") == "loaded":
            if host.unit().get("ActiveState") == "active":
                host.remove_containers()
            host.systemctl("stop", "docker.socket", UNIT)
        host.remove_networks()
        host.remove_empty_tables(record.host["tables"])
        for place in (data, "/var/lib/containerd") if data == DATA_ROOT else (DATA_ROOT,):
            self.empty(Path(place))
        if record.host["data"] and Path(DATA_ROOT).is_dir():
            mode, user, group = record.host["data"]
            os.chown(DATA_ROOT, user, group)
            os.chmod(DATA_ROOT, mode)
        if not record.host["cni"]:
            remove_empty(Path(CNI) / "net.d")
            remove_empty(Path(CNI))
        self.write(Path(self.path), format_daemon(new) if new else None)
        Path(self.path).with_name("key.json").unlink(missing_ok=True)
        if not record.host["remap_user"] and host.has_user(REMAP_USER):
            # Its group and its subordinate ids go with it.
            self.module.run_command(["userdel", REMAP_USER])
        if not record.host["directory"]:
            remove_empty(Path(self.path).parent)
        # Never up: who else may want it by now is not known here.
        if record.host["ip_forward"] == "0" and not list(
            Path("/etc/sysctl.d").glob("*cellblock-jobs.conf")
        ):
            Path(FORWARDING).write_text("0")

    @staticmethod
    def empty(directory: Path) -> None:
        """Removes a directory; one that is a mount point stays, empty."""
        if not directory.is_dir():
            return
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        if not os.path.ismount(directory):
            directory.rmdir()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["checked", "configured", "running", "absent"],
                "required": True,
            },
            "settings": {"type": "dict", "default": {}},
            "source": {
                "type": "str",
                "choices": ["distribution", "upstream"],
                "default": "distribution",
            },
            "avoided_networks": {"type": "list", "elements": "str", "default": []},
            "inner_networks": {"type": "list", "elements": "str", "default": []},
            "min_free_bytes": {"type": "int", "default": 0},
            "stop_containers": {"type": "bool", "default": False},
            "remove_data": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 60},
            "path": {"type": "path", "default": "/etc/docker/daemon.json"},
            "record": {"type": "path", "default": "/var/lib/cellblock/docker.json"},
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    task = Task(module)
    steps: dict[str, Any] = {
        "checked": task.check,
        "configured": task.configure,
        "running": task.run,
        "absent": task.remove,
    }
    try:
        steps[module.params["state"]]()
    except EngineError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(task.done), done=task.done, diff=task.diff)


if __name__ == "__main__":
    main()
