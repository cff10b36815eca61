"""What the tests of services share: an inventory's variables, programs on a host, traces of secrets."""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra

from .lab import misbehaving_upstreams

ROOT = Path(__file__).resolve().parents[4]

Variable = Callable[[str], Any]
PythonOn = Callable[..., Any]

# Prints the value between marks, so that nothing else that is printed matters.
SHOW = "msg=<<<{{ (%s) | to_json | b64encode }}>>>"


@functools.cache
def evaluated(name: str, expression: str) -> Any:
    done = subprocess.run(
        ["ansible", name, "--module-name=debug", "--args", SHOW % expression],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    encoded = "".join(done.stdout.split()).split("<<<")[1].split(">>>")[0]
    return json.loads(base64.b64decode(encoded))


@pytest.fixture
def variable(host: Any) -> Variable:
    """The value of an expression on the host, as a play would see it."""
    name = host.backend.get_pytest_id().removeprefix("ansible://")
    return functools.partial(evaluated, name)


@pytest.fixture
def python_on() -> PythonOn:
    """Runs a program on a host; `given` is what it is passed, and it prints JSON.

    Both go there encoded, so that a secret is neither in a command line nor in the journal, where
    Ansible writes the commands of tests.
    """

    def run(host: Any, program: str, **given: Any) -> Any:
        text = f"import json\ngiven = json.loads({json.dumps(json.dumps(given))})\n{program}"
        encoded = base64.b64encode(text.encode()).decode()
        done = host.run(f"echo {encoded} | base64 -d | python3 -")
        assert done.rc == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def lab(playbook: Callable[..., Any]) -> Iterator[str]:
    """The cache server with upstreams that misbehave, until the last test of services; see lab.py."""
    with misbehaving_upstreams(testinfra.get_host("ansible://cache1"), playbook) as upstream:
        yield upstream


TRACES = r"""
import glob, os, subprocess
secret = given["secret"].encode()
found = []
for pattern in ("/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ"):
    for path in glob.glob(pattern):
        try:
            if secret in open(path, "rb").read():
                found.append(path)
        except OSError:
            pass
if secret in subprocess.run(["journalctl", "--no-pager", "--all"], capture_output=True).stdout:
    found.append("the journal")
for top in given["below"]:
    for path, _, names in os.walk(top):
        for name in names:
            file = os.path.join(path, name)
            if os.path.isfile(file) and not os.path.islink(file) and os.path.getsize(file) < 10**7:
                if secret in open(file, "rb").read():
                    found.append(file)
print(json.dumps(found))
"""


@pytest.fixture
def traces(python_on: PythonOn) -> Callable[..., list[str]]:
    """Where on a host a secret is found: processes, the journal, and files below some directories."""

    def find(host: Any, secret: str, *, below: tuple[str, ...] = ("/etc", "/var/log")) -> list[str]:
        found: list[str] = python_on(host, TRACES, secret=secret, below=below)
        return found

    return find


@pytest.fixture
def listening(host: Any) -> Callable[[int], set[str]]:
    """The addresses on which something listens on a TCP port."""

    def addresses(port: int) -> set[str]:
        lines = host.check_output("ss -Hlnt").splitlines()
        places = [line.split()[3].rpartition(":") for line in lines]
        return {place[0].strip("[]") for place in places if place[2] == str(port)}

    return addresses


@pytest.fixture
def loopbacks(host: Any) -> set[str]:
    """The loopback addresses that the host has."""
    return {"127.0.0.1"} | ({"::1"} if host.run("ip -6 address show to ::1").stdout else set())
