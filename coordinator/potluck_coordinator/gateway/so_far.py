"""What has reached the client of one streamed answer, kept so that another engine can go on with it.

Decides what of the relayed events is text, and what is anything else that a model says. Until an attempt fails, keeping costs a reference
for each chunk; every `FOLDED_BYTES` they are read and folded into their text, so that memory is bounded by the answer's text, and that by
`domain.continuing`. An engine's events differ in little but their text, so that only those that are unlike the last one are parsed. It must
not know attempts or money.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from potluck_coordinator.domain.continuing import CONTINUED_TEXT_BYTES_MAX, Delivered
from potluck_coordinator.gateway.sse import DONE, EVENT_END, payload_of

FOLDED_BYTES: Final = 64 * 1024
"""Some three hundred tokens' events, and a fraction of a millisecond."""

_HEAD_FIELDS: Final = ("id", "created", "model", "system_fingerprint")
"""By these a client knows the answer's chunks for those of one."""
_PLAIN_FIELDS: Final = frozenset({"index", "text", "finish_reason", "stop_reason"})
"""Of a choice, beside its delta: what says nothing but text and its end."""
_EMPTY: Final[tuple[object, ...]] = (None, "", [], {})
_UNREADABLE: Final = "what cannot be read"
_TEXT_MARKS: Final = (b'"content":"', b'"content": "', b'"text":"', b'"text": "')


class _Head(msgspec.Struct):
    choices: list[dict[str, Any]] | None = None
    usage: Any = None
    error: Any = None


_event_decoder: Final = msgspec.json.Decoder(_Head)
_fields_decoder: Final = msgspec.json.Decoder(dict[str, Any])


class SoFar:
    """One answer's."""

    __slots__ = (
        "_after",
        "_before",
        "_bytes",
        "_extras",
        "_pieces",
        "_text_bytes",
        "_texts",
        "finish_reason",
        "head",
        "role_shown",
        "usage_shown",
    )

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._texts: list[str] = []
        self._text_bytes = 0
        self._before, self._after = b"", b""
        """What stood around the text in the last event that said nothing else; empty: there was none."""
        self._extras: set[str] = set()
        self.finish_reason: str | None = None
        self.head: dict[str, Any] | None = None
        """Of the first event; None: there was none."""
        self.role_shown = False
        self.usage_shown = False

    def add(self, data: bytes) -> None:
        """Whole events, as they go to the client. On the hot path of every token."""
        self._pieces.append(data)
        self._bytes += len(data)
        if self._bytes >= FOLDED_BYTES:
            self.fold()

    def fold(self) -> None:
        """Reads what was added since the last time."""
        pieces, self._pieces, self._bytes = self._pieces, [], 0
        alike: list[bytes] = []
        for event in b"".join(pieces).split(EVENT_END):
            if self._before and event.startswith(self._before) and event.endswith(self._after):
                text = event[len(self._before) : -len(self._after)]
                # Without an escape it is one JSON string, and as it was written.
                if b'"' not in text and b"\\" not in text:
                    alike.append(text)
                    continue
            self._add_alike(alike)
            payload = payload_of(event)
            if payload is not None and payload != DONE:
                self._read(payload)
                self._learn(event)
        self._add_alike(alike)

    def _add_alike(self, alike: list[bytes]) -> None:
        """What stood in events that were alike in all but their text, which is taken out of the list."""
        try:
            self._add_text(b"".join(alike).decode())
        except UnicodeDecodeError:
            self._extras.add(_UNREADABLE)
        alike.clear()

    def delivered(self, token_count: int) -> Delivered:
        """All of it; the tokens are counted by whoever meters the attempts."""
        self.fold()
        too_long = self._text_bytes > CONTINUED_TEXT_BYTES_MAX
        return Delivered("".join(self._texts), token_count, self.finish_reason, frozenset(self._extras), too_long=too_long)

    def _read(self, payload: bytes) -> None:
        try:
            if self.head is None:
                fields = _fields_decoder.decode(payload)
                self.head = {name: fields[name] for name in (*_HEAD_FIELDS, "object") if name in fields}
            event = _event_decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._extras.add(_UNREADABLE)
            return
        if event.error is not None:
            self._extras.add("error")
        if event.usage is not None and not event.choices:
            self.usage_shown = True
        for choice in event.choices or ():
            self._read_choice(choice)

    def _learn(self, event: bytes) -> None:
        """What stands around the text of an event that brought nothing else."""
        if self._extras or not self._texts:
            return
        for mark in _TEXT_MARKS:
            before, found, after = event.partition(mark + self._texts[-1].encode(errors="replace") + b'"')
            if found and mark not in after and b'finish_reason":"' not in event:
                self._before, self._after = before + mark, b'"' + after
                return

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        if choice.get("index", 0) != 0:
            self._extras.add("choices")
        if not isinstance(delta, dict):
            self._extras.add("delta")
            return
        self.role_shown = self.role_shown or "role" in delta
        self._extras.update(name for name, value in choice.items() if name not in _PLAIN_FIELDS and name != "delta" and value not in _EMPTY)
        self._extras.update(name for name, value in delta.items() if name not in {"role", "content"} and value not in _EMPTY)
        for text in (delta.get("content"), choice.get("text")):
            self._add_text(text)
        if isinstance(reason := choice.get("finish_reason"), str):
            self.finish_reason = reason

    def _add_text(self, text: object) -> None:
        if isinstance(text, str):
            self._text_bytes += len(text.encode(errors="surrogatepass"))
            if self._text_bytes > CONTINUED_TEXT_BYTES_MAX:
                self._texts.clear()
            elif text:
                self._texts.append(text)
        elif text not in _EMPTY:
            self._extras.add("content")
