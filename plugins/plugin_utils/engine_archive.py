# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The engine's archive for one architecture: the package, its command and jobinit.

The archive is deterministic, so equal sources give equal digests and slaves are not touched without
need. jobinit is compiled here, once per architecture, rather than on every slave.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The collection's own sources, wherever it is installed.
SOURCES = Path(__file__).resolve().parents[2] / "src"
# Rooms of the package that run elsewhere: on the controller, and in the program that guards rules.
OTHER_ROOMS = ("fleet", "guarded_rules")
CROSS_COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
CFLAGS = ("-std=gnu11", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Werror")
COMMAND = """\
#!/usr/bin/python3 -I
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cellblock.engine.cli import main

sys.exit(main())
"""


class BuildError(Exception):
    """The archive cannot be built; the message says what to change."""


@dataclass(frozen=True)
class Archive:
    """A .tar.gz of the engine on this machine; ``built`` is false when the cache had it already."""

    path: Path
    sha256: str
    built: bool


def build(architecture: str, cache_dir: Path, sources: Path = SOURCES) -> Archive:
    """The archive below ``cache_dir``, made unless these very sources have one there."""
    package = sources / "cellblock"
    jobinit = sorted((sources / "jobinit").glob("*.[ch]"))
    if not jobinit or not package.is_dir():
        raise BuildError(
            f"{sources} lacks the engine's sources; install the collection cellblock.fleet again"
        )
    modules = {
        str(path.relative_to(sources)): path.read_bytes()
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in OTHER_ROOMS
    }
    compiler = find_compiler(architecture)
    digest = hashlib.sha256()
    for path in (Path(__file__), *jobinit):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for name, content in modules.items():
        digest.update(name.encode() + hashlib.sha256(content).digest())
    archive = cache_dir / "engine" / f"engine-{architecture}-{digest.hexdigest()[:16]}.tar.gz"
    built = not archive.exists()
    if built:
        files = {
            **modules,
            "bin/cellblock": COMMAND.encode(),
            "bin/jobinit": compile_jobinit(compiler, sources / "jobinit"),
        }
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=archive.parent, delete=False) as partial:
            partial.write(pack(files))
        Path(partial.name).replace(archive)
    return Archive(archive, hashlib.sha256(archive.read_bytes()).hexdigest(), built)


def find_compiler(architecture: str) -> str:
    """The C compiler that makes programs for ``architecture`` on this machine."""
    if architecture not in CROSS_COMPILERS:
        raise BuildError(
            f"no engine is made for {architecture}; supported are {', '.join(CROSS_COMPILERS)}"
        )
    cross = CROSS_COMPILERS[architecture]
    name = "gcc" if platform.machine() == architecture else cross
    if shutil.which(name) is None:
        package = "gcc libc6-dev" if name == "gcc" else f"gcc-{cross.removesuffix('-gcc')}"
        raise BuildError(f"{name} is missing, needed to compile jobinit; apt-get install {package}")
    return name


def compile_jobinit(compiler: str, sources: Path) -> bytes:
    """The static program; ``sources`` has jobinit.c and what it includes."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "jobinit"
        done = subprocess.run(
            [compiler, *CFLAGS, "-o", str(output), str(sources / "jobinit.c")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed on {sources}: {done.stderr.strip()}")
        return output.read_bytes()


def pack(files: Mapping[str, bytes]) -> bytes:
    """A deterministic .tar.gz; what is in bin/ is executable."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        directories = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        for name in sorted(directories | set(files)):
            info = tarfile.TarInfo(name)
            if name in files:
                info.size = len(files[name])
                info.mode = 0o755 if name.startswith("bin/") else 0o644
                archive.addfile(info, io.BytesIO(files[name]))
            else:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
    return gzip.compress(plain.getvalue(), mtime=0)
