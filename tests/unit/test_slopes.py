"""What counts as growing in a soak."""

from __future__ import annotations

import random

import pytest

from tests.support.slopes import slope


def test_a_steady_climb_is_found_and_noise_around_a_level_is_not():
    draw = random.Random(3)
    times = [number / 10 for number in range(100)]
    climb = slope(times, [2 * time + draw.gauss(0, 1) for time in times])
    assert climb.low < 2 < climb.high
    assert climb.grows(1.0)
    level = slope(times, [50 + draw.gauss(0, 1) for _ in times])
    assert not level.grows(0.1)


def test_a_climb_under_its_bound_is_let_pass_and_a_fall_is_no_growth():
    times = [float(number) for number in range(20)]
    assert not slope(times, [0.1 * time for time in times]).grows(0.5)
    assert slope(times, [0.1 * time for time in times]).grows(0.05)
    assert not slope(times, [-time for time in times]).grows(0.0)


@pytest.mark.parametrize(("times", "values"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0], [1.0, 2.0])])
def test_too_little_gives_no_slope(times, values):
    with pytest.raises(ValueError, match=r"slope|moment"):
        slope(times, values)
