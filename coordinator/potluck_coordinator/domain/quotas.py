"""What one API key may use: requests, tokens and credits a day, and requests at a time.

Decides which bound a request would pass, and when it would not. A day is a calendar day of UTC. Tokens and credits are counted by what was
used, and of requests under way by what is expected of them, so that a key ends no further above its bound than expectations erred. It must
not know where counts are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from potluck_protocol.money import credits_text

DAY_MS: Final = 24 * 3600 * 1000
CONCURRENT_RETRY_SECONDS: Final = 1.0
"""Nobody knows when a key's own answers end."""


@dataclass(frozen=True, slots=True)
class KeyQuotas:
    """A key's bounds; 0: none."""

    requests_per_day: int = 0
    tokens_per_day: int = 0
    concurrent_max: int = 0
    spend_micro_credits_per_day: int = 0

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self != NO_QUOTAS


NO_QUOTAS: Final = KeyQuotas()


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What a key used on one day; and what is under way, whenever it began."""

    day: int = 0
    """Since 1970."""
    request_count: int = 0
    token_count: float = 0.0
    spend_micro_credits: int = 0
    running_count: int = 0
    pending_tokens: float = 0.0
    pending_micro_credits: int = 0


@dataclass(frozen=True, slots=True)
class KeyDay:
    """What a key used on some day, or of it since some moment: less, where a request was taken back."""

    request_count: int = 0
    token_count: float = 0.0
    spend_micro_credits: int = 0

    def __add__(self, other: KeyDay) -> KeyDay:
        return KeyDay(
            self.request_count + other.request_count,
            self.token_count + other.token_count,
            self.spend_micro_credits + other.spend_micro_credits,
        )


NO_USE: Final = KeyDay()


@dataclass(frozen=True, slots=True)
class QuotaRefusal:
    """Which bound, in words, and when there is room below it again."""

    words: str
    retry_after_seconds: float


def today(use: KeyUse, now_unix_ms: int) -> KeyUse:
    """The use as of now: a new day begins with nothing but what is under way."""
    day = now_unix_ms // DAY_MS
    return use if use.day == day else replace(use, day=day, request_count=0, token_count=0.0, spend_micro_credits=0)


def remembered(day: int, used: KeyDay) -> KeyUse:
    """A key of which the books know this, and of which nothing is under way."""
    return KeyUse(day, used.request_count, used.token_count, used.spend_micro_credits)


def more_used(before: KeyUse, after: KeyUse) -> KeyDay:
    """What came between two moments of one day."""
    return KeyDay(
        after.request_count - before.request_count,
        after.token_count - before.token_count,
        after.spend_micro_credits - before.spend_micro_credits,
    )


def refusal(quotas: KeyQuotas, use: KeyUse, tokens: float, micro_credits: int, now_unix_ms: int) -> QuotaRefusal | None:
    """Why the key may not make one more request now that is expected to take so much; None: it may."""
    left_seconds = (DAY_MS - now_unix_ms % DAY_MS) / 1000
    reset = f"it begins anew at midnight UTC, in {_hours(left_seconds)}"
    if 0 < quotas.requests_per_day <= use.request_count:
        return QuotaRefusal(f"This API key may make {quotas.requests_per_day} requests a day, and has; {reset}.", left_seconds)
    if 0 < quotas.tokens_per_day < use.token_count + use.pending_tokens + tokens:
        used = f"has used {use.token_count:.0f}, and this request may take {tokens:.0f} more"
        return QuotaRefusal(f"This API key may use {quotas.tokens_per_day} tokens a day, {used}; {reset}.", left_seconds)
    if 0 < quotas.spend_micro_credits_per_day < use.spend_micro_credits + use.pending_micro_credits + micro_credits:
        spent, more = credits_text(use.spend_micro_credits), credits_text(micro_credits)
        bound = credits_text(quotas.spend_micro_credits_per_day)
        words = f"This API key may spend {bound} credits a day, has spent {spent}, and this request may cost {more}; {reset}."
        return QuotaRefusal(words, left_seconds)
    if 0 < quotas.concurrent_max <= use.running_count:
        words = f"This API key may have {quotas.concurrent_max} requests running at a time, and has; wait for one of them to end."
        return QuotaRefusal(words, CONCURRENT_RETRY_SECONDS)
    return None


def begun(use: KeyUse, tokens: float, micro_credits: int) -> KeyUse:
    """With one request more under way."""
    return replace(
        use,
        request_count=use.request_count + 1,
        running_count=use.running_count + 1,
        pending_tokens=use.pending_tokens + tokens,
        pending_micro_credits=use.pending_micro_credits + micro_credits,
    )


def ended(use: KeyUse, tokens: float, micro_credits: int, used_tokens: float, charged_micro_credits: int) -> KeyUse:
    """With that one over: what was expected of it is replaced by what it came to."""
    running_count = max(0, use.running_count - 1)
    return replace(
        use,
        running_count=running_count,
        # Sums of fractions do not come back to nothing by themselves.
        pending_tokens=max(0.0, use.pending_tokens - tokens) if running_count else 0.0,
        pending_micro_credits=max(0, use.pending_micro_credits - micro_credits) if running_count else 0,
        token_count=use.token_count + max(0.0, used_tokens),
        spend_micro_credits=use.spend_micro_credits + max(0, charged_micro_credits),
    )


def taken_back(use: KeyUse, tokens: float, micro_credits: int) -> KeyUse:
    """The pool refused it: it was no request of the key's."""
    return replace(ended(use, tokens, micro_credits, 0.0, 0), request_count=max(0, use.request_count - 1))


def _hours(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
