"""Fingerprints of keys, compared with what gpg says of a key that it makes here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cellblock.fleet.plugins.filter.openpgp import openpgp_fingerprints

GPG = shutil.which("gpg")


@pytest.fixture
def gpg(tmp_path: Path) -> object:
    if GPG is None:
        pytest.skip("no gpg on this machine")
    home = tmp_path / "gpg"
    home.mkdir(mode=0o700)

    def run(*arguments: str) -> str:
        command = [str(GPG), "--homedir", str(home), "--batch", "--quiet", *arguments]
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    yield run
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)


@pytest.mark.parametrize("algorithm", ["rsa2048", "ed25519"])
def test_the_fingerprint_is_gpgs(gpg: object, algorithm: str) -> None:
    assert callable(gpg)
    gpg("--passphrase", "", "--quick-generate-key", "someone", algorithm, "default", "never")
    told = gpg("--with-colons", "--list-keys")
    first = next(line for line in told.splitlines() if line.startswith("fpr"))
    assert openpgp_fingerprints(gpg("--armor", "--export")) == [first.split(":")[9]]


def test_a_file_without_keys() -> None:
    assert openpgp_fingerprints("<html>not found</html>") == []


def test_a_damaged_key() -> None:
    block = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n-----END PGP PUBLIC KEY BLOCK-----\n"
    with pytest.raises(AnsibleFilterError, match="no packet"):
        openpgp_fingerprints(block)
