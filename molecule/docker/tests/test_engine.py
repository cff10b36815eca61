"""The engine: it runs containers, with the settings of both sides, and they outlive its restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

DAEMON = "/etc/docker/daemon.json"
Role = Callable[..., Any]


def daemon(lab: Any, host: str = "slave1") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab.output(host, f"cat {DAEMON}"))
    return found


def test_a_container_runs(lab: Any, image: str) -> None:
    assert lab.output("slave1", f"docker run --rm {image} echo hello") == "hello"
    assert lab.output("slave1", "docker info --format '{{.Driver}}'") == "overlay2"


def test_what_the_operator_configured_survives(lab: Any) -> None:
    found = daemon(lab)
    assert found["labels"] == ["rack=7"]
    assert found["log-opts"] == {"tag": "operator", "max-size": "10m", "max-file": "3"}
    assert lab.output("slave1", f"stat -c %a {DAEMON}") == "640"
    # Not only in the file.
    info = json.loads(lab.output("slave1", "docker info --format '{{json .}}'"))
    assert info["Labels"] == ["rack=7"]
    assert info["RegistryConfig"]["Mirrors"] == ["http://192.0.2.14:5000/"]
    assert info["LiveRestoreEnabled"]


def test_networks_and_resolver_are_those_declared(lab: Any, image: str) -> None:
    shown = lab.output(
        "slave1", "docker network inspect bridge --format '{{(index .IPAM.Config 0).Subnet}}'"
    )
    assert shown == "172.16.0.0/24"
    lab.output("slave1", "docker network create other")
    try:
        shown = lab.output(
            "slave1", "docker network inspect other --format '{{(index .IPAM.Config 0).Subnet}}'"
        )
    finally:
        lab.run("slave1", "docker network rm other")
    assert shown.startswith("172.16.128.")
    resolver = lab.output("slave1", f"docker run --rm {image} cat /etc/resolv.conf")
    assert f"nameserver {lab.address('cache1')}" in resolver


def test_root_in_a_container_is_nobody_on_the_host(lab: Any, image: str) -> None:
    lab.output("slave2", f"docker run -d --name mapped {image} sleep 60")
    try:
        pid = lab.output("slave2", "docker inspect --format '{{.State.Pid}}' mapped")
        assert lab.output("slave2", f"stat -c %u /proc/{pid}") == "300000"
        assert lab.output("slave2", "docker exec mapped id -u") == "0"
    finally:
        lab.run("slave2", "docker rm -f mapped")


def test_a_second_run_changes_nothing_and_is_quick(role: Role) -> None:
    # The better of two, as the machine may have other things to do.
    runs = [role("role", "slave1") for _ in range(2)]
    print("a second run took", *(f"{done.seconds:.1f} s" for done in runs))
    for done in runs:
        assert done.returncode == 0
        assert "changed=0" in done.stdout, done.stdout
    assert min(done.seconds for done in runs) < 10


def test_check_mode_foretells_a_change_and_changes_nothing(lab: Any, role: Role) -> None:
    before = daemon(lab)
    done = role("role", "slave1", "--check", "--diff", "-e", "docker_log_max_size=7m")
    assert done.returncode == 0, done.stdout
    assert '+        "max-size": "7m"' in done.stdout
    assert daemon(lab) == before


def test_a_workload_outlives_the_engines_restart(lab: Any, role: Role, workload: str) -> None:
    started = "docker inspect --format '{{.State.Pid}} {{.State.StartedAt}}' web"
    engine = "systemctl show --value --property=MainPID docker"
    before, engine_before = lab.output("slave1", started), lab.output("slave1", engine)
    # In its own network: between it and the host there is the firewall.
    pid = before.split()[0]
    served = lab.watch("slave1", "nsenter", "--net", "--target", pid, web=("127.0.0.1", 80))
    try:
        done = role("role", "slave1", "-e", "docker_log_max_size=7m")
        assert done.returncode == 0, done.stdout
        assert daemon(lab)["log-opts"]["max-size"] == "7m"
        assert lab.output("slave1", engine) != engine_before
        assert lab.output("slave1", started) == before
        assert lab.output("slave1", f"docker exec {workload} echo here") == "here"
    finally:
        done = role("role", "slave1")
    assert done.returncode == 0, done.stdout
    assert lab.output("slave1", started) == before
    successes, failures = served.end()["web"]
    assert successes > 100
    assert failures == 0


def test_live_restore_is_on_before_the_engine_ends(lab: Any, role: Role, workload: str) -> None:
    """An engine that runs without it would take its containers with it."""
    started = "docker inspect --format '{{.State.Pid}}' web"
    before = lab.output("slave1", started)
    # What somebody changes would be theirs, and come back in the end.
    lab.output("slave1", "cp /var/lib/cellblock/docker.json /run/record.json")
    lab.output("slave1", f'sed -i \'s/"live-restore": true/"live-restore": false/\' {DAEMON}')
    lab.output("slave1", "systemctl reload docker; sleep 1")
    assert lab.output("slave1", "docker info --format '{{.LiveRestoreEnabled}}'") == "false"
    done = role("role", "slave1")
    lab.output("slave1", "mv /run/record.json /var/lib/cellblock/docker.json")
    assert done.returncode == 0, done.stdout
    assert lab.output("slave1", "docker info --format '{{.LiveRestoreEnabled}}'") == "true"
    assert lab.output("slave1", started) == before


def test_an_interrupted_run_is_made_up_for(lab: Any, role: Role) -> None:
    """The configuration was written, and the engine not restarted."""
    engine = "systemctl show --value --property=MainPID docker"
    before = lab.output("slave1", engine)
    lab.output("slave1", f"touch {DAEMON}")
    done = role("role", "slave1")
    assert done.returncode == 0, done.stdout
    assert lab.output("slave1", engine) != before
    assert "changed=0" in role("role", "slave1").stdout


def test_an_engine_that_does_not_come_up_gets_its_settings_back(
    lab: Any, role: Role, workload: str
) -> None:
    before = daemon(lab)
    done = role("role", "slave1", "-e", '{"docker_daemon_options": {"log-driver": "nosuch"}}')
    assert done.returncode != 0
    assert "does not answer with its new settings" in done.stdout, done.stdout
    assert "nosuch" in done.stdout
    assert daemon(lab) == before
    assert lab.output("slave1", f"docker exec {workload} echo here") == "here"
    assert "changed=0" in role("role", "slave1").stdout


@pytest.fixture
def planted(lab: Any) -> Any:
    """Files on slave1 that are gone afterwards."""
    paths: list[str] = []

    def plant(path: str, text: str) -> None:
        paths.append(path)
        lab.output(
            "slave1",
            f"mkdir -p $(dirname {path}); printf '%s\\n' '{text}' >{path}; chmod 755 {path}",
        )

    yield plant
    for path in paths:
        lab.run("slave1", f"rm -f {path}; rmdir /snap/bin /snap")


def refused(lab: Any, role: Role, *arguments: str) -> str:
    """What the role says that it refuses; it has changed nothing then."""
    look = (
        f"md5sum {DAEMON} /var/lib/cellblock/docker.json; systemctl show --value -p MainPID docker"
    )
    before = lab.output("slave1", look)
    done = role("role", "slave1", *arguments)
    assert done.returncode != 0, done.stdout
    assert "changed=0" in done.stdout
    assert lab.output("slave1", look) == before
    return " ".join(done.stdout.split())


def test_every_reason_is_told_at_once(lab: Any, role: Role) -> None:
    settings = {
        "docker_bip": f"{lab.address('cache1').rpartition('.')[0]}.1/24",
        "docker_address_pools": [{"base": "172.24.0.0/16", "size": 24}],
        "docker_userns_remap": "nosuch",
        "docker_dns": ["127.0.0.53"],
        "docker_min_free_bytes": 2**60,
    }
    told = refused(lab, role, "-e", json.dumps(settings))
    for words in (
        "(the fleet's, docker_avoided_networks)",
        "(an address of the host on eth0)",
        "default-address-pools 172.24.0.0/16 collides with 172.24.0.0/13",
        "names the user nosuch, whom the host does not have",
        "127.0.0.53, which is each container's own",
        "docker_min_free_bytes wants",
    ):
        assert words in told


def test_a_full_data_directory_is_refused(lab: Any, role: Role) -> None:
    lab.output("slave1", "mkdir -p /srv/full; mount -t tmpfs -o size=1m full /srv/full")
    try:
        told = refused(
            lab, role, "-e", '{"docker_daemon_options": {"data-root": "/srv/full/docker"}}'
        )
    finally:
        lab.output("slave1", "umount /srv/full; rmdir /srv/full")
    assert "/srv/full/docker, the engine's data directory, has 1 MiB free" in told


def test_podmans_stand_in_is_refused(lab: Any, role: Role, planted: Any) -> None:
    planted("/usr/local/bin/docker", '#!/bin/sh\nexec /usr/bin/podman "$@"')
    assert "/usr/local/bin/docker is podman's stand-in" in refused(lab, role)


def test_an_engine_of_snap_is_refused(lab: Any, role: Role, planted: Any) -> None:
    planted("/snap/bin/docker", "#!/bin/sh")
    assert "comes from snap" in refused(lab, role)


def test_another_engine_than_the_one_that_is_there_is_refused(lab: Any, role: Role) -> None:
    assert "docker.io is installed, and docker_source is upstream" in refused(
        lab, role, "-e", "docker_source=upstream"
    )


def test_containers_are_not_stopped_unasked(lab: Any, role: Role, workload: str) -> None:
    told = refused(lab, role, "-e", '{"docker_live_restore": false}')
    assert "1 containers run, and the engine's restart would stop them" in told
    told = refused(lab, role, "-e", "docker_bip=172.16.1.1/24")
    assert "would not take the bip" in told
