"""What an engine's failure means in our words.

Decides which `PotluckError` an engine's error answer becomes. An engine's text reaches the caller only in part: what might quote a prompt
is cut out of it. It must not know how an error is shown; `openai_errors` and `interceptors` do.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import Endpoint

INPUT_PARAM: Final = {Endpoint.CHAT_COMPLETIONS: "messages", Endpoint.COMPLETIONS: "prompt", Endpoint.EMBEDDINGS: "input"}
"""What an endpoint's body calls its input."""
_ENGINE_MESSAGE_LENGTH_MAX: Final = 300
_RETRY_ENGINE_STATUS: Final = frozenset({429, 503})
_CALLER_FAULT_STATUS: Final = frozenset({400, 413, 415, 422, 501})
# What engines answer 500 to although only another request can help. llama.cpp: images to a text model, tools of a wrong shape.
_CALLER_FAULT_TEXT: Final = ("not supported", "Failed to parse ", "template")
_CONTEXT_TEXT: Final = ("context length", "context size", "maximum context", "context window")
_CONTEXT_TYPE: Final = "exceed_context_size_error"
# From here on engines quote their input: nlohmann's "last read", pydantic's 'input', llama.cpp's dump of a field.
_QUOTING_STARTS: Final = re.compile(r"last read|'input'|\"input\"|[:=]\s*[\[{]|\[\{")
_QUOTED: Final = re.compile(r"'[^']{33,}'|\"[^\"]{33,}\"|`[^`]{33,}`")


class _EngineError(msgspec.Struct):
    message: str = ""
    type: str | None = None


class _EngineEnvelope(msgspec.Struct):
    error: _EngineError | None = None
    message: str | None = None
    type: str | None = None


_engine_decoder: Final = msgspec.json.Decoder(_EngineEnvelope, strict=False)


def engine_error(endpoint: Endpoint, status: int, body: bytes) -> PotluckError:
    """What an engine's error answer means to the caller.

    Args:
        endpoint: what was asked for, which says how the input is called.
        status: the engine's HTTP status, 400 or above.
        body: its document, in the shape of llama.cpp, vLLM or SGLang; anything else counts as a failure of the engine.
    """
    message, kind = _engine_words(body)
    if kind == _CONTEXT_TYPE or (status in {400, 413} and any(text in message for text in _CONTEXT_TEXT)):
        # The last words are llama.cpp's advice to whoever runs it.
        words = (_safe_text(message) or "").removesuffix(", try increasing it")
        return PotluckError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, words or None, param=INPUT_PARAM[endpoint])
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
