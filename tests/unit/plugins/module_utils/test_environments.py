"""Definitions, mirrors, failures; the build itself with a stand-in for mmdebstrap."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils import _environments as env

BASE = {"base": {"packages": ["bash"], "description": "shell"}}


def archive(**definition: object) -> env.Archive:
    raw = {"base": {**BASE["base"], **definition}}
    return env.plan_archives(raw, "bookworm", ["x86_64"])[0]


def test_every_environment_for_every_architecture_once() -> None:
    raw = {**BASE, "c": {"packages": ["gcc"], "description": "C"}}
    planned = env.plan_archives(raw, "bookworm", ["x86_64", "aarch64", "x86_64"])
    assert [a.label for a in planned] == [
        "base-bookworm-x86_64",
        "c-bookworm-x86_64",
        "base-bookworm-aarch64",
        "c-bookworm-aarch64",
    ]


def test_digest_depends_on_content_only() -> None:
    same = archive(packages=["bb", "aa"]).digest
    assert archive(packages=["aa", "bb"], description="other", path="/bin").digest == same
    assert archive(packages=["aa"]).digest != same
    assert env.plan_archives(BASE, "trixie", ["x86_64"])[0].digest != archive().digest


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "at least one entry"),
        ([], "at least one entry"),
        ({"Bad": {}}, "environment name 'Bad'"),
        ({"../x": {}}, "environment name"),
        ({"x": []}, "Environment 'x' must be a dictionary"),
        ({"x": {"pakages": []}}, "unknown field 'pakages'"),
        ({"x": {"packages": "gcc", "description": "d"}}, "must be a list"),
        ({"x": {"packages": ["a b"], "description": "d"}}, "'a b' is not the name"),
        ({"x": {"packages": ["--opt"], "description": "d"}}, "is not the name"),
        ({"x": {"packages": []}}, "needs a 'description'"),
        ({"x": {"packages": [], "description": "d", "path": "bin"}}, "must be absolute"),
    ],
)
def test_bad_definitions_are_named(raw: object, message: str) -> None:
    with pytest.raises(env.DefinitionError, match=message):
        env.parse_definitions(raw)


def test_bad_suite_and_architecture_are_named() -> None:
    with pytest.raises(env.DefinitionError, match="suite: 'Book worm'"):
        env.plan_archives(BASE, "Book worm", ["x86_64"])
    with pytest.raises(env.DefinitionError, match="'riscv64' is not supported"):
        env.plan_archives(BASE, "bookworm", ["riscv64"])


TARGETS = """\
Docker|bookworm|http://docker.test/
Debian|trixie|http://mirror.test/debian/
Debian|trixie-updates|http://mirror.test/debian/
Debian|trixie-security|http://mirror.test/security/
"""


def test_mirror_comes_from_the_machines_own_apt() -> None:
    assert env.sources("bookworm", None, None, TARGETS) == [
        "deb http://mirror.test/debian/ bookworm main",
        "deb http://mirror.test/debian/ bookworm-updates main",
        "deb http://mirror.test/security/ bookworm-security main",
    ]
    assert env.sources("bookworm", None, None, "Ubuntu|noble|http://u.test/\n") == []


def test_given_mirror_wins() -> None:
    assert env.sources("bookworm", "http://m.test/", None, TARGETS) == [
        "deb http://m.test/ bookworm main"
    ]
    both = env.sources("bookworm", "http://m.test/", "http://s.test/", TARGETS)
    assert both[1] == "deb http://s.test/ bookworm-security main"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("E: Unable to locate package nopkg\n", "no package 'nopkg' for x86_64"),
        ("E: Package 'old' has no installation candidate", "no package 'old'"),
        ("E: amd64 can neither be executed natively nor via qemu", "'qemu-user-static'"),
        ("dpkg: error: No space left on device", "disk is full"),
        ("GPG error: NO_PUBKEY 0E98404D386FA1D9", "debian-archive-keyring"),
        ("E: The repository 'x y Release' does not have a Release file.", "has no release"),
        ("E: Failed to fetch http://x  Could not connect", "could not be downloaded"),
        ("I: fine\nE: something else\n", r"mmdebstrap failed \(something else\); read its log"),
        ("", r"mmdebstrap failed \(no message\); read its log"),
    ],
)
def test_failures_are_explained_in_one_sentence(output: str, message: str) -> None:
    text = env.explain_failure(archive(), output, Path("/cache/environments/base.log"))
    assert text.startswith("Environment 'base': ")
    assert text.endswith(".")
    with pytest.raises(env.BuildError, match=message):
        raise env.BuildError(text)


SUB_PROCESS = """\
E: Sub-process env returned an error code (1)
E: setup failed: E: apt-get --yes install -oAPT::Status-Fd=<$fd> failed
I: main() received signal PIPE: waiting for setup...
E: mmdebstrap failed to run
"""
CONFIGURING = f"""\
Setting up libcups2:amd64 (2.4.2-3+deb12u9) ...
Setting up java:amd64 (17.0.21.1+2-1~deb12u1) ...
update-alternatives: using /usr/lib/jvm/bin/java to provide /usr/bin/java (java) in auto mode
update-alternatives: error: error creating symbolic link '/usr/share/x.dpkg-tmp': No such file or directory
dpkg: error processing package java:amd64 (--configure):
 installed java:amd64 package post-installation script subprocess returned error exit status 2
Processing triggers for libc-bin (2.36-9+deb12u14) ...
done.
Errors were encountered while processing:
 java:amd64
{SUB_PROCESS}"""
UNPACKING = f"""\
Preparing to unpack .../7-odd_1_amd64.deb ...
Unpacking odd (1) ...
dpkg: error processing archive /tmp/x/7-odd_1_amd64.deb (--unpack):
 trying to overwrite '/usr/bin/odd', which is also in package even 1
Errors were encountered while processing:
 /tmp/x/7-odd_1_amd64.deb
{SUB_PROCESS}"""
UNMET = """\
The following packages have unmet dependencies:
 odd : Depends: even (= 2) but it is not going to be installed
E: Unable to correct problems, you have held broken packages.
E: setup failed: E: apt-get --yes install odd failed
E: mmdebstrap failed to run
"""


@pytest.mark.parametrize(
    ("output", "sentence", "lines"),
    [
        (
            CONFIGURING,
            "Debian's package 'java' could not be installed; leave it out of the environment's 'packages', "
            "or mend what it says at last (log: /log):",
            CONFIGURING.splitlines()[1:6],
        ),
        (UNPACKING, "package 'odd' could not be installed", UNPACKING.splitlines()[:4]),
        (UNMET, "its packages cannot be installed together", UNMET.splitlines()[:3]),
    ],
)
def test_of_a_package_that_fails_the_last_lines_are_shown(
    output: str, sentence: str, lines: list[str]
) -> None:
    first, *rest = env.explain_failure(archive(), output, Path("/log")).splitlines()
    assert sentence in first
    assert [line.strip() for line in rest] == [line.strip() for line in lines]
    assert "Sub-process" not in first


def test_of_much_output_the_end_is_shown() -> None:
    babble = "".join(f"line {number} {'x' * 1000}\n" for number in range(1000))
    output = CONFIGURING.replace("update-alternatives: using", f"{babble}update-alternatives:")
    _, *rest = env.explain_failure(archive(), output, Path("/log")).splitlines()
    assert len(rest) <= 12
    assert max(map(len, rest)) < 310
    assert any("error creating symbolic link" in line for line in rest)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which mmdebstrap only takes its arguments apart; it fails when told to."""
    directory = tmp_path / "programs"
    directory.mkdir()
    script = """#!/bin/sh
echo run >> "$(dirname "$0")/runs"
for a; do
  case $a in
    *.tar.zst) target=$a ;;
    *--showformat*) manifest=${a##*> } ;;
  esac
done
echo half > "$target"
if [ -e "$(dirname "$0")/fail" ]; then echo 'E: Unable to locate package nopkg'; exit 1; fi
echo "$SOURCE_DATE_EPOCH" > "$target"
printf 'bash\\t5.2\\tamd64\\n' > "$manifest"
"""
    for name in ("mmdebstrap", "zstd", "dpkg-query"):
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return directory


def test_builds_once_and_remembers(programs: Path, tmp_path: Path) -> None:
    cache = env.Cache(tmp_path / "cache", lambda suite: [])
    assert cache.find(archive()) is None
    first = cache.build(archive(), rebuild=False)
    assert first.built
    assert first.packages == {"bash": "5.2"}
    assert first.size_bytes == first.path.stat().st_size
    second = cache.find(archive())
    assert second is not None
    assert (second.sha256, second.built) == (first.sha256, False)
    assert not cache.build(archive(), rebuild=False).built
    assert cache.build(archive(), rebuild=True).built
    assert (programs / "runs").read_text().count("run") == 2


def test_what_a_root_file_system_is_left_with(tmp_path: Path) -> None:
    for name in ("etc/apt", "run", "tmp/x", "var"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).write_text("root:x:0:\n")
    subprocess.run(["sh", "-c", env._FINISH, "sh", tmp_path], check=True)
    assert sorted(os.listdir(tmp_path / "etc")) == ["group", "hosts", "passwd"]
    # Host names of jobs, as with a network: their own one, too.
    known = [line.split() for line in (tmp_path / "etc/hosts").read_text().splitlines()]
    assert known == [[address, "localhost", "cellblock"] for address in ("127.0.0.1", "::1")]
    assert not list((tmp_path / "tmp").iterdir())


def test_failed_build_leaves_only_its_log(programs: Path, tmp_path: Path) -> None:
    (programs / "fail").touch()
    cache = env.Cache(tmp_path / "cache", lambda suite: [])
    with pytest.raises(env.BuildError, match="no package 'nopkg'"):
        cache.build(archive(), rebuild=False)
    assert sorted(os.listdir(tmp_path / "cache/environments")) == [
        ".lock",
        "base-bookworm-x86_64.log",
    ]


def test_leftovers_and_truncated_archives_do_not_count(programs: Path, tmp_path: Path) -> None:
    cache = env.Cache(tmp_path / "cache", lambda suite: [])
    record = cache.build(archive(), rebuild=False)
    leftover = record.path.parent / ".partial-0-x.tar.zst"
    leftover.touch()
    record.path.write_bytes(b"")
    assert cache.find(archive()) is None
    assert cache.build(archive(), rebuild=False).built
    assert not leftover.exists()


def test_missing_program_and_ordinary_user_are_explained(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = env.Cache(tmp_path / "cache", lambda suite: [])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(env.BuildError, match="ordinary user"):
        cache.build(archive(), rebuild=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(env.BuildError, match="no 'mmdebstrap'; install the package"):
        cache.build(archive(), rebuild=False)


def test_prebuilt_archives(tmp_path: Path) -> None:
    with pytest.raises(env.BuildError, match=r"base-bookworm-x86_64\.tar\.zst does not exist"):
        env.prebuilt(archive(), tmp_path)
    (tmp_path / "base-bookworm-x86_64.tar.zst").write_bytes(b"abc")
    record = env.prebuilt(archive(), tmp_path)
    assert record.sha256 is not None
    assert record.sha256.startswith("ba7816bf")
    assert not record.built


def test_what_a_host_gets() -> None:
    built = [
        {"name": "base", "architecture": "x86_64", "path": "/c/b.tar.zst", "sha256": "ab"},
        {"name": "base", "architecture": "aarch64", "path": "/c/x.tar.zst", "sha256": None},
    ]
    assert env.trees_for_host(built, "x86_64", "/e") == [
        {"src": "/c/b.tar.zst", "sha256": "ab", "dest": "/e/base", "mode": "0755"}
    ]
    registry = env.registry_for_host(BASE, built, "x86_64", "/e")
    assert json.loads(json.dumps(registry)) == {
        "base": {
            "path": "/e/base",
            "digest": "sha256:ab",
            "description": "shell",
            "default_path": "/usr/local/bin:/usr/bin:/bin",
            "mounts": [],
        }
    }
    with pytest.raises(env.DefinitionError, match="'base' was not built for riscv64"):
        env.registry_for_host(BASE, built, "riscv64", "/e")


def test_a_host_keeps_what_could_not_be_built_again() -> None:
    definitions = {
        **BASE,
        "old": {"packages": ["xx"], "description": "d"},
        "new": {"packages": ["yy"], "description": "d"},
    }
    built = [{"name": "base", "architecture": "x86_64", "path": "/c/b.tar.zst", "sha256": "ab"}]
    failures = [
        {"name": name, "architecture": "x86_64", "message": "no"} for name in ("old", "new")
    ]
    installed = {"base": {"digest": "sha256:00"}, "old": {"digest": "sha256:11"}, "gone": {}}
    registry = env.registry_for_host(definitions, built, "x86_64", "/e", failures, installed)
    assert list(registry) == ["base", "old"]
    assert registry["base"]["digest"] == "sha256:ab"
    assert registry["old"] == installed["old"]
    with pytest.raises(env.DefinitionError, match="'old' was not built for x86_64"):
        env.registry_for_host(definitions, built, "x86_64", "/e", failures[1:], installed)
    elsewhere = [{**failure, "architecture": "aarch64"} for failure in failures]
    with pytest.raises(env.DefinitionError, match="'old' was not built for x86_64"):
        env.registry_for_host(definitions, built, "x86_64", "/e", elsewhere, installed)


# As those of openjdk and postgresql do: links to manual pages that lie elsewhere, and a file from the examples.
POSTINST = """#!/bin/sh
set -e
update-alternatives --quiet --install /usr/bin/odd odd /usr/lib/odd/odd 1 \\
  --slave /usr/share/man/man1/odd.1.gz odd.1.gz /usr/lib/odd/odd.1.gz \\
  --slave /usr/share/man/da/man1/odd.1.gz odd.da.1.gz /usr/lib/odd/odd.1.gz
cp "$DPKG_ROOT"/usr/share/doc/odd/examples/odd.conf "$DPKG_ROOT"/etc/odd.conf
"""


def test_packages_find_what_they_brought_and_jobs_do_not(tmp_path: Path) -> None:
    """A real dpkg installs a package with the recipe's options, then the recipe's end runs."""
    package, root = tmp_path / "package", tmp_path / "root"
    files = {
        "DEBIAN/control": "Package: odd\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.test>\nDescription: odd\n",
        "DEBIAN/postinst": POSTINST,
        "usr/lib/odd/odd": "#!/bin/sh\n",
        "usr/lib/odd/odd.1.gz": "",
        "usr/share/doc/odd/examples/odd.conf": "odd\n",
        "usr/share/man/man1/odd-page.1.gz": "page\n",
        "usr/share/man/da/man1/odd-page.1.gz": "page\n",
        "usr/share/info/odd.info": "info\n",
        "usr/share/lintian/overrides/odd": "odd\n",
        "usr/share/locale/da/LC_MESSAGES/odd.mo": "odd\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "DEBIAN/postinst").chmod(0o755)
    for directory in ("etc", "run", "tmp", "usr/bin", "var/log", "var/lib/dpkg/updates"):
        (root / directory).mkdir(parents=True)
    for name in ("etc/passwd", "etc/group", "var/lib/dpkg/status", "var/lib/dpkg/available"):
        (root / name).touch()
    prefix = "--dpkgopt="
    options = [f"--{o.removeprefix(prefix)}" for o in env._OPTIONS if o.startswith(prefix)]

    def call(*command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    call("dpkg-deb", "--root-owner-group", "--build", package, tmp_path / "odd.deb")
    call(
        *("dpkg", f"--root={root}", *options, f"--log={tmp_path / 'log'}"),
        *("--force-not-root", "--force-script-chrootless", "--install", tmp_path / "odd.deb"),
    )
    call("sh", "-c", env._FINISH, "finish", root)
    assert os.readlink(root / "usr/bin/odd") == "/etc/alternatives/odd"
    assert (root / "etc/odd.conf").read_text() == "odd\n"
    assert not [path for path in root.glob("usr/share/*/**/*") if not path.is_dir()]
