"""When silence means something: examples of the lease rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.nodes import (
    DOUBT_SECONDS_MAX,
    RETURN_SECONDS,
    Liveness,
    LivenessLimits,
    SignsOfLife,
    attempt_is_silent,
    doubt_after,
    end_of_session,
    is_in_doubt,
    is_overdue,
    link_grace_is_over,
    link_grace_seconds,
    liveness,
)

LIMITS = LivenessLimits()


@pytest.mark.parametrize(
    ("heartbeat_at", "busy_since", "now", "expected"),
    [
        (0.0, None, 0.0, Liveness.FRESH),
        (0.0, None, 12.4, Liveness.FRESH),  # idle: a beat each 5 s, two and a half missed
        (0.0, None, 12.6, Liveness.SUSPECT),
        (0.0, None, 14.9, Liveness.SUSPECT),
        (0.0, None, 15.0, Liveness.LAPSED),
        (0.0, 0.0, 2.4, Liveness.FRESH),  # busy: a beat each second
        (0.0, 0.0, 2.6, Liveness.SUSPECT),
        (0.0, 4.9, 6.0, Liveness.FRESH),  # it was rightly silent before it got work
        (0.0, 4.9, 7.5, Liveness.SUSPECT),
        (0.0, 14.0, 15.0, Liveness.LAPSED),  # new work does not prolong a lease
    ],
)
def test_liveness_follows_the_table(heartbeat_at, busy_since, now, expected):
    assert liveness(SignsOfLife(heartbeat_at, busy_since), now, LIMITS) is expected


@pytest.mark.parametrize(
    ("heartbeat_at", "chunk_at", "now", "silent"),
    [
        (0.0, 0.0, 7.9, False),
        (0.0, 0.0, 8.0, True),
        (7.5, 0.0, 8.0, False),  # the node beats: its engine may be at a long prompt
        (0.0, 5.0, 8.0, False),  # tokens came although heartbeats did not
    ],
)
def test_a_silent_attempt_needs_a_suspect_node(heartbeat_at, chunk_at, now, silent):
    assert attempt_is_silent(SignsOfLife(heartbeat_at, 0.0), chunk_at, now, LIMITS) is silent


@pytest.mark.parametrize(("round_trip_seconds", "grace_seconds"), [(0.0, 0.5), (0.05, 0.7), (0.25, 1.5), (60.0, 1.5)])
def test_a_far_nodes_link_has_the_round_trips_of_a_dial_besides(round_trip_seconds, grace_seconds):
    assert link_grace_seconds(round_trip_seconds, LIMITS) == pytest.approx(grace_seconds)
    assert not link_grace_is_over(5.0, 4.99 + grace_seconds, LIMITS, round_trip_seconds)
    assert link_grace_is_over(5.0, 5.01 + grace_seconds, LIMITS, round_trip_seconds)


@pytest.mark.parametrize(("link_lost_at", "now", "over"), [(None, 99.0, False), (5.0, 5.45, False), (5.0, 5.5, True), (5.0, 9.0, True)])
def test_a_broken_link_has_half_a_second_to_come_back(link_lost_at, now, over):
    assert link_grace_is_over(link_lost_at, now, LIMITS) is over


@pytest.mark.parametrize(
    ("heartbeat_at", "link_lost_at", "now", "reason"),
    [
        (0.0, None, 14.9, None),
        (0.0, None, 15.0, "silence"),
        (0.0, 14.5, 15.0, "silence"),
        (14.0, 14.5, 14.9, None),
        (14.0, 14.5, 15.0, "link_lost"),
    ],
)
def test_a_session_ends_with_its_lease_or_its_links_grace(heartbeat_at, link_lost_at, now, reason):
    assert end_of_session(SignsOfLife(heartbeat_at, None), link_lost_at, now, LIMITS) == reason


@pytest.mark.parametrize(
    ("busy_since", "link_lost_at", "now", "overdue"),
    [(None, None, 7.5, False), (None, None, 7.6, True), (0.0, None, 1.5, False), (0.0, None, 1.6, True), (None, 0.1, 0.2, True)],
)
def test_a_node_is_overdue_half_a_beat_after_it_should_have_been_heard_of(busy_since, link_lost_at, now, overdue):
    assert is_overdue(SignsOfLife(0.0, busy_since), link_lost_at, now, LIMITS) is overdue


def test_when_the_first_of_many_that_fell_silent_together_lapses_all_of_them_are_overdue():
    """Whenever in its idle period each had beaten last: otherwise some would be evicted before the many are seen."""
    fell_silent_at = 100.0
    for beaten_before in (0.0, 2.0, 4.999):
        signs = SignsOfLife(fell_silent_at - beaten_before, None)
        assert is_overdue(signs, None, fell_silent_at + LIMITS.lease_ttl_seconds - 5.0, LIMITS)


@pytest.mark.parametrize(
    ("overdue_count", "node_count", "doubts"),
    [(2, 2, False), (2, 6, False), (3, 3, True), (3, 9, True), (3, 10, False), (4, 13, True), (30, 100, False), (31, 100, True)],
)
def test_the_coordinator_doubts_itself_when_more_than_three_tenths_are_silent_and_they_are_several(overdue_count, node_count, doubts):
    assert is_in_doubt(doubt_after(None, overdue_count, node_count, 50.0), 50.0) is doubts


def test_doubt_ends_when_the_last_have_had_time_to_come_back_and_after_ten_minutes_in_any_case():
    doubt = doubt_after(None, 8, 16, 100.0)
    doubt = doubt_after(doubt, 8, 16, 200.0)
    assert doubt_after(doubt, 1, 16, 200.0 + RETURN_SECONDS - 0.1) == doubt
    assert doubt_after(doubt, 1, 16, 200.0 + RETURN_SECONDS) is None
    assert is_in_doubt(doubt_after(doubt, 8, 16, 699.9), 699.9)
    assert not is_in_doubt(doubt_after(doubt, 8, 16, 700.0), 700.0)


@given(steps=st.lists(st.tuples(st.integers(0, 40), st.floats(0, 60)), max_size=60))
def test_no_way_of_falling_silent_makes_doubt_last_longer_than_its_bound(steps):
    doubt, now, in_doubt_since = None, 0.0, None
    for overdue_count, wait_seconds in steps:
        now += wait_seconds
        doubt = doubt_after(doubt, overdue_count, 40, now)
        if not is_in_doubt(doubt, now):
            in_doubt_since = None
            continue
        in_doubt_since = now if in_doubt_since is None else in_doubt_since
        assert now - in_doubt_since < DOUBT_SECONDS_MAX
