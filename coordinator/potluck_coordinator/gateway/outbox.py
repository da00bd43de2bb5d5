"""The next frame to one node: everything that waits goes out together.

Decides how values become the parts of a frame, and how many requests one frame carries. `node_session` fills it, `link_servicer` writes
it. It must not know why anything is sent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from potluck_protocol import codec, engine_codec
from potluck_protocol.v1 import node_pb2

if TYPE_CHECKING:
    from potluck_protocol.values import AttemptId, DesiredState, GoodbyeReason, StartAttempt


STARTS_BYTES_MAX: Final = 1024 * 1024
"""Of the requests in one frame, if there are several: a frame over `channels.MESSAGE_BYTES_MAX` would end the link, and every time anew."""

COMPANY_SECONDS: Final = 0.02
"""How long the acknowledgement of an end waits for company."""
CANCELS_MAX: Final = 4096
"""In one frame: four times the attempts that a node may have. Only a node that makes up attempts and reads nothing gets there."""


class Outbox:
    """Belongs to one link. What is put into it leaves at the loop's next turn, or behind the frame that is on its way."""

    __slots__ = ("_acknowledged", "_cancelled", "_filled", "_frame", "_starts", "_timer", "closed")

    def __init__(self) -> None:
        self._frame = node_pb2.CoordinatorFrame()
        self._starts: dict[AttemptId, node_pb2.StartAttempt] = {}
        """In the order of their coming; what does not fit one frame goes with the next."""
        self._cancelled: dict[AttemptId, None] = {}
        self._acknowledged: dict[AttemptId, int] = {}
        """Once for each attempt, however often it is said: a node that reads nothing must not make them grow."""
        self._filled = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        """While something waits for company."""
        self.closed = False
        """The goodbye is said: nothing new reaches the node."""

    def start(self, start: StartAttempt) -> None:
        """An attempt for the node."""
        self._starts[start.attempt_id] = codec.start_attempt_message(start)
        self._filled.set()

    def cancel(self, attempt_id: AttemptId) -> None:
        """An attempt that nobody waits for any more."""
        self._starts.pop(attempt_id, None)
        # Said in any case: a start that waits here again, after a link was lost, may have reached the node before.
        if len(self._cancelled) < CANCELS_MAX:
            self._cancelled[attempt_id] = None
            self._filled.set()

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int, *, can_wait: bool = False) -> None:
        """The chunks that the node may forget: those before this number.

        Args:
            attempt_id: whose.
            next_sequence: the number.
            can_wait: nothing of it is to come any more, so that it may leave with what is said next; a frame of its own costs as much as
                the answer's.
        """
        self._acknowledged[attempt_id] = next_sequence
        if not can_wait:
            self._filled.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COMPANY_SECONDS, self._filled.set)

    def wish(self, desired: DesiredState) -> None:
        """What the node should run."""
        self._next().desired.CopyFrom(engine_codec.desired_state_message(desired))

    def renew_lease(self, epoch: int, lease_ttl_ms: int, heartbeat_idle_ms: int, heartbeat_number: int) -> None:
        """The answer to a heartbeat, and how often to beat from now on while idle. It leaves with what is said next, or by `send_lease`."""
        lease = self._frame.lease
        lease.epoch, lease.lease_ttl_ms, lease.heartbeat_idle_ms = epoch, lease_ttl_ms, heartbeat_idle_ms
        lease.heartbeat_number = heartbeat_number

    def send_lease(self) -> None:
        """The answer leaves now, unless it has."""
        if self._frame.HasField("lease"):
            self._filled.set()

    def ask_for_beat(self) -> None:
        """A heartbeat, at once."""
        self._next().beat_now = True

    def show_ways(self, link_addresses: tuple[str, ...]) -> None:
        """Where the gateways are now; the last word alone counts."""
        self._next().ClearField("link_addresses")
        self._next().link_addresses.extend(link_addresses)

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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        frame, self._frame = self._frame, node_pb2.CoordinatorFrame()
        for attempt_id in self._cancelled:
            frame.cancels.add(attempt_id=attempt_id)
        for attempt_id, next_sequence in self._acknowledged.items():
            frame.acknowledgements.add(attempt_id=attempt_id, next_sequence=next_sequence)
        self._cancelled, self._acknowledged = {}, {}
        self._move_starts_into(frame)
        if not self._starts:
            self._filled.clear()
        return frame

    def _move_starts_into(self, frame: node_pb2.CoordinatorFrame) -> None:
        left_bytes = STARTS_BYTES_MAX
        for attempt_id, start in tuple(self._starts.items()):
            left_bytes -= len(start.body)
            if left_bytes < 0 and frame.starts:
                return
            frame.starts.append(start)
            del self._starts[attempt_id]

    def _next(self) -> node_pb2.CoordinatorFrame:
        self._filled.set()
        return self._frame
