"""The local fleet is closed: what its hosts send stays on this machine, and the counters that say so
are able to count.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://outside1"]
ROOT = Path(__file__).resolve().parents[4]

# Of the fleet's internet, but owned by no host: a packet to it has nowhere to go but off the machine.
NOBODY = "198.51.100.77"


def docker(*arguments: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["docker", *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(host: Any) -> str:
    """The image of the fleet's hosts: it has nft, which this machine need not have."""
    address = host.ansible.get_variables()["ansible_host"]
    for name in docker(
        "ps", "--format", "{{.Names}}", "--filter", f"label=org.cellblock.checkout={ROOT}"
    ).split():
        [container] = json.loads(docker("inspect", name))
        networks = container["NetworkSettings"]["Networks"].values()
        if address in [network["IPAddress"] for network in networks]:
            bridge = next(n for n in container["NetworkSettings"]["Networks"])
            [network] = json.loads(docker("network", "inspect", bridge))
            prefix = network["Options"]["com.docker.network.bridge.name"].rpartition("-")[0]
            return f"{container['Image']} cellblock_{prefix.removeprefix('cb')}"
    raise AssertionError(f"no container of this checkout has the address {address}")


@pytest.fixture
def nft(image: str) -> Any:
    """Runs nft on this machine."""
    picture, _ = image.split()
    prefix = "run --rm -i --network host --cap-drop ALL --cap-add NET_ADMIN --entrypoint nft"
    return lambda *arguments: docker(*prefix.split(), picture, *arguments)


@pytest.fixture
def counters(nft: Any, image: str) -> Any:
    """Reads the packets of every counter of the closure."""
    _, table = image.split()

    def read() -> dict[str, int]:
        listed = json.loads(nft("--json", "list", "counters"))["nftables"]
        found = [entry["counter"] for entry in listed if "counter" in entry]
        return {entry["name"]: entry["packets"] for entry in found if entry["table"] == table}

    return read


def test_nothing_has_left_the_machine(counters: Any) -> None:
    seen = counters()
    assert seen["left_the_machine"] == 0
    assert seen.get("left_by_uplink", 0) == 0
    assert seen["packages_out"] > 0, "the hosts' packages must have come by the way that is counted"


def test_crafted_packets_are_dropped(host: Any, counters: Any) -> None:
    """A host that ignores its gateway and sends to this machine what it should forward."""
    before = counters()
    variables = host.ansible.get_variables()
    bridge = re.sub(r"\d+$", "1", variables["ansible_host"])
    send = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        f" [s.sendto(b'cellblock', ('{NOBODY}', 9)) for _ in range(5)]"
    )
    host.check_output(f"ip route replace {NOBODY}/32 via {bridge}")
    try:
        host.check_output(f'python3 -c "{send}"')
        # And to this machine itself, where something does listen: the machine's own ssh or not.
        host.check_output(
            'python3 -c "import socket; s = socket.socket(); s.settimeout(1);'
            f" s.connect_ex(('{bridge}', 22))\""
        )
    finally:
        host.check_output(f"ip route del {NOBODY}/32")
    after = counters()
    assert after["refused_forward"] - before["refused_forward"] == 5
    assert after["refused_input"] > before["refused_input"]
    assert after["left_the_machine"] == 0
    assert after.get("left_by_uplink", 0) == 0


def test_a_flushed_closure_is_loaded_again(playbook: Any, nft: Any, image: str) -> None:
    """A flush leaves the table, with the comment that tells which rules it had."""
    _, table = image.split()
    before = nft("--stateless", "list", "table", "inet", table)
    nft("flush", "table", "inet", table)
    assert " drop\n" in before
    assert " drop\n" not in nft("list", "table", "inet", table)
    # What is made once for all hosts, and one of them.
    done = playbook("local-fleet-create.yml", "--limit=outside1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert nft("--stateless", "list", "table", "inet", table) == before


# In namespaces of a container without any network: a fleet bridge with a host behind it, and an
# "uplink". The machine's own tables are loaded there, then one layer after the other is opened.
CONTROL = r"""
import json, re, subprocess, sys
rules, bridge, uplink = sys.argv[1:]
def sh(command, stdin=None):
    return subprocess.run(command, shell=True, check=True, input=stdin, text=True,
                          capture_output=True, timeout=20).stdout
sh(f"ip link add {bridge} type bridge && ip link set {bridge} up && ip addr add 10.9.0.1/24 dev {bridge}")
sh("ip netns add inner && ip link add v0 type veth peer name v1 netns inner")
sh(f"ip link set v0 master {bridge} up && ip -n inner link set v1 up && ip -n inner addr add 10.9.0.2/24 dev v1")
sh("ip -n inner route add default via 10.9.0.1")
sh(f"ip netns add world && ip link add {uplink} type veth peer name u1 netns world")
sh(f"ip link set {uplink} up && ip addr add 10.8.0.1/24 dev {uplink} && ip -n world link set u1 up")
sh(f"ip neigh add 10.8.0.2 lladdr 02:00:00:00:00:01 dev {uplink} && ip route add default via 10.8.0.2")
sh("sysctl -qw net.ipv4.ip_forward=1")
def counts(text):
    sh("nft -f -", stdin="flush ruleset\n" + text)
    sh("ip netns exec inner python3 -c \"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
       " [s.sendto(b'x', ('198.51.100.77', 9)) for _ in range(3)]\"")
    listed = json.loads(sh("nft -j list counters"))["nftables"]
    return {e["counter"]["name"]: e["counter"]["packets"] for e in listed if "counter" in e}
closed = counts(rules)
no_forward = re.sub(r'iifname @bridges counter name "?refused_forward"? drop', "", rules)
assert no_forward != rules
no_postrouting = re.sub(r'meta mark 0x\w+ oifname != @bridges counter name "?left_the_machine"? drop', "", no_forward)
assert no_postrouting != no_forward
print(json.dumps([closed, counts(no_forward), counts(no_postrouting)]))
"""


def test_each_layer_counts_what_the_one_before_lets_through(nft: Any, image: str) -> None:
    picture, table = image.split()
    tables = nft("--stateless", "list", "table", "inet", table)
    listed = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    if "default" not in listed:
        pytest.skip("this machine has no default route, so there is no uplink to watch")
    uplink_rules = nft("--stateless", "list", "table", "netdev", table)
    [uplink] = re.findall(r'device "?([\w.-]+)"?', uplink_rules)
    [bridge] = [name for name in re.findall(r'"(cb\w+-\w+)"', tables) if name.endswith("fleet")][:1]
    capabilities = "--cap-add NET_ADMIN --cap-add SYS_ADMIN --security-opt seccomp=unconfined"
    options = f"run --rm -i --network none {capabilities} --security-opt apparmor=unconfined"
    output = docker(
        *options.split(),
        *("--security-opt", "systempaths=unconfined"),
        *("--entrypoint", "python3", picture, "-c", CONTROL, tables + uplink_rules, bridge, uplink),
    )
    closed, no_forward, no_postrouting = json.loads(output)
    assert closed["refused_forward"] == 3
    assert closed["left_the_machine"] == closed["left_by_uplink"] == 0
    assert no_forward["left_the_machine"] == 3
    assert no_forward["left_by_uplink"] == 0
    assert no_postrouting["left_by_uplink"] == 3
