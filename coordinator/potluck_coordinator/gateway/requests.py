"""The one path of a request up to its answer: check, get a slot from the `queues`, which places and dispatches it, open the answer.

Both edges (`http_inference` and `inference_servicer`) come through here and read the `answer` they get, which relays and settles. Decides
that only an attempt which its node or engine would not take (`no_capacity`) is placed anew: an answer that has begun is never moved. What
stands behind it is joined here: `placing`, `queues`, `dispatching`, `quarantine`. It must not know HTTP, gRPC or tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from potluck_coordinator.gateway.dispatching import Dispatching
from potluck_coordinator.gateway.engine_errors import INPUT_PARAM
from potluck_coordinator.gateway.placing import Placing
from potluck_coordinator.gateway.quarantine import Quarantine
from potluck_coordinator.gateway.queues import Queues
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_coordinator.domain.admission import AdmissionLimits
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.gateway.answer import Answer
    from potluck_coordinator.gateway.dispatching import Books
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.links import Links
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import ModelId, NodeId

PLACEMENTS_MAX: Final = 3
"""How often a request is placed at most: its node or engine may not take it after all (it paused a moment ago, say)."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as people see it."""

    entry: CatalogueEntry
    ready_replica_count: int


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The bounds of one gateway's requests."""

    admission: AdmissionLimits
    window_bytes: int = 64 * 1024
    """How much of one answer may be on its way; a client that reads slower pauses its engine."""


class RequestService:
    """Serves requests from the connected nodes.

    Args:
        links: the nodes.
        books: where money events go.
        catalogue: the models as they are now.
        limits: queue and window bounds.
        clock: for durations and deadlines.
        draw: a random number in [0, 1) for ties.
    """

    def __init__(
        self,
        *,
        links: Links,
        books: Books,
        catalogue: Callable[[], Mapping[ModelId, CatalogueEntry]],
        limits: RequestLimits,
        clock: Clock,
        draw: Callable[[], float],
    ) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._quarantine = Quarantine(links)
        self._placing = Placing(links, self._quarantine, draw)
        self._queues = Queues(self._placing, limits.admission, clock)
        self._dispatching = Dispatching(
            links=links,
            quarantine=self._quarantine,
            books=books,
            window_bytes=limits.window_bytes,
            clock=clock,
            on_start=self._queues.charge,
            on_over=self._queues.over,
            on_slot=self._queues.serve_all,
        )
        self._queues.dispatch = self._dispatching.dispatch

    @property
    def in_flight_count(self) -> int:
        """Answers on their way."""
        return len(self._dispatching.answers)

    def queued_count(self, model_id: ModelId) -> int:
        """Requests waiting for a slot of the model."""
        return self._queues.queued_count(model_id)

    @property
    def waiting_counts(self) -> Mapping[ModelId, int]:
        """How much every model is asked for that has no slot free: its queue, and the people who were refused lately."""
        return self._queues.waiting_counts(self._catalogue())

    def models(self, *, with_offers: bool = False) -> tuple[ModelView, ...]:
        """The catalogue with what is ready now; the entries that are offers, with nothing to serve yet, only if they are asked for."""
        return tuple(
            ModelView(entry, self._placing.ready_replica_count(entry.model_id))
            for entry in self._catalogue().values()
            if with_offers or entry.file is not None
        )

    async def begin(self, request: InferenceRequest) -> Answer:
        """Admits, places and dispatches, and waits until the engine has begun to answer.

        Raises:
            PotluckError: whatever keeps the request from being answered; nothing is then owed.
        """
        entry = self._entry(request)
        self._quarantine.check(request)
        began_at = self._clock.monotonic_seconds()
        excluded: frozenset[NodeId] = frozenset()
        while True:
            answer = await self._queues.slot(request, entry, excluded, self._clock.monotonic_seconds() - began_at)
            try:
                await answer.open()
            except PotluckError as error:
                await answer.close()
                excluded |= {answer.node_id}
                if error.code is not ErrorCode.NO_CAPACITY or len(excluded) == PLACEMENTS_MAX:
                    raise
            except BaseException:
                await answer.close()
                raise
            else:
                return answer

    def _entry(self, request: InferenceRequest) -> CatalogueEntry:
        """The request's model, which serves what is asked; raises PotluckError otherwise."""
        entry = self._catalogue().get(request.model_id)
        if entry is None or entry.file is None:
            message = f"The model {request.model_id!r} does not exist in this pool; `potluck models` and GET /v1/models list those that do."
            raise PotluckError(ErrorCode.MODEL_NOT_FOUND, message, param="model")
        if request.endpoint not in entry.endpoints:
            message = f"The model {request.model_id!r} does not serve {request.endpoint.value}."
            raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="model")
        if request.prompt_tokens_min > entry.context_length_tokens:
            message = f"The prompt is longer than the model's context of {entry.context_length_tokens} tokens. Send a shorter one."
            raise PotluckError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param=INPUT_PARAM[request.endpoint])
        return entry

    def serve_queues(self) -> None:
        """Gives free slots to those whose turn it is: called whenever an answer ends, and a few times a second for all other reasons."""
        self._queues.serve_all()

    def mark_delivered(self) -> None:
        """Writes down what each unfinished answer has earned, for the case that this gateway dies before it settles."""
        self._dispatching.mark_delivered()

    async def stop(self) -> None:
        """Ends every answer and everyone's waiting, as a coordinator that goes away does."""
        self._queues.fail_all(PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=2))
        await self._dispatching.stop()
