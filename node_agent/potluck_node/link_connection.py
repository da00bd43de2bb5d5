"""One channel with one Link stream on it: greet, write what waits, read, close.

`domain.company` decides how long what is not urgent waits for more; `attempts` says that an answer's first two pieces and its end are
urgent, `link` that control is. It must not know what frames mean, nor why a connection is opened or given up.

One task writes. It takes what waits into one frame, up to a bound of `link`'s; while that frame is on its way, more gathers for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import grpc
import grpc.aio
import structlog

from potluck_node.domain.company import Company
from potluck_node.farewell import Farewells, Outcome
from potluck_protocol.codec import goodbye_value, welcome_value
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2, node_pb2_grpc
from potluck_protocol.values import Welcome

CLOSE_LIMIT_SECONDS: Final = 2.0

_log = structlog.get_logger()


class LinkConnection:
    """One try at being linked.

    Args:
        channel: the connection's own; closed with it.
        next_frame: everything that waits, or None.
    """

    def __init__(self, channel: grpc.aio.Channel, next_frame: Callable[[], node_pb2.NodeFrame | None]) -> None:
        self._channel = channel
        self._next_frame = next_frame
        self._call = node_pb2_grpc.NodeServiceStub(channel).Link()
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.Event()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushed_at_seconds = 0.0
        self._company = Company()
        self._writer: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        """gRPC takes one write at a time."""
        self._holding = False
        self.closed = False

    async def greet(self, hello: node_pb2.NodeFrame, limit_seconds: float) -> node_pb2.CoordinatorFrame | None:
        """Sends the hello; the first frame of the answer, or None where the stream ended. Raises AioRpcError, TimeoutError."""
        async with asyncio.timeout(limit_seconds):
            # A call that failed meanwhile refuses the write without its reason; the read raises it.
            with contextlib.suppress(asyncio.InvalidStateError):
                await self._call.write(hello)
            return await self.read()

    async def read(self) -> node_pb2.CoordinatorFrame | None:
        """The next frame; None at the end of the stream. Raises AioRpcError."""
        frame = await self._call.read()
        return frame if isinstance(frame, node_pb2.CoordinatorFrame) else None

    def start_writing(self) -> None:
        """Begins, or begins again, to send what waits."""
        self._holding = False
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="link writer")
        self.wake(urgent=True)

    def stop_writing(self) -> None:
        """Leaves what waits where it is. A frame under way is not cut off: gRPC would end the whole stream with it."""
        self._holding = True

    def wake(self, *, urgent: bool) -> None:
        """Something waits to be sent."""
        if urgent:
            self._work.set()
            return
        self._company.said()
        if self._flush_timer is not None or self._work.is_set():
            return
        wait_seconds = self._company.wait_seconds(self._loop.time(), self._flushed_at_seconds)
        if wait_seconds <= 0:
            self._work.set()
        else:
            self._flush_timer = self._loop.call_later(wait_seconds, self._work.set)

    async def close(self, last: node_pb2.NodeFrame | None = None) -> bool:
        """Closes stream and channel, after a last frame where one is given; whether the other side took notice of it in time."""
        self.stop_writing()
        self.closed = True
        noticed = False
        if last is not None:
            try:
                async with asyncio.timeout(CLOSE_LIMIT_SECONDS), self._writing:
                    await self._call.write(last)
                    await self._call.done_writing()
                    # The coordinator ends its half once it has read ours; badly, if it could not write it down.
                    noticed = await self._call.code() is grpc.StatusCode.OK
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                noticed = False
        if self._writer is not None:
            # Its end would keep us, and with us the socket, until the next collection: a cancelled task remembers where it was.
            self._writer.cancel()
            self._writer = None
        self._call.cancel()
        await self._channel.close()
        return noticed

    def cut(self) -> None:
        """Breaks the stream off at once; whoever reads it meets the end and closes the connection."""
        self._call.cancel()

    async def _write(self) -> None:
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                if self._flush_timer is not None:
                    self._flush_timer.cancel()
                    self._flush_timer = None
                while not self._holding and (frame := self._next_frame()) is not None:
                    async with self._writing:
                        await self._call.write(frame)
                    self._flushed_at_seconds = self._loop.time()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The reader meets the same end and says why.
            return
        except Exception:  # noqa: BLE001 - a mistake of ours must not leave a connection that looks alive
            _log.exception("link_writer_broke")
            self.cut()


def welcome_of(frame: node_pb2.CoordinatorFrame | None, farewells: Farewells, now_seconds: float) -> Welcome:
    """What a greeting was answered with. Raises PotluckError where that is no welcome."""
    if frame is None:
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator closed the link before its welcome.")
    if frame.HasField("goodbye"):
        failure = farewells.failure_of(Outcome(*goodbye_value(frame.goodbye)), now_seconds)
        raise failure or PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator is stopping.")
    if not frame.HasField("welcome"):
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator did not begin with a welcome.")
    return welcome_value(frame.welcome)
