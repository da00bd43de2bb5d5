"""How an operator writes a rate: "100/hour", in the words of the `limits` library.

Decides which rates there can be. It must not know what is counted.
"""

from __future__ import annotations

from typing import Final

from limits import RateLimitItem, parse

from potluck_protocol.errors import ErrorCode, PotluckError

REQUESTS_MAX: Final = 100_000
"""Of one window: each has its moment in memory."""


def rate_limit(text: str) -> RateLimitItem:
    """The limit that an operator wrote, such as "100/hour" or "5 per 10 seconds"; raises INVALID_REQUEST for what is none."""
    try:
        item = parse(text)
    except ValueError:
        words = f"{text!r} is no rate; write a count and a time, such as 100/hour, 20/minute or 5 per 10 seconds"
        raise PotluckError(ErrorCode.INVALID_REQUEST, words) from None
    if not 1 <= item.amount <= REQUESTS_MAX:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"a rate is from 1 to {REQUESTS_MAX} requests, not {item.amount}")
    return item
