"""The next frame to a gateway whose requests run on nodes of this one: everything that waits goes out together.

Decides how values become the parts of a frame, and how large one may be. `passing_relay` fills it, `forward_servicer` writes it. It must
not know nodes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from potluck_protocol.v1 import gateway_pb2

if TYPE_CHECKING:
    from potluck_coordinator.gateway.relay import AnswerHead
    from potluck_protocol.errors import PotluckError
    from potluck_protocol.values import AttemptId

FRAME_BYTES_MAX: Final = 1024 * 1024
"""Of chunks in one frame, if there are several: hundreds of answers may have a window's worth each."""
CHUNK_BYTES: Final = 64
"""Of a chunk beside its data: whose it is, and its number."""


class AnswerOutbox:
    """Belongs to one link between gateways. What is put into it leaves at the loop's next turn, or behind the frame on its way."""

    __slots__ = ("_chunks_bytes", "_filled", "_frames")

    def __init__(self) -> None:
        self._frames: list[gateway_pb2.AnswerFrame] = []
        """The last of them still takes more."""
        self._chunks_bytes = 0
        """In that one."""
        self._filled = asyncio.Event()

    def chunk(self, attempt_id: AttemptId, sequence: int, data: bytes, head: AnswerHead | None) -> None:
        """A piece of an answer, as its node sent it."""
        size_bytes = len(data) + CHUNK_BYTES
        if self._chunks_bytes and self._chunks_bytes + size_bytes > FRAME_BYTES_MAX:
            self._begin_frame()
        chunk = self._last().chunks.add(attempt_id=attempt_id, sequence=sequence, data=data)
        self._chunks_bytes += size_bytes
        if head is not None:
            chunk.head.http_status, chunk.head.content_type = head.http_status, head.content_type

    def end(self, attempt_id: AttemptId, sequence: int, error: PotluckError | None) -> None:
        """An answer is over after so many pieces; None: it came to its end."""
        end = self._last().ends.add(attempt_id=attempt_id, sequence=sequence)
        if error is not None:
            end.error_code, end.error_message = error.code, error.message
            end.retry_after_ms = int((error.retry_after_seconds or 0) * 1000)

    def sign_of_life(self) -> None:
        """A frame, even if there is nothing to say."""
        self._last()

    async def take(self) -> gateway_pb2.AnswerFrame:
        """The next frame, as soon as there is one."""
        await self._filled.wait()
        frame = self._frames.pop(0)
        if not self._frames:
            self._chunks_bytes = 0
            self._filled.clear()
        return frame

    def _last(self) -> gateway_pb2.AnswerFrame:
        if not self._frames:
            self._begin_frame()
        return self._frames[-1]

    def _begin_frame(self) -> None:
        self._frames.append(gateway_pb2.AnswerFrame())
        self._chunks_bytes = 0
        self._filled.set()
