"""The real http port in front of real answers over real relays, into which the test writes what the node would send."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from potluck_coordinator.domain.ledger import LedgerCommand, LedgerOutcome, SettleHold
from potluck_coordinator.domain.requests import Place
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.attempt import Attempt
from potluck_coordinator.gateway.http_server import HttpServer
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.rate_windows import Allowance
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.gateway.requests import ModelView
from potluck_coordinator.metrics import Metrics
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId
from tests.support.http_edge import ALLOWANCE, CONNECTION_DOCUMENT, ENTRY, NODE_ID, authenticate
from tests.support.key_desk import no_keys

WINDOW_BYTES = 1024 * 1024


def decided(outcome: LedgerOutcome) -> asyncio.Future[LedgerOutcome]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(outcome)
    return future


class RelayedEdge:
    """Stands where `gateway.requests.RequestService` stands, and keeps what each answer came to."""

    price = ENTRY.completion_price_micro_credits

    def __init__(self) -> None:
        self.port = 0
        self.charges: list[int] = []
        self.released = asyncio.Event()
        self._relays: asyncio.Queue[Relay] = asyncio.Queue()

    async def next_relay(self) -> Relay:
        """The bytes of the request that came next."""
        return await asyncio.wait_for(self._relays.get(), 5)

    def answer(self, request: InferenceRequest, relay: Relay) -> Answer:
        """The answer to a request for which there is money, and one node that may answer it."""

        async def begin(asked: InferenceRequest, place: Place) -> Attempt:
            if NODE_ID in place.excluded:
                raise PotluckError(ErrorCode.NO_CAPACITY)
            return Attempt(
                request=asked,
                entry=ENTRY,
                node_id=NODE_ID,
                relay=relay,
                deadline_at_seconds=math.inf,
                hold_micro_credits=10**9,
                hold=decided(LedgerOutcome.APPLIED),
                ledger=self,
                release=self.released.set,
            )

        return Answer(request, begin, SystemClock())

    async def begin(self, request: InferenceRequest) -> Answer:
        relay = Relay(AttemptId("attempt"), WINDOW_BYTES, 0.0, lambda _id, _sequence: None)
        answer = self.answer(request, relay)
        self._relays.put_nowait(relay)
        try:
            await answer.open()
        except BaseException:
            await answer.close()
            raise
        return answer

    def submit(self, command: LedgerCommand) -> asyncio.Future[LedgerOutcome]:
        """What a `LedgerWriter` is asked here: to settle."""
        assert isinstance(command, SettleHold)
        self.charges.append(command.amount_micro_credits)
        return decided(LedgerOutcome.APPLIED)

    def models(self) -> tuple[ModelView, ...]:
        return (ModelView(ENTRY, 1),)

    def allowance(self, _account_id: AccountId) -> Allowance:
        return ALLOWANCE


@asynccontextmanager
async def relayed_edge_of() -> AsyncIterator[RelayedEdge]:
    """Serves until the block ends."""
    edge, clock = RelayedEdge(), SystemClock()
    server = HttpServer(edge, KeyCache(authenticate, lambda: 1, clock), CONNECTION_DOCUMENT, Metrics(), clock, keyed=no_keys(edge))
    edge.port = await server.start("127.0.0.1", 0)
    try:
        yield edge
    finally:
        await server.stop(grace_seconds=1)
