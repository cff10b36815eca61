# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The prober where untrusted programs run: in real jobs and, as root, in the jobs' network slots.

Of this host it needs the ``cellblock`` command and what that needs. The kinds of sandboxes:

- ``job``: the program runs in a job of its own, submitted as anybody's, with the network ``policy``
- ``slot``: it runs as root in a slot that is prepared like a job's with that ``policy``, where it may
  forge packets too
- ``sibling``: a slot that holds listeners for as long as a run takes: another job as seen by all
- ``worker_container``: root in the slave's worker container
- ``child_container``: root in a container that the engine in there runs on its own network

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _network_listener,
    _network_probe,
)

CONTAINERS = ("worker_container", "child_container")
KINDS = ("job", "slot", "sibling", *CONTAINERS)
CONFIG = "/etc/cellblock/engine.json"
STATE_DIR = "/run/cellblock-probe-sibling"
WORKER_CONFIG = "/etc/cellblock/worker_container/container.json"
COMMAND = "cellblock"
ENVIRONMENT = "python"

_START_S = 20.0
# Beside the probes' own time: a job may wait for others, and a slot for being made.
_MORE_S = 30.0
# No host need allow a job more by default.
_JOB_S = 110.0
# Of a job. Each probe has a socket; the host's file descriptors allow for them in one batch.
_CONSTRAINTS = {
    "open_files": 1024,
    "memory_bytes": "256MiB",
    "stdout_bytes": "8MiB",
    "cpu_time_ms": "20s",
}

# What runs in a slot: the sources come on standard input, because no file of this host needs to be
# where they are found.
_BOOT = """
import json, sys, types
given = json.load(sys.stdin)
for name, source in given["sources"]:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name.rpartition(".")[2], "exec"), module.__dict__)
module.main(given["arguments"])
"""

# A container with nothing of its own: the programs are those of the worker container.
_CHILD_IMAGE = "cellblock-probe"
_IN_CHILD = (
    f"docker image inspect {_CHILD_IMAGE} >/dev/null 2>&1"
    " || tar -C / --no-recursion -cf - bin lib lib64 sbin"
    f" | docker import - {_CHILD_IMAGE} >/dev/null || exit 1; "
    f'exec docker run --rm --interactive --volume /usr:/usr:ro {_CHILD_IMAGE} "$@"'
)

Sandbox = Mapping[str, Any]

_running: set[subprocess.Popen[bytes]] = set()


class SandboxError(Exception):
    """A sandbox could not be used; the text says why."""


def offered_slots(config: str = CONFIG) -> int:
    """How many jobs with a network this host runs at once; 0 where jobs have none."""
    try:
        with open(config, encoding="utf-8") as file:
            return int((json.load(file).get("network") or {}).get("slots", 0))
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def start_sibling(
    policy: str, listeners: Sequence[Mapping[str, Any]], duration_s: int
) -> dict[str, Any] | None:
    """Listeners in a slot, in a process that ends by itself after ``duration_s``.

    None where jobs have no network; else ``handle``, ``listeners`` and ``interfaces`` as of the
    slot, or ``problem``. One that an earlier run left is ended.
    """
    _network_listener.collect(STATE_DIR)
    slots = offered_slots()
    if not slots:
        return None
    if slots == 1:
        return {"problem": "it has one network slot only; give it two (job_network_slots)"}
    arguments = {"listeners": list(listeners), "duration_s": duration_s, "state_dir": STATE_DIR}
    try:
        return _started(
            _in_slot(policy), _program((_network_probe, _network_listener), arguments), _START_S
        )
    except SandboxError as problem:
        return {"problem": str(problem)}


def collect_sibling() -> dict[str, Any]:
    """Ends it and returns what it received, as ``_network_listener.collect``."""
    return _network_listener.collect(STATE_DIR)


def probe(sandboxes: Sequence[Sandbox], timeout_ms: int) -> dict[str, dict[str, Any]]:
    """By the sandboxes' names, ``results`` of their targets or the ``problem``; all at one time.

    ``sandboxes``: each with ``name``, ``kind``, ``policy`` (not of a sibling) and ``targets``.
    """
    if not sandboxes:
        return {}
    with ThreadPoolExecutor(len(sandboxes)) as pool:
        found = list(pool.map(lambda sandbox: _probed(sandbox, timeout_ms), sandboxes))
    return {str(sandbox["name"]): result for sandbox, result in zip(sandboxes, found)}  # noqa: B905


def _probed(sandbox: Sandbox, timeout_ms: int) -> dict[str, Any]:
    targets: list[Mapping[str, Any]] = list(sandbox["targets"])
    request = {"targets": targets, "timeout_ms": timeout_ms}
    # Twice for two batches; what is waited for besides is the host's business.
    limit_s = (_network_probe.PATIENCE + 1) * timeout_ms / 1000 + _MORE_S
    try:
        if sandbox["kind"] == "job":
            printed = _run_job(str(sandbox["policy"]), request, limit_s)
        elif sandbox["kind"] in CONTAINERS:
            command = _in_container(str(sandbox["kind"]))
            printed = _run(command, _program((_network_probe,), request), limit_s)
        else:
            command = _in_slot(str(sandbox["policy"]))
            if sandbox["kind"] == "sibling":
                pid = _network_listener.process_of(STATE_DIR)
                if pid is None:
                    raise SandboxError("its listener has ended")
                command = ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]
            printed = _run(command + _python(), _program((_network_probe,), request), limit_s)
        return {"results": _results(printed, targets)}
    except SandboxError as problem:
        return {"problem": str(problem)}


def _results(printed: str, targets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the program printed, if it is about ``targets``."""
    try:
        results: list[dict[str, Any]] = json.loads(printed)["results"]
        answered = [result["id"] for result in results]
    except (ValueError, KeyError, TypeError):
        raise SandboxError(f"the prober printed no results but {_quoted(printed)}") from None
    if answered != [target["id"] for target in targets]:
        raise SandboxError("the prober's results are not those of its targets")
    return results


def _run_job(policy: str, request: Mapping[str, Any], limit_s: float) -> str:
    job = {
        "name": f"isolation-probe-{policy}",
        "environment": ENVIRONMENT,
        "files": {"probe.py": {"text": _source(_network_probe)}},
        "stages": [
            {
                "name": "probe",
                "command": ["python3", "probe.py"],
                "stdin": {"text": json.dumps(request)},
                "network": policy,
                "constraints": {**_CONSTRAINTS, "wall_time_ms": int(min(limit_s, _JOB_S) * 1000)},
            }
        ],
    }
    printed = _run([_command(), "run", "-"], json.dumps(job), limit_s, accepted=(0, 1))
    try:
        record = json.loads(printed)
        if "error" in record:
            raise SandboxError(str(record["error"].get("text") or record["error"]))
        (stage,) = record["stages"]
        if stage["verdict"] != "ok":
            said = stage["stderr"].get("text") or stage["reason"] or "it said nothing"
            raise SandboxError(f"the job's verdict is {stage['verdict']}: {_quoted(said)}")
        return str(stage["stdout"]["text"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SandboxError(f"cellblock run printed no record but {_quoted(printed)}") from None


def _in_slot(policy: str) -> list[str]:
    return [_command(), "slot", "--policy", policy, "--"]


def _in_container(kind: str) -> list[str]:
    """What runs the program in the worker container, or in one of its own."""
    try:
        with open(WORKER_CONFIG, encoding="utf-8") as file:
            name = str(json.load(file)["name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SandboxError(
            f"{WORKER_CONFIG} is missing or damaged; run playbooks/site.yml"
        ) from None
    python = ["/usr/bin/python3", "-I", "-c", _BOOT]
    within = ["docker", "exec", "--interactive", name]
    if kind == "worker_container":
        return within + python
    return [*within, "sh", "-c", _IN_CHILD, "sh", *python]


def _command() -> str:
    path = shutil.which(COMMAND, path=f"{os.environ.get('PATH', '')}:/usr/local/bin")
    if path is None:
        raise SandboxError(f"the command {COMMAND} is missing; run playbooks/site.yml")
    return path


def _python() -> list[str]:
    return [sys.executable, "-I", "-c", _BOOT]


def _program(modules: Sequence[Any], arguments: Mapping[str, Any]) -> str:
    """Standard input of ``_BOOT``, which runs the ``main`` of the last of ``modules``."""
    sources = [(module.__name__, _source(module)) for module in modules]
    return json.dumps({"sources": sources, "arguments": arguments})


def _source(module: Any) -> str:
    # Ansible brings modules in an archive: there is no file to read.
    # Its loader gives text there, bytes on the controller.
    source: str | bytes | None = module.__loader__.get_source(module.__name__)
    if source is None:
        raise SandboxError(f"the source of {module.__name__} cannot be read")
    return source.decode() if isinstance(source, bytes) else source


def _run(command: Sequence[str], text: str, limit_s: float, accepted: Sequence[int] = (0,)) -> str:
    """What ``command`` printed; it and its children are ended after ``limit_s``."""
    with _process(command) as process:
        try:
            printed: bytes
            printed, said = process.communicate(text.encode(), limit_s)
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{command[0]} did not end within {limit_s:.0f} s") from None
    if process.returncode not in accepted:
        raise SandboxError(_failure(command, process.returncode, said))
    return printed.decode(errors="replace")


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Any:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as problem:
        raise SandboxError(f"{command[0]} cannot be run ({problem.strerror})") from None
    _running.add(process)
    try:
        yield process
    finally:
        _running.discard(process)
        if process.poll() is None:
            _end(process)


def end_all() -> None:
    """Ends the probes that are going on; what was started to go on goes on."""
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _started(command: Sequence[str], text: str, limit_s: float) -> dict[str, Any]:
    """Starts ``command`` with the program, and returns its first line; it goes on."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(text.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                [*command, *_python()],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
        except OSError as problem:
            raise SandboxError(f"{command[0]} cannot be run ({problem.strerror})") from None
        assert process.stdout is not None
        line = b""
        deadline = time.monotonic() + limit_s
        with contextlib.closing(selectors.DefaultSelector()) as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    _end(process)
                    raise SandboxError(f"{command[0]} did not start within {limit_s:.0f} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                line += part
        if line.endswith(b"\n"):
            started: dict[str, Any] = json.loads(line)
            return started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        _end(process)
        said.seek(0)
        raise SandboxError(_failure(command, process.returncode, said.read()))


def _failure(command: Sequence[str], status: int, said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return f"{os.path.basename(command[0])} failed ({status}): {lines[-1] if lines else 'silently'}"


def _quoted(text: str) -> str:
    return repr(_network_probe.printable(text.encode())[:120])
