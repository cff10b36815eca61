"""What all unit tests share."""

from __future__ import annotations

from pathlib import Path

from ansible.plugins.loader import init_plugin_loader

# So that templates find the collection's filters by their full names, as in a playbook.
init_plugin_loader([str(Path(__file__).resolve().parents[2] / "collections")])
