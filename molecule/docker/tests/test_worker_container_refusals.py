"""What the role worker_container refuses, with the host, the engine and the worker that runs left as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave2"]

Role = Callable[..., Any]
SLAVE = "slave2"
HOME = "/var/lib/cellblock/worker_container"
# Whatever a run could change. Of the engine only what does not come with time.
LOOK = (
    'docker() { /usr/bin/docker "$@"; };'
    " docker ps --all --no-trunc --format '{{.ID}} {{.Image}} {{.Names}} {{.State}}'; docker images --all --quiet;"
    " docker network ls --quiet; docker volume ls --quiet;"
    " docker info --format '{{.ID}} {{.Containers}} {{.ContainersRunning}} {{.Images}} {{.SecurityOptions}} {{.Runtimes}}';"
    " find /etc /opt/cellblock /var/lib/cellblock -xdev ! -path '*/spool/*' ! -path '*/worker/*' -printf '%p %y %m %U %s %T@ %l\\n' | sort;"
    " systemctl list-unit-files --no-legend --no-pager; systemctl list-units --all --no-legend --no-pager --type=service,socket"
    " | grep -E 'docker|containerd|cellblock'; systemctl show -p MainPID,ExecMainStartTimestampMonotonic docker cellblock-worker;"
    " ls -l /run/cellblock-worker; nft list tables; ip -o link | wc -l"
)


@pytest.fixture
def refused(lab: Any, role: Role) -> Callable[..., str]:
    """What the role says that it refuses; it has changed nothing then."""

    def run(**settings: Any) -> str:
        before = lab.run(SLAVE, LOOK).stdout.splitlines()
        assert len(before) > 500, "a look that sees little proves little"
        done = role("worker_alone", SLAVE, "-e", json.dumps(settings))
        assert done.returncode != 0, done.stdout
        assert "changed=0" in done.stdout
        assert lab.run(SLAVE, LOOK).stdout.splitlines() == before
        return " ".join(done.stdout.split())

    return run


@pytest.fixture
def changed(lab: Any) -> Iterator[Callable[[str, str], None]]:
    """Changes the host, and back in the end."""
    undo: list[str] = []

    def change(do: str, back: str) -> None:
        undo.append(back)
        lab.output(SLAVE, do)

    yield change
    for back in reversed(undo):
        lab.output(SLAVE, back)


def test_settings_that_cannot_work(lab: Any, refused: Callable[..., str]) -> None:
    """All reasons at once."""
    fleet = lab.address("cache1").rpartition(".")[0]
    told = refused(
        worker_container_networks=["host", "none", "nosuch"],
        worker_container_bip=f"{fleet}.1/24",
        worker_container_address_pools=[{"base": "172.31.0.0/16", "size": 24}],
        worker_container_ids=65536,
        worker_container_runtime="sysbox-runc",
    )
    for words in (
        "worker_container_networks has host: the engine within would remove the rules of the host's engine",
        "worker_container_networks has none, on which it would reach no cache",
        "worker_container_networks has nosuch, and the engine has no such network",
        "(the fleet's)",
        "(an address of the host on eth0)",
        "choose another network with worker_container_bip",
        "worker_container_ids is 65536, and jobs have ids from 65536",
        "worker_container_runtime is sysbox-runc, which the engine has not among its runtimes",
    ):
        assert words in told, told


def test_networks_within_that_would_hide_the_engines_own(refused: Callable[..., str]) -> None:
    told = refused(worker_container_address_pools=[{"base": "172.16.0.0/16", "size": 24}])
    assert "collides with 172.16.0.0/24 (the engine's network bridge)" in told
    assert "choose another network with worker_container_address_pools" in told


def test_a_runtime_that_nobody_knows(refused: Callable[..., str]) -> None:
    told = refused(worker_container_runtime="kata")
    assert "worker_container_runtime must be one of: userns, sysbox-runc, runc, got: kata" in told


def test_a_host_that_lacks_what_it_needs(
    refused: Callable[..., str], changed: Callable[[str, str], None]
) -> None:
    """All reasons at once."""
    changed("cp -p /etc/subuid /run/subuid; sed -i s/:131072/:65536/ /etc/subuid", "mv /run/subuid /etc/subuid")  # fmt: skip
    changed("echo other:350000:1000 >>/etc/subgid", "sed -i /^other:/d /etc/subgid")
    changed("mount -t tmpfs masked /sys/firmware", "umount /sys/firmware")
    changed("mv /opt/cellblock/bin/nsjail /opt/cellblock/bin/away", "mv /opt/cellblock/bin/away /opt/cellblock/bin/nsjail")  # fmt: skip
    changed(f"mount -t tmpfs -o size=1m full {HOME}", f"umount {HOME}")
    told = refused()
    for words in (
        "/etc/subuid gives containers 65536 ids at first, and the worker container needs 131072",
        "/etc/subgid gives ids from 350000 to both containers and other",
        "something covers a part of the host's /sys",
        "/opt/cellblock/bin/nsjail is missing, and the worker container uses it; provide it with the role nsjail",
        f"{HOME} has 1 MiB free, and worker_container_min_free_bytes wants 1536 MiB",
    ):
        assert words in told, told


def test_no_ids_to_map_to(refused: Callable[..., str], changed: Callable[[str, str], None]) -> None:
    for file in ("subuid", "subgid"):
        changed(f"mv /etc/{file} /run/{file}; touch /etc/{file}", f"mv /run/{file} /etc/{file}")
    told = refused()
    assert "/etc/subuid gives containers 0 ids at first" in told
    assert "/etc/subgid gives containers 0 ids at first" in told


def test_another_engine_in_its_place(
    refused: Callable[..., str], changed: Callable[[str, str], None]
) -> None:
    stand_in = "/usr/local/bin/docker"
    script = "#!/bin/sh\\nexec /usr/bin/podman \\$@\\n"
    changed(f'printf "{script}" >{stand_in}', f"rm {stand_in}")
    assert f"{stand_in} is podman's stand-in" in refused()
    changed("mkdir -p /snap/bin; touch /snap/bin/docker", "rm -r /snap")
    assert "comes from snap" in refused()


def test_an_engine_that_does_not_answer(
    lab: Any, refused: Callable[..., str], changed: Callable[[str, str], None]
) -> None:
    before = lab.output(SLAVE, "docker inspect --format '{{.State.StartedAt}}' cellblock-worker")
    changed("systemctl stop docker.socket docker.service", "systemctl start docker.socket docker")
    assert "no Docker engine answers at /run/docker.sock" in refused()
    lab.output(SLAVE, "systemctl start docker.socket docker")
    assert before == lab.output(
        SLAVE, "docker inspect --format '{{.State.StartedAt}}' cellblock-worker"
    )
