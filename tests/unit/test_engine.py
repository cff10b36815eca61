"""The engine's checks, with nothing of the host behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cellblock.engine import run as run_module
from cellblock.engine.host import Host
from cellblock.engine.job import Job
from cellblock.engine.job_parser import parse_job
from cellblock.engine.run import Engine
from cellblock.engine.workers import Workers
from cellblock.errors import (
    LimitAboveMaximumError,
    UnknownEnvironmentError,
    UnknownMountError,
    UnsupportedNetworkError,
)
from cellblock.job_network.slots import JobNetwork


class FakeNetwork(JobNetwork):
    """Without slots; what it writes into environments is real."""

    def __init__(self, *_: Any) -> None:
        self.resolved: list[str] = []

    def access(self, policy: Any, destinations: Any, where: str) -> Any:
        self.resolved.append(where)
        return SimpleNamespace()

    def require_ready(self) -> None:
        pass

    def reconfigure(self, config: Any) -> bool:
        return bool(config.is_taken_over)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr(run_module, "JobNetwork", FakeNetwork)
    (tmp_path / "base" / "etc").mkdir(parents=True)
    environments = tmp_path / "environments.json"
    environments.write_text(
        json.dumps({"base": {"path": str(tmp_path / "base"), "default_path": "/bin"}})
    )

    def engine(network: Any = None) -> Engine:
        return Engine(
            Host(
                nsjail=Path("/bin/true"),
                jobinit=Path("/bin/true"),
                environments_file=environments,
                run_dir=tmp_path / "run",
                spool_dir=tmp_path / "spool",
                first_id=1_900_000_000,
                parallel_jobs=1,
                network=network,
            ),
            cast(Workers, None),
        )

    return engine


def job(**changes: Any) -> Job:
    stage = {"name": "run", "command": ["true"], **changes.pop("stage", {})}
    return parse_job({"environment": "base", "stages": [stage], **changes})


def test_a_check_writes_nothing(make: Callable[..., Engine], tmp_path: Path) -> None:
    network = FakeNetwork()
    engine = make(SimpleNamespace(slots=1))
    before = sorted(tmp_path.rglob("*"))
    checked = engine.check(job(stage={"network": "cache"}))
    assert sorted(tmp_path.rglob("*")) == before
    assert set(checked.accesses) == {"run"}
    # Control: what a run needs would have been seen.
    network.prepare(checked.environment.path)
    assert sorted(tmp_path.rglob("*")) != before


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"environment": "cobol"}, UnknownEnvironmentError),
        ({"mounts": ["data"]}, UnknownMountError),
        ({"stage": {"network": "cache"}}, UnsupportedNetworkError),
        ({"stage": {"constraints": {"processes": 99_999}}}, LimitAboveMaximumError),
    ],
)
def test_what_this_host_would_not_run(
    make: Callable[..., Engine], wrong: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make().check(job(**wrong))


def test_only_what_jobs_are_denied_is_taken_over(make: Callable[..., Engine]) -> None:
    network: Any = SimpleNamespace(slots=1, is_taken_over=False)
    engine = make(network)
    other: Any = SimpleNamespace(slots=1, is_taken_over=True)
    assert engine.reconfigure(replace(engine.host, network=other))
    assert engine.host.network is other
    assert not engine.reconfigure(replace(engine.host, network=network))
    for changes in ({"parallel_jobs": 2}, {"run_dir": Path("/run/other")}):
        assert not engine.reconfigure(replace(engine.host, network=other, **changes))
        assert not engine.reconfigure(replace(engine.host, network=None, **changes))
    assert engine.host.network is other
    without = make()
    assert without.reconfigure(without.host)
    assert not without.reconfigure(replace(without.host, network=network))
    assert not engine.reconfigure(replace(engine.host, network=None))
