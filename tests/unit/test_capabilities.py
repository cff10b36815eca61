"""Capability masks of /proc/PID/status: which capabilities they stand for."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter import capabilities


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        ("0000000000000000", []),
        ("0000000000000001", ["CHOWN"]),
        # What Docker grants by default.
        (
            "00000000a80425fb",
            "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW"
            " SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP".split(),
        ),
        # Capabilities that Docker 20.10 refuses by name.
        ("000001c000000000", []),
    ],
)
def test_capability_names(mask: str, names: list[str]) -> None:
    assert capabilities.capability_names(mask) == names


def test_a_machine_without_sys_resource() -> None:
    whole = set(capabilities.capability_names("000001ffffffffff"))
    assert whole - set(capabilities.capability_names("000001fffeffffff")) == {"SYS_RESOURCE"}


@pytest.mark.parametrize("mask", ["what", "", None])
def test_capability_names_refuses(mask: Any) -> None:
    with pytest.raises(AnsibleFilterError, match="is not a hexadecimal mask"):
        capabilities.capability_names(mask)
