"""The agent's HTTP client for engines.

Decides how connections to them are made and kept. It must not know what is asked over them.
"""

from __future__ import annotations

from typing import Final

import aiohttp

CONNECT_LIMIT_SECONDS: Final = 5.0
CONNECTION_KEPT_SECONDS: Final = 2.0
"""Less than engines keep an idle connection (5 s): one that the engine closes while we write would fail a good request."""


def engine_session() -> aiohttp.ClientSession:
    """The agent's HTTP client for engines: loopback only, no limits of its own, bytes as they come."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=CONNECTION_KEPT_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_SECONDS),
        auto_decompress=False,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
