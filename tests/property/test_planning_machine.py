"""Random joins, leaves and demands: a sample of `planning_churn`, and that it would notice a planner gone wrong."""

from __future__ import annotations

import pytest

from potluck_coordinator.domain.planning import displacing, settling, sticking
from potluck_coordinator.domain.planning.sizing import Room
from tests.property.planning_churn import BrokenRuleError, Churn

STEPS = 250
SEEDS = (1, 2)
STEPS_TO_FIND = 150
SEEDS_TO_FIND = 6


def run(seed, steps):
    churn = Churn(seed)
    for _ in range(steps):
        churn.step()
    return churn.counts


def test_a_pool_under_churn_keeps_to_the_rules():
    counts = [run(seed, STEPS) for seed in SEEDS]
    assert sum(count.events.total() for count in counts) == STEPS * len(SEEDS)
    # The rules would also hold for a planner that did nothing.
    assert min(count.placements for count in counts) > 50
    assert sum(count.moves for count in counts) > 0
    assert sum(count.displacements for count in counts) > 0


BROKEN = {
    "sizes are not looked at": lambda patch: patch(Room, "without", lambda room, sizing: room),
    "any gain is worth a move": lambda patch: patch(sticking, "is_worth_moving", lambda score, new_score: new_score > score),
    "whoever is short takes from whom he likes": lambda patch: patch(displacing, "_is_fair", lambda *_: True),
    "busy replicas make room too": lambda patch: patch(displacing, "_may_take", lambda draft, wish, one: one.model_id != wish.model_id),
    "room is free before its engine is gone": lambda patch: patch(settling, "let_go", lambda draft, replica: draft.drop(replica)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_planner_without_the_rule_is_found_out(rule, monkeypatch):
    BROKEN[rule](monkeypatch.setattr)

    def run_all():
        for seed in range(1, SEEDS_TO_FIND + 1):
            run(seed, STEPS_TO_FIND)

    with pytest.raises(BrokenRuleError):
        run_all()
