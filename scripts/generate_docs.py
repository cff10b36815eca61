"""Writes the documents that are made from the limits (src/cellblock/engine/limits.py) and the flows.

With --check nothing is written: the exit status is 1 when a document is stale.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import yaml  # noqa: E402

from cellblock.engine.limits import LIMITS, LimitInfo  # noqa: E402
from cellblock.units import format_bytes  # noqa: E402

FLOWS = ROOT / "inventory" / "local" / "group_vars" / "all" / "flows.yml"

LIMITS_HEAD = """\
# Limits

<!-- Made by `make docs` from src/cellblock/engine/limits.py; edit that. -->

Every stage has all of these limits. An integer is in the unit of the name; text must name its unit:
`B kB MB GB KiB MiB GiB`, `ms s min`. A host's maxima can be changed with `worker_slave_maxima`; a job
that asks for more is refused before it starts, with each field and its maximum, and a default above its
maximum follows it. The record of a stage has the limits as they were applied.

| limit | unit | default | minimum | maximum | enforced by | evidence of a violation |
|---|---|---|---|---|---|---|
"""

LIMITS_TAIL = """\

## What they mean

{meanings}
## Scratch counts as memory

`/work` and `/tmp` are one tmpfs. What is in it occupies memory of the stage that wrote it, so a job may
not ask for more `scratch_bytes` than `memory_bytes`; one that asks for less memory than the default
scratch and says nothing of scratch gets as much scratch as memory. A program that fills its memory limit by writing
files is ended by the OOM killer and the violation is `memory_bytes`; one that fills `scratch_bytes`
first sees ENOSPC.

## Network

The policy is the stage's `network`: `none`, `cache`, `internet` or `allow`; [jobs](jobs.md#network) has
what each reaches. A host without job networks enforces `none` only and refuses the others; it is never
silently weaker. With `none` the jail has a network namespace of its own with nothing but a loopback
interface, and the network limits have nothing to act on.

A stage with another policy has a network slot to itself: a namespace that the host made, with one
interface, an address of its own and the filter that enforces the policy and these limits. The job has no power
over it: its user namespace owns neither the interface nor the rules.

- Bytes are those of IP packets, as the filter sees them. Segments that the kernel handles as one packet
  count with one header, so that a bulk transfer counts about as much as its payload.
- `network_bytes_per_second` is a token bucket of one second: after a pause, one second's worth may pass at
  once. From then on, TCP and UDP in both directions were seen within 3 % of it. What it drops on the way in
  has used the host's uplink, and costs no quota.
- `network_connections` refuses and does not end the stage, whose verdict is `limit_exceeded` all the same.
- A connection that is beyond it, or that the policy forbids, is refused at once, of TCP over IPv6 after a second (the
  program sees EHOSTUNREACH or EPERM). One that was closed milliseconds ago may still count.
"""

FLOWS_HEAD = """\
# Flows

<!-- Made by `make docs` from inventory/local/group_vars/all/flows.yml; edit that. -->

Who may open connections to whom. What is not in this table is denied, on IPv4 and IPv6. The firewall
rules of every host and the matrix that `playbooks/verify-isolation.yml` expects are derived from the same
file.

| from | to | services | why |
|---|---|---|---|
"""

FRAGMENT = '''\
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0
# Made by `make docs` from src/cellblock/engine/limits.py; edit that.

"""The limits of a stage, for the documentation of modules that take jobs."""

from __future__ import annotations


class ModuleDocFragment:
    """Notes with one entry per limit."""

    DOCUMENTATION = r"""
options: {{}}
notes:
  - The limits of a stage, in its C(constraints), are these; maxima are the defaults of a host.
{notes}
"""
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    check = parser.parse_args().check
    stale = [path for path, make in DOCUMENTS.items() if _read(path) != make()]
    for path in stale:
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is stale; run: make docs", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(DOCUMENTS[path]())
            print(f"wrote {name}")
    return 1 if check and stale else 0


def limits_page() -> str:
    """docs/limits.md."""
    rows = "".join(
        f"| `{name}` | {info.unit} | {_amount(name, info.default)} "
        f"| {_amount(name, info.minimum)} | {_amount(name, info.maximum)} "
        f"| {info.enforced_by} | {info.evidence} |\n"
        for name, info in LIMITS.items()
    )
    meanings = "".join(f"- `{name}`: {info.help}\n" for name, info in LIMITS.items())
    return LIMITS_HEAD + rows + LIMITS_TAIL.format(meanings=meanings)


def flows_page() -> str:
    """docs/flows.md."""
    declared = yaml.safe_load(FLOWS.read_text())
    services = declared["cellblock_services"]

    def named(names: list[str]) -> str:
        return ", ".join(f"{name} ({_port(services[name])})" for name in names)

    rows = "".join(
        f"| {_peer(flow['from'])} | {_peer(flow['to'])} | {named(flow['services'])} "
        f"| {flow['purpose']} |\n"
        for flow in declared["cellblock_flows"]
    )
    jobs = "".join(
        f"| `{policy}` | {_peer(flow['to'])} | {named(flow['services'])} |\n"
        for policy, flows in declared["cellblock_job_flows"].items()
        for flow in flows or [{"to": "nothing", "services": []}]
    )
    return (
        f"{FLOWS_HEAD}{rows}\n`fleet` is every host of the fleet, `internet` every address that is neither"
        " private, link-local or otherwise\nspecial nor the fleet's. `controllers`, `time_servers` and"
        " `dns_upstreams` are addresses that the inventory\nnames in `cellblock_networks`.\n\n"
        "## Jobs, by network policy\n\nNothing of the fleet but these services can be named here.\n\n"
        f"| policy | to | services |\n|---|---|---|\n{jobs}"
    )


def _peer(name: str) -> str:
    return name.replace("_", " ")


def _port(service: dict[str, object]) -> str:
    return " ".join(str(service[key]) for key in ("protocol", "port") if key in service)


def fragment() -> str:
    """The documentation fragment of the collection."""
    return FRAGMENT.format(notes="\n".join(_note(name, info) for name, info in LIMITS.items()))


def _note(name: str, info: LimitInfo) -> str:
    text = (
        f"C({name}) in {info.unit}, default {info.default}, maximum {info.maximum}. {info.help} "
        f"Enforced by {info.enforced_by}."
    )
    text = text.replace(": ", " - ")
    return textwrap.fill(
        text, 98, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
    )


def _amount(name: str, value: float) -> str:
    if name.endswith(("_bytes", "_bytes_per_second")) and value >= 1024:
        return format_bytes(int(value)).replace(".0 ", " ")
    return f"{value:g}"


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


DOCUMENTS: dict[Path, Callable[[], str]] = {
    ROOT / "docs" / "limits.md": limits_page,
    ROOT / "docs" / "flows.md": flows_page,
    ROOT / "plugins" / "doc_fragments" / "stage_constraints.py": fragment,
}

if __name__ == "__main__":
    sys.exit(main())
