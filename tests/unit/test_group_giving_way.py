"""A node that came to hold a group's model alone: it takes over without a client's loss, and gives the group's nodes back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.grouping.life import LEAVING_SECONDS_MAX, LEAVING_SECONDS_MIN
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.group_needs import bytes_per_second_of_one, node_rooms
from potluck_coordinator.domain.planning.state import Draft
from potluck_coordinator.domain.planning.words import ABSENCE_SECONDS_MAX
from potluck_protocol.values import EngineState, NodeId, NodeState
from tests.support.planning import GIB, cards, node, view, wish
from tests.unit.test_planning_groups import FLEX, Pool, box

GROUP, SECOND = "group/70b/0", "group/70b/1"
OLD_CARD = ("Tesla P40", 24 * GIB)


def grouped(count=1, **changes):
    """Two nodes of a card each that serve the big model together."""
    pool = Pool(wish("70b", count), **changes).step().obey().step()
    assert (pool.wished(), pool.standing("70b").ready_count) == ({"a": ["70b"], "b": ["70b"]}, 1)
    return pool


def joined(pool, card_count=2, **changes):
    """And one with as many cards of its own, which nobody shares."""
    pool.boxes[NodeId("c")] = replace(node("c", cards=card_count, memory_gib=64), **changes)
    return pool.step()


def said(pool, name, state):
    """One node says so of all that is wished of it; the others say what they said."""
    before = dict(pool.boxes)
    pool.obey(state)
    pool.boxes = {**before, NodeId(name): pool.boxes[NodeId(name)]}
    return pool.step()


def test_a_node_that_holds_it_alone_starts_beside_the_group_which_goes_when_the_node_answers():
    pool = joined(grouped())
    assert pool.wished() == {"a": ["70b"], "b": ["70b"], "c": ["70b"]}
    assert pool.standing("70b").ready_count == 1
    said(pool, "c", EngineState.STARTING).step(600)
    assert (pool.planner.groups[GROUP].phase, pool.wishes.leaving) == (GroupPhase.READY, set())
    said(pool, "c", EngineState.READY)
    assert pool.wished() == {"a": ["70b"], "b": ["70b"], "c": ["70b"]}
    assert (pool.wishes.leaving, pool.standing("70b").ready_count) == ({GROUP}, 1)
    pool.step(LEAVING_SECONDS_MIN)
    assert pool.wished() == {"a": [], "b": [], "c": ["70b"]}
    pool.obey().step()
    assert pool.planner.groups == {}
    before = dict(pool.planner.replicas)
    for _ in range(3):
        assert pool.obey().step(600).wished() == {"a": [], "b": [], "c": ["70b"]}
    assert pool.planner.replicas == before


def test_answers_under_way_are_finished_within_the_bound_of_whole_replicas():
    pool = joined(grouped())
    pool.attempt_counts = {GROUP: 2}
    said(pool, "c", EngineState.READY).step(LEAVING_SECONDS_MAX - 1)
    assert pool.wished()["a"] == ["70b"]
    assert pool.wishes.broken_groups == {}
    pool.attempt_counts = {}
    assert pool.step().wished() == {"a": [], "b": [], "c": ["70b"]}


@pytest.mark.parametrize(
    ("changes", "card_count"),
    [
        ({"connected": False}, 2),
        ({"state": NodeState.PAUSED}, 2),
        ({}, 1),
        ({"disk_free_bytes": GIB}, 2),
    ],
)
def test_a_node_that_could_not_serve_it_now_changes_nothing(changes, card_count):
    pool = grouped()
    assert joined(pool, card_count, **changes).wished() == {"a": ["70b"], "b": ["70b"], "c": []}


def test_nor_does_one_that_would_answer_much_more_slowly():
    pool = grouped()
    slow = replace(node("c", memory_gib=64).inventory, accelerators=cards(2, *OLD_CARD, "c"))
    assert joined(pool, inventory=slow).wished()["c"] == []


def test_nor_does_one_whose_room_others_are_only_leaving():
    pool = grouped()
    pool.deployments = (wish("70b", 1), wish("8b", None, FLEX))
    joined(pool)
    pool.obey()
    (small,) = (engine.replica_id for engine in pool.wishes.engines["c"] if engine.model.model_id == "8b")
    pool.attempt_counts = {small: 1}
    pool.deployments = (wish("70b", 1),)
    for _ in range(2):
        assert pool.step().wished()["c"] == ["8b"]
        assert [one.model_id for one in pool.planner.replicas.values() if one.node_id == "c"] == ["8b"]
    pool.attempt_counts = {}
    assert pool.step().obey().step().wished()["c"] == ["70b"]


def test_one_that_joins_as_a_member_leaves_the_pool_takes_the_place_of_the_group():
    pool = grouped()
    del pool.boxes[NodeId("b")]
    joined(pool)
    assert pool.wished()["c"] == ["70b"]


def test_one_that_fails_to_start_costs_the_group_nothing():
    pool = joined(grouped())
    said(pool, "c", EngineState.BACKING_OFF)
    pool.step(60)
    assert (pool.planner.groups[GROUP].phase, pool.wishes.leaving) == (GroupPhase.READY, set())
    assert pool.standing("70b").ready_count == 1


def test_one_that_goes_while_the_group_is_on_its_way_out_gets_it_back():
    pool = joined(grouped())
    pool.attempt_counts = {GROUP: 1}
    said(pool, "c", EngineState.READY)
    assert pool.wishes.leaving == {GROUP}
    pool.change("c", connected=False, engines=())
    for seconds in (1, ABSENCE_SECONDS_MAX):
        pool.step(seconds)
        assert (pool.wishes.leaving, pool.wished()["a"], pool.standing("70b").ready_count) == (set(), ["70b"], 1)


def test_a_group_that_breaks_meanwhile_is_not_formed_anew():
    pool = joined(grouped())
    pool.change("b", connected=False, engines=())
    pool.step()
    assert pool.wished()["c"] == ["70b"]
    assert pool.planner.groups[GROUP].phase is GroupPhase.BROKEN
    pool.change("a", engines=())
    pool.change("b", connected=True, epoch=2)
    assert pool.step(1).obey().step(30).wished() == {"a": [], "b": [], "c": ["70b"]}


def test_of_two_replicas_that_are_one_too_many_the_group_goes():
    pool = grouped(2)
    pool.boxes[NodeId("c")] = node("c", cards=2, memory_gib=64)
    pool.step().obey().step()
    assert pool.wished() == {"a": ["70b"], "b": ["70b"], "c": ["70b"]}
    pool.deployments = (wish("70b", 1),)
    pool.step().step(LEAVING_SECONDS_MIN)
    assert pool.wished() == {"a": [], "b": [], "c": ["70b"]}


def test_unless_the_node_does_not_answer_yet():
    pool = grouped(2)
    pool.boxes[NodeId("c")] = node("c", cards=2, memory_gib=64)
    pool.step()
    said(pool, "c", EngineState.STARTING)
    pool.deployments = (wish("70b", 1),)
    pool.step().step(LEAVING_SECONDS_MIN)
    assert pool.wished() == {"a": ["70b"], "b": ["70b"], "c": []}


def test_the_nodes_that_are_free_again_serve_others():
    pool = joined(grouped())
    pool.deployments = (wish("70b", 1), wish("8b", 2, FLEX))
    pool.step()
    said(pool, "c", EngineState.READY).step(LEAVING_SECONDS_MIN)
    pool.obey().step()
    assert pool.wished() == {"a": ["8b"], "b": ["8b"], "c": ["70b"]}


# A group that does not answer yet.


def test_a_node_that_holds_it_alone_starts_beside_a_group_that_forms():
    pool = joined(Pool(wish("70b", 1)).step().obey(EngineState.STARTING).step())
    assert pool.wished() == {"a": ["70b"], "b": ["70b"], "c": ["70b"]}
    said(pool, "c", EngineState.READY)
    assert (pool.wished(), pool.standing("70b").ready_count) == ({"a": [], "b": [], "c": ["70b"]}, 1)


def test_and_beside_one_that_forms_anew():
    pool = formed_anew(grouped())
    joined(pool)
    assert pool.wished() == {"a": ["70b"], "b": ["70b"], "c": ["70b"]}
    # The group may still be there first; it goes when the node answers, and not before.
    said(said(pool, "a", EngineState.READY), "b", EngineState.READY)
    assert (pool.planner.groups[GROUP].phase, pool.wishes.leaving, pool.standing("70b").ready_count) == (GroupPhase.READY, set(), 1)
    said(pool, "c", EngineState.READY)
    assert (pool.wishes.leaving, pool.standing("70b").ready_count) == ({GROUP}, 1)


# Which of several groups.


def formed_anew(pool, lost="b", other="a"):
    """A group of two that lost one for a moment."""
    pool.change(lost, connected=False, engines=())
    pool.step()
    pool.change(other, engines=())
    pool.change(lost, connected=True, epoch=2)
    pool.step()
    assert [group.phase for group in pool.planner.groups.values() if lost in group.epochs] == [GroupPhase.FORMING]
    return pool


def two_groups(old="ab"):
    """Of which one, of cards of 2016, is much slower."""
    boxes = {NodeId(name): box(number, name) for number, name in enumerate("abcd", 1)}
    for name in old:
        inventory = boxes[NodeId(name)].inventory
        boxes[NodeId(name)] = replace(boxes[NodeId(name)], inventory=replace(inventory, accelerators=cards(1, *OLD_CARD, name)))
    pool = Pool(wish("70b", 1))
    pool.boxes = {NodeId(name): boxes[NodeId(name)] for name in "ab"}
    pool.step().obey().step()
    pool.boxes |= {NodeId(name): boxes[NodeId(name)] for name in "cd"}
    pool.deployments = (wish("70b", 2),)
    pool.step().obey().step()
    assert [[stage.node_id for stage in pool.planner.groups[one].stages] for one in (GROUP, SECOND)] == [["a", "b"], ["c", "d"]]
    assert pool.standing("70b").ready_count == 2
    return pool


def arrived(pool):
    """A node that takes the place of a group, and starts."""
    pool.boxes[NodeId("e")] = node("e", cards=2, memory_gib=64)
    pool.step()
    (replica,) = pool.planner.replicas.values()
    said(pool, "e", EngineState.STARTING)
    return replica.replaces


@pytest.mark.parametrize(("old", "going", "left"), [("ab", GROUP, "cde"), ("cd", SECOND, "abe")])
def test_the_slower_group_goes_in_whose_place_the_node_came(old, going, left):
    pool = two_groups(old)
    assert arrived(pool) == going
    pool.attempt_counts = {going: 1}
    said(pool, "e", EngineState.READY)
    for _ in range(3):
        assert pool.wishes.leaving == {going}
        pool.step(10)
    pool.attempt_counts = {}
    pool.step()
    assert pool.wished() == {name: ["70b"] if name in left else [] for name in "abcde"}


def test_and_so_it_does_if_the_other_one_is_slower():
    pool = formed_anew(two_groups(), "d", "c")
    assert arrived(pool) == SECOND
    said(said(pool, "c", EngineState.READY), "d", EngineState.READY)
    pool.attempt_counts = {SECOND: 1}
    said(pool, "e", EngineState.READY)
    for _ in range(3):
        assert pool.wishes.leaving == {SECOND}
        pool.step(10)


@pytest.mark.parametrize(("old", "left"), [("ab", "cd"), ("cd", "ab")])
def test_of_two_that_answer_the_slower_one_goes(old, left):
    pool = two_groups(old)
    pool.deployments = (wish("70b", 1),)
    pool.step().step(LEAVING_SECONDS_MIN)
    assert pool.wished() == {name: ["70b"] if name in left else [] for name in "abcd"}


@pytest.mark.parametrize("old", ["ab", "cd"])
@pytest.mark.parametrize(("lost", "other", "left"), [("b", "a", "cd"), ("d", "c", "ab")])
def test_a_group_that_answers_stays_when_the_other_one_does_not_yet(old, lost, other, left):
    pool = formed_anew(two_groups(old), lost, other)
    pool.deployments = (wish("70b", 1),)
    for _ in range(3):
        pool.step(LEAVING_SECONDS_MIN)
        assert (pool.wished(), pool.wishes.leaving) == ({name: ["70b"] if name in left else [] for name in "abcd"}, set())
        assert pool.standing("70b").ready_count == 1


@pytest.mark.parametrize("gone", ["", "d"])
def test_also_while_nobody_is_connected(gone):
    pool = formed_anew(two_groups(), "d", "c")
    for name in "abcd":
        pool.change(name, connected=False, engines=())
    pool.boxes = {name: each for name, each in pool.boxes.items() if name != gone}
    pool.deployments = (wish("70b", 1),)
    pool.step()
    assert [pool.planner.groups[one].phase for one in (GROUP, SECOND)] == [GroupPhase.READY, GroupPhase.BROKEN]
    assert pool.wishes.leaving == set()


def test_a_group_that_loses_a_node_as_the_node_answers_takes_no_other_with_it():
    pool = formed_anew(two_groups(""), "d", "c")
    assert arrived(pool) == SECOND
    pool.change("b", connected=False, engines=())
    said(pool, "e", EngineState.READY)
    assert (pool.planner.groups[GROUP].phase, pool.planner.groups[SECOND].phase) == (GroupPhase.BROKEN, GroupPhase.FORMING)
    assert pool.wished()["e"] == ["70b"]


# How fast a node is.


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_a_node_is_as_fast_as_the_slowest_card_that_it_would_use(places):
    pool = grouped()
    both = cards(1, node="new") + cards(1, *OLD_CARD, "old")
    inventory = replace(node("c", memory_gib=64).inventory, accelerators=tuple(both[place] for place in places))
    assert joined(pool, inventory=inventory).wished()["c"] == []


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_cards_are_asked_for_by_name_and_a_machine_where_there_are_none(places):
    both = cards(1, node="new") + cards(1, *OLD_CARD, "old")
    accelerators = tuple(both[place] for place in places)
    bare = node("c", memory_gib=64)
    mixed = replace(bare, inventory=replace(bare.inventory, accelerators=accelerators))
    draft = Draft(view([mixed, node("d", memory_gib=64)], [], []))
    new, old = (card.uuid for card in both)
    rates = [bytes_per_second_of_one(draft, NodeId("c"), uuids) for uuids in ((new,), (old,), (new, old), ())]
    assert rates[0] > rates[1] == rates[2] > rates[3]
    assert rates[3] == bytes_per_second_of_one(draft, NodeId("d"), ())
    assert node_rooms(draft)[NodeId("c")].weight_bytes_per_second == rates[1]
