"""Valkey or Redis as role memory_database leaves it: who gets in, and what that user may do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://memory1"]

Variable = Callable[[str], Any]
PythonOn = Callable[..., Any]
Ask = Callable[..., list[str]]
Talk = Callable[..., list[list[str]]]

# Holds conversations, each over a connection of its own, and prints the answers.
CLIENT = r"""
import socket
def answer(stream):
    line = stream.readline().decode(errors="replace").rstrip()
    if line[:1] == "$" and line != "$-1":
        line = stream.read(int(line[1:]) + 2).decode(errors="replace").rstrip()
    elif line[:1] in "*%" and line[1:].isdigit():
        line = "[" + ", ".join(answer(stream) for _ in range(int(line[1:]))) + "]"
    return line
def talk(commands):
    with socket.create_connection(("127.0.0.1", given["port"]), timeout=5) as connection:
        stream = connection.makefile("rb")
        for command in commands:
            parts = "".join(f"${len(part)}\r\n{part}\r\n" for part in command)
            connection.sendall(f"*{len(command)}\r\n{parts}".encode())
            yield answer(stream)
print(json.dumps([list(talk(commands)) for commands in given["conversations"]]))
"""


@pytest.fixture
def talk(host: Any, python_on: PythonOn, variable: Variable) -> Talk:
    """Sends the commands of each conversation and gives the answers."""
    port = variable("memory_database_port | default(6379)")

    def run(*conversations: list[list[str]]) -> list[list[str]]:
        answers: list[list[str]] = python_on(host, CLIENT, port=port, conversations=conversations)
        return answers

    return run


@pytest.fixture
def ask(talk: Talk, variable: Variable) -> Ask:
    """Logs in and runs commands."""

    def run(*commands: list[str]) -> list[str]:
        login = ["AUTH", "cellblock", variable("memory_database_password")]
        [answers] = talk([login, *commands])
        assert answers[0] == "+OK"
        return answers[1:]

    return run


def test_only_the_right_password_opens(talk: Talk, ask: Ask, variable: Variable) -> None:
    password = variable("memory_database_password")
    assert ask(["PING"]) == ["+PONG"]
    logins = [["AUTH", "default", password], ["AUTH", password]]
    for wrong in ("", "cellblock", "redis", password[:-1], password + "x"):
        logins += [["AUTH", "cellblock", wrong], ["AUTH", "default", wrong], ["AUTH", wrong]]
    for login, answers in zip(logins, talk(*([one, ["PING"]] for one in logins)), strict=True):
        assert answers[0].startswith(("-WRONGPASS", "-ERR AUTH")), login
        assert answers[1].startswith("-NOAUTH"), login


def test_nothing_without_a_login(talk: Talk) -> None:
    [answers] = talk([["PING"], ["GET", "a"], ["INFO"], ["CONFIG", "GET", "dir"]])
    assert all(answer.startswith("-NOAUTH") for answer in answers), answers


def test_work_with_data_is_allowed(ask: Ask) -> None:
    answers = ask(
        ["SET", "test:a", "1"],
        ["INCR", "test:a"],
        ["GET", "test:a"],
        ["LPUSH", "test:l", "x"],
        ["BRPOP", "test:l", "1"],
        ["HSET", "test:h", "f", "v"],
        ["EXPIRE", "test:h", "60"],
        ["PUBLISH", "test:c", "m"],
        ["MULTI"],
        ["DEL", "test:a", "test:h"],
        ["EXEC"],
    )
    expected = "+OK :2 2 :1 [test:l,_x] :1 :1 :0 +OK +QUEUED [:2]".split()
    assert [answer.replace(" ", "_") for answer in answers] == expected


DANGEROUS = """
ACL LIST; ACL SETUSER cellblock +@all; BGSAVE; CLIENT KILL TYPE normal; CLIENT LIST;
CONFIG GET dir; CONFIG REWRITE; CONFIG SET dir /tmp; DEBUG SLEEP 0; EVAL return_1 0; FLUSHALL;
FLUSHDB; INFO; KEYS *; MIGRATE 192.0.2.1 6379 k 0 10; MODULE LIST; MODULE LOAD /tmp/x.so; MONITOR;
REPLICAOF 192.0.2.1 6379; SAVE; SCRIPT LOAD return_1; SHUTDOWN NOSAVE; SLAVEOF 192.0.2.1 6379; SYNC
"""


def test_dangerous_commands_are_denied(ask: Ask) -> None:
    commands = [command.split() for command in DANGEROUS.split(";")]
    answers = ask(*commands, ["PING"])
    assert answers.pop() == "+PONG"
    for command, answer in zip(commands, answers, strict=True):
        # Some are switched off for everybody, and that is said first.
        off = f"-ERR {command[0]} command not allowed"
        assert answer.startswith(("-NOPERM", off)), (command, answer)


def test_memory_is_capped(host: Any, variable: Variable) -> None:
    limit = variable("memory_database_max_memory_bytes | default(268435456)")
    policy = variable("memory_database_eviction_policy | default('noeviction')")
    lines = host.check_output("cat /etc/cellblock/memory_database/server.conf").splitlines()
    assert f"maxmemory {limit}" in lines
    assert f"maxmemory-policy {policy}" in lines
    [arguments] = [
        process.args
        for process in host.process.filter(user=server(host))
        if "-server" in process.args
    ]
    # A server rewrites its command line to its address.
    assert arguments.startswith(f"/usr/bin/{server(host)}-server 127.0.0.1:")


def server(host: Any) -> str:
    return "valkey" if host.file("/usr/bin/valkey-server").exists else "redis"


def test_listens_where_declared(
    variable: Variable, listening: Callable[[int], set[str]], loopbacks: set[str]
) -> None:
    declared = variable("memory_database_listen_addresses | default([])")
    port = variable("memory_database_port | default(6379)")
    assert listening(port) == loopbacks | set(declared)


def test_the_password_is_nowhere(
    host: Any, variable: Variable, traces: Callable[..., list[str]]
) -> None:
    password = variable("memory_database_password")
    places = ("/etc", "/var/log", f"/var/lib/{server(host)}", "/root")
    assert traces(host, password, below=places) == []
    # Its digest is in the list of users, and nowhere else.
    digest = hashlib.sha256(password.encode()).hexdigest()
    assert traces(host, digest, below=places) == ["/etc/cellblock/memory_database/users.acl"]


def test_files_are_not_for_others(host: Any) -> None:
    for name in ("users.acl", "server.conf"):
        file = host.file(f"/etc/cellblock/memory_database/{name}")
        assert (file.user, file.group, file.mode) == ("root", server(host), 0o640)
    denied = host.run("runuser -u nobody -- cat /etc/cellblock/memory_database/users.acl")
    assert denied.rc != 0
    # The server's own user cannot change who may log in.
    touched = host.run(f"runuser -u {server(host)} -- touch /etc/cellblock/memory_database/x")
    assert touched.rc != 0
