"""How a failure looks in OpenAI's words.

Decides status, headers and body of every HTTP error answer. It must not know sockets or requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import msgspec

from potluck_protocol.errors import ErrorCode, PotluckError

RETRY_AFTER_SECONDS_DEFAULT: Final = 1.0
RETRY_AFTER_SECONDS_MAX: Final = 120.0
"""The openai package takes a longer wait for "never"."""
_AS_LONG_AS_IT_TAKES: Final = frozenset({ErrorCode.RATE_LIMITED, ErrorCode.QUOTA_EXCEEDED})
"""Told in full: an hour or a day is not over sooner, and a client that takes it for "never" is right."""

_NEVER_RETRY: Final = frozenset({ErrorCode.INSUFFICIENT_CREDITS, ErrorCode.REQUEST_REFUSED, ErrorCode.IDEMPOTENCY_KEY_SPENT})


class _ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class _Envelope(msgspec.Struct):
    error: _ErrorBody


_encoder: Final = msgspec.json.Encoder()


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
        seconds = error.retry_after_seconds or RETRY_AFTER_SECONDS_DEFAULT
        if error.code not in _AS_LONG_AS_IT_TAKES:
            seconds = min(seconds, RETRY_AFTER_SECONDS_MAX)
        headers.append((b"retry-after", b"%d" % max(math.ceil(seconds), 1)))
        headers.append((b"retry-after-ms", b"%d" % max(math.ceil(seconds * 1000), 1)))
    return HttpError(error.spec.http_status, tuple(headers), error_body(error))
