"""Names of variables in an inventory that nothing reads: typing errors, and names of earlier releases."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

# Ours alone, so whatever else begins so is a mistake.
PREFIX = "cellblock_"
# What inventories may say beside the variables of roles.
FLEET_VARIABLES = (
    "cellblock_addresses",
    "cellblock_cache_dir",
    "cellblock_external_targets",
    "cellblock_fleet",
    "cellblock_flows",
    "cellblock_job_flows",
    "cellblock_job_ipv6_prefix",
    "cellblock_job_range",
    "cellblock_job_range_number",
    "cellblock_job_range_prefix_length",
    "cellblock_more_flows",
    "cellblock_networks",
    "cellblock_services",
)
# Names that are wrong for certain, with the right one.
RENAMED = {
    "ansible_hosts": "ansible_host",
    "macvlan_fleet": "job_network_fleet",
    "macvlan_gateway": "job_network_gateway",
    "macvlan_interface": "job_network_interface",
    "macvlan_mode": "job_network_mode",
    "macvlan_parent": "job_network_parent",
    "macvlan_rollback_after_s": "job_network_rollback_after_s",
    "macvlan_slots": "job_network_slots",
    "worker_slave_slots": "worker_slave_parallel_jobs",
}
# Of a role's variables only names this near to a known one are taken for mistakes: `database_` and the like
# are prefixes of other people's roles as well.
LIKENESS = 0.85


def variable_problems(
    variables: Mapping[str, Iterable[str]],
    role_variables: Collection[str],
    role_prefixes: Collection[str],
) -> list[str]:
    """A sentence for each name that nothing reads.

    ``variables``: {host: names of its variables}; ``role_variables``: those that roles document;
    ``role_prefixes``: what roles' variables begin with (``firewall_``).
    """
    known = {*FLEET_VARIABLES, *role_variables}
    hosts: dict[str, list[str]] = {}
    for host, names in variables.items():
        for name in set(names) - known:
            hosts.setdefault(name, []).append(host)
    problems = []
    for name, affected in sorted(hosts.items()):
        where = f"{affected[0]}{f' and {len(affected) - 1} more' if len(affected) > 1 else ''}"
        if name in RENAMED:
            problems.append(f"{where}: {name} is not read; write {RENAMED[name]}")
        elif name.startswith(PREFIX):
            near = get_close_matches(name, FLEET_VARIABLES, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(FLEET_VARIABLES)}"
            problems.append(f"{where}: {name} is unknown; {hint}")
        elif name.startswith(tuple(role_prefixes)) and (
            near := get_close_matches(name, role_variables, n=1, cutoff=LIKENESS)
        ):
            problems.append(f"{where}: {name} is unknown; did you mean {near[0]}?")
    return problems
