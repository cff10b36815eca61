"""The experiment with child containers: what is expected, what proves it, and what differs from it."""

from __future__ import annotations

import io
import json
import socket
import struct
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _child_container as plan,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _child_container_lab as lab,
)
from ansible_collections.cellblock.fleet.plugins.module_utils import (
    _child_container_peer as peer,
)

ROOT = Path(__file__).resolve().parents[4]
STEPS = {step.name: step for step in plan.STEPS}


def as_expected(step: plan.Step, sender: str, request: plan.Request) -> plan.Observation:
    """What is seen when all is as expected."""
    reached = request.expected == plan.REACHED
    answer = {"error": "name not known" if request.evidence == plan.NAMELESS else "timed out"}
    if reached:
        answer = {"answered_by": request.target.name, "seen_as": "10.77.1.50"}
    arrived = 0 if request.evidence == plan.STAYED else 1
    dropped = request.evidence == plan.DROPPED or (
        request.evidence == plan.STAYED and step.filter == "worker inet output"
    )
    return plan.observation("userns", step, sender, request, answer, (arrived, 60), int(dropped))


def everything() -> list[plan.Observation]:
    return [
        as_expected(step, sender, request)
        for step in plan.STEPS
        for sender in plan.SENDERS
        for request in step.requests(sender)
    ]


def request_of(step: str, sender: str, target: str) -> tuple[plan.Step, plan.Request]:
    found = [one for one in STEPS[step].requests(sender) if one.target.name == target]
    return STEPS[step], found[0]


# --- What is expected -----------------------------------------------------------------------------


def test_every_denial_has_its_control() -> None:
    """What is denied in one step is reached in another, by the same sender at the same address."""
    reached: set[tuple[str, str]] = set()
    denied: set[tuple[str, str]] = set()
    for step in plan.STEPS:
        for sender in plan.SENDERS:
            for one in step.requests(sender):
                (reached if one.expected == plan.REACHED else denied).add((sender, one.host))
    # The one name that an engine within never asks further for is known to the other senders.
    assert denied - reached == {("child_user_network", plan.BARE_NAME)}


def test_every_denial_says_what_proves_it() -> None:
    for step in plan.STEPS:
        for sender in plan.SENDERS:
            for one in step.requests(sender):
                assert bool(one.evidence) == (one.expected == plan.DENIED)


@pytest.mark.parametrize("step", [step for step in plan.STEPS if "slave" in step.filter])
def test_no_filter_on_the_slave_tells_worker_from_child(step: plan.Step) -> None:
    wanted = [tuple(step.requests(sender)) for sender in plan.SENDERS]
    # Those without a way to ask have nothing to be told apart by.
    assert len({requests for requests in wanted if requests}) == 1
    assert all(wanted) or step.topology == plan.LINK_LOCAL


def test_the_workers_own_rules_stop_those_in_its_namespace_alone() -> None:
    stopped = {
        sender
        for sender in plan.SENDERS
        if request_of("worker's output chain", sender, "database")[1].expected == plan.DENIED
    }
    assert stopped == plan.IN_WORKERS_NAMESPACE


def test_forbidden_hosts_and_the_cache_server_are_in_every_arrangement() -> None:
    for step in plan.STEPS:
        asked = {one.target.name for one in step.requests("worker")}
        assert plan.CACHE.name in asked
        if "name" not in step.name and "false denial" not in step.name:
            assert {"database", "memory_database", "request_handler"} < asked
    assert "metadata" in {one.target.name for one in STEPS["other host"].requests("worker")}


# --- What was seen --------------------------------------------------------------------------------


def test_what_is_as_expected_is_no_difference() -> None:
    seen = everything()
    assert plan.differences(seen) == []
    assert plan.missing(seen, ["userns"]) == []


@pytest.mark.parametrize(
    ("step", "sender", "target", "answer", "arrived", "dropped"),
    [
        # Who answers is not who was asked for.
        ("same bridge", "worker", "database", {"answered_by": "cache_server"}, 1, 0),
        # Connected, and nothing said.
        ("same bridge", "worker", "database", {"error": "another answer"}, 1, 0),
        # Denied, but no rule counted it: it may be down.
        ("slave's forward chain", "worker", "database", {"error": "timed out"}, 1, 0),
        # Denied, but it did not get as far as the rules.
        ("slave's forward chain", "worker", "database", {"error": "timed out"}, 0, 1),
        # Not as false as it was thought to be.
        ("false denial", "worker", "cache_server", {"error": "timed out"}, 1, 0),
        # Reached without passing the slave: another way.
        ("other host", "worker", "database", {"answered_by": "database"}, 0, 0),
        # Reached although a rule counted.
        ("worker's output chain", "child_default_bridge", "database", {"answered_by": "database"}, 1, 1),
        # A name's denial is for want of a name, not of an answer.
        ("names, engine's resolver", "child_default_bridge", "cache_server", {"error": "timed out"}, 0, 0),
    ],
)  # fmt: skip
def test_what_the_counters_do_not_bear_out_is_a_difference(
    step: str, sender: str, target: str, answer: dict[str, str], arrived: int, dropped: int
) -> None:
    where, _ = request_of(step, sender, target)
    # Of several addresses the last, which is the one in question.
    request = [one for one in where.requests(sender) if one.target.name == target][-1]
    if step.startswith("names"):
        request = where.requests(sender)[0]
    seen = plan.observation("runc", where, sender, request, answer, (arrived, 60), dropped)
    assert not seen.as_expected
    (words,) = plan.differences([seen])
    assert step in words and sender in words and target in words


def test_what_was_not_tried_is_named() -> None:
    seen = everything()
    assert plan.missing(seen[1:], ["userns"]) == [
        f"userns, false denial: worker to {seen[0].host} was not tried."
    ]
    assert len(plan.missing(seen, ["userns", "runc"])) == len(seen)


def test_the_table_marks_what_differs() -> None:
    seen = everything()
    lines = plan.table(seen)
    assert len(lines) == 2 + len(plan.STEPS)
    assert not any("!" in line for line in lines)
    (output,) = [line for line in lines if line.startswith("worker's output chain")]
    assert " 1  1  1  1 of 1 |  0  6  6  0 of 6" in output
    step, request = request_of("same bridge", "worker", "cache_server")
    wrong = plan.observation("userns", step, "worker", request, {"error": "timed out"}, (0, 0), 0)
    changed = [wrong if (one.step, one.sender, one.host) == (step.name, "worker", request.host) else one for one in seen]  # fmt: skip
    assert [line.split("  ")[0] for line in plan.table(changed) if line.endswith("!")] == [
        "same bridge"
    ]


@pytest.mark.parametrize(
    ("runtime", "uid_map", "mounts", "seccomp", "named"),
    [
        ("runc", "0 0 4294967295", 0, 2, ""),
        ("userns", "0 2013265920 131072", 0, 2, ""),
        ("sysbox-runc", "0 300000 65536", 6, 2, ""),
        ("runc", "0 2013265920 131072", 0, 2, "is mapped"),
        ("userns", "0 0 4294967295", 0, 2, "is the slave's"),
        ("userns", "0 2013265920 131072", 0, 0, "filters no system calls"),
        ("sysbox-runc", "0 300000 65536", 0, 2, "sysbox-fs"),
    ],
)
def test_a_runtime_that_is_not_what_it_is_called_is_a_difference(
    runtime: str, uid_map: str, mounts: int, seccomp: int, named: str
) -> None:
    found = plan.not_as_called(
        {runtime: {"uid_map": uid_map, "sysbox_mounts": mounts, "seccomp": seccomp}}
    )
    assert len(found) == bool(named)
    assert named in "".join(found)


# --- Rules ----------------------------------------------------------------------------------------


def test_a_filter_without_the_workers_port_is_refused() -> None:
    with pytest.raises(ValueError, match="no port"):
        plan.filter_rules("slave bridge forward", [])


@pytest.mark.parametrize("name", sorted({step.filter for step in plan.STEPS if "inet" in step.filter or "bridge" in step.filter}))  # fmt: skip
def test_filters_end_with_a_drop(name: str) -> None:
    rules = plan.filter_rules(name, ["veth1"])
    assert rules.split()[-3:] == ["drop", "}", "}"]
    assert rules.count("{") == rules.count("}")


# --- How the worker is made -----------------------------------------------------------------------


def test_what_makes_a_worker_is_kept_and_its_place_is_not() -> None:
    create = (
        "--name w --hostname h --restart no --cap-add SYS_ADMIN --security-opt seccomp=/f --tmpfs /run:exec"
        " --memory 1 --pids-limit=9 --userns host --network bridge --dns 192.0.2.1 --volume /a:/a image:1 /init --not"
    ).split()
    assert (
        plan.boundary_options(create)
        == (
            "--cap-add SYS_ADMIN --security-opt seccomp=/f --tmpfs /run:exec --memory 1 --pids-limit=9"
            " --userns host"
        ).split()
    )


def test_the_worker_is_described_as_the_role_does() -> None:
    """What the role tells the program that runs the container, the experiment tells it too."""
    tasks = yaml.safe_load((ROOT / "roles/worker_container/tasks/configure.yml").read_text())
    (role,) = [
        task["vars"]["__worker_container_config"]
        for task in tasks
        if "__worker_container_config" in task.get("vars", {})
    ]
    made = lab.Lab({"root": "/", "create": {"userns": []}}, "/")
    assert set(lab.Worker(made, "userns", Path("/f")).described(1)) == set(role)


def test_the_roles_resolvers_are_left_out() -> None:
    flags = "--bip 172.31.255.1/24 --dns 192.0.2.1 --dns 192.0.2.2 --default-address-pool base=b,size=24".split()
    assert lab.without_dns(flags) == (
        "--bip 172.31.255.1/24 --default-address-pool base=b,size=24".split()
    )


# --- Refusals -------------------------------------------------------------------------------------

ENGINE = {"Runtimes": {"runc": {"path": "runc"}}}
PROGRAMS = {"dockerd": True, "nft": True}


@pytest.mark.parametrize(
    ("asked", "programs", "engine", "named"),
    [
        (["podman"], PROGRAMS, ENGINE, "child_container_runtimes has podman"),
        ([], PROGRAMS, None, "slave9 has no Docker engine"),
        ([], {"dockerd": False}, ENGINE, "slave9 has no Docker engine"),
        ([], {**PROGRAMS, "nft": False}, ENGINE, "slave9 has no nft"),
        (["sysbox-runc"], PROGRAMS, ENGINE, "no runtime sysbox-runc"),
    ],
)
def test_what_cannot_be_tried_is_refused_by_name(
    asked: list[str], programs: dict[str, bool], engine: dict[str, Any] | None, named: str
) -> None:
    (words,) = plan.refusals("slave9", asked, programs, engine)
    assert named in words


def test_a_kernel_without_ipv6_is_refused_by_name() -> None:
    (words,) = plan.refusals("slave9", [], PROGRAMS, ENGINE, ipv6=False)
    assert "slave9's kernel has no IPv6" in words


def test_all_runtimes_that_there_are_by_default() -> None:
    assert plan.refusals("slave9", [], PROGRAMS, ENGINE) == []
    assert plan.chosen([], ENGINE["Runtimes"]) == ["runc", "userns"]
    assert plan.chosen([], {"sysbox-runc"}) == ["runc", "userns", "sysbox-runc"]
    assert plan.chosen(["userns"], {}) == ["userns"]


# --- In the containers ----------------------------------------------------------------------------


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    return struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)


def test_the_resolver_knows_its_names_alone() -> None:
    names = {"cache.cellblock.internal": "10.77.1.14"}
    answer = peer.answered(query("cache.cellblock.INTERNAL"), names)
    assert answer[:2] == b"\0\7" and answer.endswith(socket.inet_aton("10.77.1.14"))
    # No such record is not no such name.
    assert peer.answered(query("cache.cellblock.internal", 28), names)[3] & 15 == 0
    assert peer.answered(query("other.example"), names)[3] & 15 == 3


def test_a_sender_says_who_answered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            for said in (b'{"answered_by": "database", "seen_as": "x"}\n', b"HTTP/1.1 200 OK\n"):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        assert peer.ask("127.0.0.1", port, 2)["answered_by"] == "database"
        assert peer.ask("127.0.0.1", port, 2) == {"error": "another answer"}
        thread.join()
    wanted = {"timeout_s": 1, "requests": [("127.0.0.1", port), ("no-such-name.invalid", port)]}
    assert peer.ask_all(wanted) == [{"error": "connection refused"}, {"error": "name not known"}]
    assert peer.ask("127.0.0.1", port, 2) == {"error": "connection refused"}


def test_a_root_file_system_mounts_usr_and_holds_no_secret(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "shadow", "group"):
        (tmp_path / "etc" / name).write_text(name)
    with tarfile.open(fileobj=io.BytesIO(lab.files_of(tmp_path))) as archive:
        names = set(archive.getnames())
        assert archive.getmember("bin").linkname == "usr/bin"
    assert {"etc/passwd", "etc/group", "usr", "var/lib"} <= names
    assert "etc/shadow" not in names


def test_the_report_has_every_field() -> None:
    (row,) = [plan.as_row(one) for one in everything()[:1]]
    assert json.loads(json.dumps(row)) == row
    page = ROOT / "docs/experiments/child_container.md"
    for name in row:
        assert f"`{name}`" in page.read_text(), f"{page.name} does not describe {name}"
