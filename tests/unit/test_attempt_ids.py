"""Names of attempts: one for each, in the order of their coming."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.gateway.attempt_ids import new_attempt_id

LAST_UNIX_MS = 16**11 - 1
"""In the year 2527."""


@given(st.lists(st.integers(0, LAST_UNIX_MS), unique=True))
def test_later_names_sort_behind_earlier_ones(times: list[int]) -> None:
    made = {time: new_attempt_id(time) for time in times}
    assert sorted(times) == sorted(times, key=made.__getitem__)


def test_of_one_millisecond_no_two_are_alike() -> None:
    assert len({new_attempt_id(1_750_000_000_000) for _ in range(10_000)}) == 10_000
