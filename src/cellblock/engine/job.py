"""What a job is: types, and the strict parser that makes them from YAML, JSON or Ansible data.

Nothing here touches the host: :func:`parse_job` is pure, :func:`load_job` reads the job file and the
files that it names with the caller's own rights.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from ..errors import InvalidJobError, JobFileError
from .limits import StageConstraints

MAX_STAGES = 32
MAX_FILES = 256
MAX_INPUT_BYTES = 64 * 2**20
"""All files and standard inputs of a job together."""
MAX_OUTPUT_BYTES = 64 * 2**20
"""What all stages of a job together may write to their standard output and error."""
MAX_WORDS = 32_768
"""Words of a command and environment variables of a stage together."""
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 256
MAX_DESTINATIONS = 64
"""Entries of a stage's ``network_allow``."""
MAX_PORTS = 64
"""Ports of one of them."""
PROTOCOLS = ("tcp", "udp")
MAX_ARGUMENT_BYTES = 128 * 1024
"""One argument or environment variable; the kernel's MAX_ARG_STRLEN."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
    r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*",
    re.ASCII,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class JobFile:
    """A file that the job finds below its work directory; ``name`` is a relative path."""

    name: str
    content: bytes
    executable: bool = False


class NetworkPolicy(str, Enum):
    """Whom a stage may reach. Hosts without job networks enforce ``none`` only."""

    NONE = "none"
    CACHE = "cache"
    INTERNET = "internet"
    ALLOW = "allow"


@dataclass(frozen=True)
class Destination:
    """Ports of an address, a network or a host name, for the policy ``allow``."""

    to: str
    protocol: str
    ports: tuple[int, ...]

    @property
    def name(self) -> str | None:
        """The host name, None where ``to`` is an address or a network."""
        return None if _is_address(self.to) else self.to

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """Of an address or network."""
        return ip_network(self.to)


@dataclass(frozen=True)
class JobMount:
    """One of the mounts that the host offers; the job sees it as ``/mnt/NAME``."""

    name: str
    writable: bool = False


@dataclass(frozen=True)
class Stage:
    """One command. ``run_always``: also when an earlier stage did not end well."""

    name: str
    command: tuple[str, ...]
    stdin: bytes = b""
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    working_directory: str = "."
    constraints: StageConstraints = field(default_factory=StageConstraints)
    run_always: bool = False
    network: NetworkPolicy = NetworkPolicy.NONE
    network_allow: tuple[Destination, ...] = ()
    """For the policy ``allow``, and for no other."""


@dataclass(frozen=True)
class Job:
    """A unit of work: files and stages, run in order in one environment."""

    environment: str
    stages: tuple[Stage, ...]
    name: str = "job"
    labels: Mapping[str, str] = field(default_factory=dict)
    files: tuple[JobFile, ...] = ()
    mounts: tuple[JobMount, ...] = ()
    collect: tuple[str, ...] = ()
    """Files and directories below the work directory that come back with the record."""


def parse_job(data: object) -> Job:
    """A :class:`Job` from plain data (the shape in ``docs/jobs.md``).

    File contents must be in the data (``text`` or ``base64``): see :func:`load_job` for ``path``.
    Raises :class:`InvalidJobError` naming the field.
    """
    fields = _mapping(
        data,
        "job",
        required=("environment", "stages"),
        optional=("name", "labels", "files", "mounts", "collect"),
    )
    name = _name(fields.get("name", "job"), "name")
    environment = _name(fields["environment"], "environment")
    labels = _string_mapping(fields.get("labels", {}), "labels")
    files = tuple(_files(fields.get("files", {})))
    raw_stages = fields["stages"]
    if not isinstance(raw_stages, list) or not 1 <= len(raw_stages) <= MAX_STAGES:
        raise InvalidJobError(
            "stages", f"is not a list of 1 to {MAX_STAGES} stages", "write at least one stage"
        )
    stages = tuple(_stage(raw, f"stages[{index}]") for index, raw in enumerate(raw_stages))
    names = [stage.name for stage in stages]
    for index, stage_name in enumerate(names):
        if stage_name in names[:index]:
            raise InvalidJobError(
                f"stages[{index}].name",
                f"is {stage_name!r}, the name of an earlier stage",
                "give every stage its own name",
            )
    size = sum(len(f.content) for f in files) + sum(len(stage.stdin) for stage in stages)
    if size > MAX_INPUT_BYTES:
        raise InvalidJobError(
            "files",
            f"and inputs are {size} bytes together",
            f"send at most {MAX_INPUT_BYTES} bytes",
        )
    output = sum(s.constraints.stdout_bytes + s.constraints.stderr_bytes for s in stages)
    if output > MAX_OUTPUT_BYTES:
        raise InvalidJobError(
            "stages",
            f"may write {output} bytes of output together",
            f"lower stdout_bytes and stderr_bytes to {MAX_OUTPUT_BYTES} in all",
        )
    return Job(
        environment=environment,
        stages=stages,
        name=name,
        labels=labels,
        files=files,
        mounts=parse_mounts(fields.get("mounts", []), "mounts"),
        collect=_collect(fields.get("collect", [])),
    )


def parse_document(text: str, source: str) -> object:
    """YAML or JSON text as plain data; raises :class:`JobFileError` naming ``source``."""
    try:
        # JSON first: it needs no third-party module and YAML is slow.
        return json.loads(text)
    except ValueError:
        pass
    except RecursionError:
        raise JobFileError(source, "is nested too deeply", "write a plain job") from None
    import yaml  # only clients read YAML; the service must start without it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as problem:
        detail = " ".join(str(problem).split()).replace(' in "<unicode string>",', "")
        raise JobFileError(
            source, f"is neither YAML nor JSON: {detail}", "mend the syntax"
        ) from None
    except (RecursionError, ValueError) as problem:  # ValueError: for example month 13 in a date
        raise JobFileError(source, f"cannot be read as YAML: {problem}", "mend it") from None


def load_job_data(path: Path) -> dict[str, Any]:
    """The job file at ``path`` as plain data in which every ``path:`` became ``base64:``.

    Paths are relative to the job file and are opened with the rights of the caller, so that the
    privileged service never opens a path that a job names. Raises :class:`JobFileError` or
    :class:`InvalidJobError`.
    """
    text = _read(path, str(path), "name an existing job file").decode("utf-8", "replace")
    data = parse_document(text, str(path))
    if not isinstance(data, dict):
        raise InvalidJobError(str(path), "is not a mapping", "write environment: and stages:")
    embedded = dict(data)
    files = data.get("files", {})
    if isinstance(files, dict):
        embedded["files"] = {
            name: _embed(content, path, f"files.{name}") for name, content in files.items()
        }
    stages = data.get("stages")
    if isinstance(stages, list):
        embedded["stages"] = [
            {**stage, "stdin": _embed(stage["stdin"], path, f"stages[{index}].stdin")}
            if isinstance(stage, dict) and "stdin" in stage
            else stage
            for index, stage in enumerate(stages)
        ]
    return embedded


def as_request(data: Any) -> Any:
    """A job's data with every ``text`` content as ``base64``, which services parse fast.

    What is not as it should be stays as it is: the service's parser names it.
    """
    if not isinstance(data, dict):
        return data
    request = dict(data)
    if isinstance(data.get("files"), dict):
        request["files"] = {name: _as_base64(file) for name, file in data["files"].items()}
    if isinstance(data.get("stages"), list):
        request["stages"] = [
            {**stage, "stdin": _as_base64(stage["stdin"])}
            if isinstance(stage, dict) and "stdin" in stage
            else stage
            for stage in data["stages"]
        ]
    return request


def _as_base64(content: Any) -> Any:
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        return content
    try:
        encoded = content["text"].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return content
    rest = {key: value for key, value in content.items() if key != "text"}
    return {**rest, "base64": base64.b64encode(encoded).decode("ascii")}


def load_job(path: Path) -> Job:
    """The :class:`Job` in the file at ``path``; raises as :func:`load_job_data`."""
    return parse_job(load_job_data(path))


def _embed(content: object, job_path: Path, where: str) -> object:
    if not isinstance(content, dict) or "path" not in content:
        return content
    named = content["path"]
    if not isinstance(named, str) or not named:
        raise InvalidJobError(f"{where}.path", f"is {named!r}, not a path", "write a file's path")
    read = _read(
        job_path.parent / named,
        f"{job_path}: {where}.path ({job_path.parent / named})",
        "name an existing file, relative to the job file",
    )
    rest = {key: value for key, value in content.items() if key != "path"}
    return {**rest, "base64": base64.b64encode(read).decode("ascii")}


def _read(path: Path, subject: str, remedy: str) -> bytes:
    try:
        if not path.is_file():
            raise JobFileError(
                subject,
                "is not a regular file" if path.exists() else "does not exist",
                remedy,
            )
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise JobFileError(subject, "is too large", f"send at most {MAX_INPUT_BYTES} bytes")
        return path.read_bytes()
    except OSError as problem:
        raise JobFileError(
            subject, f"cannot be read: {problem.strerror}", "check its owner and mode"
        ) from None


def _stage(data: object, where: str) -> Stage:
    fields = _mapping(
        data,
        where,
        required=("name", "command"),
        optional=(
            "stdin",
            "environment_variables",
            "working_directory",
            "constraints",
            "network",
            "network_allow",
            "run_always",
        ),
    )
    command = fields["command"]
    if not isinstance(command, list) or not command:
        raise InvalidJobError(
            f"{where}.command",
            f"is {_show(command)}, not a list of words",
            "write for example [python3, main.py]; a shell line is [sh, -c, 'the line']",
        )
    variables = _environment_variables(
        fields.get("environment_variables", {}), f"{where}.environment_variables"
    )
    if len(command) + len(variables) > MAX_WORDS:
        raise InvalidJobError(
            f"{where}.command",
            f"and environment_variables are {len(command) + len(variables)} words",
            f"write at most {MAX_WORDS}",
        )
    directory = _text(fields.get("working_directory", "."), f"{where}.working_directory")
    if directory != ".":
        directory = _relative_path(directory, f"{where}.working_directory")
    run_always = fields.get("run_always", False)
    if not isinstance(run_always, bool):
        raise InvalidJobError(
            f"{where}.run_always", f"is {_show(run_always)}", "write true or false"
        )
    network = _network(fields.get("network", "none"), f"{where}.network")
    return Stage(
        name=_name(fields["name"], f"{where}.name"),
        command=tuple(_text(word, f"{where}.command[{i}]") for i, word in enumerate(command)),
        stdin=_content(fields["stdin"], f"{where}.stdin") if "stdin" in fields else b"",
        environment_variables=variables,
        working_directory=directory,
        constraints=StageConstraints.parse(fields.get("constraints", {}), f"{where}.constraints"),
        run_always=run_always,
        network=network,
        network_allow=_network_allow(fields.get("network_allow"), network, where),
    )


def _network(value: object, where: str) -> NetworkPolicy:
    try:
        return NetworkPolicy(value)
    except ValueError:
        raise InvalidJobError(
            where,
            f"is {_show(value)}, not a network policy",
            f"write one of {', '.join(policy.value for policy in NetworkPolicy)}",
        ) from None


def _network_allow(data: object, policy: NetworkPolicy, where: str) -> tuple[Destination, ...]:
    here = f"{where}.network_allow"
    if policy is not NetworkPolicy.ALLOW:
        if data is not None:
            raise InvalidJobError(
                here, f"is of no use with the policy {policy.value}", "write network: allow"
            )
        return ()
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_DESTINATIONS:
        raise InvalidJobError(
            here,
            "is missing" if data is None else f"is {_show(data)}",
            f"write a list of 1 to {MAX_DESTINATIONS} entries such as "
            "{to: example.org, protocol: tcp, ports: [443]}",
        )
    return tuple(_destination(entry, f"{here}[{index}]") for index, entry in enumerate(data))


def _destination(data: object, where: str) -> Destination:
    fields = _mapping(data, where, required=("to", "protocol", "ports"), optional=())
    if not isinstance(fields["to"], str):
        raise InvalidJobError(
            f"{where}.to",
            f"is {_show(fields['to'])}, not text",
            "write one address, network or host name, quoted; several take an entry each",
        )
    to = _text(fields["to"], f"{where}.to")
    if _is_address(to):
        try:
            # A zone (fe80::1%eth0) is an interface of one host.
            valid = "%" not in str(ip_network(to))
        except ValueError:
            valid = False
        if not valid:
            raise InvalidJobError(
                f"{where}.to",
                f"is {_show(to)}, no address or network",
                "write an address, or a network without bits of a host such as 192.0.2.0/24; a port "
                "belongs in ports",
            )
    elif not HOST_NAME.fullmatch(to) or to.replace(".", "").isdigit():
        raise InvalidJobError(
            f"{where}.to",
            f"is {_show(to)}",
            "write an address, a network such as 192.0.2.0/24, or a host name alone; a port "
            "belongs in ports",
        )
    if fields["protocol"] not in PROTOCOLS:
        raise InvalidJobError(
            f"{where}.protocol", f"is {_show(fields['protocol'])}", "write tcp or udp"
        )
    ports = fields["ports"]
    if not isinstance(ports, list) or not 1 <= len(ports) <= MAX_PORTS:
        raise InvalidJobError(
            f"{where}.ports", f"is {_show(ports)}", f"write a list of 1 to {MAX_PORTS} ports"
        )
    for index, port in enumerate(ports):
        if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
            raise InvalidJobError(
                f"{where}.ports[{index}]",
                f"is {_show(port)}",
                "write a number from 1 to 65535; there are no ranges",
            )
    return Destination(to, fields["protocol"], tuple(ports))


def _is_address(text: str) -> bool:
    """Whether it is meant as an address or network, right or wrong in its length or bits."""
    address = text.partition("/")[0]
    if ":" in address:
        return True
    try:
        IPv4Address(address)
    except ValueError:
        return False
    return True


def parse_mounts(data: object, where: str) -> tuple[JobMount, ...]:
    """Mounts from a list of names or ``{name: ..., writable: true}``; else InvalidJobError."""
    if not isinstance(data, list):
        raise InvalidJobError(
            where, f"is {_show(data)}, not a list", "write for example [datasets]"
        )
    mounts: list[JobMount] = []
    for index, entry in enumerate(data):
        here = f"{where}[{index}]"
        if isinstance(entry, str):
            entry = {"name": entry}
        fields = _mapping(entry, here, required=("name",), optional=("writable",))
        writable = fields.get("writable", False)
        if not isinstance(writable, bool):
            raise InvalidJobError(
                f"{here}.writable", f"is {_show(writable)}", "write true or false"
            )
        mount = JobMount(_name(fields["name"], f"{here}.name"), writable)
        if any(mount.name == other.name for other in mounts):
            raise InvalidJobError(here, f"is {mount.name!r} again", "name every mount once")
        mounts.append(mount)
    return tuple(mounts)


def _files(data: object) -> Iterable[JobFile]:
    if not isinstance(data, Mapping):
        raise InvalidJobError(
            "files",
            "is not a mapping",
            "write files as name: {text: ...}, {base64: ...} or {path: ...}",
        )
    if len(data) > MAX_FILES:
        raise InvalidJobError(
            "files", f"has {len(data)} entries", f"send at most {MAX_FILES} files"
        )
    seen: set[str] = set()
    for raw_name, content in data.items():
        where = f"files.{raw_name}"
        name = _relative_path(_text(raw_name, where), where)
        parents = {"/".join(name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)}
        if name in seen or parents & seen or any(other.startswith(f"{name}/") for other in seen):
            raise InvalidJobError(
                where,
                "is both a file and another entry's name or directory",
                "give every file its own path",
            )
        seen.add(name)
        executable = False
        if isinstance(content, Mapping) and "executable" in content:
            executable = content["executable"]
            if not isinstance(executable, bool):
                raise InvalidJobError(
                    f"{where}.executable", f"is {_show(executable)}", "write true or false"
                )
            content = {key: value for key, value in content.items() if key != "executable"}
        yield JobFile(name=name, content=_content(content, where), executable=executable)


def _collect(data: object) -> tuple[str, ...]:
    if not isinstance(data, list) or len(data) > MAX_FILES:
        raise InvalidJobError(
            "collect", f"is not a list of up to {MAX_FILES} paths", "write for example [out.txt]"
        )
    return tuple(
        _relative_path(_text(name, f"collect[{i}]"), f"collect[{i}]") for i, name in enumerate(data)
    )


def _content(data: object, where: str) -> bytes:
    if isinstance(data, Mapping) and set(data) == {"path"}:
        raise InvalidJobError(
            f"{where}.path", "is not open to the service", "send the content as text or base64"
        )
    if not isinstance(data, Mapping) or len(data) != 1 or not set(data) <= {"text", "base64"}:
        raise InvalidJobError(
            where,
            f"is {_show(data)}",
            "write exactly one of {text: ...}, {base64: ...} or {path: ...}",
        )
    if "text" in data:
        text = data["text"]
        if not isinstance(text, str):
            raise InvalidJobError(f"{where}.text", f"is {_show(text)}, not text", "quote it")
        return _encode(text, f"{where}.text")
    try:
        return base64.b64decode(data["base64"], validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise InvalidJobError(
            f"{where}.base64", "is not valid base64", "encode the content with RFC 4648 base64"
        ) from None


def _mapping(
    data: object, where: str, *, required: tuple[str, ...], optional: tuple[str, ...]
) -> Mapping[str, Any]:
    allowed = required + optional
    if not isinstance(data, Mapping):
        raise InvalidJobError(
            where, f"is {_show(data)}, not a mapping", f"write the fields {', '.join(allowed)}"
        )
    prefix = "" if where == "job" else f"{where}."
    for key in data:
        if key not in allowed:
            raise InvalidJobError(
                f"{prefix}{key}",
                "is not a known field",
                f"the fields here are {', '.join(allowed)}",
            )
    for key in required:
        if key not in data:
            raise InvalidJobError(f"{prefix}{key}", "is missing", "add it")
    return data


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidJobError(where, f"is {_show(value)}, not text", "quote it")
    if "\0" in value:
        raise InvalidJobError(where, "has a NUL character", "remove it")
    if len(_encode(value, where)) >= MAX_ARGUMENT_BYTES:
        raise InvalidJobError(
            where, "is too long", f"write fewer than {MAX_ARGUMENT_BYTES} bytes, or use a file"
        )
    return value


def _encode(value: str, where: str) -> bytes:
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidJobError(where, "has half a surrogate pair", "write valid Unicode") from None


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidJobError(
            where,
            f"is {_show(value)}",
            "write 1 to 64 of the characters A-Z a-z 0-9 . _ - and start with a letter or digit",
        )
    return value


def _relative_path(value: str, where: str) -> str:
    parts = value.split("/")
    if value.startswith("/"):
        raise InvalidJobError(
            where, "is an absolute path", "write it relative to the work directory"
        )
    if ".." in parts:
        raise InvalidJobError(where, "has '..' in it", "write a path inside the work directory")
    if not value or "" in parts or "." in parts:
        raise InvalidJobError(where, "is not a plain path", "write it without empty or '.' parts")
    if any(len(_encode(part, where)) > 255 for part in parts) or len(parts) > 32:
        raise InvalidJobError(
            where, "is too long or too deep", "use at most 255 bytes a name, 32 deep"
        )
    return value


def _string_mapping(data: object, where: str) -> dict[str, str]:
    if not isinstance(data, Mapping):
        raise InvalidJobError(where, f"is {_show(data)}, not a mapping", "write name: value")
    if len(data) > MAX_LABELS or any(len(str(v)) > MAX_LABEL_CHARACTERS for v in data.values()):
        raise InvalidJobError(
            where,
            "has too many or too long entries",
            f"write at most {MAX_LABELS} of {MAX_LABEL_CHARACTERS} characters each",
        )
    return {
        _name(key, f"{where}.{key}"): _text(value, f"{where}.{key}") for key, value in data.items()
    }


def _environment_variables(data: object, where: str) -> dict[str, str]:
    if not isinstance(data, Mapping):
        raise InvalidJobError(where, f"is {_show(data)}, not a mapping", "write NAME: value")
    for key in data:
        if not isinstance(key, str) or not _VARIABLE.fullmatch(key):
            raise InvalidJobError(
                f"{where}.{key}", "is not a variable's name", "use A-Z a-z 0-9 _, no leading digit"
            )
    return {key: _text(value, f"{where}.{key}") for key, value in data.items()}


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
