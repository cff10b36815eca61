# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

# PRIVATE to the collection: may change at any time.

"""One database with its owner: what is there, what has to be done, and SCRAM verifiers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
from dataclasses import dataclass

_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")
_VERIFIER = re.compile(
    r"SCRAM-SHA-256\$(?P<iterations>[0-9]{1,7}):(?P<salt>[A-Za-z0-9+/=]+)"
    r"\$(?P<stored>[A-Za-z0-9+/=]+):(?P<server>[A-Za-z0-9+/=]+)\Z"
)
ITERATIONS = 4096  # PostgreSQL's own default, which all clients handle quickly.


class PostgresqlError(Exception):
    """What is wrong, in one sentence, and what to do."""


def checked_identifier(value: str, option: str) -> str:
    if not _IDENTIFIER.match(value):
        raise PostgresqlError(
            f"{option} is {value!r}; use lower-case letters, digits and _, beginning with a letter"
            " or _, 63 at most."
        )
    return value


def checked_password(value: str) -> str:
    # For these characters, what SCRAM does to a password before hashing changes nothing.
    if not value or not all(" " <= character <= "~" for character in value):
        raise PostgresqlError(
            "password is empty or has characters other than printable ASCII; give one that is"
            " long and random."
        )
    return value


def verifier(password: str, salt: bytes, iterations: int = ITERATIONS) -> str:
    """What PostgreSQL stores instead of a password (RFC 5803's fields in PostgreSQL's form)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    client_key = hmac.new(salted, b"Client Key", "sha256").digest()
    server_key = hmac.new(salted, b"Server Key", "sha256").digest()
    salt64, stored64, server64 = (
        base64.b64encode(part).decode("ascii")
        for part in (salt, hashlib.sha256(client_key).digest(), server_key)
    )
    return f"SCRAM-SHA-256${iterations}:{salt64}${stored64}:{server64}"


def belongs(stored: str | None, password: str) -> bool:
    """Whether a stored verifier is that of the password. MD5 and no password are not."""
    match = _VERIFIER.match(stored or "")
    if not match:
        return False
    again = verifier(password, base64.b64decode(match["salt"]), int(match["iterations"]))
    return hmac.compare_digest(again, str(stored))


@dataclass(frozen=True)
class Found:
    """What the server has of the wanted."""

    role: bool = False
    verifier: str | None = None
    plain_role: bool = False  # may log in and nothing else
    database: bool = False
    owner: str | None = None
    public_may_connect: bool = True

    @classmethod
    def parse(cls, line: str) -> Found:
        return cls(**json.loads(line))


def question(database: str, owner: str) -> str:
    """SQL whose only line of output Found.parse takes. Both names are checked identifiers."""
    return f"""
SELECT json_build_object(
    'role', r.oid IS NOT NULL,
    'verifier', r.rolpassword,
    'plain_role', coalesce(r.rolcanlogin AND NOT (r.rolsuper OR r.rolcreaterole OR r.rolcreatedb
        OR r.rolreplication OR r.rolbypassrls), false),
    'database', d.oid IS NOT NULL,
    'owner', pg_get_userbyid(d.datdba),
    'public_may_connect', EXISTS (
        SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
        WHERE a.grantee = 0 AND a.privilege_type IN ('CONNECT', 'TEMPORARY')))
FROM (SELECT) one
LEFT JOIN pg_authid r ON r.rolname = '{owner}'
LEFT JOIN pg_database d ON d.datname = '{database}';
"""


# Statements are logged when they fail, or always where log_statement says so; verifiers should not.
QUIET = "SET log_statement = 'none'; SET log_min_error_statement = 'panic';\n"


def statements(found: Found, database: str, owner: str, password: str) -> list[tuple[str, str]]:
    """What is to be done, each as a phrase for people and its SQL."""
    steps = []
    login = "LOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS"
    if not found.role:
        steps.append((f"role {owner} is created", f"CREATE ROLE {owner} {login};"))
    elif not found.plain_role:
        steps.append((f"role {owner} may log in and no more", f"ALTER ROLE {owner} {login};"))
    if not belongs(found.verifier, password):
        fresh = verifier(password, os.urandom(16))
        steps.append((f"role {owner} gets its password", f"ALTER ROLE {owner} PASSWORD '{fresh}';"))
    if not found.database:
        # Not the host's locale, which may be none: then the database could hold ASCII only.
        steps.append(
            (
                f"database {database} is created",
                f"CREATE DATABASE {database} OWNER {owner} TEMPLATE template0 ENCODING 'UTF8'"
                " LC_COLLATE 'C.UTF-8' LC_CTYPE 'C.UTF-8';",
            )
        )
    elif found.owner != owner:
        steps.append(
            (
                f"database {database} belongs to {owner}",
                f"ALTER DATABASE {database} OWNER TO {owner};",
            )
        )
    if not found.database or found.public_may_connect:
        steps.append(
            (
                f"database {database} is closed to other roles",
                f"REVOKE ALL ON DATABASE {database} FROM PUBLIC;",
            )
        )
    return steps


def removal(found: Found, database: str, owner: str) -> list[tuple[str, str]]:
    steps = []
    if found.database:
        steps.append((f"database {database} is dropped", f"DROP DATABASE {database} WITH (FORCE);"))
    if found.role:
        steps.append((f"role {owner} is dropped", f"DROP ROLE {owner};"))
    return steps
