"""Actions that only the controller takes part in: what they return, also in check mode, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.cellblock.fleet.plugins.action import engine_archive, package_upstreams
from ansible_collections.cellblock.fleet.plugins.plugin_utils import engine_archive as builder
from ansible_collections.cellblock.fleet.plugins.plugin_utils import package_upstreams as finder
from ansible_collections.cellblock.fleet.plugins.plugin_utils.engine_archive import (
    Archive,
    BuildError,
)
from ansible_collections.cellblock.fleet.plugins.plugin_utils.package_upstreams import (
    UpstreamError,
)


def run(plugin: Any, args: dict[str, Any], check: bool = False) -> dict[str, Any]:
    task = mock.Mock(args=args, check_mode=check, async_val=0)
    action = plugin.ActionModule(task, mock.Mock(), mock.Mock(), None, mock.Mock(), None)
    with mock.patch("ansible.plugins.action.ActionBase.run"):
        result: dict[str, Any] = action.run(task_vars={"inventory_hostname": "cache1"})
    return result


@pytest.mark.parametrize("check", [False, True])
def test_the_engine_is_built_and_no_host_changed(
    monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    def build(architecture: str, cache_dir: Path) -> Archive:
        return Archive(cache_dir / f"{architecture}.tar.gz", "00", built=True)

    monkeypatch.setattr(builder, "build", build)
    found = run(engine_archive, {"architecture": "aarch64", "cache_dir": "/srv/c"}, check)
    assert found == {
        "changed": False,
        "path": "/srv/c/aarch64.tar.gz",
        "sha256": "00",
        "built": True,
    }


def test_an_engine_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    build = mock.Mock(side_effect=BuildError("gcc is missing"))
    monkeypatch.setattr(builder, "build", build)
    with pytest.raises(AnsibleActionFail, match="cannot be built: gcc is missing"):
        run(engine_archive, {"architecture": "x86_64", "cache_dir": "/srv/c"})


def test_upstreams_of_ones_own_are_completed(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"
    )
    table = {"files": {"url": "https://a.example.com/x", "kind": "files"}}
    found = run(
        package_upstreams,
        {
            "upstreams": table,
            "ca_bundle": str(tmp_path / "ca.pem"),
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    assert found["changed"] is False
    assert found["upstreams"]["files"]["authority"] == "a.example.com"
    assert Path(found["ca_bundle"]).parent == tmp_path / "cache"


def test_unknown_upstreams_name_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    find = mock.Mock(side_effect=UpstreamError("no archive"))
    monkeypatch.setattr(finder, "find", find)
    with pytest.raises(AnsibleActionFail, match="cache1: it is not known .*: no archive"):
        run(package_upstreams, {"cache_dir": "/srv/c"})
