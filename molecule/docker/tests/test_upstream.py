"""The way from Docker's own archive, which no test reaches: with an archive, a key and packages made here.

The engine is the distribution's under the name ``docker-ce``. (After test_remove.py, on a host without one.)
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Role = Callable[..., Any]
ARCHIVE = "/srv/archive"


def run(*command: str | Path, **more: Any) -> str:
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, **more)
    return str(done.stdout)


class Key:
    """A key that signs archives, in a directory of its own."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        self._gpg = ("gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", "")
        self.home = home
        run(*self._gpg, "--quick-generate-key", "Stand-in", "rsa2048", "sign", "never")
        self.path = home / "key.asc"
        self.path.write_text(run(*self._gpg, "--armor", "--export"))
        lines = run(*self._gpg, "--with-colons", "--list-keys").splitlines()
        self.fingerprint = next(line for line in lines if line.startswith("fpr")).split(":")[9]

    def sign(self, text: str) -> str:
        return run(*self._gpg, "--clearsign", input=text)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Short: gpg's agent has its socket there.
    key = Key(tmp_path_factory.mktemp("k") / "g")
    yield key
    run("gpgconf", "--homedir", key.home, "--kill", "all")


def repack(where: Path) -> None:
    """The distribution's engine as docker-ce."""
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "docker.io"]
    run(*download, cwd=where)
    (package,) = where.glob("docker.io_*.deb")
    run("dpkg-deb", "--raw-extract", package, where / "engine")
    control = where / "engine/DEBIAN/control"
    kept = [
        "Package: docker-ce" if line.startswith("Package:") else line
        for line in control.read_text().splitlines()
        if not line.startswith(("Source:", "Breaks:", "Replaces:", "Conflicts:"))
    ]
    control.write_text("\n".join(kept) + "\n")
    run("dpkg-deb", "--build", "-Znone", where / "engine", where / "docker-ce.deb")
    package.unlink()


def stand_in(where: Path, name: str, depends: str) -> None:
    folder = where / name / "DEBIAN"
    folder.mkdir(parents=True)
    (folder / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n"
        f"{depends}Description: stand-in, made in a test\n"
    )
    run("dpkg-deb", "--build", where / name, where / f"{name}.deb")


@pytest.fixture(scope="module")
def archive(lab: Any, key: Key, tmp_path_factory: pytest.TempPathFactory) -> str:
    """On slave1, signed by ``key``."""
    where = tmp_path_factory.mktemp("archive")
    repack(where)
    stand_in(where, "docker-ce-cli", "")
    stand_in(where, "containerd.io", "Depends: containerd\n")
    architecture = run("dpkg", "--print-architecture").strip()
    entries, files = [], {}
    for package in sorted(where.glob("*.deb")):
        content = package.read_bytes()
        files[f"pool/{package.name}"] = content
        control = run("dpkg-deb", "--field", package).strip()
        digest = hashlib.sha256(content).hexdigest()
        entries.append(
            f"{control}\nFilename: pool/{package.name}\nSize: {len(content)}\nSHA256: {digest}\n"
        )
    index = "\n".join(entries).encode()
    name = f"stable/binary-{architecture}/Packages"
    files[f"dists/bookworm/{name}"] = index
    release = (
        f"Suite: bookworm\nCodename: bookworm\nComponents: stable\nArchitectures: {architecture}\n"
        f"Date: Tue, 01 Dec 2020 00:00:00 UTC\nSHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} {name}\n"
    )
    files["dists/bookworm/InRelease"] = key.sign(release).encode()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    unpack = lab.command("slave1", "sh", "-c", f"mkdir -p {ARCHIVE} && tar -C {ARCHIVE} -xf -")
    subprocess.run(unpack, input=made.getvalue(), check=True)
    return ARCHIVE


def arguments(key: Key, fingerprint: str, tmp_path: Path) -> list[str]:
    values = {
        "docker_source": "upstream",
        "docker_archive_url": f"file://{ARCHIVE}",
        "docker_archive_key_url": f"file://{key.path}",
        "docker_archive_key_fingerprint": fingerprint,
        "docker_cache_dir": str(tmp_path),
        # With a user that the engine makes.
        "docker_userns_remap": "default",
    }
    return [part for name, value in values.items() for part in ("-e", f"{name}={value}")]


def test_another_key_is_refused(
    lab: Any, role: Role, key: Key, archive: str, tmp_path: Path
) -> None:
    done = role("upstream", "slave1", *arguments(key, "0" * 40, tmp_path))
    assert done.returncode != 0
    told = " ".join(done.stdout.split())
    assert f"has the keys {key.fingerprint}, not {'0' * 40}" in told
    assert lab.run("slave1", "test -e /etc/cellblock/docker || command -v dockerd").returncode != 0


def test_the_engine_comes_from_there(
    lab: Any, role: Role, key: Key, archive: str, root_file_system: bytes, tmp_path: Path
) -> None:
    done = role("upstream", "slave1", *arguments(key, key.fingerprint, tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    shown = lab.output(
        "slave1", "dpkg-query -W -f '${Status}' docker-ce; apt-cache policy docker-ce"
    )
    assert shown.startswith("install ok installed")
    assert f"file:{ARCHIVE}" in shown
    command = lab.command("slave1", "docker", "import", "-", "tiny")
    subprocess.run(command, input=root_file_system, capture_output=True, check=True)
    assert lab.output("slave1", "docker run --rm tiny echo hello") == "hello"
    assert lab.output("slave1", "id -u dockremap").isdigit()
    again = role("upstream", "slave1", *arguments(key, key.fingerprint, tmp_path))
    assert "changed=0" in again.stdout, again.stdout


def test_it_is_removed(lab: Any, playbook: Callable[..., Any]) -> None:
    done = playbook("remove.yml", "--limit", "slave1", "-e", "remove_data=true")
    assert done.returncode == 0, done.stdout[-4000:]
    left = "ls /etc/apt/apt.conf.d/99cellblock* /etc/apt/sources.list.d/cellblock* /etc/cellblock"
    assert lab.run("slave1", f"{left} || command -v dockerd; id -u dockremap").stdout == ""
