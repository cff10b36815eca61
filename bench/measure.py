"""Measure what the local fleet costs: seconds for `make up` and for a second run, and memory.

Works on a fleet of its own, named 'bench', and removes it at the end. The limits beside the
results are what the project has set itself on a machine with two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FLEET = "bench"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measurement:
    """One row of the table: what was measured, how much of which unit, and the limit."""

    what: str
    amount: float
    limit: float
    unit: str

    def row(self) -> str:
        """The row as Markdown."""
        return f"| {self.what} | {self.amount:.0f} {self.unit} | {self.limit:.0f} {self.unit} |"


def run(*command: str) -> str:
    """Run a command in the checkout and return its output; exits with it when it fails."""
    print(f"==> {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CELLBLOCK_FLEET": FLEET},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        sys.exit(f"bench: {' '.join(command)} failed with status {done.returncode}")
    return done.stdout


def seconds(*command: str) -> float:
    """Wall time of a command."""
    start = time.monotonic()
    run(*command)
    return time.monotonic() - start


# Bytes in use, and the file pages among them, which the kernel gives back when others need them.
MEMORY_SCRIPT = """
if [ -e /sys/fs/cgroup/memory ]; then
    cd /sys/fs/cgroup/memory && cat memory.usage_in_bytes && sed -n 's/^total_[a-z]*active_file //p' memory.stat
else
    cd /sys/fs/cgroup && cat memory.current && sed -n 's/^[a-z]*active_file //p' memory.stat
fi
"""


def idle_mebibytes() -> float:
    """Memory of all containers of the fleet together, without the page cache."""
    names = run(
        "docker", "ps", "--filter", f"label=org.cellblock.fleet={FLEET}", "--format", "{{.Names}}"
    ).split()
    total = 0
    for name in names:
        used, *cached = map(int, run("docker", "exec", name, "sh", "-c", MEMORY_SCRIPT).split())
        total += used - sum(cached)
    return total / 2**20


def main() -> None:
    """Measure, and print the table."""
    run("make", "setup")
    run("make", "down")
    # Fills the caches, in case that this is the first run here.
    run("make", "up")
    run("make", "down")
    try:
        rows = [
            Measurement("`make up`, images and caches there", seconds("make", "up"), 300, "s"),
            Measurement("`make up`, fleet running", seconds("make", "up"), 150, "s"),
            Measurement(
                "second `playbooks/site.yml`",
                seconds(".venv/bin/ansible-playbook", "playbooks/site.yml"),
                90,
                "s",
            ),
            Measurement(
                "`playbooks/verify-isolation.yml`",
                seconds(".venv/bin/ansible-playbook", "playbooks/verify-isolation.yml"),
                30,
                "s",
            ),
            Measurement(
                "idle fleet, all hosts together, without page cache", idle_mebibytes(), 1200, "MiB"
            ),
        ]
    finally:
        run("make", "down")
    print(f"On {os.cpu_count()} cores:\n\n| what | measured | limit |\n|---|---|---|")
    for row in rows:
        print(row.row())


if __name__ == "__main__":
    main()
