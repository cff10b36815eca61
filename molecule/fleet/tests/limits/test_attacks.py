"""Attacks from inside the jail; afterwards the slave is healthy and the record was true."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["ansible://slave1"]

Submit = Callable[..., dict[str, Any]]
Stage = Callable[..., dict[str, Any]]

ATTACKS = (Path(__file__).parent / "attacks.c").read_text()
CONTROLS = ("socket", "netlink", "fork", "prlimit", "kill")
ON_INIT = (
    "kill kill_int tgkill ptrace_attach ptrace_seize proc_fd proc_mem proc_root proc_oom vm_write "
    "vm_read prlimit_cpu prlimit_fsize setpriority sched_setscheduler sched_setaffinity pidfd_getfd "
    "pidfd_signal"
).split()
ON_KERNEL = (
    "unshare_user unshare_net clone_user clone3 setns mount chroot fsopen keyctl add_key io_uring "
    "userfaultfd bpf perf vsock packet raw raw6 alg setuid setgid sethostname syslog memfd_secret"
).split()
REFUSALS = {
    errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EAFNOSUPPORT, errno.ENOENT, errno.EINVAL, errno.EROFS,
}  # fmt: skip


def python(program: str, **constraints: Any) -> dict[str, Any]:
    return {
        "environment": "python",
        "stages": [
            {"name": "run", "command": ["python3", "-c", program], "constraints": constraints}
        ],
    }


LEFTOVERS = (
    "systemctl show -p MainPID --value cellblock; ls /run/cellblock/jobs; "
    "find /sys/fs/cgroup -path '*cellblock-jobs/*' -type d; ps -eo uid= | awk '$1 >= 1900000000'"
)


@pytest.fixture(scope="module")
def service_pid() -> list[str]:
    """The service's process at the first attack."""
    return []


@pytest.fixture(autouse=True)
def healthy_afterwards(host: Any, submit: Submit, service_pid: list[str]) -> Iterator[None]:
    """The same service process still runs jobs, and nothing of the attack is left."""
    if not service_pid:
        service_pid += host.check_output(LEFTOVERS).split()
    yield
    assert submit(python("print('well')"))["stages"][0]["stdout"]["text"] == "well\n"
    assert host.check_output(LEFTOVERS).split() == service_pid


@pytest.mark.kernel
def test_init_and_kernel_refuse(submit: Submit) -> None:
    names = [*ON_INIT, *ON_KERNEL, *(f"control_{name}" for name in CONTROLS)]
    record = submit(
        {
            "environment": "c",
            "files": {"attacks.c": {"text": ATTACKS}},
            "stages": [
                {"name": "compile", "command": ["gcc", "-o", "attacks", "attacks.c"]},
                {"name": "run", "command": ["./attacks", *names]},
            ],
        }
    )
    run = record["stages"][1]
    assert run["verdict"] == "ok", run
    seen = {
        name: int(number) for name, number in map(str.split, run["stdout"]["text"].splitlines())
    }
    assert list(seen) == names
    through = [name for name in (*ON_INIT, *ON_KERNEL) if seen[name] not in REFUSALS]
    assert through == [], {name: errno.errorcode.get(seen[name]) for name in through}
    assert [seen[f"control_{name}"] for name in CONTROLS] == [0] * len(CONTROLS)


@pytest.mark.kernel
def test_foreign_system_calls_end_the_program(submit: Submit) -> None:
    # int 0x80 is the 32-bit entry: another architecture with other numbers.
    source = 'int main(void) { __asm__ volatile("int $0x80" : : "a"(20)); return 0; }'
    record = submit(
        {
            "environment": "c",
            "files": {"a.c": {"text": source}},
            "stages": [
                {"name": "compile", "command": ["gcc", "-o", "a", "a.c"]},
                {"name": "run", "command": ["./a"]},
            ],
        }
    )
    assert record["stages"][1]["signal"]["name"] in ("SIGSYS", "SIGSEGV")


def test_forged_records_on_every_descriptor(submit: Submit) -> None:
    forged = struct.pack("=Ii9Q", 0x45444E45, 0, *[0] * 9)
    program = (
        "import os, sys\n"
        f"forged = {forged!r}\n"
        'line = b\'{"verdict": "ok", "exit_code": 0}\\n\'\n'
        "for fd in range(256):\n"
        "    for data in (forged, b'BEGUN', line):\n"
        "        try: os.write(fd, data)\n"
        "        except OSError: pass\n"
        "os._exit(42)\n"
    )
    stage = submit(python(program))["stages"][0]
    assert (stage["verdict"], stage["exit_code"], stage["signal"]) == ("nonzero_exit", 42, None)


def test_orphans_and_a_lowered_limit_do_not_end_init(
    submit: Submit, repetitions: Callable[[int], int]
) -> None:
    # Seen with an init of the job's own uid: prlimit on PID 1 and a few orphans killed it.
    program = (
        "import os, resource\n"
        "try: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)); print('lowered')\n"
        "except PermissionError: pass\n"
        f"for _ in range({repetitions(3000)}):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0: os._exit(0)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "os._exit(7)\n"
    )
    stage = submit(python(program, wall_time_ms="30s", cpu_time_ms="30s", processes=1000))[
        "stages"
    ][0]
    assert (stage["exit_code"], stage["stdout"]["text"]) == (7, ""), stage


BOMBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fork": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"processes": 50, "wall_time_ms": "1s"},
        "processes",
    ),
    "memory": (
        "x = []\nwhile True: x.append(bytearray(2**20))",
        {"memory_bytes": "64MiB"},
        "memory_bytes",
    ),
    "memory_by_many": (
        "import os, time\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        x = bytearray(16 * 2**20); x[::4096] = b'1' * 4096; time.sleep(5)\n"
        "time.sleep(5)",
        {"memory_bytes": "64MiB", "wall_time_ms": "2s"},
        "memory_bytes",
    ),
    "output": (
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        {"stdout_bytes": "1MiB"},
        "stdout_bytes",
    ),
    "threads": (
        "import threading, time\n"
        "while True:\n    try: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "    except RuntimeError: time.sleep(0.01)",
        {"processes": 50, "wall_time_ms": "1s"},
        "processes",
    ),
}


@pytest.mark.kernel
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(submit: Submit, name: str) -> None:
    program, constraints, limit = BOMBS[name]
    stage = submit(python(program, **constraints))["stages"][0]
    assert stage["verdict"] == "limit_exceeded"
    assert limit in [violation["limit"] for violation in stage["violations"]]


@pytest.mark.kernel
def test_orphan_daemons_end_with_the_job(host: Any, submit: Submit) -> None:
    program = (
        "import os, signal, time\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        for n in range(1, 32):\n"
        "            if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
        "        if os.fork() == 0:\n"
        "            while True: time.sleep(60)\n"
        "        os._exit(0)\n"
        "print('gone')\n"
    )
    stage = submit(python(program))["stages"][0]
    assert (stage["verdict"], stage["stdout"]["text"]) == ("ok", "gone\n")


def test_outputs_that_are_not_files(submit: Submit) -> None:
    program = (
        "import os, socket\n"
        "os.symlink('/etc/shadow', 'link'); os.symlink('.', 'dir'); os.mkfifo('fifo')\n"
        "socket.socket(socket.AF_UNIX).bind('socket')\n"
        "os.mkdir('tree'); os.symlink('/', 'tree/root'); open('tree/good', 'w').write('good')\n"
        "open(b'tree/\\xff', 'w').write('odd')\n"
        "f = open('hole', 'wb'); f.truncate(100 * 2**20)\n"
    )
    job = python(program, file_size_bytes="1GiB")
    job["collect"] = [
        "link",
        "dir/tree/good",
        "fifo",
        "socket",
        "tree",
        "hole",
        "none",
        "tree/good",
    ]
    taken = submit(job)["files"]
    seen = {(file["name"], file["problem"]) for file in taken}
    assert seen == {
        ("link", "symbolic_link"),
        ("dir/tree/good", "symbolic_link"),
        ("fifo", "not_a_regular_file"),
        ("socket", "not_a_regular_file"),
        ("tree/good", None),
        ("tree/root", "symbolic_link"),
        ("tree/\\xff", None),
        ("hole", "too_large"),
        ("none", "missing"),
    }
    odd = next(file for file in taken if file["name"] == "tree/\\xff")
    assert (odd["name_base64"], odd["text"]) == ("dHJlZS//", "odd")


def test_a_sparse_terabyte(submit: Submit) -> None:
    job = python("open('hole', 'wb').truncate(2**40)", file_size_bytes="1GiB")
    job["collect"] = ["hole"]
    record = submit(job)
    # The file size limit stops it first; Python ignores SIGXFSZ and sees EFBIG.
    assert record["stages"][0]["verdict"] == "nonzero_exit"
    assert "File too large" in record["stages"][0]["stderr"]["text"]
    assert record["files"][0].get("size_bytes") == 0


def test_a_hundred_thousand_names(submit: Submit) -> None:
    program = (
        "import os\nos.mkdir('many'); open('many/0', 'w').close()\n"
        "try:\n    for n in range(1, 10**5): os.link('many/0', f'many/{n}')\n"
        "except OSError as e: print(e.errno)\n"
    )
    job = python(program, scratch_files=65536, wall_time_ms="30s", cpu_time_ms="30s")
    job["collect"] = ["many"]
    record = submit(job)
    files = record["files"]
    assert len(files) == 257
    assert files[-1] == {"name": "many", "problem": "too_many_files"}


def test_a_deep_tree(submit: Submit) -> None:
    program = "import os\nfor n in range(200): os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()"
    job = python(program)
    job["collect"] = ["d"]
    files = submit(job)["files"]
    assert [file["problem"] for file in files] == ["too_deep"]


METADATA_SERVICE = {
    "network": "allow",
    "network_allow": [{"to": "169.254.169.254", "protocol": "tcp", "ports": [80]}],
}


def test_hostile_jobs_are_refused_before_they_start(host: Any) -> None:
    for job, code in (
        ({**python("pass"), "files": {"../x": {"text": ""}}}, "invalid_job"),
        ({**python("pass"), "collect": ["/etc/shadow"]}, "invalid_job"),
        ({**python("pass"), "collect": ["../../etc/shadow"]}, "invalid_job"),
        ({**python("pass"), "files": {"x": {"path": "/etc/shadow"}}}, "invalid_job"),
        ({**python("pass"), "environment": "none"}, "unknown_environment"),
        ({**python("pass"), "mounts": ["root"]}, "unknown_mount"),
        (python("pass", processes=10**6), "limit_above_maximum"),
        (
            {
                "environment": "base",
                "stages": [{"name": "a", "command": ["a"], **METADATA_SERVICE}],
            },
            # The second where jobs have no network at all.
            "forbidden_destination unsupported_network",
        ),
    ):
        done = host.run(f"printf %s '{json.dumps(job)}' | cellblock run -")
        assert done.rc == 2, done
        assert json.loads(done.stdout)["error"]["code"] in code.split()
