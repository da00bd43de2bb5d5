"""What must be true at every moment of every simulated run, whatever goes wrong in it.

Decides from facts that the world tells it and the deciding functions do not see: which token of the answer each frame really carried, and
who really held a lease. It must not know why anything happened. A break is counted and kept in words, and the run goes on.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Final

BREAKS_KEPT_MAX: Final = 20
"""In words; the others are only counted."""


class Invariant(StrEnum):
    """One promise."""

    TOKEN_LOST = "no token is lost"  # noqa: S105 - of an answer
    TOKEN_REPEATED = "no token comes twice"  # noqa: S105
    CHARGED_TWICE = "no token is charged twice"
    SUM_NOT_ZERO = "postings sum to zero"
    GHOST_LEASE = "no word counts that came without a lease"
    IDLE_WHILE_WAITING = "no request waits or is refused while a node could take it"
    HELD_BACK_COOL = "no card is held back that has long been cool"


class Invariants:
    """The breaks of one run."""

    def __init__(self) -> None:
        self.counts: Counter[Invariant] = Counter()
        self.breaks: list[str] = []

    def break_of(self, invariant: Invariant, words: str, now: float) -> None:
        """Writes one down."""
        self.counts[invariant] += 1
        if len(self.breaks) < BREAKS_KEPT_MAX:
            self.breaks.append(f"{now:.3f} s: not so: {invariant}: {words}")

    @property
    def break_count(self) -> int:
        """Of all of them."""
        return self.counts.total()

    def tokens_arrived(self, number: int, first_token_index: int, token_count: int, delivered_tokens: int, now: float) -> None:
        """A client is given these tokens of its answer, after so many others."""
        if first_token_index > delivered_tokens:
            self.break_of(Invariant.TOKEN_LOST, f"request {number} went from token {delivered_tokens} to {first_token_index}", now)
        elif first_token_index < delivered_tokens:
            self.break_of(Invariant.TOKEN_REPEATED, f"request {number} got {token_count} from {first_token_index} again", now)

    def answer_ended(self, number: int, delivered_tokens: int, answer_tokens: int, now: float) -> None:
        """A client is told that its answer is whole."""
        if delivered_tokens != answer_tokens:
            what = Invariant.TOKEN_LOST if delivered_tokens < answer_tokens else Invariant.TOKEN_REPEATED
            self.break_of(what, f"request {number} ended with {delivered_tokens} tokens of {answer_tokens}", now)

    def request_charged(self, number: int, charged_micro_credits: int, price_micro_credits: int, now: float) -> None:
        """A request is over: what all its attempts were charged, and what its prompt and the tokens its client has got cost once."""
        if charged_micro_credits > price_micro_credits:
            words = f"request {number} paid {charged_micro_credits} for what costs {price_micro_credits}"
            self.break_of(Invariant.CHARGED_TWICE, words, now)

    def books_sum(self, sum_micro_credits: int, what: str, now: float) -> None:
        """All balances together after a transaction."""
        if sum_micro_credits != 0:
            self.break_of(Invariant.SUM_NOT_ZERO, f"{what} left {sum_micro_credits}", now)
