"""Which API keys were good a moment ago, so that a request does not wait for the directory.

Decides how long an answer of the directory is believed. It must not know what a key may do (`authorisation`). Only hashes are kept, and a
revocation anywhere empties the whole memory. A refused key is remembered for a moment, so that a client that goes on with it costs little.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Final, TypeVar

from potluck_coordinator.desks import KeyIdentity
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError

KEY_START: Final = "sk-potluck-"
KEY_CHARACTERS_MAX: Final = 128
REMEMBERED_SECONDS: Final = 60.0
"""A key revoked while this gateway is cut off from the directory works no longer than this."""
REFUSED_SECONDS: Final = 2.0
REMEMBERED_MAX: Final = 10_000
"""Of good keys, and of refused ones."""

_Remembered = TypeVar("_Remembered")


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
        self._refused: dict[bytes, tuple[float, str]] = {}

    def __len__(self) -> int:
        return len(self._remembered) + len(self._refused)

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
            self._refused.clear()
            self._generation = generation
        now = self._clock.monotonic_seconds()
        known = self._remembered.get(digest)
        if known is not None and now < known[0] and self._is_current(known[1]):
            return known[1]
        refused = self._refused.get(digest)
        if refused is not None and now < refused[0]:
            raise PotluckError(ErrorCode.INVALID_API_KEY, refused[1])
        try:
            identity = await self._authenticate(secret)
        except PotluckError as error:
            if error.code is ErrorCode.INVALID_API_KEY:
                _remember(self._refused, digest, (now + REFUSED_SECONDS, error.message))
            raise
        # A revocation may have come by while the directory's answer was on its way.
        if self._key_generation() == generation == self._generation:
            _remember(self._remembered, digest, (now + REMEMBERED_SECONDS, identity))
        return identity

    def _is_current(self, identity: KeyIdentity) -> bool:
        return identity.expires_at_unix_ms == 0 or self._clock.unix_ms() < identity.expires_at_unix_ms


def _remember(memory: dict[bytes, _Remembered], digest: bytes, remembered: _Remembered) -> None:
    """In the place of the oldest where the memory is full."""
    memory.pop(digest, None)
    if len(memory) >= REMEMBERED_MAX:
        del memory[next(iter(memory))]
    memory[digest] = remembered


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise PotluckError(ErrorCode.INVALID_API_KEY, "There is no API key; send it as `Authorization: Bearer sk-potluck-…`.")
    scheme, _, secret = authorization.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret.startswith(KEY_START) or len(secret) > KEY_CHARACTERS_MAX or not secret.isascii():
        # Such a key cannot exist: the directory is not asked.
        raise PotluckError(ErrorCode.INVALID_API_KEY, "This is not a Potluck API key; those begin with sk-potluck-.")
    return secret
