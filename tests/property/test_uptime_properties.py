"""What holds for every history of reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain import uptime
from potluck_coordinator.domain.uptime import Coverage, Verdict, close_minutes, record, split_by_minute

MINUTE = uptime.MINUTE_MS
NODES = ["a", "b", "c", "d", "e", "f"]
reports = st.lists(
    st.tuples(
        st.integers(1, 30_000),  # milliseconds since the report before
        st.dictionaries(st.sampled_from(NODES), st.floats(0, 120)),
        st.booleans(),  # whether minutes are judged after it
    ),
    max_size=60,
)


@given(start_ms=st.integers(0, 10**9), history=reports)
def test_every_whole_minute_is_judged_exactly_once_and_in_order(start_ms, history):
    state, now, minutes = uptime.start(start_ms), start_ms, []
    first = state.next_minute
    for step_ms, covered, judge in history:
        now += step_ms
        state = record(state, [Coverage(node, seconds, now) for node, seconds in covered.items()])
        assert all(seconds <= 60.0 for minute in state.covered_seconds.values() for seconds in minute.values())
        if judge:
            state, judged = close_minutes(state, dict.fromkeys(NODES, 0), now)
            minutes += [minute.minute for minute in judged]
            assert all(set(minute.verdicts) == set(NODES) for minute in judged)
    assert minutes == list(range(first, state.next_minute))
    assert not any(minute < state.next_minute for minute in state.covered_seconds)
    if minutes:
        assert minutes[0] * MINUTE >= start_ms + uptime.START_GRACE_MS
        assert (minutes[-1] + 1) * MINUTE + uptime.REPORT_DELAY_MS <= now


@given(start_ms=st.integers(0, 10**9), history=reports)
def test_a_node_that_was_always_there_is_always_up_whatever_the_others_did(start_ms, history):
    state, now = uptime.start(start_ms), start_ms
    for step_ms, covered, _ in history:
        now += step_ms
        coverages = [Coverage(node, seconds, now) for node, seconds in covered.items() if node != "a"]
        state = record(state, [*coverages, Coverage("a", step_ms / 1000, now)])
    _, judged = close_minutes(state, dict.fromkeys(NODES, 0), now)
    assert {minute.verdicts["a"] for minute in judged} <= {Verdict.UP}


@given(end_ms=st.integers(0, 10**9), seconds=st.floats(0, 600), first=st.integers(0, 20_000))
def test_split_keeps_every_second_from_the_first_minute_on(end_ms, seconds, first):
    pieces = split_by_minute(end_ms, seconds, first)
    begin_ms = max(end_ms - seconds * 1000, first * MINUTE)
    assert abs(sum(piece for _, piece in pieces) - max(0.0, (end_ms - begin_ms) / 1000)) < 1e-6
    assert all(0 < piece <= 60.0 for _, piece in pieces)
    assert [minute for minute, _ in pieces] == sorted({minute for minute, _ in pieces})
