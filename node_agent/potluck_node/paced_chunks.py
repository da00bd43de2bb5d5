"""What of the answers goes into the link's next frame, where the owner limits the upload or not.

Decides when the link is woken for what the limit holds back; how much may leave is `domain.upload_pace`'s. Only the bytes of answers count:
heartbeats and certificate requests go into the frame beside them, and are never kept waiting.
"""

from __future__ import annotations

import asyncio
from typing import Final

from potluck_node.attempts import Attempts
from potluck_node.domain.upload_pace import filled, full, spent, wait_seconds
from potluck_protocol.clock import Clock
from potluck_protocol.v1 import node_pb2

FRAME_BYTES_MAX: Final = 1024 * 1024
"""How many bytes of answers go into one frame, so that one frame never holds up the heartbeat behind it."""
WAIT_SECONDS_MIN: Final = 0.02
"""With less, a slow line is woken for single pieces, and sends more frames than it has to."""


class PacedChunks:
    """See the module.

    Args:
        attempts: whose answers they are.
        clock: time.
        bytes_per_second_max: the owner's limit; None: none.
    """

    def __init__(self, attempts: Attempts, clock: Clock, bytes_per_second_max: int | None) -> None:
        self._attempts = attempts
        self._clock = clock
        self._pace = None if bytes_per_second_max is None else full(bytes_per_second_max, clock.monotonic_seconds())
        self._timer: asyncio.TimerHandle | None = None

    def move_into(self, frame: node_pb2.NodeFrame) -> bool:
        """Moves what waits and may leave into the frame; False where that is nothing."""
        if self._pace is None:
            return self._attempts.move_into(frame, FRAME_BYTES_MAX)
        self._pace = filled(self._pace, self._clock.monotonic_seconds())
        moved = False
        if self._pace.level_bytes >= 1:
            before = len(frame.chunks)
            moved = self._attempts.move_into(frame, min(FRAME_BYTES_MAX, int(self._pace.level_bytes)))
            self._pace = spent(self._pace, sum(len(chunk.data) for chunk in frame.chunks[before:]))
        if self._attempts.has_waiting and self._timer is None:
            delay_seconds = max(WAIT_SECONDS_MIN, wait_seconds(self._pace))
            self._timer = asyncio.get_running_loop().call_later(delay_seconds, self._go_on)
        return moved

    def _go_on(self) -> None:
        self._timer = None
        self._attempts.wake(True)
