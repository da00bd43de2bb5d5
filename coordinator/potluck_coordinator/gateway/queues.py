"""Who gets room and when: at once, after waiting in the model's queue, or not at all.

Decides nothing of its own: whether to wait is `domain.admission`, whose turn it is `domain.fairness` in each `model_line`, who may take
what is free `free_room`, where to run `placing`; what has its turn is handed to the `dispatch`. Requests wait here and not at nodes, so
that late comers of a better tier or of an account that had little still come first, and the loss of a node costs nobody who waits. It must
not know nodes, holds, or what an answer is made of.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import (
    NOBODY,
    AdmissionLimits,
    ModelLoad,
    Queued,
    Refuse,
    Wait,
    Waiting,
    admit,
    beside,
    is_half_empty,
    is_hopeless,
    is_promised,
    predicted_wait_seconds,
    retry_after_seconds,
    waits_for,
)
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.decisions import StepKind
from potluck_coordinator.domain.tiers import flex_fits
from potluck_coordinator.gateway.free_room import FreeRoom
from potluck_coordinator.gateway.model_line import ModelLine
from potluck_coordinator.gateway.queue_bounds import QueueBounds
from potluck_coordinator.gateway.refusals import Refusals, refusal_words
from potluck_coordinator.gateway.waiting import WaitingRequest
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Protocol

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.placement import Placement, ReplicaView
    from potluck_coordinator.gateway.attempt import Attempt
    from potluck_coordinator.gateway.decisions import Decisions
    from potluck_coordinator.gateway.expectations import Expectations
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.placing import Placing
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, ModelId, NodeId, RequestId

    class Dispatch(Protocol):
        """Starts an attempt of a request on a replica; `tried` are the nodes that would not take it."""

        def __call__(self, request: InferenceRequest, entry: CatalogueEntry, replica: ReplicaView, tried: frozenset[NodeId]) -> Attempt: ...


REVIEW_SECONDS: Final = 0.25
"""Between two looks at whether those that wait will have their turn in time."""
_NOWHERE: Final[frozenset[NodeId]] = frozenset()
CONTINUED_WAIT_SECONDS_MAX: Final = 30.0
"""How long a client whose answer stands still waits for another node."""


class Queues:
    """The queues of all models of one gateway.

    Args:
        placing: where requests may run.
        expectations: what they are expected to be.
        limits: the queues' bounds.
        clock: for deadlines.
        reserve_percent: of each model's room, what flex leaves to the default tier.
        decisions: keeps who waited, was placed and was refused, and why.
    """

    def __init__(
        self,
        *,
        placing: Placing,
        expectations: Expectations,
        limits: AdmissionLimits,
        clock: Clock,
        reserve_percent: int,
        decisions: Decisions,
    ) -> None:
        self.dispatch: Dispatch
        """Starts whoever has a slot. Whoever dispatches puts this here before the first request comes."""
        self._placing = placing
        self._expectations = expectations
        self._limits = limits
        self._clock = clock
        self._reserve_percent = reserve_percent
        self._free_room = FreeRoom(placing, expectations, clock, reserve_percent)
        self._decisions = decisions
        self._refusals = Refusals(clock)
        self._lines: dict[ModelId, ModelLine] = {}
        self._bounds = QueueBounds(limits)
        self._serves_soon = False

    def queued_count(self, model_id: ModelId) -> int:
        """Requests waiting for the model."""
        line = self._lines.get(model_id)
        return 0 if line is None else line.waiting_count

    def waiting_counts(self, model_ids: Collection[ModelId]) -> dict[ModelId, int]:
        """How much every model is asked for that has no room: its queue, and the people who were refused lately."""
        counts = self._refusals.counts(model_ids)
        for model_id, line in self._lines.items():
            if waiting_count := line.waiting_count:
                counts[model_id] = counts.get(model_id, 0) + waiting_count
        return counts

    async def slot(self, request: InferenceRequest, entry: CatalogueEntry, excluded: frozenset[NodeId], waited_seconds: float) -> Attempt:
        """A dispatched attempt, at once or after waiting.

        Raises:
            PotluckError: NO_CAPACITY, QUEUE_FULL or QUEUE_TIMEOUT, or the dispatch's own.
        """
        line, now = self._arrived(request)
        chosen = self._placed(request, self._free_room.room_for(line, request, excluded, now))
        if chosen is not None:
            line.appointments[request.tier].keep(request)
            return self.dispatch(request, entry, chosen, excluded)
        seconds_max = self._wait_seconds_max(line, request, excluded, waited_seconds)
        if request.continued is None:
            line.appointments[request.tier].keep(request)
            self._make_room(line, request)
        work, arrived_at = self._expectations.work(request), now - waited_seconds
        waiting = WaitingRequest(
            request, entry, excluded, work=work, seconds_max=seconds_max, arrived_at_seconds=arrived_at, joined_at_seconds=now
        )
        return await self._wait(line, waiting)

    def announce(self, request: InferenceRequest) -> Callable[[], None]:
        """Refuses at once what `slot` would refuse at once. What passes comes before all that is announced later, until that is called."""
        line, now = self._arrived(request)
        load = self._load(line, request, _NOWHERE, now, announced=line.announced)
        fits = line.announced is NOBODY or flex_fits(load.capacity, load.wanted_tokens)
        if not fits or self._free_room.room_for(line, request, _NOWHERE, now) is None:
            self._wait_seconds_max(line, request, _NOWHERE, 0.0, line.announced)
        return line.announce(Queued(1, load.wanted_tokens))

    def _arrived(self, request: InferenceRequest) -> tuple[ModelLine, float]:
        """Its line, and the time. Whoever waits comes first; what is free after that suits none of them, and is not kept from others."""
        line, now = self.line(request.model_id), self._clock.monotonic_seconds()
        line.seen(request, now)
        if line.waiting_count:
            self.serve(request.model_id)
        return line, now

    def _wait_seconds_max(
        self, line: ModelLine, request: InferenceRequest, excluded: frozenset[NodeId], waited_seconds: float, announced: Queued = NOBODY
    ) -> float:
        """How long a request for which there is no room may wait for it; raises where it may not."""
        appointments, now = line.appointments[request.tier], self._clock.monotonic_seconds()
        appointment = appointments.find(request, now)
        was_promised = appointment is not None and appointments.is_due(appointment, now)
        ahead = line.ahead_of(request, counts_expected=not was_promised)
        load = self._load(line, request, excluded, now, ahead=ahead, announced=announced)
        if request.continued is not None:
            if not self._placing.knows_others(request, excluded):
                raise self._refused(request, excluded, ErrorCode.NO_CAPACITY, self._limits.retry_after_seconds_min)
            return CONTINUED_WAIT_SECONDS_MAX
        match admit(load, self._limits, waited_seconds, was_given_back=bool(excluded), was_promised=was_promised):
            case Wait(wait_seconds_max):
                return wait_seconds_max
            case Refuse(code, retry_after, predicted_seconds):
                if code is ErrorCode.QUEUE_FULL and appointment is not None and not was_promised:
                    # Whoever comes too early, or asks the same once more beside it, is anybody until then, and what was promised stands.
                    retry_after = appointment.due_at_seconds - now
                elif code is ErrorCode.QUEUE_FULL:
                    self._expect_back(line, request, retry_after)
                raise self._refused(request, excluded, code, retry_after, predicted_seconds)

    def spare(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> Placement | None:
        """Where a second attempt could run now, if anywhere; None: somebody waits, or what is free is kept for a better tier."""
        line = self.line(request.model_id)
        if line.waiting_count or not self._free_room.may_fill(line, request, self._clock.monotonic_seconds()):
            return None
        return self._placing.place(request, excluded, self._expectations.work(request))

    async def _wait(self, line: ModelLine, waiting: WaitingRequest) -> Attempt:
        request = waiting.request
        self._decisions.note(request, StepKind.WAITS, f"in the {request.tier} tier, for {waiting.seconds_max:.0f} s at most")
        line.join(waiting)
        self._bounds.joined(waiting)
        attempt: Attempt | None = None
        try:
            async with asyncio.timeout(waiting.seconds_max):
                attempt = await waiting.turn
        except TimeoutError:
            line.leave(waiting)
            load = self._load(line, request, waiting.excluded, self._clock.monotonic_seconds())
            retry_after = retry_after_seconds(predicted_wait_seconds(load), self._limits)
            raise self._refused(request, waiting.excluded, ErrorCode.QUEUE_TIMEOUT, retry_after) from None
        finally:
            line.leave(waiting)
            self._bounds.left(waiting)
            if attempt is None and waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                # Its turn came in the same moment as its deadline, or as its client went.
                await waiting.turn.result().close()
        return attempt

    def _make_room(self, line: ModelLine, request: InferenceRequest) -> None:
        """Where a bound is reached somebody gives way to the newcomer, as admission has found."""
        for gone in self._bounds.give_way(line, request):
            self._send_away(self.line(gone.request.model_id), gone)

    def _send_away(self, line: ModelLine, waiting: WaitingRequest) -> None:
        """Refuses one that waits."""
        line.leave(waiting)
        self._bounds.left(waiting)
        if waiting.turn.done():
            return  # its client has gone, or its deadline has come, and it had not left the line yet
        request, now = waiting.request, self._clock.monotonic_seconds()
        predicted = predicted_wait_seconds(self._load(line, request, waiting.excluded, now))
        retry_after = retry_after_seconds(predicted, self._limits)
        self._expect_back(line, request, retry_after)
        code = ErrorCode.QUEUE_FULL if math.isfinite(predicted) else ErrorCode.NO_CAPACITY
        waiting.turn.set_exception(self._refused(request, waiting.excluded, code, retry_after, predicted))

    def _expect_back(self, line: ModelLine, request: InferenceRequest, retry_after: float) -> None:
        """Room is kept for whoever comes back when he was told, unless that is too far away."""
        if is_promised(retry_after, self._limits):
            line.expect_back(request, self._expectations.work(request), self._clock.monotonic_seconds() + retry_after)

    def serve_soon(self) -> None:
        """`serve_all`, behind whatever else comes in this turn of the loop: answers begin and end many at a time."""
        if not self._serves_soon and any(line.waiting_count for line in self._lines.values()):
            self._serves_soon = True
            asyncio.get_running_loop().call_soon(self.serve_all)

    def serve_all(self) -> None:
        """Gives free room to those whose turn it is, and refuses those whose turn will come too late."""
        now, self._serves_soon = self._clock.monotonic_seconds(), False
        for model_id, line in tuple(self._lines.items()):
            self.serve(model_id)
            if line.waiting_count and now - line.reviewed_at_seconds >= REVIEW_SECONDS:
                line.reviewed_at_seconds = now
                self._review(line, now)

    def serve(self, model_id: ModelId) -> None:
        """Gives one model's free room to those whose turn it is: to continued requests, to the default tier, to flex."""
        line = self.line(model_id)
        if not line.waiting_count:
            return
        for waiting, placement in self._free_room.given(line):
            if (chosen := self._placed(waiting.request, placement)) is not None:
                self._give(line, waiting, chosen)

    def _give(self, line: ModelLine, waiting: WaitingRequest, chosen: ReplicaView) -> None:
        line.leave(waiting)
        if waiting.turn.done():
            return
        try:
            waiting.turn.set_result(self.dispatch(waiting.request, waiting.entry, chosen, waiting.excluded))
        except Exception as error:  # noqa: BLE001 - it is this request's failure, and its client is told
            waiting.turn.set_exception(error)

    def _review(self, line: ModelLine, now: float) -> None:
        """Refuses those that would still wait at their deadline: they can try elsewhere now, and those behind them come sooner."""
        ahead = Queued(len(line.continued))
        for tier in (ServiceTier.DEFAULT, ServiceTier.FLEX):
            for waiting in line.queues[tier].in_foreseen_turn():
                load = self._load(line, waiting.request, waiting.excluded, now, ahead=ahead)
                if is_hopeless(load, now - waiting.arrived_at_seconds, waiting.deadline_seconds - waiting.arrived_at_seconds):
                    self._send_away(line, waiting)
                else:
                    ahead += waiting.queued

    def charge(self, request: InferenceRequest) -> float:
        """An attempt starts: what its account is charged in advance."""
        work, line = self._expectations.work(request), self.line(request.model_id)
        line.began(request, work, self._clock.monotonic_seconds())
        return line.queues[request.tier].charge(request, work)

    def over(self, request: InferenceRequest, expected_service: float, attempt: Attempt, seconds: float) -> None:
        """An attempt is over after so long: what its account was charged in advance becomes what it was given."""
        line = self.line(request.model_id)
        line.ended(request, self._expectations.work(request), self._clock.monotonic_seconds(), seconds)
        line.queues[request.tier].correct(request, expected_service, attempt)
        if attempt.usage is not None and attempt.is_whole and request.continued is None:
            self._expectations.learn(request, attempt.usage, attempt.completion_tokens_max)

    def fail_all(self, error: PotluckError) -> None:
        """Nobody who waits gets a slot any more."""
        for line in self._lines.values():
            line.fail_all(error)

    def line(self, model_id: ModelId) -> ModelLine:
        """The model's, which begins with the first request."""
        if model_id not in self._lines:
            self._lines[model_id] = ModelLine()
        return self._lines[model_id]

    def waiting(self, account_id: AccountId, request_id: RequestId) -> Waiting | None:
        """Where an account's request of that name stands; None: none waits."""
        now = self._clock.monotonic_seconds()
        for line in self._lines.values():
            for waiting in line:
                if (waiting.request.account_id, waiting.request.request_id) == (account_id, request_id):
                    return self._position(line, waiting, now)
        return None

    def _position(self, line: ModelLine, waiting: WaitingRequest, now: float) -> Waiting:
        request = waiting.request
        position, own_position, ahead = line.position_of(waiting)
        predicted = predicted_wait_seconds(self._load(line, request, waiting.excluded, now, ahead=ahead))
        usable_count, free_count = self._placing.slots(request, waiting.excluded)
        withheld = self._placing.withholds_slots(request.model_id)
        return Waiting(
            request_id=request.request_id,
            account_id=request.account_id,
            model_id=request.model_id,
            tier=request.tier,
            position_in_tier=position,
            position_in_account=own_position,
            waiting_count=len(line.queues[request.tier]),
            waited_seconds=now - waiting.arrived_at_seconds,
            waits_for=waits_for(usable_count, free_count, may_fill=self._free_room.may_fill(line, request, now), withheld=withheld),
            predicted_wait_seconds=predicted if math.isfinite(predicted) else None,
            deadline_seconds=waiting.deadline_seconds - now,
            candidates=self._placing.place(request, waiting.excluded, waiting.work).candidates,
        )

    def _placed(self, request: InferenceRequest, placement: Placement | None) -> ReplicaView | None:
        """Where the request is to run now, if placement has found room; it is dispatched there."""
        if placement is None or placement.chosen is None:
            return None
        self._decisions.note(request, StepKind.PLACED, node_id=placement.chosen.node_id, placement=placement)
        return placement.chosen

    def _load(
        self,
        line: ModelLine,
        request: InferenceRequest,
        excluded: frozenset[NodeId],
        now: float,
        *,
        ahead: Queued | None = None,
        announced: Queued = NOBODY,
    ) -> ModelLoad:
        """The model's position as the request sees it; without `ahead`, as one that would join now."""
        capacity = line.capacity(self._placing.capacity(request.model_id), request.tier, self._reserve_percent, now)
        # What others could take is none of its concern.
        capacity, waits = beside(self._placing.within_reach(request, excluded, capacity), announced)
        ahead = (line.ahead_of(request, counts_expected=False) if ahead is None else ahead) + waits
        is_full = self._bounds.are_reached(line, request, waits.count)
        work, reading_seconds = self._expectations.work(request), math.inf
        if is_half_empty(capacity, ahead):
            reading_seconds = self._free_room.reading_seconds(line, request, excluded, work, now)
        return ModelLoad(capacity, work.wanted_tokens, ahead, line.pace(now), reading_seconds, is_full=is_full)

    def _refused(
        self, request: InferenceRequest, excluded: frozenset[NodeId], code: ErrorCode, retry_after: float, predicted: float = math.inf
    ) -> PotluckError:
        self._refusals.note(request.model_id, request.account_id)
        text = refusal_words(request, code, predicted, self._limits.queue_wait_seconds_max)
        placement = self._placing.place(request, excluded, self._expectations.work(request))
        self._decisions.note(request, StepKind.REFUSED, text, placement=placement)
        return PotluckError(code, f"{text} Replicas: {placement.explanation()}.", retry_after_seconds=retry_after)
