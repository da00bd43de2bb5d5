"""How fast an engine reads and writes for one client, by the answers that had it to themselves.

Decides which answers say something of which rate, and what is told of many of them. An answer that shares its engine says how full the
engine was, and the fit predicts a single stream. With each rate stands over how long a past it was measured, for long ones slow an engine
down. It must not know clocks, nor how an answer is listened to: `solo_answers` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DECODE_TOKENS_MIN: Final = 32
"""Of an answer; a shorter one is over before its pace shows."""
PREFILL_TOKENS_MIN: Final = 512
"""Of a prompt, beside what was remembered of it: with fewer, what every request costs however short is a large part of the time."""
SECONDS_MIN: Final = 0.01
"""What came in less came at once, from somewhere that had held it back."""
SMOOTHING: Final = 0.3
"""Weight of the newest answer."""
ANSWERS_MIN: Final = 3
"""Before a rate is told: an engine's first answers come while it warms up."""
STEADY_SHARE: Final = 0.05
"""A rate is told anew once it has moved by so much: each new word makes a coordinator think again."""


@dataclass(frozen=True, slots=True)
class SoloAnswer:
    """One streamed answer that its engine made while it had no other."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the prefix cache, and so not read."""
    completion_tokens: int
    first_token_seconds: float
    """From the request to the first token."""
    further_tokens_seconds: float
    """From there to the last one."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One rate, and what it is of."""

    tokens_per_second: float
    past_tokens: float
    """How many tokens stood before each of those that were read or written, on average."""


@dataclass(frozen=True, slots=True)
class RateAverage:
    """What is known of one rate."""

    smoothed: Rate
    answer_count: int = 1
    told: Rate | None = None
    """What others hear of it; None until enough answers have shown it."""


@dataclass(frozen=True, slots=True)
class SoloRates:
    """Both rates of one engine."""

    prefill: RateAverage | None = None
    decode: RateAverage | None = None


def after(rates: SoloRates, answer: SoloAnswer) -> SoloRates:
    """The rates with one answer more; unchanged by one that is too short to say anything."""
    return SoloRates(_after(rates.prefill, prefill_rate(answer)), _after(rates.decode, decode_rate(answer)))


def prefill_rate(answer: SoloAnswer) -> Rate | None:
    """Prompt tokens read a second: the pass over the prompt also gives the first token of the answer."""
    read_tokens = answer.prompt_tokens - answer.cached_tokens
    if answer.cached_tokens < 0 or read_tokens < PREFILL_TOKENS_MIN or answer.first_token_seconds < SECONDS_MIN:
        return None
    return Rate(read_tokens / answer.first_token_seconds, answer.cached_tokens + read_tokens / 2)


def decode_rate(answer: SoloAnswer) -> Rate | None:
    """Answer tokens written a second, beside the first, which comes with the prompt's pass."""
    if answer.prompt_tokens < 0 or answer.completion_tokens < DECODE_TOKENS_MIN or answer.further_tokens_seconds < SECONDS_MIN:
        return None
    return Rate((answer.completion_tokens - 1) / answer.further_tokens_seconds, answer.prompt_tokens + answer.completion_tokens / 2)


def _after(known: RateAverage | None, rate: Rate | None) -> RateAverage | None:
    if rate is None:
        return known
    if known is None:
        return RateAverage(rate)
    smoothed = Rate(
        _between(known.smoothed.tokens_per_second, rate.tokens_per_second), _between(known.smoothed.past_tokens, rate.past_tokens)
    )
    answer_count = known.answer_count + 1
    if answer_count < ANSWERS_MIN:
        return RateAverage(smoothed, answer_count)
    told = known.told
    moved = told is None or abs(smoothed.tokens_per_second - told.tokens_per_second) >= STEADY_SHARE * told.tokens_per_second
    return RateAverage(smoothed, answer_count, smoothed if moved else told)


def _between(before: float, now: float) -> float:
    return before + SMOOTHING * (now - before)
