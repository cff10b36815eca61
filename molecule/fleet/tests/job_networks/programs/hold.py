"""Opens as many connections as it gets and holds them for some seconds, having sent the beginning of a request.

Prints how many it got, and how many it had still when it ended.
"""

import json
import resource
import socket
import sys
import time

given = json.loads(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
end = time.monotonic() + given["seconds"]
held: list[socket.socket] = []
got = 0
while time.monotonic() < end:
    if len(held) >= given["most"]:
        time.sleep(0.1)
        continue
    connection = socket.socket()
    connection.settimeout(2)
    try:
        connection.connect((given["address"], given["port"]))
        connection.sendall(given["begin"].encode("latin-1"))
    except OSError:
        connection.close()
        time.sleep(0.01)
        continue
    connection.setblocking(False)
    held.append(connection)
    got += 1
still = 0
for connection in held:
    try:
        still += connection.recv(1) != b""
    except BlockingIOError:
        still += 1
    except OSError:
        pass
print(json.dumps({"got": got, "held": still}))
