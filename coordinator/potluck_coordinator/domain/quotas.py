"""What one API key may use: requests, tokens and credits a day, and requests at a time.

Decides which bound a request would pass, and when it would not. A day is a calendar day of UTC. Tokens and credits are counted by what was
used, and of requests under way by the most that they can come to: what is expected is learned from answers, and whoever asks could teach
it. Near the bound a key has one request at a time, which is judged by what is expected; only that one can end above it, and by no more
than its own answer and its prompt are longer than expected. It must not know where counts are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from potluck_coordinator.domain.pricing import charge
from potluck_protocol.money import credits_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_protocol.values import Usage

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
LESS_OF_AN_ANSWER: Final = "a smaller `max_tokens`, or a shorter prompt"


class KeyUse(NamedTuple):
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
class Claim:
    """What one request may come to."""

    tokens_max: float = 0.0
    micro_credits_max: int = 0
    tokens: float = 0.0
    """As expected; of its answer what its client allowed, if it did."""
    micro_credits: int = 0
    less: str = LESS_OF_AN_ANSWER
    """What a client would ask with to claim less."""


def claim(entry: CatalogueEntry, most: Usage, prompt_tokens: float, answer_tokens: float | None) -> Claim:
    """One request's.

    Args:
        entry: its model's prices.
        most: the most tokens that it can come to.
        prompt_tokens: as expected.
        answer_tokens: as expected; None: its client said how many at most.
    """
    prompt = min(prompt_tokens, float(most.prompt_token_count))
    answer = most.completion_token_count if answer_tokens is None else min(answer_tokens, most.completion_token_count)
    price = prompt * entry.prompt_price_micro_credits + answer * entry.completion_price_micro_credits
    return Claim(
        tokens_max=most.prompt_token_count + most.completion_token_count,
        micro_credits_max=charge(entry, most),
        tokens=prompt + answer,
        micro_credits=math.ceil(price),
        less=LESS_OF_AN_ANSWER if most.completion_token_count else "a shorter input",
    )


@dataclass(frozen=True, slots=True)
class QuotaRefusal:
    """Which bound, in words, and when there is room below it again."""

    words: str
    retry_after_seconds: float | None
    """None: never for this request."""


class _Room(Enum):
    """What stands in a request's way below one bound."""

    FREE = auto()
    """Nothing."""
    OTHERS = auto()
    """What is under way."""
    DAY = auto()
    """What was used today."""
    BOUND = auto()
    """It is too much by itself."""


class _Standing(NamedTuple):
    """One bound, and a request before it."""

    bound: float
    """0: none."""
    used: float
    pending: float
    most: float
    """What the request can come to."""
    expected: float
    runs_others: bool
    """Its key has requests under way."""


class _Names(NamedTuple):
    """How a bound's amounts are spoken of."""

    use: str
    used: str
    unit: str
    text: Callable[[float], str]


_TOKENS: Final = _Names("use", "used", "tokens", "{:.0f}".format)
_CREDITS: Final = _Names("spend", "spent", "credits", lambda micro_credits: credits_text(int(micro_credits)))


def today(use: KeyUse, now_unix_ms: int) -> KeyUse:
    """The use as of now: a new day begins with nothing but what is under way."""
    day = now_unix_ms // DAY_MS
    return use if use.day == day else use._replace(day=day, request_count=0, token_count=0.0, spend_micro_credits=0)


def remembered(day: int, used: KeyDay) -> KeyUse:
    """A key of which the books know this, and of which nothing is under way."""
    return KeyUse(day, used.request_count, used.token_count, used.spend_micro_credits)


def with_total(use: KeyUse, used: KeyDay) -> KeyUse:
    """The same with so much used today in all; what is under way stays."""
    return use._replace(request_count=used.request_count, token_count=used.token_count, spend_micro_credits=used.spend_micro_credits)


def more_used(before: KeyUse, after: KeyUse) -> KeyDay:
    """What came between two moments of one day."""
    return KeyDay(
        after.request_count - before.request_count,
        after.token_count - before.token_count,
        after.spend_micro_credits - before.spend_micro_credits,
    )


def refusal(quotas: KeyQuotas, use: KeyUse, claimed: Claim, now_unix_ms: int) -> QuotaRefusal | None:
    """Why the key may not make one more request now that claims so much; None: it may. Of several reasons the one that lasts longest."""
    if not quotas.any:
        return None
    left_seconds = (DAY_MS - now_unix_ms % DAY_MS) / 1000
    runs = use.running_count > 0
    tokens = _Standing(quotas.tokens_per_day, use.token_count, use.pending_tokens, claimed.tokens_max, claimed.tokens, runs)
    spend = _Standing(
        quotas.spend_micro_credits_per_day,
        use.spend_micro_credits,
        use.pending_micro_credits,
        claimed.micro_credits_max,
        claimed.micro_credits,
        runs,
    )
    reasons = (
        _without_amounts(quotas, use, left_seconds),
        _by_amounts(tokens, _TOKENS, claimed.less, left_seconds),
        _by_amounts(spend, _CREDITS, claimed.less, left_seconds),
    )
    return max(filter(None, reasons), key=_lasts_seconds, default=None)


def _lasts_seconds(refused: QuotaRefusal) -> float:
    return math.inf if refused.retry_after_seconds is None else refused.retry_after_seconds


def _without_amounts(quotas: KeyQuotas, use: KeyUse, left_seconds: float) -> QuotaRefusal | None:
    if 0 < quotas.requests_per_day <= use.request_count:
        words = f"This API key may make {quotas.requests_per_day} requests a day, and has; {_reset(left_seconds)}."
        return QuotaRefusal(words, left_seconds)
    if 0 < quotas.concurrent_max <= use.running_count:
        words = f"This API key may have {quotas.concurrent_max} requests running at a time, and has; wait for one of them to end."
        return QuotaRefusal(words, CONCURRENT_RETRY_SECONDS)
    return None


def _by_amounts(standing: _Standing, names: _Names, less: str, left_seconds: float) -> QuotaRefusal | None:
    room = _room(standing)
    if room is _Room.FREE:
        return None
    bound, used, pending, most, expected = (names.text(amount) for amount in standing[:5])
    may = f"This API key may {names.use} {bound} {names.unit} a day"
    if room is _Room.BOUND:
        return QuotaRefusal(f"{may}, and this request alone may take {expected}: there is room for it on no day. Ask with {less}.", None)
    if room is _Room.DAY:
        left = standing.bound - standing.used
        meanwhile = f" Until then it has {names.text(left)} left: ask with {less}." if left >= 1 else ""
        words = f"{may}, has {names.used} {used}, and this request may take {expected} more; {_reset(left_seconds)}.{meanwhile}"
        return QuotaRefusal(words, left_seconds)
    words = f"{may}, has {names.used} {used}, what is running may take {pending}, and this request up to {most}"
    return QuotaRefusal(f"{words}; wait for that to end, or ask with {less}.", CONCURRENT_RETRY_SECONDS)


def _room(standing: _Standing) -> _Room:
    """Whether a request has room below one bound: all that it can come to, or, where its key runs nothing else, what is expected."""
    if standing.bound <= 0 or standing.used + standing.pending + standing.most <= standing.bound:
        return _Room.FREE
    if standing.used + standing.expected > standing.bound:
        return _Room.BOUND if standing.expected > standing.bound else _Room.DAY
    return _Room.OTHERS if standing.runs_others else _Room.FREE


def begun(use: KeyUse, tokens: float, micro_credits: int) -> KeyUse:
    """With one request more under way."""
    return use._replace(
        request_count=use.request_count + 1,
        running_count=use.running_count + 1,
        pending_tokens=use.pending_tokens + tokens,
        pending_micro_credits=use.pending_micro_credits + micro_credits,
    )


def set_aside(claimed: Claim, marked: KeyDay) -> tuple[float, int]:
    """The tokens and micro-credits that still are for a request of which so much is counted already."""
    return max(0.0, claimed.tokens_max - marked.token_count), max(0, claimed.micro_credits_max - marked.spend_micro_credits)


def marked(use: KeyUse, claimed: Claim, before: KeyDay, now: KeyDay) -> KeyUse:
    """With so much counted of one that runs on, and before that so much: it is not set aside any more, but used."""
    (tokens_before, price_before), (tokens, price) = set_aside(claimed, before), set_aside(claimed, now)
    return use._replace(
        pending_tokens=max(0.0, use.pending_tokens - (tokens_before - tokens)),
        pending_micro_credits=max(0, use.pending_micro_credits - (price_before - price)),
        token_count=use.token_count + now.token_count - before.token_count,
        spend_micro_credits=use.spend_micro_credits + now.spend_micro_credits - before.spend_micro_credits,
    )


def ended(use: KeyUse, tokens: float, micro_credits: int, used_tokens: float, charged_micro_credits: int) -> KeyUse:
    """With that one over: the most that it could come to is replaced by what it came to."""
    running_count = max(0, use.running_count - 1)
    return use._replace(
        running_count=running_count,
        # Sums of fractions do not come back to nothing by themselves.
        pending_tokens=max(0.0, use.pending_tokens - tokens) if running_count else 0.0,
        pending_micro_credits=max(0, use.pending_micro_credits - micro_credits) if running_count else 0,
        # Less than nothing, where more was counted while it ran than its engine counts in the end.
        token_count=max(0.0, use.token_count + used_tokens),
        spend_micro_credits=max(0, use.spend_micro_credits + charged_micro_credits),
    )


def taken_back(use: KeyUse, tokens: float, micro_credits: int) -> KeyUse:
    """The pool refused it: it was no request of the key's."""
    return ended(use, tokens, micro_credits, 0.0, 0)._replace(request_count=max(0, use.request_count - 1))


def _reset(left_seconds: float) -> str:
    return f"it begins anew at midnight UTC, in {_hours(left_seconds)}"


def _hours(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
