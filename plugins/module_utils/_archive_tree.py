# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Directories that hold exactly one unpacked archive (PRIVATE to the collection).

A *tree* is a directory on the host whose whole content comes from one archive of a known SHA-256
digest.  What makes a tree count as present is its *marker*, a small JSON file beside it
(``<parent>/.<name>.archive-tree.json``).  It lies outside the tree, because trees are root file
systems that untrusted jobs see, and it is written as the very last step, so a tree whose unpacking
was interrupted at any point is simply absent and the next run replaces it.

Everything here runs on the host with Python 3.10 or newer and nothing but the standard library,
``tar`` and (for ``.tar.zst``) ``zstd``.  All expected failures are :class:`TreeError` with one
sentence for the operator.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

# Raise this when the way of unpacking changes so that existing trees are no longer what a new run
# would make.
MARKER_FORMAT = 1

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_ZIP_SUFFIXES = (".zip", ".whl")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.archive-tree\.(?:partial|old|marker)-[0-9a-f]{16}")
_MARKER = re.compile(r"\.(?P<name>.+)\.archive-tree\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TreeError(Exception):
    """An expected failure; the text is one sentence that names the thing and the remedy."""


@dataclass(frozen=True)
class Tree:
    """One wanted tree.

    ``sha256`` is the digest of the archive in lower-case hex; None means that it is not known yet,
    which only a prediction (check mode before the archive was built) may contain.  ``mode`` is that
    of the top directory.
    """

    src: str
    dest: Path
    sha256: str | None
    mode: int = 0o755

    @property
    def marker(self) -> Path:
        return self.dest.parent / f".{self.dest.name}.archive-tree.json"

    def beside(self, kind: str) -> Path:
        """A fresh name for a temporary of this tree, on the same file system and recognised by "
        "later runs."""
        return self.dest.parent / f".{self.dest.name}.archive-tree.{kind}-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class TreeState:
    """What is true of a wanted tree before the run and what has to happen."""

    tree: Tree
    before: str | None
    unpack: bool
    chmod: bool
    reason: str

    @property
    def changed(self) -> bool:
        return self.unpack or self.chmod

    def as_result(self) -> dict[str, Any]:
        return {
            "dest": str(self.tree.dest),
            "changed": self.changed,
            "unpack": self.unpack,
            "before": self.before,
            "after": self.tree.sha256,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """The difference between the host and the wanted state; computing it changes nothing."""

    states: tuple[TreeState, ...]
    undeclared: tuple[Tree, ...]
    leftovers: tuple[Path, ...]

    @property
    def changed(self) -> bool:
        return bool(
            self.undeclared or self.leftovers or any(state.changed for state in self.states)
        )

    def as_result(self) -> dict[str, Any]:
        return {
            "changed": self.changed,
            "trees": [state.as_result() for state in self.states],
            "purged": [str(tree.dest) for tree in self.undeclared],
            "cleaned": [str(path) for path in self.leftovers],
            "diff": self._diff(),
        }

    def _diff(self) -> dict[str, str]:
        before = {str(s.tree.dest): _shown(s.before) for s in self.states}
        after = {
            str(s.tree.dest): _shown(s.tree.sha256, "digest not known yet") for s in self.states
        }
        for tree in self.undeclared:
            before[str(tree.dest)] = _shown(tree.sha256)
            after[str(tree.dest)] = "absent"
        for path in self.leftovers:
            before[str(path)] = "left by an interrupted run"
            after[str(path)] = "absent"
        return {"before": _lines(before), "after": _lines(after)}


def _shown(digest: str | None, missing: str = "absent") -> str:
    return f"sha256:{digest}" if digest else missing


def _lines(values: dict[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in sorted(values.items()))


# --- The wanted state -----------------------------------------------------------------------------


def parse_trees(raw: Sequence[dict[str, Any]]) -> tuple[Tree, ...]:
    """Turn the module's ``trees`` option into wanted trees; raises TreeError for the first one "
    "that makes no sense."""
    trees: list[Tree] = []
    for item in raw:
        dest = checked_directory(item["dest"], "dest")
        if dest in (tree.dest for tree in trees):
            raise TreeError(
                f"trees: dest {dest} is given twice; give every tree a directory of its own."
            )
        digest = item.get("sha256") or None
        if digest is not None and not _SHA256.fullmatch(digest):
            raise TreeError(
                f"trees: sha256 of {dest} must be 64 lower-case hexadecimal digits, not {digest!r}."
            )
        archive_kind(item["src"])
        trees.append(Tree(item["src"], dest, digest, _mode(item.get("mode") or "0755", dest)))
    for tree in trees:
        for other in trees:
            if other.dest in tree.dest.parents:
                raise TreeError(
                    f"trees: dest {tree.dest} lies inside {other.dest}; trees cannot be nested."
                )
    return tuple(trees)


def checked_directory(value: str, option: str) -> Path:
    """The absolute, normalised directory ``value``; ``option`` is named in the error."""
    pure = PurePosixPath(value)
    if not pure.is_absolute() or ".." in pure.parts or len(pure.parts) < 3:
        raise TreeError(
            f"{option}: {value!r} must be an absolute path without '..', at least two levels "
            "below the root directory."
        )
    return Path(pure)


def _mode(text: str, dest: Path) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise TreeError(
            f"trees: mode of {dest} must be an octal string from '0000' to '0777', not {text!r}."
        )
    return mode


def archive_kind(name: str) -> str:
    """``"tar"`` or ``"zip"``, by the file's name; TreeError for any other."""
    lowered = name.lower()
    if lowered.endswith(_TAR_SUFFIXES):
        return "tar"
    if lowered.endswith(_ZIP_SUFFIXES):
        return "zip"
    known = ", ".join(_TAR_SUFFIXES + _ZIP_SUFFIXES)
    raise TreeError(
        f"trees: src {name} is no archive that can be unpacked here; its name must end in one of "
        f"{known}."
    )


# --- The difference -------------------------------------------------------------------------------


def make_plan(trees: Sequence[Tree], purge_under: Path | None) -> Plan:
    """Compare the host with the wanted state, reading only."""
    states = tuple(_state(tree) for tree in trees)
    wanted = {tree.dest for tree in trees}
    undeclared: list[Tree] = []
    leftovers: list[Path] = []
    parents = {tree.dest.parent for tree in trees} | ({purge_under} if purge_under else set())
    for parent in sorted(parents):
        for name in _listdir(parent):
            leftover = _LEFTOVER.fullmatch(name)
            # Other people's leftovers stay: only the names declared here, or all below a directory
            # that is ours.
            if leftover and (parent == purge_under or parent / leftover["name"] in wanted):
                leftovers.append(parent / name)
            marker = _MARKER.fullmatch(name)
            if marker and parent == purge_under and parent / marker["name"] not in wanted:
                dest = parent / marker["name"]
                undeclared.append(Tree("", dest, read_marker(parent / name)))
    return Plan(states, tuple(undeclared), tuple(leftovers))


def _state(tree: Tree) -> TreeState:
    before = read_marker(tree.marker) if _is_real_directory(tree.dest) else None
    if tree.sha256 is None:
        return TreeState(
            tree, before, True, False, "the archive does not exist yet, so its digest is not known"
        )
    if before is None:
        present = os.path.lexists(tree.dest)
        reason = "present, but not as a completely unpacked archive" if present else "absent"
        return TreeState(tree, None, True, False, reason)
    if before != tree.sha256:
        return TreeState(tree, before, True, False, "holds another archive")
    if stat.S_IMODE(os.stat(tree.dest).st_mode) != tree.mode:
        return TreeState(tree, before, False, True, "the directory has another mode")
    return TreeState(tree, before, False, False, "up to date")


def read_marker(path: Path) -> str | None:
    """The digest in a marker, or None when there is no valid marker."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("format") != MARKER_FORMAT:
        return None
    digest = data.get("sha256")
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _listdir(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise TreeError(f"{path} must be a directory; remove what is there.") from None


# --- Making it so ---------------------------------------------------------------------------------


def apply(trees: Sequence[Tree], purge_under: Path | None, staged: dict[str, str]) -> Plan:
    """Bring the host to the wanted state and return the plan that was carried out.

    ``staged`` maps archive digests to files on this host.  Two runs at the same time wait for each
    other.
    """
    os.umask(0o022)
    with _readable_errors(), contextlib.ExitStack() as locks:
        for parent in sorted(
            {tree.dest.parent for tree in trees} | ({purge_under} if purge_under else set())
        ):
            parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            locks.enter_context(_locked(parent))
        plan = make_plan(trees, purge_under)
        for path in plan.leftovers:
            _remove(path)
        for state in plan.states:
            if state.unpack:
                if state.tree.sha256 is None:
                    raise TreeError(
                        f"trees: sha256 of {state.tree.dest} is missing; give the digest of its "
                        "archive."
                    )
                if state.tree.sha256 not in staged:
                    raise TreeError(
                        f"The archive of {state.tree.dest} was not transferred; run the task again."
                    )
                replace_tree(state.tree, Path(staged[state.tree.sha256]))
            elif state.chmod:
                os.chmod(state.tree.dest, state.tree.mode)
        for tree in plan.undeclared:
            _remove_tree(tree)
    return plan


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename or "the file system"
        if error.errno == errno.ENOSPC:
            raise TreeError(
                f"The disk is full at {name}; free some space and run again."
            ) from error
        raise TreeError(
            f"{name}: {error.strerror or error}; correct that and run again."
        ) from error


def replace_tree(tree: Tree, archive: Path) -> None:
    """Verify ``archive`` and put its content at ``tree.dest``.

    The old tree stays in place and whole until the new one is complete beside it; then two renames
    exchange them. A failure removes the half-unpacked tree again.
    """
    digest = file_digest(archive)
    if digest != tree.sha256:
        raise TreeError(
            f"The archive {tree.src} for {tree.dest} has the SHA-256 digest {digest}, but "
            f"{tree.sha256} is expected; "
            "delete the file so that it is made or downloaded again, or correct the expected "
            "digest."
        )
    partial = tree.beside("partial")
    try:
        partial.mkdir(mode=0o700)
        unpack(archive, partial, tree.src)
        _strip_privilege_bits(partial)
        os.chmod(partial, tree.mode)
        # From here until the new marker exists the tree counts as absent.
        tree.marker.unlink(missing_ok=True)
        old: Path | None = None
        if os.path.lexists(tree.dest):
            old = tree.beside("old")
            os.rename(tree.dest, old)
        os.rename(partial, tree.dest)
    except BaseException:
        _remove(partial)
        raise
    _write_marker(tree)
    if old is not None:
        _remove(old)


def _write_marker(tree: Tree) -> None:
    temporary = tree.beside("marker")
    try:
        temporary.write_text(
            json.dumps({"format": MARKER_FORMAT, "sha256": tree.sha256}) + "\n", encoding="utf-8"
        )
        os.chmod(temporary, 0o644)
        os.rename(temporary, tree.marker)
    except BaseException:
        _remove(temporary)
        raise


def _remove_tree(tree: Tree) -> None:
    # Renamed first: an interruption then leaves a leftover that the next run recognises, never half
    # a tree.
    if os.path.lexists(tree.dest):
        old = tree.beside("old")
        os.rename(tree.dest, old)
        tree.marker.unlink(missing_ok=True)
        _remove(old)
    else:
        tree.marker.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if _is_real_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file in lower-case hex."""
    result = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def _strip_privilege_bits(root: Path) -> None:
    """Clear set-user-id, set-group-id bits in a tree.

    Jobs run without any right to gain privileges, so a set-user-id program can never be of use to
    one; without the bits it can also never be of use to somebody who reaches the tree from the
    host.
    """
    for directory, subdirectories, files in os.walk(root):
        for name in (*subdirectories, *files):
            path = os.path.join(directory, name)
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                os.chmod(path, stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))


# --- Unpacking ------------------------------------------------------------------------------------


def unpack(archive: Path, into: Path, shown_name: str) -> None:
    """Unpack ``archive`` into the existing empty directory ``into``; ``shown_name`` appears in "
    "errors."""
    if archive_kind(shown_name) == "zip":
        _unpack_zip(archive, into, shown_name)
    else:
        _unpack_tar(archive, into, shown_name)


def _checked_member(name: str, shown_name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\n" in name or "\0" in name:
        raise TreeError(
            f"The archive {shown_name} contains the name {name!r}, which points outside the tree; "
            "it is refused: "
            "make the archive with relative names only."
        )
    return path


def _unpack_tar(archive: Path, into: Path, shown_name: str) -> None:
    tar = _program("tar", "tar")
    compression = []
    if shown_name.lower().endswith(".tar.zst"):
        compression = [f"--use-compress-program={_program('zstd', 'zstd')}"]
    elif not shown_name.lower().endswith(".tar"):
        compression = [f"--use-compress-program={_program('gzip', 'gzip')}"]
    devices = _inspect_tar(archive, shown_name)
    command = [tar, "--extract", f"--file={archive}", f"--directory={into}", *compression]
    command += ["--numeric-owner", "--same-permissions", "--delay-directory-restore"]
    command += ["--same-owner" if os.geteuid() == 0 else "--no-same-owner"]
    if devices:
        command += ["--anchored", "--no-wildcards", "--exclude-from=-"]
    done = subprocess.run(
        command,
        input="".join(f"{name}\n" for name in devices).encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if done.returncode != 0:
        raise TreeError(_tar_failure(done.stderr.decode(errors="replace"), shown_name, into))


def _inspect_tar(archive: Path, shown_name: str) -> list[str]:
    """Refuse names that leave the tree; return the names of device nodes.

    Device nodes are left out: a jail gets its few devices from the engine, and many hosts may not
    create any.
    """
    devices: list[str] = []
    with _plain_tar(archive, shown_name) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    _checked_member(member.name, shown_name)
                    if member.islnk():
                        _checked_member(member.linkname, shown_name)
                    if member.isdev() and not member.isfifo():
                        devices.append(member.name)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise TreeError(
                f"The archive {shown_name} cannot be read ({error}); make it again."
            ) from error
    # The reader strips a leading './' that tar keeps and matches against.
    return [spelling for name in devices for spelling in (name, f"./{name}")]


@contextlib.contextmanager
def _plain_tar(archive: Path, shown_name: str) -> Iterator[IO[bytes]]:
    if shown_name.lower().endswith(".tar.zst"):
        command = [_program("zstd", "zstd"), "--decompress", "--stdout", "--quiet", str(archive)]
    elif shown_name.lower().endswith(".tar"):
        with archive.open("rb") as stream:
            yield stream
        return
    else:
        command = [_program("gzip", "gzip"), "--decompress", "--stdout", "--quiet", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.stdout.close()
            process.terminate()


def _tar_failure(output: str, shown_name: str, into: Path) -> str:
    if "No space left on device" in output:
        return f"The disk is full at {into.parent}; free some space for {shown_name} and run again."
    lines = [
        line for line in output.splitlines() if line.strip() and "Exiting with failure" not in line
    ]
    detail = lines[0] if lines else "tar gave no reason"
    return f"The archive {shown_name} could not be unpacked into {into.parent}: {detail}."


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/bin:/bin")
    if path is None:
        raise TreeError(
            f"The program '{name}' is missing on this host; install the package '{package}'."
        )
    return path


def _unpack_zip(archive: Path, into: Path, shown_name: str) -> None:
    try:
        with zipfile.ZipFile(archive) as members:
            entries = members.infolist()
            for entry in entries:
                _checked_zip_entry(entry, shown_name)
            _unpack_zip_entries(members, entries, into)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise TreeError(
            f"The archive {shown_name} cannot be read ({error}); make it again."
        ) from error


def _checked_zip_entry(entry: zipfile.ZipInfo, shown_name: str) -> None:
    _checked_member(entry.filename, shown_name)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise TreeError(
            f"The archive {shown_name} contains {entry.filename!r}, which is neither a file nor a "
            "directory; "
            "use a tar archive for such trees."
        )


def _unpack_zip_entries(
    members: zipfile.ZipFile, entries: Iterable[zipfile.ZipInfo], into: Path
) -> None:
    for entry in entries:
        path = into / PurePosixPath(entry.filename)
        mode = (entry.external_attr >> 16) & 0o777
        if entry.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            os.chmod(path, mode or 0o755)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with members.open(entry) as source, path.open("xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.chmod(path, mode or 0o644)
