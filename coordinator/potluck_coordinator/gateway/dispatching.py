"""Starts attempts: the relay, the node's part, the hold beside the dispatch, and whatever must happen once an attempt is over.

Decides how long an attempt may run, and what is held for one that goes on from another's text. What is held else and who earns it are
`domain.pricing` and the directory's word; where it runs was decided before. It must not know queues: `on_over` hears of each end, and what
it does there is its own affair.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.ledger import MarkDelivered, OpenHold, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.pricing import hold_amount
from potluck_coordinator.gateway.attempt import Attempt
from potluck_coordinator.gateway.continuation import continued_body
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.gateway.remote_node import RemoteNode
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId, NodeId, ReplicaId, StartAttempt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.ledger import LedgerOutcome
    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.ledger_writer import LedgerWriter
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.quarantine import Quarantine
    from potluck_coordinator.gateway.remote_node import Host
    from potluck_protocol.clock import Clock

REQUEST_SECONDS_MAX: Final = 600.0
"""From a request's first dispatch. An answer that is not whole by then fails, and its slot is free again; by default the SDK waits no
longer."""
HOLD_SLACK_SECONDS: Final = 60.0
"""A hold outlives its request by so much, for its settlement to be committed."""


@dataclass(frozen=True, slots=True)
class Books:
    """Where an attempt's money is written, and how.

    Args:
        ledger: where money events go.
        replica_payees: who earns by a replica of several nodes, as of now; of any other the node's owner does.
        new_attempt_id: a fresh id, unique over gateways and restarts.
        gateway_epoch: whose holds these are.
    """

    ledger: LedgerWriter
    replica_payees: Callable[[], Mapping[ReplicaId, tuple[PayeeShare, ...]]]
    new_attempt_id: Callable[[], AttemptId]
    gateway_epoch: int


class Dispatching:
    """The attempts of one gateway.

    Args:
        links: the nodes.
        quarantine: hears of each attempt's beginning and end.
        books: for the holds.
        window_bytes: how much of one answer may be on its way.
        clock: for deadlines.
        on_start: called with each attempt's request; what it gives comes back to `on_over`.
        on_over: called with the request, that, the attempt, and the seconds it took.
        on_slot: called whenever a slot has become free.
    """

    def __init__(
        self,
        *,
        links: Links,
        quarantine: Quarantine,
        books: Books,
        window_bytes: int,
        clock: Clock,
        on_start: Callable[[InferenceRequest], float],
        on_over: Callable[[InferenceRequest, float, Attempt, float], None],
        on_slot: Callable[[], None],
    ) -> None:
        self._links = links
        self._quarantine = quarantine
        self._books = books
        self._window_bytes = window_bytes
        self._clock = clock
        self._on_start = on_start
        self._on_over = on_over
        self._on_slot = on_slot
        self.attempts: dict[AttemptId, Attempt] = {}
        """Those on their way."""

    def dispatch(
        self, request: InferenceRequest, entry: CatalogueEntry, replica: ReplicaView, tried: frozenset[NodeId], *, as_hedge: bool = False
    ) -> Attempt:
        """Starts an attempt and, beside it, its hold. The engine is not kept waiting; the client sees nothing before the hold stands.

        A hedge has its hold, and its account is charged a turn, only once it is read: until then it is the pool's own affair.
        Raises COORDINATOR_UNAVAILABLE where no hold can be had, before the engine hears of it.
        """
        session = self._links.host(replica.node_id)
        assert session is not None, "placement saw the node in this same turn of the loop"
        attempt_id, now, amount = self._books.new_attempt_id(), self._clock.monotonic_seconds(), _hold_of(request, entry)
        finish = partial(self._links.finish, session, attempt_id, replica.replica_id)
        charged: list[float] = []
        open_hold = partial(self._open_hold, attempt_id, request.account_id, replica.replica_id, session, amount)

        def take() -> asyncio.Future[LedgerOutcome]:
            hold = open_hold()
            charged.append(self._on_start(request))
            return hold

        # The hold leaves before the attempt: on an idle pool its commit takes longer than the engine.
        hold = None if as_hedge else open_hold()
        relay = self._send(attempt_id, request, replica, session=session, tried=tried, is_held=hold is not None)
        if hold is not None:
            charged.append(self._on_start(request))

        def release() -> None:
            deadline.cancel()
            self._links.measures.count(attempt_id, attempt.usage, attempt.relayed_token_count, was_outrun=attempt.was_outrun)
            finish()
            self._quarantine.end(attempt_id, request, answered=attempt.is_whole)
            del self.attempts[attempt_id]
            for expected in charged:
                self._on_over(request, expected, attempt, self._clock.monotonic_seconds() - now)
            self._on_slot()

        attempt: Attempt = Attempt(
            request=request,
            entry=entry,
            node_id=session.node_id,
            relay=relay,
            deadline_at_seconds=now + REQUEST_SECONDS_MAX if request.deadline_at_seconds is None else request.deadline_at_seconds,
            hold_micro_credits=amount,
            hold=hold,
            ledger=self._books.ledger,
            release=release,
            take=take,
            late_after_seconds=self._links.measures.foresee(attempt_id, replica),
            engine_kind=replica.engine_kind,
            on_outdone=partial(self._outdone, session, replica),
        )
        deadline = self._expiring(attempt, now, finish)
        self._quarantine.begin(attempt_id, session.node_id, request)
        self.attempts[attempt_id] = attempt
        return attempt

    def _send(
        self,
        attempt_id: AttemptId,
        request: InferenceRequest,
        replica: ReplicaView,
        *,
        session: Host,
        tried: frozenset[NodeId],
        is_held: bool,
    ) -> Relay:
        if not is_held:
            self._books.ledger.check()
        try:
            now, body = self._clock.monotonic_seconds(), _body_of(request, replica)
            relay = Relay(attempt_id, self._window_bytes, now, session.acknowledge)
            start = StartAttempt(attempt_id, replica.replica_id, request.endpoint, body, request.stream, self._window_bytes)
            session.start(start, relay, now, request, tried)
        except BaseException:
            if is_held:
                self._books.ledger.submit(SettleHold(attempt_id, 0))
            raise
        self._links.node_changed(session.node_id)
        return relay

    def _outdone(self, session: Host, replica: ReplicaView, code: ErrorCode, by_engine_kind: str) -> None:
        if isinstance(session, RemoteNode):
            return  # its gateway holds against it what it saw itself
        # An owner's own server may be any engine, of any version.
        by_its_like = by_engine_kind == replica.engine_kind != ATTACH_KIND
        self._links.suspicions.outdone(session, replica.replica_id, code, by_its_like=by_its_like)
        self._links.node_changed(session.node_id)

    def _expiring(self, attempt: Attempt, now: float, finish: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, attempt.deadline_at_seconds - now), self._expire, attempt, finish)

    def _expire(self, attempt: Attempt, finish: Callable[[], None]) -> None:
        attempt.break_off(PotluckError(ErrorCode.ENGINE_FAILED, f"The answer took longer than {REQUEST_SECONDS_MAX:.0f} s."))
        # The slot is not kept until whoever reads the answer notices.
        finish()
        self._on_slot()

    def _open_hold(
        self, attempt_id: AttemptId, payer: AccountId, replica_id: ReplicaId, session: Host, amount_micro_credits: int
    ) -> asyncio.Future[LedgerOutcome]:
        hold = OpenHold(
            hold_id=attempt_id,
            payer=payer,
            payees=self._books.replica_payees().get(replica_id, (PayeeShare(session.owner_account_id, 1),)),
            amount_micro_credits=amount_micro_credits,
            expires_at_unix_ms=self._clock.unix_ms() + int((REQUEST_SECONDS_MAX + HOLD_SLACK_SECONDS) * 1000),
            gateway_epoch=self._books.gateway_epoch,
        )
        return self._books.ledger.submit(hold)

    def mark_delivered(self) -> None:
        """Writes down what each unfinished answer has earned, for the case that this gateway dies before it settles."""
        for attempt in self.attempts.values():
            charge = attempt.charge_so_far()
            if charge > attempt.marked_micro_credits:
                attempt.marked_micro_credits = charge
                self._books.ledger.submit(MarkDelivered(attempt.attempt_id, charge))

    async def stop(self) -> None:
        """Ends every answer, as a coordinator that goes away does."""
        # These may have been worked on, so they must not look like requests that can safely be made again.
        for attempt in tuple(self.attempts.values()):
            attempt.break_off(PotluckError(ErrorCode.NODE_LOST, "The coordinator is stopping; the answer broke off."))
            # Settled here and now: a client that does not read would keep its edge from it for longer than a stop may take.
            await attempt.close()


def _hold_of(request: InferenceRequest, entry: CatalogueEntry) -> int:
    """The most that an attempt can cost; all those of a request together never cost more than one that nothing disturbs could."""
    tokens_max, continued = request.completion_tokens_max, request.continued
    if tokens_max is None and continued is not None:
        tokens_max = max(0, entry.context_length_tokens - continued.token_count)
    amount = hold_amount(entry, request.prompt_bytes, tokens_max, request.answer_count, request.prompt_count)
    return amount if continued is None else min(amount, continued.hold_micro_credits_max)


def _body_of(request: InferenceRequest, replica: ReplicaView) -> bytes:
    if request.continued is None:
        return request.body
    return continued_body(request.endpoint, request.body, request.continued, replica.engine_kind)
