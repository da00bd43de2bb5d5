"""What a gateway's gate counts: how the default tier's promise was kept, what keys with quotas used, and who asked for how much.

The books keep the first two; of the others each gate is told what the gates of other gateways counted. Values only. It must not know when
they are told, nor where they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from potluck_coordinator.domain.quotas import KeyDay, KeyUse
from potluck_coordinator.domain.tiers import PromiseCount
from potluck_protocol.values import AccountId, KeyPrefix


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What a key has running, and the most that it can come to."""

    running_count: int = 0
    tokens: float = 0.0
    micro_credits: int = 0

    def __add__(self, other: UnderWay) -> UnderWay:
        return UnderWay(self.running_count + other.running_count, self.tokens + other.tokens, self.micro_credits + other.micro_credits)


NOTHING_UNDER_WAY: Final = UnderWay()


def under_way(use: KeyUse) -> UnderWay:
    """What of a key's use at one gateway is not over."""
    return UnderWay(use.running_count, use.pending_tokens, use.pending_micro_credits)


def with_more(use: KeyUse, elsewhere: UnderWay) -> KeyUse:
    """A key's use at one gateway, with what it has under way at others."""
    return use._replace(
        running_count=use.running_count + elsewhere.running_count,
        pending_tokens=use.pending_tokens + elsewhere.tokens,
        pending_micro_credits=use.pending_micro_credits + elsewhere.micro_credits,
    )


@dataclass(frozen=True, slots=True)
class GateCounts:
    """Counts by hour and by day of unix time; and, where there are several gateways, what the others' gates must know."""

    promise_hours: Mapping[int, PromiseCount] = field(default_factory=dict)
    key_days: Mapping[tuple[KeyPrefix, int], KeyDay] = field(default_factory=dict)

    account_requests: Mapping[AccountId, int] = field(default_factory=dict)
    """Those more in each account's window, less those that were taken back."""
    under_way: Mapping[KeyPrefix, UnderWay] = field(default_factory=dict)
    """Of keys with quotas of which that has changed, as it is now."""

    def __bool__(self) -> bool:
        return bool(self.promise_hours or self.key_days)


@dataclass(frozen=True, slots=True)
class OthersCounts:
    """What a gate is told."""

    version: int = 0
    """Of what is told of days; told again next time, it spares what is known."""
    key_days: Mapping[tuple[KeyPrefix, int], KeyDay] = field(default_factory=dict)
    """All that the books have of each, of all gateways."""
    account_requests: Mapping[AccountId, int] = field(default_factory=dict)
    """At other gateways, since the last time."""
    under_way: Mapping[KeyPrefix, UnderWay] = field(default_factory=dict)
    """At all other gateways, of keys of which that has changed."""
