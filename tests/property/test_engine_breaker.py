"""However an engine crashes, it is started only so often, and its breaker neither sticks nor lets go too early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.breaker import (
    CRASHES_MAX,
    HEALTHY_AFTER_SECONDS,
    NO_CRASHES,
    OPEN_FIRST_SECONDS,
    OPEN_LAST_SECONDS,
    STARTS_MAX,
    WINDOW_SECONDS,
    after_crash,
    pause_seconds,
)

lives = st.lists(
    st.tuples(st.floats(0, 120) | st.just(0.0), st.just(0.0) | st.floats(0, 700) | st.sampled_from([299.0, 300.0])), min_size=1, max_size=60
)
"""Of each start: how long it took to be ready, and how long it then was (0: it never was)."""


def played(lives_given: list[tuple[float, float]]) -> tuple[list[float], list[float], list[bool]]:
    """When the engine was started and when it crashed, and whether the breaker was open then, with starts as early as allowed."""
    now, record = 0.0, NO_CRASHES
    starts, crashes, opened = [], [], []
    for starting_seconds, ready_seconds in lives_given:
        starts.append(now)
        now += starting_seconds + ready_seconds
        record = after_crash(record, now, ready_seconds)
        crashes.append(now)
        opened.append(record.is_open)
        pause = pause_seconds(record)
        assert 1.0 <= pause <= OPEN_LAST_SECONDS
        assert not record.is_open or pause >= OPEN_FIRST_SECONDS
        now += pause
    return starts, crashes, opened


@given(lives)
def test_never_more_than_so_many_starts_in_ten_minutes(lives_given):
    starts, _, _ = played(lives_given)
    for first, start in enumerate(starts):
        assert sum(1 for other in starts[first:] if other - start <= WINDOW_SECONDS) <= STARTS_MAX


@given(lives)
def test_it_opens_exactly_where_five_crashes_lie_within_ten_minutes_or_the_start_that_was_tried_fails(lives_given):
    _, crashes, opened = played(lives_given)
    for index, crash in enumerate(crashes):
        recent = [other for other in crashes[max(0, index - CRASHES_MAX + 1) : index + 1] if crash - other <= WINDOW_SECONDS]
        tried_and_failed = index > 0 and opened[index - 1] and lives_given[index][1] < HEALTHY_AFTER_SECONDS
        assert opened[index] == (len(recent) == CRASHES_MAX or tried_and_failed)


@given(lives, st.floats(HEALTHY_AFTER_SECONDS, 10_000))
def test_an_engine_that_was_healthy_for_long_is_soon_back(lives_given, healthy_seconds):
    record, now = NO_CRASHES, 0.0
    for starting_seconds, ready_seconds in lives_given:
        now += starting_seconds + ready_seconds
        record = after_crash(record, now, ready_seconds)
        now += pause_seconds(record)
    record = after_crash(record, now + healthy_seconds, healthy_seconds)
    assert pause_seconds(record) <= OPEN_FIRST_SECONDS
    if healthy_seconds > WINDOW_SECONDS:
        assert pause_seconds(record) == 1.0
