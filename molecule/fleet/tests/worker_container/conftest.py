"""The worker container of slave2, and what its root can run there."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAME = "cellblock-worker"
ATTACKS = Path(__file__).parents[4] / "roles/worker_container/files/attacks"
ENGINE = "/opt/cellblock/engine"

Inside = Callable[..., str]


def put(host: Any, path: str, content: bytes) -> None:
    done = host.run(f"echo {base64.b64encode(content).decode()} | base64 -d >{path}")
    assert done.rc == 0, done.stderr


@pytest.fixture
def inside(host: Any) -> Inside:
    """Runs a Python program as the container's root; what it printed."""

    def run(program: str, *arguments: str, user: str = "0") -> str:
        encoded = base64.b64encode(program.encode()).decode()
        words = " ".join(arguments)
        done = host.run(
            f"echo {encoded} | base64 -d | timeout 60 docker exec --interactive --user {user} {NAME} python3 - {words}"
        )
        assert done.rc == 0, done.stderr
        return str(done.stdout)

    return run


@pytest.fixture
def start_job(host: Any) -> Iterator[Callable[..., Callable[[], dict[str, Any]]]]:
    """Starts a job in the container and gives back what waits for its record."""
    started: list[str] = []

    def start(*command: str, **fields: Any) -> Callable[[], dict[str, Any]]:
        path = f"/root/contained-{len(started)}"
        job = {
            "environment": "python",
            "target": "worker_container",
            "stages": [{"name": "run", "command": list(command), **fields}],
        }
        put(host, f"{path}.json", json.dumps(job).encode())
        host.check_output(f"cellblock run {path}.json >{path}.record 2>&1 & echo")
        started.append(path)

        def record() -> dict[str, Any]:
            for _ in range(300):
                text = host.file(f"{path}.record").content_string
                if text.endswith("\n"):
                    found: dict[str, Any] = json.loads(text.splitlines()[0])
                    return found
                time.sleep(0.1)
            raise AssertionError(f"{path}: no record within 30 s")

        return record

    yield start
    for path in started:
        host.run(f"rm -f {path}.json {path}.record")


@pytest.fixture
def ready(host: Any) -> Callable[[], None]:
    """Waits until the container runs again and its engine answers."""

    def wait() -> None:
        host.check_output(
            f"for i in $(seq 100); do docker exec {NAME} docker info >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1"
        )

    return wait
