"""Builds the engine's archive for one architecture: the package, its command and jobinit.

Prints one JSON object: ``path`` and ``sha256`` of the archive, and ``built`` (false when an archive of
these very sources was there already). The archive is deterministic, so equal sources give equal
digests and slaves are not touched without need. jobinit is compiled here, once per architecture,
rather than on every slave.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "cellblock"
JOBINIT = ROOT / "src" / "jobinit"
# The controller's half, which no slave needs.
CONTROLLER_PACKAGE = "fleet"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architecture", choices=sorted(CROSS_COMPILERS), required=True)
    parser.add_argument("--cache", type=Path, required=True, help="directory for the archive")
    options = parser.parse_args()
    try:
        print(json.dumps(build(options.architecture, options.cache)))
    except BuildError as problem:
        print(f"build_engine: {problem}", file=sys.stderr)
        return 1
    return 0


def build(architecture: str, cache: Path) -> dict[str, str | bool]:
    """The archive in ``cache``, made unless it is there; the shape printed by :func:`main`."""
    sources = {
        str(path.relative_to(PACKAGE.parent)): path.read_bytes()
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != CONTROLLER_PACKAGE
    }
    compiler = find_compiler(architecture)
    digest = hashlib.sha256()
    jobinit = [path.read_bytes() for path in sorted(JOBINIT.glob("*.[ch]"))]
    for part in (Path(__file__).read_bytes(), *jobinit, *sources.values()):
        digest.update(hashlib.sha256(part).digest())
    archive = cache / "engine" / f"engine-{architecture}-{digest.hexdigest()[:16]}.tar.gz"
    built = not archive.exists()
    if built:
        archive.parent.mkdir(parents=True, exist_ok=True)
        files = {
            **sources,
            "bin/cellblock": COMMAND.encode(),
            "bin/jobinit": compile_jobinit(compiler),
        }
        with tempfile.NamedTemporaryFile(dir=archive.parent, delete=False) as partial:
            partial.write(pack(files))
        Path(partial.name).replace(archive)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"path": str(archive), "sha256": sha256, "built": built}


def find_compiler(architecture: str) -> str:
    """The C compiler that makes programs for ``architecture`` on this machine."""
    cross = CROSS_COMPILERS[architecture]
    name = "gcc" if platform.machine() == architecture else cross
    if shutil.which(name) is None:
        package = "gcc libc6-dev" if name == "gcc" else f"gcc-{cross.removesuffix('-gcc')}"
        raise BuildError(f"{name} is missing, needed to compile jobinit; apt-get install {package}")
    return name


def compile_jobinit(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "jobinit"
        done = subprocess.run(
            [compiler, *CFLAGS, "-o", str(output), str(JOBINIT / "jobinit.c")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed on {JOBINIT}: {done.stderr.strip()}")
        return output.read_bytes()


def pack(files: dict[str, bytes]) -> bytes:
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


if __name__ == "__main__":
    sys.exit(main())
