"""A node that came beside a group, by how many it answers at a time: at least the group's slots, or any where the group does not answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.grouping.life import LEAVING_SECONDS_MIN
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.words import IDLE_SECONDS
from potluck_protocol.values import EngineState, ModelId, NodeId
from tests.support.planning import GIB, card_entry, cards, node, wish
from tests.unit.test_group_giving_way import joined, said
from tests.unit.test_planning_groups import Pool

SMALL_GROUP = "group/32b/0"


def smaller_cards(state):
    """A 32B on two 16 GB cards has four slots; one card of 24 GB answers as fast, and has room for three."""
    pool = Pool(wish("32b", 1))
    entry = card_entry("32b", slot_count=8)
    pool.entries = {entry.model_id: entry}
    for name, each in pool.boxes.items():
        smaller = cards(1, "NVIDIA GeForce RTX 4080", 16 * GIB, name)
        pool.boxes[name] = replace(each, inventory=replace(each.inventory, accelerators=smaller))
    pool.step().obey(state).step()
    assert pool.wished() == {"a": ["32b"], "b": ["32b"]}
    assert pool.planner.groups[SMALL_GROUP].need.slot_count == 4
    return pool


def alone(pool, name="c"):
    """The slots and cards that the model has on that node."""
    return [(one.sizing.slot_count, len(one.sizing.shape.card_uuids)) for one in pool.planner.replicas.values() if one.node_id == name]


def test_one_that_answers_fewer_at_a_time_changes_nothing():
    pool = smaller_cards(EngineState.READY)
    pool.attempt_counts, pool.waiting_counts = {SMALL_GROUP: 4}, {ModelId("32b"): 5}
    assert joined(pool, 1).wished() == {"a": ["32b"], "b": ["32b"], "c": []}
    # Idle or not: there will be another rush.
    pool.attempt_counts, pool.waiting_counts = {}, {}
    assert pool.step(IDLE_SECONDS).wished()["c"] == []
    other = Pool(wish("32b", 1), names=("c",))
    other.entries = pool.entries
    assert alone(other.step()) == [(3, 1)]


@pytest.mark.parametrize("card_count", [2, 4])
def test_one_with_more_cards_takes_as_many_as_it_needs_for_the_group_s_slots(card_count):
    pool = joined(smaller_cards(EngineState.READY), card_count)
    ((slot_count, taken_count),) = alone(pool)
    assert (slot_count >= 4, taken_count) == (True, 2)
    said(pool, "c", EngineState.READY).step(LEAVING_SECONDS_MIN)
    for _ in range(3):
        assert pool.obey().step(600).wished() == {"a": [], "b": [], "c": ["32b"]}
        assert alone(pool) == [(slot_count, 2)]
    # What it is worth is what it does with both cards: one that does more than a single one of them is not worth moving to.
    pool.boxes[NodeId("d")] = node("d", cards=cards(1, "NVIDIA RTX A6000", 48 * GIB, "d"))
    assert pool.step().wished()["d"] == []


def test_one_with_fewer_slots_starts_beside_a_group_that_forms():
    pool = smaller_cards(EngineState.STARTING)
    pool.waiting_counts = {ModelId("32b"): 20}
    assert joined(pool, 1).wished() == {"a": ["32b"], "b": ["32b"], "c": ["32b"]}
    assert alone(pool) == [(3, 1)]
    said(pool, "c", EngineState.READY)
    assert (pool.wished(), pool.standing("32b").ready_count) == ({"a": [], "b": [], "c": ["32b"]}, 1)


def test_there_too_as_many_as_the_group_s_where_it_has_the_cards():
    pool = joined(smaller_cards(EngineState.STARTING), 4)
    ((slot_count, taken_count),) = alone(pool)
    assert (slot_count >= 4, taken_count) == (True, 2)


def test_a_group_that_came_to_answer_first_is_not_given_up_for_fewer_slots():
    pool = joined(smaller_cards(EngineState.STARTING), 1)
    assert alone(pool) == [(3, 1)]
    said(said(said(pool, "c", EngineState.STARTING), "a", EngineState.READY), "b", EngineState.READY)
    assert pool.planner.groups[SMALL_GROUP].phase is GroupPhase.READY
    # It goes on starting, for the group may break again; when it answers, it is not needed.
    assert pool.wished()["c"] == ["32b"]
    said(pool, "c", EngineState.READY)
    assert (pool.wished(), pool.wishes.leaving) == ({"a": ["32b"], "b": ["32b"], "c": []}, set())
    for _ in range(3):
        assert pool.obey().step(600).wished() == {"a": ["32b"], "b": ["32b"], "c": []}
    assert pool.planner.groups[SMALL_GROUP].phase is GroupPhase.READY


def test_but_it_is_where_it_loses_a_member_as_the_node_answers():
    pool = joined(smaller_cards(EngineState.STARTING), 1)
    said(said(said(pool, "c", EngineState.STARTING), "a", EngineState.READY), "b", EngineState.READY)
    pool.change("b", connected=False, engines=())
    said(pool, "c", EngineState.READY)
    assert (pool.wished()["c"], pool.standing("32b").ready_count) == (["32b"], 1)
