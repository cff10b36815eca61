"""What is put on a host for its jobs' network, and taken off again; commands are only noted down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cellblock.job_network import provision
from cellblock.job_network.decision import Decision
from cellblock.job_network.host import Manager, Parent
from cellblock.job_network.plan import Mode
from cellblock.job_network.provision import Provisioner, ProvisionError

UNIT = "systemd/system/cellblock-interface.service"
CONNECTION = "NetworkManager/system-connections/cellblock.nmconnection"
NETWORKD_FILE = "/run/systemd/network/10-uplink.network"


class Host:
    """Directories that stand for /etc and /proc/sys, and commands that change ``links`` and ``units``."""

    def __init__(self, directory: Path) -> None:
        self.etc, self.proc_sys = directory / "etc", directory / "sys"
        self.ran: list[str] = []
        self.link: dict[str, Any] | None = None
        self.is_unit_running = False
        self.connections: list[str] = []
        self.failing = ""
        self.etc.mkdir()
        for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            self.set(name, "0")

    def set(self, name: str, value: str) -> None:
        path = self.proc_sys / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    def forwarding(self) -> tuple[str, str]:
        return (
            (self.proc_sys / "net/ipv4/ip_forward").read_text().strip(),
            (self.proc_sys / "net/ipv6/conf/all/forwarding").read_text().strip(),
        )

    def files(self) -> dict[str, str]:
        every = (path for path in self.etc.rglob("*") if path.is_file())
        return {str(path.relative_to(self.etc)): path.read_text() for path in every}

    def run(self, *command: str) -> tuple[int, str, str]:
        words = list(command)
        if words[:2] == ["ip", "-details"]:
            return (0, json.dumps([self.link]), "") if self.link else (1, "", "does not exist")
        if words[:2] == ["systemctl", "is-enabled"]:
            return 0, "enabled\n" if self.is_unit_running else "disabled\n", ""
        if words[:2] == ["systemctl", "is-active"]:
            return 0, "active\n" if self.is_unit_running else "inactive\n", ""
        if words[:2] == ["nmcli", "-g"]:
            return 0, "".join(f"{uuid}\n" for uuid in self.connections), ""
        self.ran.append(" ".join(words))
        if self.failing and self.failing in self.ran[-1]:
            return 1, "", "it does\nnot work"
        if words[:3] == ["ip", "link", "add"]:
            info = {"info_kind": "macvlan", "info_data": {"mode": "private"}}
            self.link = {"link": words[4], "flags": ["UP"], "linkinfo": info}
        if words[:3] == ["ip", "link", "delete"]:
            self.link = None
        if words[:3] == ["systemctl", "enable", "--now"]:
            self.is_unit_running = True
        if words[:3] == ["systemctl", "disable", "--now"]:
            self.is_unit_running = False
        return 0, "", ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(provision, "_output", made.run)
    return made


def decision(manager: Manager, mode: Mode = Mode.MACVLAN, *, ipv6: bool = False) -> Decision:
    network_file = NETWORKD_FILE if manager is Manager.NETWORKD else ""
    parent = Parent("eth0", "10.0.0.21/24", "10.0.0.1", "", "", manager, network_file, "")
    return Decision(mode, parent, {}, "", has_ipv6=ipv6)


def provide(
    host: Host, wanted: Decision | None, *, check: bool = False, networkd: bool = False
) -> list[str]:
    """What was done; every time a second run has nothing to do, and a run in check mode changes nothing
    and says the same."""
    before = (host.files(), host.forwarding(), host.link, list(host.ran))
    trial = provisioner(host, check=True)
    step(trial, wanted, networkd)
    assert (host.files(), host.forwarding(), host.link, list(host.ran)) == before
    if check:
        return trial.changes.done
    real = provisioner(host)
    step(real, wanted, networkd)
    assert real.changes.done == trial.changes.done
    assert real.changes.diff == trial.changes.diff
    again = provisioner(host)
    step(again, wanted, networkd)
    assert again.changes.done == []
    return real.changes.done


def provisioner(host: Host, *, check: bool = False) -> Provisioner:
    return Provisioner("cellblock0", check=check, etc=host.etc, proc_sys=host.proc_sys)


def step(one: Provisioner, wanted: Decision | None, networkd: bool) -> None:
    if wanted is None:
        one.remove()
    else:
        one.provide(wanted, networkd)


FILES: list[tuple[Manager, Sequence[str], str]] = [
    (Manager.OWN, [UNIT], "add link eth0 name cellblock0 type macvlan mode private"),
    (Manager.NETWORKMANAGER, [CONNECTION], "parent=eth0\n"),
    (Manager.IFUPDOWN, ["network/interfaces.d/cellblock"], "auto cellblock0\n"),
    (
        Manager.NETWORKD,
        [
            "systemd/network/10-uplink.network.d/cellblock.conf",
            "systemd/network/25-cellblock.netdev",
            "systemd/network/25-cellblock.network",
        ],
        "MACVLAN=cellblock0\n",
    ),
]


@pytest.mark.parametrize(("manager", "files", "text"), FILES)
def test_each_manager_makes_it_at_boot_and_we_make_it_now(
    host: Host, manager: Manager, files: Sequence[str], text: str
) -> None:
    done = provide(host, decision(manager))
    assert sorted(host.files()) == files
    assert text in "".join(host.files().values())
    assert all(content.startswith("#\n# Ansible managed\n#\n") for content in host.files().values())
    assert "cellblock0 is made of eth0" in done
    assert "ip link add link eth0 name cellblock0 type macvlan mode private" in host.ran
    assert host.ran.index("ip link set dev cellblock0 up") > 0
    assert host.is_unit_running is (manager is Manager.OWN)
    assert ("networkctl reload" in host.ran) is (manager is Manager.NETWORKD)
    mode = (host.etc / files[0]).stat().st_mode & 0o777
    assert mode == (0o600 if manager is Manager.NETWORKMANAGER else 0o644)
    # Removal leaves nothing, directories of the parent's file included.
    host.connections = [provisioner(host)._connection_uuid()]
    provide_removed(host)
    assert host.files() == {}
    assert not (host.etc / "systemd/network/10-uplink.network.d").exists()
    assert host.link is None
    assert not host.is_unit_running
    forgets = any(line.startswith("nmcli connection delete uuid") for line in host.ran)
    assert forgets is (manager is Manager.NETWORKMANAGER)


def provide_removed(host: Host) -> None:
    assert provide(host, None)


def test_networkd_hears_of_it_before_there_is_an_interface_or_a_drop_in(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    run = host.run

    def watching(*command: str) -> tuple[int, str, str]:
        if command == ("networkctl", "reload"):
            seen.append(any(path.endswith("cellblock.conf") for path in host.files()))
            seen.append(host.link is not None)
        return run(*command)

    monkeypatch.setattr(provision, "_output", watching)
    provide(host, decision(Manager.NETWORKD))
    assert seen == [False, False]


@pytest.mark.parametrize("after", list(Manager))
@pytest.mark.parametrize("before", list(Manager))
def test_another_manager_takes_over(host: Host, before: Manager, after: Manager) -> None:
    provide(host, decision(before))
    host.connections = [provisioner(host)._connection_uuid()]
    provide(host, decision(after))
    forgets = any(line.startswith("nmcli connection delete") for line in host.ran)
    assert forgets is (before is Manager.NETWORKMANAGER and after is not Manager.NETWORKMANAGER)
    assert sorted(host.files()) == [files for m, files, _ in FILES if m is after][0]
    assert host.is_unit_running is (after is Manager.OWN)


@pytest.mark.parametrize(
    "link",
    [
        {"link": "eth1", "flags": ["UP"], "linkinfo": {"info_kind": "macvlan", "info_data": {"mode": "private"}}},
        {"link": "eth0", "flags": [], "linkinfo": {"info_kind": "macvlan", "info_data": {"mode": "private"}}},
        {"link": "eth0", "flags": ["UP"], "linkinfo": {"info_kind": "macvlan", "info_data": {"mode": "bridge"}}},
        {"link": "eth0", "flags": ["UP"], "linkinfo": {"info_kind": "veth"}},
        {"flags": ["UP"]},
    ],
)  # fmt: skip
def test_an_interface_that_is_another_is_made_anew(host: Host, link: dict[str, Any]) -> None:
    host.link = link
    provide(host, decision(Manager.OWN))
    assert host.ran[:2] == [
        "ip link delete dev cellblock0",
        "ip link add link eth0 name cellblock0 type macvlan mode private",
    ]


def test_routed_sets_forwarding_and_removal_sets_what_was_before(host: Host) -> None:
    done = provide(host, decision(Manager.OWN, Mode.ROUTED, ipv6=True))
    assert host.forwarding() == ("1", "1")
    assert "net.ipv4.ip_forward is set to 1" in done
    text = host.files()["sysctl.d/90-cellblock-jobs.conf"]
    assert "# before us: 0\nnet.ipv4.ip_forward = 1\n" in text
    assert "# IPv6 before us: 0\nnet.ipv6.conf.all.forwarding = 1\n" in text
    # Jobs no longer have IPv6: it alone is given back.
    provide(host, decision(Manager.OWN, Mode.ROUTED))
    assert host.forwarding() == ("1", "0")
    assert "IPv6" not in host.files()["sysctl.d/90-cellblock-jobs.conf"]
    # Somebody turns it off: on again, and the record stays.
    host.set("net/ipv4/ip_forward", "0")
    provide(host, decision(Manager.OWN, Mode.ROUTED))
    assert host.forwarding() == ("1", "0")
    provide(host, decision(Manager.OWN))
    assert host.forwarding() == ("0", "0")
    assert list(host.files()) == [UNIT]
    host.set("net/ipv4/ip_forward", "1")
    provide(host, decision(Manager.OWN, Mode.ROUTED))
    provide_removed(host)
    assert host.forwarding() == ("1", "0")
    assert host.files() == {}


def test_networkd_leaves_routed_jobs_alone(host: Host) -> None:
    provide(host, decision(Manager.NETWORKD, Mode.ROUTED), networkd=True)
    text = host.files()["systemd/network/25-cellblock.network"]
    assert "Name=cbj*\n\n[Link]\nUnmanaged=yes\n" in text
    assert "networkctl reload" in host.ran
    assert host.link is None


def test_check_mode_on_a_clean_host_tells_all_and_shows_files(host: Host) -> None:
    trial = provisioner(host, check=True)
    trial.provide(decision(Manager.OWN), False)
    assert [line.rpartition("/")[2] for line in trial.changes.done] == [
        "cellblock-interface.service is written",
        "cellblock0 is made of eth0",
        "cellblock-interface.service is started",
    ]
    assert "[Service]" in trial.changes.diff[0]["after"]
    assert trial.changes.diff[0]["before"] == ""
    assert host.files() == {}
    assert host.ran == []


def test_a_step_that_fails_is_named(host: Host) -> None:
    host.failing = "ip link add"
    with pytest.raises(ProvisionError) as caught:
        provisioner(host).provide(decision(Manager.OWN), False)
    assert str(caught.value) == (
        "ip link add link eth0 name cellblock0 type macvlan mode private failed: it does not work."
    )


def test_other_files_stay(host: Host) -> None:
    other = host.etc / "systemd/network/10-uplink.network.d/theirs.conf"
    other.parent.mkdir(parents=True)
    other.write_text("[Network]\n")
    provide(host, decision(Manager.NETWORKD))
    provide_removed(host)
    assert list(host.files()) == ["systemd/network/10-uplink.network.d/theirs.conf"]


def test_a_changed_file_is_put_right(host: Host) -> None:
    provide(host, decision(Manager.OWN))
    (host.etc / UNIT).write_text("[Unit]\n")
    assert provide(host, decision(Manager.OWN)) == [f"{host.etc / UNIT} is written"]
    assert host.ran[-1] == "systemctl daemon-reload"
    (host.etc / UNIT).chmod(0o600)
    assert provide(host, decision(Manager.OWN)) == [f"{host.etc / UNIT} is written"]
