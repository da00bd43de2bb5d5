"""What a client is told that comes at a bad time: to come again, and when. It does so for a while, and counts how often."""

from __future__ import annotations

from email.message import Message
from http import HTTPStatus
from typing import Final

REFUSED_SECONDS_MAX: Final = 60.0
"""Who is still refused then was not told the truth about when to come again."""


def told_seconds(status: int, headers: Message) -> float | None:
    """After how long to come again; None for an answer that does not say so. Nothing of an answer has come with such a status."""
    is_refusal = status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
    return float(headers["retry-after"]) if is_refusal and "retry-after" in headers else None
