#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: environment_archive
short_description: Builds archives of the root file systems that jobs run in
version_added: 0.1.0
description:
  - Builds each environment in O(definitions) for each architecture in O(architectures) with
    mmdebstrap, unless the cache holds it already. Meant to run on the controller, once for all
    hosts; M(cellblock.fleet.archive_tree) installs the archives.
  - An environment consists of Debian's essential packages and those of its definition, without
    recommended packages, documentation, translations, apt sources, host name, machine id,
    C(resolv.conf) and set-user-ID bits. It has the user and group C(job) (1000) and the empty
    directories C(/work), C(/tmp), C(/mnt), C(/proc) and C(/dev), over which the engine mounts.
  - An archive is kept as
    C(<cache_dir>/environments/<name>-<suite>-<architecture>-<digest>.tar.zst), where the digest
    covers the packages and the recipe. It is not rebuilt while these stay the same; O(rebuild)
    refreshes the packages.
  - An environment that cannot be built does not keep the others from being built. The task fails
    then, and returns both.
  - Builds run one at a time, also when several runs share a cache. Downloaded packages are kept in
    C(<cache_dir>/debs), which can be deleted at any time.
options:
  definitions:
    description:
      - Environments by name. Each has C(packages) (list of Debian packages, may be empty),
        C(description) and optionally C(path), the PATH with which programs start.
    type: dict
    required: true
  suite:
    description: Code name of the Debian release.
    type: str
    required: true
  architectures:
    description: Architectures as in C(ansible_facts['architecture']); V(x86_64) and V(aarch64) are
      supported.
    type: list
    elements: str
    required: true
  cache_dir:
    description: Directory on the controller for archives and downloaded packages. Created when it
      is missing.
    type: path
    required: true
  mirror:
    description:
      - URL of a Debian mirror.
      - By default that of this machine's own apt configuration, or else mmdebstrap's default.
    type: str
  security_mirror:
    description: URL of a mirror of Debian's security updates. By default like O(mirror), or none
      when O(mirror) is given.
    type: str
  archives_dir:
    description:
      - Directory on the controller with archives built elsewhere,
        C(<name>-<suite>-<architecture>.tar.zst) for each environment. Nothing is built then.
    type: path
  rebuild:
    description: Build again, with the packages that the mirror has now, even what the cache holds.
    type: bool
    default: false
requirements:
  - mmdebstrap, zstd and dpkg on the controller, unless O(archives_dir) is given or the cache holds
    everything
  - root on the controller, when something has to be built
  - for a foreign architecture, qemu-user-static on the controller
attributes:
  check_mode:
    description: Says what would be built. Digests of archives that do not exist yet are null.
    support: full
  diff_mode:
    description: Shows the archives before and after.
    support: full
  idempotent:
    description: Builds nothing that the cache holds, unless O(rebuild=true).
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: full
seealso:
  - module: cellblock.fleet.archive_tree
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Build two environments once for all hosts
  cellblock.fleet.environment_archive:
    definitions:
      base:
        description: POSIX shell and utilities
        packages: [bash]
      python:
        description: Python with its standard library
        packages: [python3]
    suite: bookworm
    architectures: [x86_64]
    cache_dir: /srv/cache/cellblock
  delegate_to: localhost
  run_once: true
  register: build
"""

RETURN = r"""
environments:
  description: One entry per environment and architecture.
  returned: success, and when some could not be built
  type: list
  elements: dict
  contains:
    name:
      description: Name of the environment.
      type: str
    suite:
      description: Code name of the Debian release.
      type: str
    architecture:
      description: Architecture as in C(ansible_facts['architecture']).
      type: str
    path:
      description: The archive on the controller.
      type: str
    sha256:
      description: Digest of the archive; null in check mode when it does not exist yet.
      type: str
    size_bytes:
      description: Size of the archive; null in check mode when it does not exist yet.
      type: int
    built:
      description: Whether it was built by this task.
      type: bool
    build_seconds:
      description: How long its build took; null for archives built elsewhere.
      type: float
    packages:
      description: Versions of the installed packages by name; empty for archives built elsewhere.
      type: dict
failures:
  description: One entry per environment and architecture that could not be built.
  returned: success, and when some could not be built
  type: list
  elements: dict
  contains:
    name:
      description: Name of the environment.
      type: str
    architecture:
      description: Architecture as in C(ansible_facts['architecture']).
      type: str
    message:
      description: Why, the last lines of a package that could not be installed among it.
      type: str
"""

from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils import _reader  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils._environments import (  # noqa: E402
    Archive,
    BuildError,
    Cache,
    CannotBuildError,
    DefinitionError,
    Record,
    apt_index_targets,
    plan_archives,
    prebuilt,
    sources,
)


def summary(records: list[Record]) -> dict[str, str]:
    def shown(record: Record, after: bool) -> str:
        if record.built and not after:
            return f"{record.path}: to be built\n"
        return f"{record.path}: sha256:{record.sha256 or 'not known before it is built'}\n"

    return {
        "before": "".join(shown(r, False) for r in records),
        "after": "".join(shown(r, True) for r in records),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "definitions": {"type": "dict", "required": True},
            "suite": {"type": "str", "required": True},
            "architectures": {"type": "list", "elements": "str", "required": True},
            "cache_dir": {"type": "path", "required": True},
            "mirror": {"type": "str"},
            "security_mirror": {"type": "str"},
            "archives_dir": {"type": "path"},
            "rebuild": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    params = module.params
    # A build takes minutes, and the next run waits for its end.
    _reader.when_unread(_reader.end_process_group)
    cache = Cache(
        Path(params["cache_dir"]),
        lambda suite: sources(
            suite, params["mirror"], params["security_mirror"], apt_index_targets()
        ),
    )

    def record(archive: Archive) -> Record:
        if params["archives_dir"]:
            return prebuilt(archive, Path(params["archives_dir"]))
        found = None if params["rebuild"] else cache.find(archive)
        if found is not None:
            return found
        if module.check_mode:
            return cache.predict(archive)
        return cache.build(archive, params["rebuild"])

    records: list[Record] = []
    failures: list[dict[str, str]] = []
    try:
        for archive in plan_archives(
            params["definitions"], params["suite"], params["architectures"]
        ):
            try:
                records.append(record(archive))
            except CannotBuildError:
                raise
            except BuildError as error:
                failures.append(
                    {
                        "name": archive.definition.name,
                        "architecture": archive.architecture,
                        "message": str(error),
                    }
                )
    except (DefinitionError, CannotBuildError) as error:
        module.fail_json(msg=str(error))
    result = {
        "changed": any(record.built for record in records),
        "environments": [record.as_result() for record in records],
        "failures": failures,
        "diff": summary(records),
    }
    if failures:
        module.fail_json(msg="\n".join(failure["message"] for failure in failures), **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
