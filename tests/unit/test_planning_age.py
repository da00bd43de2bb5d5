"""How old a plan may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.planning.age import LONGEST_SECONDS, TIME_SHARE_MAX, USUAL_SECONDS, age_seconds_max, rest_seconds


@pytest.mark.parametrize(("took_seconds", "age"), [(0.0, 5.0), (0.07, 5.0), (0.1, 5.0), (0.2, 10.0), (0.6, 30.0), (5.0, 30.0)])
def test_a_plan_that_takes_long_is_made_more_rarely(took_seconds, age):
    assert age_seconds_max(took_seconds) == pytest.approx(age)


@given(st.floats(0, 1e6))
def test_plans_take_a_small_share_of_the_time_or_are_as_rare_as_they_may_be(took_seconds):
    age = age_seconds_max(took_seconds)
    assert USUAL_SECONDS <= age <= LONGEST_SECONDS
    assert age == LONGEST_SECONDS or took_seconds / age <= TIME_SHARE_MAX * (1 + 1e-9)


@pytest.mark.parametrize(
    ("took_seconds", "ended_seconds", "rest"), [(0.0, 0.0, 0.0), (0.2, 0.0, 0.2), (0.2, 0.15, 0.05), (0.2, 3.0, 0.0), (4.0, 0.1, 0.4)]
)
def test_a_plan_rests_as_long_as_the_last_one_took_but_nobody_waits_long(took_seconds, ended_seconds, rest):
    assert rest_seconds(took_seconds, ended_seconds) == pytest.approx(rest)
