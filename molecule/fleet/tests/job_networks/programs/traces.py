"""What the kernel says of the network before and after a job uses it."""

import json
import socket
import sys
from pathlib import Path

given = json.loads(sys.argv[1])


def state() -> dict[str, int]:
    net = Path("/proc/net")
    devices = (net / "dev").read_text().splitlines()
    [device] = [line.split() for line in devices if "job0" in line]
    lines = (net / "snmp").read_text().splitlines()
    _, tcp = [line.split() for line in lines if line.startswith("Tcp:")]
    return {
        "sockets": len((net / "tcp").read_text().splitlines()) - 1,
        "neighbours": len((net / "arp").read_text().splitlines()) - 1,
        "sent_packets": int(device[10]),
        "opens": int(tcp[5]),
        "unix": (net / "unix").read_text().count("@cellblock-trace"),
    }


before = state()
own = None
for _ in range(given["connections"]):
    with socket.create_connection((given["address"], given["port"]), 3) as s:
        own = s.getsockname()[0]
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\0cellblock-trace")
print(json.dumps({"own": own, "before": before, "after": state()}))
