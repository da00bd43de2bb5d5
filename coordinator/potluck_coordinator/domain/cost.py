"""What it would cost to answer a request at a replica: expected seconds, term by term.

Decides the score of a placement; everything is seconds, so nothing is weighed by hand. Reading waits for what is to be read before it,
writing goes as fast as the batch that the request would join, a cache that fills costs more than in proportion, and a node that may go away
costs what would be done again. It must not know how any of it was measured, nor candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from potluck_coordinator.domain.forecast import Work
    from potluck_coordinator.domain.placement import ReplicaView

CACHE_BARRIER_SECONDS: Final = 0.15
"""The cost of a cache that would be half full; three quarters cost three times as much. The same as in smg's least_load."""
CACHE_SHARE_MAX: Final = 0.98
"""Above it the barrier stays as high as here."""
LOSS_NOTICED_SECONDS: Final = 4.0
"""How long the loss of a node goes unnoticed at worst, before its answer goes on elsewhere."""
BACKLOG_SHARE_MIN: Final = 0.25
"""Of what is to be read, however long ago it came, until the first token shows that it was: the engine may as well stand still."""
FOREIGN_PROMPT_TOKENS: Final = 512.0
"""Of a request that waits in an engine and is not ours: nobody tells."""


class Cost(NamedTuple):
    """Expected seconds."""

    line_seconds: float
    """The round trip to its node."""
    waiting_seconds: float
    """Until all that was to be read there before it has been."""
    reading_seconds: float
    """Of the prompt's tokens that are not cached."""
    writing_seconds: float
    """Of the answer, in the batch it would join."""
    cache_seconds: float
    """The barrier on the cache that it would fill."""
    loss_seconds: float
    """What is done again if the node goes away meanwhile, times how likely that is."""

    @property
    def total_seconds(self) -> float:
        """What placement compares."""
        return sum(self)

    @property
    def first_token_seconds(self) -> float:
        """Until the first token, as far as it is foreseen."""
        return self.line_seconds + self.waiting_seconds + self.reading_seconds


def cost(replica: ReplicaView, work: Work, now: float, cached_tokens: float = 0.0) -> Cost:
    """What the request would cost there.

    Args:
        replica: as it is now.
        work: the request's, as it is expected.
        now: monotonic seconds.
        cached_tokens: of its prompt that the replica need not read again.
    """
    speeds, weight = replica.speeds, replica.weight
    rate = speeds.prefill_tokens_per_second * weight
    backlog_tokens = replica.prefill_backlog_tokens
    if backlog_tokens:
        backlog_tokens = max(backlog_tokens * BACKLOG_SHARE_MIN, backlog_tokens - rate * (now - replica.prefill_since_seconds))
    waiting_tokens = backlog_tokens + replica.foreign_waiting_count * FOREIGN_PROMPT_TOKENS
    batch = min(replica.in_flight_count + replica.foreign_running_count, replica.slot_count) + 1
    waiting, reading = waiting_tokens / rate, max(1.0, work.prompt_tokens - cached_tokens) / rate
    writing = work.answer_tokens * (speeds.decode_base_seconds + speeds.decode_each_seconds * batch) / weight
    service = waiting + reading + writing
    redone = LOSS_NOTICED_SECONDS + (work.prompt_tokens + work.answer_tokens / 2) / rate
    # For the short times and small rates that these are, the chance is their product.
    loss = min(1.0, replica.losses_per_second * service) * redone
    return Cost(replica.round_trip_seconds, waiting, reading, writing, _barrier(replica, work), loss)


def cache_share(replica: ReplicaView, tokens: float) -> float:
    """The share of the replica's cache that would be in use with so many tokens more; 0 where nobody says how much it holds."""
    capacity = replica.kv_capacity_tokens
    if capacity <= 0:
        return 0.0
    return (replica.tokens_in_use + replica.tokens_bounded(tokens)) / capacity


def _barrier(replica: ReplicaView, work: Work) -> float:
    share = min(cache_share(replica, work.tokens), CACHE_SHARE_MAX)
    return CACHE_BARRIER_SECONDS * share / (1 - share)
