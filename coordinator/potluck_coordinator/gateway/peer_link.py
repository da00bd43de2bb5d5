"""The link to one other gateway: attempts of this one's requests go there, and what their nodes answer comes back.

Decides when the way there counts as gone: the call has ended, or nothing came for `SILENCE_SECONDS_MAX`, in which the other gateway sends a
frame four times. Every attempt on it is then lost, and goes on elsewhere. The reading loop is the hot path of every token that crosses: no
task, future, log line or metric for each. It must not know placement or money.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
import structlog

from potluck_coordinator.gateway.forward_outbox import ForwardOutbox
from potluck_coordinator.gateway.relay import AnswerHead
from potluck_protocol.channels import CHANNEL_OPTIONS, MESSAGE_BYTES_MAX, options_with
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import gateway_pb2, gateway_pb2_grpc
from potluck_protocol.values import AttemptId, EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.gateway.remote_node import Way
    from potluck_coordinator.pool_desk import ServerIdentity
    from potluck_protocol.clock import Clock

SIGN_OF_LIFE_SECONDS: Final = 0.5
SILENCE_SECONDS_MAX: Final = 2.0
"""Of a gateway that was frozen, or whose machine is gone: its answers stall, and their clients wait."""
FRAME_BYTES_MAX: Final = 4 * MESSAGE_BYTES_MAX
"""Of one between gateways: what a node said in its two largest frames, and other answers' ends beside it, must not end the link of all."""
OPEN_SECONDS_MAX: Final = 5.0
RETRY_SECONDS: Final = 0.5

_log = structlog.get_logger()

_Call: TypeAlias = "grpc.aio.StreamStreamCall[gateway_pb2.ForwardFrame, gateway_pb2.AnswerFrame]"


class PeerLink:
    """One link, made anew as often as it breaks.

    Args:
        epoch: of the other gateway.
        address: its port for gateways, as "host:port".
        identity: this gateway's own.
        way: gets the outbox while there is a link.
        clock: for silences.
        on_change: called when the way is there or gone, and when an answer begins.
    """

    def __init__(
        self, *, epoch: int, address: str, identity: ServerIdentity, way: Way, clock: Clock, on_change: Callable[[], None]
    ) -> None:
        self._epoch = epoch
        self._address = address
        self._identity = identity
        self._way = way
        self._clock = clock
        self._on_change = on_change
        self._heard_at = 0.0
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """Ends the link, and every attempt on it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=self._identity.ca_certificate_pem.encode(),
            private_key=self._identity.private_key_pem,
            certificate_chain=self._identity.certificate_chain_pem,
        )
        lengths = {"grpc.max_receive_message_length": FRAME_BYTES_MAX, "grpc.max_send_message_length": FRAME_BYTES_MAX}
        options = options_with(CHANNEL_OPTIONS, lengths)
        async with grpc.aio.secure_channel(self._address, credentials, options=options) as channel:
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
            while True:
                reason = await self._carry(stub)
                _log.warning("gateway_link_broke", peer_epoch=self._epoch, reason=reason)
                await asyncio.sleep(RETRY_SECONDS)

    async def _carry(self, stub: Any) -> str:
        """One call from its beginning to its end; why it ended."""
        call: _Call = stub.Forward()
        tasks: list[asyncio.Future[str]] = []
        try:
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                await call.initial_metadata()
            if call.done():  # gRPC gives a call that could not be made empty metadata
                return await call.details() or "it could not be opened"
            outbox = self._way.outbox = ForwardOutbox()
            self._way.starts_seen = 0  # what was seen of another link's says nothing of this one's
            _log.info("gateway_linked", peer_epoch=self._epoch)
            self._on_change()
            self._heard_at = self._clock.monotonic_seconds()
            tasks = [asyncio.ensure_future(work) for work in (self._write(call, outbox), self._read(call), self._listen())]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except TimeoutError:
            return "it did not open in time"
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        except asyncio.InvalidStateError:  # gRPC's word for a write to a call that has just ended
            return "the other gateway ended it"
        except Exception:  # noqa: BLE001 - a fault in one frame ends this call, and not the way to that gateway for good
            _log.exception("gateway_link_failed", peer_epoch=self._epoch)
            return "it said what could not be carried out"
        finally:
            self._lose()
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _write(call: _Call, outbox: ForwardOutbox) -> str:
        while True:
            await call.write(await outbox.take())

    async def _read(self, call: _Call) -> str:
        while True:
            frame = await call.read()
            self._heard_at = self._clock.monotonic_seconds()
            if not isinstance(frame, gateway_pb2.AnswerFrame):
                return "the other gateway ended it"
            if frame.chunks:
                self._take_chunks(frame)
            for end in frame.ends:
                self._take_end(end)

    async def _listen(self) -> str:
        """Returns when the other gateway has been silent for too long. Time in which this one stood still is not held against it."""
        looked_at = self._clock.monotonic_seconds()
        while True:
            await asyncio.sleep(SIGN_OF_LIFE_SECONDS)
            now = self._clock.monotonic_seconds()
            self._heard_at += max(0.0, now - looked_at - 2 * SIGN_OF_LIFE_SECONDS)
            looked_at = now
            if now - self._heard_at > SILENCE_SECONDS_MAX:
                return f"it said nothing for {SILENCE_SECONDS_MAX:.0f} s"

    def _take_chunks(self, frame: gateway_pb2.AnswerFrame) -> None:
        now, has_begun_any = self._heard_at, False
        for chunk in frame.chunks:
            relay = self._way.relays.get(chunk.attempt_id)  # type: ignore[call-overload]
            if relay is None:
                continue
            if relay.head is None and chunk.HasField("head"):
                relay.head = AnswerHead(chunk.head.http_status, chunk.head.content_type)
            had_begun = relay.first_chunk_at is not None
            relay.receive(chunk.sequence, chunk.data, now)
            has_begun_any = has_begun_any or (not had_begun and relay.first_chunk_at is not None)
        if has_begun_any:
            self._on_change()

    def _take_end(self, end: gateway_pb2.ForwardedEnd) -> None:
        relay = self._way.relays.get(AttemptId(end.attempt_id))
        if relay is None:
            return
        if not end.error_code:
            relay.end(end.sequence, EndReason.COMPLETED, "")
        elif end.sequence != relay.next_sequence:
            relay.fail(PotluckError(ErrorCode.NODE_LOST, "A part of the answer was lost between two gateways."))
        else:
            if end.error_code == ErrorCode.QUEUE_FULL:
                self._way.nodes[relay.attempt_id].refused(relay.attempt_id)
            retry_after_seconds = end.retry_after_ms / 1000 or None
            relay.fail(PotluckError(ErrorCode(end.error_code), end.error_message, retry_after_seconds=retry_after_seconds))

    def _lose(self) -> None:
        self._way.outbox = None
        for relay in tuple(self._way.relays.values()):
            relay.fail(PotluckError(ErrorCode.NODE_LOST, "The gateway that had the node's link was lost."))
        self._on_change()
