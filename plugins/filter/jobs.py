"""Filters for playbooks that run jobs: read job files, share jobs among hosts, show results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.engine import (
    result_table as table,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.engine.job_file import (
    load_job_data,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.engine.job_parser import (
    parse_job,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.engine.limits import (
    parse_maxima,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.errors import (
    CellblockError,
    HostSetupError,
    InvalidJobError,
)
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.fleet import records
from ansible_collections.cellblock.fleet.plugins.module_utils.cellblock.validate import Value


def read_jobs(paths: str | Sequence[str]) -> list[dict[str, Any]]:
    """Job files (a path or a list of paths) as jobs for sandbox_job, with the files that they name.

    Paths are relative to the directory that ansible-playbook was started in. Every job is checked
    as far as that is possible without a host. Raises AnsibleFilterError naming file and field of
    each that is wrong.
    """
    jobs, problems = _read(paths)
    if problems:
        raise AnsibleFilterError("\n".join(problems))
    return jobs


def job_problems(paths: Any) -> list[str]:
    """A sentence for each of these job files that read_jobs would refuse."""
    return _read(paths)[1]


def _read(paths: Any) -> tuple[list[dict[str, Any]], list[str]]:
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(p, str) for p in paths):
        said = "job is not set" if paths is None else f"job is {paths!r}, not a job file"
        return [], [f"{said}; write -e job=jobs/hello-c.yml, or a list of files"]
    jobs: list[dict[str, Any]] = []
    problems = []
    for path in paths:
        try:
            data = load_job_data(Path(path))
            parse_job(data)
        except InvalidJobError as problem:
            where = "" if problem.subject == path else f"{path}: "
            problems.append(f"{where}{problem}")
        except CellblockError as problem:
            problems.append(str(problem))
        else:
            # A job without a name of its own is known by its file's.
            jobs.append({"name": Path(path).stem, **data})
    return jobs, problems


def share_jobs(
    jobs: Sequence[dict[str, Any]], hosts: Sequence[str], host: str
) -> list[dict[str, Any]]:
    """What of `jobs` falls to `host` when they are dealt out to `hosts` in turn."""
    if host not in hosts:
        raise AnsibleFilterError(
            f"cellblock.fleet.share_jobs: {host!r} is none of the hosts {list(hosts)}"
        )
    return list(jobs[list(hosts).index(host) :: len(hosts)])


def refusals(results: Mapping[str, Any]) -> dict[str, str]:
    """Which hosts would not run the jobs, and why (``fleet.records.refusals``)."""
    return records.refusals(results)


def collect_records(
    results: Mapping[str, Any],
    jobs: Sequence[dict[str, Any]],
    hosts: Sequence[str],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What became of `jobs`, which were shared among `hosts`: `records`, as far as `results` ({host: what
    sandbox_job returned}) has them; `lost`, a sentence for each job without one; `lost_jobs`, these jobs; `reliable`, the
    hosts that lost none. `earlier` are the records of a run that lost these jobs; those of them that only say what went
    wrong are left out.
    """
    shares = {host: share_jobs(jobs, hosts, host) for host in hosts}
    found, lost = records.collect(shares, results)
    losers = {entry.host for entry in lost}
    return {
        "records": [*(record for record in earlier if not record.get("error")), *found],
        "lost": [str(entry) for entry in lost],
        "lost_jobs": [entry.job for entry in lost],
        "reliable": [host for host in hosts if host not in losers],
    }


def result_table(done: Sequence[Mapping[str, Any]]) -> str:
    """Job records as a table (job, host, stage, verdict, exit, times, memory), and under it the
    first lines that the jobs wrote.
    """
    if not done:
        return "No job was run."
    return f"{table.render(done)}\n\n{table.render_output(done)}".strip()


def maxima_problem(maxima: Any) -> str:
    """Why the engine would not start with these `worker_slave_maxima`; empty when it would."""
    try:
        parse_maxima(Value(maxima, "worker_slave_maxima", HostSetupError))
    except HostSetupError as problem:
        return str(problem)
    return ""


class FilterModule:
    """The filters by the names that playbooks use."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "read_jobs": read_jobs,
            "job_problems": job_problems,
            "maxima_problem": maxima_problem,
            "refusals": refusals,
            "collect_records": collect_records,
            "share_jobs": share_jobs,
            "result_table": result_table,
        }
