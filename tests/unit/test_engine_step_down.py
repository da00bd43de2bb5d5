"""What an engine that ran out of memory is given next."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.failures import Shortage
from potluck_node.domain.step_down import (
    CONTEXT_TOKENS_MIN,
    UTILIZATION_PERCENT_NOTCHES,
    Ceiling,
    Leftover,
    MemoryPlan,
    beside_others,
    plan_of,
    step_down,
    under,
)
from potluck_protocol.card_facts import CardFacts
from potluck_protocol.values import DesiredEngine, EngineShape, GroupPlace, ModelFile, ModelId, ReplicaId

OTHERS, TAKEN, CACHE, SEQUENCE = Shortage.OTHERS, Shortage.TAKEN, Shortage.CACHE, Shortage.SEQUENCE


def steps(slot_count: int, context: int, shortage: Shortage) -> list[tuple[int, int, int]]:
    """The plans of every start on the way down, if each runs out in the same way."""
    ceiling: Ceiling | None = Ceiling()
    plans = []
    while ceiling is not None:
        plan = under(ceiling, slot_count, context)
        plans.append((plan.memory_utilization_percent, plan.slot_count, plan.context_length_tokens))
        ceiling = step_down(ceiling, plan, shortage)
    return plans


@pytest.mark.parametrize(
    ("slot_count", "context", "shortage", "plans"),
    [
        (5, 4096, TAKEN, [(95, 5, 4096), (90, 5, 4096), (85, 5, 4096), (85, 2, 4096), (85, 1, 4096), (85, 1, 2048), (85, 1, 1024)]),
        (2, 1500, CACHE, [(95, 2, 1500), (95, 1, 1500), (95, 1, 1024)]),
        (8, 4000, SEQUENCE, [(95, 8, 4000), (95, 8, 2000), (95, 8, 1024)]),
        (1, 512, TAKEN, [(95, 1, 512), (90, 1, 512), (85, 1, 512)]),
        (1, 512, SEQUENCE, [(95, 1, 512)]),
    ],
)
def test_one_notch_for_each_failure_down_to_the_floor(slot_count, context, shortage, plans):
    assert steps(slot_count, context, shortage) == plans


def test_a_ceiling_lowers_what_is_wished_later_and_raises_nothing():
    ceiling = Ceiling(85, slot_count=2, context_length_tokens=2048)
    assert under(ceiling, 8, 4096) == MemoryPlan(85, 2, 2048)
    assert under(ceiling, 1, 1024) == MemoryPlan(85, 1, 1024)
    assert step_down(ceiling, under(ceiling, 1, 1024), TAKEN) is None


@given(st.integers(1, 512), st.integers(1, 1 << 20), st.lists(st.sampled_from([TAKEN, CACHE, SEQUENCE]), min_size=40, max_size=40))
def test_it_always_sinks_and_always_ends(slot_count, context, shortages):
    ceiling, plan = Ceiling(), MemoryPlan(UTILIZATION_PERCENT_NOTCHES[0], slot_count, context)
    for shortage in shortages:
        lower = step_down(ceiling, plan, shortage)
        if lower is None:
            assert plan.slot_count == 1 or shortage is SEQUENCE
            assert plan.context_length_tokens <= max(CONTEXT_TOKENS_MIN, min(context, CONTEXT_TOKENS_MIN))
            return
        following = under(lower, slot_count, context)
        assert following != plan
        assert following.memory_utilization_percent <= plan.memory_utilization_percent
        assert 1 <= following.slot_count <= plan.slot_count
        assert 1 <= following.context_length_tokens <= plan.context_length_tokens
        ceiling, plan = lower, following
    raise AssertionError("it does not end")


def wish(percent: int) -> DesiredEngine:
    shape = EngineShape(("GPU-1",), card_facts=CardFacts(percent))
    return DesiredEngine(ReplicaId("r"), ModelFile(ModelId("m"), "path:/m", "m.gguf", "0" * 64, 1), "vllm", 4, 2048, shape)


@pytest.mark.parametrize(
    ("planned", "shares"),
    [(0, [95, 90, 85, 85]), (95, [95, 90, 85, 85]), (78, [78, 73, 68, 68]), (99, [95, 90, 85, 85]), (3, [3, 1, 1, 1])],
)
def test_the_notches_go_down_from_the_share_that_was_planned(planned, shares):
    ceiling: Ceiling | None = Ceiling()
    taken = []
    for _ in shares:
        assert ceiling is not None
        plan = plan_of(wish(planned), ceiling)
        taken.append(plan.memory_utilization_percent)
        ceiling = step_down(ceiling, plan, TAKEN)
    assert taken == shares


def test_what_others_hold_lowers_no_ceiling_and_what_they_leave_raises_no_share():
    assert step_down(Ceiling(), MemoryPlan(95, 4, 2048), OTHERS) is None
    assert plan_of(wish(0), Ceiling(), Leftover(78, 1)) == MemoryPlan(78, 4, 2048)
    assert plan_of(wish(70), Ceiling(), Leftover(78, 1)) == MemoryPlan(70, 4, 2048)
    assert plan_of(wish(0), Ceiling(85, 2), Leftover(88, 1)) == MemoryPlan(85, 2, 2048)


def test_a_stage_of_a_group_takes_less_memory_and_serves_what_the_others_do():
    stage = replace(wish(78), group=GroupPlace("g", 1, 1, "10.0.0.1", 1, "10.0.0.2", (1, 1)))
    assert plan_of(stage, Ceiling(90, 1, 1024)) == MemoryPlan(73, 4, 2048)


@pytest.mark.parametrize(
    ("earlier", "failed_percent", "free_percent", "leftover"),
    [
        (None, 95, 78, Leftover(78, 1)),
        (Leftover(78, 1), 78, 74, Leftover(74, 2)),
        # It did not say, or what it said is no less than what it was to take: a notch.
        (None, 95, None, Leftover(90, 1)),
        (Leftover(78, 1), 78, 80, Leftover(73, 2)),
        (Leftover(74, 2), 74, 60, None),
        (None, 95, 0, None),
    ],
)
def test_beside_others_two_more_starts_take_what_is_free(earlier, failed_percent, free_percent, leftover):
    assert beside_others(earlier, MemoryPlan(failed_percent, 4, 2048), free_percent) == leftover
