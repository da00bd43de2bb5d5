"""What the benchmark makes of its samples: order of runs, medians, intervals, ratios and marks.

Decides how rounds become one figure and when a mark is met. Pure: it must not know how anything is measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Final

RESAMPLE_COUNT: Final = 2000
_SEED: Final = 20_261_121


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median over rounds with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Mark:
    """One figure that must not exceed its limit."""

    name: str
    limit: float
    unit: str
    estimate: Estimate | None
    """None: not measured, because a peer could not be run."""

    @property
    def met(self) -> bool | None:
        """By the pessimistic end of the interval, so that a lucky round decides nothing; None where not measured."""
        return None if self.estimate is None else self.estimate.high <= self.limit


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender in one round. CPU is in microseconds by process group; times to first token are medians."""

    cpu_per_token: Mapping[str, float]
    cpu_per_token_alone: Mapping[str, float]
    cpu_per_request: Mapping[str, float]
    first_token_ms: float
    first_token_crowded_ms: float
    request_ms: float
    requests_per_second: float
    tokens_per_second: float
    foreign_cpu_share: float


def order_of_round(names: Sequence[str], round_index: int) -> tuple[str, ...]:
    """ABBA: every other round runs backwards, so that a slow drift of the machine hits all alike."""
    return tuple(names) if round_index % 2 == 0 else tuple(reversed(names))


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


def weighted_mean(values_and_weights: Sequence[tuple[float, float]]) -> float:
    """The mean of the first numbers, each counted as much as its second says."""
    return sum(value * weight for value, weight in values_and_weights) / sum(weight for _, weight in values_and_weights)


def busy_neighbour_share(rounds: Sequence[Figures]) -> float:
    """How much of the machine others used, on average over the runs."""
    return fmean(figures.foreign_cpu_share for figures in rounds)
