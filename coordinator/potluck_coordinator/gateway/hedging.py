"""The second attempts of one gateway: where they run, what they may waste, and what became of them.

Decides nothing of its own: whether a late request is worth one is `domain.hedging`, where there is room that nobody waits for `queues`. It
keeps the budget. How a request's two attempts end is `race`'s to carry out. It must not know bytes, holds or clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.decisions import StepKind
from potluck_coordinator.domain.hedging import (
    Budget,
    HedgeEnd,
    LateRequest,
    after_delivery,
    after_end,
    after_start,
    price_tokens,
    wasted_tokens,
    why_not_hedged,
)
from potluck_protocol.errors import PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.placement import Placement
    from potluck_coordinator.gateway.answer import Answer
    from potluck_coordinator.gateway.attempt import Attempt
    from potluck_coordinator.gateway.decisions import Decisions
    from potluck_coordinator.gateway.dispatching import Dispatching
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.quarantine import Quarantine
    from potluck_coordinator.gateway.queues import Queues
    from potluck_protocol.values import ModelId, NodeId


class Hedge:
    """One second attempt, from its dispatch to its request's end.

    Args:
        attempt: itself.
        first: the attempt beside which it runs.
        prompt_tokens: of the one prompt that both read, as expected.
    """

    __slots__ = ("attempt", "end", "first", "prompt_tokens")

    def __init__(self, attempt: Attempt, first: Attempt, prompt_tokens: float) -> None:
        self.attempt = attempt
        self.first = first
        self.prompt_tokens = prompt_tokens
        self.end: HedgeEnd | None = None
        """None while it is not known which of the two is read."""

    @property
    def price_tokens(self) -> float:
        """What was taken from the budget for it."""
        return price_tokens(self.prompt_tokens)

    def wasted_tokens(self, prompt_tokens: float) -> float:
        """What it came to, by a better count of the prompt."""
        loser = self.first if self.end is HedgeEnd.WON else self.attempt
        return wasted_tokens(self.end or HedgeEnd.GIVEN_UP, prompt_tokens, float(loser.chunk_count))


class Hedging:
    """One gateway's.

    Args:
        queues: know of room that nobody waits for.
        dispatching: starts the attempts.
        quarantine: knows the requests that engines died with.
        decisions: keeps who was hedged, and why others were not.
        on_end: called with each hedge's model, end and wasted tokens.
    """

    def __init__(
        self,
        *,
        queues: Queues,
        dispatching: Dispatching,
        quarantine: Quarantine,
        decisions: Decisions,
        on_end: Callable[[ModelId, HedgeEnd, float], None],
    ) -> None:
        self._queues = queues
        self._dispatching = dispatching
        self._quarantine = quarantine
        self._decisions = decisions
        self._on_end = on_end
        self.budget = Budget()

    def begin(self, entry: CatalogueEntry, request: InferenceRequest, first: Attempt, excluded: frozenset[NodeId]) -> Hedge | None:
        """Another attempt at a request whose first token is late, on another node and none of these; None: it is not worth it."""
        assert first.late_after_seconds is not None, "otherwise it is never late"
        placement = self._queues.spare(request, excluded | {first.node_id})
        prompt_tokens = float(request.prompt_bytes) if request.work is None else request.work.prompt_tokens
        chosen = None if placement is None else placement.chosen
        late = LateRequest(
            waited_seconds=first.late_after_seconds,
            price_tokens=price_tokens(prompt_tokens),
            is_suspect=self._quarantine.suspects(request),
            room_is_wanted=placement is None,
            foreseen_seconds=None if placement is None else _foreseen_seconds(placement),
            is_on_trial=chosen is not None and chosen.half_open,
        )
        waited = f"no first token after {late.waited_seconds:.2f} s"
        why_not, attempt = why_not_hedged(late, self.budget), None
        if why_not is None and chosen is not None:
            try:
                attempt = self._dispatching.dispatch(request, entry, chosen, excluded, as_hedge=True)
            except PotluckError as error:
                why_not = error.message
        if attempt is None:
            self._decisions.note(request, StepKind.NOT_HEDGED, f"{waited}, and {why_not}", placement=placement)
            return None
        left = f"it may waste {late.price_tokens:.0f} of the {self.budget.tokens:.0f} tokens that are left for hedging"
        self.budget = after_start(self.budget, late.price_tokens)
        words = f"{waited}, which 95 of 100 here do not take; {left}"
        self._decisions.note(request, StepKind.HEDGED, words, node_id=attempt.node_id, attempt_id=attempt.attempt_id, placement=placement)
        return Hedge(attempt, first, prompt_tokens)

    def ended(self, request: InferenceRequest, answer: Answer) -> None:
        """An answer is over: what its client got feeds the budget, what its hedge wasted is taken from it."""
        usage = answer.usage
        # No node's word gives the budget more than can be true: a token is a byte at least.
        prompt_tokens = 0 if usage is None else min(usage.prompt_token_count, request.prompt_bytes)
        written_tokens = answer.token_count
        if usage is not None and not request.stream:
            written_tokens = min(usage.completion_token_count, len(answer.document))
        self.budget = after_delivery(self.budget, prompt_tokens + written_tokens)
        hedge = answer.hedge
        if hedge is not None and hedge.end is not None:
            wasted = hedge.wasted_tokens(prompt_tokens or hedge.prompt_tokens)
            self.budget = after_end(self.budget, hedge.price_tokens, wasted)
            self._on_end(request.model_id, hedge.end, wasted)


def _foreseen_seconds(placement: Placement) -> float | None:
    """Until the first token at the replica that was chosen."""
    costs = (candidate.cost for candidate in placement.candidates if candidate.chosen)
    return next((cost.first_token_seconds for cost in costs if cost is not None), None)
