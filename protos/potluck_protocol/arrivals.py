"""Takes in the pieces of a measurement, and notes when they came.

Decides when a measurement has enough. The coordinator takes a node's upload in this way, and the node its download. It must not know what
carries the pieces, nor what rate they make.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from potluck_protocol.line import MEASURED_BYTES_MAX, MEASURED_SECONDS_MAX, PIECE_BYTES, Arrival

FIRST_PIECE_SECONDS_MAX: Final = 5.0
"""How long the first piece may take; who sends none in that time holds nobody up any longer."""


async def take_arrivals(read: Callable[[], Awaitable[bytes | None]], now_seconds: Callable[[], float]) -> tuple[Arrival, ...]:
    """Reads until the end (None), the bound of bytes, or that of time, whichever is first.

    Args:
        read: the next piece; it may be given up while it waits. What it raises ends the measurement and is raised here.
        now_seconds: the monotonic clock.

    Returns:
        The first piece, and from there on at most one arrival for each PIECE_BYTES, however small the pieces are. Empty if none came.
    """
    found: list[Arrival] = []
    received_bytes = 0
    try:
        async with asyncio.timeout(FIRST_PIECE_SECONDS_MAX) as limit:
            while received_bytes < MEASURED_BYTES_MAX and (piece := await read()) is not None:
                received_bytes += len(piece)
                if not found:
                    limit.reschedule(asyncio.get_running_loop().time() + MEASURED_SECONDS_MAX)
                if not found or received_bytes - found[-1].received_bytes >= PIECE_BYTES:
                    found.append(Arrival(now_seconds(), received_bytes))
    except TimeoutError:
        if not limit.expired():
            raise
    return tuple(found)
