"""What one attempt still owes the coordinator: numbered chunks, the window they may fill, and the end.

Decides the order of an attempt's bytes and how many may be under way. It must not know engines, tasks or the link: everything here happens
at once. It is the only place of the agent that writes chunks and ends into frames.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from potluck_protocol.codec import END_REASON_NUMBER
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EndReason, ResumePoint
from potluck_protocol.window import has_room


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """How the engine's answer began."""

    http_status: int
    content_type: str


@dataclass(frozen=True, slots=True)
class _Chunk:
    sequence: int
    data: bytes
    head: ResponseHead | None


@dataclass(frozen=True, slots=True)
class _End:
    sequence: int
    reason: EndReason
    detail: str
    blamed: bool


class Delivery:
    """The outgoing side of one attempt.

    Args:
        attempt_id: whose bytes these are.
        window_bytes: how many bytes may wait for an acknowledgement.
        next_sequence: the first chunk's number.
    """

    __slots__ = (
        "_acknowledged_sequence",
        "_end",
        "_end_sent",
        "_held_bytes",
        "_next_sequence",
        "_sent",
        "_unsent",
        "_window_bytes",
        "attempt_id",
    )

    def __init__(self, attempt_id: AttemptId, window_bytes: int, next_sequence: int = 0) -> None:
        self.attempt_id = attempt_id
        self._window_bytes = window_bytes
        self._unsent: deque[_Chunk] = deque()
        self._sent: deque[_Chunk] = deque()
        self._held_bytes = 0
        self._next_sequence = next_sequence
        self._acknowledged_sequence = next_sequence
        self._end: _End | None = None
        self._end_sent = False

    @property
    def ended(self) -> bool:
        """Nothing will be added."""
        return self._end is not None

    @property
    def next_sequence(self) -> int:
        """The number that the next chunk will have."""
        return self._next_sequence

    @property
    def waiting(self) -> bool:
        """There is something to send."""
        return bool(self._unsent) or (self._end is not None and not self._end_sent)

    @property
    def all_acknowledged(self) -> bool:
        """Ended, sent, and every chunk acknowledged."""
        return self._end_sent and not self._sent and not self._unsent

    @property
    def end_acknowledged(self) -> bool:
        """The coordinator acknowledged one past the end: it knows that this attempt is over."""
        return self._end_sent and self._end is not None and self._acknowledged_sequence > self._end.sequence

    def has_room(self, size_bytes: int) -> bool:
        """Whether a chunk of this size may be added."""
        return has_room(self._held_bytes, size_bytes, self._window_bytes)

    def push(self, data: bytes, head: ResponseHead | None = None) -> None:
        """Adds the next chunk; after the end it is dropped, because the attempt was cancelled meanwhile."""
        if self._end is not None:
            return
        self._unsent.append(_Chunk(self._next_sequence, data, head))
        self._next_sequence += 1
        self._held_bytes += len(data)

    def finish(self, reason: EndReason, detail: str = "", *, blamed: bool = False) -> None:
        """Ends the attempt; the first end counts. `blamed` where engines may die of its request."""
        if self._end is None:
            self._end = _End(self._next_sequence, reason, detail, blamed)

    def cancel(self) -> None:
        """Ends the attempt as cancelled, after what was sent, and forgets all its bytes: nobody waits for them or resumes them."""
        if self._end is not None:
            return
        if self._unsent:
            self._next_sequence = self._unsent[0].sequence
        self._unsent.clear()
        self._sent.clear()
        self._held_bytes = 0
        self.finish(EndReason.CANCELLED)

    def acknowledge(self, next_sequence: int) -> None:
        """Every chunk before `next_sequence` has left the coordinator: it is forgotten here, and its bytes are free again."""
        self._acknowledged_sequence = max(self._acknowledged_sequence, next_sequence)
        while self._sent and self._sent[0].sequence < next_sequence:
            self._held_bytes -= len(self._sent.popleft().data)

    def rewind(self, point: ResumePoint) -> bool:
        """After a reconnect: everything from the point on is to be sent again.

        What lies before it reached the coordinator. What of that has left it is free, for its acknowledgement may have been lost with the
        link; the rest still fills the window: its client has not read it.

        Returns:
            False where the coordinator asks for chunks that it had acknowledged: there is no honest way to go on.
        """
        if point.next_sequence < min(self._acknowledged_sequence, self._next_sequence):
            return False
        while self._sent and self._sent[-1].sequence >= point.next_sequence:
            self._unsent.appendleft(self._sent.pop())
        self.acknowledge(point.acknowledged_sequence)
        self._end_sent = False
        return True

    def move_into(self, frame: node_pb2.NodeFrame, bytes_max: int) -> int:
        """Moves what waits into the frame, at most `bytes_max` and at least one chunk; the bytes moved."""
        moved_bytes = 0
        while self._unsent and (moved_bytes == 0 or moved_bytes + len(self._unsent[0].data) <= bytes_max):
            chunk = self._unsent.popleft()
            message = frame.chunks.add(attempt_id=self.attempt_id, sequence=chunk.sequence, data=chunk.data)
            if chunk.head is not None:
                message.head.http_status = chunk.head.http_status
                message.head.content_type = chunk.head.content_type
            self._sent.append(chunk)
            moved_bytes += len(chunk.data)
        if self._end is not None and not self._unsent and not self._end_sent:
            frame.ends.add(
                attempt_id=self.attempt_id,
                sequence=self._end.sequence,
                reason=END_REASON_NUMBER[self._end.reason],
                detail=self._end.detail,
                blamed=self._end.blamed,
            )
            self._end_sent = True
        return moved_bytes
