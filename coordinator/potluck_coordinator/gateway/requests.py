"""The one path of a request up to its answer: check, and open an answer, whose attempts get their slots from the `queues`.

Both edges (`http_inference` and `inference_servicer`) come through here and read the `answer` they get, which goes on elsewhere where a
node fails. Decides which requests are answered at all. What stands behind it is joined here: `gate`, `queues`, `placing`, `dispatching`,
`hedging`, `quarantine`. It must not know HTTP, gRPC or tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from potluck_coordinator.domain.decisions import StepKind
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.decisions import Decisions
from potluck_coordinator.gateway.dispatching import Dispatching
from potluck_coordinator.gateway.engine_errors import INPUT_PARAM
from potluck_coordinator.gateway.expectations import Expectations
from potluck_coordinator.gateway.gate import TIER_LIMITS_DEFAULT, Gate, TierLimits
from potluck_coordinator.gateway.hedging import Hedging
from potluck_coordinator.gateway.placing import Placing
from potluck_coordinator.gateway.quarantine import Quarantine
from potluck_coordinator.gateway.queues import Queues
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_coordinator.domain.admission import AdmissionLimits
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.hedging import HedgeEnd
    from potluck_coordinator.domain.requests import Place
    from potluck_coordinator.gateway.attempt import Attempt
    from potluck_coordinator.gateway.dispatching import Books
    from potluck_coordinator.gateway.gate import Visit
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.rate_windows import Allowance
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, ModelId, NodeId


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as people see it."""

    entry: CatalogueEntry
    ready_replica_count: int


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The bounds of one gateway's requests."""

    admission: AdmissionLimits
    tiers: TierLimits = TIER_LIMITS_DEFAULT
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
        flex_models: those that are deployed in the flex tier; all others have both.
        on_hedge: called with the model, the end and the wasted tokens of each second attempt.
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
        flex_models: Callable[[], frozenset[ModelId]] = frozenset,
        on_hedge: Callable[[ModelId, HedgeEnd, float], None] = lambda *_: None,
    ) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._quarantine = Quarantine(links)
        self._placing = Placing(links, self._quarantine, clock, draw)
        expectations = Expectations()
        links.usual = expectations.usual
        self.gate = Gate(limits.tiers, flex_models, expectations, clock)
        self.decisions = Decisions(clock)
        self.queues = Queues(
            placing=self._placing,
            expectations=expectations,
            limits=limits.admission,
            clock=clock,
            reserve_percent=limits.tiers.reserve_percent,
            decisions=self.decisions,
        )
        self.dispatching = Dispatching(
            links=links,
            quarantine=self._quarantine,
            books=books,
            window_bytes=limits.window_bytes,
            clock=clock,
            on_start=self.queues.charge,
            on_over=self.queues.over,
            on_slot=self.queues.serve_soon,
        )
        self.queues.dispatch = self.dispatching.dispatch
        self._bounded: dict[Answer, Visit] = {}
        """Those under way whose keys have bounds."""
        self.hedging = Hedging(
            queues=self.queues,
            dispatching=self.dispatching,
            quarantine=self._quarantine,
            decisions=self.decisions,
            on_end=on_hedge,
        )

    @property
    def in_flight_count(self) -> int:
        """Attempts on their way."""
        return len(self.dispatching.attempts)

    @property
    def waiting_counts(self) -> Mapping[ModelId, int]:
        """How much every model is asked for that has no slot free: its queue, and the people who were refused lately."""
        return self.queues.waiting_counts(self._catalogue())

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
        arrived_at = self._clock.monotonic_seconds()
        entry, visit = self._let_in(request)

        async def begin(asked: InferenceRequest, place: Place) -> Attempt:
            if place.if_spare:
                return self._begin_if_spare(entry, asked, place.excluded)
            return await self.queues.slot(asked, entry, place.excluded, self._clock.monotonic_seconds() - arrived_at)

        answer = Answer(
            visit.request,
            begin,
            self._clock,
            on_closed=partial(self._end_visit, visit, arrived_at),
            note=partial(self.decisions.note, visit.request),
            begin_hedge=partial(self.hedging.begin, entry),
        )
        if request.caller.quotas.any:
            self._bounded[answer] = visit
        try:
            await answer.open()
        except BaseException as error:
            if isinstance(error, PotluckError):
                visit.refuse(error)
            await answer.close()
            raise
        return answer

    def _begin_if_spare(self, entry: CatalogueEntry, request: InferenceRequest, excluded: frozenset[NodeId]) -> Attempt:
        """An attempt at what an engine has refused: most such requests are at fault themselves, and nobody waits longer for them."""
        placement = self.queues.spare(request, excluded)
        if placement is None or placement.chosen is None:
            raise PotluckError(ErrorCode.NO_CAPACITY)
        words = "another engine is asked whether it takes the request"
        self.decisions.note(request, StepKind.RESTARTED, words, node_id=placement.chosen.node_id, placement=placement)
        return self.dispatching.dispatch(request, entry, placement.chosen, excluded)

    def announce(self, request: InferenceRequest) -> Callable[[], None]:
        """Refuses at once, and without a word to the books, what `begin` would refuse at once.

        What passes has no place yet: `begin` decides. Until what is returned is called, which may be done again, it counts as if it had
        begun for those announced after it: else many would pass by the room of one.
        """
        _, visit = self._let_in(request)
        try:
            over = self.queues.announce(visit.request)
        except BaseException as error:
            if isinstance(error, PotluckError):
                visit.refuse(error)
            visit.take_back()
            raise

        def withdraw() -> None:
            visit.take_back()
            over()

        return withdraw

    def _let_in(self, request: InferenceRequest) -> tuple[CatalogueEntry, Visit]:
        """Past everything before the queues; its story begins here."""
        entry = self._entry(request)
        self._quarantine.check(request)
        self.decisions.arrived(request)
        try:
            return entry, self.gate.enter(request, entry)
        except PotluckError as error:
            self.decisions.note(request, StepKind.REFUSED, error.message)
            raise

    def mark_delivered(self) -> None:
        """Writes down what unfinished answers came to so far, in ledger and keys' days, for the case that this gateway dies."""
        self.dispatching.mark_delivered()
        for answer, visit in self._bounded.items():
            attempt = answer.attempt
            if attempt is not None and attempt.attempt_id in self.dispatching.attempts:
                charge_micro_credits = answer.charge_micro_credits + attempt.charge_so_far()
                visit.mark(attempt.tokens_before + attempt.relayed_token_count, charge_micro_credits)

    def _end_visit(self, visit: Visit, arrived_at: float, answer: Answer) -> None:
        self._bounded.pop(answer, None)
        first = answer.first_token_at_seconds
        first_token_seconds = None if first is None else first - arrived_at
        waited_seconds = self._clock.monotonic_seconds() - arrived_at
        visit.end(answer.usage, answer.token_count, answer.charge_micro_credits, first_token_seconds, waited_seconds=waited_seconds)
        self.hedging.ended(visit.request, answer)
        if answer.node_ids:
            kind = StepKind.BROKE_OFF if answer.usage is None else StepKind.ANSWERED
            words = f"charged {answer.charge_micro_credits} micro-credits"
            self.decisions.note(visit.request, kind, words, node_id=answer.node_id)

    def allowance(self, account_id: AccountId) -> Allowance:
        """What the account has left of the default tier: the edges put it into headers."""
        return self.gate.windows.allowance(account_id)

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

    async def stop(self) -> None:
        """Ends every answer and everyone's waiting, as a coordinator that goes away does."""
        self.queues.fail_all(PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=2))
        await self.dispatching.stop()
