"""How long answers will be, learned from those that were whole.

Decides what is expected before an engine has counted anything: a mean and a high quantile of an answer's tokens. Lengths are counted in
bins, each a fifth wider than the one before, and older ones weigh less: memory is bounded, and a model whose users change is learned anew.
It must not know requests or nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from potluck_coordinator.domain.forecast import Forecast, Work

BIN_GROWTH: Final = 1.2
"""Of one bin over the one before: a length is known to a fifth."""
BIN_COUNT: Final = 80
"""The last one begins above 1,800,000 tokens: longer than any context."""
FORGETTING: Final = 0.99
"""What an answer weighs against the next: the last hundred make up two thirds of what is known."""
TOKENS_GUESS: Final = 256
"""Of an answer by a model that has not answered yet."""
GUESS_WEIGHT: Final = 2.0
"""In answers: a few real ones outweigh the guess."""
OWN_ANSWERS_MIN: Final = 20.0
"""So many answers lately say more of an account's next one than the model's others do."""
HIGH_SHARE: Final = 0.9
"""Of answers, that are no longer than the high expectation."""


def _bin_of(tokens: float) -> int:
    return 0 if tokens <= 1 else min(BIN_COUNT - 1, math.ceil(math.log(tokens, BIN_GROWTH)))


_BIN_TOKENS: Final = tuple(BIN_GROWTH**number for number in range(BIN_COUNT))


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is known of some answers: in each bin their weight, and the sum of their tokens."""

    weights: tuple[float, ...] = ()
    token_sums: tuple[float, ...] = ()
    weight: float = field(init=False, compare=False)
    """In answers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", sum(self.weights))


def guessed(tokens: float = TOKENS_GUESS) -> Lengths:
    """Of a model that has not answered yet."""
    return learned(Lengths(), tokens, GUESS_WEIGHT)


def learned(lengths: Lengths, tokens: float, weight: float = 1.0) -> Lengths:
    """With one whole answer more."""
    weights = [known * FORGETTING for known in lengths.weights] or [0.0] * BIN_COUNT
    sums = [known * FORGETTING for known in lengths.token_sums] or [0.0] * BIN_COUNT
    number = _bin_of(tokens)
    weights[number] += weight
    sums[number] += weight * max(0.0, tokens)
    return Lengths(tuple(weights), tuple(sums))


@dataclass(frozen=True, slots=True)
class AnswerExpectation:
    """Tokens of one answer."""

    mean: float
    high: float
    """What nine of ten do not pass."""


def expected(lengths: Lengths, tokens_max: int | None) -> AnswerExpectation:
    """Of the next answer, which is cut at so many tokens; None: at none."""
    total = lengths.weight
    if total <= 0:
        return expected(guessed(), tokens_max)
    limit = math.inf if tokens_max is None else float(max(0, tokens_max))
    if tokens_max is None:
        mean = sum(lengths.token_sums) / total
    else:
        known = zip(lengths.token_sums, lengths.weights, strict=True)
        mean = sum(min(tokens, weight * limit) for tokens, weight in known if weight) / total
    number = bisect_left(tuple(accumulate(lengths.weights)), HIGH_SHARE * total)
    return AnswerExpectation(mean, max(mean, min(_BIN_TOKENS[number], limit)))


def expected_of(own: Lengths | None, model: Lengths, tokens_max: int | None) -> AnswerExpectation:
    """By the account's own answers where there are enough of them, else by everybody's."""
    return expected(own if own is not None and own.weight >= OWN_ANSWERS_MIN else model, tokens_max)


def teaches(tokens: float, tokens_max: int | None, present: AnswerExpectation) -> bool:
    """Whether an answer says how long answers are. One that its client's bound has cut would have been longer, and says only that.

    It is learned from where it is longer than what is expected as it is.

    Args:
        tokens: that it had.
        tokens_max: that its client allowed; None: as many as it takes.
        present: what was expected of an answer without a bound.
    """
    was_cut = tokens_max is not None and 0 < tokens_max <= tokens
    return not was_cut or tokens > present.mean


def work_of(
    forecast: Forecast,
    own: Lengths | None,
    model: Lengths,
    *,
    prompt_bytes: int,
    tokens_min: int,
    tokens_max: int | None,
    answer_count: int,
) -> Work:
    """One request's.

    Args:
        forecast: what is known of its model's prompts.
        own: its account's answers by that model.
        model: everybody's.
        prompt_bytes: of its text.
        tokens_min: that its longest prompt has for certain.
        tokens_max: of each answer, as its client asked; None: no bound.
        answer_count: how many it gets.
    """
    answer = expected_of(own, model, tokens_max)
    prompt_tokens = max(prompt_bytes / forecast.bytes_per_token, float(tokens_min), 1.0)
    return Work(prompt_tokens, answer.mean * answer_count, answer.high * answer_count)
