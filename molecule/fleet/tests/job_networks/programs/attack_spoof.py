"""Claims other addresses, in packets and in frames, to every target."""

import json
import socket

from frames import ALL, arp, given, own_address, own_mac, send, udp4

mark = given["mark"].encode()
name, own, address = "job0", own_mac("job0"), own_address("job0")
claims = [claim for claim in given["claims"] if claim[0] != address]
sent = []
for to, ether in given["targets"]:
    for source, other in claims:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        try:
            raw.sendto(udp4(source, to, 53, mark), (to, 0))
            sent.append(0)
        except OSError as problem:
            sent.append(problem.errno or -1)
        for ip, hardware in ((source, own), (source, other), (address, other)):
            sent.append(send(name, ether, hardware, 0x800, udp4(ip, to, 53, mark)))
for source, other in claims:
    # "That address is here": announced and as an answer.
    for kind in (1, 2):
        for inner in (own, other):
            sent.append(send(name, ALL, own, 0x806, arp(kind, inner, source, ALL, source, mark)))
    sent.append(send(name, ALL, other, 0x806, arp(2, other, source, ALL, source, mark)))
# The control: the same frame, of one's own, to who may be asked.
to, ether = given["honest"]
honest = send(name, ether, own, 0x800, udp4(address, to, 53, given["control"].encode()))
print(json.dumps({"sent": sent, "honest": honest}))
