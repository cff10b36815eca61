"""Does the collection work for somebody who has nothing but its artifact?

    python tests/collection/run.py [ARTIFACT]

Installs it (made by scripts/build_collection.py unless given) into an empty project with a home of its
own, makes hosts with its role local_fleet, provisions them with `cellblock.fleet.site` and runs a job
with `cellblock.fleet.run_job`. Nothing that was run may have come from this checkout, except Ansible
itself. The hosts are removed at the end; the output stays in the project's run.log.

CELLBLOCK_CACHE_DIR: what was built and downloaded before (default: .cache/cellblock).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path("collections/ansible_collections")
COLLECTION = INSTALLED / "cellblock" / "fleet"
TAIL_LINES = 40

ANSIBLE_CFG = """\
[defaults]
collections_path = collections
inventory = inventory/local
interpreter_python = auto_silent
"""
# The smallest fleet: packages come from a cache server, and a local fleet has a host for the internet.
HOSTS = """\
---
all:
  children:
    worker_slaves:
      hosts:
        slave1: {local_fleet_host_number: 21}
    cache_servers:
      hosts:
        cache1: {local_fleet_host_number: 14}
    outside:
      hosts:
        outside1: {local_fleet_host_number: 30}
    worker_masters:
    request_handlers:
    databases:
    memory_databases:
"""
JOB = """\
---
name: hello
environment: base
stages:
  - name: run
    command: [echo, installed]
"""


class Failure(Exception):
    """The collection does not work; the message says what did not."""


class Project:
    """An empty project of somebody else's, with an environment in which only itself is in reach."""

    def __init__(self, cache_dir: Path) -> None:
        digest = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
        # The same in every run, so that a run finds what an interrupted one left.
        self.fleet = f"collection-{digest}"
        self.home = Path(tempfile.gettempdir()) / f"cellblock-{self.fleet}"
        self.path = self.home / "project"
        self.log = self.path / "run.log"
        self.cache = self.home / "cache"
        self._cache_dir = cache_dir

    def create(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        # Fails where somebody else has put something into its place.
        self.home.mkdir(mode=0o700)
        self.path.mkdir()
        # Reached by a name that is not of this checkout.
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        self.cache.symlink_to(self._cache_dir)
        (self.path / "ansible.cfg").write_text(ANSIBLE_CFG)
        (self.path / "job.yml").write_text(JOB)

    def environment(self) -> dict[str, str]:
        ours = re.compile("ANSIBLE_|CELLBLOCK_|MOLECULE_|PYTHON|VIRTUAL_ENV|PWD|OLDPWD|MAKE")
        kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
        home = Path.home()
        # Where packages come from is the machine's affair, and may be said in the user's home.
        for name, file in (
            ("PIP_CONFIG_FILE", home / ".config/pip/pip.conf"),
            ("NPM_CONFIG_USERCONFIG", home / ".npmrc"),
        ):
            if file.exists():
                kept.setdefault(name, str(file))
        path = [part for part in kept["PATH"].split(":") if not Path(part).is_relative_to(ROOT)]
        return {
            **kept,
            "HOME": str(self.home),
            "PWD": str(self.path),
            "PATH": ":".join([str(Path(sys.executable).parent), *path]),
            "CELLBLOCK_FLEET": self.fleet,
            "CELLBLOCK_CACHE_DIR": str(self.cache),
        }

    def ansible(self, command: str, *arguments: str) -> None:
        """Runs ansible-COMMAND in the project; its output is added to the log."""
        with self.log.open("a") as log:
            log.write(f"\n$ ansible-{command} {' '.join(arguments)}\n")
            log.flush()
            done = subprocess.run(
                [sys.executable, "-I", "-m", "ansible", command, *arguments],
                cwd=self.path,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            # Taken now: what follows in the log is how the hosts are removed.
            tail = self.log.read_text().splitlines()[-TAIL_LINES:]
            raise Failure("\n".join([f"ansible-{command} {' '.join(arguments)} failed:", *tail]))

    def playbook(self, name: str, *arguments: str) -> None:
        # With -vvv it says which files it runs.
        self.ansible("playbook", "-vvv", f"cellblock.fleet.{name}", *arguments)


def main() -> int:
    if len(sys.argv) > 2 or any(argument.startswith("-") for argument in sys.argv[1:]):
        print(__doc__)
        return 2
    project = Project(
        Path(os.environ.get("CELLBLOCK_CACHE_DIR") or ROOT / ".cache" / "cellblock").resolve()
    )
    try:
        project.create()
        with step("install the artifact"):
            install(project, Path(sys.argv[1]).resolve() if sys.argv[1:] else build(project))
        try:
            # Also what an interrupted run left: its containers carry the path of this project.
            with step("create the hosts"):
                project.playbook("local_fleet_destroy")
                project.playbook("local_fleet_create")
            with step("provision them"):
                project.playbook("site")
            with step("run a job"):
                project.playbook("run_job", "-e", "job=job.yml", "-e", "output=results.json")
                check_records(json.loads((project.path / "results.json").read_text()))
        finally:
            with step("remove the hosts"):
                project.playbook("local_fleet_destroy")
        check_origin(project)
    except Failure as problem:
        print(f"The collection does not work where it is installed: {problem}\nSee {project.log}")
        return 1
    return 0


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"  {name} ...", end="", flush=True)
    try:
        yield
    finally:
        print(f" {time.monotonic() - started:.0f} s", flush=True)


def build(project: Project) -> Path:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/build_collection.py"), "--output", str(project.home)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Failure("the artifact cannot be built")
    return Path(done.stdout.strip())


def install(project: Project, artifact: Path) -> None:
    """The collection from its artifact; those that it needs from where `make setup` put them."""
    offline = ("--offline", "--no-deps", "-p", "collections")
    project.ansible("galaxy", "collection", "install", *offline, str(artifact))
    needed = ROOT / ".ansible/collections/ansible_collections/community"
    shutil.copytree(needed, project.path / INSTALLED / "community")
    # Every file is there and as its manifest says; links lead where they led.
    project.ansible("galaxy", "collection", "verify", "--offline", "cellblock.fleet")
    installed = project.path / COLLECTION
    for link in ("plugins/module_utils/cellblock", "filter_plugins"):
        target = (installed / link).resolve()
        if not target.is_dir() or not target.is_relative_to(installed):
            raise Failure(f"{link} of the installed collection leads to {target}")
    # An inventory of one's own, as README.md says: a copy, with other hosts.
    inventory = project.path / "inventory/local"
    shutil.copytree(installed / "inventory/local", inventory)
    (inventory / "hosts.yml").write_text(HOSTS)


def check_records(records: list[dict[str, Any]]) -> None:
    try:
        (record,) = records
        (stage,) = record["stages"]
        if stage["exit_code"] != 0 or stage["stdout"]["text"] != "installed\n":
            raise Failure(f"the job's record is {record}")
    except (KeyError, TypeError, ValueError):
        raise Failure(f"the records are {records}") from None


def check_origin(project: Project) -> None:
    """Whether what was run came from the project alone, by all that Ansible says about it."""
    text = project.log.read_text()
    checkout = re.escape(str(ROOT))
    foreign = sorted(set(re.findall(rf"{checkout}(?![\w.-])(?!/\.venv/)[^\s'\",:]*", text)))
    if foreign:
        raise Failure(f"it used {', '.join(foreign)} of this checkout")
    tasks = set(re.findall(r"^task path: (.+):\d+$", text, re.MULTILINE))
    collection = project.path / COLLECTION
    outside = sorted(path for path in tasks if not Path(path).is_relative_to(collection))
    if not tasks or outside:
        raise Failure(f"tasks came from elsewhere: {outside or 'none is known'}")


if __name__ == "__main__":
    sys.exit(main())
