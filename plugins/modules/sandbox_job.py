#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0

"""Runs sandboxed jobs on a worker slave."""

from __future__ import annotations

DOCUMENTATION = r"""
module: sandbox_job
short_description: Run untrusted programs in sandboxes on a worker slave
version_added: 0.1.0
description:
  - Runs one job or a list of jobs in nsjail on the host and returns one record per job.
  - A job that fails is a result, not a failed task, unless O(fail_on) says so.
  - All jobs are checked before the first is run, so that a mistake in one of them runs none
    (with O(in_rounds) of a round; check all of them before, in check mode).
  - Jobs leave nothing on the host, so that the task never reports a change.
  - The number of jobs that run at the same time is the host's; the rest waits.
  - Cancelling the play ends the jobs, and so does killing ansible-playbook.
    (Not with Docker's connection, nor those of an asynchronous task.)
author: The Cellblock authors (@cellblock)
extends_documentation_fragment:
  - cellblock.fleet.stage_constraints
requirements:
  - The host was provisioned by the roles C(nsjail), C(environments) and C(worker_slave).
  - The remote user is root or a member of the group C(cellblock).
attributes:
  check_mode:
    support: full
    description: Checks the jobs against the host (fields, limits, environments) without running them.
  diff_mode:
    support: none
    description: The module changes nothing.
options:
  job:
    description:
      - One job, in the shape of a job file (C(docs/jobs.md)), with its files as C(text) or C(base64).
      - In playbooks, the filter C(cellblock.fleet.read_jobs) reads job files and the files that they name.
    type: dict
  jobs:
    description: Several jobs, each as in O(job).
    type: list
    elements: dict
  fail_on:
    description: The task fails when a job ends with one of these verdicts. The records are returned all the same.
    type: list
    elements: str
    choices: [nonzero_exit, signaled, limit_exceeded, not_started, host_overloaded, worker_lost, internal_error]
    default: []
  in_rounds:
    description:
      - Bring O(jobs) to the host in rounds of some seconds, instead of all at once.
      - When the host is lost, or a round fails, the records of the rounds before are returned as RV(results) all the same.
    type: bool
    default: false
  records_file:
    description:
      - File on the controller for the records of O(in_rounds), a line of JSON for each, written after every round.
      - It is made anew. Records that make no sense are left out.
    type: path
  executable:
    description: The C(cellblock) command on the host.
    type: path
    default: /usr/local/bin/cellblock
"""

EXAMPLES = r"""
- name: Compile and run a program
  cellblock.fleet.sandbox_job:
    job:
      environment: c
      files:
        main.c:
          text: |
            int main(void) { return 0; }
      stages:
        - name: compile
          command: [gcc, -o, main, main.c]
        - name: run
          command: [./main]
          constraints:
            cpu_time_ms: 1s
            memory_bytes: 64MiB
  register: hello

- name: Run job files and fail unless all end well
  cellblock.fleet.sandbox_job:
    jobs: "{{ ['jobs/hello-c.yml', 'jobs/hello-python.yml'] | cellblock.fleet.read_jobs }}"
    fail_on: [nonzero_exit, signaled, limit_exceeded, not_started, host_overloaded, worker_lost, internal_error]
"""

RETURN = r"""
results:
  description: One record per job, in the order of the jobs. Empty in check mode.
  returned: success or failure by O(fail_on)
  type: list
  elements: dict
  contains:
    job_id:
      description: Identifier of this run of the job.
      type: str
    name:
      description: The job's name.
      type: str
    environment:
      description: The environment that it ran in.
      type: str
    host:
      description: Name of the host that ran it.
      type: str
    target:
      description: Where on the host it ran, C(kind) V(host) or V(worker_container), with that one's C(runtime) and whether
        it C(is_boundary).
      type: dict
    labels:
      description: The job's labels.
      type: dict
    verdict:
      description: The first verdict of its stages that is not V(ok) or V(skipped), else V(ok).
      type: str
    queue_time_ms:
      description: How long the job waited, from when it was checked until it was started.
      type: float
    error:
      description: Present only when there is no record because the service failed; with C(code) and C(text).
      type: dict
    files:
      description:
        - Collected files, each with C(name), C(text) or C(base64), C(size_bytes) and C(sha256), or with the
          C(problem) that kept it from being taken.
      type: list
      elements: dict
    stages:
      description: One record per stage, in order.
      type: list
      elements: dict
      contains:
        name:
          description: The stage's name.
          type: str
        verdict:
          description:
            - One of V(ok), V(nonzero_exit), V(signaled), V(limit_exceeded), V(not_started), V(skipped),
              V(internal_error).
          type: str
        exit_code:
          description: Exit code, or null when the program did not exit by itself.
          type: int
        signal:
          description: C(name) and C(number) of the signal that ended the program, or null.
          type: dict
        reason:
          description: Why the program was not started, or why the sandbox failed.
          type: str
        violations:
          description: Each limit that was hit, as C(limit), C(allowed), C(seen) and C(evidence).
          type: list
          elements: dict
        stdout:
          description: C(text) (or C(base64) where it is not UTF-8), C(size_bytes) and C(truncated).
          type: dict
        stderr:
          description: As RV(results[].stages[].stdout).
          type: dict
        usage:
          description:
            - Wall time, CPU time, memory, processes, I/O and context switches, with C(sources) that say of
              every figure where it comes from; described in C(docs/results.md). Null when nothing was run.
          type: dict
        constraints:
          description: Every limit as applied, in the unit of its name.
          type: dict
  sample:
    - job_id: 5f0c6f0f4b0a4f5e9a51f7a2b8d3c611
      name: abort
      environment: python
      host: slave1
      labels: {}
      target: {kind: host, runtime: null, is_boundary: true}
      verdict: signaled
      queue_time_ms: 0.02
      files: []
      stages:
        - name: run
          verdict: signaled
          exit_code: null
          signal: {name: SIGABRT, number: 6}
          reason: null
          violations: []
          stdout: {text: "", size_bytes: 0, truncated: false}
          stderr: {text: "", size_bytes: 0, truncated: false}
          usage:
            wall_time_ms: 17.2
            cpu_time_ms: 12.8
            cpu_user_ms: 9.1
            cpu_system_ms: 3.7
            memory_peak_bytes: 5128192
            processes_peak: 1
            max_rss_bytes: 9437184
            sources: {wall_time_ms: jobinit_clock, cpu_time_ms: cgroup, max_rss_bytes: reaped_only}
"""

import json
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cellblock.fleet.plugins.module_utils import _reader

FAILING_VERDICTS = [
    "nonzero_exit",
    "signaled",
    "limit_exceeded",
    "not_started",
    "host_overloaded",
    "worker_lost",
    "internal_error",
]
# Exit statuses of the command after which it has printed records.
RECORDS_PRINTED = (0, 1, 3)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "job": {"type": "dict"},
            "jobs": {"type": "list", "elements": "dict"},
            "fail_on": {
                "type": "list",
                "elements": "str",
                "choices": FAILING_VERDICTS,
                "default": [],
            },
            "executable": {"type": "path", "default": "/usr/local/bin/cellblock"},
            # The action's, which takes them away.
            "in_rounds": {"type": "bool", "default": False},
            "records_file": {"type": "path"},
        },
        mutually_exclusive=[("job", "jobs")],
        required_one_of=[("job", "jobs")],
        supports_check_mode=True,
    )
    params = module.params
    jobs = params["jobs"] if params["jobs"] is not None else [params["job"]]
    if not jobs:
        module.exit_json(changed=False, results=[])
    if not os.path.exists(params["executable"]):
        module.fail_json(
            msg=f"{params['executable']} does not exist on this host; provision it with the worker_slave "
            "role (playbooks/site.yml), or set executable"
        )

    command = "check" if module.check_mode else "run"
    status, stdout, stderr = module.run_command(
        [params["executable"], command, "-"],
        data=json.dumps(jobs),
        binary_data=True,
        # Without the command its jobs end.
        before_communicate_callback=lambda process: _reader.when_unread(process.kill),
    )
    results = [] if module.check_mode else _records(stdout)
    if status not in RECORDS_PRINTED or (len(results) != len(jobs) and not module.check_mode):
        module.fail_json(
            msg=stderr.strip() or f"cellblock {command} failed with {status}", rc=status
        )

    failed = [
        f"{record['name']} ({record['error']['text'] if 'error' in record else record['verdict']})"
        for record in results
        if record["verdict"] in params["fail_on"] or "error" in record
    ]
    if failed:
        module.fail_json(
            msg=f"{len(failed)} of {len(results)} jobs failed: {', '.join(failed)}", results=results
        )
    module.exit_json(changed=False, results=results)


def _records(stdout: str) -> list[dict[str, Any]]:
    """The records that the command printed, one JSON object per line; errors are not records."""
    lines = [json.loads(line) for line in stdout.splitlines() if line]
    return [line for line in lines if "verdict" in line]


if __name__ == "__main__":
    main()
