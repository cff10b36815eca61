"""cellblock-firewall without a kernel: what it refuses, how it compares tables and reads messages."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "roles/firewall/files/cellblock-firewall"


@pytest.fixture(scope="module")
def loaded_program() -> Any:
    loader = SourceFileLoader("cellblock_firewall", str(PROGRAM))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    sys.modules[loader.name] = module
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@pytest.fixture
def program(loaded_program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program with its files below a temporary directory and a kernel that is a string."""
    monkeypatch.setattr(loaded_program, "PATHS", loaded_program.Paths(tmp_path))
    (tmp_path / "etc/cellblock").mkdir(parents=True)
    return loaded_program


GOOD = 'table inet cellblock {\n\tchain input { type filter hook input priority 0; } # "\n}\n'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "# flush ruleset\n" + GOOD,
        GOOD.replace("0; }", '0; iif "}" accept comment "flush ruleset # include" }'),
        "table inet cellblock { }",
    ],
)
def test_texts_that_pass(program: Any, text: str) -> None:
    program.check_text(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("# only a comment", ["empty"]),
        ("flush ruleset\n" + GOOD, ["flush ruleset"]),
        ("flush\truleset;" + GOOD, ["flush ruleset"]),
        ("table ip filter { }", ["table ip filter"]),
        (GOOD + "table inet other { }", ["go on with 'table inet other {'"]),
        (GOOD + "delete table inet other", ["go on with 'delete table inet other'"]),
        (GOOD + ";flush table ip nat", ["go on"]),
        ("delete table inet cellblock\n" + GOOD, ["begin with"]),
        ("table inet cellblock { } }", ["go on"]),
        ("table inet cellblock { chain a {", ["2 closing"]),
        (GOOD.replace("type", 'include "/x"\ntype'), ["include"]),
        (GOOD.replace("type", 'include"/x"; type'), ["include"]),
        # nft reads a string over the end of the line: what follows is hidden from whoever does not.
        ('table inet cellblock { chain a { comment "x\n# "\n} }\nflush table ip nat\n', ["line 1"]),
    ],
)
def test_texts_that_are_refused(program: Any, text: str, words: list[str]) -> None:
    with pytest.raises(program.Failure) as refused:
        program.check_text(text)
    assert refused.value.status == program.REFUSED == 3
    for word in words:
        assert word in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("message", "status", "words"),
    [
        (
            "/dev/stdin:3:2-5: Error: syntax error, unexpected string\n\tx y\n",
            3,
            ["line 2 ", "b c", "syntax"],
        ),
        (
            "/dev/stdin:2:1-9: Error: Could not process rule: Operation not supported\n",
            4,
            ["kernel refuses line 1 ", "a", "Operation not supported", "modules"],
        ),
        ("-:9:1-9: Error: no such set\n", 3, ["line 8 "]),
        ("netlink: Error: cache initialization failed: Operation not permitted\n", 1, ["cache"]),
        ("", 1, ["no reason"]),
    ],
)
def test_nfts_messages(program: Any, message: str, status: int, words: list[str]) -> None:
    failure = program.nft_failure(message, "a\nb c\n")
    assert failure.status == status
    for word in words:
        assert word in str(failure)
    assert "\n" not in str(failure)


LISTING = """table inet cellblock {
	counter input_drops {
		comment "c"
		packets 7 bytes 9
	}

	set masters_v4 {
		type ipv4_addr
		flags interval
		elements = { 10.0.0.1, 10.0.0.3-10.0.0.9,
				10.1.0.0/16 }
	}

	chain input {
		type filter hook input priority filter - 10; policy drop;
		iif "lo" accept comment "a } in a { string"
		tcp dport { 22, 2222 } accept
		tcp dport 80 accept
	}

	chain empty {
	}
}
"""


def test_parse_listing(program: Any) -> None:
    assert program.parse_listing(LISTING) == {
        "counter input_drops": ['comment "c"'],
        "set masters_v4": [
            "type ipv4_addr",
            "flags interval",
            "element 10.0.0.1",
            "element 10.0.0.3-10.0.0.9",
            "element 10.1.0.0/16",
        ],
        "chain input": [
            "type filter hook input priority filter - 10; policy drop;",
            'iif "lo" accept comment "a } in a { string"',
            "tcp dport { 22, 2222 } accept",
            "tcp dport 80 accept",
        ],
        "chain empty": [],
    }


def compared(program: Any, live: str | None) -> tuple[list[str], list[str]]:
    missing, added = program.compare(LISTING, live)
    return [f"{i['object']}: {i['text']}" for i in missing], [
        f"{i['object']}: {i['text']}" for i in added
    ]


SSH = "\t\ttcp dport { 22, 2222 } accept\n"
WEB = "\t\ttcp dport 80 accept\n"


@pytest.mark.parametrize(
    ("live", "missing", "added"),
    [
        (LISTING, [], []),
        (LISTING.replace("packets 7 bytes 9", "packets 8 bytes 99"), [], []),
        (None, ["table inet cellblock: the whole table"], []),
        (LISTING.replace(WEB, ""), ["chain input: tcp dport 80 accept"], []),
        (LISTING.replace(WEB, WEB + WEB), [], ["chain input: tcp dport 80 accept"]),
        (LISTING.replace(SSH, "\t\taccept\n" + SSH), [], ["chain input: accept"]),
        # A rule that changed places is not where it belongs.
        (
            LISTING.replace(SSH + WEB, WEB + SSH),
            ["chain input: tcp dport 80 accept"],
            ["chain input: tcp dport 80 accept"],
        ),
        (
            LISTING.replace("policy drop", "policy accept"),
            ["chain input: type filter hook input priority filter - 10; policy drop;"],
            ["chain input: type filter hook input priority filter - 10; policy accept;"],
        ),
        (LISTING.replace("10.0.0.1,", ""), ["set masters_v4: element 10.0.0.1"], []),
        (
            LISTING.replace("10.0.0.1,", "10.0.0.1, 1.1.1.1,"),
            [],
            ["set masters_v4: element 1.1.1.1"],
        ),
        (LISTING.replace("\tchain empty {\n\t}\n", ""), ["chain empty: the whole chain empty"], []),
        (
            LISTING.replace("chain empty {", "chain other {\n\t}\n\tchain empty {"),
            [],
            ["chain other: (empty)"],
        ),
        (
            LISTING.replace("cellblock {", "cellblock {\n\tflags dormant\n", 1),
            ["table inet cellblock: being without 'flags dormant'"],
            [],
        ),
    ],
)
def test_compare(program: Any, live: str | None, missing: list[str], added: list[str]) -> None:
    assert compared(program, live) == (missing, added)


def test_minimal_rules_name_the_controllers_and_pass_the_check(program: Any) -> None:
    text = program.minimal_rules(["192.0.2.1/32", "2001:db8::/64", "nonsense"], 2222)
    program.check_text(text)
    assert "ip saddr 192.0.2.1/32 tcp dport 2222 accept" in text
    assert "ip6 saddr 2001:db8::/64 tcp dport 2222 accept" in text
    assert "nonsense" not in text
    assert text.count("policy drop") == 3
    # Without any controller nobody gets in; that is closed, not open.
    assert "dport" not in program.minimal_rules([], 22)


def attribute(kind: int, value: bytes) -> bytes:
    data = struct.pack("=HH", len(value) + 4, kind) + value
    return data + b"\0" * (-len(data) % 4)


def message(kind: int, payload: bytes) -> bytes:
    body = struct.pack("=BBH", 1, 0, 0) + payload
    return struct.pack("=IHHII", len(body) + 16, (10 << 8) | kind, 0, 0, 0) + body


def test_messages_of_the_kernel(program: Any) -> None:
    table = attribute(1, b"cellblock\0")
    by = attribute(2, struct.pack(">I", 42)) + attribute(3, b"nft\0")
    found = list(program.messages(message(2, table) + message(program.NFT_MSG_NEWGEN, by)))
    assert [kind for kind, _ in found] == [2, 15]
    assert b"cellblock\0" in found[0][1]
    assert program.process_of(found[1][1]) == "nft[42]"
    # What is cut off or senseless is no reason to fail.
    assert list(program.messages(message(2, table)[:-3])) == []
    assert program.process_of(b"\xff\xff\x02\x00") == ""


# --- The life of a trial, with a kernel and a systemd that only take notes ------------------------


class Host:
    def __init__(self, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: str | None = None
        self.commands: list[list[str]] = []
        self.broken: set[str] = set()
        monkeypatch.setattr(program, "run", self.run)
        monkeypatch.setattr(program, "program", lambda name, package: name)
        monkeypatch.setattr(
            program, "tell", lambda event, *args, **kwargs: self.events.append(event)
        )
        self.prelude = program.prelude()
        self.events: list[str] = []

    def run(self, command: list[str], stdin: str = "", timeout: float = 30) -> Any:
        self.commands.append(command)
        code, out, err = 0, "", ""
        if command[0] == "nft" and "-f" in command:
            text = stdin[len(self.prelude) :]
            if text in self.broken:
                code, err = 1, "/dev/stdin:2:1-2: Error: syntax error\n"
            else:
                self.table = text or None
        elif command[:2] == ["unshare", "-n"] and len(command) > 3:
            out = "table inet cellblock\n--\n" + stdin[len(self.prelude) :]
        elif command[:2] == ["nft", "-j"]:
            out = '{"nftables": [{"counter": {"name": "input_drops", "packets": 1, "bytes": 2}}]}'
        elif command[0] == "nft":
            code, out = (0, self.table) if self.table else (1, "")
            err = "" if self.table else "Error: No such file or directory"
        return subprocess.CompletedProcess(command, code, out, err)

    def timers(self) -> list[str]:
        """The timers started and not stopped."""
        started = [
            part.split("=")[1]
            for command in self.commands
            if command[0] == "systemd-run"
            for part in command
            if part.startswith("--unit=")
        ]
        stopped = [
            c[2].removesuffix(".timer") for c in self.commands if c[:2] == ["systemctl", "stop"]
        ]
        return [unit for unit in started if unit not in stopped]


TOKEN = "0123456789abcdef"
OTHER = GOOD.replace("chain input", "chain other")


@pytest.fixture
def host(program: Any, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(program, monkeypatch)


def start(program: Any, text: str = GOOD, token: str = TOKEN) -> None:
    program.apply(text, ["192.0.2.1"], 22, 30, 0, token)


def test_confirmed(program: Any, host: Host) -> None:
    start(program)
    # The timer before the rules.
    kinds = [command[0] for command in host.commands]
    assert kinds.index("systemd-run") < kinds.index("nft")
    assert host.table == GOOD
    assert program.status()["state"] == "pending"
    assert program.read(program.PATHS.confirmed) is None
    program.confirm(TOKEN)
    assert program.read(program.PATHS.confirmed) == GOOD
    assert program.read(program.PATHS.state) == "loaded\n"
    assert json.loads(program.read(program.PATHS.lifeline)) == {
        "controllers": ["192.0.2.1"],
        "ssh_port": 22,
    }
    assert host.timers() == []
    with pytest.raises(program.Failure) as late:
        program.rollback(TOKEN)
    assert late.value.status == program.NOTHING
    assert host.table == GOOD


def test_first_rules_that_nobody_confirms_leave_no_table(program: Any, host: Host) -> None:
    start(program)
    program.rollback(TOKEN)
    assert host.table is None
    assert program.status()["state"] == "none"
    assert not program.PATHS.state.exists()
    with pytest.raises(program.Failure, match="rolled back already"):
        program.confirm(TOKEN)


def test_later_rules_that_nobody_confirms(program: Any, host: Host) -> None:
    start(program)
    program.confirm(TOKEN)
    start(program, OTHER, "f" * 16)
    assert host.table == OTHER
    program.rollback("f" * 16)
    assert host.table == GOOD
    assert program.read(program.PATHS.confirmed) == GOOD
    assert program.status()["state"] == "loaded"


def test_another_trials_token_confirms_nothing(program: Any, host: Host) -> None:
    start(program)
    with pytest.raises(program.Failure) as refused:
        program.confirm("e" * 16)
    assert refused.value.status == program.NOTHING
    assert program.status()["state"] == "pending"


def test_rules_that_do_not_load_change_nothing(program: Any, host: Host) -> None:
    start(program)
    program.confirm(TOKEN)
    host.broken.add(OTHER)
    with pytest.raises(program.Failure, match="line 1"):
        start(program, OTHER, "f" * 16)
    assert host.table == GOOD
    assert host.timers() == []
    assert program.status()["state"] == "loaded"
    host.broken.clear()
    start(program, OTHER, "d" * 16)


def test_not_loaded_yet_is_not_confirmed(program: Any, host: Host) -> None:
    program.apply(GOOD, [], 22, 30, 1, TOKEN)
    assert host.table is None
    with pytest.raises(program.Failure) as early:
        program.confirm(TOKEN)
    assert early.value.status == program.BUSY
    program.load_pending(TOKEN)
    program.confirm(TOKEN)
    assert host.table == GOOD


def test_confirmed_rules_that_do_not_load_leave_a_minimum(program: Any, host: Host) -> None:
    start(program)
    program.confirm(TOKEN)
    host.table = None
    host.broken.add(GOOD)
    for path in program.PATHS.run.iterdir():
        path.unlink()
    with pytest.raises(program.Failure) as failure:
        program.load()
    assert failure.value.status == program.FALLBACK
    assert host.table == program.minimal_rules(["192.0.2.1"], 22)
    assert program.read(program.PATHS.state) == "fallback\n"
    assert "firewall_fallback" in host.events


def test_guard_repairs_reports_once_and_keeps_a_trial(program: Any, host: Host) -> None:
    start(program)
    guard = program.Guard()
    guard.look()
    host.table = None
    guard.look("nft[1]")
    assert host.table == GOOD
    assert host.events.count("firewall_repaired") == 1
    host.table = LISTING
    guard.look()
    assert host.table == GOOD
    with_more = GOOD.replace("0; }", "0; }\nchain more {\naccept\n}\n")
    program.record_loaded(GOOD, GOOD.replace("0; }", "0; }\n"), "loaded")
    host.table = with_more
    for _ in range(3):
        guard.look()
    assert host.table == with_more
    assert host.events.count("firewall_foreign_rule") == 1
    loads = [c for c in host.commands if c[0] == "nft" and "-f" in c]
    guard.look()
    assert loads == [c for c in host.commands if c[0] == "nft" and "-f" in c]


def test_without_controllers_those_before_keep_ssh(program: Any, host: Host) -> None:
    start(program)
    program.confirm(TOKEN)
    program.apply(OTHER, None, 22, 30, 0, "b" * 16)
    program.confirm("b" * 16)
    assert json.loads(program.read(program.PATHS.lifeline))["controllers"] == ["192.0.2.1"]


def test_guard_rolls_back_what_the_timer_did_not(
    program: Any, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(program)
    program.confirm(TOKEN)
    start(program, OTHER, "f" * 16)
    deadline = json.loads(program.PATHS.pending.read_text())["deadline"]
    monkeypatch.setattr(program, "uptime", lambda: deadline + 1)
    program.Guard().look()
    assert host.table == OTHER, "that is still the timer's"
    monkeypatch.setattr(program, "uptime", lambda: deadline + 3)
    program.Guard().look()
    assert host.table == GOOD
    assert program.status()["state"] == "loaded"
    assert "firewall_rolled_back" in host.events
    program.Guard().look()
    assert host.table == GOOD


def test_nobody_else_can_hold_the_lock(program: Any) -> None:
    """Who may open a file may lock it, also for reading."""
    with program.lock():
        assert (program.PATHS.run / "lock").stat().st_mode & 0o777 == 0o600
    # One that an earlier version left.
    (program.PATHS.run / "lock").chmod(0o644)
    with program.lock():
        assert (program.PATHS.run / "lock").stat().st_mode & 0o777 == 0o600


def test_a_rollback_that_fails_is_tried_again(program: Any, host: Host) -> None:
    start(program)
    [timer] = [command for command in host.commands if command[0] == "systemd-run"]
    assert "--property=Restart=on-failure" in timer


def test_guard_does_nothing_where_nothing_was_loaded(program: Any, host: Host) -> None:
    program.Guard().look()
    assert host.table is None


def test_damaged_records_count_as_absent(program: Any, host: Host) -> None:
    start(program)
    program.confirm(TOKEN)
    program.PATHS.loaded.write_text("{", encoding="utf-8")
    host.table = None
    program.Guard().look()
    assert host.table == GOOD


def test_wrong_use(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["apply", "--rollback-after", "x"], ["confirm", "--token", "; rm"], []):
        with pytest.raises(SystemExit) as wrong:
            program.main(arguments)
        assert wrong.value.code == program.USAGE
    assert "usage" in capsys.readouterr().err


# --- The other instance: the rules around jobs' networks ------------------------------------------

JOBS = (
    "table netdev cellblock_jobs {\n\tchain egress {\n\t\ttype filter hook egress device"
    ' "eth0" priority 0;\n\t\tether saddr @mac:eth0@ accept\n\t}\n}\n'
)


@pytest.fixture
def guard_of_jobs(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Any, Host, Path]:
    monkeypatch.setattr(program, "INSTANCE", program.JOBS)
    monkeypatch.setattr(program, "TABLE", program.JOBS.tables[0])
    mac = tmp_path / "sys/class/net/eth0/address"
    mac.parent.mkdir(parents=True)
    mac.write_text("02:00:00:00:00:01\n")
    return program, Host(program, monkeypatch), mac


def test_jobs_rules_have_files_of_their_own(guard_of_jobs: tuple[Any, Host, Path]) -> None:
    program = guard_of_jobs[0]
    assert program.PATHS.confirmed.name == "jobs.nft"
    assert program.PATHS.run.name == "cellblock-job-guard"


def test_either_table_of_jobs_passes_and_no_other(guard_of_jobs: tuple[Any, Host, Path]) -> None:
    program = guard_of_jobs[0]
    program.check_text(JOBS)
    program.check_text(JOBS.replace("netdev", "inet"))
    assert program.TABLE == "table inet cellblock_jobs"
    with pytest.raises(program.Failure) as refused:
        program.check_text(GOOD)
    assert "table inet cellblock {" in str(refused.value)


def test_an_interface_stands_for_its_hardware_address(
    guard_of_jobs: tuple[Any, Host, Path],
) -> None:
    program, host, mac = guard_of_jobs
    (program.PATHS.confirmed).write_text(JOBS)
    program.load()
    assert host.table == JOBS.replace("@mac:eth0@", "02:00:00:00:00:01")
    # The guard takes another address over, once.
    mac.write_text("02:00:00:00:00:02\n")
    guard = program.Guard()
    guard.look()
    guard.look()
    assert host.table == JOBS.replace("@mac:eth0@", "02:00:00:00:00:02")
    assert host.events == ["firewall_repaired"]


def test_rules_of_jobs_without_their_interface_give_no_minimal_set(
    guard_of_jobs: tuple[Any, Host, Path],
) -> None:
    program, host, mac = guard_of_jobs
    (program.PATHS.confirmed).write_text(JOBS)
    mac.unlink()
    with pytest.raises(program.Failure) as failed:
        program.load()
    assert "eth0, which this host does not have" in str(failed.value)
    assert host.table is None
    mac.write_text("02:00:00:00:00:01\n")
    program.Guard().look()
    assert host.table is not None
