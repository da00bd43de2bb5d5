"""What the least costs in Python that has nodes behind a link: HTTP in, frames over gRPC with TLS out, and bytes passed on.

    python grpc_relay.py coordinator FOLDER HTTP_PORT LINK_PORT
    python grpc_relay.py agent FOLDER LINK_PORT ENGINE_URL…

Both ends are written for speed alone, on the libraries, options and certificates that Potluck has. No body is looked at, nobody is asked
for a key, nothing is placed, booked, counted or logged, and a lost node ends everything: what Potluck spends beyond it is what it does.
A frame is one message of bytes: for each part 8 bytes of the request's number, 4 of the part's length, and the part; one of no bytes
ends an answer. The agent's frames leave at most every 4 ms, as Potluck's do under load.
"""

from __future__ import annotations

import potluck.command  # noqa: F401 - before grpc, whose event loop it names

# isort: split
import asyncio
import itertools
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import grpc.aio
import httptools
import uvloop

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.channels import LINK_CHANNEL_OPTIONS, LINK_SERVER_OPTIONS
from potluck_protocol.clock import SystemClock

LINK_METHOD: Final = "/bench.Relay/Link"
HEADER: Final = struct.Struct(">QI")
FLUSH_SECONDS: Final = 0.004
ANSWER_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def parts_of(frame: bytes) -> list[tuple[int, bytes]]:
    """Requests' numbers and what came for them."""
    parts, position = [], 0
    while position < len(frame):
        number, size = HEADER.unpack_from(frame, position)
        position += HEADER.size
        parts.append((number, frame[position : position + size]))
        position += size
    return parts


class Outbox:
    """Frames on their way out: one is written at a time, and what comes meanwhile goes together."""

    def __init__(self, stream: Any, pause_seconds: float = 0.0) -> None:
        self._stream, self._pause_seconds = stream, pause_seconds
        self._waiting: list[bytes] = []
        self._work = asyncio.Event()

    def put(self, number: int, part: bytes) -> None:
        self._waiting += (HEADER.pack(number, len(part)), part)
        self._work.set()

    async def run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            waiting, self._waiting = self._waiting, []
            await self._stream.write(b"".join(waiting))
            if self._pause_seconds:
                await asyncio.sleep(self._pause_seconds)


class Coordinator:
    """One link, and the clients whose answers come over it."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None
        self.clients: dict[int, Client] = {}
        self.numbers = itertools.count(1)

    async def link(self, _requests: Any, context: Any) -> None:
        self.outbox = Outbox(context)
        sending = asyncio.ensure_future(self.outbox.run())
        try:
            while (frame := await context.read()) is not grpc.aio.EOF:
                for number, part in parts_of(frame):
                    self.clients[number].take(part)
        finally:
            sending.cancel()


class Client(asyncio.Protocol):
    """A client's connection: one request after the other."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._number = 0
        self._body = bytearray()
        self._has_begun = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        coordinator = self._coordinator
        if coordinator.outbox is None:
            self._transport.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
            return
        self._number = next(coordinator.numbers)
        coordinator.clients[self._number] = self
        coordinator.outbox.put(self._number, bytes(self._body))
        self._body.clear()

    def take(self, part: bytes) -> None:
        """A piece of the answer, or its end."""
        if part:
            head, self._has_begun = b"" if self._has_begun else ANSWER_HEAD, True
            self._transport.write(b"%b%x\r\n%b\r\n" % (head, len(part), part))
        else:
            del self._coordinator.clients[self._number]
            self._has_begun = False
            self._transport.write(b"0\r\n\r\n")


async def coordinate(folder: Path, http_port: int, link_port: int) -> None:
    now = SystemClock().unix_ms()
    own = CertificateAuthority.load_or_create(folder, now).issue_server_certificate(now)
    credentials = grpc.ssl_server_credentials([(own.private_key_pem, own.certificate_chain_pem)])
    coordinator = Coordinator()
    server = grpc.aio.server(options=LINK_SERVER_OPTIONS)
    service, method = LINK_METHOD[1:].split("/")
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {method: grpc.stream_stream_rpc_method_handler(coordinator.link)})]
    )
    server.add_secure_port(f"127.0.0.1:{link_port}", credentials)
    await server.start()
    clients = await asyncio.get_running_loop().create_server(lambda: Client(coordinator), "127.0.0.1", http_port)
    await clients.serve_forever()


class Engine(asyncio.Protocol):
    """A connection to the engine: one request at a time, then it waits among the others for the next."""

    def __init__(self, outbox: Outbox, idle: list[Engine], head: bytes) -> None:
        self._outbox, self._idle, self._head = outbox, idle, head
        self._number = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, number: int, body: bytes) -> None:
        self._number, self._parser = number, httptools.HttpResponseParser(self)
        self._transport.write(self._head + b"content-length: %d\r\n\r\n" % len(body) + body)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._outbox.put(self._number, body)

    def on_message_complete(self) -> None:
        self._outbox.put(self._number, b"")
        self._idle.append(self)


async def serve_engine(folder: Path, link_port: int, engine_url: str) -> None:
    authority = CertificateAuthority.load_or_create(folder, SystemClock().unix_ms())
    credentials = grpc.ssl_channel_credentials(authority.ca_certificate_pem.encode())
    address = urlsplit(engine_url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n".encode()
    loop, idle = asyncio.get_running_loop(), list[Engine]()
    async with grpc.aio.secure_channel(f"127.0.0.1:{link_port}", credentials, options=LINK_CHANNEL_OPTIONS) as channel:
        stream = channel.stream_stream(LINK_METHOD)(wait_for_ready=True)
        outbox = Outbox(stream, FLUSH_SECONDS)
        sending = asyncio.ensure_future(outbox.run())
        try:
            async for number, body in _requests(stream):
                if idle:
                    engine = idle.pop()
                else:
                    _, engine = await loop.create_connection(lambda: Engine(outbox, idle, head), address.hostname, address.port)
                engine.ask(number, body)
        finally:
            sending.cancel()


async def _requests(stream: Any) -> AsyncIterator[tuple[int, bytes]]:
    while (frame := await stream.read()) is not grpc.aio.EOF:
        for part in parts_of(frame):
            yield part


def main(role: str, folder: str, *rest: str) -> None:
    if role == "coordinator":
        uvloop.run(coordinate(Path(folder), int(rest[0]), int(rest[1])))
    else:
        uvloop.run(serve_engine(Path(folder), int(rest[0]), rest[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
