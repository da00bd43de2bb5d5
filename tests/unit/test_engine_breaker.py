"""The breaker's schedule, by example; `tests/property/test_engine_breaker.py` has what always holds."""

from __future__ import annotations

from itertools import accumulate

import pytest

from potluck_node.domain.breaker import NO_CRASHES, CrashRecord, after_absence, after_crash, backoff_seconds, pause_seconds


def crashes(*at_seconds: float, record: CrashRecord = NO_CRASHES, healthy_for_seconds: float = 0.0) -> CrashRecord:
    for now_seconds in at_seconds:
        record = after_crash(record, now_seconds, healthy_for_seconds)
    return record


def test_the_pause_doubles_to_a_minute():
    assert [backoff_seconds(count) for count in (0, 1, 2, 3, 6, 7, 5000)] == [1, 1, 2, 4, 32, 60, 60]


@pytest.mark.parametrize(
    ("at_seconds", "pause"),
    [
        ((0,), 1),
        ((0, 2), 2),
        ((0, 2, 5, 10), 8),
        ((0, 2, 5, 10, 20), 60),  # the fifth opens it
        ((0, 150, 300, 450, 600), 60),
        ((0, 150, 300, 450, 601), 16),  # not within ten minutes
        ((0, 2, 5, 10, 20, 81), 120),  # the one start that was tried
        ((0, 2, 5, 10, 20, 81, 202, 443, 924, 1885), 1920),
        ((0, 2, 5, 10, 20, 81, 202, 443, 924, 1885, 3806), 1920),
    ],
)
def test_five_crashes_in_ten_minutes_open_it_for_a_minute_and_each_one_after_for_twice_as_long(at_seconds, pause):
    assert pause_seconds(crashes(*at_seconds)) == pause


def test_five_healthy_minutes_close_it():
    opened = crashes(0, 2, 5, 10, 20, 81, 202)
    assert opened.is_open
    later = crashes(1000, record=opened, healthy_for_seconds=300.0)
    assert (later.is_open, pause_seconds(later)) == (False, 1)
    assert pause_seconds(crashes(1000, record=opened, healthy_for_seconds=299.0)) == 480


def test_healthy_minutes_do_not_wipe_out_crashes_of_the_same_ten_minutes():
    again = crashes(380, record=crashes(0, 2, 5, 10, 20), healthy_for_seconds=300.0)
    assert (again.opened_count, pause_seconds(again)) == (1, 60), "five within ten minutes, and the shortest pause"


def test_what_was_only_away_is_looked_for_ever_more_rarely_and_opens_nothing():
    record, pauses = NO_CRASHES, []
    for _ in range(9):
        record = after_absence(record)
        pauses.append(pause_seconds(record))
    assert (pauses, record.is_open) == ([1, 2, 4, 8, 16, 32, 60, 60, 60], False)
    assert sum(at_seconds <= 600 for at_seconds in accumulate([0, *pauses, *[60] * 10])) == 15, "as the module says of ten minutes"
    assert pause_seconds(after_absence(record, healthy_for_seconds=300.0)) == 1
    crashed = crashes(0, 2, 5, 10)
    assert crashes(20, record=after_absence(crashed)).is_open, "it hides no crash"
