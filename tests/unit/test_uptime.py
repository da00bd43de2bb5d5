"""Which minutes count as up, down or nobody's."""

from __future__ import annotations

import pytest

from potluck_coordinator.domain import uptime
from potluck_coordinator.domain.uptime import Coverage, Verdict, close_minutes, record, split_by_minute

MINUTE = uptime.MINUTE_MS
START = 1_000 * MINUTE
FIRST = 1_001  # the first whole minute after a start at the top of minute 1000
UP, DOWN, UNKNOWN = Verdict.UP, Verdict.DOWN, Verdict.UNKNOWN


def watch(seconds_by_node_and_minute, minute_count, enrolled_at_ms=None, state=None):
    """Runs minutes in which each node is covered for the seconds given (60 unless told), reported at each minute's end."""
    nodes = sorted({node for node, _ in seconds_by_node_and_minute} | set(enrolled_at_ms or {}))
    enrolled = dict.fromkeys(nodes, 0) | (enrolled_at_ms or {})
    state = state or uptime.start(START)
    judged = []
    first = state.next_minute
    for minute in range(first, first + minute_count):
        coverages = [Coverage(node, seconds_by_node_and_minute.get((node, minute - first), 60.0), (minute + 1) * MINUTE) for node in nodes]
        state = record(state, coverages)
        state, closed = close_minutes(state, enrolled, (minute + 1) * MINUTE + uptime.REPORT_DELAY_MS)
        judged += closed
    return [dict(minute.verdicts) for minute in judged]


@pytest.mark.parametrize(("seconds", "verdict"), [(60.0, UP), (50.0, UP), (49.9, DOWN), (0.0, DOWN)])
def test_a_minute_is_up_from_ten_heartbeats_of_twelve(seconds, verdict):
    assert watch({("a", 0): seconds}, 1) == [{"a": verdict}]


@pytest.mark.parametrize(
    ("start_ms", "first_minute"), [(START, FIRST), (START + 1, FIRST + 1), (START + MINUTE - 1, FIRST + 1), (START + MINUTE, FIRST + 1)]
)
def test_the_first_minute_after_a_start_is_nobodys(start_ms, first_minute):
    assert uptime.start(start_ms).next_minute == first_minute
    assert first_minute * MINUTE >= start_ms + uptime.START_GRACE_MS


@pytest.mark.parametrize(
    ("end_ms", "seconds", "first_minute", "expected"),
    [
        (60_000, 60.0, 0, ((0, 60.0),)),
        (65_000, 10.0, 0, ((0, 5.0), (1, 5.0))),
        (185_000, 130.0, 0, ((0, 5.0), (1, 60.0), (2, 60.0), (3, 5.0))),
        (185_000, 130.0, 3, ((3, 5.0),)),
        (185_000, 0.0, 0, ()),
        (59_000, 10.0, 5, ()),
    ],
)
def test_split_by_minute(end_ms, seconds, first_minute, expected):
    assert split_by_minute(end_ms, seconds, first_minute) == expected


@pytest.mark.parametrize(("seconds", "unwatched"), [(0, False), (1, False), (9, False), (11, True), (59, True), (3600, True)])
def test_after_ten_seconds_without_a_report_nobody_watched(seconds, unwatched):
    assert uptime.went_unwatched(START, START + seconds * 1000) is unwatched


def test_two_sessions_of_one_node_do_not_add_up_beyond_the_minute():
    state = uptime.start(START)
    for _ in range(5):
        state = record(state, [Coverage("a", 30.0, (FIRST + 1) * MINUTE)])
    assert state.covered_seconds[FIRST]["a"] == 60.0


def test_a_minute_is_judged_once_and_not_before_its_last_report_can_have_come():
    state = record(uptime.start(START), [Coverage("a", 60.0, (FIRST + 1) * MINUTE)])
    state, judged = close_minutes(state, {"a": 0}, (FIRST + 1) * MINUTE + uptime.REPORT_DELAY_MS - 1)
    assert judged == ()
    state, judged = close_minutes(state, {"a": 0}, (FIRST + 1) * MINUTE + uptime.REPORT_DELAY_MS)
    assert [minute.minute for minute in judged] == [FIRST]
    state = record(state, [Coverage("a", 3600.0, (FIRST + 1) * MINUTE + 20_000)])
    assert set(state.covered_seconds) == {FIRST + 1}
    assert close_minutes(state, {"a": 0}, (FIRST + 1) * MINUTE + uptime.REPORT_DELAY_MS)[1] == ()


def test_the_minute_of_enrolment_does_not_count():
    verdicts = watch({("late", 0): 5.0, ("late", 1): 60.0}, 2, {"late": FIRST * MINUTE + 1})
    assert verdicts == [{}, {"late": UP}]


def test_one_node_alone_in_the_pool_can_be_down():
    assert watch({("a", 1): 0.0}, 3) == [{"a": UP}, {"a": DOWN}, {"a": UP}]


def test_many_nodes_silent_together_are_the_coordinators_trouble():
    nodes = [f"n{index}" for index in range(10)]
    silent = {(node, 1): 0.0 for node in nodes[:4]}
    first, second, third = watch(silent, 3, dict.fromkeys(nodes, 0))
    assert set(first.values()) == set(third.values()) == {UP}
    assert second == {node: UNKNOWN if node in nodes[:4] else UP for node in nodes}


def test_three_of_ten_are_their_own_trouble():
    nodes = [f"n{index}" for index in range(10)]
    verdicts = watch({(node, 1): 0.0 for node in nodes[:3]}, 2, dict.fromkeys(nodes, 0))
    assert [verdicts[1][node] for node in nodes[:4]] == [DOWN, DOWN, DOWN, UP]


def test_a_long_mass_silence_of_some_is_believed_at_last_but_one_of_all_never():
    nodes = [f"n{index}" for index in range(10)]
    minutes = uptime.MASS_SILENCE_MINUTES_MAX + 3
    some = watch({(node, minute): 0.0 for node in nodes[:5] for minute in range(1, minutes)}, minutes, dict.fromkeys(nodes, 0))
    assert [verdicts["n0"] for verdicts in some] == [UP] + [UNKNOWN] * uptime.MASS_SILENCE_MINUTES_MAX + [DOWN, DOWN]
    everyone = watch({(node, minute): 0.0 for node in nodes for minute in range(1, minutes)}, minutes, dict.fromkeys(nodes, 0))
    assert {verdicts["n0"] for verdicts in everyone[1:]} == {UNKNOWN}


@pytest.mark.parametrize(
    ("elapsed_ms", "up", "down", "unknown"), [(0, 0, 0, 0), (59_999, 0, 0, 0), (10 * MINUTE, 4, 1, 5), (MINUTE, 2, 0, 0), (-5, 0, 0, 0)]
)
def test_unknown_minutes(elapsed_ms, up, down, unknown):
    assert uptime.unknown_minutes(START, START + elapsed_ms, up, down) == unknown
