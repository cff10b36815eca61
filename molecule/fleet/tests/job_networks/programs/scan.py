"""Connects to ports of every address, thousands at a time; prints those that answered in any way.

``ports`` are those to try, or null for all of them.
"""

import errno
import json
import select
import socket
import sys
import time

given = json.loads(sys.argv[1])
ports = given["ports"] or range(1, 65536)
reached = []
tried = 0
waiting: dict[int, tuple[socket.socket, tuple[str, int]]] = {}


def settle() -> None:
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLOUT)
    end = time.monotonic() + 0.25
    while waiting and time.monotonic() < end:
        for fd, _ in poll.poll(50):
            s, place = waiting.pop(fd)
            poll.unregister(fd)
            code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code in (0, errno.ECONNREFUSED):
                reached.append([*place, code])
            s.close()
    for s, _ in waiting.values():
        s.close()
    waiting.clear()


for address in given["addresses"]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in ports:
        s = socket.socket(family, socket.SOCK_STREAM)
        s.setblocking(False)
        tried += 1
        code = s.connect_ex((address, port))
        if code == errno.EINPROGRESS:
            waiting[s.fileno()] = s, (address, port)
            if len(waiting) >= 3500:
                settle()
        else:
            if code in (0, errno.ECONNREFUSED):
                reached.append([address, port, code])
            s.close()
settle()
print(json.dumps({"tried": tried, "reached": reached}))
