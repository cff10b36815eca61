"""A host that has no room to start a stage: told from one that is broken, and tried again."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from cellblock.engine import runner as run_room
from cellblock.engine.jail import Failed, Jail
from cellblock.engine.limits import StageConstraints
from cellblock.engine.result import StageResult, Verdict
from cellblock.errors import HostOverloadedError

CONFINE, EXECUTE = 8, 7
ENOTSUPP, EPERM = 524, 1


def jail_that_says(step: int, error: int) -> Jail:
    jail = Jail.__new__(Jail)
    jail._socket, jobinit = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with jobinit:
        jobinit.send(struct.pack("=IIiI", 0x4C494146, step, error, 0))
    return jail


def test_no_memory_for_filters_is_the_hosts_load() -> None:
    jail = jail_that_says(CONFINE, ENOTSUPP)
    with jail._socket, pytest.raises(HostOverloadedError, match="bpf_jit_limit"):
        jail.event()


@pytest.mark.parametrize(("step", "error"), [(CONFINE, EPERM), (EXECUTE, ENOTSUPP)])
def test_other_failures_are_not(step: int, error: int) -> None:
    jail = jail_that_says(step, error)
    with jail._socket:
        assert isinstance(jail.event(), Failed)


class Stage:
    name, constraints = "run", StageConstraints()


class Run:
    def __init__(self, *, cancelled: bool = False) -> None:
        self._cancelled = cancelled

    def cancelled(self) -> bool:
        return self._cancelled


def run_stage(monkeypatch: pytest.MonkeyPatch, failures: int, run: Run) -> tuple[StageResult, int]:
    """The record of a stage that the host cannot start ``failures`` times, and how often it was tried."""
    tries = 0

    def attempt(*_: Any) -> StageResult:
        nonlocal tries
        tries += 1
        if tries <= failures:
            raise HostOverloadedError("jail", "is full", "wait")
        return StageResult("run", Verdict.OK, StageConstraints())

    monkeypatch.setattr(run_room, "_OVERLOAD_PAUSE_S", 0.01)
    monkeypatch.setattr(run_room, "_OVERLOAD_PATIENCE_S", 0.2)
    monkeypatch.setattr(run_room.Runner, "_try_stage", attempt)
    arguments: Any = (run, Stage(), None)
    return run_room.Runner.__new__(run_room.Runner)._run_stage(*arguments), tries


def test_a_stage_that_could_not_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    result, tries = run_stage(monkeypatch, 3, Run())
    assert (result.verdict, tries) == (Verdict.OK, 4)


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    result, tries = run_stage(monkeypatch, 10**6, Run())
    assert result.verdict is Verdict.INTERNAL_ERROR
    assert result.reason == "jail: is full; wait"
    assert 2 <= tries <= 22


def test_nor_for_a_client_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_stage(monkeypatch, 10**6, Run(cancelled=True))[1] == 1
