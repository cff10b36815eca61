"""What only a real boot shows: the rules are there before the network, and networkd makes the jobs'
interface anew. (In containers the interface is there before systemd is.) At the end, the jobs' network
is taken off the machine.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://vm1"]
pytestmark = pytest.mark.kernel

BOOT_SECONDS = 300
# An address of the internet that is nobody's (RFC 5737). The machine's network ends at qemu, which
# answers for every address that the machine is to try in vain.
INTERNET = "198.51.100.10"

Record = dict[str, Any]


def show(host: Any, unit: str, name: str) -> int:
    """A moment of the unit's life in microseconds since the boot."""
    value = host.check_output(f"systemctl show --property={name} --value {unit}")
    assert value.isdigit(), f"{unit}: {name} is {value!r}"
    return int(value)


def assert_the_interface_is_there(host: Any) -> None:
    link = json.loads(host.check_output("ip -json -detail address show dev cellblock0"))[0]
    assert link["link"] == "eth0"
    assert "UP" in link["flags"]
    assert link["linkinfo"]["info_kind"] == "macvlan"
    assert link["linkinfo"]["info_data"]["mode"] == "private"
    # networkd has a file that gives every Ethernet interface the machine's own address.
    assert link["addr_info"] == []
    assert host.run("cellblock-job-guard status").rc == 0


def assert_jobs_have_a_network(submit: Callable[..., Record]) -> None:
    """As far as qemu: it refuses the connection, and what comes in is counted as what goes out is."""
    stage = {
        "name": "run",
        "command": ["bash", "-c", f"exec 3<>/dev/tcp/{INTERNET}/80"],
        "network": "allow",
        "network_allow": [{"to": INTERNET, "protocol": "tcp", "ports": [80]}],
    }
    done = submit({"environment": "base", "stages": [stage]})["stages"][0]
    assert "Connection refused" in done["stderr"]["text"], done
    usage = done["usage"]
    assert usage["network_sent_packets"] > 0, usage
    assert usage["network_received_packets"] > 0, usage
    # Control: what the list does not name gets no packet out.
    stage["command"] = ["bash", "-c", "exec 3<>/dev/tcp/10.0.2.2/80"]
    usage = submit({"environment": "base", "stages": [stage]})["stages"][0]["usage"]
    assert usage["network_sent_packets"] == 0, usage
    assert usage["network_refused_packets"] > 0, usage


def test_the_jobs_network_before_the_boot(host: Any, submit: Callable[..., Record]) -> None:
    """Made by the role while networkd runs, which would not make it before the next boot."""
    assert_the_interface_is_there(host)
    assert_jobs_have_a_network(submit)


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


@pytest.mark.usefixtures("rebooted")
def test_networkd_has_made_the_jobs_interface(host: Any) -> None:
    assert_the_interface_is_there(host)
    assert "25-cellblock.network" in host.check_output("networkctl --no-pager status cellblock0")
    made = "journalctl --boot --output=cat --unit=systemd-networkd --grep='^cellblock0: .*'"
    assert re.search(r"(?i)netdev (created|ready)|\bcreated\b", host.check_output(made))
    # Nobody else could have.
    assert not host.file("/etc/systemd/system/cellblock-interface.service").exists


@pytest.mark.usefixtures("rebooted")
def test_the_guard_is_there_before_jobs(host: Any) -> None:
    # The guard says that it is active when it has looked after its table for the first time.
    guarded = show(host, "cellblock-job-guard.service", "ActiveEnterTimestampMonotonic")
    engine = show(host, "cellblock.service", "ExecMainStartTimestampMonotonic")
    assert 0 < guarded < engine
    failed = "journalctl --boot CELLBLOCK_EVENT=firewall_guard_failed --output=cat"
    assert host.run(failed).stdout.strip() in ("", "-- No entries --")


@pytest.mark.usefixtures("rebooted")
def test_jobs_have_a_network_after_the_boot(submit: Callable[..., Record]) -> None:
    assert_jobs_have_a_network(submit)


@pytest.mark.usefixtures("rebooted")
def test_another_run_changes_nothing_of_it(host: Any, playbook: Any) -> None:
    assert host.run("cellblock-job-guard status").rc == 0
    done = playbook("../molecule/vm/again.yml")
    assert re.search(r"vm1 .* changed=0 .* failed=0 ", done.stdout), done.stdout + done.stderr


@pytest.mark.usefixtures("rebooted")
def test_nothing_is_left_of_it(host: Any, playbook: Any) -> None:
    """The last of all: jobs have no network after it."""
    files = (
        "find /etc/systemd /etc/sysctl.d /etc/cellblock /usr/local/sbin /run/systemd/system"
        " /run/cellblock-job-guard 2>/dev/null | grep -E '25-cellblock|[.]network[.]d|job'"
    )
    # Control: before, these are what there is of it.
    found = host.check_output(files)
    for name in ("25-cellblock.netdev", "qemu.network.d/cellblock.conf", "job-guard", "jobs.nft"):
        assert name in found, found
    done = playbook("../molecule/vm/remove.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert host.run(files).stdout == ""
    assert "cellblock" not in host.check_output("ls /sys/class/net")
    assert host.check_output("nft list tables") == "table inet cellblock"
    # The machine's own network is as it was.
    assert "configured" in host.check_output("networkctl --no-pager list eth0")
