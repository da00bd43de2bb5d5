"""Asks an engine what it says of itself, whatever dialect it speaks.

Decides how long it may take and how much it may say: an engine may be anybody's, and what it says too late, too long, or somewhere else
costs that fact only. It must not know what the metrics mean; `metrics` has the table.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import aiohttp

from potluck_node.bounded_body import read_at_most
from potluck_node.engines.base import EngineAddress
from potluck_node.engines.metrics import JsonPage, json_pages, load_from, metrics_path
from potluck_node.engines.metrics_page import page_of
from potluck_node.engines.metrics_words import EngineLoad

ASKING_SECONDS_MAX: Final = 3.0
BEHIND_DOOR_SECONDS_MAX: Final = 2.5
"""For a door that asks the engine behind it: what came by then it still tells in time."""
METRICS_BYTES_MAX: Final = 4 * 1024 * 1024
JSON_BYTES_MAX: Final = 1024 * 1024


async def ask_load(
    session: aiohttp.ClientSession,
    kind: str,
    address: EngineAddress,
    limit_seconds: float = ASKING_SECONDS_MAX,
    *,
    may_wake: bool = True,
) -> EngineLoad:
    """What an engine of this kind says; of one that does not answer in time nothing is known. As `ask_page`."""
    return load_from(kind, await ask_page(session, kind, address, json_pages(kind), limit_seconds, may_wake=may_wake))


async def ask_page(
    session: aiohttp.ClientSession,
    kind: str,
    address: EngineAddress,
    besides: tuple[JsonPage, ...],
    limit_seconds: float,
    *,
    may_wake: bool = True,
) -> str:
    """An engine's metrics, and in ours what it tells `besides` of its cache where they do not, as far as it comes in time.

    Unless it `may_wake`, what would wake an engine that sleeps when idle is not asked.
    """
    pages: list[str] = []
    with suppress(TimeoutError, aiohttp.ClientError, ValueError):
        async with asyncio.timeout(limit_seconds):
            if path := metrics_path(kind, may_wake=may_wake):
                pages.append((await _get(session, address, path, METRICS_BYTES_MAX)).decode(errors="replace") + "\n")
            for page in besides:
                if (known := _known_beforehand(page, load_from(kind, "".join(pages)))) is None:
                    known = page.read(_decoded(await _get(session, address, page.path, JSON_BYTES_MAX)))
                pages.append(page_of(known))
    return "".join(pages)


def _known_beforehand(page: JsonPage, load: EngineLoad) -> Mapping[str, float] | None:
    """What the page adds, where that needs no question; nothing, where it would only say again what is known."""
    if page.idle is None:
        return None if load.kv_capacity_tokens is None else {}
    if load.kv_used_tokens is not None or load.running_count is None:
        return {}
    return None if load.running_count else page.idle


async def _get(session: aiohttp.ClientSession, address: EngineAddress, path: str, bytes_max: int) -> bytes:
    """The body, empty unless the status is 200. No redirection is followed: it may lead anywhere, and the key is for one server."""
    headers = address.headers | {"accept-encoding": "identity"}
    async with session.get(address.url + path, headers=headers, allow_redirects=False) as response:
        return await read_at_most(response.content, bytes_max) if response.status == 200 else b""


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
