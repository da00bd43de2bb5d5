"""A group that nobody uses gives its nodes up for a wish that found no other room, and by no other rules than replicas do."""

from __future__ import annotations

from dataclasses import replace

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.words import IDLE_SECONDS
from tests.support.planning import wish
from tests.unit.test_planning_groups import Pool

GROUP = "group/70b/0"
FLEX, DEFAULT = ServiceTier.FLEX, ServiceTier.DEFAULT


def with_a_group(tier=FLEX, names=("a", "b")):
    """Two machines with a card each, which serve the large model together and have been at rest for a while."""
    pool = Pool(wish("70b", 1, tier), names=names).step().obey().step()
    assert pool.planner.groups[GROUP].phase is GroupPhase.READY
    return pool.step(IDLE_SECONDS + 1)


def later(pool, *deployments, beats=40, **said):
    """The pool after it was wished so, told so, and left alone for some beats."""
    pool.deployments = (*pool.deployments, *deployments)
    for _ in range(beats):
        pool.waiting_counts, pool.attempt_counts = said.get("waiting", {}), said.get("answering", {})
        pool.obey().step(2.0)
    return pool


def stands(pool):
    return pool.planner.groups.get(GROUP) is not None and pool.planner.groups[GROUP].phase is GroupPhase.READY


def test_a_default_wish_has_the_nodes_of_an_idle_flex_group():
    pool = later(with_a_group(), wish("8b", 2, DEFAULT))
    assert pool.wished() == {"a": ["8b"], "b": ["8b"]}
    assert pool.standing("8b").ready_count == 2


def test_of_a_pool_with_room_elsewhere_the_group_keeps_its_nodes():
    pool = with_a_group(names=("a", "b", "c"))
    assert stands(later(pool, wish("8b", 1, DEFAULT)))
    assert sorted(engine for engines in pool.wished().values() for engine in engines) == ["70b", "70b", "8b"]


def test_a_flex_wish_takes_nothing_of_a_default_group():
    assert stands(later(with_a_group(DEFAULT), wish("8b", 1, FLEX), waiting={"8b": 5}))


def test_a_wish_of_the_same_tier_takes_it_only_while_requests_wait_for_it():
    pool = later(with_a_group(), wish("8b", 1, FLEX))
    assert stands(pool), "the group's model would be met worse than the wish is now"
    later(pool, waiting={"8b": 1})
    assert "8b" in [engine for engines in pool.wished().values() for engine in engines]


def test_a_group_that_answers_or_answered_lately_or_is_waited_for_stays():
    assert stands(later(with_a_group(), wish("8b", 2, DEFAULT), answering={GROUP: 1}))
    pool = later(with_a_group(), wish("8b", 2, DEFAULT), beats=1, answering={GROUP: 1})
    assert stands(later(pool, beats=int(IDLE_SECONDS / 2) - 5))
    assert stands(later(with_a_group(), wish("8b", 2, DEFAULT), waiting={"70b": 1}))


def test_one_that_no_node_of_the_group_could_hold_the_wish_of_stays():
    pool = with_a_group()
    pool.entries["8b"] = replace(pool.entries["8b"], engine_kinds=("sglang",))
    assert stands(later(pool, wish("8b", 2, DEFAULT)))


def test_once_the_wish_is_gone_the_group_comes_back():
    pool = later(with_a_group(), wish("8b", 2, DEFAULT))
    assert not stands(pool)
    pool.deployments = pool.deployments[:1]
    assert stands(later(pool))


def test_the_same_facts_at_the_same_time_lead_to_the_same_plan_while_a_group_leaves():
    pool = later(with_a_group(), wish("8b", 2, DEFAULT), beats=0)
    for _ in range(20):
        pool.obey().step(2.0)
        before = (pool.wished(), {key: group.phase for key, group in pool.planner.groups.items()})
        pool.step(0.0)
        assert (pool.wished(), {key: group.phase for key, group in pool.planner.groups.items()}) == before
