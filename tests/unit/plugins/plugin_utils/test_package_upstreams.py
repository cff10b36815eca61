"""Where packages come from: reading apt's answer, the indexes' pages, and tables of one's own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cellblock.fleet.plugins.plugin_utils import package_upstreams
from ansible_collections.cellblock.fleet.plugins.plugin_utils.package_upstreams import (
    UpstreamError,
)

INDEX = "https://index.example.com/simple"
FILES = "https://files.example.net/packages/"


def test_apt_upstreams_by_purpose() -> None:
    found = package_upstreams.apt_upstreams(
        "Debian|Debian|http://a.example.com/debian/|bookworm\n"
        "Debian|Debian|http://b.example.com/debian/|bookworm\n"
        "Debian|Debian|http://a.example.com/debian/|bookworm-updates\n"
        "Debian|Debian-Security|https://a.example.com/sec/|bookworm-security\n"
        "Ubuntu|Ubuntu|http://u.example.com/ubuntu/|noble\n"
        "Ubuntu|Ubuntu|http://s.example.com/ubuntu/|noble-security\n"
        "Someone|Something|http://x.example.com/|stable\n"
        "Debian|Debian|file:/mnt/debian/|bookworm\n"
        "Debian|Debian Backports|http://a.example.com/debian/|bookworm-backports\n"
        "nonsense\n"
    )
    assert {name: entry["url"] for name, entry in found.items()} == {
        "debian": "http://a.example.com/debian/",
        "debian-security": "https://a.example.com/sec/",
        "ubuntu": "http://u.example.com/ubuntu/",
        "ubuntu-security": "http://s.example.com/ubuntu/",
    }
    assert found["ubuntu-security"]["probe"] == "dists/noble-security/InRelease"


def page(links: list[str], as_json: bool) -> tuple[str, str]:
    if as_json:
        return "application/vnd.pypi.simple.v1+json", json.dumps(
            {"files": [{"url": link} for link in links]}
        )
    return "text/html", "".join(f'<a class="x" href="{link}#sha256=1">x</a>' for link in links)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("beginning", "url"),
    [
        (FILES, FILES),
        ("../../packages/", "https://index.example.com/packages/"),
        ("/root/files/", "https://index.example.com/root/files/"),
    ],
)
def test_where_an_index_has_its_files(beginning: str, url: str, as_json: bool) -> None:
    def fetch(address: str, accept: str) -> tuple[str, str]:
        project = address.removeprefix(f"{INDEX}/").rstrip("/")
        return page([f"{beginning}{project}/{n}.whl" for n in range(3)], as_json)

    found = package_upstreams.python_upstreams(INDEX, fetch)
    assert found["python"]["url"] == f"{INDEX}/"
    assert found["python"]["links"] == [{"from": beginning, "to": "python-files"}]
    assert found["python-files"] == {"url": url, "kind": "files"}
    package_upstreams.check(found)


def test_an_index_whose_files_are_on_several_hosts() -> None:
    def fetch(address: str, accept: str) -> tuple[str, str]:
        return page(["https://a.example.com/x", "https://b.example.com/x"], True)

    with pytest.raises(UpstreamError, match="no directory in common; set cache_server_upstreams"):
        package_upstreams.python_upstreams(INDEX, fetch)


@pytest.mark.parametrize("files", ["https://npm.example.com/", "https://cdn.example.com/t/"])
def test_where_npm_has_its_files(files: str) -> None:
    def fetch(address: str, accept: str) -> tuple[str, str]:
        name = address.rpartition("/")[2]
        tarball = {"dist": {"tarball": f"{files}{name}/-/{name}-1.0.0.tgz"}}
        return "application/json", json.dumps({"versions": {"1.0.0": tarball}})

    found = package_upstreams.npm_upstreams("https://npm.example.com", fetch)
    own = files == "https://npm.example.com/"
    assert set(found) == ({"npm"} if own else {"npm", "npm-files"})
    assert found["npm"]["links"] == [{"from": files, "to": "npm" if own else "npm-files"}]
    package_upstreams.check(found)


def test_an_address_in_pieces() -> None:
    table = {"own": {"url": "https://mirror.example.com:8443//debian", "kind": "apt"}}
    assert package_upstreams.check(table)["own"] == {
        "scheme": "https",
        "host": "mirror.example.com",
        "authority": "mirror.example.com:8443",
        "path": "/debian/",
        "kind": "apt",
        "probe": "",
        "links": [],
    }


GOOD = {"url": "https://a.example.com/x", "kind": "files"}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "not a table"),
        ([], "not a table"),
        ({"Up/per": GOOD}, "Up/per: a prefix has lower-case"),
        ({"a": "https://a.example.com"}, "cache_server_upstreams.a: write"),
        ({"a": {**GOOD, "colour": 1}}, "cache_server_upstreams.a: write"),
        ({"a": {**GOOD, "kind": "rpm"}}, "a.kind: is none of apt, python"),
        ({"a": {**GOOD, "url": "ftp://a.example.com/"}}, "no http or https address"),
        ({"a": {**GOOD, "url": "https://"}}, "no http or https address"),
        ({"a": {**GOOD, "url": "https://a.example.com:x/"}}, "no http or https address"),
        ({"a": {**GOOD, "url": "https://a.example.com/x?y=1"}}, "more than a scheme"),
        ({"a": {**GOOD, "url": "https://a.example.com;/x"}}, "more than a scheme"),
        ({"a": {**GOOD, "url": "https://a.example.com/x;y}"}}, "need quoting"),
        ({"a": {**GOOD, "url": "https://a.example.com/$host/"}}, "need quoting"),
        ({"a": {**GOOD, "probe": "x y"}}, "a.probe"),
        ({"a": {**GOOD, "links": [{"from": "https://b/", "to": "b"}]}}, "a.links: write"),
        ({"a": {**GOOD, "links": ["x"]}}, "a.links: write"),
        ({"a": {**GOOD, "links": [{"from": "';}/", "to": "a"}]}}, "no beginning of a link"),
    ],
)
def test_tables_that_are_wrong(table: Any, words: str) -> None:
    with pytest.raises(UpstreamError, match=words):
        package_upstreams.check(table)


def test_credentials_are_refused_and_not_repeated() -> None:
    with pytest.raises(UpstreamError, match="credentials") as refusal:
        package_upstreams.check({"a": {**GOOD, "url": "https://me:hidden@a.example.com/"}})
    assert "hidden" not in str(refusal.value)


def test_an_answer_counts_for_a_day_and_longer_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[str, str]] = [("text/html", "first"), ("text/html", "second")]

    def fetch(url: str, accept: str) -> tuple[str, str]:
        if not answers:
            raise UpstreamError("no answer")
        return answers.pop(0)

    def ask() -> str:
        store = tmp_path / "lookups.json"
        return package_upstreams.remembering(fetch, store)("https://a", "*/*")[1]

    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    assert [ask(), ask()] == ["first", "first"]
    now += package_upstreams.LOOKUP_SECONDS + 1
    assert ask() == "second"
    now += package_upstreams.LOOKUP_SECONDS + 1
    assert ask() == "second"
    (tmp_path / "lookups.json").unlink()
    with pytest.raises(UpstreamError):
        ask()


def test_bundle_of_certificates(tmp_path: Path) -> None:
    one = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"
    given = tmp_path / "given.pem"
    given.write_text(f"# a comment\n{one}\n{one}\n")
    path = package_upstreams.ca_bundle(tmp_path / "cache", str(given))
    assert path.read_text() == f"{one}\n"
    given.write_text("nothing")
    with pytest.raises(UpstreamError, match="no certificate in .*given.pem"):
        package_upstreams.ca_bundle(tmp_path / "cache", str(given))
    with pytest.raises(UpstreamError, match="cannot be read"):
        package_upstreams.ca_bundle(tmp_path / "cache", str(tmp_path / "missing.pem"))
