"""How fast a node's line to the coordinator is: the measuring part of `NodeService`.

Decides nothing about turns (`domain.turns` does) and makes no rates: of an upload the node is told when its pieces came, a download it
times itself. The bounds are `potluck_protocol.line`'s. It must not know links.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc

from potluck_coordinator.domain.turns import Direction, Refusal, Turns, begin, end
from potluck_coordinator.gateway.interceptors import calling_node, current_call
from potluck_protocol.arrivals import take_arrivals
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.line import MEASURED_BYTES_MAX, MEASURED_SECONDS_MAX, PIECE_BYTES
from potluck_protocol.v1 import node_pb2, node_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from potluck_protocol.clock import Clock

PIECE: Final = os.urandom(PIECE_BYTES)
"""Made once and sent again and again. Random, so that nothing on the way can make it smaller, and the line look quicker."""
STALL_SECONDS_MAX: Final = 5.0
"""A node that takes nothing for so long ends its own measurement; others wait for its place."""

_Context = grpc.aio.ServicerContext[Any, Any]


class LineServicer(node_pb2_grpc.NodeServiceServicer):
    """Serves `NodeService.MeasureUpload` and `MeasureDownload`.

    Args:
        clock: whose monotonic seconds arrivals and turns are counted in.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._turns = Turns()

    async def MeasureUpload(  # noqa: N802 - as `Link`: read costs less than an iterator, and can be given up
        self, request_iterator: AsyncIterator[node_pb2.MeasureUploadRequest], context: _Context
    ) -> node_pb2.MeasureUploadResponse:
        """Takes pieces until either bound, and answers when they came."""
        del request_iterator

        async def read() -> bytes | None:
            message = await context.read()
            return message.data if isinstance(message, node_pb2.MeasureUploadRequest) else None

        with self._turn(Direction.UPLOAD):
            arrivals = await take_arrivals(read, self._clock.monotonic_seconds)
        if not arrivals:
            raise PotluckError(ErrorCode.INVALID_REQUEST, "No piece of the measurement came in time.")
        current_call().facts["received_bytes"] = arrivals[-1].received_bytes
        return node_pb2.MeasureUploadResponse(
            arrivals=[
                node_pb2.Arrival(
                    elapsed_microseconds=round((arrival.seconds - arrivals[0].seconds) * 1e6), received_bytes=arrival.received_bytes
                )
                for arrival in arrivals
            ]
        )

    async def MeasureDownload(  # type: ignore[override]  # noqa: N802 - writes for itself, to notice a stall sooner than other calls do
        self, request: node_pb2.MeasureDownloadRequest, context: _Context
    ) -> None:
        """Sends pieces until either bound."""
        del request
        with self._turn(Direction.DOWNLOAD):
            message = node_pb2.MeasureDownloadResponse(data=PIECE)
            begun_at, sent_bytes = self._clock.monotonic_seconds(), 0
            while sent_bytes < MEASURED_BYTES_MAX and self._clock.monotonic_seconds() - begun_at < MEASURED_SECONDS_MAX:
                try:
                    async with asyncio.timeout(STALL_SECONDS_MAX):
                        await context.write(message)
                except TimeoutError:
                    raise PotluckError(ErrorCode.CANCELLED, f"The node took nothing for {STALL_SECONDS_MAX:.0f} s.") from None
                except grpc.aio.InternalError:
                    # Its connection broke; gRPC's cancellation of the call came second.
                    raise PotluckError(ErrorCode.CANCELLED, "The node went away.") from None
                sent_bytes += PIECE_BYTES
        current_call().facts["sent_bytes"] = sent_bytes

    @contextmanager
    def _turn(self, direction: Direction) -> Iterator[None]:
        """The calling node's turn; raises QUEUE_FULL, with when to come again, if it is not."""
        node_id = calling_node()
        begun = begin(self._turns, node_id, direction, self._clock.monotonic_seconds())
        if isinstance(begun, Refusal):
            message = f"Not measured now: {begun.reason}. Try again in {begun.retry_after_seconds:.0f} s."
            raise PotluckError(ErrorCode.QUEUE_FULL, message, retry_after_seconds=begun.retry_after_seconds)
        self._turns = begun
        try:
            yield
        finally:
            self._turns = end(self._turns, node_id)
