#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: worker_container
short_description: What a slave's worker container needs of its host
version_added: 0.1.0
description:
  - With O(state=checked) it looks at the host and its Docker engine and fails with every reason why the worker
    container cannot be run there. It changes nothing.
  - With O(state=image) it makes an image of the directory O(root), unless the engine has one of its O(digest).
  - With O(state=filter) it writes the worker's system call filter to O(path), which is what the engine filters by
    default for the worker's capabilities, and what nsjail and an engine within need beside. The default is
    taken from a container that is made for the moment, so that it is that of this engine and kernel.
  - With O(state=absent) it removes every image of the name O(image), where an engine answers.
options:
  state:
    description: What to do; see the description.
    type: str
    choices: [checked, image, filter, absent]
    required: true
  runtime:
    description: V(userns) where the engine maps the container's root to another user, V(sysbox-runc) likewise with a
      runtime that makes more of the kernel the container's own, V(runc) without that, which is no boundary.
    type: str
    default: userns
  networks:
    description: Names of the engine's networks that the container is attached to.
    type: list
    elements: str
    default: [bridge]
  ids:
    description: How many ids the container has.
    type: int
    default: 131072
  first_job_id:
    description: The first of them that jobs have.
    type: int
    default: 65536
  parallel_jobs:
    description: How many jobs run in the container at once.
    type: int
    default: 16
  bip:
    description: Address of the bridge of the engine within, with its prefix length.
    type: str
  address_pools:
    description: Networks that the engine within divides, each with C(base) and the prefix length C(size) of a part.
    type: list
    elements: dict
    default: []
  avoided_networks:
    description: Networks that those of the engine within must not overlap, beside the host's and those of O(networks).
    type: list
    elements: str
    default: []
  min_free_bytes:
    description: What must be free where its image is kept, and where it is unpacked, while the engine has no such image.
    type: int
    default: 0
  home:
    description: Where it is unpacked.
    type: path
    default: /var/lib/cellblock/worker_container
  root:
    description: Directory that is made an image.
    type: path
  digest:
    description: What tells that directory's content apart, the digest of the archive that it was unpacked from.
    type: str
  image:
    description: Name of the image, without a tag.
    type: str
    default: cellblock-worker
  path:
    description: Where the filter is written.
    type: path
    default: /etc/cellblock/worker_container/seccomp.json
requirements:
  - Python 3.10 or newer on the host
attributes:
  check_mode:
    description: Can run in check mode and predict changes.
    support: full
  diff_mode:
    description: Shows nothing.
    support: none
  idempotent:
    description: A second run changes nothing.
    support: full
seealso:
  - module: cellblock.fleet.docker_engine
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Refuse a host that cannot run the worker container
  cellblock.fleet.worker_container:
    state: checked
    networks: [bridge]
"""

RETURN = r"""
image:
  description: The image with its tag.
  returned: O(state=image)
  type: str
owner:
  description: The host's id of the container's root; 0 where it is not mapped.
  returned: O(state=checked)
  type: int
"""

import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils import (  # noqa: E402
    _worker_container as worker,
)
from ansible_collections.cellblock.fleet.plugins.module_utils._docker_engine import (  # noqa: E402
    ENGINES,
    REMAP_USER,
    Host,
    parse_daemon,
)

DAEMON = "/etc/docker/daemon.json"
# Where engines keep what a running container was made of: the distribution's containerd, and an engine's own.
BUNDLES = (
    "/run/containerd/io.containerd.runtime.v2.task/moby",
    "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby",
)
# The filter's file says what it was derived from; the engine ignores what it does not know.
DERIVED_FROM = "cellblock_derived_from"


class Task:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.host = Host(lambda command: module.run_command(command))
        self.returned: dict[str, Any] = {}

    def docker(self, *arguments: str) -> str:
        code, out, error = self.module.run_command(["docker", *arguments])
        if code:
            raise worker.WorkerError(
                f"docker {arguments[0]} failed ({error.strip().splitlines()[-1:] or code}); see what the engine"
                " says with 'journalctl -u docker'."
            )
        return str(out).strip()

    # --- checked ---

    def found(self) -> worker.Found:
        info = self.host.ask("/info")
        networks = self.host.ask("/networks") if isinstance(info, dict) else None
        daemon = parse_daemon(self.host.read(DAEMON), DAEMON)
        remap = str(daemon.get("userns-remap") or "").partition(":")[0]
        subordinate = []
        for file in worker.SUBORDINATE_FILES:
            for line in (self.host.read(file) or "").splitlines():
                user, _, numbers = line.strip().partition(":")
                first, _, count = numbers.partition(":")
                if first.isdigit() and count.isdigit():
                    subordinate.append((file, user, int(first), int(count)))
        mounts = (self.host.read("/proc/self/mounts") or "").splitlines()
        points = [line.split()[1:3] for line in mounts]
        used = self.host.networks()
        for one in networks or []:
            if one["Name"] in self.params["networks"]:
                ranges = (one.get("IPAM") or {}).get("Config") or []
                used += [(f"the engine's network {one['Name']}", part["Subnet"]) for part in ranges]
        return worker.Found(
            engine=info if isinstance(info, dict) else None,
            networks={one["Name"]: one["Driver"] for one in networks or []},
            subordinate=subordinate,
            remap=REMAP_USER if remap == "default" else remap,
            foreign=self.foreign_engine(),
            missing=[name for name in worker.NEEDED if not self.host.path(name).exists()],
            used=used,
            free=self.free(info),
            # Where the same file system goes on below, or other kinds than those that belong there.
            masked_sys=any(
                point.startswith("/sys/")
                and kind in ("tmpfs", "sysfs")
                and point != "/sys/fs/cgroup"
                for point, kind in points
            ),
        )

    def foreign_engine(self) -> str | None:
        """Whoever provided the engine: its name is no matter here."""
        source = "upstream" if ENGINES["upstream"] in self.host.packages() else "distribution"
        return self.host.foreign_engine(source)

    def free(self, info: Any) -> dict[str, int]:
        """Where there is no image yet: one is unpacked, and copied into the engine's data directory."""
        unpacked = self.host.path(self.params["home"]) / "worker"
        if not isinstance(info, dict) or unpacked.exists():
            return {}
        found = {}
        for name in (self.params["home"], info.get("DockerRootDir") or "/var/lib/docker"):
            path, _ = self.host.file_system(name)
            found[name] = shutil.disk_usage(path).free
        return found

    def check(self) -> bool:
        wanted = worker.Wanted(
            runtime=self.params["runtime"],
            networks=self.params["networks"],
            ids=self.params["ids"],
            first_job_id=self.params["first_job_id"],
            parallel_jobs=self.params["parallel_jobs"],
            inner={
                "bip": self.params["bip"],
                "default-address-pools": self.params["address_pools"],
            },
            avoided=self.params["avoided_networks"],
            min_free_bytes=self.params["min_free_bytes"],
        )
        found = self.found()
        problems = worker.problems(wanted, found)
        if problems:
            self.module.fail_json(msg=" ".join(problems), problems=problems)
        self.returned["owner"] = worker.owner(found) if worker.RUNTIMES[wanted.runtime] else 0
        return False

    # --- image ---

    def image(self) -> str:
        return f"{self.params['image']}:{self.params['digest'][:12]}"

    def make_image(self) -> bool:
        self.returned["image"] = self.image()
        code, _, _ = self.module.run_command(["docker", "image", "inspect", self.image()])
        if code == 0:
            return False
        if not self.module.check_mode:
            # The tag appears when the image is complete.
            code, _, error = self.module.run_command(
                ["sh", "-c", 'tar -C "$1" -cf - . | docker import - "$2"', "sh", self.params["root"], self.image()]
            )  # fmt: skip
            if code:
                raise worker.WorkerError(
                    f"{self.params['root']} cannot be made the image {self.image()} ({error.strip()}); see whether the"
                    " engine's disk is full."
                )
        return True

    # --- absent ---

    def remove_images(self) -> bool:
        images = self.host.ask("/images/json")
        found = [
            tag
            for one in (images if isinstance(images, list) else [])
            for tag in one.get("RepoTags") or []
            if tag.startswith(f"{self.params['image']}:")
        ]
        if found and not self.module.check_mode:
            self.docker("image", "rm", *found)
        return bool(found)

    # --- filter ---

    def derived_from(self) -> dict[str, Any]:
        """What decides about the engine's default filter, and about ours."""
        version = self.host.ask("/version")
        if not isinstance(version, dict):
            raise worker.WorkerError("no Docker engine answers; provide it with the role docker.")
        return {
            "engine": version.get("Version"),
            "kernel": version.get("KernelVersion"),
            "runtime": [one.get("Version") for one in version.get("Components") or []],
            "capabilities": list(worker.CAPABILITIES),
            "additions": [dict(one) for one in worker.ADDITIONS],
        }

    def default_filter(self) -> worker.Profile:
        capabilities = [f"--cap-add={name}" for name in worker.CAPABILITIES]
        container = self.docker(
            "run", "--detach", "--network=none", "--stop-timeout=0", *capabilities, self.image(), "/bin/sleep", "60"
        )  # fmt: skip
        try:
            for directory in BUNDLES:
                text = self.host.read(f"{directory}/{container}/config.json")
                if text is not None:
                    profile: worker.Profile = json.loads(text)["linux"]["seccomp"]
                    return profile
        finally:
            self.docker("rm", "--force", "--volumes", container)
        raise worker.WorkerError(
            "the engine keeps what its containers are made of in none of " + ", ".join(BUNDLES)
            + "; this version of the engine is not supported."
        )  # fmt: skip

    def write_filter(self) -> bool:
        path = Path(self.params["path"])
        wanted = self.derived_from()
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")).get(DERIVED_FROM) == wanted:
                return False
        if self.module.check_mode:
            return True
        profile = worker.tailored(self.default_filter())
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump({**profile, DERIVED_FROM: wanted}, opened, indent=2)
        os.chmod(temporary, 0o644)
        self.module.atomic_move(temporary, str(path))
        return True


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["checked", "image", "filter", "absent"],
                "required": True,
            },
            "runtime": {"type": "str", "default": "userns"},
            "networks": {"type": "list", "elements": "str", "default": ["bridge"]},
            "ids": {"type": "int", "default": 131072},
            "first_job_id": {"type": "int", "default": 65536},
            "parallel_jobs": {"type": "int", "default": 16},
            "bip": {"type": "str"},
            "address_pools": {"type": "list", "elements": "dict", "default": []},
            "avoided_networks": {"type": "list", "elements": "str", "default": []},
            "min_free_bytes": {"type": "int", "default": 0},
            "home": {"type": "path", "default": "/var/lib/cellblock/worker_container"},
            "root": {"type": "path"},
            "digest": {"type": "str"},
            "image": {"type": "str", "default": "cellblock-worker"},
            "path": {"type": "path", "default": "/etc/cellblock/worker_container/seccomp.json"},
        },
        required_if=[("state", "image", ("root", "digest")), ("state", "filter", ("digest",))],
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    task = Task(module)
    steps = {
        "checked": task.check,
        "image": task.make_image,
        "filter": task.write_filter,
        "absent": task.remove_images,
    }
    try:
        changed = steps[module.params["state"]]()
    except worker.WorkerError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, **task.returned)


if __name__ == "__main__":
    main()
