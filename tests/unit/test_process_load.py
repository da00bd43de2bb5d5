"""The share of a core that a process spends."""

from __future__ import annotations

import pytest

from potluck_coordinator.gateway.process_load import ProcessLoad


def test_a_steady_load_is_found_within_some_seconds_and_one_busy_second_says_little():
    load = ProcessLoad()
    cpu_seconds = 0.0
    for second in range(20):
        assert load.note(cpu_seconds, float(second)) <= 0.5
        cpu_seconds += 0.5
    assert load.share == pytest.approx(0.5, abs=0.02)
    assert load.note(cpu_seconds + 1.5, 20.0) < 0.85


def test_a_second_note_at_the_same_moment_changes_nothing():
    load = ProcessLoad()
    load.note(0.0, 1.0)
    assert load.note(1.0, 2.0) == load.note(1.0, 2.0)
