"""Sends bytes to a place and prints what comes back."""

import json
import socket
import sys

given = json.loads(sys.argv[1])
answers = []
for text in given["requests"]:
    data = b""
    try:
        with socket.create_connection((given["address"], given["port"]), 5) as s:
            s.settimeout(10)
            s.sendall(text.encode())
            while len(data) < 100000:
                part = s.recv(65536)
                if not part:
                    break
                data += part
    except OSError as problem:
        data += b"<" + type(problem).__name__.encode() + b">"
    answers.append(data.decode("latin-1"))
print(json.dumps(answers))
