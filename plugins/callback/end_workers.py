# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Ends all workers of an ansible-playbook that is killed."""

from __future__ import annotations

DOCUMENTATION = r"""
name: end_workers
type: aggregate
short_description: Ends Ansible's workers when ansible-playbook is killed
version_added: 0.1.0
description:
  - Without it the workers of an ansible-playbook that was ended by SIGKILL go on with their tasks, and one may wait for ever.
  - With it the kernel ends them and their connections at once. What a module of another collection, such as C(apt), has begun on a
    host goes on there until it is done; modules of this one that wait end with their connection.
  - Nothing is printed. On controllers that do not run Linux it does nothing.
author: The Cellblock authors (@cellblock)
requirements:
  - C(callbacks_enabled) in C(ansible.cfg) names it, C(cellblock.fleet.end_workers).
"""

import os

from ansible.plugins.callback import CallbackBase
from ansible_collections.cellblock.fleet.plugins.plugin_utils import controller


class CallbackModule(CallbackBase):
    """Has each process that Ansible forks end with it."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "cellblock.fleet.end_workers"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._controller = os.getpid()
        self._is_worker = False
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        # What a worker forks is the worker's own affair.
        if not self._is_worker:
            self._is_worker = True
            controller.end_with(self._controller)
