"""What a module does when nobody waits for it any more: real processes, whose output's reader is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
# The 2 s that are promised, and what a busy machine adds.
SOON_S = 6
MODULES = "ansible_collections.cellblock.fleet.plugins"
SANDBOX_JOB = f"""
from ansible.module_utils.testing import patch_module_args
from {MODULES}.modules import sandbox_job
job = {{"name": "one", "environment": "base", "stages": []}}
with patch_module_args({{"job": job, "executable": "PROGRAM"}}):
    sandbox_job.main()
"""
NETWORK_PROBE = f"""
from {MODULES}.module_utils import _network_sandbox, _reader
from {MODULES}.modules.network_probe import abandon
_reader.when_unread(abandon)
_network_sandbox._run(["PROGRAM"], "", 60)
"""
PROCESS_GROUP = f"""
import subprocess
from {MODULES}.module_utils import _reader
_reader.when_unread(_reader.end_process_group)
subprocess.run(["PROGRAM"])
"""


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that would go on for a minute, and says which process it is."""
    path = tmp_path / "program"
    path.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\n"
        "exec sleep 60\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("code", [SANDBOX_JOB, NETWORK_PROBE, PROCESS_GROUP])
def test_what_a_module_waits_for_ends_with_its_reader(program: Path, code: str) -> None:
    module = subprocess.Popen(
        [sys.executable, "-c", code.replace("PROGRAM", str(program))],
        env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    reader = subprocess.Popen(["sleep", "60"], stdin=module.stdout)
    assert module.stdout is not None
    module.stdout.close()
    try:
        assert within(30, (program.parent / "pid").exists)
        pid = int((program.parent / "pid").read_text())
        time.sleep(0.3)
        assert lives(pid), "it ended while its output was read"
        reader.kill()
        assert within(SOON_S, lambda: not lives(pid))
        module.wait(SOON_S)
    finally:
        reader.kill()
        reader.wait()
        if module.poll() is None:
            os.killpg(module.pid, signal.SIGKILL)
        module.wait()


# With the callback for what any task runs, and without it for our own module that waits.
@pytest.mark.parametrize("with_callback", [True, False], ids=["callback", "no callback"])
def test_a_killed_playbook_leaves_nothing(
    program: Path, tmp_path: Path, with_callback: bool
) -> None:
    foreign = {"ansible.builtin.command": {"cmd": str(program)}}
    own = {"cellblock.fleet.sandbox_job": {"job": {"name": "one"}, "executable": str(program)}}
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "tasks": [foreign if with_callback else own],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    (tmp_path / "ansible.cfg").write_text(
        f"[defaults]\ncollections_path = {ROOT}/collections\n"
        f"local_tmp = {tmp_path}/local\nremote_tmp = {tmp_path}/remote\n"
        + "callbacks_enabled = cellblock.fleet.end_workers\n"
        * with_callback
    )
    playbook = subprocess.Popen(
        [
            *(Path(sys.executable).with_name("ansible-playbook"), "--connection=local"),
            *("--inventory=localhost,", tmp_path / "play.yml"),
            f"--extra-vars=ansible_python_interpreter={sys.executable}",
        ],
        env={**os.environ, "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert within(60, (tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        workers = [
            int(child)
            for child in Path(f"/proc/{playbook.pid}/task/{playbook.pid}/children")
            .read_text()
            .split()
        ]
        assert workers
        playbook.kill()
        playbook.wait()
        assert within(SOON_S, lambda: not any(map(lives, [*workers, pid])))
    finally:
        playbook.kill()
        playbook.wait()
