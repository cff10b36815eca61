"""An upstream that misbehaves, for test_cache_server.py: runs on the cache server's loopback."""

from __future__ import annotations

import collections
import http.server
import json
import threading
import time

ORIGIN = "http://127.0.0.1:8099"
REDIRECTIONS = {
    "within": "/files/count/2",
    "absolute": f"{ORIGIN}/simple/six/",
    "foreign": "http://198.51.100.10/files/count/2",
    "scheme": "https://127.0.0.1:8099/files/count/2",
    "above": "/secret",
    "escape": "/files/%2e%2e/secret",
    "query": "/files/count/2?token=1",
}
TELLTALE = {
    "Via": "1.1 upstream",
    "X-Cache": "HIT from upstream",
    "X-Served-By": "upstream",
    "Set-Cookie": "a=b",
    "X-Accel-Redirect": "/index/six/",
    "X-Accel-Expires": "0",
    "Cache-Control": "no-store, private",
    "Vary": "*",
    "Strict-Transport-Security": "max-age=1",
    "Link": "<http://upstream/>; rel=canonical",
    "WWW-Authenticate": "Basic",
}

counts: collections.Counter[str] = collections.Counter()
lock = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        with lock:
            counts[self.path] += 1
            count = counts[self.path]
        kind, _, name = self.path.removeprefix("/files/").partition("/")
        report = json.dumps({"count": count, "headers": dict(self.headers)}).encode()
        if self.path == "/simple/six/":
            self.page()
        elif kind == "to":
            self.answer(302, b"", Location=REDIRECTIONS[name])
        elif kind == "telltale":
            self.answer(200, b"telltale", **TELLTALE)
        elif kind == "status" or (kind == "once" and count > 1):
            self.answer(int(name) if kind == "status" else 500, b"upstream says no")
        elif kind == "large":
            self.answer(200, name.encode() * 400_000)
        else:
            if kind == "slow":
                time.sleep(2)
            self.answer(200, report)

    def page(self) -> None:
        link = "http://files.test.invalid/packages/six.whl"
        if "json" in self.headers["Accept"]:
            body = json.dumps({"files": [{"url": link, "filename": "six.whl"}]}).encode()
            self.answer(200, body, Content_Type="application/vnd.pypi.simple.v1+json")
        else:
            body = f'<a href="{link}#sha256=0">six.whl</a>'.encode()
            self.answer(200, body, Content_Type="text/html")


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", 8099), Handler).serve_forever()
