# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0

"""postgresql_database: verifiers, what is done about what is found, and what psql gets to see."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args
from ansible_collections.cellblock.fleet.plugins.module_utils._postgresql import (
    Found,
    PostgresqlError,
    belongs,
    checked_password,
    removal,
    statements,
    verifier,
)
from ansible_collections.cellblock.fleet.plugins.modules import postgresql_database

PASSWORD = "correct-horse-battery"
GOOD = Found(
    role=True,
    verifier=verifier(PASSWORD, b"0123456789abcdef"),
    plain_role=True,
    database=True,
    owner="app",
    public_may_connect=False,
)


def test_verifier_of_rfc_7677() -> None:
    """The RFC's example: its proof and server signature come from these two keys."""
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    assert verifier("pencil", salt) == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ=="
        "$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )


def test_a_verifier_belongs_to_its_password_only() -> None:
    assert belongs(GOOD.verifier, PASSWORD)
    assert not belongs(GOOD.verifier, PASSWORD + "x")
    assert not belongs(None, PASSWORD)
    assert not belongs("", "")
    assert not belongs("md5c4ca4238a0b923820dcc509a6f75849b", "1")


def phrases(found: Found) -> list[str]:
    return [phrase for phrase, _ in statements(found, "app", "app", PASSWORD)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (GOOD, []),
        (
            Found(),
            [
                "role app is created",
                "role app gets its password",
                "database app is created",
                "database app is closed to other roles",
            ],
        ),
        (replace(GOOD, plain_role=False), ["role app may log in and no more"]),
        (replace(GOOD, verifier="md5c4ca4238a0b9238"), ["role app gets its password"]),
        (replace(GOOD, owner="postgres"), ["database app belongs to app"]),
        (replace(GOOD, public_may_connect=True), ["database app is closed to other roles"]),
    ],
)
def test_what_is_done(found: Found, expected: list[str]) -> None:
    assert phrases(found) == expected


def test_what_removal_does() -> None:
    assert [sql for _, sql in removal(GOOD, "app", "app")] == [
        "DROP DATABASE app WITH (FORCE);",
        "DROP ROLE app;",
    ]
    assert removal(Found(), "app", "app") == []


@pytest.mark.parametrize("password", ["", "with\nline", "café"])
def test_passwords_that_scram_would_change_are_refused(password: str) -> None:
    with pytest.raises(PostgresqlError, match="printable ASCII"):
        checked_password(password)


Call = Callable[..., tuple[dict[str, Any], list[tuple[list[str], str]]]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the module against a psql that finds what it is told to; gives also what was run."""

    def run(found: Found | None, **parameters: Any) -> Any:
        ran: list[tuple[list[str], str]] = []

        def run_command(self: Any, command: list[str], data: str, **_: Any) -> Any:
            ran.append((command, data))
            if found is None:
                return 1, "", "psql: could not connect"
            return 0, json.dumps(found.__dict__) + "\n", ""

        monkeypatch.setattr(AnsibleModule, "run_command", run_command)
        given = {"name": "app", "owner": "app", "password": PASSWORD, **parameters}
        with patch_module_args(given), pytest.raises(SystemExit):
            postgresql_database.main()
        return json.loads(capsys.readouterr().out), ran

    return run


def test_nothing_to_do(call: Call) -> None:
    result, ran = call(GOOD)
    assert not result["changed"]
    assert len(ran) == 1


def test_the_password_reaches_neither_command_nor_server(call: Call) -> None:
    result, ran = call(Found())
    assert result["changed"]
    assert len(ran) == 2
    assert "SCRAM-SHA-256$" in ran[1][1]
    assert PASSWORD not in str(ran)
    assert "SCRAM-SHA-256$" not in str([command for command, _ in ran])
    assert PASSWORD not in json.dumps({**result, "invocation": None})


def test_check_mode_changes_nothing(call: Call) -> None:
    result, ran = call(Found(), _ansible_check_mode=True)
    assert result["changed"]
    assert len(ran) == 1


def test_check_mode_without_a_server(call: Call) -> None:
    assert call(None, _ansible_check_mode=True)[0]["changed"]
    absent, _ = call(None, _ansible_check_mode=True, state="absent")
    assert not absent["changed"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, ["psql", "could not connect", "pg_lsclusters"]),
        ({"name": "a'; DROP"}, ["name is", "lower-case letters"]),
        ({"owner": "App"}, ["owner is 'App'", "lower-case letters"]),
    ],
)
def test_errors(call: Call, parameters: dict[str, Any], words: list[str]) -> None:
    result, _ = call(None, **parameters)
    assert result["failed"]
    for word in words:
        assert word in result["msg"]
