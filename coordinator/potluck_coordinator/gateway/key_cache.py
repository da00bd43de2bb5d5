"""Which API keys were good a moment ago, so that a request does not wait for the directory.

Decides how long an answer of the directory is believed. It must not know what a key may do (`authorisation`). Only hashes are kept, only of
good keys, and a revocation anywhere empties the whole memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Final

from potluck_coordinator.ports import KeyIdentity
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError

KEY_START: Final = "sk-potluck-"
KEY_CHARACTERS_MAX: Final = 128
REMEMBERED_SECONDS: Final = 60.0
"""A key revoked while this gateway is cut off from the directory works no longer than this."""
REMEMBERED_MAX: Final = 10_000


class KeyCache:
    """Answers whose key it is.

    Args:
        authenticate: the directory's answer; raises INVALID_API_KEY.
        key_generation: the number in the newest pool snapshot; when it changes, everything remembered is void.
        clock: for ages and for expiry.
    """

    def __init__(self, authenticate: Callable[[str], Awaitable[KeyIdentity]], key_generation: Callable[[], int], clock: Clock) -> None:
        self._authenticate = authenticate
        self._key_generation = key_generation
        self._clock = clock
        self._generation = key_generation()
        self._remembered: dict[bytes, tuple[float, KeyIdentity]] = {}

    def __len__(self) -> int:
        return len(self._remembered)

    async def identify(self, authorization: str | None) -> KeyIdentity:
        """Whose key an `authorization` header or metadata value (`Bearer KEY`) carries.

        Raises:
            PotluckError: INVALID_API_KEY for none, or one that is malformed, unknown, expired or revoked.
        """
        secret = _bearer(authorization)
        digest = sha256(secret.encode()).digest()
        generation = self._key_generation()
        if generation != self._generation:
            self._remembered.clear()
            self._generation = generation
        now = self._clock.monotonic_seconds()
        known = self._remembered.get(digest)
        if known is not None and now < known[0] and self._is_current(known[1]):
            return known[1]
        identity = await self._authenticate(secret)
        # A revocation may have come by while the directory's answer was on its way.
        if self._key_generation() == generation == self._generation:
            self._remember(digest, now + REMEMBERED_SECONDS, identity)
        return identity

    def _is_current(self, identity: KeyIdentity) -> bool:
        return identity.expires_at_unix_ms == 0 or self._clock.unix_ms() < identity.expires_at_unix_ms

    def _remember(self, digest: bytes, until_seconds: float, identity: KeyIdentity) -> None:
        self._remembered.pop(digest, None)
        if len(self._remembered) >= REMEMBERED_MAX:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = (until_seconds, identity)


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise PotluckError(ErrorCode.INVALID_API_KEY, "There is no API key; send it as `Authorization: Bearer sk-potluck-…`.")
    scheme, _, secret = authorization.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret.startswith(KEY_START) or len(secret) > KEY_CHARACTERS_MAX or not secret.isascii():
        # Such a key cannot exist: the directory is not asked.
        raise PotluckError(ErrorCode.INVALID_API_KEY, "This is not a Potluck API key; those begin with sk-potluck-.")
    return secret
