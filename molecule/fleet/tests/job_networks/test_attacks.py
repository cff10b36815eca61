"""Attacks from jobs, and from root in a job's network, on a live fleet; then it is verified again.

Every packet of an attack carries a mark, and what looks for it at the targets reads frames off their
interfaces, before any filter of theirs: what is stopped must be stopped at the slave that it leaves.
Every attack has its control: the same program, or the same watch, with something that must arrive.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path
from typing import Any

import pytest
import testinfra

testinfra_hosts = ["ansible://slave1"]

OUTSIDE = "198.51.100.10"
METADATA = "169.254.169.254"
STAND_IN = "outside1"
# A run of `make nightly` tries every port.
SAMPLED_PORTS = 2000

Verify = Callable[..., Any]

# What runs elsewhere: as a job, as root in a job's network, or as root on a host.
PROGRAMS = Path(__file__).parent / "programs"
# Puts a module where Python finds it, for programs that arrive alone.
MODULE = """import sys, types
module = types.ModuleType({name!r})
exec({text!r}, module.__dict__)
sys.modules[{name!r}] = module
"""


def program(name: str) -> str:
    """The program's text, with the module that it imports from beside it."""
    text = (PROGRAMS / f"{name}.py").read_text()
    if "\nfrom frames import " in text:
        text = MODULE.format(name="frames", text=(PROGRAMS / "frames.py").read_text()) + text
    return text


# --- What the tests share -------------------------------------------------------------------------


class Lab:
    """The fleet as the attacker, and who watches, see it."""

    def __init__(self, machines: dict[str, Any]) -> None:
        self.machines = machines
        self.hosts = tuple(machines)
        self.threads = ThreadPoolExecutor(32)
        links = {name: self._links(machine) for name, machine in self.machines.items()}
        self.addresses = {
            name: [a["local"] for link in found for a in link["addr_info"]]
            for name, found in links.items()
        }
        # The cache server has a second leg, for packages.
        self.fleet_address = {
            name: str(machine.ansible.get_variables()["ansible_host"])
            for name, machine in self.machines.items()
        }
        # The one interface that all hosts share with the slave.
        slave = self.network("slave1")
        segment = IPv4Network(
            (slave.get("gateway", self.v4("slave1")), slave.get("prefix_length", 24)), strict=False
        )
        self.mac = {
            name: link["address"]
            for name, found in links.items()
            for link in found
            for a in link["addr_info"]
            if a["family"] == "inet" and IPv4Address(a["local"]) in segment
        }
        self.interface = {
            name: link["ifname"]
            for name, found in links.items()
            for link in found
            for a in link["addr_info"]
            if a["family"] == "inet" and IPv4Address(a["local"]) in segment
        }
        self.link_local = {
            name: [a for a in found if a.startswith("fe80:")]
            for name, found in self.addresses.items()
        }

    @staticmethod
    def _links(machine: Any) -> list[dict[str, Any]]:
        links = json.loads(machine.check_output("ip -json address show up"))
        return [link for link in links if link["ifname"] != "lo"]

    def v4(self, name: str) -> str:
        return self.fleet_address[name]

    def network(self, slave: str) -> dict[str, Any]:
        """The slave's configuration of job networks."""
        text = self.machines[slave].check_output("cat /etc/cellblock/engine.json")
        network: dict[str, Any] = json.loads(text)["network"]
        return network

    def by_gateway(self, slave: str) -> dict[str, str]:
        """For programs in a slot that send frames: whom they may ask to learn where all must go to."""
        return {"allowed": self.v4("cache1")} if self.network(slave)["mode"] == "routed" else {}

    def slots(self, slave: str) -> list[str]:
        network = self.network(slave)
        first = int(IPv4Network(network["addresses"]).network_address)
        return [str(IPv4Address(first + n)) for n in range(network["slots"])]

    def targets(self, *names: str) -> list[list[str]]:
        """Address and hardware address of those that share the slave's link."""
        return [[self.v4(name), self.mac[name]] for name in names if name in self.mac]

    def run(self, where: str, name: str, *, slot: str | None = None, **given: Any) -> Any:
        """What a program prints that runs on a host, as root; in a network slot if a policy is given."""
        encoded = base64.b64encode(program(name).encode()).decode()
        inside = f"cellblock slot --policy {slot} -- " if slot else ""
        done = self.machines[where].run(
            f"echo {encoded} | base64 -d | timeout 120 {inside}python3 -I - "
            f"{shlex.quote(json.dumps(given))}"
        )
        assert done.rc == 0, done.stderr
        return json.loads(done.stdout)

    def job(
        self,
        slave: str,
        name: str,
        policy: str = "internet",
        *,
        fields: Any = None,
        **given: Any,
    ) -> Any:
        """What a program prints that runs in a real job."""
        record = self.record(slave, name, policy, fields=fields, **given)
        (stage,) = record["stages"]
        assert stage["verdict"] == "ok", (stage["verdict"], stage["reason"], stage["stderr"])
        return json.loads(stage["stdout"]["text"])

    def record(
        self,
        slave: str,
        name: str,
        policy: str = "internet",
        *,
        fields: Any = None,
        **given: Any,
    ) -> Any:
        job = self.description(name, policy, fields=fields, **given)
        encoded = base64.b64encode(json.dumps(job).encode()).decode()
        done = self.machines[slave].run(f"echo {encoded} | base64 -d | timeout 300 cellblock run -")
        assert done.stdout, done.stderr
        return json.loads(done.stdout.splitlines()[0])

    @staticmethod
    def description(name: str, policy: str, *, fields: Any = None, **given: Any) -> Any:
        return {
            "environment": "python",
            "files": {"attack.py": {"text": program(name)}},
            "stages": [
                {
                    "name": "attack",
                    "command": ["python3", "attack.py", json.dumps(given)],
                    "network": policy,
                    "constraints": {
                        "wall_time_ms": 120_000,
                        "cpu_time_ms": 110_000,
                        "memory_bytes": "512MiB",
                        "open_files": 4096,
                    },
                    **(fields or {}),
                }
            ],
        }

    @contextlib.contextmanager
    def background(
        self, where: str, name: str, *, slot: str | None = None, **given: Any
    ) -> Iterator[Future[Any]]:
        """A program that goes on until the end of the block; its output is the future's."""
        ready = f"/run/attack-{secrets.token_hex(8)}"
        future = self.threads.submit(
            self.run, where, name, slot=slot, ready=ready, seconds=100, **given
        )
        try:
            waited = self.machines[where].run(
                f"for i in $(seq 100); do test -e {ready} && exit 0; sleep 0.1; done; exit 1"
            )
            if waited.rc != 0:
                raise AssertionError(future.result(5))
            yield future
        finally:
            self.machines[where].run(f"sleep 0.3; rm -f {ready}")

    @contextlib.contextmanager
    def watched(
        self, marks: Sequence[str], hosts: Sequence[str] | None = None, siblings: bool = True
    ) -> Iterator[Callable[[str], dict[str, int]]]:
        """Looks for marks at hosts, and in a sibling slot on both slaves; then says by mark where
        how many came in.
        """
        with contextlib.ExitStack() as stack:
            futures = {
                name: stack.enter_context(self.background(name, "watch", marks=marks))
                for name in (self.hosts if hosts is None else hosts)
            }
            if siblings:
                for slave in ("slave1", "slave2"):
                    futures[f"{slave}/sibling"] = stack.enter_context(
                        self.background(slave, "watch", slot="internet", marks=marks)
                    )

            def counts(mark: str) -> dict[str, int]:
                stack.close()
                results = {name: future.result(30) for name, future in futures.items()}
                assert not any(r["missed"] for r in results.values()), results
                return {name: r["counts"][mark] for name, r in results.items() if r["counts"][mark]}

            yield counts


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Lab:
    options = {"ansible_inventory": request.config.option.ansible_inventory}
    machines = {
        machine.backend.get_pytest_id().removeprefix("ansible://"): machine
        for machine in testinfra.get_hosts(["ansible://all"], **options)
    }
    machines.pop("localhost", None)
    return Lab(machines)


@pytest.fixture(params=["slave1", "slave2"])
def slave(request: pytest.FixtureRequest) -> str:
    """Who the attack comes from: slave1's jobs are clones on the segment, slave2 routes for its jobs."""
    return str(request.param)


@pytest.fixture
def mark() -> str:
    return f"attack-{secrets.token_hex(4)}"


@pytest.fixture
def control() -> str:
    return f"honest-{secrets.token_hex(4)}"


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.3)


def container(address: str) -> str:
    """The container that has an address."""
    # Not checked: a container of somebody else may end in between.
    command = "docker inspect $(docker ps --quiet --filter label=org.cellblock.fleet)"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    for found in json.loads(shown.stdout):
        networks = found["NetworkSettings"]["Networks"].values()
        if address in [network["IPAddress"] for network in networks]:
            return str(found["Name"].lstrip("/"))
    raise AssertionError(f"no container has the address {address}")


def networked(lab: Lab, slave: str = "slave1") -> bool:
    record = lab.record(slave, "connect", places=[[lab.v4("cache1"), 3142, "tcp"]])
    return bool(record.get("verdict") == "ok")


# --- Reaching ports -------------------------------------------------------------------------------


def ports_that_count(lab: Lab) -> list[int]:
    """Those on which anything listens anywhere in the fleet, and some of all others, other ones each time."""
    listening = {
        int(line.split()[3].rpartition(":")[2])
        for machine in lab.machines.values()
        for line in machine.check_output("ss -Hltn").splitlines()
    }
    return sorted(listening | set(random.sample(range(1, 65536), SAMPLED_PORTS)))


def test_a_port_scan_finds_what_is_allowed_and_nothing_else(
    lab: Lab, slave: str, thorough: bool
) -> None:
    """Of every address of the fleet, and of the slave that the job runs on."""
    ports = None if thorough else ports_that_count(lab)
    if ports:
        assert {22, 53, 3142, 5432} <= set(ports)
    addresses = sorted(
        {
            address
            for name in lab.hosts
            if name != STAND_IN
            for address in lab.addresses[name]
            if not address.startswith("fe80:")
        }
    )
    # There is something to be found: the slave's own ssh, for one.
    assert lab.machines[slave].socket("tcp://22").is_listening
    # Two jobs at a time, of four addresses at most: a job has 110 s of processor time.
    shares = [addresses[first : first + 4] for first in range(0, len(addresses), 4)]
    with ThreadPoolExecutor(2) as pair:
        found = list(
            pair.map(lambda share: lab.job(slave, "scan", addresses=share, ports=ports), shares)
        )
    assert sum(one["tried"] for one in found) == len(ports or range(1, 65536)) * len(addresses)
    reached = [place for one in found for place in one["reached"]]
    assert sorted((a, p) for a, p, _ in reached) == [
        (lab.v4("cache1"), 53),
        (lab.v4("cache1"), 3142),
    ]


def test_a_job_reaches_no_other_job(lab: Lab) -> None:
    everybody = [a for slave in ("slave1", "slave2") for a in lab.slots(slave)]
    places = [[a, 7777, kind] for a in everybody for kind in ("tcp", "udp")]
    # The control within: the listening job is the first of its own visitors.
    listening = lab.threads.submit(lab.job, "slave1", "listen", cache=lab.v4("cache1"), seconds=15)
    time.sleep(2)
    trying = [
        lab.threads.submit(lab.job, slave, "connect", places=places, timeout=0.2, seconds=5)
        for slave in ("slave1", "slave2")
    ]
    tried = [future.result() for future in trying]
    heard = listening.result()
    assert heard["own"] in lab.slots("slave1")
    assert (heard["tcp"], heard["udp"]) == ([heard["own"]], [heard["own"]])
    for one in tried:
        answers = {r for round_ in one["rounds"] for r in round_.values()}
        assert "open" not in answers
        assert "refused" not in answers


def test_metadata_and_resolvers_of_others_are_out_of_reach(lab: Lab, slave: str) -> None:
    with lab.background(STAND_IN, "serve_once", port=80) as served:
        # Outside answers at both addresses: to itself, and to a job at the public one.
        own = lab.run(STAND_IN, "connect",
                      places=[[METADATA, 80, "tcp"]])  # fmt: skip
        assert own["rounds"] == [{f"{METADATA}:80": "open"}]
        tried = lab.job(
            slave,
            "connect",
            places=[[METADATA, 80, "tcp"], [OUTSIDE, 80, "tcp"], [OUTSIDE, 53, "tcp"]],
        )
    assert tried["rounds"] == [
        {f"{METADATA}:80": "no", f"{OUTSIDE}:80": "open", f"{OUTSIDE}:53": "no"}
    ]
    assert len(served.result(30)) == 2


# --- Names ----------------------------------------------------------------------------------------


def test_names(lab: Lab, slave: str) -> None:
    """A job's resolver answers it, tells it nothing of the fleet, and no other resolver does."""
    cache = lab.v4("cache1")
    fleet, nobody = "database1.cellblock.internal", "nosuch.invalid"
    answers = lab.job(
        slave, "ask", questions=[[cache, nobody], [cache, fleet], [OUTSIDE, nobody], [lab.v4("master1"), nobody]]
    )  # fmt: skip
    assert answers[0] is not None, "the control: its own resolver answers"
    assert answers[1] == [5, []], "refused"
    assert answers[2:] == [None, None]


@pytest.fixture
def names(lab: Lab) -> Iterator[Callable[..., None]]:
    """What names mean on the slave, for the supervisor that resolves them."""
    slave = lab.machines["slave1"]
    slave.check_output("cp /etc/hosts /run/attack-hosts")

    def mean(**entries: str) -> None:
        lines = "".join(f"{address} {name}.example\n" for name, address in entries.items())
        encoded = base64.b64encode(lines.encode()).decode()
        slave.check_output(f"(cat /run/attack-hosts; echo {encoded} | base64 -d) > /etc/hosts")

    yield mean
    # Docker mounts the file: it is written, not replaced.
    slave.check_output("cat /run/attack-hosts > /etc/hosts; rm /run/attack-hosts")


def allowing(name: str, port: int) -> dict[str, Any]:
    return {"network_allow": [{"to": name, "protocol": "tcp", "ports": [port]}]}


def test_a_name_with_a_private_answer_is_refused_before_the_job_starts(
    lab: Lab, names: Callable[..., None]
) -> None:
    names(inner=lab.v4("database1"), cloud=METADATA, outer=OUTSIDE)
    for name in ("inner", "cloud"):
        record = lab.record(
            "slave1", "connect", "allow", fields=allowing(f"{name}.example", 80), places=[]
        )
        assert "error" in record, record
        assert f"{name}.example" in record["error"]["text"]
    # The control: the same with a public answer.
    with lab.background(STAND_IN, "serve_once", port=80):
        done = lab.job("slave1", "connect", "allow", fields=allowing("outer.example", 80),
                       places=[["outer.example", 80, "tcp"]])  # fmt: skip
    assert done["rounds"] == [{"outer.example:80": "open"}]


def test_a_name_that_changes_its_mind_stays_what_it_was(
    lab: Lab, names: Callable[..., None]
) -> None:
    """Rebinding: public when the job is prepared, private while it runs."""
    names(fickle=OUTSIDE)
    database = lab.v4("database1")
    with lab.background(STAND_IN, "serve_once", port=80):
        running = lab.threads.submit(
            lab.job,
            "slave1",
            "connect",
            "allow",
            fields=allowing("fickle.example", 80),
            places=[["fickle.example", 80, "tcp"], [database, 80, "tcp"], [database, 22, "tcp"]],
            seconds=6,
            timeout=0.5,
        )
        time.sleep(2)
        names(fickle=database)
        rounds = running.result()["rounds"]
    assert len(rounds) > 10
    assert {r["fickle.example:80"] for r in rounds} == {"open"}
    assert {r[f"{database}:{port}"] for r in rounds for port in (22, 80)} == {"no"}


# --- The cache server as a relay ------------------------------------------------------------------


def test_the_cache_server_relays_nothing(lab: Lab) -> None:
    cache, database = lab.v4("cache1"), lab.v4("database1")
    places = [f"{database}:22", f"{database}:9100", "127.0.0.1:9100", f"{OUTSIDE}:80",
              f"{METADATA}:80", f"{cache}:22"]  # fmt: skip
    requests = []
    for place in places:
        requests += [
            f"GET http://{place}/ HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\n\r\n",
            f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\nGET / HTTP/1.0\r\n\r\n",
            f"GET / HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\n\r\n",
            f"GET /{place}/ HTTP/1.1\r\nHost: {cache}:3142\r\nConnection: close\r\n\r\n",
            f"GET //{place}/ HTTP/1.0\r\n\r\n",
        ]
    legitimate = (
        f"GET /debian/dists/bookworm/InRelease HTTP/1.1\r\nHost: {cache}:3142\r\n"
        "Connection: close\r\n\r\n"
    )
    with (
        lab.background(STAND_IN, "serve_once", port=80) as outside,
        lab.background("cache1", "serve_once", port=9100) as own,
    ):
        # The control: the cache server itself can reach both.
        ok = lab.run("cache1", "connect", places=[[OUTSIDE, 80, "tcp"], ["127.0.0.1", 9100, "tcp"]])
        assert set(ok["rounds"][0].values()) == {"open"}
        answers = lab.job(
            "slave1", "talk", address=cache, port=3142, requests=[*requests, legitimate]
        )
    assert (len(outside.result(30)), len(own.result(30))) == (1, 1), "the controls, and nobody else"
    for request, answer in zip(requests, answers, strict=False):
        assert "secret" not in answer, request
        assert "SSH-2.0" not in answer, request
        assert " 200 " not in answer.split("\r\n")[0], (request, answer[:200])
    assert " 200 " in answers[-1].split("\r\n")[0], answers[-1][:200]


# --- Root in a slot: frames -----------------------------------------------------------------------


def test_ipv6_leads_nowhere_from_a_slot(lab: Lab, slave: str, mark: str, control: str) -> None:
    targets = [
        [address, lab.mac[name]]
        for name in lab.mac
        for address in lab.addresses[name]
        if ":" in address
    ]
    routes = {n: lab.machines[n].check_output("ip -6 route show default") for n in lab.hosts}
    with lab.watched([mark, control]) as arrived:
        lab.run(slave, "attack_ipv6", slot="internet", **lab.by_gateway(slave), mark=mark, interface="job0",
                targets=targets, enable=True)  # fmt: skip
        # The control: what comes from a host that nothing of ours filters is seen by the watch.
        lab.run(STAND_IN, "attack_ipv6", mark=control, interface=lab.interface[STAND_IN],
                targets=targets)  # fmt: skip
        attack = arrived(mark)
        seen = arrived(control)
    assert attack == {}
    assert {"cache1", "database1", "slave1", "slave2"} <= set(seen), seen
    # That control was a router advertisement too; nobody believes any.
    assert routes == {
        n: lab.machines[n].check_output("ip -6 route show default") for n in lab.hosts
    }


def test_nobody_elses_address_can_be_claimed(lab: Lab, slave: str, mark: str, control: str) -> None:
    claims = lab.targets("slave1", "master1", STAND_IN)
    # Other jobs' as well; the slot leaves out its own.
    prefix = lab.network(slave)["mac_prefix"]
    for slot in lab.slots(slave):
        claims.append(
            [slot, ":".join([prefix, *(f"{b:02x}" for b in ip_address(slot).packed[1:])])]
        )
    targets = lab.targets("cache1", "database1", "slave1", "slave2", STAND_IN)
    with lab.watched([mark, control]) as arrived:
        done = lab.run(slave, "attack_spoof", slot="internet", **lab.by_gateway(slave), mark=mark, control=control,
                       claims=claims, targets=targets, honest=lab.targets("cache1")[0])  # fmt: skip
        attack, honest = arrived(mark), arrived(control)
    assert len(done["sent"]) > 50
    assert attack == {}
    assert honest == {"cache1": 1}


def test_an_arp_scan_finds_no_other_job(lab: Lab) -> None:
    everybody = [a for slave in ("slave1", "slave2") for a in lab.slots(slave)]
    hosts = [lab.v4(name) for name in lab.mac]
    with lab.watched([], hosts=[]):  # two siblings that could answer
        found = lab.run("slave1", "attack_arp", slot="internet", addresses=[*everybody, *hosts])
    assert not set(found["answered"]) & set(everybody)
    # The control: who may be reached does answer.
    assert lab.v4("cache1") in found["answered"]
    # A job has no packet sockets; what it learns is who it may reach.
    places = [[a, 80, kind] for a in [*everybody, *hosts] for kind in ("tcp", "udp")]
    done = lab.job(
        "slave1", "connect", places=[*places, [lab.v4("cache1"), 3142, "tcp"]], timeout=0.1
    )
    assert lab.v4("cache1") in done["neighbours"]
    assert not set(done["neighbours"]) & (set(everybody) | set(hosts) - {
        lab.v4("cache1"), lab.v4(STAND_IN)})  # fmt: skip


def test_frames_to_hosts_that_no_policy_names_are_stopped_by_the_guard(
    lab: Lab, slave: str, mark: str, control: str
) -> None:
    """A packet socket goes past the slot's rules for packets; its own address in it is true."""
    targets = lab.targets("database1", "master1", "slave1", "slave2")
    with lab.watched([mark, control]) as arrived:
        tried = lab.run(slave, "attack_stream", slot="internet", **lab.by_gateway(slave), mark=mark, control=control,
                        targets=targets, honest=lab.v4("cache1"), frames=True, seconds=3)  # fmt: skip
        attack, honest = arrived(mark), arrived(control)
    assert tried > 100
    assert attack == {}
    assert set(honest) == {"cache1"}


# --- While things go wrong ------------------------------------------------------------------------


@contextlib.contextmanager
def streaming(lab: Lab, mark: str, control: str, seconds: int) -> Iterator[Future[Any]]:
    """A constant stream from a slot to everybody who may not be reached, siblings included."""
    targets = lab.targets("database1", "master1", "slave1", "slave2")
    targets += [[a, "ff:ff:ff:ff:ff:ff"] for s in ("slave1", "slave2") for a in lab.slots(s)]
    stream = lab.threads.submit(
        lab.run, "slave1", "attack_stream", slot="internet", mark=mark, control=control,
        targets=targets, honest=lab.v4("cache1"), seconds=seconds,
    )  # fmt: skip
    time.sleep(1)
    yield stream


# Everything of ours that loads rules on a host, loaded anew.
RELOAD = """
for n in 1 2 3 4 5; do
  for unit in $(systemctl list-units --plain --no-legend 'cellblock-firewall*.service' 'cellblock-*guard*.service' | awk '{print $1}'); do
    systemctl restart $unit || exit 1
  done
  /usr/local/sbin/cellblock-firewall load || exit 1
done
"""


def test_no_packet_gets_through_while_rules_are_reloaded(lab: Lab, mark: str, control: str) -> None:
    with lab.watched([mark, control]) as arrived:
        with streaming(lab, mark, control, 15) as stream:
            for name in ("slave1", "slave2", "database1"):
                done = lab.machines[name].run(RELOAD)
                assert done.rc == 0, done.stderr
            tried = stream.result()
        attack, honest = arrived(mark), arrived(control)
    print(f"{tried} packets tried during 15 reloads")
    assert tried > 10_000
    assert attack == {}
    assert honest.keys() == {"cache1"}


def test_a_running_job_stays_filtered_when_the_hosts_rules_are_flushed(lab: Lab) -> None:
    cache, database = lab.v4("cache1"), lab.v4("database1")
    slave = lab.machines["slave1"]
    assert networked(lab)
    running = lab.threads.submit(
        lab.job, "slave1", "connect", seconds=12, timeout=0.3,
        places=[[cache, 3142, "tcp"], [database, 22, "tcp"], [database, 5432, "tcp"],
                [lab.v4("slave1"), 22, "tcp"], [lab.v4("slave2"), 22, "tcp"]],
    )  # fmt: skip
    time.sleep(2)
    tables = json.loads(slave.check_output("cat /etc/cellblock/engine.json"))["network"]["guard"]
    # What repairs the rules is quick: it is held for as long as it takes to see what it saves from.
    job = self_contained(lab)
    units = (
        "$(systemctl list-units --plain --no-legend 'cellblock-*guard*.service' | cut -d' ' -f1)"
    )
    shown = slave.run(
        f"systemctl kill --signal=STOP {units}; nft flush ruleset; {job};"
        f" systemctl kill --signal=CONT {units}"
    )
    rounds = running.result()["rounds"]
    forbidden = {answer for r in rounds for place, answer in r.items() if cache not in place}
    assert len(rounds) > 5
    assert forbidden == {"no"}
    assert {r[f"{cache}:3142"] for r in rounds[:3]} == {"open"}
    if tables["tables"]:
        refused = json.loads(shown.stdout.splitlines()[0])
        assert "error" in refused, "a job with a network started without the host's rules"
        assert "is not loaded on this host" in refused["error"]["text"]
    wait_for(lambda: networked(lab), 30, "jobs have a network again")


def self_contained(lab: Lab) -> str:
    job = lab.description("connect", "internet", places=[])
    encoded = base64.b64encode(json.dumps(job).encode()).decode()
    return f"echo {encoded} | base64 -d | timeout 60 cellblock run -"


def test_the_supervisor_is_killed(lab: Lab, mark: str, control: str) -> None:
    slave = lab.machines["slave1"]
    with lab.watched([mark, control], siblings=False) as arrived:
        with streaming(lab, mark, control, 8) as stream:
            slave.check_output("systemctl kill --kill-whom=main --signal=KILL cellblock.service")
            tried = stream.result()
        attack, honest = arrived(mark), arrived(control)
    # The slot outlives the service for as long as somebody is in it, and so does its filter.
    assert tried > 1000
    assert attack == {}
    assert honest.keys() == {"cache1"}
    wait_for(lambda: networked(lab), 30, "jobs run again")
    done = lab.job("slave1", "connect", places=[[lab.v4("database1"), 22, "tcp"]])
    assert done["rounds"] == [{f"{lab.v4('database1')}:22": "no"}]


def test_nothing_of_a_job_is_seen_by_the_next_at_its_address(lab: Lab, slave: str) -> None:
    count = lab.network(slave)["slots"] + 2
    place = {"address": lab.v4("cache1"), "port": 3142}
    jobs = [lab.description("traces", "internet", connections=5, **place)]
    jobs += [lab.description("traces", "internet", connections=1, **place) for _ in range(count)]
    told = []
    for job in jobs:
        encoded = base64.b64encode(json.dumps(job).encode()).decode()
        record = json.loads(
            lab.machines[slave].check_output(f"echo {encoded} | base64 -d | cellblock run -")
        )
        assert record["verdict"] == "ok", record
        told.append(json.loads(record["stages"][0]["stdout"]["text"]))
    # The control: there was something to be seen, at the end of the first.
    after = told[0]["after"]
    assert after["sockets"] >= 5
    assert after["neighbours"] >= 1
    assert (after["opens"], after["unix"]) == (5, 1)
    assert len({one["own"] for one in told}) < len(told), "no address was used twice"
    for one in told:
        seen = {key: one["before"][key] for key in ("sockets", "opens", "unix")}
        assert seen == {"sockets": 0, "opens": 0, "unix": 0}, one
        assert one["before"]["sent_packets"] <= 2, one
    # A host may look for an address between the slot's opening and the job's first line; hardly twice.
    asked = [one for one in told if one["before"]["neighbours"]]
    assert len(asked) <= 1, asked


def test_the_slave_is_restarted(lab: Lab, mark: str, control: str) -> None:
    subprocess.run(
        ["docker", "restart", container(lab.v4("slave1"))], check=True, capture_output=True
    )

    def is_back() -> bool:
        # While it boots, the connection fails.
        with contextlib.suppress(Exception):
            return networked(lab)
        return False

    wait_for(is_back, 120, "the slave runs jobs again")
    with lab.watched([mark, control], hosts=[n for n in lab.hosts if n != "slave1"]) as arrived:
        with streaming(lab, mark, control, 3) as stream:
            assert stream.result() > 500
        attack, honest = arrived(mark), arrived(control)
    assert attack == {}
    assert honest.keys() == {"cache1"}


# --- And after all of it --------------------------------------------------------------------------


def test_everything_is_as_declared_after_the_attacks(verify_isolation: Verify) -> None:
    done = verify_isolation()
    assert done.status == 0, done.printed
