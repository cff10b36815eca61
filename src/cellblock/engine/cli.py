"""The ``cellblock`` command: one of several doors to the same engine."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import BAD_INPUT, CellblockError, InvalidJobError
from ..text import printable
from . import client
from . import result_table as table
from .documents import parse_document
from .job_file import as_request, load_job_data

EXIT_OK, EXIT_JOB_NOT_OK, EXIT_BAD_INPUT, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\
exit status:
  0    every job ended well
  1    a job did not: see its verdict
  2    bad usage or an invalid job; nothing was run
  3    the service or this host cannot run jobs
  130  interrupted; the jobs were ended
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.function(options)
        return status
    except CellblockError as problem:
        if getattr(options, "format", None) == "json":
            print(json.dumps({"error": problem.as_dict()}))
        # A job file's keys may be made for the terminal that shows them.
        print(f"cellblock: {printable(str(problem))}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(problem, BAD_INPUT) else EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cellblock",
        description="Runs untrusted programs in sandboxes on this host and reports what they did.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cellblock {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run jobs and print one JSON record per job")
    run.add_argument(
        "jobs", nargs="+", metavar="JOB", help="job file (YAML or JSON); - reads one or a list"
    )
    run.add_argument(
        "--format", choices=("json", "table"), default="json", help="what to print (default: json)"
    )
    run.add_argument(
        "--json", action="store_const", dest="format", const="json", help="--format json"
    )
    run.set_defaults(function=_run)

    check = commands.add_parser(
        "check", help="say whether this host would run the jobs; runs nothing"
    )
    check.add_argument("jobs", nargs="+", metavar="JOB", help="as for run")
    check.set_defaults(function=_check, format="json")

    environments = commands.add_parser("environments", help="list what jobs can run in")
    environments.set_defaults(function=_environments)

    slot = commands.add_parser(
        "slot",
        help="run a command as root in a network slot, behind its filter",
        description="Runs COMMAND as root in a network slot of its own, behind the filter that a "
        "stage with the same policy has. For looking into what jobs can reach; root only.",
    )
    slot.add_argument(
        "--policy",
        required=True,
        choices=("cache", "internet", "allow"),
        help="as a stage's network",
    )
    slot.add_argument(
        "--allow",
        action="append",
        type=_destination,
        metavar="PROTOCOL:TO:PORT[,PORT]",
        help="with --policy allow: who may be reached, for example tcp:198.51.100.0/24:80,443",
    )
    slot.add_argument(
        "--constraint",
        action="append",
        default=[],
        type=_constraint,
        metavar="NAME=VALUE",
        help="one of a stage's network limits, for example network_bytes=10MB",
    )
    slot.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    slot.set_defaults(function=_slot)

    config = commands.add_parser(
        "check-config", help="say whether the service would start with a configuration"
    )
    config.add_argument("config", type=Path, metavar="FILE", help="what would be engine.json")
    config.set_defaults(function=_check_config)

    service = commands.add_parser("serve", help="the supervisor; started by systemd")
    service.add_argument("--config", type=Path, metavar="FILE", help="the host's configuration")
    service.set_defaults(function=_serve)
    return parser


def _run(options: argparse.Namespace) -> int:
    jobs = _read(options.jobs)
    records = []
    try:
        for (_, job), outcome in zip(jobs, client.run(jobs), strict=True):
            record = _failure(job, outcome) if isinstance(outcome, CellblockError) else outcome
            records.append(record)
            _show_progress(len(records), len(jobs))
            if options.format == "json":
                # At once: what was returned is not lost, whatever happens to the others.
                print(json.dumps(record), flush=True)
    except BrokenPipeError:
        # Nobody reads on. Its connection ends with this process, and with it the jobs.
        os._exit(EXIT_INTERRUPTED)
    if options.format == "table":
        print(table.render(records), table.render_output(records), sep="\n")
    for record in records:
        if "error" in record:
            print(f"cellblock: {record['name']}: {record['error']['text']}", file=sys.stderr)
    if any("error" in record for record in records):
        return EXIT_UNAVAILABLE
    return EXIT_OK if all(r["verdict"] == "ok" for r in records) else EXIT_JOB_NOT_OK


def _failure(job: dict[str, Any], problem: CellblockError) -> dict[str, Any]:
    """In place of the record of a job with which the service failed."""
    return {
        "name": job.get("name", "job"),
        "verdict": "internal_error",
        "stages": [],
        "error": problem.as_dict(),
    }


def _show_progress(done: int, total: int) -> None:
    """A bar on batches, while a person watches."""
    if total < 2 or not sys.stderr.isatty():
        return
    width = 40
    filled = width * done // total
    end = "\n" if done == total else ""
    bar = "#" * filled + "." * (width - filled)
    print(f"\r[{bar}] {done}/{total} jobs", end=end, file=sys.stderr, flush=True)


def _check_config(options: argparse.Namespace) -> int:
    from .host import Host

    Host.load(options.config)
    return EXIT_OK


def _check(options: argparse.Namespace) -> int:
    client.check(_read(options.jobs))
    return EXIT_OK


def _read(sources: list[str]) -> list[client.NamedJob]:
    """Every job as data for the service, under the name by which errors call it."""
    jobs: list[client.NamedJob] = []
    for source in sources:
        if source == "-":
            data = parse_document(sys.stdin.read(), "standard input")
            jobs += [
                (_called(job, n), as_request(job))
                for n, job in enumerate(data if isinstance(data, list) else [data], 1)
            ]
        else:
            jobs.append((source, as_request(load_job_data(Path(source)))))
    if not jobs:
        raise InvalidJobError("standard input", "has no job", "send a job or a list of jobs")
    return jobs


def _called(job: Any, number: int) -> str:
    """How errors call a job of standard input: by its own name, if it has one."""
    name = job.get("name") if isinstance(job, dict) else None
    return f"job {name}" if isinstance(name, str) else f"job {number}"


def _environments(_: argparse.Namespace) -> int:
    for name, description in sorted(client.environments().items()):
        print(f"{name:<16} {description}")
    return EXIT_OK


def _destination(text: str) -> dict[str, Any]:
    protocol, _, rest = text.partition(":")
    to, _, ports = rest.rpartition(":")
    try:
        return {"to": to, "protocol": protocol, "ports": [int(port) for port in ports.split(",")]}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PROTOCOL:TO:PORT[,PORT]; write for example tcp:198.51.100.10:443"
        ) from None


def _constraint(text: str) -> tuple[str, Any]:
    from .limits import LIMITS  # of no use to those who run jobs, who start often

    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    known = [limit for limit in LIMITS if limit.startswith("network_")]
    if name not in known:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no limit of a network; write one of {', '.join(known)}"
        )
    return name, int(value) if value.isdigit() else value


def _slot(options: argparse.Namespace) -> int:
    wanted = {"network": options.policy, "constraints": dict(options.constraint)}
    if options.allow is not None:
        wanted["network_allow"] = options.allow
    with client.hold_slot(wanted) as (namespace, _):
        child = os.fork()
        if child == 0:
            _run_in(namespace, options.command)
        while True:
            try:
                _, status = os.waitpid(child, 0)
            except KeyboardInterrupt:
                continue  # it is the command's, which shares the terminal
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _run_in(namespace: int, command: list[str]) -> NoReturn:
    from ..linux.netlink import enter

    try:
        enter(namespace)
        os.execvp(command[0], command)
    except OSError as problem:
        print(f"cellblock: {command[0]}: {problem.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def _serve(options: argparse.Namespace) -> int:
    # Clients start often and need none of it: half of their time would go into loading it.
    from .host import DEFAULT_CONFIG_PATH, Host
    from .proof import prove
    from .run import Engine
    from .runner import Runner
    from .service import listen_fd, serve
    from .workers import ForkServer, Workers

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = options.config or DEFAULT_CONFIG_PATH
    listener = listen_fd()
    begun = time.time()
    host = Host.load(path)
    runner = Runner(host)
    host.note_taken_over(begun)
    runner.bound_memory(host.service_memory_bytes)
    prove(host, runner)
    # First of all: what it starts must have no thread, and nothing of what comes later.
    fork_server = ForkServer(runner, not_theirs=[listener])
    workers = Workers(fork_server, runner, kept=host.parallel_jobs)
    workers.prepare()
    serve(Engine(host, workers), listener, host.spool_dir, lambda: Host.load(path))
    return EXIT_OK
