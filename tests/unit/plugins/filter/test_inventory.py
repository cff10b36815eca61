"""Filters for what an inventory says."""

from __future__ import annotations

import pytest
from ansible_collections.cellblock.fleet.plugins.filter.inventory import slave_problem

GROUPS = {
    "all": ["a", "b", "c"],
    "ungrouped": [],
    "worker_slaves": ["a", "b"],
    "databases": ["b", "c"],
    "rack1": ["b", "c"],
}


@pytest.mark.parametrize("host", ["a", "c"])
def test_slaves_alone_and_others_are_no_problem(host: str) -> None:
    assert slave_problem(GROUPS, host) == ""


def test_any_other_group_of_a_slave_is_named() -> None:
    problem = slave_problem(GROUPS, "b")
    assert problem.startswith("b: in the group worker_slaves and also in databases, rack1; ")
