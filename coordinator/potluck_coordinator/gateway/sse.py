"""What the gateway must see in an answer that it passes on: the usage record, the end, and roughly how many tokens went by.

Decides which single event a client does not get: the usage record it did not ask for. It must not know requests, links or money. This is
the hot path of every token, so from the first token on a chunk is only parsed where a byte search finds one of the few marks that matter;
inside a JSON string they cannot occur, because their quotes would be escaped, but for that of the end, which then costs a look. Line feeds
end the lines: agents see to that.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from potluck_protocol.values import Usage

EVENT_END: Final = b"\n\n"
DONE: Final = b"[DONE]"
_NO_TEXT: Final = frozenset({b"null", b'""', b"[]", b"{}"})
_LOOKED_AT_MIN: Final = 2
"""Events with text that are taken apart: around them stand those that name the role and say nothing."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(le=2**53)]
"""More is no count, and the record that has it none."""


class _CachedTokens(msgspec.Struct):
    cached_tokens: _Count | None = None


class _UsageRecord(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _Choice(msgspec.Struct):
    delta: dict[str, msgspec.Raw] | None = None
    text: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _UsageRecord | None = None


class _Document(msgspec.Struct):
    usage: _UsageRecord | None = None


_event_decoder: Final = msgspec.json.Decoder(_Event)
_document_decoder: Final = msgspec.json.Decoder(_Document)


class UsageWatcher:
    """Looks over the shoulder of one streamed answer.

    Args:
        keep_usage_event: the client asked for the usage event itself; otherwise it is taken out. Everything else leaves as it came.
    """

    __slots__ = ("_keep_usage_event", "done", "token_count", "usage")

    def __init__(self, *, keep_usage_event: bool) -> None:
        self._keep_usage_event = keep_usage_event
        self.usage: Usage | None = None
        """The engine's own count, from the last record seen."""
        self.token_count = 0
        """Events that seemed to carry text, an estimate: what an answer that breaks off is charged by, for want of the engine's count."""
        self.done = False
        """The engine said `[DONE]`: the answer is complete."""

    def feed(self, data: bytes) -> bytes:
        """Takes whole events; gives what the client is to get: the same object, unless an event was dropped. May be empty."""
        if (
            self.token_count >= _LOOKED_AT_MIN
            and b'"usage":{' not in data
            and b'"finish_reason":"' not in data
            and b'"usage": {' not in data
            and b'"finish_reason": "' not in data
            and DONE not in data
        ):
            # Only events that carry data: pings and bare newlines are no tokens. Inside a JSON string a newline is escaped.
            self.token_count += data.count(b"\ndata:") + data.startswith(b"data:")
            return data
        return self._examine(data)

    def _examine(self, data: bytes) -> bytes:
        """The few chunks with a mark in them, and those before the first token: event by event."""
        kept: list[bytes] = []
        dropped = False
        for event in data.split(EVENT_END):
            if self._take(event):
                kept.append(event)
            else:
                dropped = True
        return EVENT_END.join(kept) if dropped else data

    def _take(self, event: bytes) -> bool:
        """Notes what one event says; False if the client is not to get it."""
        payload = payload_of(event)
        if payload is None:
            return True
        if payload == DONE:
            self.done = True
            return True
        try:
            content = _event_decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.token_count += 1
            return True
        if content.usage is not None:
            self.usage = _usage(content.usage)
        choices = content.choices or ()
        self.token_count += any(map(_says_something, choices))
        return bool(choices) or content.usage is None or self._keep_usage_event


def usage_of_document(body: bytes) -> Usage | None:
    """The usage record of a whole, unstreamed answer; None where it has none or is not such a document."""
    try:
        record = _document_decoder.decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if record is None else _usage(record)


def payload_of(event: bytes) -> bytes | None:
    """The event's data; None where it has none. Other fields, as its name, and comments may stand before and after."""
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines).strip() if lines else None


def keeps_alive_only(data: bytes) -> bool:
    """Whether this is no more than comments: llama.cpp sends one every 30 s while it reads a long prompt."""
    return data.startswith(b":") and b"\ndata:" not in data


def _usage(record: _UsageRecord) -> Usage:
    """A count below zero is no count: an engine's word never turns into a refund."""
    cached = record.prompt_tokens_details.cached_tokens if record.prompt_tokens_details is not None else None
    return Usage(
        prompt_token_count=max(record.prompt_tokens or 0, 0),
        completion_token_count=max(record.completion_tokens or 0, 0),
        cached_prompt_token_count=max(cached or 0, 0),
    )


def _says_something(choice: _Choice) -> bool:
    """Whether it brings anything that was generated; the role and the reason of the end were not."""
    parts = (bytes(value) for name, value in (choice.delta or {}).items() if name != "role")
    return bool(choice.text) or any(part not in _NO_TEXT for part in parts)
