"""One attempt that runs here for another gateway: what its node sends goes on as it comes, and nobody here reads it.

Decides nothing that `relay` does not: the same rules say what a repeated or missing chunk means, and when the node may send more. Its
window is the whole way's: what the other gateway's client has taken is what the node may forget. It must not know frames; `answer_outbox`
makes them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from potluck_coordinator.gateway.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.gateway.relay import AnswerHead
    from potluck_protocol.errors import PotluckError
    from potluck_protocol.values import AttemptId


class Onward(Protocol):
    """Where it goes on to."""

    def chunk(self, attempt_id: AttemptId, sequence: int, data: bytes, head: AnswerHead | None) -> None: ...
    def end(self, attempt_id: AttemptId, sequence: int, error: PotluckError | None) -> None: ...


class PassingRelay(Relay):
    """The bytes of one attempt, on their way through.

    Args:
        attempt_id: whose bytes.
        window_bytes: how much the node may send beyond what is acknowledged.
        started_at: monotonic seconds.
        acknowledge: tells the node.
        onward: the gateway where the request entered.
    """

    __slots__ = ("_node_acknowledge", "_onward", "_sent_bytes_by_sequence", "_sent_sequence", "_told_end")

    def __init__(
        self,
        attempt_id: AttemptId,
        window_bytes: int,
        started_at: float,
        acknowledge: Callable[[AttemptId, int], None],
        onward: Onward,
    ) -> None:
        super().__init__(attempt_id, window_bytes, started_at, acknowledge)
        self._node_acknowledge = acknowledge
        self._onward = onward
        self._sent_sequence = 0
        self._sent_bytes_by_sequence: deque[tuple[int, int]] = deque()
        """Of what is not acknowledged: the number after each chunk, and all bytes up to there."""
        self._told_end = False

    def acknowledged(self, next_sequence: int) -> None:
        """The other gateway's client has taken everything before that number."""
        if self.over or not self._acknowledged_sequence < next_sequence <= self.next_sequence:
            return
        self._acknowledged_sequence = next_sequence
        while self._sent_bytes_by_sequence and self._sent_bytes_by_sequence[0][0] <= next_sequence:
            _, self._acknowledged_bytes = self._sent_bytes_by_sequence.popleft()
        self._node_acknowledge(self.attempt_id, next_sequence)

    def _wake(self) -> None:
        """Called with each chunk that counts, and at the end: nobody waits here, so it goes on at once."""
        if self.next_sequence > self._sent_sequence:
            data = b"".join(self._buffer)
            self._buffer.clear()
            self._onward.chunk(self.attempt_id, self._sent_sequence, data, self.head if self._sent_sequence == 0 else None)
            self._sent_sequence = self.next_sequence
            self._sent_bytes_by_sequence.append((self.next_sequence, self.received_bytes))
        if self.over and not self._told_end:
            self._told_end = True
            self._onward.end(self.attempt_id, self._sent_sequence, self._error)
