# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Environments: the read-only root file systems that jobs run in (PRIVATE to the collection).

An environment is *defined* by data (a name, Debian packages, a description, the PATH of its
programs), *built* on the controller into one archive per architecture by mmdebstrap, and
*installed* on the hosts by ``archive_tree``.  This file holds the definition, the recipe (what is
done to a root file system besides installing packages) and the build.

A build is keyed by the digest of everything that determines its content except the state of the
Debian archive.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.validate import Value

# What Ansible calls an architecture -> what Debian calls it.
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"

# Fixed, so that the same packages give the same archive; also makes Python's byte code valid by the
# hash of its source instead of by time stamps, which do not survive the clamping of times in the
# archive.
_SOURCE_DATE_EPOCH = "1700000000"

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE = re.compile(r"[a-z][a-z0-9-]*")


class DefinitionError(Exception):
    """An environment definition that makes no sense; the text names it and the remedy."""


class BuildError(Exception):
    """A build that failed; the text is one sentence with the remedy, and what a package said."""


class CannotBuildError(BuildError):
    """This machine can build nothing at all."""


@dataclass(frozen=True)
class Definition:
    """One environment: ``packages`` come on top of Debian's essential ones; ``path`` is the PATH of
    its programs; ``mounts`` names directories of the hosts that its jobs see below /mnt."""

    name: str
    packages: tuple[str, ...]
    description: str
    path: str
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Archive:
    """What is to be built: one environment of one Debian suite for one architecture (Ansible's "
    "name)."""

    definition: Definition
    suite: str
    architecture: str

    @property
    def label(self) -> str:
        return f"{self.definition.name}-{self.suite}-{self.architecture}"

    @property
    def digest(self) -> str:
        """Digest of all that determines the content, except which versions the Debian archive
        has today."""
        recipe = {
            "packages": sorted(self.definition.packages),
            "suite": self.suite,
            "architecture": self.architecture,
            "options": _OPTIONS,
            "finish": _FINISH,
            "epoch": _SOURCE_DATE_EPOCH,
        }
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        return f"{self.label}-{self.digest}.tar.zst"


# --- Definitions ----------------------------------------------------------------------------------


def parse_definitions(raw: object) -> tuple[Definition, ...]:
    """Definitions in the order given; DefinitionError names the first one that makes no sense."""
    if not isinstance(raw, Mapping) or not raw:
        raise DefinitionError(
            "The environment definitions must be a dictionary with at least one entry, "
            "name: {packages: [...], description: ..., path: ..., mounts: [...]}."
        )
    return tuple(_parse_definition(name, value) for name, value in raw.items())


class _Value(Value):
    """Of a definition: errors are sentences that begin with the environment's name."""

    def unknown(self, name: str, known: Sequence[str]) -> Exception:
        return self.error(f"has the unknown field '{name}'", f"known are {', '.join(known)}")


def _definition_error(subject: str, message: str, remedy: str) -> DefinitionError:
    return DefinitionError(f"{subject} {message}; {remedy}.")


def _parse_definition(name: object, raw: object) -> Definition:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DefinitionError(
            f"The environment name {name!r} must be a lower-case letter followed by up to 31 "
            "lower-case letters, digits or '-'."
        )
    subject = f"Environment '{name}'"
    value = _Value(raw, subject, _definition_error, prefix=f"{subject}: ")
    if not isinstance(raw, Mapping):
        raise value.error("must be a dictionary", "write its packages and its description")
    fields = value.fields(
        optional={"packages": [], "description": "", "path": DEFAULT_PATH, "mounts": []}
    )
    packages = fields["packages"].list(remedy="it must be a list of Debian package names")
    for package in packages:
        if not isinstance(package.raw, str) or not _PACKAGE.fullmatch(package.raw):
            raise package.error(
                f"{package.raw!r} is not the name of a Debian package", "correct it"
            )
    description = fields["description"].text(remedy="write one sentence for its users")
    if not description.strip():
        raise value.error("needs a 'description'", "write one sentence for its users")
    path = fields["path"].text()
    if not all(part.startswith("/") for part in path.split(":")):
        raise fields["path"].error(
            f"is {path!r}", "its directories, joined by ':', must be absolute"
        )
    mounts = fields["mounts"].list(remedy="it must be a list of names from worker_slave_mounts")
    return Definition(
        name,
        tuple(str(package.raw) for package in packages),
        description,
        path,
        tuple(mount.text() for mount in mounts),
    )


def plan_archives(raw: object, suite: str, architectures: Sequence[str]) -> tuple[Archive, ...]:
    """Every environment for every architecture."""
    definitions = parse_definitions(raw)
    if not _SUITE.fullmatch(suite):
        raise DefinitionError(
            f"suite: {suite!r} is not the code name of a Debian release, such as 'bookworm'."
        )
    for architecture in architectures:
        if architecture not in DEBIAN_ARCHITECTURES:
            known = ", ".join(DEBIAN_ARCHITECTURES)
            raise DefinitionError(
                f"architectures: '{architecture}' is not supported; supported are {known}."
            )
    return tuple(
        Archive(definition, suite, architecture)
        for architecture in dict.fromkeys(architectures)
        for definition in definitions
    )


# --- What the hosts get ---------------------------------------------------------------------------


def trees_for_host(archives: object, architecture: str, directory: str) -> list[dict[str, Any]]:
    """Records of built archives -> the ``trees`` option of archive_tree."""
    return [
        {
            "src": a["path"],
            "sha256": a["sha256"] or "",
            "dest": f"{directory}/{a['name']}",
            "mode": "0755",
        }
        for a in _of_architecture(archives, architecture)
    ]


def registry_for_host(
    definitions: object,
    archives: object,
    architecture: str,
    directory: str,
    failures: object = (),
    installed: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The engine's list of environments: name -> path, digest, description, default_path, mounts.

    Of those that could not be built (``failures``) the host keeps what it has (``installed``, such a
    list), if anything.
    """
    built = {a["name"]: a for a in _of_architecture(archives, architecture)}
    failed = {a["name"] for a in _of_architecture(failures, architecture)}
    registry: dict[str, dict[str, Any]] = {}
    for definition in parse_definitions(definitions):
        if definition.name not in built:
            if definition.name not in failed:
                raise DefinitionError(
                    f"environment '{definition.name}' was not built for {architecture}"
                )
            if definition.name in (installed or {}):
                registry[definition.name] = (installed or {})[definition.name]
            continue
        digest = built[definition.name]["sha256"]
        registry[definition.name] = {
            "path": f"{directory}/{definition.name}",
            "digest": f"sha256:{digest}" if digest else None,
            "description": definition.description,
            "default_path": definition.path,
            "mounts": list(definition.mounts),
        }
    return registry


def _of_architecture(archives: object, architecture: str) -> list[Mapping[str, Any]]:
    if not isinstance(archives, list | tuple) or not all(isinstance(a, Mapping) for a in archives):
        raise DefinitionError(
            "archives and failures must be the lists that environment_archive returns as "
            "'environments' and 'failures'"
        )
    return [a for a in archives if a["architecture"] == architecture]


# --- The recipe -----------------------------------------------------------------------------------

# Essential packages are a complete POSIX environment in which every other package's scripts can
# run.  Recommended packages are of no use to a job.  Documentation and translations neither, but
# scripts of packages count on them (alternatives that link manual pages, files that are copied from
# examples), so they go when all is configured and not by dpkg's path-exclude.  The merged-usr
# hook keeps Perl's full library out, which would come only to convert a layout that a fresh root
# file system does not have.
_OPTIONS = (
    "--variant=essential",
    "--aptopt=APT::Install-Recommends false",
    "--aptopt=APT::Install-Suggests false",
    "--dpkgopt=force-unsafe-io",
)
_MERGED_USR_HOOKS = "/usr/share/mmdebstrap/hooks/merged-usr"

# Runs on the controller with the root file system as "$1", after all packages are configured, and
# replaces mmdebstrap's own cleaning, which expects apt's files to be there still.
# /work, /tmp, /mnt, /proc and /dev are what the engine mounts over; a read-only root file system
# cannot grow them later.  A job's host name resolves as with a network, where the engine brings the
# file.  It needs no package manager, no identity of the machine that built the root file system, and
# no program that changes users.
_FINISH = r"""set -eu
rm -rf "$1"/etc/apt "$1"/var/lib/apt "$1"/var/cache "$1"/var/log "$1"/var/backups \
  "$1"/var/lib/systemd "$1"/usr/share/info "$1"/usr/share/doc "$1"/usr/share/man \
  "$1"/usr/share/lintian "$1"/usr/share/locale
find "$1"/run "$1"/tmp -xdev -mindepth 1 -delete
rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/machine-id "$1"/var/lib/dbus/machine-id \
  "$1"/etc/passwd- "$1"/etc/group- "$1"/etc/shadow- "$1"/etc/gshadow- \
  "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$1"/var/lib/dpkg/*-old "$1"/.dockerenv
mkdir -p "$1"/var/cache "$1"/var/log "$1"/work "$1"/tmp "$1"/mnt "$1"/proc "$1"/dev
chmod 0755 "$1" "$1"/work
chmod 1777 "$1"/tmp
# A user of the host could leave something there for jobs to read.
find "$1" -xdev -type d -perm -0002 ! -path "$1"/tmp -exec chmod 0755 {} +
grep -q '^job:' "$1"/etc/passwd || echo 'job:x:1000:1000::/work:/bin/sh' >> "$1"/etc/passwd
grep -q '^job:' "$1"/etc/group || echo 'job:x:1000:' >> "$1"/etc/group
printf '127.0.0.1\tlocalhost cellblock\n::1\tlocalhost cellblock\n' > "$1"/etc/hosts
find "$1" -xdev -type f -perm /6000 -exec chmod ug-s {} +
"""

# Where the sets of packages of the environments overlap, each .deb is downloaded once.  apt
# verifies what it finds.
_TAKE_DEBS = (
    'mkdir -p "$1"/var/cache/apt/archives && '
    'find {debs} -name "*.deb" -exec cp -t "$1"/var/cache/apt/archives {{}} +'
)
_KEEP_DEBS = (
    'find "$1"/var/cache/apt/archives -maxdepth 1 -name "*.deb" -exec cp -n -t {debs} {{}} +'
)
_LIST_PACKAGES = (
    'dpkg-query --admindir="$1"/var/lib/dpkg --show '
    "--showformat='${{Package}}\\t${{Version}}\\t${{Architecture}}\\n' > {manifest}"
)


def apt_index_targets() -> str:
    """Where this machine's own apt gets its packages, a line ORIGIN|CODENAME|URI for each index.

    Empty when it has no apt.
    """
    try:
        return subprocess.run(
            ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(CODENAME)|$(REPO_URI)"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        return ""


def sources(
    suite: str, mirror: str | None, security_mirror: str | None, indextargets: str
) -> list[str]:
    """apt source lines for a suite; empty means mmdebstrap's own default.

    ``indextargets`` is as :func:`apt_index_targets` returns it: unless a mirror is given, packages
    come from where this machine gets its own.
    """
    if mirror:
        lines = [f"deb {mirror} {suite} main"]
        return (
            [*lines, f"deb {security_mirror} {suite}-security main"] if security_mirror else lines
        )
    main = security = None
    for line in indextargets.splitlines():
        origin, _, rest = line.partition("|")
        codename, _, uri = rest.partition("|")
        if origin != "Debian" or not uri:
            continue
        if codename.endswith("-security"):
            security = security or uri
        else:
            main = main or uri
    if main is None:
        return []
    lines = [f"deb {main} {suite} main", f"deb {main} {suite}-updates main"]
    security = security_mirror or security
    return [*lines, f"deb {security} {suite}-security main"] if security else lines


def command_line(
    archive: Archive,
    target: Path,
    debs: Path,
    manifest: Path,
    source_lines: Sequence[str],
    merged_usr: bool,
) -> list[str]:
    """The mmdebstrap command that builds ``archive`` into the file ``target``."""
    packages = ",".join(archive.definition.packages)
    return [
        "mmdebstrap",
        *_OPTIONS,
        f"--architectures={DEBIAN_ARCHITECTURES[archive.architecture]}",
        *([f"--hook-dir={_MERGED_USR_HOOKS}"] if merged_usr else []),
        *([f"--include={packages}"] if packages else []),
        "--skip=download/empty,essential/unlink,cleanup",
        "--setup-hook=" + _TAKE_DEBS.format(debs=shlex.quote(str(debs))),
        "--customize-hook=" + _KEEP_DEBS.format(debs=shlex.quote(str(debs))),
        "--customize-hook=" + _LIST_PACKAGES.format(manifest=shlex.quote(str(manifest))),
        f"--customize-hook={_FINISH}",
        archive.suite,
        str(target),
        *source_lines,
    ]


# What mmdebstrap or apt prints -> what to tell the operator; the first match counts, those of this
# machine before what a package says, whose script may print anything.
_OF_THIS_MACHINE = (
    (
        r"can neither be executed natively nor via qemu|Exec format error",
        "this machine cannot run {architecture} programs; install the package 'qemu-user-static', "
        "or build the archive on such a machine and give its directory as 'environments_archives_dir'",
    ),
    (
        r"No space left on device",
        "the disk is full at {directory} or in the directory for temporary files; free some space",
    ),
)
_OF_THE_MIRROR = (
    (
        r"NO_PUBKEY|is not signed",
        "the signature of the Debian archive cannot be verified; install the package "
        "'debian-archive-keyring' of a release that knows '{suite}'",
    ),
    (
        r"does not have a Release file",
        "the mirror has no release '{suite}'; correct 'environments_suite' or 'environments_mirror'",
    ),
    (
        r"Could not (?:resolve|connect)|Temporary failure|Failed to fetch|Connection refused",
        "packages could not be downloaded; check this machine's network and the mirror in its apt "
        "configuration, or set 'environments_mirror' (log: {log})",
    ),
)
_UNKNOWN_PACKAGE = (
    r"Unable to locate package ([^\s']+)",
    r"Package '?([^\s']+)'? has no installation candidate",
    r"Couldn't find any package by \w+ '([^\s']+)'",
)
# dpkg names the package, or the file that it comes in.
_FAILED_PACKAGE = re.compile(
    r"^dpkg: error processing (?:package|archive) (?:\S*/)?(?:\d+-)?([a-z0-9][a-z0-9+.-]+).*$", re.M
)
_BEGINS_A_PACKAGE = re.compile(r"Setting up |Preparing to unpack |Processing triggers for ")
_UNMET = re.compile(r"^The following packages have unmet dependencies:(?:\n .*)*(?:\nE: .*)?", re.M)
_MOST_LINES = 12
_LONGEST_LINE = 300


def explain_failure(archive: Archive, output: str, log: Path) -> str:
    """One sentence with the remedy for what mmdebstrap and apt printed; of a package that could not
    be installed, its last lines below."""
    prefix = f"Environment '{archive.definition.name}': "

    def known(failures: Sequence[tuple[str, str]]) -> str | None:
        for pattern, text in failures:
            if re.search(pattern, output):
                explained = text.format(
                    architecture=archive.architecture,
                    suite=archive.suite,
                    directory=log.parent,
                    log=log,
                )
                return f"{prefix}{explained}."
        return None

    for pattern in _UNKNOWN_PACKAGE:
        if found := re.search(pattern, output):
            return (
                f"{prefix}Debian {archive.suite} has no package '{found[1]}' for "
                f"{archive.architecture}; correct the environment's 'packages'."
            )
    if explained := known(_OF_THIS_MACHINE):
        return explained
    if failed := _FAILED_PACKAGE.search(output):
        before = output[: failed.start()].splitlines()
        begin = max(
            (number for number, line in enumerate(before) if _BEGINS_A_PACKAGE.match(line)),
            default=0,
        )
        # The reason stands in the line after dpkg's.
        reason = output[failed.end() :].lstrip("\n").split("\n", 1)[0]
        return (
            f"{prefix}Debian's package '{failed[1]}' could not be installed; leave it out of the "
            f"environment's 'packages', or mend what it says at last (log: {log}):"
            + _last_lines([*before[begin:], failed[0], reason])
        )
    if unmet := _UNMET.search(output):
        return (
            f"{prefix}its packages cannot be installed together; correct the environment's "
            f"'packages' (log: {log}):" + _last_lines(unmet[0].splitlines())
        )
    if explained := known(_OF_THE_MIRROR):
        return explained
    errors = [line[2:].strip() for line in output.splitlines() if line.startswith("E:")]
    reason = errors[0] if errors else "no message"
    return f"{prefix}mmdebstrap failed ({reason}); read its log {log}."


def _last_lines(lines: Sequence[str]) -> str:
    return "".join(f"\n    {line.strip()[:_LONGEST_LINE]}" for line in lines[-_MOST_LINES:])


# --- The build ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A finished archive; ``sha256`` is None where it is only predicted.  ``packages`` maps "
    "names to versions."""

    archive: Archive
    path: Path
    sha256: str | None
    size_bytes: int | None
    built: bool
    packages: dict[str, str]
    seconds: float | None

    def as_result(self) -> dict[str, Any]:
        return {
            "name": self.archive.definition.name,
            "suite": self.archive.suite,
            "architecture": self.archive.architecture,
            "path": str(self.path),
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "built": self.built,
            "build_seconds": self.seconds,
            "packages": self.packages,
        }


def prebuilt(archive: Archive, directory: Path) -> Record:
    """The operator's own archive of an environment."""
    path = directory / f"{archive.label}.tar.zst"
    if not path.is_file():
        raise BuildError(
            f"Environment '{archive.definition.name}': the archive {path} does not exist; put it "
            "there, or leave "
            "'environments_archives_dir' empty so that it is built."
        )
    return Record(archive, path, _file_digest(path), path.stat().st_size, False, {}, None)


class Cache:
    """The directory of built archives.  Safe for several runs at a time and after interruptions.

    An archive counts as present when the JSON file beside it, written last, describes it.
    """

    def __init__(self, directory: Path, source_lines: Callable[[str], Sequence[str]]) -> None:
        """``source_lines`` gives the apt source lines of a suite."""
        self._directory = directory / "environments"
        self._debs = directory / "debs"
        self._source_lines = source_lines

    def find(self, archive: Archive) -> Record | None:
        """The finished archive, or None."""
        path = self._directory / archive.file_name
        try:
            data = json.loads(_sidecar(path).read_text(encoding="utf-8"))
            size = path.stat().st_size
        except (OSError, ValueError):
            return None
        if not isinstance(data, dict) or data.get("size_bytes") != size:
            return None
        return Record(
            archive, path, data["sha256"], size, False, data["packages"], data["build_seconds"]
        )

    def predict(self, archive: Archive) -> Record:
        """What :meth:`build` would make."""
        return Record(archive, self._directory / archive.file_name, None, None, True, {}, None)

    def build(self, archive: Archive, rebuild: bool) -> Record:
        """Build the archive unless another run has just done so; BuildError when that fails."""
        for program, package in (
            ("mmdebstrap", "mmdebstrap"),
            ("zstd", "zstd"),
            ("dpkg-query", "dpkg"),
        ):
            if shutil.which(program) is None:
                raise CannotBuildError(
                    f"Environment '{archive.definition.name}' cannot be built, because this "
                    "machine has no "
                    f"'{program}'; install the package '{package}', or give built archives as "
                    "'environments_archives_dir'."
                )
        if os.geteuid() != 0:
            # mmdebstrap's own user namespaces could not write into a cache that belongs to a user.
            raise CannotBuildError(
                f"Environment '{archive.definition.name}' cannot be built by an ordinary user; run as "
                "root, or give built archives as 'environments_archives_dir'."
            )
        try:
            self._debs.mkdir(parents=True, exist_ok=True)
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._remove_leftovers()
                found = None if rebuild else self.find(archive)
                return found or self._build(archive)
        except OSError as error:
            raise CannotBuildError(
                f"Environment '{archive.definition.name}' cannot be built: "
                f"{error.filename or self._directory}: "
                f"{error.strerror or error}; correct that and run again."
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_leftovers(self) -> None:
        for path in self._directory.glob(".partial-*"):
            path.unlink()

    def _build(self, archive: Archive) -> Record:
        token = secrets.token_hex(8)
        target = self._directory / f".partial-{token}-{archive.file_name}"
        manifest = self._directory / f".partial-{token}-{archive.label}.packages"
        log = self._directory / f"{archive.label}.log"
        started = time.monotonic()
        try:
            command = command_line(
                archive,
                target,
                self._debs,
                manifest,
                self._source_lines(archive.suite),
                os.path.isdir(_MERGED_USR_HOOKS),
            )
            with log.open("wb") as stream:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={
                        **os.environ,
                        "LC_ALL": "C.UTF-8",
                        "SOURCE_DATE_EPOCH": _SOURCE_DATE_EPOCH,
                    },
                    check=False,
                )
            if done.returncode != 0:
                raise BuildError(explain_failure(archive, log.read_text(errors="replace"), log))
            data: dict[str, Any] = {
                "sha256": _file_digest(target),
                "size_bytes": target.stat().st_size,
                "build_seconds": round(time.monotonic() - started, 1),
                "packages": parse_manifest(manifest.read_text(encoding="utf-8")),
            }
            path = self._directory / archive.file_name
            _sidecar(path).unlink(missing_ok=True)
            os.rename(target, path)
            manifest.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.rename(manifest, _sidecar(path))
        finally:
            target.unlink(missing_ok=True)
            manifest.unlink(missing_ok=True)
        return Record(
            archive,
            path,
            data["sha256"],
            data["size_bytes"],
            True,
            data["packages"],
            data["build_seconds"],
        )


def parse_manifest(text: str) -> dict[str, str]:
    """dpkg-query's lines ``package<TAB>version<TAB>architecture`` -> package to version."""
    return {line.split("\t")[0]: line.split("\t")[1] for line in text.splitlines() if line}


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _file_digest(path: Path) -> str:
    result = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            result.update(block)
    return result.hexdigest()
