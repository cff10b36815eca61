"""Filter that reads Linux capability sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError

# In the order of their bits (linux/capability.h). The three later ones (PERFMON, BPF,
# CHECKPOINT_RESTORE) are left out: Docker 20.10 does not know them, and SYS_ADMIN includes them.
CAPABILITIES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO
    SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME
    SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
    WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
""".split()


def capability_names(mask: str) -> list[str]:
    """Names (without CAP_) of the capabilities in `mask`, those that Docker 20.10 knows.

    `mask` is hexadecimal, as in the lines Cap* of /proc/PID/status.
    """
    try:
        bits = int(mask, 16)
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(
            f"cellblock.fleet.capability_names: {mask!r} is not a hexadecimal mask"
        ) from error
    return [name for bit, name in enumerate(CAPABILITIES) if bits >> bit & 1]


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"capability_names": capability_names}
