"""Answers whoever comes with a secret, and prints who came."""

import contextlib
import json
import os
import socket
import sys
import time

given = json.loads(sys.argv[1])
s = socket.create_server(("0.0.0.0", given["port"]))
s.settimeout(0.2)
with open(given["ready"], "w"):
    pass
came, end = [], time.monotonic() + given["seconds"]
while time.monotonic() < end and os.path.exists(given["ready"]):
    try:
        peer, source = s.accept()
    except OSError:
        continue
    with peer:
        came.append(source[0])
        peer.settimeout(1)
        with contextlib.suppress(OSError):
            peer.recv(65536)
            peer.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
print(json.dumps(came))
