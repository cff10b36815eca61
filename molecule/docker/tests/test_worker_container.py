"""The worker container of slave2: what its root may not do, its filter, how it comes back, and the role that makes it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.module_utils import _worker_container as worker

testinfra_hosts = ["ansible://slave2"]

Role = Callable[..., Any]
SLAVE = "slave2"
UNIT = NAME = "cellblock-worker"
CONFIG = "/etc/cellblock/worker_container/container.json"
FILTER = "/etc/cellblock/worker_container/seccomp.json"
ATTACKS = Path(__file__).resolve().parents[3] / "roles/worker_container/files/attacks"
CONTROL = "control"
# What container root does to its host without a mapping, with all else as it is: no denial of these is the kernel's own.
DONE_WITHOUT_A_MAPPING = {
    "identity", "core_pattern", "panic", "overcommit", "file_max", "drop_caches", "kernel_parameters", "own_limit",
    "mknod", "mount_disk",
}  # fmt: skip
READY_S = 5.0
COMES_BACK_S = 20.0


def config(lab: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab.output(SLAVE, f"cat {CONFIG}"))
    return found


def options(lab: Any) -> tuple[list[str], str]:
    """What the worker is made with, but its name, and its image."""
    create = config(lab)["create"]
    image = next(word for word in create if word.startswith(f"{NAME}:"))
    return create[2 : create.index(image)], image


# --- What its root may not do ---------------------------------------------------------------------


def attacks(lab: Any, *where: str) -> dict[str, tuple[str, str]]:
    """{attack: (verdict, what was said)} of a shell that ``where`` starts on the slave."""
    known = lab.output(
        SLAVE, "readlink /proc/1/ns/net; docker info --format '{{.ID}}'"
    ).splitlines()
    done = subprocess.run(
        lab.command(SLAVE, *where, "sh", "-s", *known),
        input=ATTACKS.read_text(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    return {name: (verdict, said) for name, verdict, said in lines}


@pytest.fixture
def control(lab: Any) -> Iterator[Callable[..., str]]:
    """A container as the worker, but for what is changed about it."""

    def run(*changes: str) -> str:
        made, image = options(lab)
        command = ["docker", "run", "--detach", "--name", CONTROL, *made, *changes]
        started = subprocess.run(
            lab.command(SLAVE, *command, image, "/bin/sleep", "120"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert started.returncode == 0, started.stderr
        return CONTROL

    yield run
    lab.run(SLAVE, f"docker rm --force --volumes {CONTROL}")


def test_its_root_does_nothing_to_the_host(lab: Any, control: Callable[..., str]) -> None:
    """Each denial counts only where the same is seen to succeed without what denies it."""
    seen = {"userns": attacks(lab, "docker", "exec", "-i", NAME)}
    seen["runc"] = attacks(lab, "docker", "exec", "-i", control("--userns=host"))
    lab.output(SLAVE, f"docker rm --force --volumes {CONTROL}")
    # And without the namespaces, with the capabilities and without the filter that others of them need.
    everything = control(
        "--userns=host", "--pid=host", "--cgroupns=host", "--security-opt=apparmor=unconfined",
        "--security-opt=seccomp=unconfined", *(f"--cap-add={name}" for name in ("SYS_MODULE", "SYS_TIME", "SYS_PTRACE")),
    )  # fmt: skip
    seen["everything"] = attacks(lab, "docker", "exec", "-i", everything)
    # What the host's own root cannot do either, this host is not there to show.
    seen["host"] = attacks(lab, "unshare", "--mount")
    names = list(seen["userns"])
    assert all(list(found) == names for found in seen.values())
    for name in names:
        print(f"{name:18}", *(f"{where} {found[name][0]:10}" for where, found in seen.items()))

    def succeeded(*places: str) -> set[str]:
        return {name for place in places for name in names if seen[place][name][0] == "succeeded"}

    assert succeeded("userns") == set()
    assert succeeded("runc") >= DONE_WITHOUT_A_MAPPING
    controlled = succeeded("runc", "everything")
    print("succeeded without a mapping:", *sorted(succeeded("runc")))
    print("no positive control on this host:", *sorted(set(names) - controlled))
    # Whatever the host's root can do was seen to succeed in a container as well.
    assert succeeded("host") - controlled == set()
    assert len(controlled) >= 14


# --- Its filter -----------------------------------------------------------------------------------

BUNDLE = """
import json, sys
for place in ("/run/containerd/io.containerd.runtime.v2.task/moby", "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby"):
    try:
        print(json.dumps(json.load(open(f"{place}/{sys.argv[1]}/config.json"))["linux"]["seccomp"]))
        break
    except FileNotFoundError:
        pass
"""


def filter_of(lab: Any, container: str) -> dict[str, Any]:
    """What the kernel was told, by what the runtime was given."""
    number = lab.output(SLAVE, f"docker inspect --format '{{{{.Id}}}}' {container}")
    done = lab.run(SLAVE, f"exec python3 - {number}", input=BUNDLE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_its_filter_is_the_engines_own_but_for_what_is_stated(
    lab: Any, control: Callable[..., str]
) -> None:
    made, image = options(lab)
    kept = [
        word
        for option, word in zip(made, made[1:], strict=False)
        if option in ("--cap-add", "--cap-drop")
        for word in (option, word)
    ]
    lab.output(SLAVE, f"docker run -d --name {CONTROL} {' '.join(kept)} {image} /bin/sleep 60")
    default, own = filter_of(lab, CONTROL), filter_of(lab, NAME)
    assert len(default["syscalls"]) > 5
    left_out, added = worker.differences(default, own)
    assert left_out == []
    assert added == [
        "add_key: SCMP_ACT_ERRNO 38",
        "keyctl: SCMP_ACT_ERRNO 38",
        "pivot_root: SCMP_ACT_ALLOW",
        "request_key: SCMP_ACT_ERRNO 38",
    ]
    # In force, for its first process and for what it starts.
    pids = lab.output(SLAVE, f"docker top {NAME} -o pid | tail -n +2").split()
    assert len(pids) >= 2
    for pid in pids:
        assert lab.output(SLAVE, f"awk '/^Seccomp:/ {{print $2}}' /proc/{pid}/status") == "2"


def test_its_capabilities_are_those_listed(lab: Any) -> None:
    made, _ = options(lab)
    assert made[made.index("--cap-drop") + 1] == "ALL"
    listed = {word for option, word in zip(made, made[1:], strict=False) if option == "--cap-add"}
    pid = lab.output(SLAVE, f"docker inspect --format '{{{{.State.Pid}}}}' {NAME}")
    bounding = int(lab.output(SLAVE, f"awk '/^CapBnd:/ {{print $2}}' /proc/{pid}/status"), 16)
    assert bounding.bit_count() == len(listed) == 16
    assert "--privileged" not in made


# --- It comes back --------------------------------------------------------------------------------


def container(lab: Any) -> str:
    """Its number and that of its first process; nothing where there is none."""
    shown = lab.run(SLAVE, f"docker inspect --format '{{{{.Id}}}} {{{{.State.Pid}}}}' {NAME}")
    return str(shown.stdout).strip()


def answers(lab: Any) -> bool:
    return bool(
        lab.run(SLAVE, f"timeout 3 docker exec {NAME} docker info >/dev/null 2>&1").returncode == 0
    )


def until(what: Callable[[], bool], seconds: float) -> float:
    """How long it took."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < seconds, "it does not come back"
        time.sleep(0.05)
    return time.monotonic() - begun


def ready(lab: Any) -> bool:
    return (
        lab.run(SLAVE, f"systemctl is-active --quiet {UNIT}").returncode == 0
        and lab.run(SLAVE, "test -e /run/cellblock-worker/pid").returncode == 0
        and answers(lab)
    )


def test_it_is_ready_in_time(lab: Any) -> None:
    took = []
    for _ in range(2):
        begun = time.monotonic()
        lab.output(SLAVE, f"systemctl restart {UNIT}")
        started = time.monotonic() - begun
        until(lambda: answers(lab), COMES_BACK_S)
        took.append((started, time.monotonic() - begun))
    print("restarted, and the engine within answers, after", took)
    assert min(total for _, total in took) < READY_S


ENGINE = "systemctl show --value -p MainPID docker"
ENGINE_WITHIN = f"docker exec {NAME} cat /run/docker.pid"
OF_UNIT = f"systemctl show --value -p MainPID {UNIT}"


@pytest.mark.parametrize(
    ("death", "what", "survives"),
    [
        (f"docker kill {NAME}", "true", False),
        (f"kill -9 $({OF_UNIT})", OF_UNIT, False),
        # live-restore
        ("systemctl restart docker", ENGINE, True),
        (f"kill -9 $({ENGINE})", ENGINE, True),
        (f"docker exec {NAME} sh -c 'kill -9 $(cat /run/docker.pid)'", ENGINE_WITHIN, True),
        # Its first process, by its own root.
        (f"docker exec {NAME} sh -c 'kill -TERM 1'", "true", False),
    ],
    ids=["container", "unit", "engine-restarted", "engine-killed", "engine-within", "first-process"],
)  # fmt: skip
def test_it_comes_back(lab: Any, death: str, what: str, survives: bool) -> None:
    until(lambda: ready(lab), COMES_BACK_S)
    before, died = container(lab), lab.output(SLAVE, what)
    lab.output(SLAVE, death)

    def back() -> bool:
        now = container(lab)
        return (
            now != ""
            and (now == before) == survives
            and (died == "" or lab.run(SLAVE, what).stdout.strip() not in ("", "0", died))
            and ready(lab)
        )

    print(f"ready again after {until(back, COMES_BACK_S):.1f} s")
    # A job's way in, and what it may do there, come back too.
    assert lab.run(SLAVE, "test -S /run/cellblock-worker/socket").returncode == 0
    assert lab.output(SLAVE, f"docker ps -aq --filter name={NAME} | wc -l") == "1"
    pid = container(lab).split()[1]
    # The hierarchy of pids on cgroup v1, or the one of v2.
    (path,) = {
        line.split(":", 2)[2]
        for line in lab.output(SLAVE, f"cat /proc/{pid}/cgroup").splitlines()
        if line.split(":")[1] == "pids" or line.startswith("0::/") and line != "0::/"
    }
    owners = lab.run(SLAVE, f"stat -c %u /sys/fs/cgroup/pids{path} /sys/fs/cgroup{path}").stdout
    assert owners.split() == [str(config(lab)["owner"])]


def test_it_is_left_alone_while_its_unit_is_stopped(lab: Any) -> None:
    lab.output(SLAVE, f"systemctl stop {UNIT}")
    assert container(lab) == ""
    assert lab.output(SLAVE, "docker volume ls -q") == ""
    # Killed in the middle of its start.
    lab.output(SLAVE, f"systemctl start --no-block {UNIT}; sleep 0.3; systemctl kill -s KILL {UNIT}; systemctl stop {UNIT}")  # fmt: skip
    assert container(lab) == ""
    lab.output(SLAVE, f"systemctl start {UNIT}")


# --- Its networks ---------------------------------------------------------------------------------


def named(lab: Any) -> dict[str, str]:
    """{second name of an interface: its address}, as the container sees them."""
    shown = json.loads(lab.output(SLAVE, f"docker exec {NAME} ip -json address show"))
    return {
        name: address["local"]
        for link in shown
        for name in link.get("altnames", [])
        for address in link["addr_info"]
        if address["family"] == "inet"
    }


def test_an_interface_is_known_by_its_network(lab: Any, role: Role) -> None:
    for number, name in enumerate(("zone", "area", "work")):
        lab.output(SLAVE, f"docker network create --subnet 172.16.{200 + number}.0/24 {name}")
    try:
        networks = {"worker_container_networks": ["zone", "bridge", "work", "area"]}
        done = role("worker_alone", SLAVE, "-e", json.dumps(networks))
        assert done.returncode == 0, done.stdout
        seen = set()
        for _ in range(3):
            found = named(lab)
            assert {name: address.rpartition(".")[0] for name, address in found.items()} == {
                "net-bridge": "172.16.0",
                "net-zone": "172.16.200",
                "net-area": "172.16.201",
                "net-work": "172.16.202",
            }
            order = lab.output(
                SLAVE, f"docker exec {NAME} ip -o link | grep -o 'altname net-[a-z]*'"
            )
            seen.add(order)
            # Its resolver, and the engine within, whatever the order.
            assert answers(lab) or until(lambda: answers(lab), READY_S)
            lab.output(SLAVE, f"systemctl restart {UNIT}")
        print(len(seen), "orders of interfaces in three starts")
    finally:
        done = role("worker_alone", SLAVE)
        lab.output(SLAVE, "docker network rm zone area work")
    assert done.returncode == 0, done.stdout
    assert list(named(lab)) == ["net-bridge"]


# --- The role -------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_is_quick(role: Role) -> None:
    """Of the roles docker and worker_container together."""
    runs = [role("worker", SLAVE) for _ in range(2)]
    print("a second run took", *(f"{done.seconds:.1f} s" for done in runs))
    for done in runs:
        assert done.returncode == 0
        assert "changed=0" in done.stdout, done.stdout
    assert min(done.seconds for done in runs) < 10


def test_check_mode_foretells_a_change_and_changes_nothing(lab: Any, role: Role) -> None:
    before = config(lab), container(lab)
    done = role("worker_alone", SLAVE, "--check", "--diff", "-e", "worker_container_processes=777")
    assert done.returncode == 0, done.stdout
    assert '+        "777"' in done.stdout
    assert (config(lab), container(lab)) == before


def test_without_a_mapping_it_runs_likewise_and_is_no_boundary(lab: Any, role: Role) -> None:
    """The runtime that is there for comparison."""
    done = role("worker_alone", SLAVE, "-e", "worker_container_runtime=runc")
    try:
        assert done.returncode == 0, done.stdout
        until(lambda: ready(lab), COMES_BACK_S)
        pid = container(lab).split()[1]
        assert lab.output(SLAVE, f"cat /proc/{pid}/uid_map").split() == ["0", "0", "4294967295"]
        found = attacks(lab, "docker", "exec", "-i", NAME)
        done_there = {name for name, (verdict, _) in found.items() if verdict == "succeeded"}
        print("succeeded:", *sorted(done_there))
        assert done_there >= DONE_WITHOUT_A_MAPPING
    finally:
        done = role("worker_alone", SLAVE)
    assert done.returncode == 0, done.stdout
    until(lambda: ready(lab), COMES_BACK_S)
    pid = container(lab).split()[1]
    assert lab.output(SLAVE, f"cat /proc/{pid}/uid_map").split() == ["0", "300000", "131072"]
    # The image is the same one.
    assert lab.output(SLAVE, f"docker image ls -q {NAME} | wc -l") == "1"


def test_it_is_removed_and_provided_anew(lab: Any, role: Role) -> None:
    """Check mode on a host that has none, too."""
    left = (
        f"docker ps -aq; docker image ls -q {NAME}; docker volume ls -q; ls -d {CONFIG} /run/{NAME} /var/lib/cellblock/worker_container"
        f" /etc/systemd/system/{UNIT}.service; systemctl list-units --all --no-legend '{UNIT}*'; ip -o link | grep veth"
    )
    foretold = role("worker_remove", SLAVE, "--check")
    assert foretold.returncode == 0, foretold.stdout
    assert container(lab) != ""
    removed = role("worker_remove", SLAVE)
    assert removed.returncode == 0, removed.stdout
    assert lab.run(SLAVE, left).stdout == ""
    assert "changed=0" in role("worker_remove", SLAVE).stdout
    dry = role("worker_alone", SLAVE, "--check", "--diff")
    assert dry.returncode == 0, dry.stdout
    assert lab.run(SLAVE, left).stdout == ""
    done = role("worker_alone", SLAVE)
    assert done.returncode == 0, done.stdout
    print(
        f"removed in {removed.seconds:.0f} s, dry {dry.seconds:.0f} s, provided in {done.seconds:.0f} s"
    )
    until(lambda: ready(lab), COMES_BACK_S)
    assert "changed=0" in role("worker_alone", SLAVE).stdout
