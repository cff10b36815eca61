# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What belongs to an ansible-playbook ends with it, also when it is killed.

Ansible runs each task in a worker, a process of its own. Killed with SIGKILL, ansible-playbook cannot end
them: they go on, with their connections, and on a host nothing tells that nobody waits any more.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_controller() -> None:
    """Has the kernel end this worker and what it started when its ansible-playbook ends."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)


def end_with(parent: int) -> None:
    """The same for a process whose parent is, or was, ``parent``. Linux only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    # Ansible's workers pass the signal on to their process group, and so to ssh.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
