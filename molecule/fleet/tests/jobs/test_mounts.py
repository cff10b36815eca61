"""Directories that the operator offers: by name, read-only unless both sides say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Submit = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def directories(host: Any) -> None:
    host.check_output(
        "mkdir -p /srv/datasets /srv/drop && echo given > /srv/datasets/in && chmod 1777 /srv/drop"
    )


def job(script: str, *mounts: Any) -> dict[str, Any]:
    return {
        "environment": "base",
        "mounts": list(mounts),
        "stages": [{"name": "run", "command": ["sh", "-c", script]}],
    }


def test_read_only_by_default(submit: Submit) -> None:
    script = "cat /mnt/datasets/in; touch /mnt/datasets/x 2>/dev/null || touch /mnt/x 2>/dev/null; ls /mnt"
    stage = submit(job(script, "datasets", "drop"))["stages"][0]
    assert stage["stdout"]["text"] == "given\ndatasets\ndrop\n"


def test_writable_when_both_say_so(host: Any, submit: Submit) -> None:
    wanted = {"name": "drop", "writable": True}
    assert submit(job("echo out > /mnt/drop/result", wanted))["verdict"] == "ok"
    assert host.file("/srv/drop/result").content_string == "out\n"
    assert host.file("/srv/drop/result").uid >= 1_900_000_000
    # The same mount without the wish stays read-only.
    assert submit(job("echo out > /mnt/drop/result", "drop"))["verdict"] == "nonzero_exit"


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("etc", ["'etc'", "datasets, drop, nowhere", "worker_slave_mounts"]),
        ({"name": "datasets", "writable": True}, ["'datasets'", "read-only"]),
    ],
)
def test_what_is_not_offered(submit: Submit, mount: Any, words: list[str]) -> None:
    error = submit(job("true", mount))["error"]
    assert error["code"] == "unknown_mount"
    for word in words:
        assert word in error["text"]


def test_an_offered_directory_that_is_missing(submit: Submit) -> None:
    error = submit(job("true", "nowhere"))["error"]
    assert (error["code"], error["subject"]) == ("host_setup", "job 1: /srv/nowhere")


def test_a_descriptor_passed_out_through_a_mount_does_not_hold_the_stage(
    host: Any, submit: Submit
) -> None:
    # A process of the host keeps the job's stdout open; the record comes all the same.
    keeper = (
        "import array, os, socket, time\n"
        "path = '/srv/drop/keeper'\n"
        "if os.path.exists(path): os.unlink(path)\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(path); os.chmod(path, 0o777); s.listen()\n"
        "s.settimeout(20); c, _ = s.accept(); fds = socket.recv_fds(c, 9, 1); time.sleep(8)\n"
    )
    host.check_output(f'nohup python3 -c "{keeper}" >/dev/null 2>&1 & sleep 0.5')
    program = (
        "import os, socket\n"
        "s = socket.socket(socket.AF_UNIX); s.connect('/mnt/drop/keeper')\n"
        "socket.send_fds(s, [b'x'], [1]); print('sent', flush=True)\n"
    )
    wanted = {"name": "drop", "writable": True}
    record = submit(
        {
            "environment": "python",
            "mounts": [wanted],
            "stages": [{"name": "run", "command": ["python3", "-c", program]}],
        }
    )
    stage = record["stages"][0]
    assert (stage["verdict"], stage["stdout"]["text"]) == ("ok", "sent\n"), stage
    assert stage["usage"]["wall_time_ms"] < 5000
