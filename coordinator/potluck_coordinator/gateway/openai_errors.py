"""How a failure looks in OpenAI's words, and what an engine's failure means in ours.

Decides status, headers and body of every error answer, and which `PotluckError` an engine's error answer becomes. It must not know
sockets or requests. An engine's text reaches the caller only in part: what might quote a prompt is cut out of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

import msgspec

from potluck_protocol.errors import ErrorCode, PotluckError

RETRY_AFTER_SECONDS_DEFAULT: Final = 1.0
RETRY_AFTER_SECONDS_MAX: Final = 120.0
"""The openai package takes a longer wait for "never"."""

_ENGINE_MESSAGE_LENGTH_MAX: Final = 300
_NEVER_RETRY: Final = frozenset({ErrorCode.INSUFFICIENT_CREDITS})
_RETRY_ENGINE_STATUS: Final = frozenset({429, 503})
_CALLER_FAULT_STATUS: Final = frozenset({400, 413, 415, 422, 501})
# What engines answer 500 to although only another request can help. llama.cpp: images to a text model, tools of a wrong shape.
_CALLER_FAULT_TEXT: Final = ("not supported", "Failed to parse ", "template")
_CONTEXT_TEXT: Final = ("context length", "context size", "maximum context", "context window")
_CONTEXT_TYPE: Final = "exceed_context_size_error"
# From here on engines quote their input: nlohmann's "last read", pydantic's 'input', llama.cpp's dump of a field.
_QUOTING_STARTS: Final = re.compile(r"last read|'input'|\"input\"|[:=]\s*[\[{]|\[\{")
_QUOTED: Final = re.compile(r"'[^']{33,}'|\"[^\"]{33,}\"|`[^`]{33,}`")


class _ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class _Envelope(msgspec.Struct):
    error: _ErrorBody


class _EngineError(msgspec.Struct):
    message: str = ""
    type: str | None = None


class _EngineEnvelope(msgspec.Struct):
    error: _EngineError | None = None
    message: str | None = None
    type: str | None = None


_encoder: Final = msgspec.json.Encoder()
_engine_decoder: Final = msgspec.json.Decoder(_EngineEnvelope, strict=False)


@dataclass(frozen=True, slots=True)
class HttpError:
    """One error answer. Header names are lower case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def error_body(error: PotluckError) -> bytes:
    """OpenAI's error document, JSON."""
    spec = error.spec
    content = _ErrorBody(message=error.message, type=spec.openai_type, param=error.param, code=spec.openai_code or str(error.code))
    return _encoder.encode(_Envelope(content))


def error_event(error: PotluckError) -> bytes:
    """The event that ends a stream which has already begun; no `[DONE]` follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def http_error(error: PotluckError, *, billed: bool = False) -> HttpError:
    """The whole error answer.

    Args:
        error: what failed.
        billed: tokens of this request were already paid for, so a client must not repeat it unasked.
    """
    headers = [(b"content-type", b"application/json")]
    if error.code is ErrorCode.INVALID_API_KEY:
        headers.append((b"www-authenticate", b"Bearer"))
    if billed or error.code in _NEVER_RETRY:
        headers.append((b"x-should-retry", b"false"))
    elif error.spec.retry_is_safe or error.retry_after_seconds is not None:
        seconds = min(error.retry_after_seconds or RETRY_AFTER_SECONDS_DEFAULT, RETRY_AFTER_SECONDS_MAX)
        headers.append((b"retry-after", b"%d" % max(math.ceil(seconds), 1)))
        headers.append((b"retry-after-ms", b"%d" % max(math.ceil(seconds * 1000), 1)))
    return HttpError(error.spec.http_status, tuple(headers), error_body(error))


def engine_error(status: int, body: bytes) -> PotluckError:
    """What an engine's error answer means to the caller.

    Args:
        status: the engine's HTTP status, 400 or above.
        body: its document, in the shape of llama.cpp, vLLM or SGLang; anything else counts as a failure of the engine.
    """
    message, kind = _engine_words(body)
    if kind == _CONTEXT_TYPE or (status in {400, 413} and any(text in message for text in _CONTEXT_TEXT)):
        return PotluckError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, _safe_text(message), param="messages")
    if status in _RETRY_ENGINE_STATUS:
        return PotluckError(ErrorCode.NO_CAPACITY, "The engine takes no requests right now.", retry_after_seconds=1.0)
    if status in _CALLER_FAULT_STATUS or (status >= 500 and any(text in message for text in _CALLER_FAULT_TEXT)):
        text = _safe_text(message)
        return PotluckError(ErrorCode.INVALID_REQUEST, f"The engine refused the request: {text}" if text else None)
    return PotluckError(ErrorCode.ENGINE_FAILED, "The engine failed before it answered.")


def _engine_words(body: bytes) -> tuple[str, str | None]:
    try:
        envelope = _engine_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", None
    if envelope.error is not None:
        return envelope.error.message, envelope.error.type
    return envelope.message or "", envelope.type


def _safe_text(message: str) -> str | None:
    """The engine's sentence without what could be a piece of the prompt; None if nothing is left."""
    quoting = _QUOTING_STARTS.search(message)
    text = message[: quoting.start()] if quoting is not None else message
    text = _QUOTED.sub("(left out)", text)
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text[:_ENGINE_MESSAGE_LENGTH_MAX].rstrip(" :;,-=") or None
