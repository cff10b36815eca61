"""What the programs in slots and on hosts have in common to make frames; sent along with them."""

import fcntl
import json
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

given: dict[str, Any] = json.loads(sys.argv[1])

ALL = "ff:ff:ff:ff:ff:ff"


def total(data: bytes) -> int:
    """The internet's checksum."""
    data += b"\0" * (len(data) % 2)
    n: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while n >> 16:
        n = (n & 65535) + (n >> 16)
    return ~n & 65535


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def own_mac(name: str) -> str:
    got = fcntl.ioctl(socket.socket(), 0x8927, struct.pack("16s24x", name.encode()))
    return got[18:24].hex(":")


def own_address(name: str) -> str:
    got = fcntl.ioctl(socket.socket(), 0x8915, struct.pack("16s24x", name.encode()))
    return socket.inet_ntoa(got[20:24])


def udp4(source: str, to: str, port: int, body: bytes) -> bytes:
    udp = struct.pack("!4H", 40000, port, 8 + len(body), 0) + body
    head = struct.pack(
        *("!BBHHHBBH4s4s", 69, 0, 20 + len(udp), 7, 0, 64, 17, 0),
        *(socket.inet_aton(source), socket.inet_aton(to)),
    )
    return head[:10] + struct.pack("!H", total(head)) + head[12:] + udp


def icmp6(source: str, to: str, kind: int, body: bytes, hops: int = 255) -> bytes:
    a, b = (socket.inet_pton(socket.AF_INET6, x) for x in (source, to))
    bare = struct.pack("!BBH", kind, 0, 0) + body
    check = total(a + b + struct.pack("!IxxxB", len(bare), 58) + bare)
    bare = bare[:2] + struct.pack("!H", check) + bare[4:]
    return struct.pack("!IHBB", 6 << 28, len(bare), 58, hops) + a + b + bare


def arp(kind: int, mac1: str, ip1: str, mac2: str, ip2: str, body: bytes = b"") -> bytes:
    return (
        struct.pack("!HHBBH", 1, 0x800, 6, 4, kind)
        + (mac(mac1) + socket.inet_aton(ip1))
        + (mac(mac2) + socket.inet_aton(ip2) + body)
    )


def send(name: str, to: str, source: str, kind: int, body: bytes) -> int:
    """0: it left this machine's stack; else the error with which it did not."""
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.bind((name, 0))
    try:
        s.send(mac(via(name, to)) + mac(source) + struct.pack("!H", kind) + body)
    except OSError as problem:
        return problem.errno or -1
    return 0


def via(name: str, ether: str) -> str:
    """Where a frame for ``ether`` has to go: where the slave routes for its jobs, what is not sent to
    it is for nobody there."""
    if not given.get("allowed") or int(ether[:2], 16) & 1:
        return ether
    for _ in range(20):
        lines = Path("/proc/net/arp").read_text().splitlines()[1:]
        for _, _, flags, hardware, _, device in map(str.split, lines):
            if device == name and flags == "0x2":
                return hardware
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (given["allowed"], 53))
        time.sleep(0.1)
    raise SystemExit("the slave's end is not known")
