"""Guarded rules without a kernel: what is refused, how tables are compared, the life of a trial."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cellblock.guarded_rules import command, records, trial
from cellblock.guarded_rules import host as host_module
from cellblock.guarded_rules.compare import compare, parse_listing
from cellblock.guarded_rules.instance import Instance, RulesError, Status
from cellblock.guarded_rules.records import Records
from cellblock.guarded_rules.table import Table, nft_failure
from cellblock.guarded_rules.trial import GuardedTable, minimal_rules
from cellblock.guarded_rules.watch import Guard
from cellblock.linux import journal
from cellblock.linux.nft_monitor import Generation

FIREWALL = Instance(
    "cellblock-firewall", ("inet cellblock",), "/etc/cellblock/firewall.nft", minimal=True
)
JOB_GUARD = Instance(
    "cellblock-job-guard",
    ("netdev cellblock_jobs", "inet cellblock_jobs"),
    "/etc/cellblock/jobs.nft",
    minimal=False,
)

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
def test_texts_that_pass(text: str) -> None:
    Table(FIREWALL).check_text(text)


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
def test_texts_that_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(RulesError) as refused:
        Table(FIREWALL).check_text(text)
    assert int(refused.value.status) == 3
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
def test_nfts_messages(message: str, status: int, words: list[str]) -> None:
    failure = nft_failure(message, "a\nb c\n")
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


def test_parse_listing() -> None:
    assert parse_listing(LISTING) == {
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


def compared(live: str | None, recorded: str = LISTING) -> tuple[list[str], list[str]]:
    missing, added = compare("table inet cellblock", recorded, live)
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
def test_compare(live: str | None, missing: list[str], added: list[str]) -> None:
    assert compared(live) == (missing, added)


DYNAMIC = """table inet cellblock {
	set seen {
		type ipv4_addr
		size 1000
		flags dynamic,timeout
		timeout 1h
	}
	set early {
		type ipv4_addr
		flags timeout
		elements = { 10.0.0.1 }
	}
	set services {
		type ipv4_addr
		elements = { 10.0.0.1 }
	}
	chain input {
		add @seen { ip saddr limit rate 10/second }
		update @early { ip saddr timeout 1m }
		accept comment "add @services { x"
	}
}
"""


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        ("timeout 1h\n", "timeout 1h\n\t\telements = { 10.9.9.9, 10.9.9.8 }\n", []),
        (
            "flags timeout\n\t\telements = { 10.0.0.1 }",
            "flags timeout\n\t\telements = { 1.1.1.1 }",
            [],
        ),
        # No rule adds to this one: who says so in a comment does not count.
        (
            "addr\n\t\telements = { 10.0.0.1 }",
            "addr\n\t\telements = { 10.0.0.1, 1.1.1.1 }",
            ["set services: element 1.1.1.1"],
        ),
        ("size 1000", "size 2000", ["set seen: size 2000"]),
    ],
)
def test_what_rules_add_to_sets_themselves_is_not_foreign(
    before: str, after: str, added: list[str]
) -> None:
    live = DYNAMIC.replace(before, after)
    assert live != DYNAMIC
    assert compared(live, DYNAMIC)[1] == added


def test_a_foreign_rule_that_fills_a_set_makes_its_elements_no_rules_own() -> None:
    live = DYNAMIC.replace("10.0.0.1 }\n\t}\n\tchain", "10.0.0.1, 1.1.1.1 }\n\t}\n\tchain").replace(
        "\t\taccept", "\t\tadd @services { ip saddr }\n\t\taccept"
    )
    assert compared(live, DYNAMIC)[1] == [
        "set services: element 1.1.1.1",
        "chain input: add @services { ip saddr }",
    ]


def test_minimal_rules_name_the_controllers_and_pass_the_check() -> None:
    text = minimal_rules(
        "table inet cellblock",
        {"controllers": ["192.0.2.1/32", "2001:db8::/64", "nonsense"], "ssh_port": 2222},
    )
    Table(FIREWALL).check_text(text)
    assert "ip saddr 192.0.2.1/32 tcp dport 2222 accept" in text
    assert "ip6 saddr 2001:db8::/64 tcp dport 2222 accept" in text
    assert "nonsense" not in text
    assert text.count("policy drop") == 3
    # Without any controller nobody gets in; that is closed, not open.
    nobody = minimal_rules("table inet cellblock", {"controllers": [], "ssh_port": 22})
    assert "dport" not in nobody


# --- The life of a trial, with a kernel and a systemd that only take notes ------------------------


class Host:
    """What the program sees of a host: one table, commands that take notes, files below a directory."""

    def __init__(self, instance: Instance, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: str | None = None
        self.commands: list[list[str]] = []
        self.broken: set[str] = set()
        self.events: list[dict[str, Any]] = []
        self.generation = 0
        self.has_namespaces = True
        # What somebody else does to the table right after it was loaded.
        self.after_load: str | None = None
        self.rules = GuardedTable(instance, root)
        self.records = Records(instance, root)
        (root / "etc/cellblock").mkdir(parents=True)
        monkeypatch.setattr(host_module, "run", self.run)
        monkeypatch.setattr(host_module, "find_program", lambda name, package: name)
        monkeypatch.setattr(trial, "generation", lambda: Generation(self.generation, ""))
        monkeypatch.setattr(journal, "send", lambda message, **fields: self.events.append(fields))

    def run(self, command: list[str], stdin: str = "", timeout_s: float = 30) -> Any:
        self.commands.append(command)
        code, out, err = 0, "", ""
        text = stdin.partition("\n")[2]
        if command[0] == "nft" and "-f" in command:
            assert stdin.startswith("add table ") and "; delete table " in stdin
            if text in self.broken:
                code, err = 1, "/dev/stdin:2:1-2: Error: syntax error\n"
            else:
                self.table = text or None
                self.generation += 1
                if self.after_load:
                    self.table = self.after_load
                    self.generation += 1
        elif command[0] == "unshare" and not self.has_namespaces:
            code, err = 1, "unshare: Operation not permitted"
        elif command[:2] == ["unshare", "-n"] and len(command) > 3:
            out = f"{' '.join(command[-3:])}\n--\n{text}"
        elif command[:2] == ["nft", "-j"]:
            out = '{"nftables": [{"counter": {"name": "input_drops", "packets": 1, "bytes": 2}}]}'
        elif command[0] == "nft":
            code, out = (0, self.table) if self.table else (1, "")
            err = "" if self.table else "Error: No such file or directory"
        return subprocess.CompletedProcess(command, code, out, err)

    def start(self, text: str = "", token: str = "", load_after_s: float = 0) -> None:
        self.rules.apply(
            text or GOOD,
            {"controllers": ["192.0.2.1"], "ssh_port": 22},
            30,
            load_after_s,
            token or TOKEN,
        )

    def started_and_confirmed(self) -> None:
        self.start()
        self.rules.confirm(TOKEN)

    def state(self) -> str:
        return command.status(self.rules)["state"]

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def loads(self) -> int:
        return len([c for c in self.commands if c[0] == "nft" and "-f" in c])

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
# Rules that are listed as they are written, and the same with something more.
PRETTY = "table inet cellblock {\n\tchain input {\n\t\ttype filter hook input priority 0;\n\t}\n}\n"
WITH_MORE = PRETTY.replace("\t}\n}", "\t}\n\tchain more {\n\t\taccept\n\t}\n}")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(FIREWALL, tmp_path, monkeypatch)


def test_confirmed(host: Host) -> None:
    host.start()
    # The timer before the rules.
    kinds = [command[0] for command in host.commands]
    assert kinds.index("systemd-run") < kinds.index("nft")
    assert host.table == GOOD
    assert host.state() == "pending"
    assert host.records.confirmed() is None
    host.rules.confirm(TOKEN)
    assert host.records.confirmed() == GOOD
    assert (host.records.run / "state").read_text() == "loaded\n"
    lifeline = host.records.confirmed_path.with_suffix(".json")
    assert json.loads(lifeline.read_text()) == {"controllers": ["192.0.2.1"], "ssh_port": 22}
    assert host.timers() == []
    with pytest.raises(RulesError) as late:
        host.rules.rollback(TOKEN)
    assert late.value.status == Status.NOT_PENDING
    assert host.table == GOOD


def test_first_rules_that_nobody_confirms_leave_no_table(host: Host) -> None:
    host.start()
    host.rules.rollback(TOKEN)
    assert host.table is None
    assert host.state() == "none"
    assert not (host.records.run / "state").exists()
    with pytest.raises(RulesError, match="rolled back already"):
        host.rules.confirm(TOKEN)


def test_later_rules_that_nobody_confirms(host: Host) -> None:
    host.started_and_confirmed()
    host.start(OTHER, "f" * 16)
    assert host.table == OTHER
    host.rules.rollback("f" * 16)
    assert host.table == GOOD
    assert host.records.confirmed() == GOOD
    assert host.state() == "loaded"


def test_another_trials_token_confirms_nothing(host: Host) -> None:
    host.start()
    with pytest.raises(RulesError) as refused:
        host.rules.confirm("e" * 16)
    assert refused.value.status == Status.NOT_PENDING
    assert host.state() == "pending"


def test_rules_that_do_not_load_change_nothing(host: Host) -> None:
    host.started_and_confirmed()
    host.broken.add(OTHER)
    with pytest.raises(RulesError, match="line 1"):
        host.start(OTHER, "f" * 16)
    assert host.table == GOOD
    assert host.timers() == []
    assert host.state() == "loaded"
    host.broken.clear()
    host.start(OTHER, "d" * 16)


def test_not_loaded_yet_is_not_confirmed(host: Host) -> None:
    host.start(load_after_s=1)
    assert host.table is None
    with pytest.raises(RulesError) as early:
        host.rules.confirm(TOKEN)
    assert early.value.status == Status.BUSY
    host.rules.load_pending(TOKEN)
    host.rules.confirm(TOKEN)
    assert host.table == GOOD


def test_confirmed_rules_that_do_not_load_leave_a_minimum(host: Host) -> None:
    host.started_and_confirmed()
    host.table = None
    host.broken.add(GOOD)
    for path in host.records.run.iterdir():
        path.unlink()
    with pytest.raises(RulesError) as failure:
        host.rules.load_confirmed()
    assert failure.value.status == Status.MINIMAL
    assert host.table == minimal_rules(
        "table inet cellblock", {"controllers": ["192.0.2.1"], "ssh_port": 22}
    )
    assert (host.records.run / "state").read_text() == "fallback\n"
    assert "firewall_fallback" in host.names()


def test_guard_repairs_and_keeps_a_trial(host: Host) -> None:
    host.start()
    guard = Guard(host.rules)
    guard.look()
    host.table = None
    guard.look("nft[1]")
    assert host.table == GOOD
    assert host.names().count("firewall_repaired") == 1
    host.table = LISTING
    guard.look()
    assert host.table == GOOD
    assert host.state() == "pending"


@pytest.fixture
def pretty(host: Host) -> Host:
    """With a rule in a chain that somebody else has added."""
    with host.records.lock():
        host.rules.record_loaded(PRETTY, PRETTY, "loaded")
    host.table = WITH_MORE
    assert [item["object"] for item in command.status(host.rules)["added"]] == ["chain more"]
    return host


def test_guard_removes_what_is_not_ours_and_says_whose_it_was(pretty: Host) -> None:
    guard = Guard(pretty.rules)
    guard.look("nft[7]")
    assert pretty.table == PRETTY
    [event] = pretty.events
    assert event["event"] == "firewall_foreign_rule"
    assert (event["object"], event["rule"]) == ("chain more", "accept")
    assert (event["by"], event["action"]) == ("nft[7]", "removed")
    # The same once more, before anybody looked in between, is reported once more.
    pretty.table = WITH_MORE
    for _ in range(2):
        guard.look()
    assert pretty.table == PRETTY
    assert pretty.names() == ["firewall_foreign_rule"] * 2


def test_guard_that_only_reports_does_so_once(pretty: Host) -> None:
    guard = Guard(pretty.rules, "report")
    for _ in range(3):
        guard.look("nft[7]")
    assert pretty.table == WITH_MORE
    assert pretty.loads() == 0
    [event] = pretty.events
    assert (event["event"], event["action"]) == ("firewall_foreign_rule", "reported")
    # With a rule of ours that is missing, it goes too: the table is made anew as a whole.
    pretty.table = WITH_MORE.replace("\t\ttype filter hook input priority 0;\n", "")
    guard.look()
    assert pretty.table == PRETTY
    assert json.loads(pretty.events[-1]["removed"]) == [{"object": "chain more", "text": "accept"}]


def test_another_wording_of_ours_is_taken_over_and_not_repaired_for_ever(pretty: Host) -> None:
    """nft was updated and prints our rules with a line more."""
    pretty.rules.record_loaded(WITH_MORE, PRETTY, "loaded")
    guard = Guard(pretty.rules)
    guard.look()
    assert pretty.loads() == 1
    guard.look()
    assert pretty.loads() == 1
    assert command.status(pretty.rules)["added"] == []


def test_what_somebody_adds_right_after_a_repair_is_not_taken_for_ours(pretty: Host) -> None:
    guard = Guard(pretty.rules)
    pretty.after_load = WITH_MORE
    for _ in range(3):
        guard.look()
    assert [item["object"] for item in command.status(pretty.rules)["added"]] == ["chain more"]
    pretty.after_load = None
    guard.look()
    assert pretty.table == PRETTY


def test_without_controllers_those_before_keep_ssh(host: Host) -> None:
    host.started_and_confirmed()
    host.rules.apply(OTHER, None, 30, 0, "b" * 16)
    host.rules.confirm("b" * 16)
    assert host.records.lifeline()["controllers"] == ["192.0.2.1"]


def test_guard_rolls_back_what_the_timer_did_not(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.started_and_confirmed()
    host.start(OTHER, "f" * 16)
    pending = host.records.pending()
    assert pending
    deadline = pending["deadline"]
    monkeypatch.setattr(host_module, "uptime", lambda: deadline + 1)
    Guard(host.rules).look()
    assert host.table == OTHER, "that is still the timer's"
    monkeypatch.setattr(host_module, "uptime", lambda: deadline + 3)
    Guard(host.rules).look()
    assert host.table == GOOD
    assert host.state() == "loaded"
    assert "firewall_rolled_back" in host.names()
    Guard(host.rules).look()
    assert host.table == GOOD


def test_nobody_else_can_hold_the_lock(tmp_path: Path) -> None:
    """Who may open a file may lock it, also for reading."""
    records = Records(FIREWALL, tmp_path)
    with records.lock():
        assert (records.run / "lock").stat().st_mode & 0o777 == 0o600
    # One that an earlier version left.
    (records.run / "lock").chmod(0o644)
    with records.lock():
        assert (records.run / "lock").stat().st_mode & 0o777 == 0o600


def test_the_lock_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LOCK_S", 0.1)
    with (
        Records(FIREWALL, tmp_path).lock(),
        pytest.raises(RulesError, match="fuser") as busy,
        Records(FIREWALL, tmp_path).lock(),
    ):
        pass
    assert busy.value.status == Status.BUSY
    with Records(FIREWALL, tmp_path).lock():
        pass


def test_what_somebody_adds_to_restored_rules_is_not_taken_for_ours(pretty: Host) -> None:
    """The guard cannot make a namespace to list its rules in, so it lists the table itself."""
    pretty.records.set_confirmed(PRETTY, {"controllers": [], "ssh_port": 22})
    pretty.table = None
    (pretty.records.run / "loaded.json").unlink()
    pretty.has_namespaces = False
    pretty.after_load = WITH_MORE
    guard = Guard(pretty.rules)
    guard.look()
    pretty.after_load = None
    assert pretty.table == WITH_MORE
    guard.look()
    assert pretty.table == PRETTY
    # The control: with nobody else there, what is listed is ours, and is not loaded again.
    loads = pretty.loads()
    guard.look()
    assert pretty.loads() == loads


def test_a_rollback_that_fails_is_tried_again(host: Host) -> None:
    host.start()
    [timer] = [command for command in host.commands if command[0] == "systemd-run"]
    assert "--property=Restart=on-failure" in timer


def test_guard_does_nothing_where_nothing_was_loaded(host: Host) -> None:
    Guard(host.rules).look()
    assert host.table is None


@pytest.mark.parametrize("damaged", ["{", "[]", '{"state": "loaded"}'])
def test_damaged_records_count_as_absent(host: Host, damaged: str) -> None:
    host.started_and_confirmed()
    (host.records.run / "loaded.json").write_text(damaged, encoding="utf-8")
    host.table = None
    Guard(host.rules).look()
    assert host.table == GOOD


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["apply", "--rollback-after", "x"], ["confirm", "--token", "; rm"], []):
        with pytest.raises(SystemExit) as wrong:
            command.main(FIREWALL, arguments)
        assert wrong.value.code == Status.USAGE
    assert "usage: cellblock-firewall" in capsys.readouterr().err


# --- The other instance: the rules around jobs' networks ------------------------------------------

JOBS = (
    "table netdev cellblock_jobs {\n\tchain egress {\n\t\ttype filter hook egress device"
    ' "eth0" priority 0;\n\t\tether saddr @mac:eth0@ accept\n\t}\n}\n'
)


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Host, Path]:
    """And the file with the hardware address of eth0."""
    mac = tmp_path / "sys/class/net/eth0/address"
    mac.parent.mkdir(parents=True)
    mac.write_text("02:00:00:00:00:01\n")
    return Host(JOB_GUARD, tmp_path, monkeypatch), mac


def test_jobs_rules_have_files_of_their_own(tmp_path: Path) -> None:
    records = Records(JOB_GUARD, tmp_path)
    assert records.confirmed_path == tmp_path / "etc/cellblock/jobs.nft"
    assert records.run == tmp_path / "run/cellblock-job-guard"


def test_either_table_of_jobs_passes_and_no_other() -> None:
    table = Table(JOB_GUARD)
    table.check_text(JOBS)
    routed = JOBS.replace("netdev", "inet")
    table.check_text(routed)
    assert table.name_of(routed) == "table inet cellblock_jobs"
    with pytest.raises(RulesError) as refused:
        table.check_text(GOOD)
    assert "table inet cellblock {" in str(refused.value)


def test_an_interface_stands_for_its_hardware_address(jobs: tuple[Host, Path]) -> None:
    host, mac = jobs
    host.records.confirmed_path.write_text(JOBS)
    host.rules.load_confirmed()
    assert host.table == JOBS.replace("@mac:eth0@", "02:00:00:00:00:01")
    # The guard takes another address over, once.
    mac.write_text("02:00:00:00:00:02\n")
    guard = Guard(host.rules)
    guard.look()
    guard.look()
    assert host.table == JOBS.replace("@mac:eth0@", "02:00:00:00:00:02")
    assert host.names() == ["firewall_repaired"]


def test_rules_of_jobs_without_their_interface_give_no_minimal_set(
    jobs: tuple[Host, Path],
) -> None:
    host, mac = jobs
    host.records.confirmed_path.write_text(JOBS)
    mac.unlink()
    with pytest.raises(RulesError) as failed:
        host.rules.load_confirmed()
    assert "eth0, which this host does not have" in str(failed.value)
    assert host.table is None
    mac.write_text("02:00:00:00:00:01\n")
    Guard(host.rules).look()
    assert host.table is not None


def test_rules_on_trial_go_though_the_earlier_ones_do_not_load(jobs: tuple[Host, Path]) -> None:
    host, _ = jobs
    host.start(JOBS)
    host.rules.confirm(TOKEN)
    other = JOBS.replace("priority 0", "priority 1")
    host.start(other, "f" * 16)
    host.broken.add(JOBS.replace("@mac:eth0@", "02:00:00:00:00:01"))
    assert "did not load" in host.rules.rollback("f" * 16)
    assert host.table is None
    assert host.state() == "none"
    assert host.records.pending() is None
    assert host.names()[-2:] == ["firewall_fallback", "firewall_rolled_back"]
    # The guard goes on trying.
    with pytest.raises(RulesError):
        Guard(host.rules).look()
    host.broken.clear()
    Guard(host.rules).look()
    assert host.state() == "loaded"


def test_rules_as_they_were_written_are_no_listing() -> None:
    """What is recorded at a boot where somebody else kept changing rules; the next look loads them once more."""
    written = "# Made by a role.\n" + PRETTY.replace("{\n", "{\n\t# Why.\n\tcounter drops { }\n", 1)
    missing, added = compare("table inet cellblock", written, PRETTY)
    assert missing or added
