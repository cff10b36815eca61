"""A cache server with upstreams that misbehave, for packages (upstream.py) and names (upstream_resolver.py).

Both run on the cache server's loopback, which also gets addresses of nobody to ask from: nothing that is
sent from them leaves it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Beside the real store, whose packages would go with such a small size.
STORE = "/var/cache/cellblock-test"
JOB_ADDRESS, FOREIGN_ADDRESS = "10.99.0.5", "10.98.0.5"

SETTINGS = {
    "cache_server_upstreams": {
        "files": {"url": "http://127.0.0.1:8099/files", "kind": "files", "probe": "count/0"},
        "index": {
            "url": "http://127.0.0.1:8099/simple",
            "kind": "python",
            "links": [{"from": "http://files.test.invalid/packages/", "to": "files"}],
        },
    },
    "cache_server_max_size_bytes": 1048576,
    "cache_server_inactive": "30s",
    "cache_server_dns_upstreams": ["127.0.0.1@5300"],
    "cache_server_job_networks": "{{ cellblock_fleet | cellblock.fleet.job_sources + ['10.99.0.0/24'] }}",
    "__cache_server_store": STORE,
}


@contextlib.contextmanager
def misbehaving_upstreams(host: Any, playbook: Callable[..., Any]) -> Iterator[str]:
    """Provisions the cache server for them, and at the end back; the name of an upstream that it had."""
    nginx = host.check_output("cat /etc/cellblock/cache/nginx.conf").split()
    upstream: str = nginx[nginx.index("proxy_ssl_name") + 1].rstrip(";")
    relay = host.check_output(
        "awk '$1 == \"forward-addr:\" {print $2; exit}' /etc/cellblock/resolver.conf"
    )
    units = {"upstream": "", "upstream_resolver": relay}
    for name, argument in units.items():
        text = shlex.quote((HERE / f"{name}.py").read_text())
        host.check_output(f"printf %s {text} > /run/test-{name}.py")
        command = f"python3 /run/test-{name}.py {shlex.quote(argument)}"
        host.check_output(f"systemd-run -q --unit test-{name} {command}")
    for address in (JOB_ADDRESS, FOREIGN_ADDRESS):
        host.check_output(f"ip address replace {address}/32 dev lo")
    limit = ("--limit", "localhost,cache1")
    try:
        done = playbook("site.yml", *limit, "-e", json.dumps(SETTINGS))
        assert done.returncode == 0, done.stdout + done.stderr
        yield upstream
    finally:
        done = playbook("site.yml", *limit)
        for name in units:
            host.run(f"systemctl stop test-{name}; rm -f /run/test-{name}.py")
        for address in (JOB_ADDRESS, FOREIGN_ADDRESS):
            host.run(f"ip address del {address}/32 dev lo")
        host.run(f"rm -rf {STORE}")
        assert done.returncode == 0, done.stdout + done.stderr
