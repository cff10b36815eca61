"""network_probe as Ansible calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.cellblock.fleet.plugins.modules import network_probe

Run = Callable[..., dict[str, Any]]
ECHO = {"id": "own", "address": "127.0.0.1", "protocol": "tcp", "port": 1}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*, check: bool = False, **parameters: Any) -> dict[str, Any]:
        arguments = {**parameters, "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            network_probe.main()
        returned: dict[str, Any] = json.loads(capsys.readouterr().out)
        return returned

    return call


def test_probed(run: Run) -> None:
    done = run(state="probed", targets=[ECHO], timeout_ms=500)
    assert not done["changed"]
    (result,) = done["results"]
    assert (result["id"], result["outcome"]) == ("own", "refused")


def test_listening_without_listeners_tells_about_interfaces(run: Run) -> None:
    done = run(state="listening")
    assert (done["changed"], done["handle"], done["listeners"]) == (False, None, [])
    assert "127.0.0.1" in done["own_addresses"]
    assert all(entry["name"] != "lo" for entry in done["interfaces"])


def test_check_mode_does_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("called in check mode")

    for name in ("probe", "listen", "collect"):
        monkeypatch.setattr(network_probe, name, never)
    listener = {"id": "a", "protocol": "tcp", "port": 1}
    assert run(state="probed", targets=[ECHO], check=True)["results"] == []
    assert run(state="listening", listeners=[listener], check=True)["handle"] is None
    assert run(state="collected", check=True)["was_running"] is False


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"state": "probed", "targets": [{**ECHO, "port": None}]}, "target own: port is missing"),
        ({"state": "probed", "timeout_ms": 0}, "timeout_ms is 0; use 1 to 60000."),
        ({"state": "listening", "duration_s": 99999}, "duration_s is 99999; use 1 to 3600."),
        (
            {"state": "listening", "listeners": [{"id": "a", "protocol": "udp", "port": 70000}]},
            "listener a: port is 70000",
        ),
        ({"state": "gone"}, "value of state must be one of"),
    ],
)
def test_mistakes(run: Run, parameters: dict[str, Any], message: str, check: bool) -> None:
    done = run(**parameters, check=check)
    assert done["failed"]
    assert message in done["msg"]
