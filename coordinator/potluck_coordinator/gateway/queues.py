"""Who gets a slot and when: at once, after waiting in the model's queue, or not at all.

Decides nothing of its own: whether to wait is `domain.admission`, whose turn it is `domain.fairness` in each `waiting.ModelQueue`, where to
run `placing`; what has its turn is handed to the `dispatch`. It must not know nodes, holds, or what an answer is made of.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import AdmissionLimits, Admitted, ModelLoad, Refuse, Wait, admit, retry_after_seconds
from potluck_coordinator.gateway.refusals import Refusals
from potluck_coordinator.gateway.waiting import ModelQueue, WaitingRequest
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Protocol

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.answer import Answer
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.placing import Placing
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import ModelId, NodeId

    class Dispatch(Protocol):
        """Starts an attempt of a request on a replica; `tried` are the nodes that would not take it."""

        def __call__(self, request: InferenceRequest, entry: CatalogueEntry, replica: ReplicaView, tried: frozenset[NodeId]) -> Answer: ...


MEAN_WEIGHT: Final = 0.2
"""Of the newest request in a model's mean duration: the last ten make up nine tenths of it."""


class Queues:
    """The queues of all models of one gateway.

    Args:
        placing: where requests may run.
        limits: the queues' bounds.
        clock: for deadlines.
    """

    def __init__(self, placing: Placing, limits: AdmissionLimits, clock: Clock) -> None:
        self.dispatch: Dispatch
        """Starts whoever has a slot. Whoever dispatches puts this here before the first request comes."""
        self._placing = placing
        self._limits = limits
        self._refusals = Refusals(clock)
        self._queues: dict[ModelId, ModelQueue] = {}
        self._request_seconds_mean: dict[ModelId, float] = {}

    def queued_count(self, model_id: ModelId) -> int:
        """Requests waiting for a slot of the model."""
        queue = self._queues.get(model_id)
        return 0 if queue is None else len(queue)

    def waiting_counts(self, model_ids: Collection[ModelId]) -> dict[ModelId, int]:
        """How much every model is asked for that has no slot free: its queue, and the people who were refused lately."""
        counts = self._refusals.counts(model_ids)
        for model_id, queue in self._queues.items():
            if waiting_count := len(queue):
                counts[model_id] = counts.get(model_id, 0) + waiting_count
        return counts

    async def slot(self, request: InferenceRequest, entry: CatalogueEntry, excluded: frozenset[NodeId], waited_seconds: float) -> Answer:
        """A dispatched attempt, at once or after waiting for a slot.

        Raises:
            PotluckError: NO_CAPACITY, QUEUE_FULL or QUEUE_TIMEOUT, or the dispatch's own.
        """
        load = self._load(request, excluded)
        if load.free_slot_count and load.queued_count:
            # Whoever waits comes first. What is free after that suits none of them, and is not kept from others.
            self.serve(request.model_id)
            load = self._load(request, excluded)
        chosen = self._placing.place(request, excluded).chosen if load.free_slot_count else None
        if chosen is None:
            # A slot that is free is then on a node that this request is kept from.
            load = replace(load, free_slot_count=0)
        match admit(load, self._limits, waited_seconds):
            case Admitted():
                assert chosen is not None, "no other slot counts as free"
                return self.dispatch(request, entry, chosen, excluded)
            case Wait(wait_seconds_max):
                return await self._wait(WaitingRequest(request, entry, excluded, wait_seconds_max))
            case Refuse(code, retry_after):
                raise self._refusal(code, request, excluded, retry_after)

    async def _wait(self, waiting: WaitingRequest) -> Answer:
        queue = self.queue(waiting.request.model_id)
        self._make_room(queue, waiting.request)
        queue.join(waiting)
        answer: Answer | None = None
        try:
            async with asyncio.timeout(waiting.seconds_max):
                answer = await waiting.turn
        except TimeoutError:
            retry_after = retry_after_seconds(self._load(waiting.request, waiting.excluded), self._limits)
            raise self._refusal(ErrorCode.QUEUE_TIMEOUT, waiting.request, waiting.excluded, retry_after) from None
        finally:
            queue.leave(waiting)
            if answer is None and waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                # Its turn came in the same moment as its deadline, or as its client went.
                await waiting.turn.result().close()
        return answer

    def _make_room(self, queue: ModelQueue, request: InferenceRequest) -> None:
        """In a full queue somebody gives way to the newcomer, as admission has found."""
        if len(queue) >= self._limits.queue_length_max and (gone := queue.newest_to_give_way(request.account_id)) is not None:
            retry_after = retry_after_seconds(self._load(gone.request, gone.excluded), self._limits)
            gone.turn.set_exception(self._refusal(ErrorCode.QUEUE_FULL, gone.request, gone.excluded, retry_after))

    def serve_all(self) -> None:
        """Gives free slots to those whose turn it is."""
        for model_id in tuple(self._queues):
            self.serve(model_id)

    def serve(self, model_id: ModelId) -> None:
        """The same for one model."""
        for waiting in self.queue(model_id).in_turn():
            if not self._placing.has_free_slot(model_id):
                break
            placement = self._placing.place(waiting.request, waiting.excluded)
            if placement.chosen is None:
                # One that no free replica suits does not hold up those behind it.
                continue
            try:
                waiting.turn.set_result(self.dispatch(waiting.request, waiting.entry, placement.chosen, waiting.excluded))
            except Exception as error:  # noqa: BLE001 - it is this request's failure, and its client is told
                waiting.turn.set_exception(error)

    def charge(self, request: InferenceRequest) -> float:
        """An attempt starts: what its account is charged in advance."""
        return self.queue(request.model_id).charge(request)

    def over(self, request: InferenceRequest, expected_service: float, answer: Answer, seconds: float) -> None:
        """An attempt is over after so long: what its account was charged in advance becomes what it was given."""
        mean = self._request_seconds_mean.get(request.model_id, seconds)
        self._request_seconds_mean[request.model_id] = mean + MEAN_WEIGHT * (seconds - mean)
        self.queue(request.model_id).correct(request, expected_service, answer)

    def fail_all(self, error: PotluckError) -> None:
        """Nobody who waits gets a slot any more."""
        for queue in self._queues.values():
            for waiting in queue.in_turn():
                waiting.turn.set_exception(error)

    def queue(self, model_id: ModelId) -> ModelQueue:
        """The model's, which begins with the first request."""
        if model_id not in self._queues:
            self._queues[model_id] = ModelQueue()
        return self._queues[model_id]

    def _load(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> ModelLoad:
        usable, free = self._placing.slots(request, excluded)
        queue, mean = self.queue(request.model_id), self._request_seconds_mean.get(request.model_id, 1.0)
        is_full = len(queue) >= self._limits.queue_length_max
        return ModelLoad(usable, free, len(queue), mean, is_full and queue.newest_to_give_way(request.account_id) is not None)

    def _refusal(self, code: ErrorCode, request: InferenceRequest, excluded: frozenset[NodeId], retry_after: float) -> PotluckError:
        self._refusals.note(request.model_id, request.account_id)
        placement = self._placing.place(request, excluded)
        text = PotluckError(code).message
        return PotluckError(code, f"{text} Replicas: {placement.explanation()}.", retry_after_seconds=retry_after)
