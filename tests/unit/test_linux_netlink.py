"""Messages of the kernel, and the clients of systemd."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from cellblock.linux import journal, sd_notify
from cellblock.linux.netlink_messages import attribute, attributes, message, messages
from cellblock.linux.nft_monitor import Generation, NftMonitor, _generation

PREFIX = bytes(4)  # family, version, resource
NFT = 10 << 8
NEWGEN = 15


def test_messages_and_attributes_come_back() -> None:
    data = message(20, 0, 7, attribute(1, b"ab")) + message(3, 0, 8, b"")
    assert [(m.kind, m.sequence) for m in messages(data)] == [(20, 7), (3, 8)]
    body = next(messages(data)).body
    assert attributes(body + attribute(2 | 0x8000, b"abcd")) == {1: b"ab", 2: b"abcd"}


def test_what_is_cut_off_or_senseless_is_no_reason_to_fail() -> None:
    data = message(20, 0, 7, attribute(1, b"ab"))
    assert list(messages(data[:-3])) == []
    assert list(messages(struct.pack("=IHHII", 3, 1, 0, 0, 0))) == []
    assert attributes(b"\xff\xff\x02\x00") == attributes(b"\x00\x00\x02\x00") == {}


def notice(kind: int, *parts: bytes) -> bytes:
    return message(NFT | kind, 0, 0, PREFIX + b"".join(parts))


def test_a_transaction_says_whose_it_was() -> None:
    by = [
        attribute(1, struct.pack(">I", 5)),
        attribute(2, struct.pack(">I", 42)),
        attribute(3, b"nft\0"),
    ]
    [found] = messages(notice(NEWGEN, *by))
    assert _generation(found) == Generation(5, "nft[42]")
    [found] = messages(notice(NEWGEN))
    assert _generation(found) == Generation(0, "")


def test_notices_about_our_table_and_others() -> None:
    monitor = NftMonitor("cellblock")
    by = attribute(2, struct.pack(">I", 42)) + attribute(3, b"nft\0")
    ours, others = (attribute(1, name + b"\0") for name in (b"cellblock", b"cellblock_jobs"))
    assert monitor._take(notice(2, ours) + notice(NEWGEN, by))
    assert monitor.take_author() == "nft[42]"
    assert monitor.take_author() == ""
    assert not monitor._take(notice(2, others) + notice(NEWGEN, by))
    # Of another subsystem: connection tracking.
    assert not monitor._take(message(1 << 8 | 2, 0, 0, PREFIX + ours))


def listening(path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.settimeout(2)
    return sock


def test_an_event_cannot_start_a_field_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_SOCKET", str(tmp_path / "journal"))
    with listening(tmp_path / "journal", monkeypatch) as sock:
        journal.send("words", identifier="x", priority=journal.WARNING, event="e", rule="a\nB=c")
        data = sock.recv(1000)
    assert b"CELLBLOCK_RULE\n" + struct.pack("<Q", 5) + b"a\nB=c\n" in data
    assert b"SYSLOG_IDENTIFIER\n" + struct.pack("<Q", 1) + b"x\n" in data
    assert b"PRIORITY\n" + struct.pack("<Q", 1) + b"4\n" in data


def test_without_a_journal_the_event_is_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "_SOCKET", str(tmp_path / "none"))
    journal.send("words", event="e")
    assert capsys.readouterr().err == "words\n"


def test_systemd_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(tmp_path / "notify", monkeypatch) as sock:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        sd_notify.notify("READY=1")
        assert sock.recv(100) == b"READY=1"
    # Nobody reads any more, or ever did.
    sd_notify.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    sd_notify.notify("READY=1")
