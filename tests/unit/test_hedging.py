"""When a first token is late, whether another node is then asked as well, and what that may waste."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.hedging import (
    BUDGET_TOKENS_MAX,
    CANCEL_TOKENS,
    FORESEEN_SECONDS_MIN,
    HEDGED_SHARE_MAX,
    LATE_SECONDS_MIN,
    RATIOS_KEPT_MAX,
    RATIOS_KNOWN_MIN,
    Budget,
    FirstTokens,
    HedgeEnd,
    LateRequest,
    after_delivery,
    after_end,
    after_start,
    late_after_seconds,
    learned,
    price_tokens,
    wasted_tokens,
    why_not_hedged,
)


def known_of(*taken: tuple[float, float]) -> FirstTokens:
    known = FirstTokens()
    for taken_seconds, foreseen_seconds in taken:
        known = learned(known, taken_seconds, foreseen_seconds)
    return known


def test_nothing_is_late_before_enough_is_known():
    few = known_of(*[(1.0, 1.0)] * (RATIOS_KNOWN_MIN - 1))
    assert late_after_seconds(few, 1.0) is None
    assert late_after_seconds(learned(few, 1.0, 1.0), 1.0) == 1.0


def test_late_is_what_one_of_twenty_passes():
    known = known_of(*[(1.0, 1.0)] * 18, (1.5, 1.0), (9.0, 1.0))
    assert known.on_time_ratio == 1.5
    assert late_after_seconds(known, 2.0) == 3.0


def test_a_long_prompt_is_not_late_for_being_long():
    known = known_of(*[(0.2, 0.2)] * RATIOS_KNOWN_MIN)
    assert late_after_seconds(known, 0.3) == pytest.approx(0.3)
    assert late_after_seconds(known, 30.0) == pytest.approx(30.0)


def test_a_long_prompt_is_not_judged_by_what_surrounds_short_ones():
    known = known_of(*[(0.05, 0.002)] * RATIOS_KNOWN_MIN)
    assert late_after_seconds(known, 4.0) == pytest.approx(2.0), "half of what was foreseen, and not twenty-five times"


def test_nothing_is_late_within_a_quarter_of_a_second():
    known = known_of(*[(0.001, 1.0)] * RATIOS_KNOWN_MIN)
    assert late_after_seconds(known, 0.01) == LATE_SECONDS_MIN


SECONDS = st.floats(0.0, 600.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=2 * RATIOS_KEPT_MAX), SECONDS)
def test_the_newest_are_kept_and_all_but_one_of_twenty_are_in_time(taken, foreseen_seconds):
    known = known_of(*taken)
    newest = [took / max(foreseen, FORESEEN_SECONDS_MIN) for took, foreseen in taken[-RATIOS_KEPT_MAX:]]
    assert list(known.ratios) == newest
    late_after = late_after_seconds(known, foreseen_seconds)
    assert (late_after is None) is (len(newest) < RATIOS_KNOWN_MIN)
    if late_after is not None and known.on_time_ratio is not None:
        late_count = sum(ratio > known.on_time_ratio for ratio in newest)
        assert late_count <= len(newest) / 20
        assert sum(ratio >= known.on_time_ratio for ratio in newest) > len(newest) / 20 - 1
        assert late_after >= LATE_SECONDS_MIN


LATE = LateRequest(waited_seconds=1.0, price_tokens=100.0, foreseen_seconds=0.5)


@pytest.mark.parametrize(
    ("late", "tokens", "words"),
    [
        (LATE, 100.0, None),
        (LATE, 99.0, "99 are left"),
        (LATE, -50.0, "0 are left"),
        (replace(LATE, foreseen_seconds=1.0), 100.0, None),
        (replace(LATE, foreseen_seconds=1.1), 100.0, "longer than it has waited"),
        (replace(LATE, foreseen_seconds=None), 100.0, "no other node has room"),
        (replace(LATE, room_is_wanted=True), 100.0, "others wait for"),
        (replace(LATE, is_suspect=True), 100.0, "an engine died with it"),
        (replace(LATE, is_on_trial=True), 100.0, "failed lately"),
    ],
)
def test_another_is_asked_only_where_nothing_speaks_against_it(late, tokens, words):
    why_not = why_not_hedged(late, Budget(tokens))
    assert why_not is None if words is None else words in why_not


@pytest.mark.parametrize("end", HedgeEnd)
def test_who_goes_on_alone_has_wasted_nothing_and_all_others_a_prompt(end):
    wasted = wasted_tokens(end, 200.0, 3.0)
    assert wasted == (0.0 if end is HedgeEnd.REPLACED else price_tokens(200.0))
    assert wasted_tokens(HedgeEnd.LOST, 200.0, CANCEL_TOKENS + 5) == 200.0 + CANCEL_TOKENS + 5


DELIVERY = st.floats(0.0, 1e7)
PROMPT = st.floats(1.0, 40_000.0)
ERROR = st.floats(0.1, 10.0)
"""By how much a prompt is longer than it was taken for."""
STEPS = st.lists(st.one_of(DELIVERY, st.tuples(PROMPT, ERROR, st.sampled_from(HedgeEnd), st.booleans())), max_size=60)


@given(STEPS, st.booleans())
def test_no_more_is_begun_than_the_share_of_what_was_delivered_pays_for(steps, is_exact):
    """Every hedge is begun with its price in hand, those under way included, so that only a wrong guess can pass the share."""
    budget, delivered, wasted = Budget(), 0.0, 0.0
    under_way: list[tuple[float, float, HedgeEnd]] = []

    def end_one() -> float:
        nonlocal budget
        prompt, error, end = under_way.pop(0)
        came_to = wasted_tokens(end, prompt if is_exact else prompt * error, 0.0)
        budget = after_end(budget, price_tokens(prompt), came_to)
        return came_to

    for step in steps:
        if isinstance(step, float):
            delivered += step
            budget = after_delivery(budget, step)
            continue
        prompt, error, end, ends_one = step
        price = price_tokens(prompt)
        if why_not_hedged(replace(LATE, price_tokens=price), budget) is None:
            budget = after_start(budget, price)
            under_way.append((prompt, error, end))
            promised = sum(price_tokens(one) for one, _, _ in under_way)
            assert wasted + promised <= HEDGED_SHARE_MAX * delivered * (1 + 1e-9) + 1e-6
        if under_way and ends_one:
            wasted += end_one()
        assert budget.tokens <= BUDGET_TOKENS_MAX
        if is_exact:
            assert budget.tokens >= -1e-6
    while under_way:
        wasted += end_one()
    if is_exact:
        assert wasted <= HEDGED_SHARE_MAX * delivered * (1 + 1e-9) + 1e-6
    assert math.isfinite(budget.tokens)


def test_what_a_prompt_was_longer_than_taken_for_is_owed():
    budget = after_start(Budget(100.0), price_tokens(50.0))
    budget = after_end(budget, price_tokens(50.0), wasted_tokens(HedgeEnd.WON, 150.0, 0.0))
    assert budget.tokens == 100.0 - 150.0 - CANCEL_TOKENS
    assert why_not_hedged(replace(LATE, price_tokens=1.0), budget) is not None
    assert after_delivery(budget, 10_000.0).tokens == budget.tokens + 300.0
