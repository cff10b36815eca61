"""PostgreSQL as role database leaves it: who gets in, how, and where secrets are not."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://database1"]

Variable = Callable[[str], Any]
PythonOn = Callable[..., Any]
LogIn = Callable[..., list[tuple[int, str, str]]]

# Says how the server answers a client that names a user and a database, before any password.
STARTUP = r"""
import socket, struct
def ask(user, database):
    with socket.create_connection((given["address"], given["port"]), timeout=5) as connection:
        fields = f"user\0{user}\0database\0{database}\0\0".encode()
        connection.sendall(struct.pack("!II", len(fields) + 8, 196608) + fields)
        stream = connection.makefile("rb")
        kind = stream.read(1)
        content = stream.read(struct.unpack("!I", stream.read(4))[0] - 4)
    if kind == b"R":
        code = struct.unpack("!I", content[:4])[0]
        return {"authentication": code, "mechanisms": content[4:].decode().split("\0")[:-2]}
    return {"error": content.decode(errors="replace")}
print(json.dumps([ask(*one) for one in given["asked"]]))
"""


LOGIN = r"""
import os, subprocess
def login(user, password, database):
    done = subprocess.run(
        ["psql", "--no-psqlrc", "--no-password", "--host=127.0.0.1", f"--port={given['port']}",
         f"--username={user}", f"--dbname={database}", "-Atc", "SELECT current_user"],
        env={**os.environ, "PGPASSWORD": password}, capture_output=True, text=True)
    return [done.returncode, done.stdout.strip(), done.stderr]
print(json.dumps([login(*one) for one in given["logins"]]))
"""


@pytest.fixture
def log_in(host: Any, python_on: PythonOn, variable: Variable) -> LogIn:
    """Tries user, password and database on localhost over TCP; psql's exit code, output, errors."""
    port = variable("database_port | default(5432)")
    return lambda *logins: python_on(host, LOGIN, port=port, logins=logins)


def query(host: Any, sql: str) -> list[str]:
    command = f"runuser -u postgres -- psql --no-psqlrc -Atc {shlex.quote(sql)}"
    lines: list[str] = host.check_output(command).splitlines()
    return lines


def test_only_the_right_password_opens(log_in: LogIn, variable: Variable) -> None:
    password = variable("database_password")
    wrong = ["", "cellblock", "postgres", "password", password[:-1], password + "x"]
    first, *others = log_in(*(("cellblock", one, "cellblock") for one in [password, *wrong]))
    assert (first[0], first[1]) == (0, "cellblock")
    for one, (code, _, errors) in zip(wrong, others, strict=True):
        assert code != 0, one
        assert "password" in errors


def test_nobody_else_and_nowhere_else(log_in: LogIn, variable: Variable) -> None:
    password = variable("database_password")
    admitted, *refused = log_in(
        ("cellblock", password, "cellblock"),
        ("postgres", password, "postgres"),
        ("cellblock", password, "postgres"),
    )
    assert admitted[0] == 0
    for code, _, errors in refused:
        assert code != 0
        assert "no pg_hba.conf entry" in errors


def test_scram_is_the_only_way(host: Any, python_on: PythonOn, variable: Variable) -> None:
    admitted, refused = python_on(
        host,
        STARTUP,
        address="127.0.0.1",
        port=variable("database_port | default(5432)"),
        asked=[["cellblock", "cellblock"], ["postgres", "cellblock"]],
    )
    # 10 is SASL; 0 would be trust, 3 a password in the clear, 5 MD5.
    assert admitted["authentication"] == 10
    assert set(admitted["mechanisms"]) <= {"SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"}
    assert "SCRAM-SHA-256" in admitted["mechanisms"]
    assert "no pg_hba.conf entry" in refused["error"]


def test_rules_in_force(host: Any, variable: Variable) -> None:
    methods = query(host, "SELECT type, auth_method FROM pg_hba_file_rules")
    assert set(methods) == {"local|peer", "host|scram-sha-256"}
    remote = query(
        host,
        "SELECT address || '/' || netmask FROM pg_hba_file_rules"
        " WHERE type = 'host' AND address NOT IN ('127.0.0.1', '::1')",
    )
    assert len(remote) == len(variable("database_client_networks | default([])"))
    assert query(host, "SHOW password_encryption") == ["scram-sha-256"]
    stored = query(
        host, "SELECT left(rolpassword, 14) FROM pg_authid WHERE rolpassword IS NOT NULL"
    )
    assert stored == ["SCRAM-SHA-256$"]


def test_the_owner_has_no_other_privilege(host: Any) -> None:
    rights = "rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls"
    assert query(host, f"SELECT {rights} FROM pg_roles WHERE rolname = 'cellblock'") == [
        "f|f|f|f|f"
    ]
    assert query(
        host,
        "SELECT pg_get_userbyid(datdba), pg_encoding_to_char(encoding)"
        " FROM pg_database WHERE datname = 'cellblock'",
    ) == ["cellblock|UTF8"]


def test_listens_where_declared(
    variable: Variable, listening: Callable[[int], set[str]], loopbacks: set[str]
) -> None:
    declared = variable("database_listen_addresses | default([])")
    port = variable("database_port | default(5432)")
    assert listening(port) == loopbacks | set(declared)


def test_the_password_is_nowhere(
    host: Any, variable: Variable, traces: Callable[..., list[str]], log_in: LogIn
) -> None:
    password = variable("database_password")
    # A failed login is logged by the server: the journal and the logs are not empty of it.
    assert log_in(("cellblock", "a-wrong-password", "cellblock"))[0][0] != 0
    assert traces(host, "database system is ready to accept connections")
    assert traces(host, password, below=("/etc", "/var/log", "/var/lib/postgresql", "/root")) == []


def test_files_are_not_for_others(host: Any) -> None:
    found = host.check_output("find /etc/postgresql -name '*cellblock*' -printf '%u %m %p\\n'")
    lines = [line.split() for line in found.splitlines()]
    assert len(lines) == 2
    assert all(line[:2] == ["root", "640"] for line in lines), lines
