"""Filter that tells which keys a file of OpenPGP keys has."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from ansible.errors import AnsibleFilterError

_ARMOUR = re.compile(
    r"-----BEGIN PGP PUBLIC KEY BLOCK-----\n(?:[A-Za-z]+: .*\n)*\s*\n(.*?)\n(?:=.{4}\n)?"
    r"-----END PGP PUBLIC KEY BLOCK-----",
    re.DOTALL,
)
_PUBLIC_KEY = 6


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The packets (RFC 9580, section 4.2), as (type, body)."""
    while data:
        header = data[0]
        if not header & 0x80:
            raise ValueError("no packet")
        if header & 0x40:
            kind, first = header & 0x3F, data[1]
            if first < 192:
                start, length = 2, first
            elif first < 224:
                start, length = 3, ((first - 192) << 8) + data[2] + 192
            elif first == 255:
                start, length = 6, int.from_bytes(data[2:6], "big")
            else:
                raise ValueError("a packet of unknown length")
        else:
            kind, size = (header >> 2) & 0x0F, header & 3
            if size == 3:
                raise ValueError("a packet of unknown length")
            start = 1 + (1 << size)
            length = int.from_bytes(data[1:start], "big")
        if len(data) < start + length:
            raise ValueError("a packet that ends too early")
        yield kind, data[start : start + length]
        data = data[start + length :]


def openpgp_fingerprints(text: str) -> list[str]:
    """The fingerprints of the primary keys in an armoured file, in the order in which they are there."""
    found = []
    for block in _ARMOUR.findall(text.replace("\r\n", "\n")):
        try:
            for kind, body in _packets(base64.b64decode(re.sub(r"\s", "", block), validate=True)):
                if kind != _PUBLIC_KEY:
                    continue
                if body[0] != 4:
                    raise ValueError(f"a key of version {body[0]}")
                hashed = b"\x99" + len(body).to_bytes(2, "big") + body
                # What version 4 prescribes; nobody's choice here.
                found.append(hashlib.sha1(hashed, usedforsecurity=False).hexdigest().upper())
        except (ValueError, IndexError, binascii.Error) as problem:
            raise AnsibleFilterError(
                f"cellblock.fleet.openpgp_fingerprints: the file has {problem}; get it again."
            ) from None
    return found


class FilterModule:
    """Entry point for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"openpgp_fingerprints": openpgp_fingerprints}
