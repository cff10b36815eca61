"""What is transferred, and that temporary files are always removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.cellblock.fleet.plugins.action.archive_tree import ActionModule

DIGEST = "a" * 64


class Host:
    """Stands for the host: answers the module's two phases and records transfers."""

    def __init__(self, trees: list[dict[str, Any]], unpack: list[bool], check: bool = False):
        task = mock.Mock(args={"trees": trees}, check_mode=check, async_val=0)
        connection = mock.Mock()
        connection._shell.tmpdir = "/tmp/t"
        connection._shell.join_path = lambda *parts: "/".join(parts)
        self.action = ActionModule(task, connection, mock.Mock(), None, mock.Mock(), None)
        self.asked: list[dict[str, Any]] = []
        self.sent: list[tuple[str, str]] = []
        self.removed: list[str] = []
        self.unpack = unpack
        self.apply_answer: dict[str, Any] = {"changed": True}

    def run(self) -> dict[str, Any]:
        def execute(module_args: dict[str, Any], **_: Any) -> dict[str, Any]:
            self.asked.append(module_args)
            if module_args["phase"] == "apply":
                return dict(self.apply_answer)
            return {"changed": any(self.unpack), "trees": [{"unpack": u} for u in self.unpack]}

        with (
            mock.patch("ansible.plugins.action.ActionBase.run"),
            mock.patch.object(self.action, "_execute_module", execute),
            mock.patch.object(self.action, "_transfer_file", lambda a, b: self.sent.append((a, b))),
            mock.patch.object(self.action, "_remove_tmp_path", self.removed.append),
            mock.patch.object(self.action, "_fixup_perms2"),
        ):
            return self.action.run(task_vars={})


@pytest.fixture
def archive(tmp_path: Path) -> str:
    (tmp_path / "x.tar").touch()
    return str(tmp_path / "x.tar")


def wanted(src: str, dest: str = "/srv/a", digest: str = DIGEST) -> dict[str, str]:
    return {"src": src, "sha256": digest, "dest": dest}


def test_nothing_is_transferred_when_nothing_differs(archive: str) -> None:
    host = Host([wanted(archive)], [False])
    assert host.run()["transferred"] == []
    assert [a["phase"] for a in host.asked] == ["plan"]
    assert host.sent == []


def test_one_transfer_for_two_trees_of_one_archive(archive: str) -> None:
    host = Host([wanted(archive), wanted(archive, "/srv/b")], [True, True])
    assert host.run()["transferred"] == [archive]
    assert host.sent == [(archive, f"/tmp/t/{DIGEST}-x.tar")]
    assert host.asked[1]["staged"] == {DIGEST: f"/tmp/t/{DIGEST}-x.tar"}


def test_only_trees_that_differ_are_transferred(archive: str, tmp_path: Path) -> None:
    other = tmp_path / "y.tar"
    other.touch()
    host = Host([wanted(archive), wanted(str(other), "/srv/b", "b" * 64)], [False, True])
    assert host.run()["transferred"] == [str(other)]


def test_check_mode_transfers_nothing_even_without_archive() -> None:
    host = Host([wanted("/nonexistent/x.tar")], [True], check=True)
    assert host.run()["changed"]
    assert host.sent == []
    assert len(host.asked) == 1


def test_missing_archive_is_named_and_temporary_files_removed() -> None:
    host = Host([wanted("/nonexistent/x.tar")], [True])
    with pytest.raises(AnsibleActionFail, match=r"/nonexistent/x\.tar does not exist"):
        host.run()
    assert host.removed == ["/tmp/t"]


def test_temporary_files_are_removed_when_unpacking_fails(archive: str) -> None:
    host = Host([wanted(archive)], [True])
    host.apply_answer = {"failed": True, "msg": "bad digest"}
    assert host.run()["failed"]
    assert host.removed == ["/tmp/t"]


@pytest.mark.parametrize("internal", ["phase", "staged"])
def test_internal_options_are_refused(internal: str, archive: str) -> None:
    host = Host([wanted(archive)], [True])
    host.action._task.args[internal] = "apply"
    with pytest.raises(AnsibleActionFail, match=internal):
        host.run()
