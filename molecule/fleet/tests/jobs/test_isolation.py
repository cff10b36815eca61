"""What a job can see and touch, seen from inside and from the host; each "no" with its control."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Stage = Callable[..., dict[str, Any]]

CONNECT = "import socket; socket.create_connection(({!r}, 22), timeout=3).recv(3)"


def lines(stage: dict[str, Any]) -> list[str]:
    assert stage["verdict"] == "ok", stage
    return str(stage["stdout"]["text"]).splitlines()


def test_the_job_has_no_privilege(run_stage: Stage) -> None:
    status = dict(line.split(":\t", 1) for line in lines(run_stage("cat", "/proc/self/status")))
    for capability_set in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[capability_set], 16) == 0, capability_set
    assert status["NoNewPrivs"] == "1"
    assert status["Groups"].strip() == ""
    assert status["Uid"].split() == ["1000"] * 4


def test_the_job_is_not_root_on_the_host_and_its_init_is_somebody_else(host: Any) -> None:
    job = {
        "environment": "base",
        "stages": [
            {"name": "run", "command": ["sleep", "987654"], "constraints": {"wall_time_ms": "20s"}}
        ],
    }
    encoded = base64.b64encode(json.dumps(job).encode()).decode()
    seen = host.check_output(
        f"echo {encoded} | base64 -d | cellblock run - >/dev/null & "
        "for i in $(seq 100); do sleep 0.05; pid=$(pgrep -fx 'sleep 987654') && break; done; "
        "init=$(ps -o ppid= -p $pid | tr -d ' '); "
        "for p in $pid $init 1; do awk '/^Uid/ {print $2}' /proc/$p/status; "
        "for ns in user mnt pid net ipc uts cgroup; do readlink /proc/$p/ns/$ns; done; done; "
        "kill $!; wait"
    ).split()
    job_view, init_view, host_view = seen[:8], seen[8:16], seen[16:24]
    assert int(job_view[0]) >= 1_900_000_000
    assert int(init_view[0]) == int(job_view[0]) - 1
    assert host_view[0] == "0"
    for mine, hosts in zip(job_view[1:], host_view[1:], strict=True):
        assert mine != hosts
    assert job_view[1:] == init_view[1:]


def test_the_host_is_not_there(host: Any, run_stage: Stage) -> None:
    host.check_output("touch /etc/cellblock-canary /tmp/cellblock-canary")
    assert host.file("/etc/cellblock-canary").exists
    script = "ls -d /etc/cellblock* /tmp/* /var/lib/cellblock /opt/cellblock /run/cellblock /home/*; true"
    assert lines(run_stage("sh", "-c", script)) == []


def test_the_root_is_read_only_and_the_scratch_is_not(run_stage: Stage) -> None:
    script = "for d in / /etc /usr /dev /proc /work /tmp; do touch $d/x 2>/dev/null && echo $d; done; true"
    assert lines(run_stage("sh", "-c", script)) == ["/work", "/tmp"]


def test_no_setuid_programs(host: Any, run_stage: Stage) -> None:
    search = "find / -xdev -perm /6000 -type f 2>/dev/null; true"
    assert "/usr/bin/su" in host.check_output(search)
    assert lines(run_stage("sh", "-c", search)) == []


def test_only_the_jobs_own_processes_and_descriptors(run_stage: Stage) -> None:
    shown = lines(run_stage("sh", "-c", "cd /proc; echo [0-9]*; cat 1/comm; ls self/fd"))
    # jobinit and the shell; then the three standard descriptors and ls's own directory.
    assert shown == ["1 2", "jobinit", "0", "1", "2", "3"]


def test_the_init_is_out_of_reach(run_stage: Stage) -> None:
    script = (
        "for f in environ maps mem fd/3 root cwd exe; do cat /proc/1/$f >/dev/null 2>&1 && echo $f; done; "
        "kill -9 1 2>/dev/null && echo kill; true"
    )
    assert lines(run_stage("sh", "-c", script)) == []


def test_no_network(host: Any, run_stage: Stage) -> None:
    # No neighbour is needed: the host's own addresses answer the host (control), not the job.
    address = host.check_output("hostname -I").split()[0]
    assert host.run(f'python3 -c "{CONNECT.format(address)}"').rc == 0
    stage = run_stage("python3", "-c", CONNECT.format(address), environment="python")
    assert "Network is unreachable" in stage["stderr"]["text"]
    interfaces = lines(run_stage("cat", "/proc/net/dev"))[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_a_jobs_children_do_not_outlive_it_and_nothing_is_left(host: Any, run_stage: Stage) -> None:
    script = "for i in 1 2 3; do setsid sleep 876543 & done; echo done"
    assert lines(run_stage("sh", "-c", script)) == ["done"]
    assert host.run("pgrep -f 'sleep 876543'").rc == 1
    assert host.check_output("ls /run/cellblock/jobs") == ""
    assert host.check_output("find /sys/fs/cgroup -path '*cellblock-jobs/*' -type d") == ""
    assert "cellblock/jobs" not in host.file("/proc/mounts").content_string


def test_who_may_submit(host: Any, submit: Callable[..., dict[str, Any]]) -> None:
    job = {"environment": "base", "stages": [{"name": "run", "command": ["true"]}]}
    host.check_output(
        "id alice >/dev/null 2>&1 || useradd alice; gpasswd -d alice cellblock >/dev/null 2>&1; true"
    )
    refused = submit(job, user="alice")
    assert refused["error"]["code"] == "service_unavailable"
    host.check_output("usermod -aG cellblock alice")
    assert submit(job, user="alice")["verdict"] == "ok"


def test_users_of_the_host_can_leave_nothing_where_the_service_or_a_job_finds_it(
    host: Any, run_stage: Stage
) -> None:
    # What nsjail would open, owned by somebody else.
    nobody = "runuser -u nobody --"
    host.check_output("rm -rf /tmp/nsjail.0.root")
    host.check_output(f"{nobody} touch /tmp/nsjail.0.root")
    try:
        host.check_output("systemctl restart cellblock")
        assert lines(run_stage("echo", "runs")) == ["runs"]
    finally:
        host.check_output("rm -f /tmp/nsjail.0.root")

    # The control: what may be written can be, and is found.
    def writable(*places: str) -> list[str]:
        # It fails where nobody may not even look.
        return str(
            host.run(f"{nobody} find {' '.join(places)} -xdev -type d -writable").stdout
        ).split()

    assert "/var/tmp" in writable("/var/tmp")
    found = writable("/var/lib/cellblock", "/opt/cellblock", "/run/cellblock")
    # Over these a job's own is mounted.
    assert [path for path in found if not path.endswith("/tmp")] == []


@pytest.mark.parametrize("policy", ["none", "cache", "internet"])
def test_the_jobs_own_name_resolves(run_stage: Stage, policy: str) -> None:
    lookup = (
        "import socket; name = socket.gethostname(); print(name, socket.gethostbyname(name));"
        "print(*sorted({entry[4][0] for entry in socket.getaddrinfo(name, 80)}))"
    )
    script = f"getent hosts cellblock; python3 -c '{lookup}'"
    stage = run_stage("sh", "-c", script, environment="python", network=policy)
    known, *resolved = lines(stage)
    assert known.split()[0] in ("::1", "127.0.0.1")
    assert resolved == ["cellblock 127.0.0.1", "127.0.0.1 ::1"]


def test_the_jobs_own_name_resolves_with_an_allow_list(run_stage: Stage) -> None:
    allow = [{"to": "203.0.113.7", "protocol": "tcp", "ports": [443]}]
    stage = run_stage("getent", "ahosts", "cellblock", network="allow", network_allow=allow)
    assert lines(stage)[0].split()[0] in ("::1", "127.0.0.1")
