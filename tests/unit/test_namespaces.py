"""Network namespaces that belong to another user namespace."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from cellblock.linux import netlink


@pytest.fixture
def container() -> Iterator[int]:
    """A process in a user namespace below this one's."""
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "sh", "-c", "echo; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def enters(pid: int, namespace: int) -> bool:
    """Whether root there may enter the network namespace."""
    done = subprocess.run(
        [
            *("nsenter", f"--target={pid}", "--user", "--preserve-credentials"),
            *("nsenter", f"--net=/proc/self/fd/{namespace}", "true"),
        ],
        pass_fds=[namespace],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def test_root_of_a_container_may_enter_its_own_and_no_other(container: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    own, other = netlink.new_namespace_of(container), netlink.new_namespace()
    try:
        assert os.fstat(own).st_ino != os.fstat(other).st_ino
        assert enters(container, own)
        assert not enters(container, other)
        with netlink.inside(own):
            ours = netlink.Netlink()
        assert [link.name for link in ours.links()][:1] == ["lo"]
        ours.close()
    finally:
        os.close(own)
        os.close(other)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_is_gone_has_none() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(FileNotFoundError):
        netlink.new_namespace_of(process.pid)


def test_an_interface_gets_another_name_beside_its_own() -> None:
    namespace = netlink.new_namespace()
    mac = bytes.fromhex("02420a0b0c0d")
    try:
        with netlink.inside(namespace):
            client = netlink.Netlink()
            client.add_veth("first", "second", mac, namespace)
            (link,) = (one for one in client.links() if one.mac == mac)
            client.set_up(link.index)
            client.add_name(link.index, "net-of.some_network-or-other")
            shown = subprocess.run(
                ["ip", "-json", "link", "show", "net-of.some_network-or-other"],
                capture_output=True,
                check=True,
            )
            with pytest.raises(netlink.NetlinkError):
                client.add_name(link.index, "net-of.some_network-or-other")
            client.close()
    finally:
        os.close(namespace)
    (found,) = json.loads(shown.stdout)
    assert (found["ifindex"], found["ifname"]) == (link.index, "second")
    assert "UP" in found["flags"]
