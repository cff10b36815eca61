"""Asks resolvers for A records; prints [status, addresses] for each, or null where one is silent."""

import json
import socket
import struct
import sys
from typing import Any

given = json.loads(sys.argv[1])


def ask(resolver: str, name: str) -> list[Any] | None:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack("!6H", 7, 256, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
    try:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.settimeout(5)
        s.connect((resolver, 53))
        s.send(query)
        data = s.recv(4096)
    except OSError:
        return None
    flags, _, count = struct.unpack("!3H", data[2:8])
    at, found = len(query), []
    for _ in range(count):
        kind, _, _, length = struct.unpack("!2HIH", data[at + 2 : at + 12])
        if kind == 1:
            found.append(socket.inet_ntoa(data[at + 12 : at + 16]))
        at += 12 + length
    return [flags & 15, found]


print(json.dumps([ask(*question) for question in given["questions"]]))
