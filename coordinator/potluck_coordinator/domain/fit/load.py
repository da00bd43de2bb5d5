"""What a replica is asked to hold and do.

Decides nothing; these are the words that memory, speed and flags share.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck_coordinator.domain.fit.engines import EngineTraits


@dataclass(frozen=True, slots=True)
class Load:
    """The wish: so many sequences at a time, each up to so many tokens, prompt and answer together."""

    traits: EngineTraits
    context_length_tokens: int
    sequence_count: int

    def __post_init__(self) -> None:
        if self.context_length_tokens < 1 or self.sequence_count < 1:
            raise ValueError("a replica serves at least one sequence of at least one token")

    def batch_tokens(self, *, on_processor: bool = False) -> int:
        """Prompt tokens that go through the model at a time."""
        limit = self.traits.host_batch_tokens if on_processor else self.traits.batch_tokens
        return min(limit, self.context_length_tokens * (1 if self.traits.pages_kv else self.sequence_count))
