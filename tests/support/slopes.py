"""Whether a figure that was sampled over time grows: the least-squares slope with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STUDENT_T = 2.0
"""Of some dozens of samples, at 95 %."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Per unit of time."""

    value: float
    low: float
    high: float

    def grows(self, bound: float) -> bool:
        """Whether it is surely above nothing, and may be above the bound."""
        return self.low > 0 and self.high > bound


def slope(times: Sequence[float], values: Sequence[float]) -> Slope:
    """Of at least three samples at different times."""
    count = len(times)
    if count != len(values) or count < 3:
        raise ValueError(f"{count} times and {len(values)} values give no slope")
    middle_time, middle_value = sum(times) / count, sum(values) / count
    spread = sum((time - middle_time) ** 2 for time in times)
    if not spread:
        raise ValueError("all samples are of the same moment")
    found = sum((time - middle_time) * (value - middle_value) for time, value in zip(times, values, strict=True)) / spread
    rest = sum((value - middle_value - found * (time - middle_time)) ** 2 for time, value in zip(times, values, strict=True))
    error = math.sqrt(rest / (count - 2) / spread)
    return Slope(found, found - STUDENT_T * error, found + STUDENT_T * error)
