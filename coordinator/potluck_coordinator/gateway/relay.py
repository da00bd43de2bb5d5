"""One attempt's bytes on their way from the link to its `answer`.

Decides what a repeated, missing or surplus chunk means, and when the node may send more. `link_servicer` writes (`receive`, `end`: plain
calls, nothing awaited), `answer` reads (`next_data`), and whatever has arrived between two reads leaves as one piece. A reader that waits
may have left a function by which bytes go on at once, without a task's turn for each: the hot path of an HTTP client that keeps up, from
`link_servicer` through here, `answer` and `sse` to `http_exchange`. What waits here is not acknowledged, so a slow client pauses its own
attempt at the node and never the link. It must not know HTTP, gRPC or money.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from potluck_coordinator.domain.stall import FIRST_TOKEN_SEQUENCE
from potluck_coordinator.domain.suspicion import kind_of
from potluck_coordinator.gateway.sse import keeps_alive_only
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AttemptId, EndReason, ResumePoint
from potluck_protocol.window import acknowledged_step_bytes, has_room

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.stall import GapCounts
    from potluck_coordinator.domain.suspicion import AnswerKind

PassOn: TypeAlias = "Callable[[bytes], bool]"
"""Takes bytes for the client at once, whatever it returns: whether it would take more behind them."""

_log = structlog.get_logger()

DETAIL_CHARACTERS_MAX: Final = 200
"""Of a node's own words that a client gets to see."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """How the engine's answer begins."""

    http_status: int
    content_type: str


class Relay:
    """The bytes of one attempt.

    Args:
        attempt_id: whose bytes.
        window_bytes: how much the node may send beyond what is acknowledged.
        started_at: monotonic seconds.
        acknowledge: called with the next sequence wanted whenever a quarter of the window has left for the client, and at the end.
    """

    __slots__ = (
        "_acknowledge",
        "_acknowledged_bytes",
        "_acknowledged_sequence",
        "_acknowledged_step_bytes",
        "_buffer",
        "_end",
        "_ended_by_node",
        "_error",
        "_pass_on",
        "_taken_bytes",
        "_taken_sequence",
        "_waiter",
        "attempt_id",
        "fell_short",
        "first_chunk_at",
        "gap_counts",
        "head",
        "last_chunk_at",
        "next_sequence",
        "received_bytes",
        "window_bytes",
    )

    def __init__(self, attempt_id: AttemptId, window_bytes: int, started_at: float, acknowledge: Callable[[AttemptId, int], None]) -> None:
        self.attempt_id = attempt_id
        self.window_bytes = window_bytes
        self.head: AnswerHead | None = None
        self.fell_short = False
        """Whoever read it found that its end came before the answer's."""
        self.next_sequence = 0
        self.received_bytes = 0
        self.last_chunk_at = started_at
        self.first_chunk_at: float | None = None
        self.gap_counts: GapCounts | None = None
        """Where the times between chunks are counted, together with those of the replica's other answers."""
        self._acknowledge = acknowledge
        self._buffer: list[bytes] = []
        self._end: EndReason | None = None
        self._ended_by_node = False
        self._error: PotluckError | None = None
        self._pass_on: PassOn | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._taken_sequence = 0
        self._taken_bytes = 0
        self._acknowledged_bytes = 0
        self._acknowledged_sequence = 0
        self._acknowledged_step_bytes = acknowledged_step_bytes(window_bytes)

    @property
    def over(self) -> bool:
        """Nothing more will arrive."""
        return self._end is not None or self._error is not None

    @property
    def ended_by_node(self) -> bool:
        """The node has said that the attempt is over; otherwise it may still be at work on it."""
        return self._ended_by_node

    @property
    def answer_kind(self) -> AnswerKind | None:
        """What the answer says of its engine; None: nothing, as where it was broken off, whoever did that."""
        if self._error is not None:
            return None
        ended = self._end is EndReason.COMPLETED
        status = None if self.head is None else self.head.http_status
        return kind_of(status, ended=ended, fell_short=self.fell_short or (ended and not self.received_bytes))

    @property
    def resume_point(self) -> ResumePoint:
        """Where the node goes on after a broken link."""
        return ResumePoint(self.next_sequence, self._acknowledged_sequence)

    @property
    def held_up(self) -> bool:
        """Its reader has left so much waiting that the node may have no room to send more: silence is then not the node's."""
        return self.received_bytes - self._acknowledged_bytes >= self._acknowledged_step_bytes

    def receive(self, sequence: int, data: bytes, now: float) -> None:
        """Takes one chunk. A sequence seen before is a resumed link's repetition; one too high means that bytes are missing."""
        if sequence != self.next_sequence or self.over:
            if sequence > self.next_sequence:
                self.fail(PotluckError(ErrorCode.NODE_LOST, "The node skipped a part of the answer."))
            return
        self.next_sequence = sequence + 1
        # What the node knows to be acknowledged is never more than this.
        if not has_room(self.received_bytes - self._acknowledged_bytes, len(data), self.window_bytes):
            self.fail(PotluckError(ErrorCode.NODE_LOST, "The node sent more than its window allows."))
            return
        self.received_bytes += len(data)
        if data and not keeps_alive_only(data):
            self._heard(sequence, now)
        if data and self._pass_on is not None:
            self._pass(data, self._pass_on)
        else:
            if data:
                self._buffer.append(data)
            self._wake()

    def _heard(self, sequence: int, now: float) -> None:
        """A part of the answer came: whatever only keeps the connection alive is silence."""
        if self.first_chunk_at is None:
            self.first_chunk_at = now
        if self.gap_counts is not None and sequence > FIRST_TOKEN_SEQUENCE and now > self.last_chunk_at:
            self.gap_counts[int((now - self.last_chunk_at) * 1000).bit_length()] += 1
        self.last_chunk_at = now

    def end(self, sequence: int, reason: EndReason, detail: str, *, kills_engines: bool = False) -> None:
        """Takes the node's word that the attempt is over after `sequence` chunks; `kills_engines` where its request is not to run again."""
        self._ended_by_node = True
        # One past the end tells the node that its word has arrived.
        self._acknowledge(self.attempt_id, sequence + 1)
        if self.over:
            return
        if sequence != self.next_sequence:
            self.fail(PotluckError(ErrorCode.NODE_LOST, "The node lost a part of the answer."))
        elif kills_engines:
            self.fail(PotluckError(ErrorCode.REQUEST_REFUSED))
        elif reason is EndReason.COMPLETED:
            self._end = reason
            self._wake()
        elif reason is EndReason.REFUSED or (reason is EndReason.HANDED_BACK and not self.received_bytes):
            self.fail(
                PotluckError(
                    ErrorCode.NO_CAPACITY, f"The node would not take the request: {detail[:DETAIL_CHARACTERS_MAX]}", retry_after_seconds=1
                )
            )
        else:
            words = f"The engine broke the answer off: {detail[:DETAIL_CHARACTERS_MAX]}" if detail else None
            self.fail(PotluckError(ErrorCode.ENGINE_FAILED, words))

    def fail(self, error: PotluckError) -> None:
        """Ends the answer with an error, behind whatever has already arrived."""
        if not self.over:
            self._error = error
            self._wake()

    async def wait_for_head(self) -> AnswerHead:
        """How the answer begins; raises the attempt's error if it ends without one."""
        while self.head is None:
            await self._until_more()
        return self.head

    async def wait_for_first_chunk(self) -> None:
        """Returns when there are bytes that say something, and leaves them; raises the attempt's error if it ends without any."""
        while self.first_chunk_at is None:
            await self._until_more()

    async def next_data(self, pass_on: PassOn | None = None) -> bytes | None:
        """All bytes that wait, as soon as there are any; None at the complete end. Raises the attempt's error after its last byte.

        Asking again says that the bytes of the last call have left for the client. With `pass_on` bytes that come while nothing waits go
        there instead, until it takes no more; those behind them are returned.
        """
        self._acknowledge_taken()
        # Once for each call: what said that it takes no more is not asked again, whatever wakes the reader.
        self._pass_on = pass_on
        try:
            while not self._buffer:
                if self._error is not None:
                    raise self._error
                if self._end is not None:
                    return None
                await self._until_woken()
        finally:
            self._pass_on = None
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._taken_sequence = self.next_sequence
        self._taken_bytes += len(data)
        return data

    def _pass(self, data: bytes, pass_on: PassOn) -> None:
        """Hands the bytes on to where the reader said. Its failure is this answer's alone: the link carries those of others."""
        try:
            if not pass_on(data):
                self._pass_on = None
        except Exception as error:  # noqa: BLE001 - as said; and its traceback could hold the answer
            _log.error("answer_not_passed_on", attempt_id=self.attempt_id, error_kind=type(error).__name__)
            self.fail(PotluckError(ErrorCode.INTERNAL_ERROR))
            return
        self._taken_sequence = self.next_sequence
        self._taken_bytes += len(data)
        self._acknowledge_taken()

    def _acknowledge_taken(self) -> None:
        if self._taken_bytes - self._acknowledged_bytes >= self._acknowledged_step_bytes and not self.over:
            self._acknowledged_bytes, self._acknowledged_sequence = self._taken_bytes, self._taken_sequence
            self._acknowledge(self.attempt_id, self._taken_sequence)

    async def _until_more(self) -> None:
        if self._error is not None:
            raise self._error
        if self._end is not None:
            raise PotluckError(ErrorCode.ENGINE_FAILED, "The engine ended without an answer.")
        await self._until_woken()

    def _until_woken(self) -> asyncio.Future[None]:
        """One reader at a time."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
