"""What the databases hold outlives a kill, and comes back from a copy."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

testinfra_hosts = ["ansible://memory1"]

Variable = Callable[[str], Any]
Playbook = Callable[..., subprocess.CompletedProcess[str]]

UNIT = "redis-server"


def redis(host: Any, variable: Variable, *commands: str) -> list[str]:
    login = f"AUTH cellblock {variable('memory_database_password')}"
    text = "\\n".join((login, *commands))
    done = host.run(f"printf '{text}\\n' | redis-cli -h 127.0.0.1 | tail -n +2")
    lines: list[str] = done.stdout.split("\n")[: len(commands)]
    return lines


def psql(host: Any, statement: str) -> str:
    command = f'runuser -u postgres -- psql -qAt -d cellblock -c "{statement}"'
    output: str = host.check_output(f"cd / && {command}")
    return output


def test_what_was_answered_outlives_a_kill(host: Any, variable: Variable) -> None:
    written = redis(host, variable, *(f"SET killed:{n} {n}" for n in range(50)))
    assert written == ["OK"] * 50
    host.check_output(f"kill -9 $(systemctl show -P MainPID {UNIT}); sleep 1")
    host.check_output(
        f"for i in $(seq 100); do systemctl is-active -q {UNIT} && exit; sleep 0.2; done; exit 1"
    )
    kept = redis(host, variable, *(f"GET killed:{n}" for n in range(50)))
    redis(host, variable, *(f"DEL killed:{n}" for n in range(50)))
    assert kept == [str(n) for n in range(50)]


def test_the_units_end_and_start_within_limits(host: Any) -> None:
    database = host.get_host("ansible://database1")
    unit = database.check_output("systemctl list-units --plain --no-legend 'postgresql@*'").split()
    for machine, name in ((host, UNIT), (database, unit[0])):
        shown = machine.check_output(
            f"systemctl show -P TimeoutStopUSec -P TimeoutStartUSec {name}"
        )
        assert "infinity" not in shown, name


def test_backup_and_restore(
    host: Any, variable: Variable, playbook: Playbook, tmp_path: Path
) -> None:
    database = host.get_host("ansible://database1")
    where = ("-e", f"backup_dir={tmp_path}")
    psql(database, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (42)")
    try:
        assert redis(host, variable, "SET kept 42") == ["OK"]
        done = playbook("backup.yml", *where)
        assert done.returncode == 0, done.stdout
        assert {path.name for path in tmp_path.iterdir()} == {"database1.dump", "memory1.rdb"}
        psql(database, "UPDATE kept SET n = 7")
        assert redis(host, variable, "SET kept 7") == ["OK"]
        done = playbook("restore.yml", *where)
        assert done.returncode == 0, done.stdout
        assert psql(database, "SELECT n FROM kept") == "42"
        assert redis(host, variable, "GET kept") == ["42"]
    finally:
        psql(database, "DROP TABLE kept")
        redis(host, variable, "DEL kept")


def test_a_backup_without_a_directory_says_so(playbook: Playbook) -> None:
    done = playbook("backup.yml", "-e", "backup_dir=/nowhere")
    assert done.returncode != 0
    assert "there is no directory '/nowhere'" in " ".join(done.stdout.split())
