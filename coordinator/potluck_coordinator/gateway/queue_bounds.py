"""The hard bounds of what waits: so many requests for each model, and so many bytes of bodies for all of them together.

Decides when a bound is reached, and who gives way at it, so that nobody can fill what all share: at the bound of requests whom the line
names, at that of bytes the largest of whoever holds the most of them, if it is more than the newcomer would hold. It must not know
replicas or waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from potluck_coordinator.domain.admission import AdmissionLimits
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.model_line import ModelLine
    from potluck_coordinator.gateway.waiting import WaitingRequest
    from potluck_protocol.values import AccountId


class _Held:
    """What waits of one account, in the order of its coming."""

    __slots__ = ("bytes", "waiting")

    def __init__(self) -> None:
        self.bytes = 0
        self.waiting: dict[WaitingRequest, None] = {}


class QueueBounds:
    """The bounds of one gateway, and what its accounts hold of them.

    Args:
        limits: how many requests, and how many bytes.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._held: dict[AccountId, _Held] = {}
        self._bytes = 0

    def joined(self, waiting: WaitingRequest) -> None:
        """It waits."""
        held = self._held.setdefault(waiting.request.account_id, _Held())
        held.waiting[waiting] = None
        held.bytes += len(waiting.request.body)
        self._bytes += len(waiting.request.body)

    def left(self, waiting: WaitingRequest) -> None:
        """It does not, any more."""
        held = self._held.get(waiting.request.account_id)
        if held is None or waiting not in held.waiting:
            return
        del held.waiting[waiting]
        held.bytes -= len(waiting.request.body)
        self._bytes -= len(waiting.request.body)
        if not held.waiting:
            del self._held[waiting.request.account_id]

    def are_reached(self, line: ModelLine, request: InferenceRequest, announced_count: float = 0.0) -> bool:
        """Whether the request finds no place, and nobody gives way to it."""
        if line.waiting_count + announced_count >= self._limits.queue_length_max and line.gives_way(request) is None:
            return True
        return self._lacks_bytes(request) and self._holder_of_most(request) is None

    def give_way(self, line: ModelLine, request: InferenceRequest) -> Iterator[WaitingRequest]:
        """Who has to go for the request. Whoever asks sends one away, and says that it left, before the next is named.

        What goes may be less than what comes: the bound of bytes can be passed by the last newcomer's body, and nobody comes after it.
        """
        if line.waiting_count >= self._limits.queue_length_max and (gone := line.gives_way(request)) is not None:
            yield gone
        while self._lacks_bytes(request) and (holder := self._holder_of_most(request)) is not None:
            # Nobody takes the rest of an answer away that has begun. Of equals the newest goes.
            theirs = (waiting for waiting in reversed(holder.waiting) if waiting.request.continued is None)
            largest = max(theirs, key=lambda waiting: len(waiting.request.body), default=None)
            if largest is None:
                return
            yield largest

    def _lacks_bytes(self, request: InferenceRequest) -> bool:
        return self._bytes + len(request.body) > self._limits.queue_bytes_max

    def _holder_of_most(self, request: InferenceRequest) -> _Held | None:
        """Who holds the most bytes, if that is more than the request's account would hold with it."""
        most = max(self._held.values(), key=lambda held: held.bytes, default=None)
        own = self._held.get(request.account_id)
        own_bytes = len(request.body) + (0 if own is None else own.bytes)
        return most if most is not None and most.bytes > own_bytes else None
