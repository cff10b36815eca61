"""An upstream resolver for test_resolver.py: answers below names.example itself, relays the rest.

Runs on the cache server's loopback, with the address of the resolver to relay to.
"""

from __future__ import annotations

import socket
import struct
import sys

A, CNAME, AAAA = 1, 5, 28
ANSWERS: dict[tuple[str, int], list[str]] = {
    ("public", A): ["192.0.2.80"],
    ("public", AAAA): ["2600::80"],
    ("alias", CNAME): ["public"],
    ("private", A): ["10.0.0.5"],
    ("private", AAAA): ["fd00::5"],
    ("private172", A): ["172.16.0.5"],
    ("private192", A): ["192.168.0.5"],
    ("shared", A): ["100.64.0.5"],
    ("metadata", A): ["169.254.169.254"],
    ("loopback", A): ["127.0.0.1"],
    ("zero", A): ["0.0.0.0"],
    ("mixed", A): ["192.0.2.80", "10.0.0.5"],
    ("alias-private", CNAME): ["private"],
    ("linklocal", AAAA): ["fe80::5"],
    ("mapped", AAAA): ["::ffff:10.0.0.5"],
    ("sixtofour", AAAA): ["2002:a00:5::1"],
}


def encode(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


def records(label: str, kind: int) -> bytes:
    """The answer section for LABEL.names.example, with the CNAMEs on the way."""
    section = b""
    while (label, CNAME) in ANSWERS:
        target = ANSWERS[label, CNAME][0]
        data = encode(f"{target}.names.example")
        section += encode(f"{label}.names.example") + struct.pack("!2HIH", CNAME, 1, 60, len(data))
        section += data
        label = target
    if label.startswith("fleet-") and kind == A:
        addresses = [label.removeprefix("fleet-").replace("-", ".")]
    else:
        addresses = ANSWERS.get((label, kind), [])
    for address in addresses:
        data = socket.inet_pton(socket.AF_INET if kind == A else socket.AF_INET6, address)
        section += encode(f"{label}.names.example") + struct.pack("!2HIH", kind, 1, 60, len(data))
        section += data
    return section


def count(section: bytes) -> int:
    """How many records there are in it."""
    number = at = 0
    while at < len(section):
        while section[at]:
            at += 1 + section[at]
        at += 11 + struct.unpack("!H", section[at + 9 : at + 11])[0]
        number += 1
    return number


def answer(query: bytes, upstream: str) -> bytes:
    at, parts = 12, []
    while query[at]:
        parts.append(query[at + 1 : at + 1 + query[at]].decode("latin-1").lower())
        at += 1 + query[at]
    question = query[12 : at + 5]
    if parts[-2:] != ["names", "example"]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
            relay.settimeout(3)
            relay.sendto(query, (upstream, 53))
            return relay.recv(4096)
    section = records(".".join(parts[:-2]), struct.unpack("!H", question[-4:-2])[0])
    header = query[:2] + struct.pack("!5H", 0x8180, 1, count(section), 0, 0)
    return header + question + section


def main() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 5300))
        while True:
            query, client = server.recvfrom(4096)
            try:
                server.sendto(answer(query, sys.argv[1]), client)
            except (OSError, IndexError, struct.error) as problem:
                print(f"not answered: {problem}", flush=True)


if __name__ == "__main__":
    main()
