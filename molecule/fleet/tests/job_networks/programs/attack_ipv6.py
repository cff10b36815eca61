"""Everything that IPv6 has for reaching neighbours, as frames and through the kernel."""

import contextlib
import json
import socket
import struct
import time
from pathlib import Path

from frames import given, icmp6, mac, own_mac, send

mark = given["mark"].encode()
name, own = given["interface"], own_mac(given["interface"])
if given.get("enable"):
    for key, value in (("disable_ipv6", "0"), ("accept_ra", "2")):
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/{key}").write_text(value)
    time.sleep(2)
me = "fe80::cb:1"
sent = []
everybody = [("ff02::1", "33:33:00:00:00:01"), ("ff02::2", "33:33:00:00:00:02")]
for to, ether in [*everybody, *given["targets"]]:
    echo = icmp6(me, to, 128, struct.pack("!HH", 1, 1) + mark)
    sent.append(send(name, ether, own, 0x86DD, echo))
# A router advertisement of a prefix, and a neighbour advertisement of the gateway.
bad = socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
prefix = struct.pack("!BBBBIII16s", 3, 4, 64, 0xC0, 600, 600, 0, bad)
padded = b"\xfd\x04" + mark.ljust(30, b"\0")
router = icmp6(me, "ff02::1", 134, struct.pack("!BBHII", 64, 0, 0, 0, 0) + prefix + padded)
gateway = b"\x60\0\0\0" + socket.inet_pton(socket.AF_INET6, "fe80::1") + b"\x02\x01" + mac(own)
neighbour = icmp6(me, "ff02::1", 136, gateway + padded)
for advertisement in (router, neighbour):
    sent.append(send(name, "33:33:00:00:00:01", own, 0x86DD, advertisement))
for to, _ in given["targets"] + [["ff02::1", ""]]:
    try:
        s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        s.sendto(mark, (to, 9999, 0, socket.if_nametoindex(name)))
        sent.append(0)
    except OSError as problem:
        sent.append(problem.errno or -1)
print(json.dumps(sent))
