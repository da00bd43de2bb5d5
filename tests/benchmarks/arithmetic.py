"""What the benchmark makes of its samples: order of runs, medians, intervals and ratios.

Decides how rounds become one figure. Pure: it must not know how anything is measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

RESAMPLE_COUNT: Final = 2000
_SEED: Final = 20_261_121


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median over rounds with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def orders(names: Sequence[str], round_count: int, seed: int) -> list[tuple[str, ...]]:
    """Who is measured when: each two rounds run in one drawn order, the second of them backwards (ABBA).

    A slow drift of the machine then hits all alike, and nobody always comes behind the same neighbour.
    """
    draw = random.Random(seed)
    found: list[tuple[str, ...]] = []
    while len(found) < round_count:
        order = draw.sample(list(names), len(names))
        found += [tuple(order), tuple(reversed(order))]
    return found[:round_count]


def estimate(values: Sequence[float]) -> Estimate:
    """The median of the rounds and how far it may be trusted; the same values always give the same interval."""
    if not values:
        raise ValueError("no rounds, no estimate")
    draw = random.Random(_SEED)
    resampled = sorted(median(draw.choices(values, k=len(values))) for _ in range(RESAMPLE_COUNT))
    edge = RESAMPLE_COUNT * 25 // 1000
    return Estimate(median(values), resampled[edge], resampled[-edge - 1])


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, round by round: what both suffered in one round cancels out."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds cannot be compared with {len(theirs)}")
    if not all(value > 0 for value in theirs):
        raise ValueError("a peer without any cost cannot be compared with")
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours minus theirs, round by round."""
    return [our - their for our, their in zip(ours, theirs, strict=True)]


def total(by_group: Mapping[str, float], groups: Sequence[str]) -> float:
    """The sum over the named groups."""
    return sum(by_group[name] for name in groups)


def micros_per_unit(cpu_seconds: Mapping[str, float], unit_count: int) -> dict[str, float]:
    """CPU microseconds per token or request, by group; raises ValueError where there was no unit."""
    if unit_count <= 0:
        raise ValueError("nothing was counted, so nothing has a cost")
    return {name: seconds / unit_count * 1e6 for name, seconds in cpu_seconds.items()}


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest of the values that so many per cent do not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
