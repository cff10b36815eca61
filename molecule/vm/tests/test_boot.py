"""What only a real boot shows: the rules are there before the network. (In containers the interface is
there before systemd is.)
"""

from __future__ import annotations

import time
from typing import Any

import pytest

testinfra_hosts = ["ansible://vm1"]

BOOT_SECONDS = 300


def show(host: Any, unit: str, name: str) -> int:
    """A moment of the unit's life in microseconds since the boot."""
    value = host.check_output(f"systemctl show --property={name} --value {unit}")
    assert value.isdigit(), f"{unit}: {name} is {value!r}"
    return int(value)


@pytest.fixture(scope="module")
def rebooted(host: Any) -> None:
    """The machine after a reboot, booted to the end."""
    before = host.check_output("cat /proc/sys/kernel/random/boot_id")
    host.run("systemd-run --on-active=1 systemctl reboot")
    end = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < end:
        time.sleep(5)
        try:
            now = host.run(
                "cat /proc/sys/kernel/random/boot_id && systemctl is-system-running --wait"
            )
        except RuntimeError:
            continue  # testinfra's word for a connection that fails
        if now.rc == 0 and before not in now.stdout:
            return
    pytest.fail(f"the machine was not back within {BOOT_SECONDS} s")


@pytest.mark.usefixtures("rebooted")
def test_the_rules_are_there_before_the_network(host: Any) -> None:
    rules = show(host, "cellblock-firewall.service", "ActiveEnterTimestampMonotonic")
    network = show(host, "systemd-networkd.service", "ExecMainStartTimestampMonotonic")
    assert 0 < rules < network
    # The kernel's own word: the interface has no carrier until networkd brings it up.
    up = host.check_output(
        "journalctl --boot --output=json --unit=systemd-networkd --grep='Gained carrier'"
        ' | sed -n \'s/.*"__MONOTONIC_TIMESTAMP":"\\([0-9]*\\)".*/\\1/p\' | head -n 1'
    )
    assert int(up) > rules


@pytest.mark.usefixtures("rebooted")
def test_they_are_the_rules_that_were_confirmed(host: Any) -> None:
    assert host.run("/usr/local/sbin/cellblock-firewall status --json").rc == 0
    listed = host.check_output("nft list table inet cellblock")
    assert "policy drop" in listed


@pytest.mark.usefixtures("rebooted")
def test_a_drop_is_counted_and_in_the_journal(host: Any) -> None:
    """Containers do not log what their rules drop; a machine of its own does."""
    count = (
        "nft list counter inet cellblock output_drops | sed -n 's/.*packets \\([0-9]*\\).*/\\1/p'"
    )
    before = int(host.check_output(count))
    # qemu's gateway: a private address, which no flow names.
    host.run("timeout 2 bash -c 'echo >/dev/udp/10.0.2.2/9999'")
    assert int(host.check_output(count)) > before
    assert "cellblock drop output: " in host.check_output(
        "journalctl --sync; journalctl --boot --dmesg"
    )


@pytest.mark.usefixtures("rebooted")
def test_jobs_run_after_the_boot(host: Any) -> None:
    done = host.run(
        'echo \'{"environment": "base", "stages": [{"name": "run", "command": ["true"]}]}\''
        " | timeout 120 cellblock run -"
    )
    assert '"verdict":"ok"' in done.stdout.replace(" ", "")
