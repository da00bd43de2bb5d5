"""The HTTP edge of one inference request: body in, answer out, and an eye on whether anyone still waits for it.

Decides when the head of an answer goes out (with its first bytes, so that a failure before them still has its own status) and what a client
sees when an answer breaks off. `http_exchange` takes the body in and `openai_request` checks it; `requests.RequestService`, which is
`Requests` here, begins the `answer`, and this edge reads it to its end; while the client keeps up it lends the answer the exchange's
`send_now`, and its tokens need no turn here. It must not know how nodes are chosen or what a token costs: it repeats node and charge.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.gateway.gate import caller_of
from potluck_coordinator.gateway.http_exchange import Exchange, Header
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.rate_windows import Allowance, rate_headers
from potluck_coordinator.gateway.relay import PassOn
from potluck_coordinator.gateway.requests import ModelView
from potluck_coordinator.metrics import Metrics
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import (
    COST_HEADER,
    IDEMPOTENCY_KEY,
    NODE_HEADER,
    REPLAYED_HEADER,
    TIER_HEADER,
    TRUST_HEADER,
    TRUST_REQUIRED,
)
from potluck_protocol.values import AccountId, Endpoint, ModelId, NodeId, Usage


class InferenceAnswer(Protocol):
    """What this edge needs of `gateway.answer.Answer`."""

    @property
    def node_id(self) -> NodeId: ...
    @property
    def tier(self) -> ServiceTier: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def charge_micro_credits(self) -> int: ...
    @property
    def document(self) -> bytes: ...
    async def next_data(self, pass_on: PassOn | None = None) -> bytes | None: ...
    async def close(self) -> None: ...


class Requests(Protocol):
    """What this edge needs of `gateway.requests.RequestService`."""

    async def begin(self, request: InferenceRequest) -> InferenceAnswer: ...
    def models(self) -> tuple[ModelView, ...]: ...
    def allowance(self, account_id: AccountId) -> Allowance: ...


class KeyedAnswer(InferenceAnswer, Protocol):
    """What this edge needs of `gateway.kept_answer.KeptAnswer`."""

    @property
    def is_first(self) -> bool: ...


class KeyedRequests(Protocol):
    """What this edge needs of `gateway.keyed_requests.KeyedRequests`."""

    async def begin(self, request: InferenceRequest, key: str, body: bytes) -> KeyedAnswer: ...


class InferenceExchange:
    """Serves one request.

    Args:
        exchange: where it came from and where its answer goes.
        requests: who answers.
        keyed: who answers a request that names an idempotency key.
        metrics: told once, at the end.
    """

    def __init__(self, exchange: Exchange, requests: Requests, keyed: KeyedRequests, metrics: Metrics) -> None:
        self._exchange = exchange
        self._requests = requests
        self._keyed = keyed
        self._metrics = metrics
        self._answer: InferenceAnswer | None = None
        self.model_id: ModelId | None = None
        self.is_replay = False
        """It got what an earlier request with its idempotency key had got, or is getting."""

    @property
    def node_id(self) -> NodeId | None:
        """Who answered."""
        return None if self._answer is None else self._answer.node_id

    @property
    def usage(self) -> Usage | None:
        """Final once `serve` is over."""
        return None if self._answer is None else self._answer.usage

    @property
    def charge_micro_credits(self) -> int:
        """Final once `serve` is over."""
        return 0 if self._answer is None else self._answer.charge_micro_credits

    async def serve(self, endpoint: Endpoint, identity: KeyIdentity) -> None:
        """Answers it, or fails it.

        Raises:
            PotluckError: refused before anything was asked of the pool.
            ClientGoneError: nobody waits any more; the attempt is cancelled.
        """
        self._exchange.more_headers = partial(self._rate_headers, identity.account_id)
        body = await self._exchange.read_body()
        request = parse_request(
            endpoint,
            body,
            self._exchange.request_id,
            identity.account_id,
            caller_of(identity),
            trusted_only=_demands_trust(self._exchange.header(TRUST_HEADER.encode())),
        )
        self.model_id = request.model_id
        try:
            await self._exchange.while_awaited(self._work(request, body))
        finally:
            await self._close()

    async def _begin(self, request: InferenceRequest, body: bytes) -> InferenceAnswer:
        key = self._exchange.header(IDEMPOTENCY_KEY.encode())
        if key is None:
            return await self._requests.begin(request)
        answer = await self._keyed.begin(request, key, body)
        self.is_replay = not answer.is_first
        return answer

    async def _work(self, request: InferenceRequest, body: bytes) -> None:
        """Writes the answer, or its failure, which says whether it cost something."""
        try:
            self._answer = await self._begin(request, body)
            if request.stream:
                await self._relay(self._answer)
            else:
                await self._collect(self._answer)
        except PotluckError as error:
            await self._close()
            await self._exchange.fail(error, billed=self.charge_micro_credits > 0)

    async def _relay(self, answer: InferenceAnswer) -> None:
        """The hot path: one write for whatever has arrived, and none of this loop's turns while the client keeps up."""
        exchange = self._exchange
        data = await answer.next_data()
        # An answer without a byte has its head all the same.
        await exchange.begin_stream(data or b"", self._headers(answer))
        while data is not None:
            data = await answer.next_data(exchange.send_now)
            if data is not None:
                await exchange.send_piece(data)
        await exchange.send_piece(b"", more=False)

    async def _collect(self, answer: InferenceAnswer) -> None:
        """Waits for the end before the head goes out, which says what the whole answer cost."""
        while await answer.next_data() is not None:
            pass
        cost = (COST_HEADER.encode(), b"%d" % answer.charge_micro_credits)
        await self._exchange.reply_json(answer.document, (*self._headers(answer), cost))

    async def _close(self) -> None:
        """Ends the answer, which settles it; again is harmless."""
        if self._answer is not None:
            await self._answer.close()

    def observe(self) -> None:
        """Counts the answer, if there was one, and once, however often it is given."""
        if self._answer is not None and self.model_id is not None and not self.is_replay:
            self._metrics.observe_answer(self.model_id, self.usage, self._exchange.sent_bytes, self._exchange.first_byte_seconds)

    def _headers(self, answer: InferenceAnswer) -> tuple[Header, ...]:
        own = ((NODE_HEADER.encode(), answer.node_id.encode()), (TIER_HEADER.encode(), answer.tier.encode()))
        return (*own, (REPLAYED_HEADER.encode(), b"true")) if self.is_replay else own

    def _rate_headers(self, account_id: AccountId) -> Iterable[Header]:
        return [(name.encode(), value.encode()) for name, value in rate_headers(self._requests.allowance(account_id))]


def _demands_trust(value: str | None) -> bool:
    """Whether the request may run on trusted nodes only. A word that is not understood might be that demand, and is refused."""
    if value is None or value == TRUST_REQUIRED:
        return value is not None
    message = f"`{TRUST_HEADER}` is {TRUST_REQUIRED!r} or left out; with it the request runs on nodes that the operator trusts, or nowhere."
    raise PotluckError(ErrorCode.INVALID_REQUEST, message, param=TRUST_HEADER)
