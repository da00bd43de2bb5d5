"""The port for other gateways: their requests run on this gateway's nodes, as its own do.

Decides whether a node has room for a forwarded attempt, and the trust it demands, by what this gateway knows: the other one's view is a
moment old. What is refused goes back at once and is placed anew. Stalls, engines' deaths and what is held against a replica are noticed
here, where the link is; the answer is the other gateway's, with its hold and its price. It must not know queues, accounts or money.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog

from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.placement import has_slot, has_slot_for_broken
from potluck_coordinator.gateway.answer_outbox import AnswerOutbox
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.interceptors import calling_gateway
from potluck_coordinator.gateway.passing_relay import PassingRelay
from potluck_coordinator.gateway.peer_link import SIGN_OF_LIFE_SECONDS
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import gateway_pb2, gateway_pb2_grpc
from potluck_protocol.values import AccountId, AttemptId, ModelId, NodeId, RequestId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_coordinator.gateway.peers import Peers
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import ReplicaId, StartAttempt

_log = structlog.get_logger()

_ENDED: Final = (grpc.aio.BaseError, grpc.aio.InternalError, asyncio.InvalidStateError)
"""gRPC's words for a call that has ended."""

_Context = grpc.aio.ServicerContext[gateway_pb2.ForwardFrame, gateway_pb2.AnswerFrame]


class ForwardServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Serves `GatewayService`.

    Args:
        links: the nodes.
        peers: who is told how many of its attempts have arrived.
        clock: for when an attempt began.
        on_room: called when a slot came free.
    """

    def __init__(self, links: Links, peers: Peers, clock: Clock, on_room: Callable[[], None]) -> None:
        self._links = links
        self._peers = peers
        self._clock = clock
        self._on_room = on_room
        self._newest: dict[int, _Forwarded] = {}
        """The last call of each gateway's, by its epoch. It stands, and is counted, whether or not this gateway has a link to that one."""

    async def Forward(  # type: ignore[override]  # noqa: N802 - the stub wants an iterator; read/write cost less per frame
        self, request_iterator: AsyncIterator[gateway_pb2.ForwardFrame], context: _Context
    ) -> None:
        """One gateway's attempts, from the call's beginning to its end."""
        del request_iterator
        epoch = calling_gateway()
        await context.send_initial_metadata(())
        _log.info("gateway_linked_here", peer_epoch=epoch)
        self._peers.starts_seen[epoch] = 0
        forwarded = self._newest[epoch] = _Forwarded(self._links, self._clock, self._on_room)
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(work)
            for work in (self._read(context, epoch, forwarded), _write(context, forwarded.outbox), _say_something(forwarded.outbox))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            forwarded.end_all()
            if self._newest.get(epoch) is forwarded:
                del self._newest[epoch], self._peers.starts_seen[epoch]
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, _ENDED):
                    _log.error("gateway_link_failed_here", peer_epoch=epoch, exc_info=outcome)
            _log.info("gateway_link_ended_here", peer_epoch=epoch)

    async def _read(self, context: _Context, epoch: int, forwarded: _Forwarded) -> None:
        while isinstance(frame := await context.read(), gateway_pb2.ForwardFrame):
            for start in frame.starts:
                self._peers.starts_seen[epoch] += 1
                forwarded.start(start)
            for finish in frame.finishes:
                forwarded.finish(finish)
            for acknowledged in frame.acknowledgements:
                forwarded.acknowledge(AttemptId(acknowledged.attempt_id), acknowledged.next_sequence)


class _Forwarded:
    """The attempts of one call."""

    def __init__(self, links: Links, clock: Clock, on_room: Callable[[], None]) -> None:
        self._on_room = on_room
        self.outbox = AnswerOutbox()
        self._links = links
        self._clock = clock
        self._under_way: dict[AttemptId, tuple[NodeSession, ReplicaId, PassingRelay]] = {}

    def start(self, message: gateway_pb2.ForwardedStart) -> None:
        """Starts it, or says at once why not."""
        start = codec.start_attempt_value(message.start)
        try:
            session = self._session_with_room(NodeId(message.node_id), start, message)
            request = _request(message, start)
            self._check_lethal(request)
            now = self._clock.monotonic_seconds()
            relay = PassingRelay(start.attempt_id, start.window_bytes, now, session.acknowledge, self.outbox)
            session.start(start, relay, now, request, frozenset(map(NodeId, message.tried_node_ids)))
        except PotluckError as error:
            self.outbox.end(start.attempt_id, 0, error)
            return
        self._under_way[start.attempt_id] = session, start.replica_id, relay
        self._links.node_changed(session.node_id)

    def finish(self, message: gateway_pb2.ForwardedFinish) -> None:
        """Nobody waits for it any more."""
        attempt_id = AttemptId(message.attempt_id)
        found = self._under_way.pop(attempt_id, None)
        if found is None:
            return
        session, replica_id, _ = found
        usage = codec.usage_value(message.usage) if message.HasField("usage") else None
        self._links.measures.count(attempt_id, usage, message.token_count, was_outrun=message.was_outrun)
        self._links.finish(session, attempt_id, replica_id)
        self._on_room()

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int) -> None:
        """The client at the other gateway has taken so much."""
        found = self._under_way.get(attempt_id)
        if found is not None:
            found[2].acknowledged(next_sequence)

    def end_all(self) -> None:
        """The other gateway is gone, and with it everybody who waited."""
        under_way, self._under_way = self._under_way, {}
        for attempt_id, (session, replica_id, _) in under_way.items():
            self._links.finish(session, attempt_id, replica_id)
        if under_way:
            self._on_room()

    def _session_with_room(self, node_id: NodeId, start: StartAttempt, message: gateway_pb2.ForwardedStart) -> NodeSession:
        session = self._links.session(node_id)
        view = next((view for view in self._links.roster().replicas_of(node_id) if view.replica_id == start.replica_id), None)
        if session is None or view is None or not (has_slot_for_broken(view) if message.continues else has_slot(view)):
            raise PotluckError(ErrorCode.QUEUE_FULL, "The node that had room for it was taken by others.", retry_after_seconds=1)
        if message.trusted_only and not view.is_trusted:
            raise PotluckError(ErrorCode.NO_CAPACITY, "The node that was to answer is not trusted any more.", retry_after_seconds=1)
        return session

    def _check_lethal(self, request: InferenceRequest) -> None:
        """Engines of this gateway's nodes may have died of it; the other gateway need not know yet."""
        if self._links.knows_lethal_requests and self._links.culprits.is_refused(request.fingerprint(self._links.culprits)):
            raise PotluckError(ErrorCode.REQUEST_REFUSED)


def _request(message: gateway_pb2.ForwardedStart, start: StartAttempt) -> InferenceRequest:
    """As the other gateway understood it; what only an edge needs is left out."""
    return InferenceRequest(
        request_id=RequestId(message.request_id),
        account_id=AccountId(message.account_id),
        model_id=ModelId(message.model_id),
        endpoint=start.endpoint,
        body=start.body,
        stream=start.stream,
        include_usage=True,
        prompt_bytes=message.prompt_bytes,
        completion_tokens_max=message.completion_tokens_max if message.HasField("completion_tokens_max") else None,
        answer_count=message.answer_count,
        prompt_count=message.prompt_count,
        prompt_tokens_min=message.prompt_tokens_min,
        trusted_only=message.trusted_only,
        work=Work(message.expected_prompt_tokens, message.expected_answer_tokens),
    )


async def _write(context: _Context, outbox: AnswerOutbox) -> None:
    while True:
        await context.write(await outbox.take())


async def _say_something(outbox: AnswerOutbox) -> None:
    while True:
        outbox.sign_of_life()
        await asyncio.sleep(SIGN_OF_LIFE_SECONDS)
