"""Listens, and tells how many came; the first it is itself."""

import json
import select
import socket
import sys
import time

given = json.loads(sys.argv[1])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((given["cache"], 53))
own = s.getsockname()[0]
tcp = socket.create_server(("0.0.0.0", 7777))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 7777))
socket.create_connection((own, 7777), 2).close()
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (own, 7777))
came: dict[str, list[str]] = {"tcp": [], "udp": []}
end = time.monotonic() + given["seconds"]
while time.monotonic() < end:
    for ready in select.select([tcp, udp], [], [], 0.2)[0]:
        if ready is tcp:
            came["tcp"].append(tcp.accept()[1][0])
        else:
            came["udp"].append(udp.recvfrom(100)[1][0])
print(json.dumps({"own": own, **came}))
