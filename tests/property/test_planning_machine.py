"""Random joins, leaves and demands: a sample of `planning_churn`, and that it would notice a planner gone wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.domain.grouping import life
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning import displacing, giving_way, settling, state, sticking
from potluck_coordinator.domain.planning.node_kinds import Room
from potluck_protocol.values import GroupOffer, ModelId, NodeId
from tests.property.planning_boxes import GIB, Box
from tests.property.planning_churn import BrokenRuleError, Churn
from tests.property.planning_made import ready_groups
from tests.support.planning import cards, node

STEPS = 100
SEEN = {4: ("displacements", "yielded", "groups"), 6: ("moves", "groups")}
"""By seed, what happens there."""
SPOILED_SEED = 2
STEPS_TO_FIND = 60
SEEDS_TO_FIND = (4, 8, 6)


def run(seed, steps):
    churn = Churn(seed)
    for _ in range(steps):
        churn.step()
    return churn.counts


@pytest.mark.parametrize("seed", SEEN)
def test_a_pool_under_churn_keeps_to_the_rules(seed):
    counts = run(seed, STEPS)
    assert counts.events.total() == STEPS
    # The rules would also hold for a planner that did nothing.
    assert counts.placements > 30
    assert all(getattr(counts, name) > 0 for name in SEEN[seed])


def test_a_pool_whose_cards_go_bad_keeps_to_the_rules():
    churn = Churn(SPOILED_SEED, spoils=True)
    failed = set()
    for _ in range(STEPS_TO_FIND):
        churn.step()
        failed |= {key for key, trouble in churn.planner._troubles.items() if trouble.counts(churn.clock.now) and not trouble.refused}
    assert churn.counts.events["spoil"] > 1
    assert len(failed) > 1


def _stands(group, *_):
    return group.phase is not GroupPhase.BROKEN


BROKEN = {
    "sizes are not looked at": lambda patch: patch(Room, "without", lambda room, sizing: room),
    "any gain is worth a move": lambda patch: patch(sticking, "is_worth_moving", lambda score, new_score: new_score > score),
    "whoever is short takes from whom he likes": lambda patch: patch(displacing.Judge, "is_fair", lambda *_: True),
    "busy replicas make room too": lambda patch: patch(displacing, "_may_take", lambda draft, wish, one: one.model_id != wish.model_id),
    "room is free before its engine is gone": lambda patch: patch(settling, "let_go", lambda draft, replica: draft.drop(replica)),
    "a broken group's room is free for whole replicas at once": lambda patch: patch(state, "is_held", _stands),
    "a broken group's room is free for groups at once": lambda patch: patch(life, "is_held", _stands),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_planner_without_the_rule_is_found_out(rule, monkeypatch):
    BROKEN[rule](monkeypatch.setattr)

    def run_all():
        for seed in SEEDS_TO_FIND:
            run(seed, STEPS_TO_FIND)

    with pytest.raises(BrokenRuleError):
        run_all()


def _offered(number, card, memory_gib):
    view = node(f"node{number}", cards=cards(1, card, memory_gib * GIB, node=f"node{number}"), memory_gib=64)
    return Box(replace(view, inventory=replace(view.inventory, group_offer=GroupOffer("attic", f"10.0.0.{number}", 29_600))), 1.0)


def _larger_card_comes():
    """A card with fewer slots, and as fast, beside a group of two smaller ones; what is left of the group."""
    churn = Churn(0)
    churn.deployments = {ModelId("32b"): Deployment(ModelId("32b"), 1)}
    churn.boxes = {NodeId(f"node{number}"): _offered(number, "NVIDIA GeForce RTX 4080", 16) for number in (1, 2)}
    churn.rest()
    assert len(ready_groups(churn.made)) == 1
    churn.boxes[NodeId("node3")] = _offered(3, "NVIDIA GeForce RTX 3090", 24)
    churn.rest()
    return ready_groups(churn.made)


def test_a_planner_that_gives_a_group_up_for_fewer_slots_is_found_out(monkeypatch):
    assert len(_larger_card_comes()) == 1
    monkeypatch.setattr(giving_way, "slot_counts_asked", lambda group: (1,))
    monkeypatch.setattr(sticking, "outdoes_a_group", lambda draft, replica: True)
    with pytest.raises(BrokenRuleError, match="stood and was given up"):
        _larger_card_comes()
