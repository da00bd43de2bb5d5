"""The link port's servicer: moves frames between the gRPC stream of one node and its session. `line_servicer` is its measuring part.

Decides which hello is taken, and drops frames of another epoch. `links` opens the session, makes the welcome and hears of the goodbye;
chunks and ends go to their attempt's `relay`, heartbeats to `links`, certificate requests to the directory's enrolment desk.
The reading loop is the hot path of every token: no task, future, log line or metric per chunk. It must not know requests or money.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc
import structlog

from potluck_coordinator.gateway.interceptors import calling_node
from potluck_coordinator.gateway.line_servicer import LineServicer
from potluck_coordinator.gateway.relay import AnswerHead
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EndReason, GoodbyeReason
from potluck_protocol.version import PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from potluck_coordinator.desks import DirectoryPort
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_coordinator.gateway.outbox import Outbox
    from potluck_protocol.clock import Clock

_log = structlog.get_logger()

ATTEMPT_ID_CHARACTERS_MAX: Final = 64
HELLO_SECONDS_MAX: Final = 10.0
"""How long a connected node may take to say who it is."""
ANSWER_SECONDS: Final = 0.1
"""How long an answer to a heartbeat waits for those of other nodes. Each alone wakes gRPC's thread, and that the loop; many together wake
them once. A lease that is renewed has seconds left."""
_GOODBYES_OF_NODES: Final = frozenset({GoodbyeReason.STOPPING, GoodbyeReason.LEAVING})
"""All others are the coordinator's to say; of a node they say no more than that its link has ended."""
_NOT_TAKEN: Final = frozenset({EndReason.REFUSED, EndReason.HANDED_BACK})

_LinkContext = grpc.aio.ServicerContext[node_pb2.NodeFrame, node_pb2.CoordinatorFrame]


class LinkServicer(LineServicer):
    """Serves `NodeService`: the link here, the measuring by what it inherits.

    Args:
        links: the sessions.
        directory: signs renewed certificates.
        clock: whose seconds chunks are stamped with.
    """

    def __init__(self, links: Links, directory: DirectoryPort, clock: Clock) -> None:
        super().__init__(clock)
        self._links = links
        self._directory = directory
        self._renewals: dict[Outbox, asyncio.Task[None]] = {}
        self._answered: list[Outbox] = []
        """Those in which an answer to a heartbeat waits for company."""

    async def Link(  # type: ignore[override]  # noqa: N802 - the stub wants an iterator; read/write cost less per frame
        self, request_iterator: AsyncIterator[node_pb2.NodeFrame], context: _LinkContext
    ) -> None:
        """One link, from hello to its end."""
        del request_iterator
        node_id = calling_node()
        try:
            async with asyncio.timeout(HELLO_SECONDS_MAX):
                first = await context.read()
        except TimeoutError:
            raise PotluckError(ErrorCode.INVALID_REQUEST, "The link said no hello in time.") from None
        if not isinstance(first, node_pb2.NodeFrame) or not first.HasField("hello"):
            raise PotluckError(ErrorCode.INVALID_REQUEST, "The first frame of a link must be a hello.")
        if not PROTOCOL_VERSION - 1 <= first.hello.protocol_version <= PROTOCOL_VERSION:
            message = (
                f"The agent speaks protocol {first.hello.protocol_version}, this coordinator {PROTOCOL_VERSION}. Upgrade the older one."
            )
            reason = GoodbyeReason.PROTOCOL_VERSION_UNSUPPORTED
            await context.write(node_pb2.CoordinatorFrame(goodbye=codec.goodbye_message(reason, message)))
            return
        hello = codec.hello_value(first.hello)
        if hello.node_id != node_id:
            raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The hello names another node than the certificate.")
        session, outbox, welcome = await self._links.connect(hello)
        await self._carry(context, session, outbox, node_pb2.CoordinatorFrame(welcome=codec.welcome_message(welcome)))

    async def _carry(self, context: _LinkContext, session: NodeSession, outbox: Outbox, first: node_pb2.CoordinatorFrame) -> None:
        """Moves frames both ways until either side ends; raises what was wrong with the node's frames."""
        ended_here = False
        writer = asyncio.ensure_future(self._write(context, outbox, first, session.epoch))
        reader = asyncio.ensure_future(self._read(context, session, outbox))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            ended_here = not reader.done()
        finally:
            # Before anything is awaited: gRPC cancels the call of a node that is gone, and its end must not be missed for that.
            was_read = reader.done() and not reader.cancelled() and reader.exception() is None
            recorded = self._links.disconnect(session, outbox, reader.result() if was_read else None)
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
        goodbye = None if ended_here else reader.result()
        left = goodbye is GoodbyeReason.LEAVING and recorded is not None and await asyncio.shield(recorded)
        # A node that leaves throws its key away once the link ends well. Its goodbye may cross ours, or come after the session's end.
        if ended_here or (goodbye is GoodbyeReason.LEAVING and not left):
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator ended this link.")

    @staticmethod
    async def _write(context: _LinkContext, outbox: Outbox, first: node_pb2.CoordinatorFrame, epoch: int) -> None:
        await context.write(first)
        while True:
            frame = await outbox.take()
            frame.epoch = epoch
            await context.write(frame)
            if frame.HasField("goodbye"):
                return

    async def _read(self, context: _LinkContext, session: NodeSession, outbox: Outbox) -> GoodbyeReason | None:
        """Takes frames until the node says goodbye or the stream ends; a stream that just ends is a lost node, not a finished one."""
        while True:
            frame = await context.read()
            if not isinstance(frame, node_pb2.NodeFrame):
                return None
            if frame.epoch != session.epoch:
                continue
            now = session.heard_at = self._clock.monotonic_seconds()
            if frame.chunks:
                self._take_chunks(frame, session, outbox, now)
            if frame.ends:
                self._take_ends(frame, session)
            if frame.HasField("heartbeat"):
                self._take_heartbeat(frame.heartbeat, session, outbox, now)
            if frame.HasField("certificate_request"):
                self._renew_beside(frame.certificate_request.certificate_request_der, session, outbox)
            if frame.HasField("goodbye"):
                reason = codec.goodbye_reason_from_number(frame.goodbye.reason)
                return reason if reason in _GOODBYES_OF_NODES else None

    def _take_chunks(self, frame: node_pb2.NodeFrame, session: NodeSession, outbox: Outbox, now: float) -> None:
        for chunk in frame.chunks:
            relay = session.attempts.get(chunk.attempt_id)  # type: ignore[call-overload]
            if relay is None:
                # Nobody waits for it, so the node must not go on with it, whatever became of the cancel. Ids of ours are short.
                if len(chunk.attempt_id) <= ATTEMPT_ID_CHARACTERS_MAX:
                    outbox.cancel(AttemptId(chunk.attempt_id))
                continue
            if relay.head is None and chunk.HasField("head"):
                relay.head = AnswerHead(chunk.head.http_status, chunk.head.content_type)
            had_begun = relay.first_chunk_at is not None
            relay.receive(chunk.sequence, chunk.data, now)
            if not had_begun and relay.first_chunk_at is not None:
                self._links.answer_began(session)

    def _take_ends(self, frame: node_pb2.NodeFrame, session: NodeSession) -> None:
        for end in frame.ends:
            attempt_id = AttemptId(end.attempt_id)
            relay = session.attempts.get(attempt_id)
            if relay is None:
                continue
            reason = codec.end_reason_from_number(end.reason)
            kills_engines = False
            if end.blamed and reason is EndReason.ENGINE_FAILED:
                self._links.engine_died(session, attempt_id)
                kills_engines = self._links.kills_engines(session, attempt_id)
            elif end.blamed:
                # The node's word is enough to try no other engine now, and not enough to refuse the request to everyone.
                kills_engines = True
            elif reason is EndReason.ENGINE_FAILED and not relay.over:
                self._links.suspicions.failed(session.replica_of(attempt_id))
                self._links.node_changed(session.node_id)
            elif reason in _NOT_TAKEN and not relay.over:
                self._links.suspicions.refused(session, session.replica_of(attempt_id))
                self._links.node_changed(session.node_id)
            relay.end(end.sequence, reason, end.detail, kills_engines=kills_engines)

    def _take_heartbeat(self, message: node_pb2.Heartbeat, session: NodeSession, outbox: Outbox, now: float) -> None:
        if message.unchanged:
            # Agents that say so count their leases by numbers, too.
            session.counts_by_number = True
        if message.unchanged or session.has_heard(message.number):
            self._links.beat_again(session, message.number, now)
        else:
            self._links.beat(session, codec.heartbeat_value(message), now)
        if session.outbox is outbox and self._links.leases.renew_if_due(session, now):
            self._answer_soon(outbox)

    def _answer_soon(self, outbox: Outbox) -> None:
        self._answered.append(outbox)
        if len(self._answered) == 1:
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._send_answers)

    def _send_answers(self) -> None:
        answered, self._answered = self._answered, []
        for outbox in answered:
            outbox.send_lease()

    def _renew_beside(self, certificate_request_der: bytes, session: NodeSession, outbox: Outbox) -> None:
        """Beside the reading loop: a directory that restarts must not keep heartbeats from being read. One at a time."""
        if outbox in self._renewals:
            return
        task = self._renewals[outbox] = asyncio.ensure_future(self._renew(certificate_request_der, session, outbox))
        task.add_done_callback(lambda _: self._renewals.pop(outbox))

    async def _renew(self, certificate_request_der: bytes, session: NodeSession, outbox: Outbox) -> None:
        try:
            node_id, certificate_pem = await self._directory.enrolment.renew(certificate_request_der)
        except PotluckError as error:
            # The node asks again after a minute.
            _log.warning("certificate_not_renewed", node_id=session.node_id, code=error.code)
            return
        if node_id != session.node_id:
            _log.error("certificate_asked_for_another_key", node_id=session.node_id, other_node_id=node_id)
            return
        outbox.hand_over_certificate(certificate_pem)
        _log.info("certificate_renewed", node_id=node_id)
