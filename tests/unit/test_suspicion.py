"""A replica that fails twice gets nothing until it has shown that it works again: the steps, and what holds on every way through them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.suspicion import (
    DOUBT_PAUSE_SECONDS,
    ERRORS_MAX,
    PROBE_PAUSE_FIRST_SECONDS,
    PROBE_PAUSE_MAX_SECONDS,
    REFUSALS_APART_SECONDS,
    REFUSALS_MAX,
    WINDOW_SECONDS,
    AnswerKind,
    Standing,
    Suspicion,
    after_error,
    after_failure,
    after_probe,
    after_refusal,
    after_refused_body,
    after_success,
    is_forgotten,
    kind_of,
    probe_is_due,
)


def suspected(now: float = 0.0) -> Suspicion:
    return after_failure(after_failure(Suspicion(), now), now)


def test_one_failure_is_bad_luck_and_two_within_the_window_are_not():
    once = after_failure(Suspicion(), 10.0)
    assert once.standing is Standing.TRUSTED
    assert after_failure(once, 10.0 + WINDOW_SECONDS - 0.1).standing is Standing.SUSPECTED
    assert after_failure(once, 10.0 + WINDOW_SECONDS).standing is Standing.TRUSTED


def test_a_success_between_two_failures_excuses_neither():
    once = after_success(after_failure(Suspicion(), 10.0))
    assert after_failure(once, 11.0).standing is Standing.SUSPECTED


def test_the_first_probe_comes_at_once_and_later_ones_after_pauses_that_double_to_a_minute():
    now, suspicion, pauses = 5.0, suspected(5.0), []
    for _ in range(8):
        assert probe_is_due(suspicion, suspicion.probe_at)
        assert not probe_is_due(suspicion, suspicion.probe_at - 0.01)
        pauses.append(suspicion.probe_at - now)
        now = suspicion.probe_at
        suspicion = after_probe(suspicion, now, succeeded=False)
    assert pauses == [0, 2, 4, 8, 16, 32, 60, 60]


def test_a_good_probe_opens_it_half_and_the_first_good_answer_wholly():
    half = after_probe(suspected(), 1.0, succeeded=True)
    assert half.standing is Standing.HALF_OPEN
    assert after_success(half) == Suspicion()


def test_a_failure_while_half_open_is_a_failed_probe():
    again = after_failure(after_probe(suspected(), 1.0, succeeded=True), 2.0)
    assert again.standing is Standing.SUSPECTED
    assert not probe_is_due(again, 3.9)
    assert probe_is_due(again, 4.0)


def refused(times, *, apart_seconds=1.0, between=lambda suspicion: suspicion):
    suspicion = Suspicion()
    for number in range(times):
        suspicion = between(after_refusal(suspicion, number * apart_seconds))
    return suspicion


def test_a_replica_that_takes_nothing_is_suspected_after_a_few_refusals_and_one_that_answers_between_them_is_not():
    assert refused(REFUSALS_MAX).standing is Standing.TRUSTED
    assert refused(REFUSALS_MAX + 1).standing is Standing.SUSPECTED
    assert refused(50, between=after_success).standing is Standing.TRUSTED
    assert refused(50, apart_seconds=WINDOW_SECONDS).standing is Standing.TRUSTED


def test_what_is_refused_together_counts_once():
    assert refused(50, apart_seconds=REFUSALS_APART_SECONDS / 50).standing is Standing.TRUSTED
    assert refused(REFUSALS_MAX + 1, apart_seconds=REFUSALS_APART_SECONDS).standing is Standing.SUSPECTED


def test_refusals_excuse_no_failure_and_a_refusal_while_half_open_is_a_failed_probe():
    once = after_failure(Suspicion(), 0.0)
    assert after_failure(after_refusal(once, 1.0), 2.0).standing is Standing.SUSPECTED
    half = after_probe(suspected(), 1.0, succeeded=True)
    assert after_refusal(half, 2.0) == after_failure(half, 2.0)
    assert not is_forgotten(after_refusal(Suspicion(), 0.0), 1.0)
    assert is_forgotten(after_refusal(Suspicion(), 0.0), WINDOW_SECONDS)


def test_a_body_that_its_like_answers_counts_as_a_refusal_of_a_trusted_one_and_of_no_other():
    trusted = Suspicion()
    for number in range(REFUSALS_MAX + 1):
        assert after_refused_body(trusted, float(number)) == after_refusal(trusted, float(number))
        trusted = after_refused_body(trusted, float(number))
    assert trusted.standing is Standing.SUSPECTED
    half = after_probe(suspected(), 1.0, succeeded=True)
    for other in (half, suspected()):
        assert after_refused_body(other, 2.0) == other, "one client's odd request keeps nobody out"


def test_after_a_good_probe_and_a_good_answer_pauses_begin_anew():
    suspicion = suspected()
    for _ in range(5):
        suspicion = after_probe(suspicion, suspicion.probe_at, succeeded=False)
    back = after_success(after_probe(suspicion, suspicion.probe_at, succeeded=True))
    assert (suspicion.failed_probe_count, back) == (5, Suspicion())
    again = after_failure(after_failure(back, 500.0), 500.0)
    assert after_probe(again, 500.0, succeeded=False).probe_at == 500.0 + PROBE_PAUSE_FIRST_SECONDS


def test_attempts_that_ran_before_change_nothing_of_a_suspected_one():
    assert after_failure(suspected(), 5.0) == suspected()
    assert after_success(suspected()) == suspected()


@pytest.mark.parametrize(
    ("http_status", "ended", "fell_short", "kind"),
    [
        (200, True, False, AnswerKind.GOOD),
        (200, False, False, None),  # its client went away
        (200, True, True, AnswerKind.ERROR),
        (None, True, False, AnswerKind.ERROR),
        (None, False, False, None),
        *((status, True, False, AnswerKind.ERROR) for status in (204, 302, 400, 401, 404, 422, 500, 502, 504)),
        (500, False, False, AnswerKind.ERROR),  # one that never ends is one
        (429, True, False, AnswerKind.BUSY),
        (503, False, False, AnswerKind.BUSY),
    ],
)
def test_only_a_whole_200_is_a_good_answer(http_status, ended, fell_short, kind):
    assert kind_of(http_status, ended=ended, fell_short=fell_short) is kind


def doubted(now: float = 0.0) -> Suspicion:
    suspicion = Suspicion()
    for _ in range(ERRORS_MAX + 1):
        suspicion = after_error(suspicion, now)
    return suspicion


def test_errors_bring_a_probe_and_cost_no_trust():
    assert not probe_is_due(after_error(Suspicion(), 0.0), 0.0)
    assert doubted().standing is Standing.TRUSTED
    assert probe_is_due(doubted(), 0.0)
    assert not probe_is_due(after_success(doubted()), 0.0), "it answers, so the requests were at fault"
    assert not probe_is_due(after_error(after_error(Suspicion(), 0.0), WINDOW_SECONDS), WINDOW_SECONDS)


def test_a_doubted_replica_is_suspected_by_the_probes_bad_answer_alone():
    well = after_probe(doubted(), 1.0, succeeded=True)
    assert (well.standing, well.errors_at) == (Standing.TRUSTED, ())
    assert after_probe(doubted(), 1.0, succeeded=False, answered=False) == well, "late, lost, or without a slot"
    bad = after_probe(doubted(), 1.0, succeeded=False)
    assert (bad.standing, bad.probe_at) == (Standing.SUSPECTED, 1.0 + PROBE_PAUSE_FIRST_SECONDS)
    answered_since = after_success(doubted())
    assert after_probe(answered_since, 1.0, succeeded=False) == answered_since


def test_whoever_asks_nonsense_gets_a_healthy_replica_probed_now_and_then():
    again = after_error(after_error(after_probe(doubted(), 1.0, succeeded=True), 1.1), 1.2)
    assert not probe_is_due(again, 1.0 + DOUBT_PAUSE_SECONDS - 0.1)
    assert probe_is_due(again, 1.0 + DOUBT_PAUSE_SECONDS)
    assert not is_forgotten(after_probe(doubted(), 1.0, succeeded=True), 1.1)
    assert is_forgotten(after_probe(doubted(), 1.0, succeeded=True), 1.0 + DOUBT_PAUSE_SECONDS)


def test_an_error_opens_and_closes_nothing():
    half = after_probe(suspected(), 1.0, succeeded=True)
    assert after_error(half, 2.0) == half
    assert after_error(suspected(), 2.0) == suspected()


def test_what_is_held_against_a_trusted_one_is_forgotten_with_the_window():
    once = after_failure(Suspicion(), 10.0)
    assert not is_forgotten(once, 10.0 + WINDOW_SECONDS - 0.1)
    assert is_forgotten(once, 10.0 + WINDOW_SECONDS)
    assert not is_forgotten(suspected(), 1e9), "it has shown nothing yet"


_STEP = st.sampled_from(["failure", "error", "success", "good probe", "bad probe", "no probe"])
_STEPS = st.lists(st.tuples(_STEP, st.floats(0, 100)), max_size=60)


@given(steps=_STEPS)
def test_on_every_way_trust_is_lost_by_two_failures_and_regained_by_a_probe_and_an_answer(steps):
    suspicion, now, way = Suspicion(), 0.0, []
    for step, wait_seconds in steps:
        now += wait_seconds
        before = suspicion
        match step:
            case "failure":
                suspicion = after_failure(suspicion, now)
            case "error":
                suspicion = after_error(suspicion, now)
            case "success":
                suspicion = after_success(suspicion)
            case _ if probe_is_due(suspicion, now):
                suspicion = after_probe(suspicion, now, succeeded=step == "good probe", answered=step != "no probe")
            case _:
                continue
        way.append((before.standing, step, suspicion.standing))
        assert len(suspicion.failed_at) <= 1
        assert len(suspicion.errors_at) <= ERRORS_MAX + 1
        assert suspicion.probe_at - now <= PROBE_PAUSE_MAX_SECONDS
    changes = {(before, step, after) for before, step, after in way if before is not after}
    assert changes <= {
        (Standing.TRUSTED, "failure", Standing.SUSPECTED),
        (Standing.TRUSTED, "bad probe", Standing.SUSPECTED),
        (Standing.SUSPECTED, "good probe", Standing.HALF_OPEN),
        (Standing.HALF_OPEN, "success", Standing.TRUSTED),
        (Standing.HALF_OPEN, "failure", Standing.SUSPECTED),
    }
    assert all(after is not Standing.TRUSTED for before, _, after in way if before is Standing.SUSPECTED)
