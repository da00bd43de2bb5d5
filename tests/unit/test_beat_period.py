"""How often idle nodes beat: as rarely as their number and the load ask for, and never more rarely than their lease bears."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.beat_period import STEP_SECONDS, idle_period_seconds, longest_idle_seconds
from potluck_coordinator.domain.nodes import (
    LEFT_SHARE_BUSY,
    LEFT_SHARE_IDLE,
    Liveness,
    LivenessLimits,
    SignsOfLife,
    is_overdue,
    liveness,
    next_look_at,
    renewal_is_due,
)
from potluck_node.domain.session import Session, after_beat, after_renewal, after_welcome, lease_left_seconds

USUAL = LivenessLimits()
LONG = LivenessLimits(lease_ttl_seconds=61.0)


@pytest.mark.parametrize(
    ("node_count", "load", "limits", "period"),
    [
        (0, 0.0, USUAL, 5.0),
        (3_000, 0.1, USUAL, 5.0),
        (5_000, 0.5, USUAL, 5.0),
        (5_100, 0.0, USUAL, 5.25),
        (10_000, 0.0, USUAL, 5.6),  # as rarely as the usual lease bears
        (10, 0.95, USUAL, 5.6),  # a busy process, too
        (10_000, 0.0, LONG, 10.0),
        (100_000, 0.0, LONG, 24.0),
        (10, 0.7, LONG, 14.5),
        (10, 2.0, LONG, 24.0),
        (100_000, 2.0, LivenessLimits(lease_ttl_seconds=10.0, heartbeat_idle_seconds=5.0), 5.0),  # the operator's word stands
    ],
)
def test_the_period_follows_the_table(node_count, load, limits, period):
    assert idle_period_seconds(node_count, load, limits) == pytest.approx(period)


limits_of_any_kind = st.builds(
    LivenessLimits,
    lease_ttl_seconds=st.floats(5.0, 600.0),
    heartbeat_idle_seconds=st.floats(0.01, 1.6),
)


@given(st.integers(0, 10**6), st.floats(0, 16), limits_of_any_kind)
def test_a_node_that_keeps_to_any_period_it_may_be_told_is_suspect_before_its_lease_ends(node_count, load, limits):
    period = idle_period_seconds(node_count, load, limits)
    assert limits.heartbeat_idle_seconds <= period <= longest_idle_seconds(limits)
    signs = SignsOfLife(0.0, None, period)
    just_after_two_missed = (limits.missed_heartbeats_suspect + 0.5) * period + 1e-6
    assert liveness(signs, just_after_two_missed, limits) is Liveness.SUSPECT
    assert liveness(signs, 2 * period, limits) is Liveness.FRESH
    # When the first of many that fell silent together lapses, whoever had beaten just before they did is overdue.
    assert is_overdue(SignsOfLife(period, None, period), None, limits.lease_ttl_seconds + 1e-6, limits)


@given(st.integers(0, 10**5), st.integers(0, 10**5), st.floats(0, 2), st.floats(0, 2))
def test_more_nodes_and_more_load_never_shorten_the_period(fewer, more, lighter, heavier):
    fewer, more = sorted((fewer, more))
    lighter, heavier = sorted((lighter, heavier))
    assert idle_period_seconds(fewer, lighter, LONG) <= idle_period_seconds(more, heavier, LONG)


@given(st.integers(0, 50_000), st.floats(0, 2))
def test_a_period_is_told_in_steps(node_count, load):
    period = idle_period_seconds(node_count, load, LONG)
    assert period / STEP_SECONDS == pytest.approx(round(period / STEP_SECONDS))


@given(st.floats(0.0, 30.0), st.floats(0.0, 30.0), st.sampled_from([0.0, 5.6]))
def test_before_the_next_look_a_silent_idle_node_is_neither_overdue_nor_suspect(heartbeat_at, wait_seconds, idle_seconds):
    signs = SignsOfLife(heartbeat_at, None, idle_seconds)
    now = heartbeat_at + wait_seconds
    if now <= next_look_at(signs, None, USUAL):
        assert not is_overdue(signs, None, now, USUAL)
        assert liveness(signs, now, USUAL) is Liveness.FRESH


def test_whoever_is_at_work_or_without_a_link_is_looked_at_each_time():
    assert next_look_at(SignsOfLife(1e9, 0.0), None, USUAL) < 0
    assert next_look_at(SignsOfLife(1e9, None), 1e9, USUAL) < 0


LATE_SECONDS = 0.4
"""Of a heartbeat: an agent looks four times a second whether one is due."""


def leases(gaps, period, *, is_busy, answers_numbers=True):
    """What is left of an agent's lease whenever it beats, by its own rule, and the share of its heartbeats that were answered."""
    session = after_welcome(
        Session(), epoch=1, lease_ttl_ms=15_000, heartbeat_busy_ms=1000, heartbeat_idle_ms=5000, hello_sent_at_seconds=0.0
    )
    renewed_at, now, left, answered_count = -math.inf, 0.0, [], 0
    for number, gap in enumerate(gaps, 1):
        now += period + gap
        session = after_beat(session, number, now)
        left.append(lease_left_seconds(session, now))
        if renewal_is_due(renewed_at, now, USUAL, is_busy=is_busy, idle_seconds=period, counts_by_number=answers_numbers):
            renewed_at, answered_count = now, answered_count + 1
            session = after_renewal(session, epoch=1, lease_ttl_ms=15_000, number=number if answers_numbers else 0)
    return left, answered_count / len(gaps)


@given(st.lists(st.floats(0.0, LATE_SECONDS), min_size=30, max_size=60), st.sampled_from([(1.0, True), (5.0, False), (5.6, False)]))
def test_an_agent_always_has_enough_of_its_lease_left(gaps, kept):
    period, is_busy = kept
    left, _ = leases(gaps, period, is_busy=is_busy)
    assert min(left) >= USUAL.lease_ttl_seconds * (LEFT_SHARE_BUSY if is_busy else LEFT_SHARE_IDLE) - LATE_SECONDS


@given(st.lists(st.floats(0.0, LATE_SECONDS), min_size=30, max_size=60), st.sampled_from([(1.0, True), (5.0, False)]))
def test_an_older_agent_which_counts_from_the_oldest_heartbeat_without_an_answer_has_enough_left_too(gaps, kept):
    period, is_busy = kept
    left, _ = leases(gaps, period, is_busy=is_busy, answers_numbers=False)
    assert min(left) >= USUAL.lease_ttl_seconds * LEFT_SHARE_IDLE


@pytest.mark.parametrize(("period", "is_busy", "share"), [(1.0, True, 1 / 7), (5.0, False, 1 / 2), (5.6, False, 1 / 2)])
def test_most_heartbeats_need_no_answer(period, is_busy, share):
    _, answered = leases([0.0] * 140, period, is_busy=is_busy)
    assert answered == pytest.approx(share, abs=0.01)
