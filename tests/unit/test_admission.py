"""Dispatch, wait or refuse: examples, and what holds whatever the load is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.admission import (
    AIM_SHARE,
    KEPT_MARGIN,
    NOBODY,
    PROMISED_SHARE,
    AdmissionLimits,
    Capacity,
    ModelLoad,
    Pace,
    Queued,
    Refuse,
    Wait,
    WaitsFor,
    admit,
    is_hopeless,
    predicted_wait_seconds,
    waits_for,
)
from potluck_protocol.errors import ErrorCode

LIMITS = AdmissionLimits(queue_length_max=4, queue_wait_seconds_max=30)
FULL = Capacity(slot_count=4, in_flight_count=4)


def load(capacity=FULL, ahead=NOBODY, seconds=1.0, **more):
    return ModelLoad(capacity, ahead=ahead, pace=Pace(seconds, seconds), **more)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (load(Capacity()), Refuse(ErrorCode.NO_CAPACITY, 1.0)),
        (load(ahead=Queued(3), seconds=5.0), Wait(30, 5.0)),  # four requests of 5 s on four slots
        (load(Capacity(1, 1), seconds=14.0), Wait(30, 14.0)),  # the next, where one slot is all there is
        (load(Capacity(1, 1), seconds=16.0), Refuse(ErrorCode.QUEUE_FULL, 10.0, 16.0)),
        (load(ahead=Queued(3), seconds=60.0), Refuse(ErrorCode.QUEUE_FULL, 54.0, 60.0)),  # in 54 s it would be a fifth of the deadline
        (load(ahead=Queued(3), seconds=6.5), Refuse(ErrorCode.QUEUE_FULL, 1.0, 6.5)),
        (load(ahead=Queued(3), seconds=500.0), Refuse(ErrorCode.QUEUE_FULL, 60.0, 500.0)),  # never more than a client would honour
        (load(ahead=Queued(3), seconds=5.0, is_full=True), Refuse(ErrorCode.QUEUE_FULL, 1.0, 5.0)),
        (load(Capacity(8, 1), seconds=20.0, reading_seconds=0.5), Wait(30, 0.5)),  # seven slots, and prompts to read before
        (load(Capacity(8, 1), ahead=Queued(2), seconds=20.0, reading_seconds=0.5), Wait(30, 1.5)),
        (load(Capacity(8, 7), seconds=20.0, reading_seconds=18.0), Wait(30, 20 / 7)),  # an answer ends before so much is read
    ],
)
def test_the_table(position, expected):
    assert admit(position, LIMITS) == expected


@pytest.mark.parametrize(
    ("capacity", "ahead", "wanted_tokens", "seconds"),
    [
        (Capacity(4, 4), NOBODY, 0, 2.0),  # four leave in 8 s, so one in 2 s
        (Capacity(4, 2), NOBODY, 0, 4.0),  # two slots are free, and not for this one
        (Capacity(100, 10, kv_tokens=10_000, committed_tokens=9_000), NOBODY, 450, 0.8),  # one of ten leaves in 0.8 s
        (Capacity(100, 10, kv_tokens=10_000, committed_tokens=9_000), NOBODY, 1_800, 1.6),  # 9,000 tokens leave in 8 s
        (Capacity(100, 10, kv_tokens=10_000, committed_tokens=9_000), Queued(3, 9_000), 450, 8.4),
        (Capacity(4, 4, kv_tokens=10**6, committed_tokens=1_000), Queued(3, 30), 10, 8.0),  # the cache is empty, the slots are not
        (Capacity(4, 0), Queued(7), 0, 64.0),  # nothing runs, so that nothing says how fast it would go: one after the other
    ],
)
def test_the_wait_is_what_is_short_over_what_leaves(capacity, ahead, wanted_tokens, seconds):
    assert predicted_wait_seconds(load(capacity, ahead, 8.0, wanted_tokens=wanted_tokens)) == pytest.approx(seconds)


def test_a_request_that_a_node_gave_back_has_no_second_deadline():
    full = load(ahead=Queued(3), seconds=8.0)
    assert admit(full, AdmissionLimits(), 12.0, was_given_back=True) == Wait(18, 8.0)
    assert isinstance(admit(full, AdmissionLimits(), 23.7, was_given_back=True), Refuse), "six seconds are left, and it would take eight"


def test_a_newcomer_of_a_moment_ago_is_no_less_new():
    slow = load(ahead=Queued(3), seconds=30 * AIM_SHARE + 0.1)
    assert isinstance(admit(slow, AdmissionLimits(), 0.0), Refuse)
    assert isinstance(admit(slow, AdmissionLimits(), 1e-5), Refuse)


def test_who_comes_back_when_he_was_told_is_not_sent_away_by_a_prediction_that_erred_a_little():
    full = load(ahead=Queued(3), seconds=30 * PROMISED_SHARE - 0.1)
    assert isinstance(admit(full, LIMITS), Refuse)
    assert admit(full, LIMITS, was_promised=True) == Wait(90.0, pytest.approx(89.9))


def test_whoever_waits_is_refused_as_soon_as_it_is_clear_that_he_would_wait_too_long():
    slow = load(ahead=Queued(3), seconds=20.0)
    assert not is_hopeless(slow, 5.0, 30.0)
    assert is_hopeless(slow, 20.0, 30.0)


@pytest.mark.parametrize(
    ("usable", "free", "may_fill", "withheld", "words"),
    [
        (0, 0, True, True, WaitsFor.NODES),
        (4, 0, True, False, WaitsFor.SLOTS),
        (4, 0, True, True, WaitsFor.PACE),
        (4, 1, True, True, WaitsFor.CACHE),
        (4, 1, False, True, WaitsFor.TURN),
    ],
)
def test_what_a_request_waits_for(usable, free, may_fill, withheld, words):
    assert waits_for(usable, free, may_fill=may_fill, withheld=withheld) is words


capacities = st.builds(Capacity, st.integers(0, 100), st.integers(0, 120), st.integers(0, 10**6), st.floats(0, 10**6))
queued = st.builds(Queued, st.floats(0, 1000), st.floats(0, 10**7))
loads = st.builds(
    ModelLoad,
    capacities,
    wanted_tokens=st.floats(0, 10**6),
    ahead=queued,
    pace=st.builds(Pace, st.floats(0, 1e4), st.floats(0, 1e4)),
    is_full=st.booleans(),
)


@given(loads, st.floats(0, 100))
def test_a_refusal_always_says_when_to_come_back_and_nobody_waits_who_would_wait_too_long(position, waited_seconds):
    decision = admit(position, LIMITS, waited_seconds)
    if isinstance(decision, Refuse):
        assert LIMITS.retry_after_seconds_min <= decision.retry_after_seconds <= LIMITS.retry_after_seconds_max
    if isinstance(decision, Wait):
        assert not position.is_full
        assert decision.predicted_seconds <= decision.wait_seconds_max * KEPT_MARGIN
        assert decision.wait_seconds_max + waited_seconds <= max(LIMITS.queue_wait_seconds_max, waited_seconds) + 1e-6


@given(loads, queued)
def test_more_before_one_is_never_a_shorter_wait(position, more):
    longer = ModelLoad(position.capacity, position.wanted_tokens, position.ahead + more, position.pace)
    assert predicted_wait_seconds(longer) >= predicted_wait_seconds(position)


@given(loads)
def test_after_the_time_that_a_refusal_tells_the_wait_is_short_enough(position):
    """If room goes on to become free as fast, nobody else comes, and the time is not the longest that clients listen to."""
    decision = admit(position, LIMITS)
    if isinstance(decision, Refuse) and not position.is_full and decision.retry_after_seconds < LIMITS.retry_after_seconds_max:
        if decision.code is ErrorCode.NO_CAPACITY:
            return
        assert math.isfinite(decision.predicted_seconds)
        assert decision.predicted_seconds - decision.retry_after_seconds <= LIMITS.queue_wait_seconds_max + 1e-6
