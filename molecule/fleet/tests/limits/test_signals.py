"""Every standard signal: raised by the job, sent from the host, and ignored by the job."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable
from typing import Any

testinfra_hosts = ["ansible://slave1"]

Submit = Callable[..., dict[str, Any]]

# Default actions by signal(7); written down here, not taken from the code under test.
IGNORED = {"SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH"}
STOPPING = {"SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU"}
STANDARD = {s.name: int(s) for s in signal.Signals if int(s) < 32}
FATAL = {name: n for name, n in STANDARD.items() if name not in IGNORED | STOPPING}


def raising(number: int, prelude: str = "") -> list[str]:
    program = (
        f"import os, signal, sys, time\n{prelude}\n"
        f"os.kill(os.getpid(), {number})\ntime.sleep(0.01)\nprint('went on')\n"
    )
    return ["python3", "-c", program]


def stages_of(submit: Submit, commands: dict[str, list[str]], **constraints: Any) -> dict[str, Any]:
    """One job with one stage per entry, all run whatever the others do."""
    stages = [
        {"name": name, "command": command, "run_always": True, "constraints": constraints}
        for name, command in commands.items()
    ]
    record = submit({"environment": "python", "stages": stages})
    return {stage["name"]: stage for stage in record["stages"]}


def test_the_list_is_complete() -> None:
    assert len(STANDARD) == 31 and len(FATAL) == 23


def test_raised_by_the_job_itself(submit: Submit) -> None:
    default = "signal.signal({0}, signal.SIG_DFL) if {0} not in (9, 19) else None"
    seen = stages_of(submit, {name: raising(n, default.format(n)) for name, n in FATAL.items()})
    for name, number in FATAL.items():
        stage = seen[name]
        assert stage["signal"] == {"name": name, "number": number}
        assert stage["exit_code"] is None
        # The two that limits use are evidence of these limits.
        expected = {"SIGXFSZ": "limit_exceeded"}.get(name, "signaled")
        assert stage["verdict"] == expected, stage


def test_signals_whose_default_is_to_be_ignored(submit: Submit) -> None:
    seen = stages_of(submit, {name: raising(STANDARD[name]) for name in IGNORED})
    for name in IGNORED:
        assert (seen[name]["verdict"], seen[name]["stdout"]["text"]) == ("ok", "went on\n")


def test_a_stopped_job_runs_into_its_wall_time(submit: Submit) -> None:
    seen = stages_of(submit, {name: raising(STANDARD[name]) for name in STOPPING}, wall_time_ms=300)
    # SIGTSTP, SIGTTIN and SIGTTOU do not stop an orphaned process group (POSIX): those go on.
    assert [v["limit"] for v in seen["SIGSTOP"]["violations"]] == ["wall_time_ms"]
    for name in STOPPING - {"SIGSTOP"}:
        assert seen[name]["verdict"] in ("ok", "limit_exceeded")


def test_a_job_that_ignores_signals_goes_on(submit: Submit) -> None:
    names = {name: n for name, n in FATAL.items() if name != "SIGKILL"}
    prelude = "signal.signal({}, signal.SIG_IGN)"
    seen = stages_of(submit, {name: raising(n, prelude.format(n)) for name, n in names.items()})
    for name in names:
        assert (seen[name]["verdict"], seen[name]["stdout"]["text"]) == ("ok", "went on\n"), name


def test_a_job_that_ignores_signals_is_still_ended_by_a_limit(submit: Submit) -> None:
    program = (
        "import signal\n"
        "for n in range(1, 32):\n"
        "    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass\n"
    )
    stage = stages_of(submit, {"run": ["python3", "-c", program]}, cpu_time_ms=200)["run"]
    assert [v["limit"] for v in stage["violations"]] == ["cpu_time_ms"]
    assert stage["signal"]["name"] == "SIGKILL"


def test_sent_from_the_host(host: Any) -> None:
    # Each job's command says which signal it waits for.
    batch = [
        {
            "environment": "base",
            "stages": [{"name": "run", "command": ["sleep", f"7654{number:02d}"]}],
        }
        for number in FATAL.values()
    ]
    encoded = base64.b64encode(json.dumps(batch).encode()).decode()
    script = (
        f"echo {encoded} | base64 -d | cellblock run - > /tmp/signalled & "
        "for i in $(seq 1000); do "
        f"[ $(wc -l < /tmp/signalled) -lt {len(batch)} ] || break; "
        "pgrep -fax 'sleep 7654..' | while read pid _ number; do kill -${number#7654} $pid; done; "
        "sleep 0.02; done; wait; cat /tmp/signalled"
    )
    records = [json.loads(line) for line in host.run(script).stdout.splitlines()]
    seen = [record["stages"][0]["signal"] for record in records]
    assert seen == [{"name": name, "number": number} for name, number in FATAL.items()]
