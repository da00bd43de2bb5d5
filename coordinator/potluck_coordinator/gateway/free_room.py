"""What is free at the nodes, and who may take it: those that wait, in their turn, and newcomers beside them.

Decides who may pass whom. Continued requests come first, then the default tier, then flex. One that is too large for what is left lets
smaller ones pass for a while; then what becomes free is held for it, from those whose turn is no earlier than its own. It must not know
who is let in to wait, what is told to whom, or how a request is started.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.tiers import flex_comes_free, flex_fits, flex_lacks_slots

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from potluck_coordinator.domain.admission import Capacity
    from potluck_coordinator.domain.forecast import Work
    from potluck_coordinator.domain.placement import Placement
    from potluck_coordinator.gateway.expectations import Expectations
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.model_line import ModelLine
    from potluck_coordinator.gateway.placing import Placing
    from potluck_coordinator.gateway.waiting import WaitingRequest
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import NodeId

OVERTAKEN_SECONDS_MAX: Final = 5.0
"""How long a request that needs much of a cache lets smaller ones pass. After that those behind it wait until it has its room."""
_ANYWHERE: Final[tuple[object, ...]] = ()
"""Among the places where a request may go: all of them."""


class FreeRoom:
    """One gateway's.

    Args:
        placing: where requests may run.
        expectations: what they are expected to be.
        clock: for how long one was overtaken.
        reserve_percent: of each model's room, what flex leaves to the default tier.
    """

    def __init__(self, placing: Placing, expectations: Expectations, clock: Clock, reserve_percent: int) -> None:
        self._placing = placing
        self._expectations = expectations
        self._clock = clock
        self._reserve_percent = reserve_percent

    def given(self, line: ModelLine) -> Iterator[tuple[WaitingRequest, Placement]]:
        """Of those that wait, each one that has its turn and a place. Whoever asks starts it before the next is named."""
        line.held_for = None
        for turn in (tuple(line.continued), *(line.queues[tier].in_turn() for tier in (ServiceTier.DEFAULT, ServiceTier.FLEX))):
            if not (yield from self._given_in_turn(line, turn)):
                return

    def _given_in_turn(self, line: ModelLine, turn: Iterable[WaitingRequest]) -> Generator[tuple[WaitingRequest, Placement], None, bool]:
        """Returns whether there may be something left for those that come after these."""
        lacking_tokens: dict[tuple[object, ...], float] = {}
        now = self._clock.monotonic_seconds()
        for waiting in turn:
            request, work = waiting.request, waiting.work
            held = line.held_from(request)
            kept_for = None if held is None else held.request
            if not self._placing.has_free_slot(request, kept_for):
                return False
            places = (request.trusted_only, request.endpoint, request.engine_kinds)
            if work.wanted_tokens >= min(lacking_tokens.get(places, math.inf), lacking_tokens.get(_ANYWHERE, math.inf)):
                continue
            left = self._left_to_flex(line, request, now)
            if left is not None and not flex_fits(left, work.wanted_tokens + _kept_tokens(held)):
                if flex_lacks_slots(left):
                    return True  # so does whatever else of flex there is
                # What comes free would always be too little for it, and enough for smaller ones: they may pass, for a while.
                lacking_tokens[_ANYWHERE] = work.wanted_tokens
                if held is None and self._waits_long_enough(line, waiting, left, now):
                    line.held_for = waiting
                    return True
                continue
            placement = self._placing.place(request, waiting.excluded, work, kept_for)
            if placement.chosen is not None:
                yield waiting, placement
            elif held is None and self._placing.lacks_cache(request, waiting.excluded):
                # A slot would be free for it, and the cache behind it is not: smaller ones may pass, for a while. Then they go elsewhere.
                lacking_tokens[places] = work.wanted_tokens
                if now - waiting.arrived_at_seconds > OVERTAKEN_SECONDS_MAX:
                    line.held_for = waiting
            # One that no free replica suits does not hold up those behind it.
        return True

    def _waits_long_enough(self, line: ModelLine, waiting: WaitingRequest, left: Capacity, now: float) -> bool:
        """Whether what flex may fill is to be held for one of flex that is too large for what is left of it.

        Not for one that no free replica suits, nor for one that waits for what the default tier has: it would gain nothing by it.
        """
        if now - waiting.arrived_at_seconds <= OVERTAKEN_SECONDS_MAX or not self._placing.lacks_cache(waiting.request, waiting.excluded):
            return False
        return flex_comes_free(left, line.default_use, waiting.work.wanted_tokens)

    def room_for(self, line: ModelLine, request: InferenceRequest, excluded: frozenset[NodeId], now: float) -> Placement | None:
        """Where a newcomer can run now; not where one that was overtaken long enough waits for room."""
        held = line.held_from(request)
        kept_for = None if held is None else held.request
        if not self._placing.has_free_slot(request, kept_for) or not self.may_fill(line, request, now, held):
            return None
        placement = self._placing.place(request, excluded, self._expectations.work(request), kept_for)
        return None if placement.chosen is None else placement

    def reading_seconds(self, line: ModelLine, request: InferenceRequest, excluded: frozenset[NodeId], work: Work, now: float) -> float:
        """Until a replica with room that the request may take has read what keeps others from it; infinite: there is none."""
        held = line.held_from(request)
        if not self.may_fill(line, request, now, held):
            return math.inf
        return self._placing.reading_seconds(request, excluded, work, None if held is None else held.request)

    def may_fill(self, line: ModelLine, request: InferenceRequest, now: float, held: WaitingRequest | None = None) -> bool:
        """Whether the request would stay out of what is kept for a better tier, and of what is held for another one, if that is given."""
        left = self._left_to_flex(line, request, now)
        return left is None or flex_fits(left, self._expectations.work(request).wanted_tokens + _kept_tokens(held))

    def _left_to_flex(self, line: ModelLine, request: InferenceRequest, now: float) -> Capacity | None:
        """What requests of its tier may fill; None: whatever there is."""
        if request.tier is ServiceTier.DEFAULT or request.continued is not None:
            return None
        return line.capacity(self._placing.capacity(request.model_id), request.tier, self._reserve_percent, now)


def _kept_tokens(held: WaitingRequest | None) -> float:
    """What is held of that which flex may fill for another one of flex. One of a better tier takes its room from all there is."""
    of_flex = held is not None and held.request.tier is ServiceTier.FLEX and held.request.continued is None
    return held.work.wanted_tokens if held is not None and of_flex else 0.0
