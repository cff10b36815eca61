"""Counts the frames that come in with each mark, until it is told to stop or the time is over."""

import json
import os
import socket
import struct
import sys
import time

given = json.loads(sys.argv[1])
marks = [mark.encode() for mark in given["marks"]]
counts = dict.fromkeys(given["marks"], 0)
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE
s.settimeout(0.1)
with open(given["ready"], "w"):
    pass
end = time.monotonic() + given["seconds"]
while time.monotonic() < end and os.path.exists(given["ready"]):
    while True:
        try:
            frame, place = s.recvfrom(65536)
        except OSError:
            break
        # Not what goes out, nor what a slave that routes gets from its own slots before it drops it.
        if place[2] != 4 and not place[0].startswith("cbj"):
            for mark in marks:
                if mark in frame:
                    counts[mark.decode()] += 1
_, missed = struct.unpack("=II", s.getsockopt(263, 6, 8))  # SOL_PACKET, PACKET_STATISTICS
print(json.dumps({"counts": counts, "missed": missed}))
