"""The one path of a request up to its answer: admit, queue, place, dispatch, with its hold (`ledger_writer`) beside the dispatch.

Both edges (`http_inference` and `inference_servicer`) come through here and read the `answer` they get, which relays and settles. Decides
how long a request may run, and that only an attempt which its node or engine would not take (`no_capacity`) is placed anew: an answer that
has begun is never moved. Whether to wait, whose turn it is, where to run and what to hold are `domain.admission`, `domain.fairness`,
`domain.placement` and `domain.pricing`; nodes are reached through `links`, each attempt by its `relay`. An answer that is closed early has
its attempt cancelled at the node (`node_session`). It must not know HTTP, gRPC or tables.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import AdmissionLimits, Dispatch, ModelLoad, Refuse, Wait, admit, retry_after_seconds
from potluck_coordinator.domain.ledger import MarkDelivered, OpenHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.placement import place, slots, tokens_wanted
from potluck_coordinator.domain.pricing import hold_amount
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.engine_errors import INPUT_PARAM
from potluck_coordinator.gateway.quarantine import Quarantine
from potluck_coordinator.gateway.refusals import Refusals
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.gateway.waiting import ModelQueue, WaitingRequest
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId, Endpoint, ModelId, NodeId, ReplicaId, RequestId, StartAttempt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.placement import Placement, ReplicaView
    from potluck_coordinator.gateway.ledger_writer import LedgerWriter
    from potluck_coordinator.gateway.links import Links
    from potluck_protocol.clock import Clock
    from potluck_protocol.culprits import Culprits, Fingerprint

PLACEMENTS_MAX: Final = 3
"""How often a request is placed at most: its node or engine may not take it after all (it paused a moment ago, say)."""
REQUEST_SECONDS_MAX: Final = 600.0
"""From its dispatch. An answer that is not whole by then fails, and its slot is free again; by default the SDK waits no longer."""
HOLD_SLACK_SECONDS: Final = 60.0
"""A hold outlives its request by so much, for its settlement to be committed."""
MEAN_WEIGHT: Final = 0.2
"""Of the newest request in a model's mean duration: the last ten make up nine tenths of it."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One request as an edge understood it. `body` is JSON bound for the engine."""

    request_id: RequestId
    account_id: AccountId
    model_id: ModelId
    endpoint: Endpoint
    body: bytes
    stream: bool
    include_usage: bool
    """Whether the client itself asked for the usage chunk of a streamed answer; the engine is always asked for it."""
    prompt_bytes: int
    """An upper bound on the prompt's tokens."""
    completion_tokens_max: int | None
    answer_count: int
    prompt_count: int
    prompt_tokens_min: int
    """A lower bound on the tokens of the longest prompt: what cannot fit is refused before an engine works on it."""
    _fingerprints: list[Fingerprint] = field(default_factory=list, init=False, repr=False, compare=False)
    """None or one."""

    def fingerprint(self, culprits: Culprits) -> Fingerprint:
        """Made once, however often it is looked up: a body has up to megabytes, and a request that waits is looked at again and again."""
        if not self._fingerprints:
            self._fingerprints.append(culprits.fingerprint(self.endpoint, self.body))
        return self._fingerprints[0]


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
        ledger: where money events go.
        catalogue: the models as they are now.
        replica_payees: who earns by a replica of several nodes, as of now; of any other the node's owner does.
        limits: queue and window bounds.
        clock: for durations and deadlines.
        draw: a random number in [0, 1) for ties.
        new_attempt_id: a fresh id, unique over gateways and restarts.
        gateway_epoch: whose holds these are.
    """

    def __init__(
        self,
        *,
        links: Links,
        ledger: LedgerWriter,
        catalogue: Callable[[], Mapping[ModelId, CatalogueEntry]],
        replica_payees: Callable[[], Mapping[ReplicaId, tuple[PayeeShare, ...]]],
        limits: RequestLimits,
        clock: Clock,
        draw: Callable[[], float],
        new_attempt_id: Callable[[], AttemptId],
        gateway_epoch: int,
    ) -> None:
        self._links = links
        self._quarantine = Quarantine(links)
        self._refusals = Refusals(clock)
        self._ledger = ledger
        self._catalogue = catalogue
        self._replica_payees = replica_payees
        self._limits = limits
        self._clock = clock
        self._draw = draw
        self._new_attempt_id = new_attempt_id
        self._gateway_epoch = gateway_epoch
        self._queues: dict[ModelId, ModelQueue] = {}
        self._request_seconds_mean: dict[ModelId, float] = {}
        self._answers: dict[AttemptId, Answer] = {}

    @property
    def in_flight_count(self) -> int:
        """Answers on their way."""
        return len(self._answers)

    def queued_count(self, model_id: ModelId) -> int:
        """Requests waiting for a slot of the model."""
        queue = self._queues.get(model_id)
        return 0 if queue is None else len(queue)

    @property
    def waiting_counts(self) -> Mapping[ModelId, int]:
        """How much every model is asked for that has no slot free: its queue, and the people who were refused lately."""
        counts = self._refusals.counts(self._catalogue())
        for model_id, queue in self._queues.items():
            if waiting_count := len(queue):
                counts[model_id] = counts.get(model_id, 0) + waiting_count
        return counts

    def models(self, *, with_offers: bool = False) -> tuple[ModelView, ...]:
        """The catalogue with what is ready now; the entries that are offers, with nothing to serve yet, only if they are asked for."""
        return tuple(
            ModelView(entry, self._ready_replica_count(entry.model_id))
            for entry in self._catalogue().values()
            if with_offers or entry.file is not None
        )

    def _ready_replica_count(self, model_id: ModelId) -> int:
        cohorts = self._links.cohorts(model_id)
        return sum(len(cohort.replicas) for cohort in cohorts if cohort.sample.ready and cohort.sample.link_up)

    async def begin(self, request: InferenceRequest) -> Answer:
        """Admits, places and dispatches, and waits until the engine has begun to answer.

        Raises:
            PotluckError: whatever keeps the request from being answered; nothing is then owed.
        """
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
        self._quarantine.check(request)
        began_at = self._clock.monotonic_seconds()
        excluded: frozenset[NodeId] = frozenset()
        while True:
            answer = await self._slot(request, entry, excluded, self._clock.monotonic_seconds() - began_at)
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

    async def _slot(self, request: InferenceRequest, entry: CatalogueEntry, excluded: frozenset[NodeId], waited_seconds: float) -> Answer:
        """A dispatched attempt, at once or after waiting for a slot."""
        load = self._load(request, excluded)
        if load.free_slot_count and load.queued_count:
            # Whoever waits comes first. What is free after that suits none of them, and is not kept from others.
            self._serve_queue(request.model_id)
            load = self._load(request, excluded)
        chosen = self._placed(request, excluded, self._draw()).chosen if load.free_slot_count else None
        if chosen is None:
            # A slot that is free is then on a node that this request is kept from.
            load = replace(load, free_slot_count=0)
        match admit(load, self._limits.admission, waited_seconds):
            case Dispatch():
                assert chosen is not None, "no other slot counts as free"
                return self._dispatch(request, entry, chosen, excluded)
            case Wait(wait_seconds_max):
                return await self._wait_in_queue(WaitingRequest(request, entry, excluded, wait_seconds_max))
            case Refuse(code, retry_after):
                raise self._refusal(code, request, excluded, retry_after)

    async def _wait_in_queue(self, waiting: WaitingRequest) -> Answer:
        queue = self._queue(waiting.request.model_id)
        self._make_room(queue, waiting.request)
        queue.join(waiting)
        answer: Answer | None = None
        try:
            async with asyncio.timeout(waiting.seconds_max):
                answer = await waiting.turn
        except TimeoutError:
            retry_after = retry_after_seconds(self._load(waiting.request, waiting.excluded), self._limits.admission)
            raise self._refusal(ErrorCode.QUEUE_TIMEOUT, waiting.request, waiting.excluded, retry_after) from None
        finally:
            queue.leave(waiting)
            if answer is None and waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                # Its turn came in the same moment as its deadline, or as its client went.
                await waiting.turn.result().close()
        return answer

    def _make_room(self, queue: ModelQueue, request: InferenceRequest) -> None:
        """In a full queue somebody gives way to the newcomer, as admission has found."""
        limits = self._limits.admission
        if len(queue) >= limits.queue_length_max and (gone := queue.newest_to_give_way(request.account_id)) is not None:
            retry_after = retry_after_seconds(self._load(gone.request, gone.excluded), limits)
            gone.turn.set_exception(self._refusal(ErrorCode.QUEUE_FULL, gone.request, gone.excluded, retry_after))

    def serve_queues(self) -> None:
        """Gives free slots to those whose turn it is: called whenever an answer ends, and a few times a second for all other reasons."""
        for model_id in tuple(self._queues):
            self._serve_queue(model_id)

    def _serve_queue(self, model_id: ModelId) -> None:
        for waiting in self._queue(model_id).in_turn():
            if not any(cohort.is_free for cohort in self._links.cohorts(model_id)):
                break
            request = waiting.request
            placement = self._placed(request, waiting.excluded, self._draw())
            if placement.chosen is None:
                # One that no free replica suits does not hold up those behind it.
                continue
            try:
                waiting.turn.set_result(self._dispatch(request, waiting.entry, placement.chosen, waiting.excluded))
            except Exception as error:  # noqa: BLE001 - it is this request's failure, and its client is told
                waiting.turn.set_exception(error)

    def _dispatch(self, request: InferenceRequest, entry: CatalogueEntry, replica: ReplicaView, tried: frozenset[NodeId]) -> Answer:
        """Starts an attempt and, beside it, its hold. The engine is not kept waiting; the client sees nothing before the hold stands."""
        session = self._links.session(replica.node_id)
        assert session is not None, "placement saw the session in this same turn of the loop"
        attempt_id = self._new_attempt_id()
        now = self._clock.monotonic_seconds()
        amount = hold_amount(entry, request.prompt_bytes, request.completion_tokens_max, request.answer_count, request.prompt_count)
        relay = Relay(attempt_id, self._limits.window_bytes, now, session.acknowledge)
        payees = self._replica_payees().get(replica.replica_id, (PayeeShare(session.owner_account_id, 1),))
        start = StartAttempt(attempt_id, replica.replica_id, request.endpoint, request.body, request.stream, self._limits.window_bytes)
        session.start(start, relay, now, request, tried)
        self._links.node_changed(session.node_id)

        finish = partial(self._links.finish, session, attempt_id, replica.replica_id)
        try:
            hold = self._ledger.submit(self._hold(attempt_id, request.account_id, payees, amount))
        except BaseException:
            finish()
            raise
        self._quarantine.begin(attempt_id, session.node_id, request)
        expected = self._queue(request.model_id).charge(request)

        def expire() -> None:
            relay.fail(PotluckError(ErrorCode.ENGINE_FAILED, f"The answer took longer than {REQUEST_SECONDS_MAX:.0f} s."))
            # The slot is not kept until whoever reads the answer notices.
            finish()
            self.serve_queues()

        deadline = asyncio.get_running_loop().call_later(REQUEST_SECONDS_MAX, expire)

        def release() -> None:
            deadline.cancel()
            finish()
            self._quarantine.end(attempt_id, request, answered=answer.is_whole)
            del self._answers[attempt_id]
            self._learn_duration(request.model_id, self._clock.monotonic_seconds() - now)
            self._queue(request.model_id).correct(request, expected, answer)
            self.serve_queues()

        answer = Answer(
            request=request,
            entry=entry,
            node_id=session.node_id,
            relay=relay,
            hold_micro_credits=amount,
            hold=hold,
            ledger=self._ledger,
            release=release,
        )
        self._answers[attempt_id] = answer
        return answer

    def _hold(self, attempt_id: AttemptId, payer: AccountId, payees: tuple[PayeeShare, ...], amount_micro_credits: int) -> OpenHold:
        return OpenHold(
            hold_id=attempt_id,
            payer=payer,
            payees=payees,
            amount_micro_credits=amount_micro_credits,
            expires_at_unix_ms=self._clock.unix_ms() + int((REQUEST_SECONDS_MAX + HOLD_SLACK_SECONDS) * 1000),
            gateway_epoch=self._gateway_epoch,
        )

    def mark_delivered(self) -> None:
        """Writes down what each unfinished answer has earned, for the case that this gateway dies before it settles."""
        for answer in self._answers.values():
            charge = answer.charge_so_far()
            if charge > answer.marked_micro_credits:
                answer.marked_micro_credits = charge
                self._ledger.submit(MarkDelivered(answer.attempt_id, charge))

    async def stop(self) -> None:
        """Ends every answer and everyone's waiting, as a coordinator that goes away does."""
        gone = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=2)
        for queue in self._queues.values():
            for waiting in queue.in_turn():
                waiting.turn.set_exception(gone)
        # These may have been worked on, so they must not look like requests that can safely be made again.
        for answer in tuple(self._answers.values()):
            answer.fail(PotluckError(ErrorCode.NODE_LOST, "The coordinator is stopping; the answer broke off."))
            # Settled here and now: a client that does not read would keep its edge from it for longer than a stop may take.
            await answer.close()

    def _placed(self, request: InferenceRequest, excluded: frozenset[NodeId], draw: float) -> Placement:
        cohorts = self._links.cohorts(request.model_id)
        for shunned in self._quarantine.shunned(request, excluded):
            out = excluded | shunned
            tokens_min = tokens_wanted(cohorts, request.endpoint, out, request.prompt_tokens_min, request.completion_tokens_max)
            placement = place(cohorts, request.endpoint, out, draw, tokens_min)
            if placement.chosen is not None:
                break
        return placement

    def _load(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> ModelLoad:
        cohorts = self._links.cohorts(request.model_id)
        tokens_min = tokens_wanted(cohorts, request.endpoint, excluded, request.prompt_tokens_min, request.completion_tokens_max)
        usable, free = slots(cohorts, request.endpoint, excluded, tokens_min)
        queue, mean = self._queue(request.model_id), self._request_seconds_mean.get(request.model_id, 1.0)
        is_full = len(queue) >= self._limits.admission.queue_length_max
        return ModelLoad(usable, free, len(queue), mean, is_full and queue.newest_to_give_way(request.account_id) is not None)

    def _queue(self, model_id: ModelId) -> ModelQueue:
        if model_id not in self._queues:
            self._queues[model_id] = ModelQueue()
        return self._queues[model_id]

    def _refusal(self, code: ErrorCode, request: InferenceRequest, excluded: frozenset[NodeId], retry_after: float) -> PotluckError:
        self._refusals.note(request.model_id, request.account_id)
        placement = self._placed(request, excluded, 0.0)
        text = PotluckError(code).message
        return PotluckError(code, f"{text} Replicas: {placement.explanation()}.", retry_after_seconds=retry_after)

    def _learn_duration(self, model_id: ModelId, seconds: float) -> None:
        mean = self._request_seconds_mean.get(model_id, seconds)
        self._request_seconds_mean[model_id] = mean + MEAN_WEIGHT * (seconds - mean)
