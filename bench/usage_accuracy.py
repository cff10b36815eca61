"""How true the usage figures are: workloads of known cost, run many times on the local fleet.

Prints a Markdown table: for every figure the known amount, and the median and the worst of what was
reported less the cost of a program that does nothing, idle and with a process that keeps a core of
this machine busy. The local fleet must be up and provisioned (`make up`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS = ROOT / "bench" / "workloads"
REPETITIONS = 20
KNOWN = {
    "cpu-500ms": ("cpu_time_ms", 500, {}),
    "memory-100mib": ("memory_peak_bytes", 100 * 2**20, {}),
    "written-10mib": ("written_bytes", 10 * 2**20, {}),
    "processes-200": ("processes_peak", 199, {"processes": 200}),
    "switches-1000": ("voluntary_context_switches", 1000, {}),
}
"""Workload -> figure, known amount above a program that does nothing, constraints."""


def main() -> int:
    print(f"{REPETITIONS} runs each; error of the median / of the worst run\n")
    print("| workload | figure | known | idle | one core busy |\n|---|---|---|---|---|")
    for name, (figure, known, constraints) in KNOWN.items():
        idle = errors(name, figure, known, constraints)
        spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            busy = errors(name, figure, known, constraints)
        finally:
            spinner.kill()
            spinner.wait()
        print(f"| {name} | `{figure}` | {known} | {idle} | {busy} |", flush=True)
    return 0


def errors(name: str, figure: str, known: int, constraints: dict[str, Any]) -> str:
    """The error of the median and of the worst run, in percent of what is known."""
    seen = [
        record["stages"][1]["usage"][figure] - record["stages"][2]["usage"][figure]
        for record in run(name, constraints)
    ]
    off = [100 * (value - known) / known for value in seen]
    return f"{statistics.median(off):+.2f} % / {max(off, key=abs):+.2f} %"


def run(name: str, constraints: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of the workload, run again and again by run-job.yml."""
    work, nothing = ((WORKLOADS / f"{source}.c").read_text() for source in (name, "nothing"))
    compile_both = "gcc -O1 -o work work.c && gcc -O1 -o nothing nothing.c"
    job = {
        "environment": "c",
        "files": {"work.c": {"text": work}, "nothing.c": {"text": nothing}},
        "stages": [
            {"name": "compile", "command": ["sh", "-c", compile_both]},
            {"name": "work", "command": ["./work"], "constraints": constraints},
            {"name": "nothing", "command": ["./nothing"], "constraints": constraints},
        ],
    }
    with tempfile.TemporaryDirectory() as directory:
        path, output = Path(directory) / "job.json", Path(directory) / "results.json"
        path.write_text(json.dumps(job))
        subprocess.run(
            [
                "ansible-playbook",
                "playbooks/run-job.yml",
                # One slave: two on one machine would be each other's noise.
                "--limit=localhost,slave1",
                f"--extra-vars={json.dumps({'job': [str(path)] * REPETITIONS})}",
                f"--extra-vars=output={output}",
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        records: list[dict[str, Any]] = json.loads(output.read_text())
    return records


if __name__ == "__main__":
    sys.exit(main())
