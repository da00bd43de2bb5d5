"""Whether a figure that was sampled over time grows: a line through its floors, with an interval, and a verdict against a bound.

What a process holds goes up and down with what it does just then, and samples taken within seconds of each other say the same thing twice.
So the time is cut into equal spans, and of each only the least value counts: what is held when least goes on. The line is laid through
these floors by least squares, with Student's 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SPAN_COUNT: Final = 12
STUDENT_T: Final = 2.228
"""Of twelve floors, which leave ten degrees of freedom, at 95 %."""
SAMPLES_MIN: Final = 3 * SPAN_COUNT


class Verdict(StrEnum):
    """What the interval says."""

    FLAT = "flat"
    GROWS = "grows"
    UNCLEAR = "unclear"
    """It reaches over the bound and below it: the time was too short."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Per unit of time."""

    value: float
    low: float
    high: float

    def verdict(self, bound: float) -> Verdict:
        """Whether it is surely within the bound, or surely above."""
        if self.high <= bound:
            return Verdict.FLAT
        return Verdict.GROWS if self.low > bound else Verdict.UNCLEAR


def slope(times: Sequence[float], values: Sequence[float]) -> Slope:
    """Of samples in the order of their times, at least three for each of the spans.

    Raises:
        ValueError: for fewer, or where a span has none.
    """
    if len(times) != len(values) or len(times) < SAMPLES_MIN:
        raise ValueError(f"{len(times)} times and {len(values)} values give no slope; it takes {SAMPLES_MIN}")
    middles, floors = _floors(times, values)
    middle_time, middle_floor = sum(middles) / SPAN_COUNT, sum(floors) / SPAN_COUNT
    spread = sum((time - middle_time) ** 2 for time in middles)
    found = sum((time - middle_time) * (floor - middle_floor) for time, floor in zip(middles, floors, strict=True)) / spread
    rest = sum((floor - middle_floor - found * (time - middle_time)) ** 2 for time, floor in zip(middles, floors, strict=True))
    error = STUDENT_T * math.sqrt(rest / (SPAN_COUNT - 2) / spread)
    return Slope(found, found - error, found + error)


def _floors(times: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    began_at, span = times[0], (times[-1] - times[0]) / SPAN_COUNT
    if span <= 0:
        raise ValueError("all samples are of the same moment")
    spans: list[list[float]] = [[] for _ in range(SPAN_COUNT)]
    for time, value in zip(times, values, strict=True):
        spans[min(int((time - began_at) / span), SPAN_COUNT - 1)].append(value)
    if not all(spans):
        raise ValueError("the samples leave a span of the time empty")
    return [began_at + span * (number + 0.5) for number in range(SPAN_COUNT)], [min(one) for one in spans]
