"""Connects to each place and says what it got; then the same for as long as it is told."""

import json
import socket
import sys
import time
from pathlib import Path

given = json.loads(sys.argv[1])


def once(address: str, port: int, kind: str) -> str:
    try:
        if kind == "udp":
            s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            s.sendto(b"x", (address, port))
            return "sent"
        socket.create_connection((address, port), given.get("timeout", 1)).close()
        return "open"
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "no"


rounds, end = [], time.monotonic() + given.get("seconds", 0)
while True:
    rounds.append(
        {f"{address}:{port}": once(address, port, k) for address, port, k in given["places"]}
    )
    if time.monotonic() >= end:
        break
    time.sleep(0.1)
lines = Path("/proc/net/arp").read_text().splitlines()[1:]
print(json.dumps({"rounds": rounds, "neighbours": [line.split()[0] for line in lines]}))
