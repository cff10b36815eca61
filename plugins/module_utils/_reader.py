# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Notices on a host that nobody waits for a module any more.

A play that is cancelled or killed closes the connection. Without a terminal the remote side gets no signal,
but sshd, as the local connection does, closes the other end of the module's output. (Docker's connection keeps
it open, and the output of an asynchronous task belongs to its wrapper: both go on until they are done.)
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable


def when_unread(act: Callable[[], object], output: int | None = None) -> None:
    """Calls ``act`` in a thread as soon as nobody can read ``output``: without being told otherwise, what is printed."""
    if output is None:
        output = sys.__stdout__.fileno() if sys.__stdout__ else 1
    # Of its own, so that whoever closes the other does not end the watch.
    watched = os.dup(output)

    def watch() -> None:
        events = select.poll()
        events.register(watched, 0)
        # No event was asked for: returns on an error or a hang-up only.
        events.poll()
        act()

    threading.Thread(target=watch, daemon=True).start()


def end_process_group() -> None:
    """Ends the module and the programs that it runs, which may clean up."""
    os.killpg(os.getpgrp(), signal.SIGTERM)
