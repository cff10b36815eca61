"""Builds the artifact of the collection cellblock.fleet, and prints its path.

Equal sources give equal artifacts: ansible-galaxy packs what galaxy.yml says, and its entries are
then sorted and lose their times. A file that git does not know is refused instead of published.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANIFEST, FILES = "MANIFEST.json", "FILES.json"

Entries = dict[str, tuple[tarfile.TarInfo, bytes]]


class BuildError(Exception):
    """The artifact cannot be built; the message says what to change."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "collection")
    options = parser.parse_args()
    try:
        print(build(ROOT, options.output))
    except BuildError as problem:
        print(f"build_collection: {problem}", file=sys.stderr)
        return 1
    return 0


def build(root: Path, output: Path) -> Path:
    """The artifact of the collection in ``root``, written into the directory ``output``."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [*ansible_galaxy(), "collection", "build", str(root), "--output-path", directory],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or "WARNING" in done.stderr:
            raise BuildError(f"ansible-galaxy: {done.stderr.strip()}")
        (built,) = Path(directory).glob("*.tar.gz")
        entries = read(built)
        unknown = unknown_files(root, entries)
        if unknown:
            raise BuildError(
                f"{', '.join(unknown)}: git does not know it; add it, remove it, or name it in"
                " build_ignore of galaxy.yml"
            )
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f".{built.name}.partial"
        partial.write_bytes(pack(sort_manifest(entries)))
        return partial.replace(output / built.name)


def ansible_galaxy() -> list[str]:
    """The program that belongs to the Python that runs this."""
    return [sys.executable, "-m", "ansible", "galaxy"]


def read(artifact: Path) -> Entries:
    with tarfile.open(artifact) as archive:
        return {
            member.name: (
                member,
                b"" if (file := archive.extractfile(member)) is None else file.read(),
            )
            if member.isfile()
            else (member, b"")
            for member in archive
        }


def unknown_files(root: Path, entries: Entries) -> list[str]:
    """What would be published although git does not have it; empty outside of a repository."""
    if not (root / ".git").exists():
        return []
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    known = {MANIFEST, FILES, *listed.stdout.split("\0")}
    return sorted(
        name for name, (info, _) in entries.items() if not info.isdir() and name not in known
    )


def sort_manifest(entries: Entries) -> Entries:
    """The same entries, their lists in the order of names."""
    files: dict[str, Any] = json.loads(entries[FILES][1])
    files["files"].sort(key=lambda entry: entry["name"])
    files_text = as_json(files)
    manifest: dict[str, Any] = json.loads(entries[MANIFEST][1])
    manifest["file_manifest_file"]["chksum_sha256"] = hashlib.sha256(files_text).hexdigest()
    changed = {FILES: files_text, MANIFEST: as_json(manifest)}
    return {name: (info, changed.get(name, text)) for name, (info, text) in entries.items()}


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def pack(entries: Entries) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        # The manifests come first: that is where clients look for them.
        for name in sorted(entries, key=lambda name: (name not in (MANIFEST, FILES), name)):
            info, text = entries[name]
            info.mtime, info.size, info.pax_headers = 0, len(text), {}
            archive.addfile(info, io.BytesIO(text))
    return gzip.compress(plain.getvalue(), mtime=0)


if __name__ == "__main__":
    sys.exit(main())
