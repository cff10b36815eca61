"""What ends up on disk, including after interruptions and with hostile archives."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils import _archive_tree as at


def tar_of(path: Path, members: dict[str, tarfile.TarInfo | bytes]) -> Path:
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(content))
    return path


def special(kind: bytes, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def tree(archive: Path, dest: Path, **values: object) -> dict[str, object]:
    return {"src": str(archive), "sha256": at.file_digest(archive), "dest": str(dest), **values}


def run(raw: list[dict[str, object]], purge_under: Path | None = None) -> at.Plan:
    trees = at.parse_trees(raw)
    return at.apply(trees, purge_under, {str(r["sha256"]): str(r["src"]) for r in raw})


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    return tar_of(tmp_path / "hello.tar.gz", {"bin/hello": b"one", "etc/x": b"x"})


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "trees" / "all"


def test_unpacks_then_finds_nothing_to_do(hello: Path, parent: Path) -> None:
    first = run([tree(hello, parent / "a")])
    assert first.changed
    assert (parent / "a/bin/hello").read_bytes() == b"one"
    assert stat.S_IMODE((parent / "a").stat().st_mode) == 0o755
    assert sorted(os.listdir(parent)) == [".a.archive-tree.json", "a"]
    assert not run([tree(hello, parent / "a")]).changed


def test_replaces_the_whole_content(hello: Path, parent: Path, tmp_path: Path) -> None:
    run([tree(hello, parent / "a")])
    other = tar_of(tmp_path / "other.tar", {"y": b"two"})
    plan = run([tree(other, parent / "a")])
    assert [s.before for s in plan.states] == [at.file_digest(hello)]
    assert os.listdir(parent / "a") == ["y"]
    assert sorted(os.listdir(parent)) == [".a.archive-tree.json", "a"]


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_interrupted_replacement_is_repaired(
    fail_at: int, hello: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renames are: old tree aside, new tree in, marker in."""
    run([tree(hello, parent / "a")])
    other = tar_of(tmp_path / "other.tar", {"y": b"two"})
    calls = 0
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        run([tree(other, parent / "a")])
    monkeypatch.setattr(os, "rename", real)
    assert at.make_plan(at.parse_trees([tree(other, parent / "a")]), None).states[0].before is None
    run([tree(other, parent / "a")])
    assert os.listdir(parent / "a") == ["y"]
    assert sorted(os.listdir(parent)) == [".a.archive-tree.json", "a"]


def test_leftovers_of_a_killed_run_are_removed(hello: Path, parent: Path) -> None:
    wanted = at.parse_trees([tree(hello, parent / "a")])[0]
    for kind in ("partial", "old"):
        wanted.beside(kind).mkdir(parents=True)
    strange = parent / ".b.archive-tree.partial-0123456789abcdef"
    strange.mkdir()
    plan = run([tree(hello, parent / "a")])
    assert len(plan.leftovers) == 2
    assert strange.exists(), "another owner's leftover was removed"
    run([tree(hello, parent / "a")], purge_under=parent)
    assert not strange.exists()


def test_directory_without_marker_is_replaced(hello: Path, parent: Path) -> None:
    (parent / "a").mkdir(parents=True)
    (parent / "a/half").touch()
    run([tree(hello, parent / "a")])
    assert not (parent / "a/half").exists()


def test_wrong_digest_leaves_the_old_tree(hello: Path, parent: Path, tmp_path: Path) -> None:
    run([tree(hello, parent / "a")])
    raw = {**tree(hello, parent / "a"), "sha256": "0" * 64}
    with pytest.raises(at.TreeError, match="0000 is expected"):
        run([raw])
    assert (parent / "a/bin/hello").exists()
    assert not run([tree(hello, parent / "a")]).changed


def test_corrupt_archive_leaves_nothing(parent: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(b"\x1f\x8b\x08 this is no archive")
    with pytest.raises(at.TreeError, match=r"bad\.tar\.gz"):
        run([tree(bad, parent / "a")])
    assert os.listdir(parent) == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_tar_names_outside_are_refused(name: str, parent: Path, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "t.tar", {"ok": b"", name: b"evil"})
    with pytest.raises(at.TreeError, match="points outside the tree"):
        run([tree(archive, parent / "a")])
    assert os.listdir(parent) == []


def test_tar_cannot_write_through_its_own_link(parent: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = special(tarfile.SYMTYPE, linkname=str(outside))
    archive = tar_of(tmp_path / "t.tar", {"link": link, "link/evil": b"evil"})
    # Whether tar replaces the link or fails is its own affair.
    try:
        run([tree(archive, parent / "a")])
    except at.TreeError as error:
        assert "t.tar" in str(error)
    assert os.listdir(outside) == []


def test_devices_are_left_out_and_privilege_bits_cleared(parent: Path, tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "t.tar",
        {
            "./dev/null": special(tarfile.CHRTYPE, devmajor=1, devminor=3),
            "./su": special(tarfile.REGTYPE, mode=0o6755),
            "./dir": special(tarfile.DIRTYPE, mode=0o3777),
            "./keep": b"",
        },
    )
    run([tree(archive, parent / "a")])
    assert sorted(os.listdir(parent / "a")) == ["dir", "keep", "su"]
    assert stat.S_IMODE((parent / "a/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((parent / "a/dir").stat().st_mode) == 0o1777


def test_zip_keeps_modes(parent: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = zipfile.ZipInfo("pkg/bin/tool")
        info.external_attr = (stat.S_IFREG | 0o755) << 16
        archive.writestr(info, b"tool")
        archive.writestr("pkg/data", b"data")
    run([tree(wheel, parent / "a")])
    assert stat.S_IMODE((parent / "a/pkg/bin/tool").stat().st_mode) == 0o755
    assert (parent / "a/pkg/data").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("../evil", stat.S_IFREG, "points outside the tree"),
        ("link", stat.S_IFLNK, "neither a file nor a directory"),
    ],
)
def test_bad_zip_entries_are_refused(
    name: str, mode: int, message: str, parent: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (mode | 0o644) << 16
        archive.writestr(info, b"/etc")
    with pytest.raises(at.TreeError, match=message):
        run([tree(tmp_path / "x.zip", parent / "a")])
    assert os.listdir(parent) == []


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the program zstd")
def test_zstd(hello: Path, parent: Path, tmp_path: Path) -> None:
    plain = tar_of(tmp_path / "z.tar", {"f": b"z"})
    subprocess.run(["zstd", "-q", str(plain)], check=True)
    run([tree(tmp_path / "z.tar.zst", parent / "a")])
    assert (parent / "a/f").read_bytes() == b"z"


def test_missing_program_is_named(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "z.tar.zst"
    archive.write_bytes(b"")
    monkeypatch.setattr(shutil, "which", lambda name, path: None if name == "zstd" else name)
    with pytest.raises(at.TreeError, match="'zstd' is missing on this host; install the package"):
        run([tree(archive, parent / "a")])


def test_purge_removes_only_marked_children(hello: Path, parent: Path) -> None:
    run([tree(hello, parent / "a"), tree(hello, parent / "b")])
    (parent / "mine").mkdir()
    plan = run([tree(hello, parent / "a")], purge_under=parent)
    assert [str(t.dest) for t in plan.undeclared] == [str(parent / "b")]
    assert sorted(os.listdir(parent)) == [".a.archive-tree.json", "a", "mine"]


def test_mode_alone_is_corrected_without_unpacking(hello: Path, parent: Path) -> None:
    run([tree(hello, parent / "a")])
    plan = run([tree(hello, parent / "a", mode="0700")])
    assert plan.changed
    assert not plan.states[0].unpack
    assert stat.S_IMODE((parent / "a").stat().st_mode) == 0o700


def test_plan_changes_nothing_and_shows_digests(hello: Path, parent: Path) -> None:
    plan = at.make_plan(at.parse_trees([tree(hello, parent / "a")]), parent)
    assert not parent.exists()
    result = plan.as_result()
    assert result["changed"]
    assert result["diff"]["before"] == f"{parent}/a: absent\n"
    assert result["diff"]["after"] == f"{parent}/a: sha256:{at.file_digest(hello)}\n"


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"format": 99, "sha256": "0" * 64})])
def test_invalid_markers_count_as_absent(text: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(text)
    assert at.read_marker(tmp_path / "m") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dest": "relative/x"}, "must be an absolute path"),
        ({"dest": "/"}, "must be an absolute path"),
        ({"dest": "/srv/../etc"}, "must be an absolute path"),
        ({"sha256": "ABC"}, "64 lower-case"),
        ({"src": "/x.rar"}, "must end in one of"),
        ({"mode": "4755"}, "octal string"),
        ({"mode": "rwx"}, "octal string"),
    ],
)
def test_bad_options_are_named(change: dict[str, str], message: str) -> None:
    good = {"src": "/x.tar", "sha256": "0" * 64, "dest": "/srv/x"}
    with pytest.raises(at.TreeError, match=message):
        at.parse_trees([{**good, **change}])


def test_twice_and_nested_destinations_are_refused() -> None:
    one = {"src": "/x.tar", "sha256": "0" * 64, "dest": "/srv/x"}
    with pytest.raises(at.TreeError, match="given twice"):
        at.parse_trees([one, one])
    with pytest.raises(at.TreeError, match="cannot be nested"):
        at.parse_trees([one, {**one, "dest": "/srv/x/y"}])
