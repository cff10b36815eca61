"""What a job takes of the kernel is charged to the job, or there is little of it.

``kernel_memory.c`` spends one kind of kernel memory after the other; the host's own loss is compared with what
the record says of the same stage.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Submit = Callable[..., dict[str, Any]]
Stage = Callable[..., dict[str, Any]]

HERE = Path(__file__).parent
MIB = 2**20
SPENT_BYTES = 48 * MIB
MAX_UNACCOUNTED_BYTES = 8 * MIB
# Linux 6.1 charges neither a mapping's share of the tree they are in nor the socket that an arriving connection makes
# before it is accepted: a softirq makes it, for no task (newer kernels charge both).
KNOWN_SHARES = {"mappings": 0.4, "tcp_connections": 0.4}
ATTEMPTS = 3
"""Who is over the bound is measured again: what others do on the machine passes, a leak does not."""
CONTROL = "nothing"
KINDS = (
    "netlink_errors netlink_dumps socket_filters reuseport_filters seccomp_filters epoll_watches "
    "eventfds timerfds pipe_pages unix_streams unix_tiny_datagrams descriptors_in_flight "
    "udp_buffers tcp_buffers tcp_connections multicast_memberships6 timers queued_signals page_tables "
    "mappings shm_segments tiny_messages empty_files long_links attributes missing_in_root"
).split()


@pytest.fixture(scope="module")
def spender(host: Any) -> str:
    """The path, on the slave, of the program that spends."""
    source = (HERE / "kernel_memory.c").read_text()
    job = {
        "environment": "c",
        "files": {"kernel_memory.c": {"text": source}},
        "stages": [
            {
                "name": "compile",
                "command": ["gcc", "-O1", "-o", "program", "kernel_memory.c"],
                "constraints": {"wall_time_ms": "60s", "cpu_time_ms": "60s"},
            }
        ],
        "collect": ["program"],
    }
    put(host, "/root/kernel_memory.json", json.dumps(job).encode())
    record = json.loads(host.run("cellblock run /root/kernel_memory.json").stdout.splitlines()[0])
    assert record["verdict"] == "ok", record
    put(host, "/root/kernel_memory", base64.b64decode(record["files"][0]["base64"]))
    put(host, "/root/kernel_memory.py", (HERE / "kernel_memory.py").read_bytes())
    return "/root/kernel_memory"


def put(host: Any, path: str, content: bytes) -> None:
    done = host.run(f"echo {base64.b64encode(content).decode()} | base64 -d > {path}")
    assert done.rc == 0, done


def measure(
    host: Any, spender: str, kinds: list[str], rounds: int, slow: int
) -> list[dict[str, Any]]:
    """One row for each kind, with ``unaccounted`` bytes; the control's loss is taken off."""
    done = host.run(
        f"python3 /root/kernel_memory.py {spender} 64 256 {SPENT_BYTES} {rounds} {slow} "
        + " ".join([CONTROL, *kinds])
    )
    assert done.rc == 0, done.stderr
    control, *rows = [json.loads(line) for line in done.stdout.splitlines()]
    nothing = statistics.median(control["loss_bytes"])
    for row in rows:
        row["loss"] = statistics.median(row["loss_bytes"]) - nothing
        row["unaccounted"] = row["loss"] - row["record_bytes"]
    return rows


def bound(row: dict[str, Any]) -> float:
    """How much of a kind may be in no record, in bytes; docs/architecture.md has what is left open."""
    share = KNOWN_SHARES.get(row["kind"], 0.0) * float(row["record_bytes"])
    return max(MAX_UNACCOUNTED_BYTES, share)


def test_nothing_is_taken_that_is_not_in_the_record(
    host: Any, spender: str, repetitions: Callable[[int], int], slowness: int
) -> None:
    rounds = max(1, repetitions(3))  # an emulated machine does nothing else
    table: dict[str, dict[str, Any]] = {}
    left = list(KINDS)
    for _ in range(ATTEMPTS):
        for row in measure(host, spender, left, rounds, slowness):
            table[row["kind"]] = row
        left = [kind for kind in left if table[kind]["unaccounted"] > bound(table[kind])]
        if not left:
            break
    lines = [f"{'kind':<24} {'loss MiB':>9} {'record MiB':>10}  objects, errno at the last"]
    for kind in KINDS:
        row = table[kind]
        lines.append(
            f"{kind:<24} {row['loss'] / MIB:9.1f} {row['record_bytes'] / MIB:10.1f}  "
            f"{row['text'].removeprefix(kind).strip() or row['verdict']}"
        )
    print("\n".join(lines))
    assert left == [], "\n".join(lines)


def python(run_stage: Stage, program: str, **fields: Any) -> str:
    stage = run_stage("python3", "-c", program, environment="python", **fields)
    assert stage["verdict"] == "ok", stage
    return str(stage["stdout"]["text"])


@pytest.mark.kernel
def test_netlink_sockets_are_few_and_for_looking_up_interfaces(run_stage: Stage) -> None:
    program = (
        "import ctypes, os, socket\n"
        "def route(): return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n"
        "def refused(*arguments):\n"
        "    try: socket.socket(*arguments)\n"
        "    except OSError as problem: return problem.errno\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(route())\n"
        "except OSError as problem: print(len(held), os.strerror(problem.errno))\n"
        "held[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**23)\n"
        "print(held[0].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), held[0].get_inheritable())\n"
        "held.clear()\n"
        "for _ in range(100): route().close()\n"
        "print(socket.if_nameindex())\n"
        "libc, found = ctypes.CDLL(None), ctypes.c_void_p()\n"
        "print(libc.getifaddrs(ctypes.byref(found)), found.value is not None)\n"
        "print([refused(socket.AF_NETLINK, socket.SOCK_RAW, protocol) for protocol in (4, 9, 15, 16)])\n"
    )
    assert python(run_stage, program).splitlines() == [
        "16 No buffer space available",
        "212992 False",
        "[(1, 'lo')]",
        "0 True",
        "[93, 93, 93, 93]",  # EPROTONOSUPPORT
    ]


@pytest.mark.kernel
def test_netlink_sockets_by_many_threads_at_once(run_stage: Stage) -> None:
    program = (
        "import socket, threading, time\n"
        "held, lock = [], threading.Lock()\n"
        "def take():\n"
        "    for _ in range(4):\n"
        "        try: made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n"
        "        except OSError: continue\n"
        "        held.append(made)\n"
        "threads = [threading.Thread(target=take) for _ in range(30)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(len(held))\n"
    )
    assert python(run_stage, program) == "16\n"


@pytest.mark.kernel
def test_a_program_that_asks_for_netlink_can_be_ended(run_stage: Stage) -> None:
    program = (
        "import os, socket\n"
        "for _ in range(20): os.fork() if _ < 4 else None\n"
        "while True:\n"
        "    try: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()\n"
        "    except OSError: pass\n"
    )
    stage = run_stage(
        "python3", "-c", program, environment="python", constraints={"wall_time_ms": "1s"}
    )
    assert [violation["limit"] for violation in stage["violations"]] == ["wall_time_ms"]
    assert stage["signal"]["name"] == "SIGKILL", stage


# What fails, by how: the option or call, and the error that programs know.
REFUSED = {
    "SO_ATTACH_FILTER": ("setsockopt(1, 26)", "ENOPROTOOPT"),
    "SO_LOCK_FILTER": ("setsockopt(1, 44)", "ENOPROTOOPT"),
    "SO_ATTACH_BPF": ("setsockopt(1, 50)", "ENOPROTOOPT"),
    "SO_ATTACH_REUSEPORT_CBPF": ("setsockopt(1, 51)", "ENOPROTOOPT"),
    "SO_ATTACH_REUSEPORT_EBPF": ("setsockopt(1, 52)", "ENOPROTOOPT"),
    "SO_ZEROCOPY": ("setsockopt(1, 60)", "ENOPROTOOPT"),
    "TCP_ULP": ("setsockopt(6, 31)", "ENOPROTOOPT"),
    "TCP_MD5SIG": ("setsockopt(6, 14)", "ENOPROTOOPT"),
    "IPV6_FLOWLABEL_MGR": ("setsockopt(41, 32)", "ENOPROTOOPT"),
    "MCAST_MSFILTER": ("setsockopt(0, 48)", "ENOPROTOOPT"),
    "IP_ADD_MEMBERSHIP": ("setsockopt(0, 35)", "ENOBUFS"),
    "IPV6_ADD_MEMBERSHIP": ("setsockopt(41, 20)", "ENOBUFS"),
    "MCAST_JOIN_GROUP": ("setsockopt(0, 42)", "ENOBUFS"),
    "SOL_PACKET": ("setsockopt(263, 5)", "ENOPROTOOPT"),
    "SOL_NETLINK": ("setsockopt(270, 1)", "ENOPROTOOPT"),
    "AF_PACKET": ("socket(17, 2, 0)", "EAFNOSUPPORT"),
    "AF_KEY": ("socket(15, 3, 2)", "EAFNOSUPPORT"),
    "AF_BLUETOOTH": ("socket(31, 3, 1)", "EAFNOSUPPORT"),
    "AF_QIPCRTR": ("socket(42, 2, 0)", "EAFNOSUPPORT"),
    "AF_XDP": ("socket(44, 3, 0)", "EAFNOSUPPORT"),
    "IPPROTO_SCTP": ("socket(2, 1, 132)", "EPROTONOSUPPORT"),
    "IPPROTO_MPTCP": ("socket(2, 1, 262)", "EPROTONOSUPPORT"),
    "SOCK_RAW": ("socket(2, 3, 1)", "EPERM"),
    # By the kernel (net.ipv4.ping_group_range); the prober tells this from its own mistakes.
    "ICMP": ("socket(2, 2, 1)", "EACCES"),
    "ICMPv6": ("socket(10, 2, 58)", "EACCES"),
    "TIPC pair": ("socketpair(30, 1, 0)", "EAFNOSUPPORT"),
    "seccomp": ("call(317, 1, 0, 0)", "ENOSYS"),
    "PR_SET_SECCOMP": ("call(157, 22, 2, 0)", "EINVAL"),
    "PR_SET_VMA": ("call(157, 0x53564D41, 0, 0)", "EINVAL"),
    "MAP_HUGETLB": ("call(9, 0, 2097152, 3, 0x40022, -1, 0)", "ENOMEM"),
    "MFD_HUGETLB": ("call(319, name, 4)", "ENOMEM"),
    "SHM_HUGETLB": ("call(29, 0, 2097152, 0o4600)", "ENOMEM"),
    "inotify_init": ("call(253)", "EMFILE"),
    "inotify_init1": ("call(294, 0)", "EMFILE"),
    "fanotify_init": ("call(300, 0x200, 0)", "EMFILE"),
    "io_setup": ("call(206, 1, buffer)", "ENOSYS"),
    "io_uring_setup": ("call(425, 1, buffer)", "ENOSYS"),
    "mq_open": ("call(240, name, 0o102, 0o600, 0)", "ENOSYS"),
    "add_key": ("call(248, name, name, name, 1, -4)", "ENOSYS"),
    "mbind": ("call(237, 0, 0, 0, 0, 0, 0)", "ENOSYS"),
    "sync": ("call(162)", "ENOSYS"),
    "syncfs": ("call(306, 0)", "ENOSYS"),
    "clone3": ("call(435, buffer, 88)", "ENOSYS"),
    "landlock_create_ruleset": ("call(444, buffer, 8, 0)", "ENOSYS"),
    "of a kernel to come": ("call(999)", "ENOSYS"),
    "unshare": ("call(272, 0x10000000)", "EPERM"),
}
ALLOWED = (
    "call(334, 0, 32, 0, 0)",  # rseq: EINVAL, of the kernel's own
    "call(332, -100, name, 0, 0xFFF, buffer)",  # statx
    "call(439, -100, name, 0, 0)",  # faccessat2
    "call(437, -100, name, how, 24)",  # openat2
    "call(449, buffer, 0, 0, 0, 1)",  # futex_waitv
)
TRY = """
import ctypes, errno, socket
libc = ctypes.CDLL(None, use_errno=True)
name, buffer, how = b"/work", ctypes.create_string_buffer(4096), ctypes.create_string_buffer(24)
def of(result): return errno.errorcode[ctypes.get_errno()] if result < 0 else "0"
def call(*arguments):
    return of(libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
def setsockopt(level, option): return of(libc.setsockopt(ipv6, level, option, buffer, 4096))
def socket_(*arguments): return of(libc.socket(*arguments))
def socketpair(*arguments): return of(libc.socketpair(*arguments, buffer))
kept = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
ipv6 = kept.fileno()
for line in LINES:
    print(eval(line, {**globals(), "socket": socket_}))
"""


@pytest.mark.kernel
def test_what_is_refused_and_with_what_error(host: Any, run_stage: Stage) -> None:
    if host.check_output("uname -m") != "x86_64":
        pytest.fail("the numbers of system calls here are x86_64's: give those of this machine")
    lines = [line for line, _ in REFUSED.values()] + list(ALLOWED)
    seen = python(run_stage, TRY.replace("LINES", repr(lines))).splitlines()
    wanted = [error for _, error in REFUSED.values()]
    assert dict(zip(REFUSED, seen, strict=False)) == dict(zip(REFUSED, wanted, strict=True))
    for line, result in zip(ALLOWED, seen[len(REFUSED) :], strict=True):
        assert result in ("0", "EINVAL"), (line, result)


@pytest.mark.kernel
def test_signals_that_a_job_queues_are_not_taken_from_root(host: Any, run_stage: Stage) -> None:
    program = (
        "import ctypes, os, signal\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})\n"
        "count = 0\n"
        "while libc.sigqueue(os.getpid(), signal.SIGRTMIN, None) == 0: count += 1\n"
        "print(count)\n"
    )
    assert python(run_stage, program) == "1024\n"


@pytest.mark.kernel
def test_what_a_job_does_to_a_device_is_not_there_for_the_next(host: Any, run_stage: Stage) -> None:
    devices = "/dev/null /dev/zero /dev/full /dev/random /dev/urandom"
    before = host.check_output(f"stat -c '%x %y %z' {devices}")
    script = (
        f"for d in {devices}; do touch $d 2>/dev/null && echo $d touched; "
        "chmod 600 $d 2>/dev/null && echo $d changed; done; "
        "echo x >/dev/null && echo x 2>/dev/null >/dev/full || echo full; head -c 2 /dev/zero | wc -c"
    )
    stage = run_stage("sh", "-c", script)
    assert stage["stdout"]["text"].split() == ["full", "2"], stage
    assert host.check_output(f"stat -c '%x %y %z' {devices}") == before
