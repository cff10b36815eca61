"""Asks for the hardware address of every address, and prints who answered."""

import json
import socket
import time

from frames import ALL, arp, given, own_address, own_mac, send

name, own, address = "job0", own_mac("job0"), own_address("job0")
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x806))
s.bind((name, 0x806))
s.settimeout(0.5)
for to in given["addresses"]:
    send(name, ALL, own, 0x806, arp(1, own, address, "00:00:00:00:00:00", to))
answered, end = set(), time.monotonic() + 2
while time.monotonic() < end:
    try:
        frame = s.recv(2048)
    except OSError:
        break
    if frame[20:22] == b"\0\2":
        answered.add(socket.inet_ntoa(frame[28:32]))
print(json.dumps({"own": address, "answered": sorted(answered)}))
