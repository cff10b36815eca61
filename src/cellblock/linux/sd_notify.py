"""Notifications to systemd: sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Sends ``state`` (``READY=1``, ``WATCHDOG=1``) where systemd waits for it.

    Never raises: a service whose notices do not arrive is one that systemd ends.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier,
    ):
        notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        notifier.sendall(state.encode())
