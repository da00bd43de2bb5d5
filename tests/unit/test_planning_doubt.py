"""Nodes that went together are not planned away for as long as the coordinator may be the one that is cut off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.nodes import DOUBT_SECONDS_MAX, MASS_SILENCE_COUNT_MIN
from potluck_coordinator.domain.planning.doubt import TOGETHER_SECONDS, apparent_absences


def gone(count: int, at: float, name: str = "n") -> dict:
    return {f"{name}{number}": at for number in range(count)}


def test_many_that_went_together_count_as_just_gone_until_doubt_ends():
    silent = gone(6, 100.0)
    assert apparent_absences(silent, silent, 4, 400.0) == gone(6, 400.0)
    assert apparent_absences(silent, silent, 4, 100.0 + DOUBT_SECONDS_MAX) == silent


def test_few_of_many_count_as_they_are():
    silent = gone(4, 100.0)
    assert apparent_absences(silent, silent, 10, 300.0) == silent
    assert apparent_absences(silent, silent, 9, 300.0) == gone(4, 300.0)


def test_homes_that_go_one_by_one_are_no_blackout_however_many_they_are():
    silent = {f"n{number}": number * TOGETHER_SECONDS / 3 for number in range(30)}
    assert apparent_absences(silent, silent, 20, 400.0) == silent


def test_owners_who_said_goodbye_or_paused_are_believed():
    away = gone(9, 100.0)
    assert apparent_absences(away, {}, 1, 300.0) == away
    few = gone(2, 100.0)
    assert apparent_absences(away, few, 1, 300.0) == away


@given(
    times=st.lists(st.floats(0, 900), max_size=40),
    present_count=st.integers(0, 60),
    wait_seconds=st.floats(0, 900),
)
def test_an_absence_is_only_ever_made_younger_and_only_in_company(times, present_count, wait_seconds):
    silent = {f"n{number}": at for number, at in enumerate(times)}
    now = max(times, default=0.0) + wait_seconds
    apparent = apparent_absences(silent, silent, present_count, now)
    doubted = {node_id for node_id in silent if apparent[node_id] != silent[node_id]}
    assert all(apparent[node_id] == now for node_id in doubted)
    company = [node_id for node_id in silent if apparent[node_id] == now]
    assert not doubted or len(company) >= MASS_SILENCE_COUNT_MIN
    assert all(now - silent[node_id] < DOUBT_SECONDS_MAX + TOGETHER_SECONDS for node_id in doubted)
    assert apparent.keys() == silent.keys()
