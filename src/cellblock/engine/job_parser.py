"""The strict parser of jobs: from plain data (the shape in ``docs/jobs.md``) to a :class:`Job`.

It touches nothing of the host; what is right here may still be refused by one.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidJobError
from ..job_network.policy import HOST_NAME, PROTOCOLS, Destination, NetworkPolicy, is_address
from ..validate import Value, one_of, show
from .job import Job, JobFile, JobMount, Stage, Target
from .limits import StageConstraints
from .protocol import MAX_INPUT_BYTES

MAX_STAGES = 32
MAX_FILES = 256
MAX_OUTPUT_BYTES = 64 * 2**20
"""What all stages of a job together may write to their standard output and error."""
MAX_WORDS = 32_768
"""Words of a command and environment variables of a stage together."""
MAX_MOUNTS = 64
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 256
MAX_DESTINATIONS = 64
"""Entries of a stage's ``network_allow``."""
MAX_PORTS = 64
"""Ports of one of them."""
MAX_ARGUMENT_BYTES = 128 * 1024
"""One argument or environment variable; the kernel's MAX_ARG_STRLEN."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def parse_job(data: object) -> Job:
    """A :class:`Job` from plain data, with contents of files as ``text`` or ``base64``.

    Raises :class:`InvalidJobError` naming the field.
    """
    fields = Value(data, "job", InvalidJobError, prefix="").fields(
        required=("environment", "stages"),
        optional={
            "name": "job",
            "labels": {},
            "files": {},
            "mounts": [],
            "collect": [],
            "target": Target.HOST.value,
        },
    )
    name = _name(fields["name"])
    environment = _name(fields["environment"])
    labels = _labels(fields["labels"])
    files = _files(fields["files"])
    stages = _stages(fields["stages"])
    size = sum(len(f.content) for f in files) + sum(len(stage.stdin) for stage in stages)
    if size > MAX_INPUT_BYTES:
        raise fields["files"].error(
            f"and inputs are {size} bytes together", f"send at most {MAX_INPUT_BYTES} bytes"
        )
    output = sum(s.constraints.stdout_bytes + s.constraints.stderr_bytes for s in stages)
    if output > MAX_OUTPUT_BYTES:
        raise fields["stages"].error(
            f"may write {output} bytes of output together",
            f"lower stdout_bytes and stderr_bytes to {MAX_OUTPUT_BYTES} in all",
        )
    return Job(
        environment=environment,
        stages=stages,
        name=name,
        labels=labels,
        files=files,
        mounts=parse_mounts(fields["mounts"]),
        collect=_collect(fields["collect"]),
        target=Target(fields["target"].choice([target.value for target in Target])),
    )


def parse_stage(value: Value) -> Stage:
    """One stage of a job."""
    fields = value.fields(
        required=("name", "command"),
        optional={
            "stdin": {"text": ""},
            "environment_variables": {},
            "working_directory": ".",
            "constraints": {},
            "network": NetworkPolicy.NONE.value,
            "network_allow": None,
            "run_always": False,
        },
    )
    command = fields["command"].list(
        least=1,
        what="a list of words",
        remedy="write for example [python3, main.py]; a shell line is [sh, -c, 'the line']",
    )
    variables = _environment_variables(fields["environment_variables"])
    if len(command) + len(variables) > MAX_WORDS:
        raise fields["command"].error(
            f"and environment_variables are {len(command) + len(variables)} words",
            f"write at most {MAX_WORDS}",
        )
    directory = fields["working_directory"]
    network = _network(fields["network"])
    return Stage(
        name=_name(fields["name"]),
        command=tuple(map(_argument, command)),
        stdin=_content(fields["stdin"]),
        environment_variables=variables,
        working_directory="." if directory.raw == "." else _relative_path(directory),
        constraints=StageConstraints.of(fields["constraints"]),
        chosen=frozenset(fields["constraints"].entries()),
        run_always=fields["run_always"].boolean(),
        network=network,
        network_allow=_network_allow(fields["network_allow"], network),
    )


def parse_mounts(value: Value) -> tuple[JobMount, ...]:
    """Mounts from a list of names or ``{name: ..., writable: true}``."""
    mounts: list[JobMount] = []
    for entry in value.list(most=MAX_MOUNTS, remedy="write for example [datasets]"):
        if isinstance(entry.raw, str):
            mount = JobMount(_name(entry.within("name", entry.raw)))
        else:
            fields = entry.fields(required=("name",), optional={"writable": False})
            mount = JobMount(_name(fields["name"]), fields["writable"].boolean())
        if any(mount.name == other.name for other in mounts):
            raise entry.error(f"is {mount.name!r} again", "name every mount once")
        mounts.append(mount)
    return tuple(mounts)


def _stages(value: Value) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for entry in value.list(
        least=1,
        most=MAX_STAGES,
        what=f"a list of 1 to {MAX_STAGES} stages",
        remedy="write at least one stage",
    ):
        stage = parse_stage(entry)
        if any(stage.name == other.name for other in stages):
            raise entry.within("name", stage.name).error(
                f"is {stage.name!r}, the name of an earlier stage", "give every stage its own name"
            )
        stages.append(stage)
    return tuple(stages)


def _network(value: Value) -> NetworkPolicy:
    try:
        return NetworkPolicy(value.raw)
    except ValueError:
        raise value.error(
            f"is {show(value.raw)}, not a network policy",
            f"write {one_of([policy.value for policy in NetworkPolicy])}",
        ) from None


def _network_allow(value: Value, policy: NetworkPolicy) -> tuple[Destination, ...]:
    if policy is not NetworkPolicy.ALLOW:
        if value.raw is not None:
            raise value.error(
                f"is of no use with the policy {policy.value}", "write network: allow"
            )
        return ()
    what = f"a list of 1 to {MAX_DESTINATIONS} entries"
    remedy = f"write {what} such as {{to: example.org, protocol: tcp, ports: [443]}}"
    if value.raw is None:
        raise value.error("is missing", remedy)
    entries = value.list(least=1, most=MAX_DESTINATIONS, what=what, remedy=remedy)
    return tuple(map(_destination, entries))


def _destination(value: Value) -> Destination:
    fields = value.fields(required=("to", "protocol", "ports"))
    to = _argument(
        fields["to"], "write one address, network or host name, quoted; several take an entry each"
    )
    if is_address(to):
        fields["to"].network(
            "write an address, or a network without bits of a host such as 192.0.2.0/24; a port "
            "belongs in ports"
        )
    elif not HOST_NAME.fullmatch(to) or to.replace(".", "").isdigit():
        raise fields["to"].wrong(
            "an address, a network such as 192.0.2.0/24, or a host name alone; a port belongs in "
            "ports"
        )
    ports = fields["ports"].list(least=1, most=MAX_PORTS, what=f"a list of 1 to {MAX_PORTS} ports")
    return Destination(
        to,
        fields["protocol"].choice(PROTOCOLS),
        tuple(
            port.integer(1, 65535, "write a number from 1 to 65535; there are no ranges")
            for port in ports
        ),
    )


def _files(value: Value) -> tuple[JobFile, ...]:
    entries = value.entries(remedy="write files as name: {text: ...}, {base64: ...} or {path: ...}")
    if len(entries) > MAX_FILES:
        raise value.error(f"has {len(entries)} entries", f"send at most {MAX_FILES} files")
    files: list[JobFile] = []
    directories: set[str] = set()
    names: set[str] = set()
    for key, entry in entries.items():
        name = _relative_path(entry.instead(key))
        parents = {"/".join(name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)}
        if name in names | directories or parents & names:
            raise entry.error(
                "is both a file and another entry's name or directory",
                "give every file its own path",
            )
        names.add(name)
        directories |= parents
        executable, content = False, entry
        if isinstance(entry.raw, Mapping) and "executable" in entry.raw:
            rest = {field: raw for field, raw in entry.raw.items() if field != "executable"}
            executable = entry.within("executable", entry.raw["executable"]).boolean()
            content = entry.instead(rest)
        files.append(JobFile(name, _content(content), executable))
    return tuple(files)


def _collect(value: Value) -> tuple[str, ...]:
    names = value.list(
        most=MAX_FILES,
        what=f"a list of up to {MAX_FILES} paths",
        remedy="write for example [out.txt]",
    )
    return tuple(map(_relative_path, names))


def _content(value: Value) -> bytes:
    data: Any = value.raw
    if isinstance(data, Mapping) and set(data) == {"path"}:
        raise value.within("path", data["path"]).error(
            "is not open to the service", "send the content as text or base64"
        )
    if not isinstance(data, Mapping) or len(data) != 1 or not set(data) <= {"text", "base64"}:
        raise value.wrong("exactly one of {text: ...}, {base64: ...} or {path: ...}")
    if "text" in data:
        text = value.within("text", data["text"])
        return _encoded(text, text.text())
    try:
        return base64.b64decode(data["base64"], validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise value.within("base64", data["base64"]).error(
            "is not valid base64", "encode the content with RFC 4648 base64"
        ) from None


def _argument(value: Value, remedy: str = "quote it") -> str:
    """Text that a program can be given."""
    text = value.text(remedy=remedy)
    if "\0" in text:
        raise value.error("has a NUL character", "remove it")
    if len(_encoded(value, text)) >= MAX_ARGUMENT_BYTES:
        raise value.error(
            "is too long", f"write fewer than {MAX_ARGUMENT_BYTES} bytes, or use a file"
        )
    return text


def _encoded(value: Value, text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise value.error("has half a surrogate pair", "write valid Unicode") from None


def _name(value: Value) -> str:
    return value.matching(
        _NAME,
        "1 to 64 of the characters A-Z a-z 0-9 . _ - and start with a letter or digit",
    )


def _relative_path(value: Value) -> str:
    path = _argument(value)
    parts = path.split("/")
    if path.startswith("/"):
        raise value.error("is an absolute path", "write it relative to the work directory")
    if ".." in parts:
        raise value.error("has '..' in it", "write a path inside the work directory")
    if not path or "" in parts or "." in parts:
        raise value.error("is not a plain path", "write it without empty or '.' parts")
    if any(len(_encoded(value, part)) > 255 for part in parts) or len(parts) > 32:
        raise value.error("is too long or too deep", "use at most 255 bytes a name, 32 deep")
    return path


def _labels(value: Value) -> dict[str, str]:
    labels = value.entries(remedy="write name: value")
    if len(labels) > MAX_LABELS or any(
        len(str(label.raw)) > MAX_LABEL_CHARACTERS for label in labels.values()
    ):
        raise value.error(
            "has too many or too long entries",
            f"write at most {MAX_LABELS} of {MAX_LABEL_CHARACTERS} characters each",
        )
    return {_name(label.instead(key)): _argument(label) for key, label in labels.items()}


def _environment_variables(value: Value) -> dict[str, str]:
    variables = value.entries(remedy="write NAME: value")
    for name, variable in variables.items():
        if not _VARIABLE.fullmatch(name):
            raise variable.error("is not a variable's name", "use A-Z a-z 0-9 _, no leading digit")
    return {name: _argument(variable) for name, variable in variables.items()}
