"""The next frame to one node: everything that waits goes out together.

Decides how values become the parts of a frame. It must not know why anything is sent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from potluck_protocol import codec
from potluck_protocol.v1 import node_pb2

if TYPE_CHECKING:
    from potluck_protocol.values import AttemptId, DesiredState, GoodbyeReason, StartAttempt


class Outbox:
    """Belongs to one link. What is put into it leaves at the loop's next turn, or behind the frame that is on its way."""

    __slots__ = ("_filled", "_frame", "closed")

    def __init__(self) -> None:
        self._frame = node_pb2.CoordinatorFrame()
        self._filled = asyncio.Event()
        self.closed = False
        """The goodbye is said: nothing new reaches the node."""

    def start(self, start: StartAttempt) -> None:
        """An attempt for the node."""
        self._next().starts.append(codec.start_attempt_message(start))

    def cancel(self, attempt_id: AttemptId) -> None:
        """An attempt that nobody waits for any more."""
        self._next().cancels.add(attempt_id=attempt_id)

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int) -> None:
        """The chunks that the node may forget: those before this number."""
        self._next().acknowledgements.add(attempt_id=attempt_id, next_sequence=next_sequence)

    def wish(self, desired: DesiredState) -> None:
        """What the node should run."""
        self._next().desired.CopyFrom(codec.desired_state_message(desired))

    def renew_lease(self, epoch: int, lease_ttl_ms: int) -> None:
        """The answer to a heartbeat."""
        lease = self._next().lease
        lease.epoch, lease.lease_ttl_ms = epoch, lease_ttl_ms

    def hand_over_certificate(self, certificate_pem: str) -> None:
        """The answer to a certificate request."""
        self._next().certificate.certificate_pem = certificate_pem

    def close(self, reason: GoodbyeReason, message: str = "") -> None:
        """Says goodbye; the link ends once the frame is out."""
        self._next().goodbye.CopyFrom(codec.goodbye_message(reason, message))
        self.closed = True

    async def take(self) -> node_pb2.CoordinatorFrame:
        """The frame, as soon as anything is in it."""
        await self._filled.wait()
        self._filled.clear()
        frame, self._frame = self._frame, node_pb2.CoordinatorFrame()
        return frame

    def _next(self) -> node_pb2.CoordinatorFrame:
        self._filled.set()
        return self._frame
