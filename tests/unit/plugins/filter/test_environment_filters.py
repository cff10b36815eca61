"""The filters' own part: errors name the filter."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import archive_trees, environment_registry

BUILT = [{"name": "base", "architecture": "x86_64", "path": "/c/b.tar.zst", "sha256": "ab"}]


def test_archive_trees() -> None:
    trees = archive_trees.FilterModule().filters()["archive_trees"]
    assert [t["dest"] for t in trees(BUILT, "x86_64", "/e")] == ["/e/base"]
    assert trees(BUILT, "aarch64", "/e") == []
    with pytest.raises(
        AnsibleFilterError, match=r"cellblock\.fleet\.archive_trees: archives and failures must"
    ):
        trees("text", "x86_64", "/e")


def test_environment_registry() -> None:
    registry = environment_registry.FilterModule().filters()["environment_registry"]
    definitions = {"base": {"description": "d", "path": "/bin"}}
    assert registry(definitions, BUILT, "x86_64", "/e")["base"]["default_path"] == "/bin"
    with pytest.raises(AnsibleFilterError, match=r"cellblock\.fleet\.environment_registry: "):
        registry(definitions, [], "x86_64", "/e")
