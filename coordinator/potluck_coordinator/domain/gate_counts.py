"""What a gateway's gate counts and the books keep: how the default tier's promise was kept, and what keys with quotas used.

Values only. It must not know when they are told, nor where they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from potluck_coordinator.domain.quotas import KeyDay
from potluck_coordinator.domain.tiers import PromiseCount
from potluck_protocol.values import KeyPrefix


@dataclass(frozen=True, slots=True)
class GateCounts:
    """Counts by hour and by day of unix time."""

    promise_hours: Mapping[int, PromiseCount] = field(default_factory=dict)
    key_days: Mapping[tuple[KeyPrefix, int], KeyDay] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.promise_hours or self.key_days)
