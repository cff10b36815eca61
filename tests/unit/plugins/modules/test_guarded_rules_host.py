"""What the module finds out about the host and refuses; the rules themselves are tested on hosts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ansible_collections.cellblock.fleet.plugins.modules import _guarded_rules
from ansible_collections.cellblock.fleet.plugins.modules._guarded_rules import (
    Host,
    HostError,
    check_controllers,
    ssh_connection,
)

CONNECTION = "192.0.2.10 50000 192.0.2.21 22"


@pytest.mark.parametrize(
    ("controllers", "connection"),
    [
        (["192.0.2.10"], CONNECTION),
        (["198.51.100.1", "192.0.2.0/24"], CONNECTION),
        (["192.0.2.10/24"], CONNECTION),
        (["2001:db8::/64"], "2001:db8::5 50000 2001:db8::21 22"),
        (["192.0.2.10"], "::ffff:192.0.2.10 50000 ::ffff:192.0.2.21 22"),
        (["fe80::/10"], "fe80::1%eth0 50000 fe80::2%eth0 22"),
        # Not by ssh: nothing that could be cut off.
        (["198.51.100.1"], ""),
    ],
)
def test_controllers_that_hold_the_connection(controllers: list[str], connection: str) -> None:
    check_controllers(controllers, [22, 2222], connection)
    check_controllers(controllers, None, connection)


@pytest.mark.parametrize(("ports", "told"), [([22, 80], "22, 80"), ([], "no port")])
def test_a_connection_to_a_port_that_the_rules_do_not_open(ports: list[int], told: str) -> None:
    with pytest.raises(
        HostError, match=f"came to port 2222, .*open {told};.* service ssh port 2222"
    ):
        check_controllers(["192.0.2.10"], ports, "192.0.2.10 50000 192.0.2.21 2222")


@pytest.mark.parametrize(
    ("controllers", "connection", "words"),
    [
        (["192.0.2.11"], CONNECTION, ["comes from 192.0.2.10", "(192.0.2.11)", "add the address"]),
        (["2001:db8::/64"], CONNECTION, ["comes from 192.0.2.10"]),
        ([], CONNECTION, ["controllers is empty"]),
        ([], "", ["controllers is empty"]),
        (["master1"], "", ["'master1' is no IP address"]),
    ],
)
def test_controllers_that_do_not(controllers: list[str], connection: str, words: list[str]) -> None:
    with pytest.raises(HostError) as refused:
        check_controllers(controllers, [22], connection)
    for word in words:
        assert word in str(refused.value)


def process(proc: Path, pid: int, parent: int, environment: bytes) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "environ").write_bytes(environment)
    (proc / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 1 1", encoding="utf-8")


def test_the_connection_is_found_above_sudo(tmp_path: Path) -> None:
    process(tmp_path, 40, 30, b"PATH=/bin\0")
    process(tmp_path, 30, 20, b"SUDO_USER=a\0")
    process(tmp_path, 20, 1, b"A=b\0SSH_CONNECTION=" + CONNECTION.encode() + b"\0")
    assert ssh_connection(str(tmp_path), 40) == CONNECTION


def test_no_connection(tmp_path: Path) -> None:
    process(tmp_path, 40, 1, b"PATH=/bin\0")
    assert ssh_connection(str(tmp_path), 40) == ""
    assert ssh_connection(str(tmp_path), 41) == ""


RULES = "table inet cellblock { }\n"
LOADED: dict[str, Any] = {
    "state": "loaded",
    "missing": [],
    "added": [],
    "sha256": "",
    "pending": None,
    "rolled_back": None,
}


class FakeHost:
    """A host of answers to commands, with files below a temporary directory."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
        self.program = tmp_path / "cellblock-firewall"
        self.program.write_text("program", encoding="utf-8")
        self.program.chmod(0o755)
        self.confirmed = tmp_path / "firewall.nft"
        self.status: dict[str, Any] = {**LOADED}
        self.units = {"is-enabled": "enabled", "is-active": "active"}
        self.check = (0, "", "")
        self.routes: list[dict[str, Any]] = []
        self.commands: list[list[str]] = []
        self.check_mode = False
        self.warnings: list[str] = []
        self.tables: list[str] = []
        monkeypatch.setattr(_guarded_rules, "ssh_connection", lambda: CONNECTION)
        self.nft: str | None = "/usr/sbin/nft"
        monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: self.nft)
        isdir = os.path.isdir
        monkeypatch.setattr(
            os.path,
            "isdir",
            lambda path: path == "/run/systemd/system" or isdir(path),
        )
        self.params: dict[str, Any] = {
            "name": self.program.name,
            "tables": ["inet cellblock"],
            "path": str(self.confirmed),
            "units": ["cellblock-firewall.service", "cellblock-firewall-guard.service"],
            "rules": RULES,
            "controllers": ["192.0.2.10"],
            "controller_ports": [22],
            "rollback_after_s": 30,
            "files": [
                {
                    "path": str(self.program),
                    "content": base64.b64encode(zlib.compress(b"program")).decode(),
                    "mode": "0755",
                }
            ],
            "token": "",
            "earlier_connections": [],
            **params,
        }

    def take(self, step: str) -> dict[str, Any]:
        module = mock.Mock(params=self.params, check_mode=self.check_mode)
        module.run_command = self.run_command
        module.warn = self.warnings.append
        answer: dict[str, Any] = getattr(Host(module), step)()
        return answer

    def run_command(self, command: list[str], **_: Any) -> tuple[int, str, str]:
        self.commands.append(command)
        if command[0] == "systemctl":
            return 0, self.units.get(command[1], "") + "\n", ""
        if command[0] == "nft":
            return (0 if " ".join(command[-2:]) in self.tables else 1), "", ""
        if command[0] == "ip":
            return 0, json.dumps(self.routes), ""
        if command[1] == "status":
            return 0, json.dumps(self.status), ""
        if command[1] == "check":
            return self.check
        return 0, "", ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    found = FakeHost(tmp_path, monkeypatch)
    found.confirmed.write_text(RULES, encoding="utf-8")
    found.status["sha256"] = hashlib.sha256(RULES.encode()).hexdigest()
    return found


def test_nothing_to_do(host: FakeHost) -> None:
    plan = host.take("plan")
    assert (plan["changed"], plan["load"], plan["diff"]) == (False, False, [])
    assert not any(command[1] == "check" for command in host.commands)


def test_other_rules(host: FakeHost) -> None:
    host.confirmed.write_text("table inet cellblock { chain a { } }\n", encoding="utf-8")
    plan = host.take("plan")
    assert plan["changed"] and plan["load"]
    assert plan["reasons"] == ["the rules differ"]
    assert plan["diff"][0]["after"] == RULES
    assert "chain a" in plan["diff"][0]["before"]


def test_a_clean_host(host: FakeHost) -> None:
    host.program.unlink()
    host.confirmed.unlink()
    host.status = {**LOADED, "state": "none", "sha256": None}
    host.units = {"is-enabled": "", "is-active": "inactive"}
    plan = host.take("plan")
    assert plan["changed"] and plan["load"]
    assert plan["reasons"][:2] == [f"{host.program} is absent", "there are no rules yet"]
    # A program is shown by its digest, the rules in full.
    assert [diff["after"][:7] for diff in plan["diff"]] == ["sha256:", "table i"]
    assert not host.program.exists()


def test_a_clean_host_in_check_mode_still_lacks_nft(host: FakeHost) -> None:
    """A package that the same run would have installed."""
    host.program.unlink()
    host.confirmed.unlink()
    host.nft = None
    host.check_mode = True
    host.units = {"is-enabled": "", "is-active": "inactive"}
    plan = host.take("plan")
    assert plan["changed"] and plan["load"]
    assert [diff["after"][:7] for diff in plan["diff"]] == ["sha256:", "table i"]
    assert host.warnings == ["nft is still to be installed, so the rules were not checked."]
    assert {command[0] for command in host.commands} == {"systemctl"}


def test_rules_that_are_not_about_who_gets_in(host: FakeHost) -> None:
    """No controllers: neither this connection nor routers are checked, and no ssh is kept."""
    host.confirmed.write_text("other", encoding="utf-8")
    host.params.update(controllers=None, token="a" * 32)
    host.routes = [{"dst": "default", "gateway": "fe80::1"}]
    assert host.take("plan")["load"]
    host.take("apply")
    command = next(command for command in host.commands if command[1] == "apply")
    assert not any("--controllers" in part or "--ssh-port" in part for part in command)


def test_removal_leaves_what_is_not_ours(host: FakeHost) -> None:
    lifeline = host.confirmed.with_suffix(".json")
    lifeline.write_text("{}", encoding="utf-8")
    other = host.confirmed.with_name("other.nft")
    other.write_text("x", encoding="utf-8")
    host.tables = ["inet cellblock"]
    host.check_mode = True
    planned = host.take("remove")
    assert planned["changed"] and host.program.exists()
    assert "table inet cellblock is there" in planned["reasons"]
    host.check_mode = False
    assert host.take("remove")["changed"]
    assert [str(host.program), "remove"] in host.commands
    assert sorted(path.name for path in host.confirmed.parent.iterdir()) == ["other.nft"]
    host.tables = []
    host.units = {}
    assert not host.take("remove")["changed"]


def test_removal_without_the_program_deletes_each_of_its_tables(host: FakeHost) -> None:
    host.program.unlink()
    host.params["tables"] = ["netdev x", "inet x", "inet y"]
    host.tables = ["netdev x", "inet x"]
    host.take("remove")
    deleted = [command[3:] for command in host.commands if command[:2] == ["nft", "delete"]]
    assert deleted == [["netdev", "x"], ["inet", "x"]]


def test_what_was_done_to_the_kernels_table_is_shown(host: FakeHost) -> None:
    host.status["added"] = [{"object": "chain input", "text": "accept"}]
    host.status["missing"] = [{"object": "chain input", "text": "drop"}]
    plan = host.take("plan")
    assert plan["load"]
    assert plan["diff"][0]["before"] == "chain input: accept\n"
    assert plan["diff"][0]["after"] == "chain input: drop\n"


def test_a_guard_that_does_not_run(host: FakeHost) -> None:
    host.units["is-active"] = "failed"
    plan = host.take("plan")
    assert plan["changed"] and not plan["load"]
    assert "cellblock-firewall-guard.service is failed, not active" in plan["reasons"]


def test_files_without_new_rules_need_no_trial(host: FakeHost) -> None:
    host.program.write_text("older", encoding="utf-8")
    plan = host.take("plan")
    assert plan["changed"] and not plan["load"]
    host.take("apply")
    assert host.program.read_text(encoding="utf-8") == "program"
    assert host.program.stat().st_mode & 0o777 == 0o755
    assert ["systemctl", "restart", "cellblock-firewall-guard.service"] in host.commands
    assert not any(command[1] == "apply" for command in host.commands)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nft": None}, ["nft is missing", "apt-get install nftables"]),
        (
            {"check": (3, "", "cellblock-firewall: nft refuses line 3 of the rules (x): y.\n")},
            ["nft refuses line 3"],
        ),
        ({"routes": [{"dst": "default", "gateway": "fe80::1"}]}, ["fe80::1", "ipv6_routers"]),
        (
            {"routes": [{"dst": "default", "nexthops": [{"gateway": "fe80::2"}]}]},
            ["the router fe80::2"],
        ),
        ({"status": {**LOADED, "pending": {"phase": "loaded", "seconds_left": 12.0}}}, ["12 s"]),
    ],
)
def test_refusals_change_nothing(host: FakeHost, change: dict[str, Any], words: list[str]) -> None:
    host.confirmed.write_text("other", encoding="utf-8")
    for name, value in change.items():
        setattr(host, name, value)
    with pytest.raises(HostError) as refused:
        host.take("plan")
    for word in words:
        assert word in str(refused.value)
    assert host.confirmed.read_text(encoding="utf-8") == "other"
    assert {command[1] for command in host.commands} <= {"status", "check", "-6"}


def test_routers_that_the_rules_name_are_no_problem(host: FakeHost) -> None:
    host.params["rules"] = "table inet cellblock { set ipv6_routers { fe80::1 } }\n"
    host.routes = [{"dst": "default", "gateway": "fe80::1"}]
    assert host.take("plan")["load"]


def test_a_confirmation_over_an_old_connection_is_refused(host: FakeHost) -> None:
    host.params.update(token="a" * 32, earlier_connections=[CONNECTION])
    with pytest.raises(HostError, match="older than the new rules"):
        host.take("confirm")
    assert host.commands == []
    # The control: another port of the same controller.
    host.params["earlier_connections"] = [CONNECTION.replace("50000", "50001")]
    host.take("confirm")
    assert [str(host.program), "confirm", f"--token={'a' * 32}"] in host.commands


def test_the_trial_knows_the_controllers_and_the_port_of_ssh(host: FakeHost) -> None:
    host.params.update(token="a" * 32)
    host.take("apply")
    command = next(command for command in host.commands if command[1] == "apply")
    assert "--controllers=192.0.2.10/32" in command
    assert "--ssh-port=22" in command
    assert "--load-after=1" in command


def test_a_router_whose_address_only_begins_like_a_named_one(host: FakeHost) -> None:
    host.params["rules"] = "table inet cellblock { set ipv6_routers { fe80::1a } } # fe80::1\n"
    host.routes = [{"dst": "default", "gateway": "fe80::1"}]
    with pytest.raises(HostError, match="the router fe80::1"):
        host.take("plan")
    # The control, in another way to write it.
    host.params["rules"] = "table inet cellblock { set ipv6_routers { fe80:0:0::1 } }\n"
    assert host.take("plan")["load"]


def test_a_program_that_is_somebody_elses_is_installed_anew(host: FakeHost, tmp_path: Path) -> None:
    assert not host.take("plan")["changed"]
    os.chown(host.program, 1000, -1)
    assert host.take("plan")["reasons"] == [f"{host.program} differs"]
    host.take("apply")
    assert host.program.stat().st_uid == 0
    # A link to a file that is right.
    there = host.program.rename(tmp_path / "elsewhere")
    host.program.symlink_to(there)
    assert host.take("plan")["changed"]
    host.take("apply")
    assert not host.program.is_symlink()
