"""A constant stream of datagrams and frames to every target, for some seconds."""

import contextlib
import json
import socket
import time

from frames import given, mac, own_address, own_mac, udp4, via

mark, control = given["mark"].encode(), given["control"].encode()
name, own, address = "job0", own_mac("job0"), own_address("job0")
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
packet.bind((name, 0))
tried = 0
end = time.monotonic() + given["seconds"]
bodies = [
    mac(via(name, ether)) + mac(own) + b"\x08\0" + udp4(address, to, 9999, mark)
    for to, ether in given["targets"]
]
while time.monotonic() < end:
    for (to, _), frame in zip(given["targets"], bodies, strict=True):
        tried += 1
        with contextlib.suppress(OSError):
            s.sendto(mark, (to, 9999))
        if given.get("frames"):
            tried += 1
            with contextlib.suppress(OSError):
                packet.send(frame)
    if tried % 50 < 2 * len(bodies):
        with contextlib.suppress(OSError):
            s.sendto(control, (given["honest"], 53))
    time.sleep(0.002)
print(json.dumps(tried))
