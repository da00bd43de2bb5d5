"""What counts as growing in a soak."""

from __future__ import annotations

import random

import pytest

from tests.support.slopes import SAMPLES_MIN, Verdict, slope

TIMES = [number / 30 for number in range(150)]
"""Of five minutes, every two seconds."""


def held(draw: random.Random, *, leak_a_minute: float = 0.0, level: float = 80.0) -> list[float]:
    """As a process's descriptors: a level, on it what goes on just then, which lasts a while, and what leaks, piece by piece."""
    values, busy, lost = [], 0.0, 0
    for _ in TIMES:
        busy = max(0.0, 0.8 * busy + draw.gauss(1, 2))
        lost += draw.random() < leak_a_minute / 30
        values.append(level + round(busy) + lost)
    return values


def test_a_leak_is_found_and_what_only_comes_and_goes_is_not():
    seeds = range(40)
    leaking = [slope(TIMES, held(random.Random(seed), leak_a_minute=5.0)).verdict(2.0) for seed in seeds]
    level = [slope(TIMES, held(random.Random(seed))).verdict(2.0) for seed in seeds]
    assert leaking.count(Verdict.FLAT) == 0
    assert leaking.count(Verdict.GROWS) >= 36
    assert level.count(Verdict.GROWS) == 0
    assert level.count(Verdict.FLAT) >= 36


def test_the_interval_has_the_slope_in_it_about_as_often_as_it_says():
    """Also where what goes on lasts longer than the time from sample to sample: a line through the samples would be too sure of itself."""
    found = [slope(TIMES, [3 * time + value for time, value in zip(TIMES, held(random.Random(seed)), strict=True)]) for seed in range(200)]
    assert sum(one.low <= 3.0 <= one.high for one in found) >= 180


def test_what_settles_within_the_warm_up_is_flat_and_what_goes_on_settling_is_not():
    settled = [100 - 20 * 0.5 ** (time * 4) for time in TIMES]
    after = [time for time in TIMES if time >= TIMES[-1] / 3]
    assert slope(after, settled[-len(after) :]).verdict(0.5) is Verdict.FLAT
    assert slope(TIMES, [100 + 10 * time**0.5 for time in TIMES]).verdict(1.0) is Verdict.GROWS


def test_a_fall_is_no_growth_and_too_wide_an_interval_is_neither():
    assert slope(TIMES, [-time for time in TIMES]).verdict(0.0) is Verdict.FLAT
    draw = random.Random(3)
    assert slope(TIMES, [draw.gauss(0, 100) for _ in TIMES]).verdict(1.0) is Verdict.UNCLEAR


@pytest.mark.parametrize(
    ("times", "values"),
    [
        (TIMES[: SAMPLES_MIN - 1], TIMES[: SAMPLES_MIN - 1]),
        ([1.0] * SAMPLES_MIN, [1.0] * SAMPLES_MIN),
        (TIMES, TIMES[1:]),
        ([*(time / 100 for time in TIMES), 100.0], [0.0, *TIMES]),
    ],
    ids=["too few", "one moment", "not as many", "a gap"],
)
def test_too_little_gives_no_slope(times, values):
    with pytest.raises(ValueError, match=r"slope|moment|span"):
        slope(times, values)
