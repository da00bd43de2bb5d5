"""The form of what people hold in their hands: API keys, join tokens, and the ids beside them.

Decides lengths and alphabets, and that the books keep only hashes. A secret has 256 random bits, so a plain sha256 of it is enough: there
is nothing to guess from.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from typing import Final

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, KeyPrefix, TokenId

RandomBytes = Callable[[int], bytes]
"""That many bytes which nobody can foresee: `secrets.token_bytes`, or a test's own."""

LABEL_CHARACTERS_MAX: Final = 64
_API_KEY: Final = re.compile(r"sk-potluck-([a-z2-7]{8})-[A-Za-z0-9_-]{43}")


def new_account_id(random_bytes: RandomBytes) -> AccountId:
    return AccountId(f"acct_{_base32(random_bytes, 12)}")


def new_pool_id(random_bytes: RandomBytes) -> str:
    return f"pool_{_base32(random_bytes, 12)}"


def new_api_key(random_bytes: RandomBytes) -> tuple[KeyPrefix, str]:
    """The part by which the key is listed, and the whole key."""
    prefix = KeyPrefix(_base32(random_bytes, 8))
    return prefix, f"sk-potluck-{prefix}-{_secret(random_bytes)}"


def prefix_of_api_key(api_key: str) -> KeyPrefix | None:
    """The part by which the key is listed; None for what has not the form of a key."""
    match = _API_KEY.fullmatch(api_key)
    return None if match is None else KeyPrefix(match[1])


def new_join_token(random_bytes: RandomBytes) -> tuple[TokenId, str]:
    """The token's id and its secret."""
    return TokenId(_base32(random_bytes, 12)), _secret(random_bytes)


def secret_sha256(secret: str) -> str:
    """What is kept of a secret, hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def proves(secret: str, expected_sha256: str) -> bool:
    """Whether this is the secret that was hashed, in a time that tells nothing."""
    return hmac.compare_digest(secret_sha256(secret), expected_sha256)


def checked_label(label: str, param: str) -> str:
    """A name that people gave something, without blanks at its ends.

    Raises:
        PotluckError: INVALID_REQUEST for one that is empty, too long, or has characters that do not print.
    """
    label = label.strip()
    if not 1 <= len(label) <= LABEL_CHARACTERS_MAX or not label.isprintable():
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{param} must have 1 to {LABEL_CHARACTERS_MAX} printable characters.", param=param)
    return label


def _base32(random_bytes: RandomBytes, characters: int) -> str:
    return base64.b32encode(random_bytes(characters)).decode().lower()[:characters]


def _secret(random_bytes: RandomBytes) -> str:
    return base64.urlsafe_b64encode(random_bytes(32)).decode().rstrip("=")
