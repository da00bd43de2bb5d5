"""One answer as an edge reads it: made of one attempt, or of several where nodes fail or are late, and the client sees one.

Decides nothing over what follows a failure: that is `domain.requests`, whose effects are carried out here. Until an attempt fails, bytes
go through as its engine sent them; a later attempt's are fitted to them by `splice`. What the client has got is kept in `so_far`. Until the
first token a second attempt may run in a `race` beside the one that is read; nobody reads it before it is the one. It must not know who
reads the answer, `http_inference` or `inference_servicer`, nor how attempts are placed and paid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
import structlog

from potluck_coordinator.domain.continuing import said
from potluck_coordinator.domain.decisions import StepKind
from potluck_coordinator.domain.hedging import HedgeEnd
from potluck_coordinator.domain.requests import (
    Abandoned,
    Began,
    Broke,
    Completed,
    Course,
    Dispatched,
    DropHedge,
    End,
    Failure,
    Finish,
    Outrun,
    Place,
    Said,
    Settle,
    Stage,
    TakeHedge,
    Unplaced,
    advance,
    failure_of,
    may_be_hedged,
)
from potluck_coordinator.gateway.inference_request import Continued
from potluck_coordinator.gateway.race import Race
from potluck_coordinator.gateway.so_far import SoFar
from potluck_coordinator.gateway.splice import Splice, made_end, usage_together
from potluck_coordinator.gateway.tier_mark import marked
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import Endpoint, Usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from potluck_coordinator.domain.catalogue import ServiceTier
    from potluck_coordinator.domain.continuing import Delivered
    from potluck_coordinator.domain.requests import Effect, Event
    from potluck_coordinator.gateway.attempt import Attempt
    from potluck_coordinator.gateway.decisions import Note
    from potluck_coordinator.gateway.hedging import Hedge
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.relay import PassOn
    from potluck_protocol.clock import Clock
    from potluck_protocol.errors import ErrorCode
    from potluck_protocol.values import NodeId, RequestId

_log = structlog.get_logger()

_body_decoder: Final = msgspec.json.Decoder(dict[str, Any])

_STEPS: Final = {True: StepKind.CONTINUED, False: StepKind.RESTARTED}

BeginAttempt: TypeAlias = "Callable[[InferenceRequest, Place], Awaitable[Attempt]]"
"""A dispatched attempt as the step wants it, at once or after waiting for a slot; raises PotluckError where there is none."""
BeginHedge: TypeAlias = "Callable[[InferenceRequest, Attempt, frozenset[NodeId]], Hedge | None]"
"""A dispatched second attempt beside one that is late, on another node and none of these; None: it is not worth it."""


class Answer:
    """What an edge reads. Every answer is closed, whatever happens to it.

    Args:
        request: what was asked.
        begin: starts an attempt.
        clock: for the deadline.
        on_closed: called once, when it is over.
        note: keeps what became of it, for people who ask why.
        begin_hedge: starts a second attempt where the first token is late.
    """

    def __init__(
        self,
        request: InferenceRequest,
        begin: BeginAttempt,
        clock: Clock,
        *,
        on_closed: Callable[[Answer], None] = lambda _: None,
        note: Note = lambda *_facts, **_names: None,
        begin_hedge: BeginHedge = lambda *_: None,
    ) -> None:
        self._request = request
        self._begin = begin
        self._clock = clock
        self._on_closed = on_closed
        self._note = note
        self._begin_hedge = begin_hedge
        self._race = Race(self._hedge_of, self._perform, note)
        self._course = Course()
        self.attempt: Attempt | None = None
        self._deadline_at: float | None = None
        self._hold_micro_credits = 0
        self._so_far = SoFar()
        self._token_count = 0
        """Of the attempts that are over, as they were paid."""
        self._splice: Splice | None = None
        self._made_end: bytes | None = None
        self._loss: PotluckError | None = None
        self._refusal: PotluckError | None = None
        self._errors: list[tuple[Attempt, ErrorCode]] = []
        """Of the attempts that failed, while nothing is answered since."""
        self.node_ids: tuple[NodeId, ...] = ()
        """Whoever has had a part in it, in order; a node that would not take it had none."""
        self.document = b""
        """An unstreamed answer, once it is complete."""
        self.usage: Usage | None = None
        """Of the whole answer, once it is complete."""
        self.charge_micro_credits = 0
        """Of all its attempts that are over."""
        self._has_begun = False
        self._is_kept_alive = False
        """The client has got bytes, and none that say anything: what comes next is its first."""
        self.first_token_at_seconds: float | None = None
        """Monotonic; of an unstreamed answer when the first attempt that its node took was dispatched, for its tokens come together."""

    @property
    def request_id(self) -> RequestId:
        """The request answered."""
        return self._request.request_id

    @property
    def tier(self) -> ServiceTier:
        """The one it is served in."""
        return self._request.tier

    @property
    def hedge(self) -> Hedge | None:
        """The second attempt that ran beside the first until one had its first token, if any did."""
        return self._race.hedge

    @property
    def token_count(self) -> int:
        """Of what has reached the client of a stream, as it was paid."""
        return self._token_count

    @property
    def node_id(self) -> NodeId:
        """Who answers now, or did last."""
        return self.node_ids[-1]

    async def open(self) -> None:
        """Waits until an attempt has begun a good answer.

        Raises:
            PotluckError: whatever keeps the request from being answered.
        """
        await self._go_on(Place(frozenset(), continuing=False))

    async def next_data(self, pass_on: PassOn | None = None) -> bytes | None:
        """The next bytes for the client, None at the complete end; raises PotluckError where the answer breaks off for good.

        As `Attempt.next_data`. Where an attempt fails, this waits for the next one's first bytes.
        """
        while self._course.stage is Stage.RUNNING:
            attempt = self.attempt
            assert attempt is not None, "it runs"
            try:
                data = await attempt.next_data(None if self._is_kept_alive else pass_on if self._splice is None else self._spliced(pass_on))
            except PotluckError as error:
                await self._recover(attempt, error)
                # The connection may have been full when the attempt broke.
                pass_on = None
                continue
            if data is None:
                await self._perform(Completed(), whole=True)
                return None
            if self._splice is not None:
                data = self._splice.passed(data)
            if data:
                return data if self._has_begun else await self._beginning(data, attempt)
            pass_on = None
        made_end, self._made_end = self._made_end, None
        return made_end

    async def close(self) -> None:
        """Ends the answer if it is not over, which settles it. Again is harmless."""
        try:
            await self._perform(Abandoned())
        finally:
            on_closed, self._on_closed = self._on_closed, lambda _: None
            on_closed(self)
            self._race.let_go()

    async def _beginning(self, data: bytes, attempt: Attempt) -> bytes:
        """The first bytes for the client, with the tier in them. What only keeps its connection alive is passed on before."""
        if not attempt.has_begun:
            self._is_kept_alive = True
            return data
        self._has_begun, self._is_kept_alive = True, False
        self._race.stop()
        await self._perform(Began())
        if self._request.stream:
            self.first_token_at_seconds = self._clock.monotonic_seconds()
        return self._with_tier(data)

    def _with_tier(self, first: bytes) -> bytes:
        if self._request.endpoint is Endpoint.EMBEDDINGS:
            return first
        return marked(first, self.tier, stream=self._request.stream)

    def _spliced(self, pass_on: PassOn | None) -> PassOn | None:
        splice = self._splice
        if pass_on is None or splice is None:
            return None

        def passed(data: bytes) -> bool:
            fitted = splice.passed(data)
            return pass_on(fitted) if fitted else True

        return passed

    async def _go_on(self, step: Place | TakeHedge | None) -> None:
        """Starts or takes attempts until one has begun a good answer, or nothing is left to answer; raises what ends the request."""
        while step is not None:
            if isinstance(step, TakeHedge):
                attempt = self._race.take(step.end)
            else:
                try:
                    attempt = await self._begin(self._asked_of(step), step)
                except PotluckError as error:
                    # Raises: without a replica there is nothing else to do.
                    await self._perform(Unplaced(), error=error)
                    return
                self._course, _ = advance(self._course, Dispatched(attempt.node_id))
            self._started(attempt)
            try:
                await attempt.open()
            except PotluckError as error:
                step = await self._next_step(attempt, error)
            else:
                # Whoever was outrun had no part in it.
                self.node_ids = (*(() if step == TakeHedge(HedgeEnd.WON) else self.node_ids), attempt.node_id)
                for failed, code in self._errors:
                    failed.outdone(code, attempt)
                self._errors.clear()
                return

    async def _recover(self, attempt: Attempt, error: PotluckError) -> None:
        await self._go_on(await self._next_step(attempt, error))

    async def _next_step(self, attempt: Attempt, error: PotluckError) -> Place | TakeHedge | None:
        """After an attempt has failed or was outrun: what comes next; None where the answer was whole. Raises what ends the request."""
        if attempt.was_outrun:
            return await self._perform(Outrun())
        judged = self._said(attempt)
        failure = failure_of(error.code, for_good=attempt.broken_off)
        assert self._deadline_at is not None, "an attempt ran"
        seconds_left = self._deadline_at - self._clock.monotonic_seconds()
        self._note(StepKind.FAILED, error.message, node_id=attempt.node_id, attempt_id=attempt.attempt_id)
        self._errors.append((attempt, error.code))
        step: Place | TakeHedge | None = None
        try:
            step = await self._perform(Broke(failure, judged, seconds_left), error=error, whole=judged.whole)
        finally:
            if failure is Failure.LOST:
                _log.warning(
                    "attempt_lost",
                    request_id=self.request_id,
                    attempt_id=attempt.attempt_id,
                    node_id=attempt.node_id,
                    code=error.code,
                    tokens_relayed=attempt.relayed_token_count,
                    follows=_following(step) or ("finished" if judged.whole else "failed"),
                )
        if self._course.was_lost and self._loss is None:
            self._loss = error
        if failure is Failure.UNFIT:
            self._refusal = error
        if failure in {Failure.REFUSED, Failure.OUTDATED} and not (self._has_begun or self._course.was_lost):
            self.first_token_at_seconds = None
        if isinstance(step, Place) and not step.if_spare:
            self._note(_STEPS[step.continuing], f"after {self._token_count} tokens" if step.continuing else "")
        return step

    def _started(self, attempt: Attempt) -> None:
        self.attempt = attempt
        if may_be_hedged(self._course):
            self._race.watch(attempt, self._course.excluded)
        if self._request.stream:
            attempt.keep = self._so_far.add
        elif self.first_token_at_seconds is None:
            self.first_token_at_seconds = self._clock.monotonic_seconds()
        if self._deadline_at is None:
            self._deadline_at = attempt.deadline_at_seconds
            self._hold_micro_credits = attempt.hold_micro_credits
        if self._so_far.head is not None:
            self._splice = Splice(self._so_far.head, attempt.tokens_before, role_shown=self._so_far.role_shown)

    def _hedge_of(self, late: Attempt, excluded: frozenset[NodeId]) -> Hedge | None:
        return self._begin_hedge(replace(self._request, deadline_at_seconds=self._deadline_at), late, excluded)

    async def _perform(self, event: Event, *, error: PotluckError | None = None, whole: bool = False) -> Place | TakeHedge | None:
        """Carries out what an event leads to; raises the error that ends the request."""
        self._course, effects = advance(self._course, event)
        step: Place | TakeHedge | None = None
        for effect in effects:
            step = await self._carry_out(effect, error, whole=whole)
        return step

    async def _carry_out(self, effect: Effect, error: PotluckError | None, *, whole: bool) -> Place | TakeHedge | None:
        match effect:
            case Settle():
                await self._settle(whole=whole)
            case DropHedge(end):
                await self._race.drop(end)
            case Place() | TakeHedge():
                return effect
            case Finish():
                self._made_end = self._end_of_whole()
            case End():
                assert error is not None, "something went wrong"
                raise self._ending(effect, error)
        return None

    async def _settle(self, *, whole: bool) -> None:
        """Pays the attempt; its slot is free and its node told before anything else is tried."""
        attempt = self.attempt
        assert attempt is not None, "only an attempt is settled"
        self._race.stop()
        await attempt.close(whole=whole)
        self._token_count = attempt.tokens_before + attempt.relayed_token_count
        self.charge_micro_credits += attempt.charge_micro_credits
        self.document = self._with_tier(attempt.document)
        self.usage = self.usage if attempt.usage is None else usage_together(attempt.usage, attempt.tokens_before)

    def _said(self, attempt: Attempt) -> Said:
        delivered = self._delivered(attempt)
        if not delivered.anything:
            return Said()
        body = _body_decoder.decode(self._request.body)
        return said(self._request.endpoint, body, delivered, self._request.completion_tokens_max, self._request.answer_count)

    def _delivered(self, attempt: Attempt) -> Delivered:
        return self._so_far.delivered(attempt.tokens_before + attempt.relayed_token_count)

    def _asked_of(self, place: Place) -> InferenceRequest:
        """The request of the next attempt."""
        if self.attempt is None:
            return self._request
        request = replace(self._request, deadline_at_seconds=self._deadline_at)
        if not self._course.was_lost:
            return request
        before, asked = self._token_count if place.continuing else 0, request.completion_tokens_max
        text = self._so_far.delivered(before).text
        return replace(
            request,
            continued=Continued(text, before, self._hold_micro_credits - self.charge_micro_credits),
            completion_tokens_max=None if asked is None else asked - before,
            prompt_bytes=request.prompt_bytes + len(text.encode()),
            prompt_tokens_min=request.prompt_tokens_min + before,
        )

    def _end_of_whole(self) -> bytes:
        """Of an answer of which only the end is missing. Where no count of the prompt came, it is free, and said to be."""
        self.usage = self.usage or Usage(0, self._token_count)
        so_far = self._so_far
        return made_end(
            self._request.endpoint,
            so_far.head or {},
            finish_reason="length" if so_far.finish_reason is None else None,
            usage=self.usage if self._request.include_usage and not so_far.usage_shown else None,
        )

    def _ending(self, end: End, error: PotluckError) -> PotluckError:
        """What the client is told, and why nobody goes on."""
        if end.tells_refusal and self._refusal is not None:
            return self._refusal
        loss = self._loss if end.tells_loss and self._loss is not None else error
        if end.why is not None:
            return _with_words(loss, f"{loss.message} It cannot be continued elsewhere: {end.why}.")
        if loss is not error and self._course.continuing:
            return _with_words(loss, f"{loss.message} Nobody could go on with the answer: {error.message}")
        return loss


def _following(step: Place | TakeHedge | None) -> str | None:
    if isinstance(step, TakeHedge):
        return step.end
    return None if step is None else _STEPS[step.continuing]


def _with_words(error: PotluckError, message: str) -> PotluckError:
    return PotluckError(error.code, message, param=error.param, retry_after_seconds=error.retry_after_seconds)
