"""Proves, with real stages, that this host enforces what it promises, before anybody's job runs.

What a configuration or a kernel looks like is no proof: /proc may be mounted over, a controller be there and count
nothing, a rule of the host stand in the way of the jail.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import CellblockError, HostSetupError
from .host import Environment, Host
from .job import Job, Stage
from .limits import StageConstraints
from .result import StageResult, Verdict
from .runner import AdmittedJob, Runner
from .stage import StageNetwork

_ENDLESS = "while :; do :; done"
_WRITE_ENDLESSLY = (
    "while echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; do :; done"
)
_LOOK = (
    'while read -r line; do echo "$line"; done < /proc/self/status; '
    'while read -r line; do echo "net $line"; done < /proc/net/dev; '
    "(: > /etc/cellblock-proof) 2>/dev/null && echo writable root; exit 0"
)
_log = logging.getLogger("cellblock")


@dataclass(frozen=True)
class _Promise:
    name: str
    says: str
    script: str
    """For /bin/sh, with nothing but what is built into it."""
    is_kept: Callable[[StageResult], bool]
    constraints: dict[str, Any] = field(default_factory=dict)


def _violates(limit: str) -> Callable[[StageResult], bool]:
    return lambda result: limit in [violation.limit for violation in result.violations]


def _exits_with(code: int) -> Callable[[StageResult], bool]:
    return lambda result: result.exit_code == code


def _is_slowed(result: StageResult) -> bool:
    usage = result.usage
    return (
        _violates("cpu_time_ms")(result)
        and usage is not None
        and usage.wall_time_ms > 1.5 * usage.cpu_time_ms
    )


def _is_confined(result: StageResult) -> bool:
    lines = result.stdout.data.decode("utf-8", "replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    words = {name: value.split() for name, value in fields.items()}
    interfaces = [name.split()[1] for name in fields if name.startswith("net ") and "|" not in name]
    return (
        words.get("Uid") == ["1000"] * 4
        and all(
            int(words.get(f"Cap{kind}", ["1"])[0], 16) == 0 for kind in ("Eff", "Prm", "Bnd", "Amb")
        )
        and words.get("NoNewPrivs") == ["1"]
        and words.get("Seccomp") == ["2"]
        and interfaces == ["lo"]
        and "writable root" not in lines
    )


_PROMISES = (
    _Promise(
        "start", "a stage runs, and its exit status is in the record", "exit 7", _exits_with(7)
    ),
    _Promise(
        "confinement",
        "a job has no privilege, no interface but its loopback, and a read-only root",
        _LOOK,
        _is_confined,
    ),
    _Promise(
        "memory_bytes",
        "a stage that takes more memory is ended, and the record says so",
        "a=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; while :; do a=$a$a; done",
        _violates("memory_bytes"),
        {"memory_bytes": 8 * 2**20},
    ),
    _Promise(
        "cpus",
        "a stage is slowed to its CPUs, and ended at its CPU time",
        _ENDLESS,
        _is_slowed,
        {"cpu_time_ms": 50, "cpus": 0.2},
    ),
    _Promise(
        "wall_time_ms",
        "a stage that takes longer is ended",
        "kill -STOP $$",
        _violates("wall_time_ms"),
        {"wall_time_ms": 50},
    ),
    _Promise(
        "processes",
        "a stage has no more processes than it may",
        "(:); exit 0",
        _violates("processes"),
        {"processes": 1},
    ),
    _Promise(
        "stdout_bytes",
        "a stage that writes more is ended",
        _WRITE_ENDLESSLY,
        _violates("stdout_bytes"),
        {"stdout_bytes": 1000},
    ),
    _Promise(
        "file_size_bytes",
        "a file grows no larger",
        f"{_WRITE_ENDLESSLY} > file",
        _violates("file_size_bytes"),
        {"file_size_bytes": 4096},
    ),
    _Promise(
        "scratch_bytes",
        "the scratch grows no larger",
        f"{{ {_WRITE_ENDLESSLY}; }} > file 2> /dev/null; exit 9",
        _exits_with(9),
        {"scratch_bytes": 64 * 2**10},
    ),
    _Promise(
        "open_files",
        "a process opens no more files",
        "(exec 3<&0 4<&0 5<&0 6<&0 7<&0) 2> /dev/null && exit 1; exit 9",
        _exits_with(9),
        {"open_files": 5},
    ),
)


class _NoSlots:
    @contextlib.contextmanager
    def take(self, stage: str) -> Iterator[StageNetwork]:
        raise HostSetupError(stage, "has no network", "report this defect")
        yield


def prove(host: Host, runner: Runner) -> None:
    """Runs a stage for each promise, in an environment that has /bin/sh; takes half a second.

    Raises :class:`HostSetupError` with the promise that this host does not keep.
    """
    environment = _with_shell(host)
    if environment is None:
        _log.warning("not proven that limits hold: no environment has /bin/sh")
        return
    stages = tuple(
        Stage(
            promise.name.replace("_", "-"),
            ("/bin/sh", "-c", promise.script),
            constraints=StageConstraints(**promise.constraints),
            run_always=True,
        )
        for promise in _PROMISES
    )
    admitted = AdmittedJob(
        job_id="proof",
        job=Job(environment.name, stages, name="proof"),
        environment=environment,
        mounts=(),
        uids=host.uids(0),
        networked=frozenset(),
        queue_time_ms=0.0,
    )
    for is_last in (False, True):
        problem = _first_unkept(host, runner, admitted)
        if problem is None:
            return
        # What is broken is so twice; a host that was too busy for a moment is not broken.
        if is_last:
            raise problem
        _log.warning("trying again: %s", problem)


def _first_unkept(host: Host, runner: Runner, admitted: AdmittedJob) -> HostSetupError | None:
    try:
        record = runner.run(admitted, _NoSlots(), report=False)
    except CellblockError as problem:
        return _unkept(host, admitted.environment, _PROMISES[0], str(problem))
    for promise, result in zip(_PROMISES, record.stages, strict=True):
        if not promise.is_kept(result):
            return _unkept(host, admitted.environment, promise, _ending(result))
    return None


def _with_shell(host: Host) -> Environment | None:
    environments = host.environments().values()
    # By name alone: a link in it is one of the environment's.
    return next(
        (
            e
            for e in environments
            if (e.path / "bin" / "sh").is_symlink() or (e.path / "bin" / "sh").exists()
        ),
        None,
    )


def _ending(result: StageResult) -> str:
    if result.verdict is Verdict.INTERNAL_ERROR:
        return result.reason or "it could not be run"
    ended = f"it ended as {result.verdict.value}"
    if result.exit_code is not None:
        ended += f" with exit status {result.exit_code}"
    violated = ", ".join(violation.limit for violation in result.violations)
    if violated:
        ended += f", over {violated}"
    if result.usage is not None:
        ended += f", after {result.usage.wall_time_ms:.0f} ms and {result.usage.cpu_time_ms:.0f} ms of CPU"
    return ended


def _unkept(host: Host, environment: Environment, promise: _Promise, seen: str) -> HostSetupError:
    return HostSetupError(
        host.name,
        f"does not keep a promise ({promise.name}: {promise.says}), tried in the environment {environment.name}: "
        f"{seen}",
        "see what has changed on this host (mounts, cgroups, security modules, the environment), and start "
        "cellblock.service again",
    )
