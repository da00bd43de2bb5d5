"""The prompt of a request as bytes that begin alike where prompts begin alike, whatever the JSON around them looks like.

Decides what of a body an engine reads, and in which order it comes: tools stand before the messages, as templates put them. It must not
know engines' templates, nor what is done with the bytes; they are never kept nor logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from potluck_protocol.values import Endpoint

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PART: Final = b"\x1e"
"""Between messages; within them `_FIELD`. Texts hold neither, and were it otherwise, a wrong guess would cost a placement."""
_FIELD: Final = b"\x1f"


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"")
    tool_calls: msgspec.Raw = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    model: str = ""
    tools: msgspec.Raw = msgspec.Raw(b"")
    messages: list[_Message] = []
    prompt: msgspec.Raw = msgspec.Raw(b"")


_decoder: Final = msgspec.json.Decoder(_Body)
_text_decoder: Final = msgspec.json.Decoder(str)


def prompt_text(endpoint: Endpoint, body: bytes) -> bytes:
    """The prompt of a chat or a completion; nothing of anything else, or of a body that is none."""
    if endpoint is Endpoint.EMBEDDINGS:
        return b""
    try:
        read = _decoder.decode(body)
        pieces = [read.model.encode(), read.tools, _text(read.prompt)]
        for message in read.messages:
            pieces += (_PART, message.role.encode(), _FIELD, _text(message.content), message.tool_calls)
        return b"".join(pieces)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return b""


def _text(value: msgspec.Raw) -> Buffer:
    """A text without its quotes and escapes; anything else as it stands. Of a long prompt, copies cost more than all else here."""
    raw = bytes(value)
    if raw[:1] != b'"':
        return raw
    return memoryview(raw)[1:-1] if b"\\" not in raw else _text_decoder.decode(raw).encode()
