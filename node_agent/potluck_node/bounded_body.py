"""Reads what a server on loopback answers, and no more of it than is wanted."""

from __future__ import annotations

from aiohttp import StreamReader


async def read_at_most(content: StreamReader, bytes_max: int) -> bytes:
    """A body to its end, or to its first `bytes_max` bytes. `read` alone gives whatever has come by then."""
    body = bytearray()
    while len(body) < bytes_max and (piece := await content.read(bytes_max - len(body))):
        body += piece
    return bytes(body)
