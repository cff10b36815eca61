"""The closure's program: what it makes of its counters. That they count is for molecule/fleet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles" / "local_fleet" / "files" / "closure.py"

# Answers `nft --json list counters table FAMILY TABLE` with the file FAMILY.
NFT = """#!/bin/sh
[ "$*" = "--json list counters table $5 cellblock_x" ] && exec cat "$(dirname "$0")/$5"
exit 1
"""


def counters(**packets: int) -> str:
    listed = [{"counter": {"name": name, "packets": count}} for name, count in packets.items()]
    return json.dumps({"nftables": [{"metainfo": {"version": "x"}}, *listed]})


def left(tmp_path: Path, **families: str) -> subprocess.CompletedProcess[str]:
    nft = tmp_path / "nft"
    nft.write_text(NFT)
    nft.chmod(0o755)
    for family, text in families.items():
        (tmp_path / family).write_text(text)
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--left", "cellblock_x"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("inet", "netdev", "says"),
    [
        ({"left_the_machine": 0, "packages_out": 7}, {"left_by_uplink": 0}, ""),
        # A machine without a default route has no second table.
        ({"left_the_machine": 0}, None, ""),
        ({"left_the_machine": 3}, {"left_by_uplink": 0}, "left_the_machine: 3 packets\n"),
        ({"left_the_machine": 0}, {"left_by_uplink": 1}, "left_by_uplink: 1 packets\n"),
        (
            {"left_the_machine": 3},
            {"left_by_uplink": 2},
            "left_the_machine: 3 packets\nleft_by_uplink: 2 packets\n",
        ),
    ],
)
def test_what_left(
    tmp_path: Path, inet: dict[str, int], netdev: dict[str, int] | None, says: str
) -> None:
    families = {"inet": counters(**inet)}
    if netdev is not None:
        families["netdev"] = counters(**netdev)
    done = left(tmp_path, **families)
    assert (done.returncode, done.stdout) == (0, says), done.stderr


@pytest.mark.parametrize("families", [{}, {"inet": counters(packages_out=7)}])
def test_no_counter_is_no_proof(tmp_path: Path, families: dict[str, str]) -> None:
    done = left(tmp_path, **families)
    assert done.returncode == 1
    assert done.stderr == (
        "closure: there is no table cellblock_x with a counter left_the_machine or left_by_uplink\n"
    )
