# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Finds where this machine gets its packages from, for the cache servers to fetch from there too.

Reads the configuration of apt, pip and npm as they see it, and asks the package indexes where the
files are that they link to. What an index answered is kept for a day, so that a second run changes
nothing and is quick.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

KINDS = ("apt", "python", "npm", "files")
# Projects that every complete index has; what their links have in common is where its files are.
PYTHON_PROJECTS = ("pip", "setuptools", "wheel")
NPM_PROJECTS = ("once", "wrappy", "semver")
PYTHON_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
LOOKUP_SECONDS = 86400
TIMEOUT_SECONDS = 30
REMEDY = "; set cache_server_upstreams instead of having it looked up"

Upstream = dict[str, Any]
Fetch = Callable[[str, str], tuple[str, str]]


class UpstreamError(Exception):
    """The upstreams cannot be told; the message says what to change."""


def find(
    given: Mapping[str, Any], given_bundle: str, cache_dir: Path
) -> tuple[dict[str, Upstream], Path]:
    """The upstreams (path prefix -> ``url``, ``kind``, ``probe``, ``links`` and what :func:`parts`
    makes of the url), and a file with the certificates by which they are verified.

    ``given`` is a table of one's own that is checked, completed and used instead of looking; ``given_bundle`` is such a file.
    Raises UpstreamError.
    """
    bundle = ca_bundle(cache_dir, given_bundle)
    return check(given or look_up(bundle, cache_dir / "lookups.json")), bundle


def look_up(bundle: Path, store: Path) -> dict[str, Upstream]:
    """What this machine's apt, pip and npm use."""
    fetch = remembering(fetcher(bundle), store)
    found = apt_upstreams(
        output("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(RELEASE)")
        or ""
    )
    if not found:
        raise UpstreamError(
            "the controller's apt knows no Debian or Ubuntu archive; run 'apt-get update' on it"
            + (", or" + REMEDY[1:])
        )
    found |= python_upstreams(pip_index(), fetch)
    registry = output("npm", "config", "get", "registry") if shutil.which("npm") else None
    if registry:
        found |= npm_upstreams(registry, fetch)
    return found


def apt_upstreams(targets: str) -> dict[str, Upstream]:
    """Upstreams out of the lines ORIGIN|LABEL|URI|RELEASE that `apt-get indextargets` prints.

    The first archive of each purpose counts, as for apt itself.
    """
    found: dict[str, Upstream] = {}
    for line in targets.splitlines():
        fields = line.split("|")
        if len(fields) != 4:
            continue
        origin, label, url, release = fields
        if origin not in ("Debian", "Ubuntu") or not url.startswith(("http://", "https://")):
            continue
        if label not in (origin, f"{origin}-Security"):
            continue
        security = label.endswith("-Security") or release.endswith("-security")
        name = origin.lower() + ("-security" if security else "")
        probe = f"dists/{release}/InRelease"
        found.setdefault(name, {"url": url, "kind": "apt", "probe": probe})
    return found


def pip_index() -> str:
    """The index that pip uses: from its environment, its configuration, or built in."""
    url = (
        os.environ.get("PIP_INDEX_URL")
        or output(sys.executable, "-m", "pip", "config", "get", "global.index-url")
        or output(
            sys.executable,
            "-c",
            "from pip._internal.models.index import PyPI; print(PyPI.simple_url)",
        )
    )
    if not url:
        raise UpstreamError(f"{sys.executable} has no pip that tells its index" + REMEDY)
    return url


def python_upstreams(index: str, fetch: Fetch) -> dict[str, Upstream]:
    """The index and where its files are."""
    index = f"{index.rstrip('/')}/"
    links: list[str] = []
    page = ""
    for project in PYTHON_PROJECTS:
        page = f"{index}{project}/"
        content_type, text = fetch(page, PYTHON_ACCEPT)
        links += python_links(content_type, text)
    raw = common_directory(links)
    files = urljoin(page, raw)
    own = {"url": index, "kind": "python", "probe": "pip/"}
    if not raw or not files.startswith(("http://", "https://")):
        raise UpstreamError(f"the files that {index} links to have no directory in common" + REMEDY)
    return {
        "python": own | {"links": [{"from": raw, "to": "python-files"}]},
        "python-files": {"url": files, "kind": "files"},
    }


def python_links(content_type: str, text: str) -> list[str]:
    """The links to files on a project's page, as they are written there."""
    if "json" in content_type:
        return [file["url"] for file in json.loads(text)["files"]]
    return [link.partition("#")[0] for link in re.findall(r"<a\s[^>]*?href=\"([^\"]+)\"", text)]


def npm_upstreams(registry: str, fetch: Fetch) -> dict[str, Upstream]:
    """The registry and, if that is elsewhere, where its files are."""
    registry = f"{registry.rstrip('/')}/"
    links: list[str] = []
    for project in NPM_PROJECTS:
        _, text = fetch(f"{registry}{project}", "application/vnd.npm.install-v1+json")
        versions = json.loads(text)["versions"].values()
        links += [version["dist"]["tarball"] for version in versions]
    raw = common_directory(links)
    own = {"url": registry, "kind": "npm", "probe": NPM_PROJECTS[0]}
    if raw == registry:
        return {"npm": own | {"links": [{"from": raw, "to": "npm"}]}}
    if not raw.startswith(("http://", "https://")):
        raise UpstreamError(
            f"the files that {registry} links to have no directory in common" + REMEDY
        )
    return {
        "npm": own | {"links": [{"from": raw, "to": "npm-files"}]},
        "npm-files": {"url": raw, "kind": "files"},
    }


def common_directory(links: Sequence[str]) -> str:
    """The longest beginning that all links share and that ends with a slash.

    Empty where they share none below a host.
    """
    prefix = os.path.commonprefix(list(links))
    directory = prefix[: prefix.rfind("/") + 1]
    return "" if directory in ("http://", "https://") else directory


def check(table: Any) -> dict[str, Upstream]:
    """The table with every field that the cache server's configuration needs.

    Raises UpstreamError that names the entry and what is wrong with it.
    """
    if not isinstance(table, Mapping) or not table:
        raise UpstreamError("cache_server_upstreams is not a table of path prefixes")
    checked: dict[str, Upstream] = {}
    for name, entry in table.items():
        where = f"cache_server_upstreams.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", str(name)):
            raise UpstreamError(f"{where}: a prefix has lower-case letters, digits and - only")
        if not isinstance(entry, Mapping) or set(entry) - {"url", "kind", "probe", "links"}:
            raise UpstreamError(f"{where}: write {{url: ..., kind: ...}}, and probe and links")
        if entry.get("kind") not in KINDS:
            raise UpstreamError(f"{where}.kind: is none of {', '.join(KINDS)}")
        if not re.fullmatch(r"[A-Za-z0-9._~/+@-]*", str(entry.get("probe", ""))):
            raise UpstreamError(f"{where}.probe: '{entry['probe']}' is no path below the address")
        links = entry.get("links", [])
        for link in links:
            if (
                not isinstance(link, Mapping)
                or set(link) != {"from", "to"}
                or link["to"] not in table
            ):
                raise UpstreamError(f"{where}.links: write [{{from: ..., to: a prefix}}]")
            if not re.fullmatch(r"[A-Za-z0-9._~:/+@-]*/", link["from"]):
                raise UpstreamError(f"{where}.links: '{link['from']}' is no beginning of a link")
        checked[name] = {
            **parts(f"{where}.url", str(entry.get("url", ""))),
            "kind": entry["kind"],
            "probe": entry.get("probe", ""),
            "links": links,
        }
    return checked


def parts(where: str, url: str) -> Upstream:
    """The upstream's address in the pieces that nginx is told."""
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
    except ValueError:
        host, port = "", None
    if split.scheme not in ("http", "https") or not host:
        raise UpstreamError(f"{where}: '{url}' is no http or https address")
    if split.username is not None or split.password is not None:
        # Not repeated here: it would land in a log.
        raise UpstreamError(
            f"{where}: holds credentials; the cache would hand out to everyone what they protect:"
            " give an address without any"
        )
    if split.query or split.fragment or not re.fullmatch(r"[A-Za-z0-9.-]+", host):
        raise UpstreamError(f"{where}: '{url}' is more than a scheme, host name, port and path")
    path = f"/{split.path.strip('/')}/".replace("//", "/")
    if not re.fullmatch(r"[A-Za-z0-9._~/+@-]+", path):
        raise UpstreamError(f"{where}: the path '{path}' has characters that need quoting")
    authority = host if port is None else f"{host}:{port}"
    return {"scheme": split.scheme, "host": host, "authority": authority, "path": path}


def ca_bundle(directory: Path, given: str) -> Path:
    """A file with the certificates that pip, apt and npm trust, or those in ``given``."""
    files = [given] if given else trusted_files()
    certificates: dict[str, None] = {}
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError as problem:
            raise UpstreamError(
                f"the certificates in {file} cannot be read ({problem.strerror})"
            ) from None
        for one in re.findall(
            r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL
        ):
            certificates[one] = None
    if not certificates:
        raise UpstreamError(
            f"no certificate in {', '.join(files) or 'any file that pip or apt names'};"
            " set cache_server_ca_bundle"
        )
    text = "\n".join(certificates) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"ca-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pem"
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    return path


def trusted_files() -> list[str]:
    """The files of certificates that this machine's programs use, without repetition."""
    pip = (
        os.environ.get("PIP_CERT")
        or output(sys.executable, "-m", "pip", "config", "get", "global.cert")
        or os.environ.get("REQUESTS_CA_BUNDLE")
        or os.environ.get("SSL_CERT_FILE")
        or ssl.get_default_verify_paths().cafile
        or output(sys.executable, "-c", "from pip._vendor import certifi; print(certifi.where())")
    )
    apt = output("apt-config", "shell", "file", "Acquire::https::CaInfo") or ""
    npm = output("npm", "config", "get", "cafile") if shutil.which("npm") else None
    named = [pip, apt.partition("=")[2].strip("'"), npm if npm != "null" else None]
    return list(dict.fromkeys(os.path.realpath(file) for file in named if file))


def output(*command: str) -> str | None:
    """What the command prints, or nothing where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def fetcher(bundle: Path) -> Fetch:
    """A function from (address, Accept header) to (content type, text)."""
    context = ssl.create_default_context(cafile=str(bundle))

    def fetch(url: str, accept: str) -> tuple[str, str]:
        if not url.startswith(("http://", "https://")):
            raise UpstreamError(f"{url} is no http or https address" + REMEDY)
        request = urllib.request.Request(url, headers={"Accept": accept})
        try:
            with urllib.request.urlopen(
                request, timeout=TIMEOUT_SECONDS, context=context
            ) as answer:
                return answer.headers.get_content_type(), answer.read().decode()
        except (OSError, urllib.error.URLError, UnicodeDecodeError) as problem:
            raise UpstreamError(f"{url} cannot be fetched ({problem})" + REMEDY) from None

    return fetch


def remembering(fetch: Fetch, store: Path) -> Fetch:
    """``fetch``, with its answers kept in ``store`` for a day.

    An older answer still counts where the index does not answer.
    """
    try:
        kept = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}

    def fetch_once(url: str, accept: str) -> tuple[str, str]:
        old = kept.get(url)
        if old and 0 <= time.time() - old["time"] < LOOKUP_SECONDS:
            return old["type"], old["text"]
        try:
            content_type, text = fetch(url, accept)
        except UpstreamError:
            if old:
                return old["type"], old["text"]
            raise
        kept[url] = {"time": time.time(), "type": content_type, "text": text}
        store.parent.mkdir(parents=True, exist_ok=True)
        scratch = store.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(kept), encoding="utf-8")
        scratch.replace(store)
        return content_type, text

    return fetch_once
