"""The default tier's requests of each account within the operator's window, such as an hour, by the `limits` library's moving window.

Those that other gateways let in are counted as soon as this one is told of them.

Decides how many accounts are counted, and what of a refused request is taken back. What a window is and whether it has room, `limits` says;
its own storage in memory starts threads and forgets nothing early, so that this one keeps the moments of each account. A gateway that
starts anew has forgotten them. It must not know tiers or headers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from limits import RateLimitItem

    from potluck_protocol.values import AccountId

ACCOUNTS_MAX: Final = 10_000
"""Those that asked last; an account that was forgotten has its whole window again."""


MILLISECONDS: Final = 1000
"""In a second."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one account has of its window."""

    limit_count: int
    remaining_count: int
    reset_seconds: float
    """Until there is room for one request more than now; 0: all of it is there."""
    window_seconds: int


class _Moments(Storage, MovingWindowSupport):
    """When each account's requests of the window were made, the oldest first. One thread's."""

    STORAGE_SCHEME = None

    def __init__(self, now_seconds: Callable[[], float]) -> None:
        super().__init__()
        self._now_seconds = now_seconds
        self._moments: dict[str, deque[float]] = {}
        """The account that asked longest ago comes first."""

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return ValueError

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts so many requests more, unless they would pass the limit."""
        moments, now = self._window(key, expiry), self._now_seconds()
        if len(moments) + amount > limit:
            return False
        moments.extend([now] * amount)
        return True

    def _window(self, key: str, expiry: int) -> deque[float]:
        """What is left of an account's, which is now the one that asked last."""
        moments = self._moments.pop(key, None) or deque()
        self._moments[key] = moments
        now = self._now_seconds()
        while moments and moments[0] <= now - expiry:
            moments.popleft()
        while len(self._moments) > ACCOUNTS_MAX:
            del self._moments[next(iter(self._moments))]
        return moments

    def newest(self, key: str) -> float:
        """When the last one was made."""
        moments = self._moments.get(key)
        return moments[-1] if moments else -math.inf

    def add(self, key: str, count: int, expiry: int) -> None:
        """So many requests more, or fewer, that were made elsewhere: now, as far as this one knows, and whatever the limit is."""
        moments = self._window(key, expiry)
        moments.extend([self._now_seconds()] * count)
        for _ in range(min(-count, len(moments))):
            moments.pop()

    def take_back(self, key: str, moment: float) -> None:
        """The one that was made then was none after all, if it is still counted."""
        with suppress(ValueError):
            self._moments.get(key, deque()).remove(moment)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """The window's oldest moment, and how many it has."""
        del limit
        now = self._now_seconds()
        moments = self._moments.get(key, ())
        gone_count = bisect_right(moments, now - expiry)
        return (moments[gone_count], len(moments) - gone_count) if gone_count < len(moments) else (now, 0)

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        count = len(self._moments)
        self._moments.clear()
        return count

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        raise NotImplementedError("only moving windows are counted")

    def get(self, key: str) -> int:
        raise NotImplementedError("only moving windows are counted")

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError("only moving windows are counted")

    def clear(self, key: str) -> None:
        self._moments.pop(key, None)


def rate_headers(allowance: Allowance) -> tuple[tuple[str, str], ...]:
    """What OpenAI's clients read of a limit; names in lower case."""
    return (
        ("x-ratelimit-limit-requests", str(allowance.limit_count)),
        ("x-ratelimit-remaining-requests", str(allowance.remaining_count)),
        ("x-ratelimit-reset-requests", duration_text(allowance.reset_seconds)),
    )


def duration_text(seconds: float) -> str:
    """As OpenAI writes it: "6m0s", "1.5s", "12ms"; rounded up, for nothing is there sooner."""
    milliseconds = max(0, math.ceil(seconds * 1000))
    if milliseconds < MILLISECONDS:
        return f"{milliseconds}ms"
    minutes, left = divmod(milliseconds, 60 * MILLISECONDS)
    seconds_text = f"{left / MILLISECONDS:g}s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + seconds_text


class RateWindows:
    """The windows of one gateway's accounts.

    Args:
        limit: as the operator set it.
        now_seconds: monotonic.
    """

    def __init__(self, limit: RateLimitItem, now_seconds: Callable[[], float]) -> None:
        self._limit = limit
        self._now_seconds = now_seconds
        self._moments = _Moments(now_seconds)
        self._limiter = MovingWindowRateLimiter(self._moments)

    @property
    def words(self) -> str:
        """As "100 per 1 hour"."""
        return str(self._limit)

    def has_room(self, account_id: AccountId) -> bool:
        """Whether one more request would be within the window."""
        return self._used(account_id)[1] < self._limit.amount

    def count(self, account_id: AccountId) -> float:
        """One more; the caller has asked `has_room`. Gives the moment by which it is taken back."""
        self._limiter.hit(self._limit, account_id)
        return self._moments.newest(self._limit.key_for(account_id))

    def take_back(self, account_id: AccountId, moment: float) -> None:
        """The request that was counted then got no answer, by no fault of its own. One that has left the window takes no other with it."""
        self._moments.take_back(self._limit.key_for(account_id), moment)

    def count_elsewhere(self, account_id: AccountId, count: int) -> None:
        """Other gateways let so many in; less than none, where they took some back."""
        self._moments.add(self._limit.key_for(account_id), count, self._limit.get_expiry())

    def allowance(self, account_id: AccountId) -> Allowance:
        """What the account has left."""
        began_at, used_count = self._used(account_id)
        expiry_seconds = self._limit.get_expiry()
        reset_seconds = max(0.0, began_at + expiry_seconds - self._now_seconds()) if used_count else 0.0
        return Allowance(self._limit.amount, max(0, self._limit.amount - used_count), reset_seconds, expiry_seconds)

    def _used(self, account_id: AccountId) -> tuple[float, int]:
        """As the library's limiter asks for it, which is asked three times for each request, and takes longer over it."""
        return self._moments.get_moving_window(self._limit.key_for(account_id), self._limit.amount, self._limit.get_expiry())
