"""The package cache: what it serves, that it keeps it, and everything that it refuses.

First against the upstreams that the controller's configuration names, from a host that takes its
packages from the cache. Then against an upstream that misbehaves (`lab`).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from . import lab
from .conftest import ROOT

testinfra_hosts = ["ansible://cache1"]

STORE = "/var/cache/cellblock"

# Sends raw requests, as no HTTP library would, and prints [status, headers, first bytes] of each.
CLIENT = r"""
import json, socket, sys
job = json.loads(sys.argv[1])
def ask(request):
    with socket.socket() as s:
        s.settimeout(30)
        s.bind((job["source"], 0))
        s.connect((job["address"], job["port"]))
        s.sendall(request.encode("latin-1"))
        answer = b""
        while b"\r\n\r\n" not in answer or len(answer) < 20000:
            try:
                part = s.recv(65536)
            except ConnectionResetError:
                break
            if not part:
                break
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    headers = {f.partition(":")[0].lower(): f.partition(":")[2].strip() for f in fields}
    if "transfer-encoding" in headers:
        whole = b""
        while body:
            size, _, rest = body.partition(b"\r\n")
            whole += rest[:int(size, 16)]
            body = rest[int(size, 16) + 2:]
        body = whole
    return [int(status.split()[1]) if status else 0, headers, body[:20000].decode("latin-1")]
print(json.dumps([ask(request) for request in job["requests"]]))
"""

Answer = tuple[int, dict[str, str], str]
Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def slave(host: Any) -> Any:
    """A host that takes its packages from the cache."""
    return host.get_host("ansible://slave1")


@pytest.fixture(scope="module")
def cache(slave: Any) -> tuple[str, int]:
    """Address and port of the cache, as that host knows it."""
    url = slave.check_output("grep -m1 ^deb /etc/cellblock/apt/sources.list").split("//")[1]
    url = url.split("/")[0]
    address, _, port = url.rpartition(":")
    return address, int(port)


@pytest.fixture(scope="module")
def ask_all(cache: tuple[str, int]) -> Callable[..., list[Answer]]:
    """Sends raw requests from a host, one connection each, and returns the answers."""

    def run(host: Any, requests: list[str], source: str = "0.0.0.0") -> list[Answer]:
        address, port = cache
        job = {"address": address, "port": port, "source": source, "requests": requests}
        command = f"python3 -c {shlex.quote(CLIENT)} {shlex.quote(json.dumps(job))}"
        answers: list[Answer] = json.loads(host.check_output(command))
        return answers

    return run


@pytest.fixture(scope="module")
def get(cache: tuple[str, int]) -> Callable[..., str]:
    """The text of a request as a well-behaved client would send it."""

    def text(path: str, method: str = "GET", host: str | None = None, extra: str = "") -> str:
        called = host if host is not None else f"{cache[0]}:{cache[1]}"
        return f"{method} {path} HTTP/1.1\r\nHost: {called}\r\nConnection: close\r\n{extra}\r\n"

    return text


def journal(host: Any) -> list[str]:
    """The lines that the cache wrote about its requests."""
    lines: list[str] = host.check_output(
        "journalctl -u cellblock-cache -t cellblock_cache -o cat"
    ).splitlines()
    return lines


def kept(host: Any, key: str) -> list[str]:
    """The files in the cache's directory that hold what has this key."""
    found = host.run(f"grep -rlaF {shlex.quote('KEY: ' + key)} {STORE}/packages")
    names: list[str] = found.stdout.split()
    return names


GOOD = "/debian/dists/bookworm/InRelease"
LONG = "a" * 9000


def test_services_are_ours_alone(host: Any) -> None:
    for unit in ("cellblock-cache", "cellblock-resolver"):
        assert host.service(unit).is_running
        assert host.service(unit).is_enabled
    users = host.check_output("ps -o user= -C nginx,unbound").split()
    assert users
    assert set(users) == {"www-data", "unbound"}
    # The distribution's own came with the packages and never started.
    for unit in ("nginx", "unbound"):
        assert host.file(f"/etc/systemd/system/{unit}.service.d/cellblock.conf").exists
        assert host.check_output(f"systemctl show -P ActiveState {unit}") == "inactive"
    assert not host.run("ss -Htln 'sport = :80'").stdout


def test_good_requests(slave: Any, ask_all: Any, get: Any) -> None:
    """The control of every refusal below: the same client, address and paths."""
    answers = ask_all(slave, [get(GOOD), get(GOOD, "HEAD"), get("/python/six/"), get("/npm/once")])
    assert [answer[0] for answer in answers] == [200, 200, 200, 200]
    assert "BEGIN PGP SIGNED MESSAGE" in answers[0][2]
    assert answers[1][2] == ""
    # By each of its names, too.
    names = [get(GOOD, host=f"{name}:3142") for name in ("cache1", "cache1.cellblock.internal")]
    assert [answer[0] for answer in ask_all(slave, names)] == [200, 200]
    # And with the escapes that clients use.
    assert ask_all(slave, [get("/npm/@types%2fsemver")])[0][0] == 200


@pytest.mark.parametrize(
    ("method", "statuses"),
    [
        *((m, {405}) for m in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "TRACE")),
        ("FETCH", {405}),
        # Older nginx does not know the method.
        ("CONNECT", {400, 405}),
    ],
)
def test_other_methods(slave: Any, ask_all: Any, get: Any, method: str, statuses: set[int]) -> None:
    status, headers, _ = ask_all(slave, [get(GOOD, method)])[0]
    assert status in statuses
    if method != "TRACE" and status == 405:
        assert headers["allow"] == "GET, HEAD"


def test_as_a_forward_proxy(slave: Any, ask_all: Any, get: Any, cache: tuple[str, int]) -> None:
    own = f"{cache[0]}:{cache[1]}"
    requests = [
        get(f"http://{own}{GOOD}"),
        get("http://198.51.100.10/"),
        get(f"http://198.51.100.10{GOOD}", host="198.51.100.10"),
        get(f"https://{own}{GOOD}"),
        f"CONNECT 198.51.100.10:443 HTTP/1.1\r\nHost: {own}\r\n\r\n",
        f"CONNECT {own} HTTP/1.1\r\nHost: {own}\r\n\r\n",
    ]
    answers = ask_all(slave, requests)
    assert all(answer[0] in (400, 405) for answer in answers), answers


@pytest.mark.parametrize(
    "called",
    ["198.51.100.10", "example.com:3142", "127.0.0.1:3142", "cache1", "cache1:80", "", " "],
)
def test_foreign_host_headers(slave: Any, ask_all: Any, get: Any, called: str) -> None:
    assert ask_all(slave, [get(GOOD, host=called)])[0][0] in (400, 421)


def test_missing_and_doubled_host_header(
    slave: Any, ask_all: Any, get: Any, cache: tuple[str, int]
) -> None:
    requests = [
        f"GET {GOOD} HTTP/1.1\r\nConnection: close\r\n\r\n",
        f"GET {GOOD} HTTP/1.0\r\n\r\n",
        get(GOOD, extra=f"Host: {cache[0]}:{cache[1]}\r\n"),
        get(GOOD, extra="Host: example.com\r\n"),
    ]
    assert all(answer[0] in (400, 421) for answer in ask_all(slave, requests))


@pytest.mark.parametrize(
    "path",
    [
        "/debian/../debian/dists/bookworm/InRelease",
        "/debian/dists/./bookworm/InRelease",
        "/debian/%2e%2e/debian/dists/bookworm/InRelease",
        "/debian/dists/%2E/bookworm/InRelease",
        "/debian/dists/%2e%2E%2fbookworm/InRelease",
        "/debian/dists/..%2fbookworm/InRelease",
        "/debian/dists%2fbookworm/InRelease",
        "/debian/dists%5cbookworm/InRelease",
        "/debian/dists\\bookworm/InRelease",
        "//debian/dists/bookworm/InRelease",
        "/debian//dists/bookworm/InRelease",
        "/debian/dists/bookworm/InRelease%00",
        "/debian/dists/bookworm/InRelease\0",
        "/debian/dists/bookworm/InRelease%0d%0aX-Y:%20z",
        "/debian/dists/bookworm/InRelease%20HTTP/1.1",
        "/debian/%252e%252e/debian/dists/bookworm/InRelease",
        "/debian/dists/bookworm/%49nRelease",
        "/debian/dists/bookworm/InRelease?again",
        "/debian/dists/bookworm/InRelease#part",
        "/npm/@types%2f..%2fonce",
        "/npm/@types%2f%2e%2e",
        "/python/@types%2fsix",
        "debian/dists/bookworm/InRelease",
        "*",
        "",
    ],
)
def test_paths_that_hide_something(
    host: Any, slave: Any, ask_all: Any, get: Any, path: str
) -> None:
    assert ask_all(slave, [get(path)])[0][0] == 400
    assert "upstream=-" in journal(host)[-1]


@pytest.mark.parametrize(
    "path",
    [
        "/debian/",
        "/debian/README",
        "/debian/dists/bookworm/",
        "/debian/project/trace/master",
        "/python/",
        "/python/six/json/more",
        "/python-files/",
        "/npm/",
        "/npm/-/whoami",
        "/npm/-/v1/search",
        "/etc/passwd",
        "/nginx_status",
    ],
)
def test_what_is_not_offered(slave: Any, ask_all: Any, get: Any, path: str) -> None:
    assert ask_all(slave, [get(path)])[0][0] == 404


def test_bodies_and_large_headers(slave: Any, ask_all: Any, get: Any) -> None:
    requests = [
        get(GOOD, extra="Content-Length: 5\r\n") + "hello",
        get(GOOD, extra="Content-Length: 99999999\r\n") + "hello",
        get(GOOD, extra="Transfer-Encoding: chunked\r\n") + "5\r\nhello\r\n0\r\n\r\n",
        get(GOOD, extra=f"X-Long: {LONG}\r\n"),
        get(GOOD, extra="".join(f"X-{n}: {'a' * 1000}\r\n" for n in range(20))),
        get(f"/debian/dists/{LONG}"),
    ]
    statuses = [answer[0] for answer in ask_all(slave, requests)]
    assert statuses == [413, 413, 413, 400, 400, 414]
    # What is no body, and headers of a common size.
    fine = [get(GOOD, extra="Content-Length: 0\r\n"), get(GOOD, extra=f"X-Some: {'a' * 500}\r\n")]
    assert [answer[0] for answer in ask_all(slave, fine)] == [200, 200]


def test_a_stranger(host: Any, ask_all: Any, get: Any, cache: tuple[str, int]) -> None:
    host.check_output(f"ip address replace {lab.FOREIGN_ADDRESS}/32 dev lo")
    try:
        assert ask_all(host, [get(GOOD)], source=lab.FOREIGN_ADDRESS)[0][0] == 403
        assert ask_all(host, [get(GOOD)], source=cache[0])[0][0] == 200
    finally:
        host.check_output(f"ip address del {lab.FOREIGN_ADDRESS}/32 dev lo")


# Everything that an answer may say. Others would tell which upstream it came from.
HEADERS = set(
    "server date content-type content-length content-range connection last-modified etag"
    " accept-ranges transfer-encoding location allow content-disposition"
    " cache-control expires vary".split()
)


def test_answers_name_no_upstream(host: Any, slave: Any, ask_all: Any, get: Any) -> None:
    config = host.check_output("cat /etc/cellblock/cache/nginx.conf")
    upstreams = {
        line.split("//")[1].rstrip(";")
        for line in config.splitlines()
        if "set $cellblock_origin" in line
    }
    assert upstreams
    paths = [GOOD, "/python/six/", "/npm/once", "/python/no-such-project-here/", "/npm/wrappy"]
    json_page = get(
        "/python/six/", extra="Accept: application/vnd.pypi.simple.v1+json, text/html;q=0.1\r\n"
    )
    answers = ask_all(slave, [*(get(path) for path in paths), json_page])
    assert [answer[0] for answer in answers] == [200, 200, 200, 404, 200, 200]
    for _, headers, body in answers[1:]:
        assert set(headers) <= HEADERS, set(headers) - HEADERS
        assert not [name for name in upstreams if name in body or name in str(headers)]
    assert "application/vnd.pypi.simple.v1+json" in answers[-1][1]["content-type"]
    assert '"/python-files/' in answers[-1][2]
    assert 'href="/python-files/' in answers[1][2]


def test_a_package_is_installed_through_the_cache_and_kept(host: Any, slave: Any) -> None:
    slave.run("apt-get purge -qq -y hello; apt-get clean")
    seen = len(journal(host))
    try:
        slave.check_output("apt-get install -qq -y --no-install-recommends hello")
        assert slave.check_output("hello") == "Hello, world!"
        # The cache's own word, and its directory's.
        fetched = [line for line in journal(host)[seen:] if "/hello_" in line]
        assert len(fetched) == 1, fetched
        path = fetched[0].split()[2].removeprefix("/debian/")
        files = kept(host, f"debian */* {path}")
        assert len(files) == 1
        assert int(host.file(files[0]).size) > 40_000

        slave.check_output("apt-get purge -qq -y hello && apt-get clean")
        slave.check_output("apt-get install -qq -y --no-install-recommends hello")
        again = [line for line in journal(host) if "/hello_" in line][-1]
        assert "cache=HIT upstream=-" in again
    finally:
        slave.run("apt-get purge -qq -y hello; apt-get clean")


def test_what_is_kept_needs_no_upstream(host: Any, slave: Any, ask_all: Any, get: Any) -> None:
    """Without the resolver the cache finds no upstream; what it has it still serves."""
    pages = [get("/npm/wrappy"), get("/npm/semver/-/semver-7.6.0.tgz")]
    assert [answer[0] for answer in ask_all(slave, pages)] == [200, 200]
    unknown = get("/npm/semver/-/semver-7.5.0.tgz")
    host.check_output("systemctl stop cellblock-cache cellblock-resolver")
    try:
        # A run before this one may have asked for it.
        for file in kept(host, "npm */* semver/-/semver-7.5.0.tgz"):
            host.check_output(f"rm {file}")
        # Starting the cache wants the resolver, so it is ended again; no name was asked for yet.
        host.check_output("systemctl start cellblock-cache")
        host.check_output("systemctl stop cellblock-resolver")
        statuses = [answer[0] for answer in ask_all(slave, [*pages, unknown])]
        assert statuses == [200, 200, 502]
    finally:
        host.check_output("systemctl start cellblock-resolver cellblock-cache")
    # The control: with it the unknown file is there.
    assert ask_all(slave, [unknown])[0][0] == 200


# Gets pip itself through the cache, as a wheel that can be run; then a project by its digest.
PIP = r"""
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
export PIP_CONFIG_FILE=/etc/cellblock/pip.conf
python3 - <<'PYTHON'
import configparser, hashlib, json, urllib.parse, urllib.request
settings = configparser.ConfigParser()
settings.read("/etc/cellblock/pip.conf")
page = settings["global"]["index-url"] + "pip/"
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ask = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
files = json.load(opener.open(ask))["files"]
wheel = next(file for file in files if file["filename"] == "pip-24.0-py3-none-any.whl")
address = urllib.parse.urljoin(page, wheel["url"])
assert urllib.parse.urlsplit(address).netloc == urllib.parse.urlsplit(page).netloc, address
content = opener.open(address).read()
assert hashlib.sha256(content).hexdigest() == wheel["hashes"]["sha256"]
open("pip.whl", "wb").write(content)
PYTHON
for digest in DIGESTS; do
    echo "six==1.16.0 --hash=sha256:$digest" >requirements.txt
    rm -rf got
    if python3 pip.whl/pip download -q --no-cache-dir --disable-pip-version-check --no-deps \
        --only-binary :all: --require-hashes -d got -r requirements.txt 2>error; then
        ls got
    else
        grep -o 'DO NOT MATCH THE HASHES' error
    fi
done
"""
SIX = "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254"


def test_pip_downloads_by_digest(host: Any, slave: Any) -> None:
    script = PIP.replace("DIGESTS", f"{SIX} {SIX[::-1]}")
    done = slave.run(f"bash -c {shlex.quote(script)}")
    assert done.rc == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        "six-1.16.0-py2.py3-none-any.whl",
        "DO NOT MATCH THE HASHES",
    ]
    assert any("/python-files/" in line and "six-1.16.0" in line for line in journal(host))


# --- with an upstream that misbehaves ---------------------------------------------------------


@pytest.mark.usefixtures("lab")
class TestMisbehavingUpstream:
    def test_nothing_of_a_client_gets_there(self, slave: Any, ask_all: Any, get: Any) -> None:
        extra = (
            "Authorization: Basic eDp5\r\nCookie: a=b\r\nX-Mine: 1\r\nUser-Agent: me\r\n"
            "X-Forwarded-For: 10.0.0.1\r\nRange: bytes=0-1\r\nAccept: secret/type\r\n"
        )
        status, headers, body = ask_all(slave, [get("/files/count/1", extra=extra)])[0]
        assert status == 206
        assert len(body) == 2
        seen = json.loads(ask_all(slave, [get("/files/count/1")])[0][2])
        assert seen["count"] == 1, "the second request must not have reached the upstream"
        assert {name.lower() for name in seen["headers"]} <= {"host", "user-agent", "accept"}
        assert seen["headers"]["User-Agent"] == "cellblock-cache"
        assert seen["headers"]["Accept"] == "*/*"

    def test_nothing_tell_tale_comes_back(self, slave: Any, ask_all: Any, get: Any) -> None:
        status, headers, body = ask_all(slave, [get("/files/telltale")])[0]
        assert (status, body) == (200, "telltale")
        assert set(headers) <= HEADERS, set(headers) - HEADERS

    def test_redirections(self, slave: Any, ask_all: Any, get: Any) -> None:
        paths = ("within", "absolute", "foreign", "scheme", "above", "escape", "query")
        answers = ask_all(slave, [get(f"/files/to/{path}") for path in paths])
        assert [answer[0] for answer in answers] == [302, 302, 502, 502, 502, 502, 502]
        assert answers[0][1]["location"] == "/files/count/2"
        assert answers[1][1]["location"] == "/index/six/"
        assert all("location" not in answer[1] for answer in answers[2:])

    def test_errors_name_no_upstream(self, slave: Any, ask_all: Any, get: Any) -> None:
        codes = (401, 403, 404, 429, 500)
        answers = ask_all(slave, [get(f"/files/status/{code}") for code in codes])
        assert [answer[0] for answer in answers] == [502, 502, 404, 502, 502]
        assert not any("upstream says" in answer[2] for answer in answers)

    def test_links_are_rewritten(self, slave: Any, ask_all: Any, get: Any) -> None:
        json_type = "application/vnd.pypi.simple.v1+json"
        page, data = ask_all(
            slave, [get("/index/six/"), get("/index/six/", extra=f"Accept: {json_type}\r\n")]
        )
        assert 'href="/files/six.whl#sha256=0"' in page[2]
        assert json.loads(data[2])["files"][0]["url"] == "/files/six.whl"
        assert data[1]["content-type"] == json_type

    def test_many_clients_cause_one_download(self, host: Any, slave: Any, cache: Any) -> None:
        url = f"http://{cache[0]}:{cache[1]}/files/slow/1"
        script = (
            "import concurrent.futures, json, urllib.request\n"
            "opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
            "with concurrent.futures.ThreadPoolExecutor(20) as pool:\n"
            f"    got = list(pool.map(lambda _: opener.open('{url}').read(), range(20)))\n"
            "print(len(got), {json.loads(one)['count'] for one in got})\n"
        )
        assert slave.check_output(f"python3 -c {shlex.quote(script)}") == "20 {1}"

    def test_an_older_copy_serves_while_the_upstream_fails(
        self, host: Any, slave: Any, ask_all: Any, get: Any
    ) -> None:
        """It answers once and then with errors. A copy counts for 30 seconds here."""
        statuses = []
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            statuses.append(ask_all(slave, [get("/files/once/1")])[0][0])
            time.sleep(5)
        assert set(statuses) == {200}, statuses
        mine = [line for line in journal(host) if "/files/once/1 " in line][-len(statuses) :]
        assert "cache=MISS" in mine[0]
        assert any("cache=STALE upstream=500" in line for line in mine[-2:]), mine
        # The control: the upstream does fail, for what there is no copy of.
        assert ask_all(slave, [get("/files/status/500")])[0][0] == 502

    def test_the_size_is_limited(self, host: Any, slave: Any, ask_all: Any, get: Any) -> None:
        answers = ask_all(slave, [get(f"/files/large/{number}") for number in range(8)])
        assert {answer[0] for answer in answers} == {200}

        def size() -> int:
            return int(host.check_output(f"du -sb {lab.STORE}/packages").split()[0])

        def files() -> int:
            return int(host.check_output(f"find {lab.STORE}/packages -type f | wc -l"))

        # The control: they were kept, all 3.2 MB of them, and not for as short as 30 seconds.
        assert size() > 3_000_000
        deadline = time.monotonic() + 20
        # Directories count for du, not for nginx.
        while size() > 1_048_576 + 300_000 and time.monotonic() < deadline:
            time.sleep(1)
        assert size() <= 1_048_576 + 300_000
        assert files() > 0

    def test_jobs_may_fetch(self, host: Any, ask_all: Any, get: Any) -> None:
        assert ask_all(host, [get("/files/count/3")], source=lab.JOB_ADDRESS)[0][0] == 200

    def test_whoever_asks_for_too_much_waits(self, slave: Any, cache: Any) -> None:
        script = (
            "import http.client, time\n"
            f"c = http.client.HTTPConnection('{cache[0]}', {cache[1]})\n"
            "def ask(n):\n"
            "    begin = time.monotonic()\n"
            "    for _ in range(n):\n"
            "        c.request('GET', '/files/count/4')\n"
            "        answer = c.getresponse()\n"
            "        answer.read()\n"
            "        assert answer.status == 200, answer.status\n"
            "    return time.monotonic() - begin\n"
            "print(ask(100), ask(800))\n"
        )
        few, many = map(float, slave.check_output(f"python3 -c {shlex.quote(script)}").split())
        # 900 requests, of which 300 pass at once and 200 each second.
        assert many >= 2, (few, many)

    def test_connections_of_one_client(self, slave: Any, cache: Any) -> None:
        script = (
            "import socket\n"
            "def ask():\n"
            "    s = socket.socket()\n"
            "    s.settimeout(20)\n"
            f"    s.connect(('{cache[0]}', {cache[1]}))\n"
            "    s.sendall(b'GET /files/slow/%d HTTP/1.1\\r\\nConnection: close\\r\\n'\n"
            f"              b'Host: {cache[0]}:{cache[1]}\\r\\n\\r\\n' % 2)\n"
            "    return s\n"
            "open_ones = [ask() for _ in range(80)]\n"
            "got = [s.recv(12)[-3:].decode() for s in open_ones]\n"
            "print(got.count('200'), got.count('429'))\n"
        )
        assert slave.check_output(f"python3 -c {shlex.quote(script)}") == "64 16"


def test_a_host_whose_cache_server_says_nothing_is_given_up_in_time(host: Any) -> None:
    host.check_output("systemctl kill --signal=STOP cellblock-cache")
    try:
        started = time.monotonic()
        done = subprocess.run(
            [
                *("ansible", "slave1", "--module-name=include_role"),
                *("--args", "name=packages"),
                *("-e", json.dumps({"packages_names": ["sl"], "packages_lists_timeout_s": 3})),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        )
        took = time.monotonic() - started
    finally:
        host.check_output("systemctl kill --signal=CONT cellblock-cache")
    said = " ".join(done.stdout.split())
    assert done.returncode != 0, said
    assert "slave1: the package lists could not be fetched within 3 s" in said
    assert took < 30
