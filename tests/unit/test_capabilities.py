"""Capability masks of /proc/PID/status: which capabilities they lack."""

from __future__ import annotations

from typing import Any

import capabilities
import pytest
from ansible.errors import AnsibleFilterError


@pytest.mark.parametrize(
    ("mask", "last", "absent"),
    [
        ("000001ffffffffff", 40, []),
        ("000001fffeffffff", 40, ["SYS_RESOURCE"]),
        ("000001fffffffffe", "40", ["CHOWN"]),
        # An older kernel: what it does not know is not absent.
        ("0000003fffffffff", 37, []),
        ("0000003fffffffff", 40, ["PERFMON", "BPF", "CHECKPOINT_RESTORE"]),
    ],
)
def test_absent_capabilities(mask: str, last: int | str, absent: list[str]) -> None:
    assert capabilities.absent_capabilities(mask, last) == absent


@pytest.mark.parametrize(("mask", "last"), [("what", 40), ("ff", "many"), (None, 40)])
def test_absent_capabilities_refuses(mask: Any, last: Any) -> None:
    with pytest.raises(AnsibleFilterError, match="hexadecimal mask"):
        capabilities.absent_capabilities(mask, last)
