"""Our own words for what an engine tells of itself: as values, and as the names of metrics.

Decides what a number must be to be believed: one that no engine can mean is not known. It must not know any engine's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

REQUESTS_MAX: Final = 1_000_000
"""More than any engine runs, or keeps waiting; and within what a message holds."""
TOKENS_MAX: Final = 2**53
"""More than any engine counts, and still exact in the format of metrics."""
RATIO_MAX: Final = 1.1
"""A full cache is at times told as a little more than full; what is beyond that is no ratio."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One look at an engine."""

    running_count: int | None = None
    """Requests that it computes."""
    waiting_count: int | None = None
    """Requests that it has taken and not begun."""
    kv_used_ratio: float | None = None
    """How full the cache of keys and values is, 0 to 1. What is kept for later prompts only, and given up when needed, is free."""
    kv_capacity_tokens: int | None = None
    prefix_queried_tokens: int | None = None
    """Prompt tokens that were looked up in the cache since the engine started."""
    prefix_hit_tokens: int | None = None
    """Those of them that were there."""
    generated_tokens: int | None = None
    """Of answers, since the engine started."""
    kv_used_tokens: int | None = None
    """How much of the capacity is used."""


@dataclass(frozen=True, slots=True)
class _Names:
    running: str = "potluck:requests_running"
    waiting: str = "potluck:requests_waiting"
    kv_used_ratio: str = "potluck:kv_used_ratio"
    kv_used: str = "potluck:kv_used_tokens"
    kv_capacity: str = "potluck:kv_capacity_tokens"
    prefix_queried: str = "potluck:prefix_queried_tokens_total"
    prefix_hit: str = "potluck:prefix_hit_tokens_total"
    generated: str = "potluck:generated_tokens_total"


OURS: Final = _Names()
"""Told by our own doors in front of engines that do not tell, or that are not ours."""


def believed(
    *,
    running: float | None,
    waiting: float | None,
    kv_used_ratio: float | None,
    kv_used: float | None,
    kv_capacity: float | None,
    prefix_queried: float | None,
    prefix_hit: float | None,
    generated: float | None,
) -> EngineLoad:
    """The look that these finite numbers make. One that cannot be is left out; a cache holds no more than it can."""
    capacity, used = _whole(kv_capacity, TOKENS_MAX), _whole(kv_used, TOKENS_MAX)
    ratio = min(1.0, kv_used_ratio) if kv_used_ratio is not None and 0.0 <= kv_used_ratio <= RATIO_MAX else None
    if capacity is not None and used is None and ratio is not None:
        used = round(ratio * capacity)
    if capacity is not None and used is not None:
        used = min(used, capacity)
    queried, hit = _whole(prefix_queried, TOKENS_MAX), _whole(prefix_hit, TOKENS_MAX)
    return EngineLoad(
        running_count=_whole(running, REQUESTS_MAX),
        waiting_count=_whole(waiting, REQUESTS_MAX),
        kv_used_ratio=ratio,
        kv_capacity_tokens=capacity,
        prefix_queried_tokens=queried,
        prefix_hit_tokens=None if queried is not None and hit is not None and hit > queried else hit,
        generated_tokens=_whole(generated, TOKENS_MAX),
        kv_used_tokens=used,
    )


def _whole(number: float | None, number_max: int) -> int | None:
    return round(number) if number is not None and 0 <= number <= number_max else None
