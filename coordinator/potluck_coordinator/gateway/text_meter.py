"""Measures the text of one answer, for the count of tokens that its node may be paid for.

Decides what of the bytes is an event or a document that a client can read; what of that is text is `domain.delivered_text`. On the way of
a token this costs a reference: events are read where `UNREAD_BYTES_MAX` have come together, and where somebody asks, and only until there
is text enough for the tokens in question, for most about a quarter of them. It must not know attempts or money.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, TypeVar

import msgspec
from msgspec import Raw

from potluck_coordinator.domain.delivered_text import said_bytes, text_bytes_of, tokens_bound
from potluck_coordinator.gateway.said_values import ABSENT, SaidValues
from potluck_coordinator.gateway.sse import DONE, EVENT_END, payload_of

UNREAD_BYTES_MAX: Final = 64 * 1024
"""Some three hundred tokens' events, and a fraction of a millisecond."""
_EVENT_BYTES_MAX: Final = 1024 * 1024
"""An agent sends none that is larger."""
_EVENT_BYTES_MIN: Final = len(b"data:" + DONE)
"""The shortest that says anything. A megabyte of bare line ends took 0.2 s when each was looked at."""
_DATA: Final = b"data: "


_FIRST: Final = Raw(b"0")


class _Piece(msgspec.Struct, rename={"said": "delta"}):
    index: Raw = _FIRST
    said: Raw = ABSENT
    text: Raw = ABSENT


class _Whole(msgspec.Struct, rename={"said": "message"}):
    index: Raw = _FIRST
    said: Raw = ABSENT
    text: Raw = ABSENT


_Choice = TypeVar("_Choice")


class _Choices(msgspec.Struct, Generic[_Choice], array_like=True):
    """The first of a list; the others are passed over."""

    first: _Choice | None = None
    second: _Choice | None = None
    third: _Choice | None = None
    fourth: _Choice | None = None


class _Event(msgspec.Struct):
    choices: _Choices[_Piece] | None = None


class _Document(msgspec.Struct):
    choices: _Choices[_Whole] | None = None


_event_decoder: Final = msgspec.json.Decoder(_Event)
_document_decoder: Final = msgspec.json.Decoder(_Document)


class TextMeter:
    """One answer's, streamed or not.

    Args:
        is_chat: it speaks in messages; otherwise in plain texts.
        answer_count: how many answers it is, of which a client reads no others.
        tokens_max: of all of them; once there are so many bytes of text, nothing more is read.
    """

    __slots__ = (
        "_answer_count",
        "_call_count",
        "_events",
        "_indexes",
        "_is_chat",
        "_rest",
        "_text_bytes",
        "_tokens_max",
        "_unread",
        "_unread_bytes",
    )

    def __init__(self, *, is_chat: bool, answer_count: int, tokens_max: int) -> None:
        self._is_chat = is_chat
        self._answer_count = max(1, answer_count)
        self._indexes = tuple(Raw(b"%d" % index) for index in range(self._answer_count))
        self._tokens_max = tokens_max
        self._unread: list[bytes] | None = []
        """None: nothing more is to be read."""
        self._unread_bytes = 0
        self._rest = b""
        """Of an event that has not ended."""
        self._events: deque[bytes] = deque()
        """Taken apart, and not read yet; `_unread_bytes` counts them until all are."""
        self._text_bytes = 0
        self._call_count = 0

    def add(self, data: bytes) -> None:
        """Bytes of a stream, as they go to the client. On the hot path of every token."""
        if self._unread is not None:
            self._unread.append(data)
            self._unread_bytes += len(data)
            if self._unread_bytes >= UNREAD_BYTES_MAX:
                self._read(self._tokens_max)

    def relayed(self, token_count: int) -> int:
        """So many tokens of a stream as have gone by, if they had text; when that is enough for `tokens_max`, no more than its bytes."""
        self._read(token_count)
        return min(token_count, self._text_bytes)

    def counted(self, token_count: int) -> int:
        """So many tokens of a whole stream as its engine counted, if it can have had them."""
        self._read(token_count - self._bound + self._text_bytes)
        return min(token_count, self._bound)

    def counted_of_document(self, document: bytes, token_count: int) -> int:
        """The same of an unstreamed answer."""
        if token_count > self._bound:
            self._count(_document_decoder, document)
        return min(token_count, self._bound)

    @property
    def _bound(self) -> int:
        return tokens_bound(self._text_bytes, self._call_count, self._answer_count)

    def _read(self, text_bytes: int) -> None:
        """Until there are so many bytes of text, if there are."""
        if self._unread:
            *events, self._rest = b"".join((self._rest, *self._unread)).split(EVENT_END)
            self._events.extend(event for event in events if len(event) >= _EVENT_BYTES_MIN)
            self._unread.clear()
        while self._events and self._text_bytes < text_bytes:
            self._read_event(self._events.popleft())
        if not self._events:
            self._unread_bytes = 0
        if self._text_bytes >= self._tokens_max or len(self._rest) > _EVENT_BYTES_MAX:
            self._stop()

    def _read_event(self, event: bytes) -> None:
        payload = event[len(_DATA) :] if event.startswith(_DATA) and b"\n" not in event else payload_of(event)
        if payload is not None and not self._count(_event_decoder, payload) and payload.strip() == DONE:
            self._stop()  # what comes behind it no client reads

    def _stop(self) -> None:
        self._unread = None
        self._rest = b""
        self._events.clear()

    def _count(self, decoder: msgspec.json.Decoder[_Event] | msgspec.json.Decoder[_Document], payload: bytes) -> bool:
        """False: it cannot be read."""
        try:
            choices = decoder.decode(payload).choices
            for choice in () if choices is None else msgspec.structs.astuple(choices)[: self._answer_count]:
                if choice is not None and choice.index in self._indexes:
                    self._count_choice(choice)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        return True

    def _count_choice(self, choice: _Piece | _Whole) -> None:
        if self._is_chat:
            text_bytes, call_count = said_bytes(SaidValues().value(choice.said))
            self._text_bytes += text_bytes
            self._call_count += call_count
        else:
            self._text_bytes += text_bytes_of(SaidValues().value(choice.text))
