"""How often idle nodes beat: as rarely as their number and the load ask for, with a lease that bears it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.beat_period import STEP_SECONDS, STRETCH_MAX, idle_period_seconds, terms
from potluck_coordinator.domain.nodes import (
    LEFT_SHARE_BUSY,
    LEFT_SHARE_IDLE,
    Granted,
    Liveness,
    LivenessLimits,
    SignsOfLife,
    is_overdue,
    lease_ends_at,
    liveness,
    next_look_at,
    renewal_is_due,
)
from potluck_node.domain.session import Session, after_beat, after_renewal, after_welcome, lease_left_seconds

USUAL = LivenessLimits()
LONG = LivenessLimits(lease_ttl_seconds=61.0)
QUICK = LivenessLimits(lease_ttl_seconds=10.0, heartbeat_idle_seconds=2.0)
SHORT = LivenessLimits(lease_ttl_seconds=10.0)


@pytest.mark.parametrize(
    ("node_count", "load", "limits", "idle", "awaited"),
    [
        (0, 0.0, USUAL, (5.0, 15.0), (5.0, 15.0)),
        (3_000, 0.1, USUAL, (5.0, 15.0), (5.0, 15.0)),
        (5_000, 0.5, USUAL, (5.0, 15.0), (5.0, 15.0)),
        (5_100, 0.0, USUAL, (5.25, 15.0), (5.25, 15.0)),
        (10_000, 0.0, USUAL, (9.25, 24.125), (5.6, 15.0)),  # gRPC pings a link that is silent for longer
        (10, 0.7, USUAL, (7.25, 19.125), (5.6, 15.0)),  # a busy process
        (10, 0.95, USUAL, (9.25, 24.125), (5.6, 15.0)),
        (10_000, 0.0, LONG, (9.25, 61.0), (9.25, 61.0)),  # the operator's lease is long enough
        (10, 2.0, QUICK, (3.7, 10.25), (3.6, 10.0)),
        (1, 0.0, SHORT, (5.0, 10.0), (5.0, 10.0)),  # where nothing is stretched the operator's word stands
        (1, 2.0, SHORT, (9.25, 24.125), (5.0, 10.0)),
    ],
)
def test_the_terms_follow_the_table(node_count, load, limits, idle, awaited):
    period = idle_period_seconds(node_count, load, limits)
    assert terms(period, limits, is_awaited=False) == pytest.approx(idle)
    assert terms(period, limits, is_awaited=True) == pytest.approx(awaited)


limits_of_any_kind = st.builds(
    LivenessLimits,
    lease_ttl_seconds=st.floats(5.0, 600.0),
    heartbeat_idle_seconds=st.floats(0.01, 1.6),
)


@given(st.integers(0, 10**6), st.floats(0, 16), limits_of_any_kind, st.booleans())
def test_a_node_that_keeps_to_any_period_it_may_be_told_is_suspect_before_its_lease_ends(node_count, load, limits, is_awaited):
    period, lease_seconds = terms(idle_period_seconds(node_count, load, limits), limits, is_awaited=is_awaited)
    assert limits.heartbeat_idle_seconds <= period <= STRETCH_MAX * limits.heartbeat_idle_seconds
    signs = SignsOfLife(0.0, None, Granted(period, period, lease_seconds))
    just_after_two_missed = (limits.missed_heartbeats_suspect + 0.5) * period + 1e-6
    assert liveness(signs, just_after_two_missed, limits) is Liveness.SUSPECT
    assert liveness(signs, 2 * period, limits) is Liveness.FRESH
    # When the first of many that fell silent together lapses, whoever had beaten just before they did is overdue.
    assert is_overdue(SignsOfLife(period, None, Granted(period, period, lease_seconds)), None, lease_seconds + 1e-6, limits)


@given(st.integers(0, 10**5), st.integers(0, 10**5), st.floats(0, 2), st.floats(0, 2))
def test_more_nodes_and_more_load_never_shorten_the_period(fewer, more, lighter, heavier):
    fewer, more = sorted((fewer, more))
    lighter, heavier = sorted((lighter, heavier))
    assert idle_period_seconds(fewer, lighter, LONG) <= idle_period_seconds(more, heavier, LONG)


@given(st.integers(0, 50_000), st.floats(0, 2))
def test_a_period_is_told_in_steps(node_count, load):
    period = idle_period_seconds(node_count, load, LONG)
    assert period / STEP_SECONDS == pytest.approx(round(period / STEP_SECONDS))


@given(st.floats(0.0, 30.0), st.floats(0.0, 30.0), st.sampled_from([0.0, 5.6, 9.25]))
def test_before_the_next_look_a_silent_idle_node_is_neither_overdue_nor_suspect(heartbeat_at, wait_seconds, idle_seconds):
    signs = SignsOfLife(
        heartbeat_at, None, Granted(*terms(idle_seconds, USUAL, is_awaited=False)[:1], 0.0, terms(idle_seconds, USUAL, is_awaited=False)[1])
    )
    now = heartbeat_at + wait_seconds
    if now <= next_look_at(signs, None, USUAL):
        assert not is_overdue(signs, None, now, USUAL)
        assert liveness(signs, now, USUAL) is Liveness.FRESH


def test_whoever_is_at_work_or_without_a_link_is_looked_at_each_time():
    assert next_look_at(SignsOfLife(1e9, 0.0), None, USUAL) < 0
    assert next_look_at(SignsOfLife(1e9, None), 1e9, USUAL) < 0


@given(st.floats(0.0, 1e6), st.floats(0.0, 100.0), st.floats(0.0, 60.0), st.floats(0.0, 60.0))
def test_a_lease_never_ends_before_the_nodes_own_and_never_before_the_operators(heartbeat_at, later, lease_seconds, granted_seconds):
    signs = SignsOfLife(heartbeat_at + later, None, Granted(0.0, 0.0, lease_seconds, heartbeat_at + granted_seconds))
    ends_at = lease_ends_at(signs, USUAL)
    assert ends_at >= signs.granted.until
    assert ends_at >= signs.heartbeat_at + USUAL.lease_ttl_seconds
    assert liveness(signs, ends_at, USUAL) is Liveness.LAPSED
    assert liveness(signs, ends_at - 0.01, USUAL) is not Liveness.LAPSED


GAP_SECONDS_MAX = 0.4
"""Of a heartbeat: an agent looks four times a second whether one is due."""


def leases(gaps, period, *, is_busy, answers_numbers=True):
    """What is left of an agent's lease whenever it beats, by its own rule, and the share of its heartbeats that were answered."""
    _, lease_seconds = terms(period, USUAL, is_awaited=is_busy)
    lease_ms = int(lease_seconds * 1000)
    session = after_welcome(
        Session(), epoch=1, lease_ttl_ms=lease_ms, heartbeat_busy_ms=1000, heartbeat_idle_ms=5000, hello_sent_at_seconds=0.0
    )
    granted, now, left, answered_count = Granted().at_welcome(period, lease_seconds, 0.0), 0.0, [], 0
    for number, gap in enumerate(gaps, 1):
        now += period + gap
        session = after_beat(session, number, now)
        left.append(lease_left_seconds(session, now))
        if renewal_is_due(granted, lease_seconds, now, USUAL, is_busy=is_busy, counts_by_number=answers_numbers):
            granted, answered_count = granted.at_renewal(period, lease_seconds, now), answered_count + 1
            session = after_renewal(session, epoch=1, lease_ttl_ms=lease_ms, number=number if answers_numbers else 0)
    return left, answered_count / len(gaps)


@given(
    st.lists(st.floats(0.0, GAP_SECONDS_MAX), min_size=30, max_size=60),
    st.sampled_from([(1.0, True), (5.0, False), (5.6, False), (9.25, False)]),
)
def test_an_agent_always_has_enough_of_its_lease_left(gaps, kept):
    period, is_busy = kept
    left, _ = leases(gaps, period, is_busy=is_busy)
    share = LEFT_SHARE_BUSY if is_busy else LEFT_SHARE_IDLE
    assert min(left) >= USUAL.lease_ttl_seconds * share - GAP_SECONDS_MAX


@given(st.lists(st.floats(0.0, GAP_SECONDS_MAX), min_size=30, max_size=60), st.sampled_from([(1.0, True), (5.0, False)]))
def test_an_older_agent_which_counts_from_the_oldest_heartbeat_without_an_answer_has_enough_left_too(gaps, kept):
    period, is_busy = kept
    left, _ = leases(gaps, period, is_busy=is_busy, answers_numbers=False)
    assert min(left) >= USUAL.lease_ttl_seconds * LEFT_SHARE_IDLE


@pytest.mark.parametrize(
    ("period", "is_busy", "share"), [(1.0, True, 1 / 7), (5.0, False, 1 / 2), (5.6, False, 1 / 2), (9.25, False, 1 / 2)]
)
def test_most_heartbeats_need_no_answer(period, is_busy, share):
    _, answered = leases([0.0] * 140, period, is_busy=is_busy)
    assert answered == pytest.approx(share, abs=0.01)
