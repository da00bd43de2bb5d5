"""What an idempotency key may be, for those who send one and those who get one.

Decides its length and its characters: what fits an HTTP header and gRPC metadata alike, unchanged. It must not know what a key does.
"""

from __future__ import annotations

from typing import Final

from potluck_protocol.errors import ErrorCode, PotluckError

KEY_CHARACTERS_MAX: Final = 255


def checked_key(key: str) -> str:
    """The key; raises INVALID_REQUEST for one that is none."""
    if not 1 <= len(key) <= KEY_CHARACTERS_MAX or not (key.isascii() and key.isprintable()):
        message = f"An idempotency key has 1 to {KEY_CHARACTERS_MAX} printable ASCII characters; a random UUID is a good one."
        raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="Idempotency-Key")
    return key
