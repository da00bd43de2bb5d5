"""The two tiers: which one a request is served in, what is kept free for the better one, and how well its promise is kept.

`default` is limited to so many requests an hour of each account, and promises a first token in time; `flex` takes what is left, and
promises nothing. Decides what a request that names no tier gets, what of a model's capacity flex may not fill, and what counts as kept. It
must not know how the hour is counted, or who asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_coordinator.domain.admission import KV_SHARE_MAX, Capacity
from potluck_coordinator.domain.catalogue import ServiceTier

RESERVE_PERCENT: Final = 10
"""Of each model's room, what flex leaves to the default tier, unless the operator says otherwise."""
RESERVE_IDLE_SECONDS: Final = 600.0
"""After so long without a request in the default tier nothing is kept for it: the first one that comes then is still the first in turn."""
MINUTE_SECONDS: Final = 60
HOUR_SECONDS: Final = 3600
MONTH_HOURS: Final = 30 * 24


class AskedTier(StrEnum):
    """What a request may ask for, in OpenAI's words."""

    AUTO = "auto"
    """The default tier while the account has requests left in it, else flex. What a request without the field gets."""
    DEFAULT = "default"
    FLEX = "flex"


@dataclass(frozen=True, slots=True)
class TierChoice:
    """What a request gets; None: it is to be refused, for what it asks for has none left, or is not offered."""

    tier: ServiceTier | None
    counts: bool = False
    """Against the account's hour."""


def choose(asked: AskedTier, offered: ServiceTier, *, allowance_left: bool) -> TierChoice:
    """Of a model that is deployed as `offered`: one deployed as flex has no default tier."""
    if asked is AskedTier.FLEX:
        return TierChoice(ServiceTier.FLEX)
    if offered is ServiceTier.FLEX:
        return TierChoice(None if asked is AskedTier.DEFAULT else ServiceTier.FLEX)
    if allowance_left:
        return TierChoice(ServiceTier.DEFAULT, counts=True)
    return TierChoice(None if asked is AskedTier.DEFAULT else ServiceTier.FLEX)


def left_to_flex(capacity: Capacity, default_use: Capacity, reserve_percent: int, default_idle_seconds: float) -> Capacity:
    """What of a model's capacity flex may fill: of several slots one is kept at least, however small their share is, and one is left.

    Args:
        capacity: all of it, and what both tiers have of it.
        default_use: what the default tier has: its requests in flight and their tokens.
        reserve_percent: what is kept for it, as far as it does not have it.
        default_idle_seconds: since a request of it was last seen.
    """
    if default_idle_seconds > RESERVE_IDLE_SECONDS:
        return capacity
    slots_due = min(math.ceil(capacity.slot_count * reserve_percent / 100), capacity.slot_count - 1)
    kept_slots = max(0, slots_due - default_use.in_flight_count)
    kept_tokens = max(0, int(capacity.kv_tokens * reserve_percent / 100 - default_use.committed_tokens))
    return capacity._replace(slot_count=capacity.slot_count - kept_slots, kv_tokens=capacity.kv_tokens - kept_tokens)


def flex_lacks_slots(left: Capacity) -> bool:
    """Whether what is kept leaves no slot to any flex request, however small; where nothing runs, nothing is kept from anyone."""
    return left.in_flight_count > 0 and left.in_flight_count >= left.slot_count


def flex_fits(left: Capacity, wanted_tokens: float) -> bool:
    """Whether a flex request stays out of what is kept; where nothing runs, nothing is kept from anyone."""
    if left.in_flight_count == 0:
        return True
    if flex_lacks_slots(left):
        return False
    return not left.kv_tokens or left.committed_tokens + wanted_tokens <= KV_SHARE_MAX * left.kv_tokens


def flex_comes_free(left: Capacity, default_use: Capacity, wanted_tokens: float) -> bool:
    """Whether a flex request would fit beside what is kept if no other one of flex ran, so that room held for it will be enough some time.

    Args:
        left: what flex may fill, and what both tiers have of it.
        default_use: what the default tier has of it.
        wanted_tokens: what there has to be room for.
    """
    if default_use.in_flight_count >= left.slot_count:
        return False
    # By what is kept even where nothing of the default tier runs: for what fits an empty pool only nobody is to wait.
    return not left.kv_tokens or default_use.committed_tokens + wanted_tokens <= KV_SHARE_MAX * left.kv_tokens


@dataclass(frozen=True, slots=True)
class PromiseCount:
    """Requests of the default tier: how many there were, and how many had their first token in time."""

    count: int = 0
    kept_count: int = 0

    def __add__(self, other: PromiseCount) -> PromiseCount:
        return PromiseCount(self.count + other.count, self.kept_count + other.kept_count)

    @property
    def share(self) -> float | None:
        """Of those that were kept; None: there were none."""
        return self.kept_count / self.count if self.count else None


NONE: Final = PromiseCount()


@dataclass(frozen=True, slots=True)
class Compliance:
    """The promise over three windows."""

    hour: PromiseCount = NONE
    day: PromiseCount = NONE
    month: PromiseCount = NONE
    """Thirty days."""

    @property
    def windows(self) -> dict[str, PromiseCount]:
        """By the names under which they are shown."""
        return {"1h": self.hour, "24h": self.day, "30d": self.month}


NO_COMPLIANCE: Final = Compliance()


class PromiseRecord:
    """What became of the promise, by the minute for an hour and by the hour for thirty days: 780 counts, however many requests there are.

    Time comes in with every call; within one record it does not go back.
    """

    def __init__(self) -> None:
        self._minutes: dict[int, PromiseCount] = {}
        self._hours: dict[int, PromiseCount] = {}

    def add(self, now_unix_seconds: float, count: PromiseCount) -> None:
        """Counts some more, of this moment."""
        minute, hour = int(now_unix_seconds // MINUTE_SECONDS), int(now_unix_seconds // HOUR_SECONDS)
        self._minutes[minute] = self._minutes.get(minute, NONE) + count
        self.add_hour(hour, count)
        while self._minutes and next(iter(self._minutes)) <= minute - HOUR_SECONDS // MINUTE_SECONDS:
            del self._minutes[next(iter(self._minutes))]

    def add_hour(self, hour: int, count: PromiseCount) -> None:
        """Counts some more of a whole hour since 1970, as the books have it."""
        self._hours[hour] = self._hours.get(hour, NONE) + count
        for old in [known for known in self._hours if known <= max(self._hours) - MONTH_HOURS]:
            del self._hours[old]

    def compliance(self, now_unix_seconds: float) -> Compliance:
        """As of now."""
        minute, hour = int(now_unix_seconds // MINUTE_SECONDS), int(now_unix_seconds // HOUR_SECONDS)
        since_minute = minute - HOUR_SECONDS // MINUTE_SECONDS
        return Compliance(
            sum((count for known, count in self._minutes.items() if known > since_minute), NONE),
            sum((count for known, count in self._hours.items() if known > hour - 24), NONE),
            sum((count for known, count in self._hours.items() if known > hour - MONTH_HOURS), NONE),
        )


def is_kept(first_token_seconds: float | None, objective_seconds: float) -> bool:
    """Whether the promise was kept to a request; None: it was refused for want of room, or failed before its first token."""
    return first_token_seconds is not None and first_token_seconds <= objective_seconds
