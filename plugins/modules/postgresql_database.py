#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: postgresql_database
short_description: A PostgreSQL database with the role that owns it
version_added: 0.1.0
description:
  - Ensures that a database and its owner exist on the host's PostgreSQL server, that the owner may
    log in with the password and has no privilege beside that, and that no other role may connect.
  - Asks the server over its unix socket, as the user C(postgres) with psql.
  - The password never reaches the server, a command line or a log. What is stored, a SCRAM-SHA-256
    verifier, is computed here and goes to psql's standard input. A stored verifier is checked
    against the password here, so nothing has to log in to find out whether it is right.
options:
  name:
    description: The database; lower-case letters, digits and C(_).
    type: str
    required: true
  owner:
    description: The role that owns it; lower-case letters, digits and C(_).
    type: str
    required: true
  password:
    description: The owner's password, printable ASCII. Required with O(state=present).
    type: str
  port:
    description: The server's port, which is part of the socket's name.
    type: int
    default: 5432
  state:
    description: V(absent) drops both, with all that the database contains, and ends connections
      to it.
    type: str
    choices: [present, absent]
    default: present
requirements:
  - Python 3.10 or newer on the host
  - psql and runuser on the host; PostgreSQL 13 or newer
attributes:
  check_mode:
    description: Can run in check mode and predict changes, also on a host without PostgreSQL.
    support: full
  diff_mode:
    description: Shows in words what is done.
    support: full
  idempotent:
    description: A second run changes nothing.
    support: full
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: The database of the contest
  cellblock.fleet.postgresql_database:
    name: contest
    owner: contest
    password: "{{ vault_contest_password }}"
"""

RETURN = r"""
done:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: ["role contest is created", "role contest gets its password"]
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._postgresql import (  # noqa: E402
    QUIET,
    Found,
    PostgresqlError,
    checked_identifier,
    checked_password,
    question,
    removal,
    statements,
)


def psql(module: AnsibleModule, sql: str) -> str:
    # Nothing from the caller's environment may lead psql to another server.
    command = ["runuser", "-u", "postgres", "--", "env", "--ignore-environment", "LC_ALL=C"]
    command += ["PATH=/usr/bin:/bin", "psql", "--no-psqlrc", "--quiet", "--no-align"]
    command += ["--tuples-only", "--set=ON_ERROR_STOP=1", f"--port={module.params['port']}"]
    command += ["--dbname=postgres", "--file=-"]
    try:
        code, output, errors = module.run_command(
            command, data=QUIET + sql, cwd="/", handle_exceptions=False
        )
    except OSError as error:
        # It ended before it read anything: there is no such program or user.
        code, output, errors = 1, "", f"{command[0]}, psql or the user postgres: {error.strerror}"
    if code != 0:
        last = (errors.strip() or "no message").splitlines()[0]
        raise PostgresqlError(
            f"psql could not do its work on port {module.params['port']} ({last}); look at"
            " 'pg_lsclusters' and 'journalctl -u postgresql@*' on the host."
        )
    return str(output)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "owner": {"type": "str", "required": True},
            "password": {"type": "str", "no_log": True},
            "port": {"type": "int", "default": 5432},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ["password"])],
        supports_check_mode=True,
    )
    try:
        database = checked_identifier(module.params["name"], "name")
        owner = checked_identifier(module.params["owner"], "owner")
        present = module.params["state"] == "present"
        password = checked_password(module.params["password"]) if present else ""
        try:
            found = Found.parse(psql(module, question(database, owner)))
        except PostgresqlError:
            if not module.check_mode:
                raise
            # A server that is not there yet has nothing; one that is gone needs no removal.
            found = Found()
        todo = (
            statements(found, database, owner, password)
            if present
            else removal(found, database, owner)
        )
        if todo and not module.check_mode:
            psql(module, "\n".join(sql for _, sql in todo))
    except PostgresqlError as error:
        module.fail_json(msg=str(error))
    done = [phrase for phrase, _ in todo]
    diff = {"before": "", "after": "".join(f"{phrase}\n" for phrase in done)}
    module.exit_json(changed=bool(done), done=done, diff=diff)


if __name__ == "__main__":
    main()
