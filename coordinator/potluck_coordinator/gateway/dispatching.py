"""Starts attempts: the relay, the node's part, the hold beside the dispatch, and whatever must happen once an attempt is over.

Decides how long an attempt may run. What is held and who earns it are `domain.pricing` and the directory's word; where it runs was decided
before. It must not know queues: `on_over` hears of each end, and what it does there is its own affair.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.ledger import MarkDelivered, OpenHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.pricing import hold_amount
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.relay import Relay
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId, NodeId, ReplicaId, StartAttempt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.ledger_writer import LedgerWriter
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.quarantine import Quarantine
    from potluck_protocol.clock import Clock

REQUEST_SECONDS_MAX: Final = 600.0
"""From its dispatch. An answer that is not whole by then fails, and its slot is free again; by default the SDK waits no longer."""
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
        on_over: called with the request, that, the answer, and the seconds it took.
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
        on_over: Callable[[InferenceRequest, float, Answer, float], None],
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
        self.answers: dict[AttemptId, Answer] = {}
        """Those on their way."""

    def dispatch(self, request: InferenceRequest, entry: CatalogueEntry, replica: ReplicaView, tried: frozenset[NodeId]) -> Answer:
        """Starts an attempt and, beside it, its hold. The engine is not kept waiting; the client sees nothing before the hold stands."""
        session = self._links.session(replica.node_id)
        assert session is not None, "placement saw the session in this same turn of the loop"
        attempt_id = self._books.new_attempt_id()
        now = self._clock.monotonic_seconds()
        amount = hold_amount(entry, request.prompt_bytes, request.completion_tokens_max, request.answer_count, request.prompt_count)
        relay = Relay(attempt_id, self._window_bytes, now, session.acknowledge)
        payees = self._books.replica_payees().get(replica.replica_id, (PayeeShare(session.owner_account_id, 1),))
        start = StartAttempt(attempt_id, replica.replica_id, request.endpoint, request.body, request.stream, self._window_bytes)
        session.start(start, relay, now, request, tried)
        self._links.node_changed(session.node_id)

        finish = partial(self._links.finish, session, attempt_id, replica.replica_id)
        try:
            hold = self._books.ledger.submit(self._hold(attempt_id, request.account_id, payees, amount))
        except BaseException:
            finish()
            raise
        self._quarantine.begin(attempt_id, session.node_id, request)
        expected = self._on_start(request)

        def expire() -> None:
            relay.fail(PotluckError(ErrorCode.ENGINE_FAILED, f"The answer took longer than {REQUEST_SECONDS_MAX:.0f} s."))
            # The slot is not kept until whoever reads the answer notices.
            finish()
            self._on_slot()

        deadline = asyncio.get_running_loop().call_later(REQUEST_SECONDS_MAX, expire)

        def release() -> None:
            deadline.cancel()
            finish()
            self._quarantine.end(attempt_id, request, answered=answer.is_whole)
            del self.answers[attempt_id]
            self._on_over(request, expected, answer, self._clock.monotonic_seconds() - now)
            self._on_slot()

        answer = Answer(
            request=request,
            entry=entry,
            node_id=session.node_id,
            relay=relay,
            hold_micro_credits=amount,
            hold=hold,
            ledger=self._books.ledger,
            release=release,
        )
        self.answers[attempt_id] = answer
        return answer

    def _hold(self, attempt_id: AttemptId, payer: AccountId, payees: tuple[PayeeShare, ...], amount_micro_credits: int) -> OpenHold:
        return OpenHold(
            hold_id=attempt_id,
            payer=payer,
            payees=payees,
            amount_micro_credits=amount_micro_credits,
            expires_at_unix_ms=self._clock.unix_ms() + int((REQUEST_SECONDS_MAX + HOLD_SLACK_SECONDS) * 1000),
            gateway_epoch=self._books.gateway_epoch,
        )

    def mark_delivered(self) -> None:
        """Writes down what each unfinished answer has earned, for the case that this gateway dies before it settles."""
        for answer in self.answers.values():
            charge = answer.charge_so_far()
            if charge > answer.marked_micro_credits:
                answer.marked_micro_credits = charge
                self._books.ledger.submit(MarkDelivered(answer.attempt_id, charge))

    async def stop(self) -> None:
        """Ends every answer, as a coordinator that goes away does."""
        # These may have been worked on, so they must not look like requests that can safely be made again.
        for answer in tuple(self.answers.values()):
            answer.fail(PotluckError(ErrorCode.NODE_LOST, "The coordinator is stopping; the answer broke off."))
            # Settled here and now: a client that does not read would keep its edge from it for longer than a stop may take.
            await answer.close()
