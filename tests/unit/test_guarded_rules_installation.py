"""What guarded rules install on a host: one file that runs by itself, and units."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cellblock.guarded_rules.installation import Units, files, guard_unit, program, unit_texts
from cellblock.guarded_rules.instance import Instance

FIREWALL = Instance("cellblock-firewall", ("inet cellblock",), "/etc/cellblock/firewall.nft", True)
UNITS = Units("the host's firewall", before_network=True)


def run(tmp_path: Path, instance: Instance, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "program"
    path.write_bytes(program(instance))
    # Away from the sources, which are not on a host.
    return subprocess.run(
        [sys.executable, "-I", str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={},
    )


def test_the_program_runs_by_itself_and_knows_its_instance(tmp_path: Path) -> None:
    shown = run(tmp_path, FIREWALL, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: cellblock-firewall" in shown.stdout
    assert "table inet cellblock, its confirmed rules are in /etc/cellblock/firewall.nft" in (
        shown.stdout
    )


def test_everything_that_the_program_imports_is_in_it(tmp_path: Path) -> None:
    """Also what only some commands import."""
    (tmp_path / "program").write_bytes(program(FIREWALL))
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; "
        "sys.path.insert(0, 'program'); import cellblock.guarded_rules.watch as found; "
        "import cellblock.guarded_rules.command; print(found.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("program/cellblock/")


def test_the_same_sources_give_the_same_bytes() -> None:
    assert program(FIREWALL) == program(FIREWALL)
    assert program(FIREWALL) != program(FIREWALL._replace(minimal=False))
    assert program(FIREWALL).startswith(b"#!/usr/bin/python3 -I\n")


def test_an_instance_that_is_loaded_before_the_network_has_two_units() -> None:
    texts = unit_texts(FIREWALL, UNITS)
    assert list(texts) == ["cellblock-firewall.service", "cellblock-firewall-guard.service"]
    assert guard_unit(FIREWALL, UNITS) == list(texts)[-1]
    load, guard = texts.values()
    assert "Before=network-pre.target" in load
    assert "ExecStart=/usr/local/sbin/cellblock-firewall load\n" in load
    assert "After=cellblock-firewall.service\n" in guard
    assert "RuntimeDirectory=cellblock-firewall\n" in guard


def test_another_has_one_that_knows_its_neighbours() -> None:
    units = Units("x", before_network=False, after=("a.service",), before=("b.service",))
    texts = unit_texts(FIREWALL, units)
    assert list(texts) == [guard_unit(FIREWALL, units)] == ["cellblock-firewall.service"]
    [guard] = texts.values()
    assert "After=nftables.service systemd-sysctl.service a.service\n" in guard
    assert "Before=b.service shutdown.target\n" in guard


@pytest.mark.parametrize("foreign_rules", ["remove", "report"])
def test_the_guard_is_told_about_foreign_rules(foreign_rules: str) -> None:
    [_, _, guard] = files(FIREWALL, UNITS._replace(foreign_rules=foreign_rules))
    line = f"ExecStart=/usr/local/sbin/cellblock-firewall guard --foreign-rules={foreign_rules}\n"
    assert line.encode() in guard.content
    assert (guard.path, guard.mode) == (
        "/etc/systemd/system/cellblock-firewall-guard.service",
        "0644",
    )
