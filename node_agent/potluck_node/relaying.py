"""One engine's answer on its way into the attempt's `delivery`: in whole events or pieces, and no faster than its window has room.

Decides what of an answer is a word of the engine, which its watches hear. While there is room, what comes goes on at once, without a task's
turn for it: the hot path of every token. It must not know how an attempt begins or ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from potluck_node.delivery import Delivery, ResponseHead
from potluck_node.domain.event_stream import TokenEvents, WholeEvents
from potluck_node.domain.failures import says_that_it_dies
from potluck_protocol.values import Endpoint, StartAttempt

if TYPE_CHECKING:
    from potluck_node.engine_exchange import EngineAnswer
    from potluck_node.engines.standstill import Ear
    from potluck_node.solo_answers import Stopwatch

PIECE_BYTES_MAX: Final = 64 * 1024
"""How much of an answer is read at once; a quarter of the window where that is less, so that a window holds several pieces."""
EVENT_BYTES_MAX: Final = 1024 * 1024
"""An engine whose event grows beyond this is broken."""


class EngineDyingError(Exception):
    """The engine answered that it cannot any more."""


class Relaying:
    """One answer's.

    Args:
        start: the attempt.
        answer: its engine's, whose head has come.
        delivery: where it goes.
        room: set whenever the delivery may have room again.
        ear: hears the engine's words.
        stopwatch: times them.
        on_pushed: called with the number of each piece that was put into the delivery.
    """

    __slots__ = ("_answer", "_delivery", "_ear", "_events", "_head", "_on_pushed", "_piece_bytes", "_room", "_stopwatch", "_tokens")

    def __init__(
        self,
        start: StartAttempt,
        answer: EngineAnswer,
        delivery: Delivery,
        room: asyncio.Event,
        *,
        ear: Ear,
        stopwatch: Stopwatch,
        on_pushed: Callable[[int], None],
    ) -> None:
        is_stream = start.stream and answer.content_type.startswith("text/event-stream")
        self._answer = answer
        self._delivery = delivery
        self._room = room
        self._ear = ear
        self._stopwatch = stopwatch
        self._on_pushed = on_pushed
        self._head = ResponseHead(answer.http_status, answer.content_type)
        self._events = WholeEvents(EVENT_BYTES_MAX) if is_stream else None
        self._tokens = TokenEvents(names_role_first=start.endpoint is Endpoint.CHAT_COMPLETIONS)
        self._piece_bytes = max(1, min(PIECE_BYTES_MAX, start.window_bytes // 4))

    async def run(self) -> None:
        """Until the answer's end.

        Raises:
            AnswerBrokenError: it has none.
            EventTooLargeError: an event of it has none.
            EngineDyingError: it says that its engine ends.
        """
        while piece := await self._answer.read(self._piece_bytes, self._take_now):
            if whole := self._whole(piece):
                self._stopwatch.take(whole, held_up=not self._delivery.has_room(len(whole)))
                await self._wait_for_room(len(whole))
                self._push(whole)
        remainder = b"" if self._events is None else self._events.remainder
        if remainder or self._delivery.next_sequence == 0:
            await self._wait_for_room(len(remainder))
            self._push(remainder)
        self._ear.heard()

    def _take_now(self, piece: bytes) -> bool:
        """The same, where nothing has to wait."""
        if self._delivery.ended:
            return True  # by somebody else, who has still to end the reading
        held_bytes = 0 if self._events is None else self._events.held_bytes
        if len(piece) > self._piece_bytes or not self._delivery.has_room(held_bytes + len(piece)):
            return False
        if whole := self._whole(piece):
            self._stopwatch.take(whole, held_up=False)
            self._push(whole)
        return True

    def _whole(self, piece: bytes) -> bytes:
        """What may go on by now."""
        whole = piece if self._events is None else self._events.take(piece)
        if self._events is None or self._tokens.take(whole):
            self._ear.heard()
        return whole

    async def _wait_for_room(self, size_bytes: int) -> None:
        while not self._delivery.has_room(size_bytes):
            self._ear.turn_away()
            self._room.clear()
            await self._room.wait()
        self._ear.turn_back()

    def _push(self, whole: bytes) -> None:
        piece_number = self._delivery.next_sequence
        self._delivery.push(whole, self._head if piece_number == 0 else None)
        self._on_pushed(piece_number)
        if says_that_it_dies(self._head.http_status, whole):
            raise EngineDyingError
