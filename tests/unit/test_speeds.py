"""What attempts teach of a replica's speeds, of its node's absences, and of a model's requests."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain import forecast, survival
from potluck_coordinator.domain.forecast import Forecast
from potluck_coordinator.domain.speeds import (
    DECODE_TOKENS_PER_SECOND_BOUNDS,
    PREFILL_TOKENS_PER_SECOND_BOUNDS,
    AttemptTimes,
    ReadTogether,
    Speeds,
    learned,
    learned_in_one_piece,
    prior,
    read_together,
)
from potluck_coordinator.domain.survival import GUESS_HOURS, LOSSES_PER_HOUR_GUESS, LOSSES_PER_HOUR_MAX, History, losses_per_second


def attempt(speeds, read=1000.0, batch=1.0, answer=101):
    """As it would be seen of a replica of such speeds."""
    token_seconds = speeds.decode_seconds(batch)
    return AttemptTimes(read, read / speeds.prefill_tokens_per_second + token_seconds, answer, (answer - 1) * token_seconds, batch)


def after(known, true, count, batches=(1.0,), every_seconds=5.0):
    now = known.learned_at_seconds
    for number in range(count):
        now += every_seconds
        known = learned(known, attempt(true, batch=batches[number % len(batches)]), now)
    return known


def test_learning_begins_with_the_nodes_own_word_within_bounds():
    speeds = prior(2000.0, 50.0)
    assert speeds.prefill_tokens_per_second == 2000.0
    assert speeds.decode_seconds(1) == pytest.approx(1 / 50)
    boast, silence = prior(1e12, 1e12), prior(None, None)
    assert boast.prefill_tokens_per_second == PREFILL_TOKENS_PER_SECOND_BOUNDS[1]
    assert boast.decode_seconds(1) == pytest.approx(1 / DECODE_TOKENS_PER_SECOND_BOUNDS[1])
    assert silence.prefill_tokens_per_second > 0
    assert prior(0.0, -3.0).decode_seconds(1) > 0


def test_a_word_that_was_too_good_is_known_for_that_after_few_attempts():
    true, boast = Speeds(500.0, 0.04, 0.002), prior(1e12, 1e12)
    known = after(boast, true, 5)
    assert known.prefill_tokens_per_second < 1.1 * true.prefill_tokens_per_second
    assert known.decode_seconds(1) > 0.9 * true.decode_seconds(1)


def test_slower_is_believed_sooner_than_faster():
    fast, slow = Speeds(1000.0, 0.02, 0.001, 50, 50), Speeds(400.0, 0.05, 0.001, 50, 50)
    heated, cooled = learned(fast, attempt(slow), 0.1), learned(slow, attempt(fast), 0.1)

    def share(before, now, target):
        return (now - before) / (target - before)

    for read in (lambda speeds: 1 / speeds.prefill_tokens_per_second, lambda speeds: speeds.decode_seconds(1)):
        down, up = share(read(fast), read(heated), read(slow)), share(read(slow), read(cooled), read(fast))
        assert 0.4 < down < 0.6
        assert 0.05 < up < 0.15


def test_what_is_old_gives_way():
    slow, fast = Speeds(400.0, 0.05, 0.001, 50, 50), Speeds(1000.0, 0.02, 0.001, 50, 50)
    soon, later = learned(slow, attempt(fast), 1.0), learned(slow, attempt(fast), 60.0)
    assert soon.prefill_tokens_per_second * 1.4 < later.prefill_tokens_per_second


@pytest.mark.parametrize("true", [Speeds(700.0, 0.02, 0.002), Speeds(3000.0, 0.01, 0.0005), Speeds(90.0, 0.08, 0.01)])
def test_different_batches_tell_the_base_from_the_slope(true):
    known = after(prior(None, None), true, 120, batches=(1.0, 4.0, 12.0, 2.0, 8.0))
    assert known.prefill_tokens_per_second == pytest.approx(true.prefill_tokens_per_second, rel=0.05)
    for batch in (1.0, 6.0, 12.0):
        assert known.decode_seconds(batch) == pytest.approx(true.decode_seconds(batch), rel=0.1)


@pytest.mark.parametrize(
    "seen",
    [
        AttemptTimes(10.0, 0.2, 1, 0.0, 1.0),
        AttemptTimes(500.0, 0.0, 3, 1.0, 1.0),
        AttemptTimes(0.0, -1.0, 50, -1.0, 1.0),
        AttemptTimes(0.0, 1.0, 0, 0.0, 1.0),
    ],
)
def test_what_says_nothing_teaches_nothing(seen):
    known = prior(None, None)
    assert learned(known, seen, 5.0) is known


@given(
    st.lists(
        st.tuples(st.floats(0, 1e7), st.floats(-10, 1e6), st.integers(0, 10**6), st.floats(-10, 1e6), st.floats(1, 512), st.floats(0, 1e6)),
        max_size=30,
    )
)
def test_whatever_was_seen_speeds_stay_within_bounds(attempts):
    known, now = prior(None, None), 0.0
    for read, first, answer, seconds, batch, pause in attempts:
        now += pause
        known = learned(known, AttemptTimes(read, first, answer, seconds, batch), now)
        least, most = PREFILL_TOKENS_PER_SECOND_BOUNDS
        assert least * 0.999 <= known.prefill_tokens_per_second <= most * 1.001
        assert 0 < known.decode_seconds(1) < 100
        assert known.decode_each_seconds >= 0


@pytest.mark.parametrize(
    ("read_tokens", "seconds", "faster"),
    [
        (2000.0, 0.5, True),
        (2000.0, 2.0, False),  # it may have been read in a moment, and written for long
        (0.0, 0.0, False),
        (1e9, -1.0, True),
    ],
)
def test_an_answer_in_one_piece_shows_only_that_a_replica_is_faster(read_tokens, seconds, faster):
    known = prior(1000.0, None)
    then = learned_in_one_piece(known, read_tokens, seconds)
    assert (then.prefill_tokens_per_second > 1000.0) is faster
    assert then._replace(prefill_tokens_per_second=1000.0, prefill_sample_count=0) == known


@given(st.lists(st.tuples(st.floats(0, 1e7), st.floats(-10, 1e6)), min_size=1, max_size=30))
def test_no_more_is_believed_than_some_answer_in_one_piece_has_shown(answers):
    before = known = prior(None, None)
    for read, seconds in answers:
        before, known = known, learned_in_one_piece(known, read, seconds)
        assert known.prefill_tokens_per_second >= before.prefill_tokens_per_second
    shown = max(read / max(seconds, 1e-4) for read, seconds in answers)
    believed = max(prior(None, None).prefill_tokens_per_second, min(shown, PREFILL_TOKENS_PER_SECOND_BOUNDS[1]))
    assert known.prefill_tokens_per_second <= believed * 1.001


def test_a_model_that_always_answers_in_one_piece_is_known_after_some_answers():
    known = prior(None, None)
    for _ in range(40):
        known = learned_in_one_piece(known, 4000.0, 0.5)
    assert known.prefill_tokens_per_second == pytest.approx(8000.0, rel=0.1)


def in_one_piece_at(reads_per_second, requests):
    """What a replica that reads one prompt after the other shows with each end: tokens and seconds of that one alone, and together."""
    together, free_at = ReadTogether(), 0.0
    for began_at, tokens in requests:
        free_at = now = max(free_at, began_at) + tokens / reads_per_second
        together = read_together(together, tokens, began_at, now)
        yield (tokens, now - began_at), (together.tokens, now - together.since_seconds)


@given(
    st.floats(10, 30_000),
    st.lists(st.tuples(st.floats(0, 2), st.floats(1, 20_000)), min_size=1, max_size=60),
)
def test_answers_in_one_piece_together_never_show_more_than_was_read(reads_per_second, pauses_and_tokens):
    began_at = accumulate(pause for pause, _ in pauses_and_tokens)
    requests = zip(began_at, (tokens for _, tokens in pauses_and_tokens), strict=True)
    for _, (tokens, seconds) in in_one_piece_at(reads_per_second, requests):
        assert tokens <= reads_per_second * seconds * (1 + 1e-9)


def test_answers_in_one_piece_that_are_asked_for_at_once_show_together_what_each_alone_does_not():
    """Thirty-two clients, each of which asks anew as soon as it is answered, of a replica that reads 16,000 tokens a second."""
    requests = [(max(0, number - 31) * 0.01, 160.0) for number in range(2000)]
    alone, together = zip(*list(in_one_piece_at(16_000.0, requests))[-500:], strict=True)
    assert max(tokens / seconds for tokens, seconds in alone) < 600
    assert max(tokens / seconds for tokens, seconds in together if seconds) > 12_000


def per_hour(whole, this_hour):
    return losses_per_second(whole, this_hour) * 3600


def test_of_an_unknown_node_the_usual_is_believed():
    assert per_hour(History(), History()) == pytest.approx(LOSSES_PER_HOUR_GUESS)


def test_a_node_that_never_left_is_believed_more_from_week_to_week():
    weeks = [per_hour(History(hours * 60), History(min(hours // 84, 16) * 60)) for hours in (0, 168, 8 * 168)]
    assert weeks[0] > weeks[1] > weeks[2]
    assert weeks[2] < LOSSES_PER_HOUR_GUESS / 20


def test_a_node_that_serves_by_night_is_not_expected_to_stay_in_the_morning():
    """Twelve hours a day for eight weeks; it goes at seven."""
    whole = History(8 * 84 * 60, 8 * 84 * 60, 8 * 14)
    night, seven, noon = History(16 * 60), History(8 * 60 + 240, 240 + 240, 8), History(0, 16 * 60)
    hourly = [per_hour(whole, hour) for hour in (night, seven, noon)]
    assert hourly[0] < 1 / 12 < hourly[1] < hourly[2] <= LOSSES_PER_HOUR_MAX


@given(
    st.builds(History, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 2000)),
    st.builds(History, st.integers(0, 960), st.integers(0, 960), st.integers(0, 16)),
)
def test_losses_are_a_rate_within_bounds(whole, this_hour):
    assert 0 < per_hour(whole, this_hour) <= LOSSES_PER_HOUR_MAX * 1.0001


def test_hours_of_the_week_repeat_after_a_week():
    assert survival.hour_of_week(0) == survival.hour_of_week(7 * 24 * 3_600_000) == 0
    assert survival.hour_of_week(3_600_000 * 169 + 5) == 1
    assert GUESS_HOURS > 0


def test_a_model_whose_prompts_are_written_otherwise_is_foreseen_so_after_some():
    known = Forecast()
    for _ in range(60):
        known = forecast.learned(known, 6000, 3000, 40.0)
    assert known.bytes_per_token == pytest.approx(2.0, rel=0.05)
    assert known.answer_tokens == pytest.approx(40.0, rel=0.05)


def test_an_engine_that_counts_more_tokens_than_bytes_is_not_believed():
    assert forecast.learned(Forecast(), 1000, 10**9, 5.0).prompt_tokens <= 1000
    assert forecast.learned(Forecast(), 1000, -5, -5.0).answer_tokens >= 0
