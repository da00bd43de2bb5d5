"""A replica that is far slower than it used to be gets less, or nothing for a while, and is measured by nobody but itself."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.slowness import (
    DAYS_MAX,
    DRAINED_MINUTES,
    MINUTES_IN_A_ROW,
    Pace,
    PaceBook,
    after_minute,
    day_median,
    day_of,
    pace_words,
    usual_tokens_per_second,
)

DAY = 24 * 60
NOW = 20_000 * DAY


def known(speed: float = 80.0, days: int = 7) -> PaceBook:
    return PaceBook(days={day_of(NOW) - number: speed for number in range(1, days + 1)}, today=day_of(NOW))


def after(book: PaceBook, *speeds: float | None, begin: int = NOW) -> PaceBook:
    for number, speed in enumerate(speeds):
        book = after_minute(book, begin + number, speed)
    return book


@pytest.mark.parametrize(
    ("speeds", "pace"),
    [
        ([41.0] * 5, Pace.USUAL),
        ([39.0] * 2, Pace.USUAL),
        ([39.0] * 3, Pace.SLOW),
        ([39.0, 41.0] * 5, Pace.USUAL),
        ([39.0, None, None, 39.0, 39.0], Pace.SLOW),
        ([39.0, 39.0, 15.0], Pace.SLOW),
        ([15.0] * 2, Pace.USUAL),
        ([15.0] * 3, Pace.DRAINED),
        ([17.0] * 9, Pace.SLOW),
        ([39.0] * 3 + [80.0], Pace.USUAL),
        ([15.0] * 3 + [80.0], Pace.DRAINED),
    ],
)
def test_three_minutes_in_a_row_make_a_pace(speeds, pace):
    assert after(known(), *speeds).pace is pace


def test_a_replica_without_an_earlier_day_is_never_slow():
    assert after(PaceBook(today=day_of(NOW)), *[80.0] * 60, *[1.0] * 60).pace is Pace.USUAL


def test_a_drained_replica_is_tried_again_after_ten_minutes_and_drained_again_if_it_is_as_slow():
    drained = after(known(), *[15.0] * 3)
    began = NOW + 2
    assert after(drained, *[None] * (DRAINED_MINUTES - 1), begin=began + 1).pace is Pace.DRAINED
    tried = after(drained, *[None] * DRAINED_MINUTES, begin=began + 1)
    assert tried.pace is Pace.SLOW
    assert after(tried, *[15.0] * 2, begin=NOW + 20).pace is Pace.SLOW
    assert after(tried, *[15.0] * 3, begin=NOW + 20).pace is Pace.DRAINED
    assert after(tried, 80.0, begin=NOW + 20).pace is Pace.USUAL


def test_the_reason_names_both_speeds():
    assert pace_words(after(known(), *[12.0] * 3)) == "slow: 12.0 tokens/s, where 80.0 are usual of it"
    assert pace_words(after(known(), *[39.0] * 3)) == ""


@pytest.mark.parametrize(
    ("known_days", "begin", "later"),
    [
        ((1,), NOW + DAY - 3, [None] * 9),
        ((1,), NOW + DAY - 3, [None, 3.0, None, 90.0]),
        ((7,), NOW + DAY - 3, [None] * 9),
        ((7,), NOW + DAY - 4, [14.0] * 9),
        ((1, 2, 3), NOW, [90.0] * 9),
    ],
)
def test_a_drain_goes_on_over_midnight_with_the_words_it_began_with(known_days, begin, later):
    drained = after(PaceBook(days={day_of(NOW) - number: 80.0 for number in known_days}, today=day_of(NOW)), *[12.0] * 3, begin=begin)
    for number in range(1, len(later) + 1):
        book = after(drained, *later[:number], begin=begin + 3)
        assert (book.pace, pace_words(book)) == (Pace.DRAINED, "slow: 12.0 tokens/s, where 80.0 are usual of it")
    ended = after(drained, *later, *[None] * (DRAINED_MINUTES - len(later)), begin=begin + 3)
    assert (ended.pace, pace_words(ended)) == (Pace.SLOW, "")


def test_a_slow_day_does_not_excuse_itself_and_four_slow_days_are_the_new_usual():
    book = known(80.0)
    paces = []
    for day in range(6):
        book = after(book, *[30.0] * 60, begin=NOW + day * DAY)
        paces.append(book.pace)
    assert paces == [Pace.SLOW] * 4 + [Pace.USUAL] * 2


def test_days_with_a_handful_of_answers_say_nothing():
    book = after(PaceBook(today=day_of(NOW)), *[80.0] * 9)
    assert day_median(book) is None
    assert usual_tokens_per_second(after_minute(book, NOW + DAY, None)) is None
    assert usual_tokens_per_second(after_minute(after(book, 80.0, begin=NOW + 9), NOW + DAY, None)) == 80.0


@given(
    usual=st.floats(1, 500),
    known_days=st.sets(st.integers(1, DAYS_MAX), min_size=1),
    begin=st.integers(NOW, NOW + DAY - 1) | st.integers(NOW + DAY - 15, NOW + DAY - 1),
    shares=st.lists(st.none() | st.sampled_from([0.1, 0.15, 0.3, 1.0]), max_size=40),
    waits_minutes=st.lists(st.sampled_from([1, 1, 1, 2, 9, DAY, 8 * DAY, -DAY]), min_size=40, max_size=40),
)
def test_whenever_a_replica_is_drained_there_are_words_for_it(usual, known_days, begin, shares, waits_minutes):
    book = PaceBook(days={day_of(NOW) - number: usual for number in known_days}, today=day_of(NOW))
    book, minute = after(book, *[usual / 10] * 3, begin=begin), begin + 2
    for share, wait_minutes in zip(shares, waits_minutes, strict=False):
        assert bool(pace_words(book)) is (book.pace is Pace.DRAINED)
        minute += wait_minutes
        book = after_minute(book, minute, None if share is None else usual * share)


@given(
    days=st.dictionaries(st.integers(day_of(NOW) - 12, day_of(NOW) - 1), st.floats(0.1, 500), max_size=12),
    steps=st.lists(st.tuples(st.integers(1, 3 * DAY), st.none() | st.floats(0.1, 500)), max_size=60),
)
def test_on_every_way_what_is_usual_is_of_the_last_seven_days_and_a_pace_has_its_reason(days, steps):
    book, minute = PaceBook(days=days, today=day_of(NOW)), NOW
    for wait_minutes, speed in steps:
        minute += wait_minutes
        before = book.pace
        book = after_minute(book, minute, speed)
        assert all(day_of(minute) - DAYS_MAX <= day < day_of(minute) for day in book.days if day_of(minute) != day_of(NOW))
        recent = [known for day, known in book.days.items() if day_of(minute) - DAYS_MAX <= day < day_of(minute)]
        assert usual_tokens_per_second(book) == (median(recent) if recent else None)
        assert bool(pace_words(book)) is (book.pace is Pace.DRAINED)
        if book.pace is Pace.DRAINED and before is not Pace.DRAINED:
            assert book.crawling_minute_count >= MINUTES_IN_A_ROW
        if book.pace is Pace.SLOW and before is Pace.USUAL:
            assert book.slow_minute_count >= MINUTES_IN_A_ROW
