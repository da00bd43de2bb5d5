"""Shard groups outlive the coordinator that formed them."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from potluck_coordinator.domain.grouping.plan import plan_groups
from potluck_coordinator.domain.grouping.words import Blame, GroupPhase
from tests.support.books import open_books
from tests.support.grouping import GROUP, measured, need, node, rooms


def formed_groups():
    views = measured(node(1), node(2))
    numbers = count(7)
    return plan_groups([need()], views, rooms(views), {}, next_generation=lambda: next(numbers), now=5.0).groups


def test_groups_are_found_as_they_were_left(database_url):
    groups = formed_groups()
    broken = replace(groups[GROUP], phase=GroupPhase.BROKEN, reason="member n2 is lost", lost_node_id="n2", blame=Blame.NODE_GONE)
    with open_books(database_url) as books:
        assert books.run_now(lambda work: work.groups.all()) == {}
        books.run_now(lambda work: work.groups.keep(groups))
        assert books.run_now(lambda work: work.groups.all()) == groups
        books.run_now(lambda work: work.groups.keep({GROUP: broken}))
        assert books.run_now(lambda work: work.groups.all()) == {GROUP: broken}
        books.run_now(lambda work: work.groups.keep({}))
        assert books.run_now(lambda work: work.groups.all()) == {}
