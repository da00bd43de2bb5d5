"""What an engine that ran out of memory is given next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.failures import Shortage
from potluck_node.domain.step_down import CONTEXT_TOKENS_MIN, UTILIZATION_PERCENT_NOTCHES, Ceiling, MemoryPlan, step_down, under

TAKEN, CACHE, SEQUENCE = Shortage.TAKEN, Shortage.CACHE, Shortage.SEQUENCE


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


@given(st.integers(1, 512), st.integers(1, 1 << 20), st.lists(st.sampled_from(Shortage), min_size=40, max_size=40))
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
