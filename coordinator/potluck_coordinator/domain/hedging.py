"""When a request whose first token is late gets a second attempt on another node, and what the pool spends on that.

Decides what late means: longer than 95 of 100 first tokens of the same replica took lately, each against what was foreseen of it, so that a
long prompt is not late for being long. Two attempts read one prompt, and one of them reads it for nothing: that comes out of a budget which
grows by a small share of the tokens that clients got, and nothing is begun that it cannot pay. How the two end is `requests`. It must not
know attempts, queues or clocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

RATIOS_KNOWN_MIN: Final = 20
"""Of fewer nobody can say what one in twenty passes."""
RATIOS_KEPT_MAX: Final = 64
"""Of one replica, the newest: what it does now, and memory for ten thousand of them."""
ON_TIME_SHARE: Final = 0.95
FORESEEN_SECONDS_MIN: Final = 0.1
"""What is foreseen of a short prompt on a fast card is less than all that is around its reading, and would make any delay a great one."""
LATE_SECONDS_MIN: Final = 0.25
"""Sooner nothing is late: there would be less to win than another prompt's reading is worth."""
HEDGED_SHARE_MAX: Final = 0.03
"""Of the tokens that clients got, prompts included: so many may have been read and written for nothing."""
BUDGET_TOKENS_MAX: Final = 32_768.0
"""What is saved up at most: a hundred usual prompts when many nodes are late at once, and the longest prompt that is ever read twice."""
CANCEL_TOKENS: Final = 16.0
"""What the attempt that loses may write before the word of it reaches its engine: half a second of a usual card."""


class HedgeEnd(StrEnum):
    """What became of a second attempt."""

    WON = "won"
    """It gave its first token first, and the first attempt was cancelled."""
    LOST = "lost"
    """The first attempt gave its first token after all."""
    FAILED = "failed"
    """By itself, and the first attempt went on."""
    REPLACED = "replaced"
    """The first attempt failed, and it went on alone, as a next attempt would have."""
    GIVEN_UP = "given_up"
    """The request was over before either had given a token."""


class FirstTokens(NamedTuple):
    """How late the first tokens of one replica were lately."""

    ratios: tuple[float, ...] = ()
    """Seconds that they took over those that were foreseen; the newest last."""
    on_time_ratio: float | None = None
    """What `ON_TIME_SHARE` of them do not pass; None: too few are known."""


def learned(known: FirstTokens, taken_seconds: float, foreseen_seconds: float) -> FirstTokens:
    """What is known after one more. One that was cancelled for being late took so long as yet: without it all others would seem late."""
    ratios = (*known.ratios[1 - RATIOS_KEPT_MAX :], max(0.0, taken_seconds) / max(foreseen_seconds, FORESEEN_SECONDS_MIN))
    if len(ratios) < RATIOS_KNOWN_MIN:
        return FirstTokens(ratios)
    return FirstTokens(ratios, sorted(ratios)[math.ceil(ON_TIME_SHARE * len(ratios)) - 1])


def late_after_seconds(known: FirstTokens, foreseen_seconds: float) -> float | None:
    """From the dispatch: after so long a first token that was foreseen so is late; None: not enough is known of the replica."""
    if known.on_time_ratio is None:
        return None
    return max(LATE_SECONDS_MIN, known.on_time_ratio * max(foreseen_seconds, FORESEEN_SECONDS_MIN))


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be read and written for nothing now; below zero where a prompt turned out longer than it was taken for."""

    tokens: float = 0.0


def after_delivery(budget: Budget, tokens: float) -> Budget:
    """Clients got so many tokens, prompts included."""
    return Budget(min(BUDGET_TOKENS_MAX, budget.tokens + HEDGED_SHARE_MAX * max(0.0, tokens)))


def price_tokens(prompt_tokens: float) -> float:
    """What one hedge is taken to waste, whoever loses: one of the two prompts, and what is written until its engine hears of it."""
    return prompt_tokens + CANCEL_TOKENS


def wasted_tokens(end: HedgeEnd, prompt_tokens: float, written_tokens: float) -> float:
    """What one hedge wasted.

    Args:
        end: what became of it.
        prompt_tokens: by the engine's count, if there was one.
        written_tokens: of the loser's, those that came here. Of what its engine wrote until it heard nobody knows.
    """
    return 0.0 if end is HedgeEnd.REPLACED else prompt_tokens + max(CANCEL_TOKENS, written_tokens)


def after_start(budget: Budget, price: float) -> Budget:
    """A hedge begins, and is paid for; `why_not_hedged` has seen that it can be."""
    return Budget(budget.tokens - price)


def after_end(budget: Budget, price: float, wasted: float) -> Budget:
    """It is over: what it was taken for is made what it came to."""
    return Budget(min(BUDGET_TOKENS_MAX, budget.tokens + price - wasted))


@dataclass(frozen=True, slots=True)
class LateRequest:
    """One whose first token is late."""

    waited_seconds: float
    """Since its attempt was dispatched."""
    price_tokens: float
    is_suspect: bool = False
    """An engine died with it."""
    room_is_wanted: bool = False
    """Somebody waits for room of its model, or what is free is kept for a better tier."""
    foreseen_seconds: float | None = None
    """Until the first token on the best other node with free room; None: there is none."""
    is_on_trial: bool = False
    """That node's replica failed lately, and has one request at a time to show itself by."""


def why_not_hedged(late: LateRequest, budget: Budget) -> str | None:
    """Why nobody else is asked as well, in words; None: somebody is."""
    if late.is_suspect:
        return "an engine died with it, and it is not to run twice at a time"
    if late.price_tokens > budget.tokens:
        return f"it would cost up to {late.price_tokens:.0f} tokens, and {max(0.0, budget.tokens):.0f} are left for hedging"
    if late.room_is_wanted:
        return "what room there is others wait for"
    if late.foreseen_seconds is None:
        return "no other node has room for it now"
    if late.is_on_trial:
        return "the best other node failed lately, and is being tried"
    # Whatever is late is usually about to be so for as long again.
    if late.foreseen_seconds > late.waited_seconds:
        return f"another node would take {late.foreseen_seconds:.2f} s, longer than it has waited"
    return None
