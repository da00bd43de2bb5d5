"""A request of a simulated client, and what became of it.

Decides nothing. The coordinator's model moves it along, and the figures are made from it at the end.
"""

from __future__ import annotations

from enum import StrEnum

from potluck_coordinator.domain.requests import Course
from potluck_coordinator.simulation.engine_model import Prefix
from potluck_protocol.values import AccountId, NodeId


class Outcome(StrEnum):
    """How it ended for its client."""

    OPEN = "open"
    SERVED = "served"
    REFUSED = "refused"
    """At once, with a time to come back."""
    TOO_LONG = "too long"
    """At once, for good: no context has room for its prompt."""
    FAILED = "failed"
    """With an error, after it had been accepted."""
    LEFT = "left"
    """The client waited longer than its patience for the first token."""


class Request:
    """One request. `answer_tokens` is how long the answer will be, which nobody but an oracle knows before its end."""

    __slots__ = (
        "account_id",
        "answer_tokens",
        "answer_tokens_max",
        "arrived_at",
        "attempt_count",
        "attempts",
        "course",
        "delivered_tokens",
        "ended_at",
        "excluded",
        "first_number",
        "first_token_at",
        "generated_tokens",
        "last_token_at",
        "number",
        "outcome",
        "patience_seconds",
        "prefixes",
        "prompt_tokens",
        "retry_after_seconds",
        "tier",
        "user",
        "users_name",
        "waiting",
        "weight",
    )

    def __init__(
        self,
        number: int,
        account_id: AccountId,
        arrived_at: float,
        prompt_tokens: int,
        answer_tokens: int,
        answer_tokens_max: int,
        prefixes: tuple[Prefix, ...],
        patience_seconds: float,
        users_name: str,
        user: object,
        *,
        tier: str = "flex",
        weight: float = 1.0,
    ) -> None:
        self.number = number
        self.first_number = number
        """Of the first try, where this is another one."""
        self.account_id = account_id
        self.arrived_at = arrived_at
        self.prompt_tokens = prompt_tokens
        self.answer_tokens = answer_tokens
        self.answer_tokens_max = answer_tokens_max
        self.prefixes = prefixes
        self.patience_seconds = patience_seconds
        self.users_name = users_name
        self.user = user
        self.tier = tier
        self.weight = weight
        self.outcome = Outcome.OPEN
        self.waiting = False
        self.course = Course()
        """Its way by the live machine."""
        self.excluded: frozenset[NodeId] = frozenset()
        self.attempt_count = 0
        self.attempts: list[int] = []
        self.delivered_tokens = 0
        self.generated_tokens = 0
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.ended_at = 0.0
        self.retry_after_seconds = 0.0

    @property
    def tokens_left(self) -> int:
        """Of its answer."""
        return self.answer_tokens - self.delivered_tokens

    @property
    def token_seconds(self) -> float | None:
        """Between two tokens of the whole answer, in the mean; None for an answer of one token, or none."""
        if self.first_token_at is None or self.delivered_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.delivered_tokens - 1)
