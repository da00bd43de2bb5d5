"""The agent's lease rule, its pauses between dials, and when its certificate is due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain import session as lease
from potluck_node.domain.certificates import CertificateDates, Standing, renew_again_at_unix_ms, renew_at_unix_ms, standing
from potluck_node.domain.session import Phase, Session

HOUR_MS = 3_600_000


def serving(at_seconds: float = 100.0, ttl_ms: int = 15_000) -> Session:
    return lease.after_welcome(
        Session(), epoch=3, lease_ttl_ms=ttl_ms, heartbeat_busy_ms=1000, heartbeat_idle_ms=5000, hello_sent_at_seconds=at_seconds
    )


def test_a_welcome_grants_a_lease_counted_from_the_hello() -> None:
    session = serving()
    assert session.phase is Phase.SERVING
    assert not lease.lease_lapsed(session, 114.9)
    assert lease.lease_lapsed(session, 115.0)
    assert lease.lease_left_seconds(session, 110.0) == 5.0


@pytest.mark.parametrize(("number", "ends_at"), [(0, 120.0), (6, 115.0), (7, 120.0), (8, 125.0), (9, 127.0), (10, 127.0)])
def test_a_renewal_counts_from_the_heartbeat_that_it_answers_or_from_the_oldest_that_it_may(number: int, ends_at: float) -> None:
    session = serving()
    for beat_number, sent_at in ((7, 105.0), (8, 110.0), (9, 112.0)):
        session = lease.after_beat(session, beat_number, sent_at)
    assert lease.after_renewal(session, epoch=3, lease_ttl_ms=15_000, number=number).lease_ends_at_seconds == ends_at


def test_what_was_answered_is_not_answered_again_and_what_came_after_it_still_is() -> None:
    session = lease.after_beat(lease.after_beat(serving(), 1, 105.0), 2, 110.0)
    session = lease.after_renewal(session, epoch=3, lease_ttl_ms=15_000, number=1)
    assert lease.after_renewal(session, epoch=3, lease_ttl_ms=60_000, number=1) == session
    assert lease.after_renewal(session, epoch=3, lease_ttl_ms=15_000, number=2).lease_ends_at_seconds == 125.0


def test_heartbeats_that_nobody_answers_are_not_remembered_for_longer_than_a_lease() -> None:
    session = serving()
    for number in range(1, 1000):
        session = lease.after_beat(session, number, 100.0 + 0.2 * number)
    assert len(session.unanswered) == 75


def test_a_renewal_that_answers_nothing_or_comes_of_another_epoch_changes_nothing() -> None:
    session = serving()
    assert lease.after_renewal(session, epoch=3, lease_ttl_ms=15_000) == session
    beaten = lease.after_beat(session, 1, 105.0)
    assert lease.after_renewal(beaten, epoch=2, lease_ttl_ms=15_000) == beaten


def test_a_lost_link_keeps_its_lease_and_a_lapsed_lease_fences() -> None:
    lost = lease.after_loss(serving(), lived_seconds=60)
    assert lost.phase is Phase.CONNECTING
    assert lease.lease_left_seconds(lost, 101.0) == 14.0
    fenced = lease.after_lapse(lost)
    assert fenced.phase is Phase.FENCED
    assert lease.lease_left_seconds(fenced, 101.0) == 0.0
    assert not lease.lease_lapsed(fenced, 1e9)
    assert lease.after_renewal(lease.after_beat(fenced, 1, 102.0), epoch=3, lease_ttl_ms=15_000).lease_ends_at_seconds is None


@pytest.mark.parametrize(
    ("busy", "at_seconds", "due"), [(True, 100.9, False), (True, 101.0, True), (False, 104.9, False), (False, 105.0, True)]
)
def test_heartbeats_are_close_while_attempts_run_and_wide_otherwise(busy: bool, at_seconds: float, due: bool) -> None:
    assert lease.beat_due(serving(), busy=busy, now_seconds=at_seconds) is due


def test_nothing_beats_without_a_lease() -> None:
    assert not lease.beat_due(Session(), busy=True, now_seconds=1e9)


def test_the_first_dials_after_a_loss_come_within_a_second_and_later_ones_back_off_to_five() -> None:
    for jitter in (0.0, 1.0):
        quick = [lease.reconnect_delay_seconds(count, jitter) for count in range(11)]
        assert quick == [0, 0, *[0.05 + 0.05 * jitter] * 9]
        assert sum(quick) < 1
    assert [lease.reconnect_delay_seconds(count, 1.0) for count in range(11, 16)] == [0.5, 1.0, 2.0, 4.0, 5.0]


def test_the_way_is_asked_for_after_the_quick_dials_and_every_third_from_then_on() -> None:
    assert [count for count in range(20) if lease.should_ask_the_way(count)] == [13, 16, 19]


@pytest.mark.parametrize(("epoch", "may_order"), [(3, True), (0, True), (2, False), (4, False)])
def test_only_frames_of_the_own_epoch_are_carried_out_and_none_once_fenced(epoch: int, may_order: bool) -> None:
    assert lease.may_order(serving(), epoch) is may_order
    assert lease.may_order(lease.after_loss(serving(), lived_seconds=60), epoch) is may_order
    assert not lease.may_order(lease.after_lapse(serving()), epoch)


@given(count=st.integers(0, 10**9), jitter=st.floats(0, 1))
def test_a_pause_is_never_longer_than_its_bound(count: int, jitter: float) -> None:
    assert 0 <= lease.reconnect_delay_seconds(count, jitter) <= lease.RECONNECT_DELAY_MAX_SECONDS


@given(count=st.integers(0, 10**9), jitter=st.floats(0, 1), told=st.floats(0.01, 10**6))
def test_who_is_told_to_come_again_comes_no_sooner_and_not_together(count: int, jitter: float, told: float) -> None:
    delay = lease.reconnect_delay_seconds(count, jitter, told)
    at_least = min(told, lease.TOLD_SECONDS_MAX)
    assert at_least <= delay <= 2 * at_least
    assert delay == at_least * (1 + jitter)


def test_a_renewal_says_how_often_to_beat_while_idle_and_an_older_coordinators_says_nothing() -> None:
    beaten = lease.after_beat(serving(), 1, 101.0)
    told = lease.after_renewal(beaten, epoch=beaten.epoch, lease_ttl_ms=15_000, heartbeat_idle_ms=5_600)
    assert told.heartbeat_idle_seconds == 5.6
    silent = lease.after_renewal(lease.after_beat(told, 2, 102.0), epoch=told.epoch, lease_ttl_ms=15_000)
    assert silent.heartbeat_idle_seconds == 5.6


@pytest.mark.parametrize(
    ("waiting", "tokens_sent_at", "now", "rides"),
    [(False, 9.9, 10.0, True), (False, 9.7, 10.0, False), (True, 9.9, 10.0, False), (False, float("-inf"), 10.0, False)],
)
def test_a_heartbeat_that_is_due_goes_with_tokens_that_flow_once(waiting, tokens_sent_at, now, rides) -> None:
    assert lease.beat_may_ride(waiting=waiting, tokens_sent_at_seconds=tokens_sent_at, now_seconds=now) is rides


def flapping(session: Session, count: int, *, failed_dials: int, lived_seconds: float) -> Session:
    """So many cuts, each of a connection that lived so long, with so many dials in vain before the next."""
    for _ in range(count):
        for _ in range(failed_dials):
            session = lease.after_failed_dial(session)
        session = lease.after_welcome(session, epoch=3, lease_ttl_ms=1, heartbeat_busy_ms=1, heartbeat_idle_ms=1, hello_sent_at_seconds=0)
        session = lease.after_loss(session, lived_seconds=lived_seconds)
    return session


@pytest.mark.parametrize(
    ("count", "failed_dials", "lived_seconds", "failure_count"),
    [
        (3, 0, 0.29, 3),  # lost at once: each a failed dial
        (100, 3, 0.4, 1),  # cut again and again, and of use in between: the next dial is at once
        (1, 20, 1.0, 11),
        (1, 1000, 5.0, 0),
    ],
)
def test_a_connection_makes_good_as_many_failed_dials_as_fit_into_its_life(count, failed_dials, lived_seconds, failure_count) -> None:
    assert flapping(serving(), count, failed_dials=failed_dials, lived_seconds=lived_seconds).failure_count == failure_count


@given(
    events=st.lists(st.tuples(st.sampled_from(["beat", "renew", "loss", "lapse"]), st.floats(0, 10), st.integers(0, 3)), max_size=40),
    says_numbers=st.booleans(),
)
def test_no_order_of_events_makes_a_lease_outlast_the_heartbeat_that_was_answered_last_by_more_than_its_length(
    events, says_numbers
) -> None:
    """The lease never ends later than one length after the newest beat or hello that the coordinator can have heard was sent."""
    now, newest_heard, number = 100.0, 100.0, 0
    session, sent_at = serving(now), {0: 100.0}
    for kind, wait_seconds, late_count in events:
        now += wait_seconds
        if lease.lease_lapsed(session, now) or kind == "lapse":
            session = lease.after_lapse(session)
        elif kind == "beat" and session.phase is Phase.SERVING:
            number += 1
            session, sent_at[number] = lease.after_beat(session, number, now), now
        elif kind == "renew" and number > late_count:
            heard = number - late_count
            newest_heard = max(newest_heard, sent_at[heard])
            session = lease.after_renewal(session, epoch=3, lease_ttl_ms=15_000, number=heard if says_numbers else 0)
        elif kind == "loss":
            session = lease.after_loss(session, lived_seconds=wait_seconds)
        heard_at = newest_heard if says_numbers else sent_at[number]
        assert lease.lease_left_seconds(session, now) <= max(0.0, heard_at + 15.0 - now) + 1e-9
        if session.phase is Phase.FENCED:
            assert session.lease_ends_at_seconds is None


def test_what_a_certificates_dates_say() -> None:
    dates = CertificateDates(10 * HOUR_MS, 34 * HOUR_MS)
    assert standing(dates, 10 * HOUR_MS - 1) is Standing.NOT_YET_VALID
    assert standing(dates, 10 * HOUR_MS) is Standing.VALID
    assert standing(dates, 34 * HOUR_MS) is Standing.LAPSED


def test_a_certificate_is_renewed_two_thirds_into_its_life_spread_by_a_tenth() -> None:
    dates = CertificateDates(0, 24 * HOUR_MS)
    assert renew_at_unix_ms(dates, 0.5) == 16 * HOUR_MS
    assert renew_at_unix_ms(dates, 0.0) == pytest.approx(13.6 * HOUR_MS)
    assert renew_at_unix_ms(dates, 1.0) == pytest.approx(18.4 * HOUR_MS)


def test_a_clock_that_runs_far_ahead_does_not_renew_without_end() -> None:
    dates = CertificateDates(0, 24 * HOUR_MS)
    assert renew_again_at_unix_ms(dates, 0.5, 1 * HOUR_MS) == 16 * HOUR_MS
    assert renew_again_at_unix_ms(dates, 0.5, 17 * HOUR_MS) == pytest.approx(19.4 * HOUR_MS)
