"""Unpack the Ansible collections that a requirements file names from an 'ansible' wheel.

Takes the few collections that the project uses (a few MB) out of the hundreds that the
package ships, after checking that their versions satisfy the required ranges.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet


class UnpackError(Exception):
    """The collections cannot be unpacked; the message says why, in one sentence."""


@dataclass(frozen=True)
class Requirement:
    """One collection (`namespace.name`) and the versions of it that will do."""

    name: str
    versions: SpecifierSet

    @property
    def folder(self) -> str:
        """The collection's path in the wheel, and below the destination."""
        return "ansible_collections/" + self.name.replace(".", "/")


def read_requirements(path: Path) -> list[Requirement]:
    """The collections that a Galaxy requirements file lists."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return [
            Requirement(entry["name"], SpecifierSet(entry["version"]))
            for entry in document["collections"]
        ]
    except (KeyError, TypeError, InvalidSpecifier) as error:
        raise UnpackError(
            f"{path}: needs a list 'collections' of entries with 'name' and a 'version' range"
            f" such as '>=1.0.0,<2.0.0' ({error})"
        ) from error


def check_version(wheel: zipfile.ZipFile, requirement: Requirement) -> str:
    """The version of the collection in the wheel; an error if it is out of range."""
    try:
        manifest = json.loads(wheel.read(f"{requirement.folder}/MANIFEST.json"))
    except KeyError as error:
        raise UnpackError(
            f"{wheel.filename} does not carry the collection {requirement.name}"
        ) from error
    version = str(manifest["collection_info"]["version"])
    if version not in requirement.versions:
        raise UnpackError(
            f"{wheel.filename} carries {requirement.name} {version}, but"
            f" '{requirement.versions}' is required"
        )
    return version


def unpack(wheel_path: Path, requirements: list[Requirement], destination: Path) -> list[str]:
    """Replace `destination` by the required collections; returns 'name version' of each.

    An interruption leaves the old destination, or none, but never a part of the new one.
    """
    unpacked = []
    staging = destination.with_name(destination.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with zipfile.ZipFile(wheel_path) as wheel:
        for requirement in requirements:
            version = check_version(wheel, requirement)
            prefix = requirement.folder + "/"
            wheel.extractall(
                staging, [name for name in wheel.namelist() if name.startswith(prefix)]
            )
            unpacked.append(f"{requirement.name} {version}")
    shutil.rmtree(destination, ignore_errors=True)
    staging.rename(destination)
    return unpacked


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requirements", type=Path, required=True, help="Galaxy requirements file")
    parser.add_argument("--destination", type=Path, required=True, help="folder to replace")
    parser.add_argument("wheel", type=Path, help="wheel of the 'ansible' package")
    options = parser.parse_args(arguments)
    try:
        requirements = read_requirements(options.requirements)
        unpacked = unpack(options.wheel, requirements, options.destination)
    except (UnpackError, OSError, zipfile.BadZipFile) as error:
        print(f"unpack_collections: error: {error}", file=sys.stderr)
        return 1
    print("unpacked " + ", ".join(unpacked))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
