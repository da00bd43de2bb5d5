"""Where the pool is and who asks: arguments, else the environment.

Decides what a client starts with, and is the only part of `Client` that reads Potluck's variables. It must not know how a pool is reached.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from potluck.errors import pool_error
from potluck_protocol.errors import ErrorCode

URL_VARIABLE: Final = "POTLUCK_URL"
API_KEY_VARIABLE: Final = "POTLUCK_API_KEY"
OPENAI_PATH: Final = "/v1"
"""What OpenAI's base URL has behind the pool's, and people copy along."""


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """A coordinator's HTTP URL and a key to its pool."""

    url: str
    api_key: str = field(repr=False)


def pool_url(url: str) -> str:
    """The URL of the pool itself, of which OpenAI's base URL, with `/v1`, is also taken.

    Raises:
        InvalidRequestError: it can lead to no pool.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise pool_error(ErrorCode.INVALID_REQUEST, f'"{url}" is no URL of a pool; one looks like http://host:port or https://host.')
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").removesuffix(OPENAI_PATH)))


def pool_address(url: str | None = None, api_key: str | None = None) -> PoolAddress:
    """The address from the arguments, else from POTLUCK_URL and POTLUCK_API_KEY.

    Raises:
        InvalidRequestError: there is no URL, or it cannot be one.
        InvalidApiKeyError: there is no key, or it cannot be one.
    """
    found_url = (url or os.environ.get(URL_VARIABLE, "")).strip()
    found_key = (api_key or os.environ.get(API_KEY_VARIABLE, "")).strip()
    if not found_url:
        raise pool_error(ErrorCode.INVALID_REQUEST, f"No pool is named: pass url= or set {URL_VARIABLE}, such as http://127.0.0.1:8600.")
    found_url = pool_url(found_url)
    if not found_key:
        raise pool_error(ErrorCode.INVALID_API_KEY, f"No API key: pass api_key= or set {API_KEY_VARIABLE}.")
    if not (found_key.isascii() and found_key.isprintable()) or " " in found_key:
        raise pool_error(ErrorCode.INVALID_API_KEY, "The API key holds characters that no key has; copy it again.")
    return PoolAddress(found_url, found_key)
