"""A replica that fails twice gets nothing until it has shown that it works again: the steps, and what holds on every way through them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.suspicion import (
    PROBE_PAUSE_MAX_SECONDS,
    REFUSALS_APART_SECONDS,
    REFUSALS_MAX,
    WINDOW_SECONDS,
    Standing,
    Suspicion,
    after_failure,
    after_probe,
    after_refusal,
    after_success,
    is_forgotten,
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


def test_attempts_that_ran_before_change_nothing_of_a_suspected_one():
    assert after_failure(suspected(), 5.0) == suspected()
    assert after_success(suspected()) == suspected()


def test_what_is_held_against_a_trusted_one_is_forgotten_with_the_window():
    once = after_failure(Suspicion(), 10.0)
    assert not is_forgotten(once, 10.0 + WINDOW_SECONDS - 0.1)
    assert is_forgotten(once, 10.0 + WINDOW_SECONDS)
    assert not is_forgotten(suspected(), 1e9), "it has shown nothing yet"


_STEPS = st.lists(st.tuples(st.sampled_from(["failure", "success", "good probe", "bad probe"]), st.floats(0, 100)), max_size=60)


@given(steps=_STEPS)
def test_on_every_way_trust_is_lost_by_two_failures_and_regained_by_a_probe_and_an_answer(steps):
    suspicion, now, way = Suspicion(), 0.0, []
    for step, wait_seconds in steps:
        now += wait_seconds
        before = suspicion
        match step:
            case "failure":
                suspicion = after_failure(suspicion, now)
            case "success":
                suspicion = after_success(suspicion)
            case _ if probe_is_due(suspicion, now):
                suspicion = after_probe(suspicion, now, succeeded=step == "good probe")
            case _:
                continue
        way.append((before.standing, step, suspicion.standing))
        assert len(suspicion.failed_at) <= 1
        assert suspicion.probe_at - now <= PROBE_PAUSE_MAX_SECONDS
    changes = {(before, step, after) for before, step, after in way if before is not after}
    assert changes <= {
        (Standing.TRUSTED, "failure", Standing.SUSPECTED),
        (Standing.SUSPECTED, "good probe", Standing.HALF_OPEN),
        (Standing.HALF_OPEN, "success", Standing.TRUSTED),
        (Standing.HALF_OPEN, "failure", Standing.SUSPECTED),
    }
    assert all(after is not Standing.TRUSTED for before, _, after in way if before is Standing.SUSPECTED)
