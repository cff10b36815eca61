# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0
# Made by `make docs` from src/cellblock/engine/limits.py; edit that.

"""The limits of a stage, for the documentation of modules that take jobs."""

from __future__ import annotations


class ModuleDocFragment:
    """Notes with one entry per limit."""

    DOCUMENTATION = r"""
options: {}
notes:
  - The limits of a stage, in its C(constraints), are these; maxima are the defaults of a host.
  - C(wall_time_ms) in milliseconds, default 10000, maximum 120000. Time from the start of the
    program to its end. Enforced by supervisor's monotonic clock.
  - C(cpu_time_ms) in milliseconds, default 5000, maximum 120000. CPU time of all processes of the
    stage together, user and system. Enforced by cgroup CPU accounting, read by the supervisor;
    RLIMIT_CPU behind it.
  - C(memory_bytes) in bytes, default 268435456, maximum 2147483648. Memory of all processes
    together - their own, the kernel's for them, page cache, scratch. Enforced by cgroup memory
    limit, swap included.
  - C(processes) in count, default 64, maximum 1024. Processes and threads at one time. Enforced
    by cgroup pids limit.
  - C(stack_bytes) in bytes, default 8388608, maximum 1073741824. Stack of the main thread of each
    process. Enforced by RLIMIT_STACK.
  - C(file_size_bytes) in bytes, default 16777216, maximum 1073741824. Size of any one file that
    the stage writes. The kernel refuses what is beyond with SIGXFSZ, or EFBIG where that is
    ignored, as by Python; it counts neither, so that a stage whose child met the limit has no
    violation, and a message such as gcc's "internal compiler error". Enforced by RLIMIT_FSIZE.
  - C(scratch_bytes) in bytes, default 67108864, maximum 1073741824. Everything in /work and /tmp
    together. Counts in memory_bytes too. Enforced by tmpfs size.
  - C(scratch_files) in count, default 4096, maximum 65536. Files and directories in /work and
    /tmp together. Enforced by tmpfs inode limit.
  - C(open_files) in count, default 256, maximum 4096. Open file descriptors of each process.
    Enforced by RLIMIT_NOFILE.
  - C(stdout_bytes) in bytes, default 1048576, maximum 16777216. What the stage may write to
    standard output; it is ended at the first byte beyond. Enforced by supervisor's byte counter
    on the pipe.
  - C(stderr_bytes) in bytes, default 1048576, maximum 16777216. What the stage may write to
    standard error; it is ended at the first byte beyond. Enforced by supervisor's byte counter on
    the pipe.
  - C(network_bytes) in bytes, default 268435456, maximum 17179869184. Bytes received and sent
    together, as IP packets; the stage is ended beyond. Enforced by nftables quota in the job's
    network slot.
  - C(network_bytes_per_second) in bytes, default 16777216, maximum 1073741824. Bandwidth in each
    direction. Enforced by nftables limit in the job's network slot, with one second's worth of
    burst.
  - C(network_connections) in count, default 64, maximum 4096. Connections at one time, and UDP
    exchanges of the last 30 seconds or so. Enforced by connection count in the job's network
    slot.
  - C(network_connections_per_second) in count, default 64, maximum 256. New connections. What
    ends stays for minutes in the tables of those it went to. Enforced by nftables limit in the
    job's network slot, with one second's worth of burst.
  - C(cpus) in CPUs, default 1.0, maximum 4.0. CPUs' worth of time per second of wall time.
    Enforced by cgroup CPU bandwidth.
"""
