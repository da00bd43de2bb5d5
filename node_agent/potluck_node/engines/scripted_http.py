"""HTTP/1.1 for the scripted engine: one connection, one request after the other, and nothing that would cost a token anything.

Decides that a request whose client hangs up is cancelled, and that a client who does not read is waited for. It understands what relays and
agents send to engines: bodies with a length. It must not know what is asked or answered.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, cast

HEAD_BYTES_MAX: Final = 64 * 1024
BODY_BYTES_MAX: Final = 16 * 1024 * 1024
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_LAST: Final = re.compile(rb"\r\nconnection:[ \t]*close|HTTP/1\.0\r\n", re.IGNORECASE)
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}

Handler = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request, and the way to answer it."""

    __slots__ = ("_connection", "_transport", "body", "method", "path")

    def __init__(self, connection: _Connection, transport: asyncio.Transport, method: str, path: str, body: bytes) -> None:
        self._connection = connection
        self._transport = transport
        self.method = method
        self.path = path
        self.body = body

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        """The whole answer, in one piece."""
        self._transport.write(_head(status, content_type, b"Content-Length: %d" % len(body)) + body)

    def open(self, content_type: str) -> None:
        """Begins an answer in pieces."""
        self._transport.write(_head(HTTPStatus.OK, content_type, b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked"))

    async def write(self, piece: bytes) -> None:
        """Another piece; returns when the client may have the next."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if self._connection.is_paused:
            await self._connection.resumed()

    def close(self) -> None:
        """Ends an answer in pieces."""
        self._transport.write(b"0\r\n\r\n")

    def abort(self) -> None:
        """Breaks the connection off."""
        self._transport.abort()


def _head(status: int, content_type: str, fields: bytes) -> bytes:
    line = f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\nContent-Type: {content_type}\r\n"
    return line.encode() + fields + b"\r\n\r\n"


class _Connection(asyncio.Protocol):
    """Reads one request after the other; the next is looked at when the one before is answered."""

    def __init__(self, handler: Handler, connections: set[_Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._body_at = 0
        """Where the body of the request begins whose head is complete; 0 before."""
        self._end_at = 0
        self._answering: asyncio.Task[None] | None = None
        self._resumed: asyncio.Event | None = None
        self._is_last = False

    @property
    def is_paused(self) -> bool:
        """Whether the client leaves unread what it was sent."""
        return self._resumed is not None

    async def resumed(self) -> None:
        if self._resumed is not None:
            await self._resumed.wait()

    def end(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not say that they are asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._connections.discard(self)
        self.resume_writing()
        if self._answering is not None:
            self._answering.cancel()

    def pause_writing(self) -> None:
        self._resumed = asyncio.Event()

    def resume_writing(self) -> None:
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._answering is None:
            self._take_next()

    def _take_next(self) -> None:
        """Begins to answer the next request, if it is here as a whole."""
        if self._body_at == 0 and not self._read_head():
            return
        if len(self._received) < self._end_at or self._transport is None:
            return
        method, path, _ = bytes(self._received[: self._received.index(b"\r\n")]).decode("latin-1").split(" ", 2)
        body = bytes(self._received[self._body_at : self._end_at])
        del self._received[: self._end_at]
        self._body_at = 0
        exchange = Exchange(self, self._transport, method, path.partition("?")[0], body)
        self._answering = self._loop.create_task(self._handle(exchange))

    def _read_head(self) -> bool:
        """Whether the head of the next request is complete; hangs up on what is none, or is too much."""
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            if len(self._received) > HEAD_BYTES_MAX:
                self.end()
            return False
        head = bytes(self._received[: end + 2])
        length = _LENGTH.search(head)
        self._body_at = end + 4
        self._end_at = self._body_at + (int(length[1]) if length else 0)
        self._is_last = _LAST.search(head) is not None
        if head.split(b"\r\n", 1)[0].count(b" ") != 2 or self._end_at - self._body_at > BODY_BYTES_MAX:
            self.end()
            return False
        return True

    async def _handle(self, exchange: Exchange) -> None:
        try:
            await self._handler(exchange)
        except (ConnectionError, asyncio.CancelledError):
            self.end()
            raise
        finally:
            self._answering = None
        if self._is_last and self._transport is not None:
            self._transport.close()
        elif self._received:
            self._take_next()


class Serving:
    """A server on loopback, running."""

    def __init__(self, server: asyncio.Server, connections: set[_Connection]) -> None:
        self._server = server
        self._connections = connections
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def cleanup(self) -> None:
        """Closes it, and every connection."""
        self._server.close()
        for connection in tuple(self._connections):
            connection.end()
        await self._server.wait_closed()


async def serve_http(handler: Handler, port: int = 0) -> Serving:
    """Starts serving; port 0 takes a free one."""
    connections: set[_Connection] = set()
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(handler, connections), "127.0.0.1", port)
    return Serving(server, connections)
