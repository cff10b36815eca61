"""The apt sources of the controller, as a playbook asks for them."""

from __future__ import annotations

import pytest
from ansible_collections.cellblock.fleet.plugins.lookup import debian_sources
from ansible_collections.cellblock.fleet.plugins.lookup.debian_sources import LookupModule

TARGETS = (
    "Debian|bookworm|http://a.example.com/debian/\nDebian|bookworm-security|http://s.example.com/\n"
)


def test_the_archive_that_apt_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_sources, "apt_index_targets", lambda: TARGETS)
    assert LookupModule().run(["trixie"]) == [
        "deb http://a.example.com/debian/ trixie main",
        "deb http://a.example.com/debian/ trixie-updates main",
        "deb http://s.example.com/ trixie-security main",
    ]


def test_nothing_where_there_is_no_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_sources, "apt_index_targets", lambda: "Ubuntu|noble|http://u/\n")
    assert LookupModule().run(["bookworm"]) == []
