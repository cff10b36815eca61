"""The resolver: fleet names for the fleet, public answers only for jobs and for slaves, which may be in
a job's hands, nothing for anyone else.

The cache server is provisioned for one more network of jobs and with an upstream resolver that gives
private answers and passes everything else on (`lab`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from .lab import FOREIGN_ADDRESS, JOB_ADDRESS

testinfra_hosts = ["ansible://cache1"]

pytestmark = pytest.mark.usefixtures("lab")

# Asks one question after another and prints [status, answers] of each.
CLIENT = r"""
import json, socket, struct, sys
job = json.loads(sys.argv[1])
STATUS = {0: "NOERROR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}
TYPES = {"A": 1, "PTR": 12, "TXT": 16, "AAAA": 28, "ANY": 255}
def skip(data, at):
    while data[at] and data[at] < 192:
        at += 1 + data[at]
    return at + (2 if data[at] else 1)
def name(data, at):
    parts = []
    while data[at]:
        if data[at] >= 192:
            at = struct.unpack("!H", data[at:at + 2])[0] & 0x3FFF
            continue
        parts.append(data[at + 1:at + 1 + data[at]].decode())
        at += 1 + data[at]
    return ".".join(parts)
def ask(question):
    labels = [part.encode() for part in question["name"].split(".") if part]
    query = struct.pack("!6H", 7, 0x100 if question.get("recursion", True) else 0, 1, 0, 0, 0)
    query += b"".join(bytes([len(part)]) + part for part in labels) + b"\0"
    query += struct.pack("!2H", TYPES[question.get("type", "A")], 1)
    tcp = question.get("tcp", False)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.bind((job["source"], 0))
        s.connect((job["address"], 53))
        try:
            if tcp:
                s.sendall(struct.pack("!H", len(query)) + query)
                data = s.makefile("rb").read(struct.unpack("!H", s.recv(2))[0])
            else:
                s.send(query)
                data = s.recv(4096)
        except TimeoutError:
            return ["TIMEOUT", []]
    flags, asked, count = struct.unpack("!3H", data[2:8])
    # A refusal to a stranger does not even repeat the question.
    at = skip(data, 12) + 4 if asked else 12
    answers = []
    for _ in range(count):
        at = skip(data, at)
        kind, _, _, length = struct.unpack("!2HIH", data[at:at + 10])
        content = data[at + 10:at + 10 + length]
        if kind in (1, 28):
            family = socket.AF_INET if kind == 1 else socket.AF_INET6
            answers.append(socket.inet_ntop(family, content))
        else:
            answers.append(name(data, at + 10) if kind in (5, 12) else str(kind))
        at += 10 + length
    return [STATUS.get(flags & 15, str(flags & 15)), sorted(answers)]
print(json.dumps([ask(question) for question in job["questions"]]))
"""

Reply = list[Any]
Ask = Callable[..., list[Reply]]


@pytest.fixture(scope="module")
def slave(host: Any) -> Any:
    return host.get_host("ansible://slave1")


@pytest.fixture(scope="module")
def master(host: Any) -> Any:
    return host.get_host("ansible://master1")


@pytest.fixture(scope="module")
def address(slave: Any) -> str:
    """The cache server's address, as the slave knows it."""
    url = slave.check_output("grep -m1 ^deb /etc/cellblock/apt/sources.list").split("//")[1]
    url = url.split("/")[0]
    return str(url.rpartition(":")[0])


@pytest.fixture(scope="module")
def ask(address: str) -> Ask:
    """Asks the resolver from a host; a question is a name, or a dictionary."""

    def run(host: Any, *questions: str | dict[str, Any], source: str = "0.0.0.0") -> list[Reply]:
        asked = [{"name": q} if isinstance(q, str) else q for q in questions]
        job = {"address": address, "source": source, "questions": asked}
        command = f"python3 -c {shlex.quote(CLIENT)} {shlex.quote(json.dumps(job))}"
        replies: list[Reply] = json.loads(host.check_output(command))
        return replies

    return run


def reverse(address: str) -> dict[str, str]:
    return {"name": ".".join(reversed(address.split("."))) + ".in-addr.arpa", "type": "PTR"}


FLEET_NAMES = ("cache1.cellblock.internal", "slave1.cellblock.internal")


def test_the_fleet_knows_its_names(master: Any, ask: Ask, address: str) -> None:
    assert ask(master, FLEET_NAMES[0]) == [["NOERROR", [address]]]
    assert ask(master, {"name": FLEET_NAMES[0], "tcp": True}) == [["NOERROR", [address]]]
    assert ask(master, reverse(address)) == [["NOERROR", [FLEET_NAMES[0]]]]
    assert ask(master, "nosuch.cellblock.internal") == [["NXDOMAIN", []]]
    # No other address of that range is known, nor asked for elsewhere.
    assert ask(master, reverse("10.97.0.1"))[0][0] == "NXDOMAIN"


def test_slaves_are_told_no_more_than_jobs(slave: Any, master: Any, ask: Ask, address: str) -> None:
    """A routed job's traffic has its slave's address, and a slave may be in a job's hands."""
    asked: list[Any] = [*FLEET_NAMES, {"name": FLEET_NAMES[0], "tcp": True}, "cellblock.internal"]
    kept = ["private.names.example", f"fleet-{address.replace('.', '-')}.names.example"]
    assert [reply[0] for reply in ask(slave, *asked)] == ["REFUSED"] * len(asked)
    assert [reply[0] for reply in ask(slave, *kept, reverse(address))] == ["NXDOMAIN"] * 3
    assert ask(slave, "public.names.example") == [["NOERROR", ["192.0.2.80"]]]
    # The control: the same questions, from a master.
    assert all(reply[0] == "NOERROR" for reply in ask(master, *asked, *kept, reverse(address)))


def test_the_fleet_knows_public_names_and_private_answers(master: Any, ask: Ask) -> None:
    """An upstream's own mirror may have a private address."""
    replies = ask(master, "public.names.example", "private.names.example")
    assert replies == [["NOERROR", ["192.0.2.80"]], ["NOERROR", ["10.0.0.5"]]]


def test_jobs_are_refused_fleet_names(host: Any, ask: Ask, address: str) -> None:
    asked: list[Any] = [*FLEET_NAMES, "nosuch.cellblock.internal", "cellblock.internal"]
    asked += [{"name": FLEET_NAMES[0], "tcp": True}, {"name": FLEET_NAMES[0], "type": "TXT"}]
    asked += ["CACHE1.Cellblock.INTERNAL", {"name": FLEET_NAMES[0], "type": "AAAA"}]
    replies = ask(host, *asked, source=JOB_ADDRESS)
    assert [reply[0] for reply in replies] == ["REFUSED"] * len(asked)
    # Neither in reverse.
    status, answers = ask(host, reverse(address), source=JOB_ADDRESS)[0]
    assert (status, answers) == ("NXDOMAIN", [])
    # The control: the same host, from its own address.
    assert ask(host, FLEET_NAMES[0], source=address)[0][0] == "NOERROR"


def test_jobs_get_public_answers(host: Any, ask: Ask) -> None:
    replies = ask(
        host,
        "public.names.example",
        {"name": "public.names.example", "tcp": True},
        {"name": "public.names.example", "type": "AAAA"},
        "alias.names.example",
        source=JOB_ADDRESS,
    )
    assert replies[:3] == [
        ["NOERROR", ["192.0.2.80"]],
        ["NOERROR", ["192.0.2.80"]],
        ["NOERROR", ["2600::80"]],
    ]
    assert replies[3][1] == ["192.0.2.80", "public.names.example"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("private", "A"),  # 10.0.0.5
        ("private172", "A"),
        ("private192", "A"),
        ("shared", "A"),  # 100.64/10
        ("metadata", "A"),
        ("loopback", "A"),
        ("zero", "A"),
        ("mixed", "A"),  # a public address, and a private one
        ("alias-private", "A"),  # a CNAME for private
        ("private", "AAAA"),  # fd00::5
        ("linklocal", "AAAA"),
        ("mapped", "AAAA"),  # ::ffff:10.0.0.5
        ("sixtofour", "AAAA"),
        ("fleet", "A"),  # the cache server's address
    ],
)
def test_private_answers_are_kept_from_jobs(
    host: Any, ask: Ask, address: str, name: str, kind: str
) -> None:
    label = f"fleet-{address.replace('.', '-')}" if name == "fleet" else name
    question = {"name": f"{label}.names.example", "type": kind}
    status, answers = ask(host, question, source=JOB_ADDRESS)[0]
    assert status == "NXDOMAIN"
    assert not [answer for answer in answers if answer[0].isdigit() or ":" in answer]
    # The control: the upstream gives that answer, and it is what a job may not see.
    status, answers = ask(host, question, source=address)[0]
    assert status == "NOERROR"
    assert answers


def test_anyone_else_is_refused(host: Any, ask: Ask, address: str) -> None:
    asked: list[Any] = ["public.names.example", FLEET_NAMES[0]]
    asked.append({"name": "public.names.example", "tcp": True})
    replies = ask(host, *asked, source=FOREIGN_ADDRESS)
    assert [reply[0] for reply in replies] == ["REFUSED"] * 3
    assert {reply[0] for reply in ask(host, *asked, source=address)} == {"NOERROR"}


@pytest.mark.parametrize("source", ["fleet", "job"])
def test_no_any_and_no_snooping(host: Any, ask: Ask, address: str, source: str) -> None:
    asked = [
        {"name": "public.names.example", "type": "ANY"},
        {"name": "public.names.example", "recursion": False},
        {"name": "public.names.example"},
    ]
    replies = ask(host, *asked, source=address if source == "fleet" else JOB_ADDRESS)
    assert replies[0] == ["NOTIMP", []]
    assert replies[1] == ["REFUSED", []]
    assert replies[2][0] == "NOERROR"


def test_real_names_of_the_internet(host: Any, slave: Any, ask: Ask, lab: str) -> None:
    """Whatever the package cache fetches from is known to jobs and hosts alike."""
    for replies in (ask(slave, lab), ask(host, lab, source=JOB_ADDRESS)):
        assert replies[0][0] == "NOERROR"
        assert replies[0][1]
