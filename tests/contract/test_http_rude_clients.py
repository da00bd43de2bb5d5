"""The http port against clients that hang up, dawdle, flood or do not speak HTTP, and against a port that is taken."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from potluck_coordinator import listening
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway import http_exchange, http_server
from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX
from potluck_protocol.channels import SERVER_NAME
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.http_edge import (
    CHAT_DOCUMENT,
    CHAT_STREAM,
    USER_KEY,
    HttpEdge,
    Script,
    chat_body,
    exchange,
    http_edge,
    parse_answer,
    read_until,
    request_bytes,
)

CHAT = "/v1/chat/completions"


@pytest.fixture
async def edge() -> AsyncIterator[HttpEdge]:
    async with http_edge() as running:
        yield running


@pytest.mark.timed
@pytest.mark.parametrize("reset", [True, False])
async def test_hang_up_mid_stream_closes_the_answer(edge: HttpEdge, reset: bool) -> None:
    edge.requests.script = Script(pieces=CHAT_STREAM, endless=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    await read_until(reader, CHAT_STREAM[-1])
    answer = edge.requests.answers[0]
    assert not answer.closed.is_set()
    started = time.monotonic()
    if reset:
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        writer.transport.abort()
    else:
        writer.close()
    await asyncio.wait_for(answer.closed.wait(), 1)
    assert time.monotonic() - started < 0.5


async def test_hang_up_of_an_unstreamed_request_closes_the_answer(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(b"{",), endless=True)
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body()))
    await asyncio.wait_for(edge.requests.began.wait(), 5)
    writer.close()
    await asyncio.wait_for(edge.requests.answers[0].closed.wait(), 1)


async def test_hang_up_while_queued_cancels_the_request(edge: HttpEdge) -> None:
    edge.requests.script = Script(begins=False)
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body()))
    await asyncio.wait_for(edge.requests.began.wait(), 5)
    writer.close()
    await asyncio.wait_for(edge.requests.begin_cancelled.wait(), 1)


async def test_slow_client_pauses_its_own_answer_and_is_dropped_in_the_end(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "STALL_SECONDS_MAX", 0.3)
    edge.requests.script = Script(pieces=(b": " + b"x" * 65536 + b"\n\n",), repeats=2000)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", edge.port))
    await loop.sock_sendall(connection, request_bytes("POST", CHAT, chat_body(stream=True)))
    async with asyncio.timeout(5):
        await edge.requests.began.wait()
        answer = edge.requests.answers[0]
        await answer.closed.wait()
    assert answer.taken_count < 200
    connection.close()


@pytest.mark.parametrize("stream", [True, False], ids=["broken stream", "whole answer"])
async def test_who_never_reads_an_ending_keeps_no_connection(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    for module in (http_exchange, http_server):
        monkeypatch.setattr(module, "STALL_SECONDS_MAX", 0.3)
    answer = b"x" * (16 * 1024 * 1024)
    edge.requests.script = Script(pieces=(answer, PotluckError(ErrorCode.NODE_LOST)) if stream else (answer,))
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    with client:
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", edge.port))
        await asyncio.get_running_loop().sock_sendall(client, request_bytes("POST", CHAT, chat_body(stream=stream)))
        state = edge.server._server.server_state
        async with asyncio.timeout(10):
            while not state.connections:
                await asyncio.sleep(0.01)
            while state.connections or state.tasks:
                await asyncio.sleep(0.05)


async def test_who_pipelines_and_never_reads_keeps_no_connection(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (http_exchange, http_server):
        monkeypatch.setattr(module, "STALL_SECONDS_MAX", 0.3)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop, many = asyncio.get_running_loop(), request_bytes("GET", "/pool/v1/connection", key=None) * 100
    with client:
        await loop.sock_connect(client, ("127.0.0.1", edge.port))
        state = edge.server._server.server_state
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(5):
                # Until the server takes no more, and has dropped the connection.
                while True:
                    await loop.sock_sendall(client, many)
        async with asyncio.timeout(10):
            while state.connections or state.tasks:
                await asyncio.sleep(0.05)


async def test_the_bytes_of_one_request_are_not_counted_for_the_head_of_the_next(edge: HttpEdge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    refused = request_bytes("POST", CHAT, b"{" + b" " * 70_000, key=None)
    writer.write(refused[:-70_000])
    await read_until(reader, b"invalid_api_key")
    writer.write(refused[-70_000:] + b"GET /health HT")
    await asyncio.sleep(0.05)
    writer.write(b"TP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert b'{"status":"ok"}' in await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_other_requests_go_on_beside_a_stream(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=CHAT_STREAM, endless=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    await read_until(reader, CHAT_STREAM[-1])
    assert (await exchange(edge.port, "GET", "/health")).status == 200
    writer.close()


async def test_keep_alive(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(CHAT_DOCUMENT,))
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    for body, end in ((chat_body(), CHAT_DOCUMENT), (chat_body(), CHAT_DOCUMENT), (b"{", b"invalid_request")):
        writer.write(request_bytes("POST", CHAT, body))
        await read_until(reader, end)
    writer.write(request_bytes("GET", "/health", headers={"connection": "close"}))
    assert (await asyncio.wait_for(reader.read(), 5)).endswith(b'{"status":"ok"}')
    writer.close()


async def test_what_is_not_http_is_refused_in_the_same_shape(edge: HttpEdge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    answer = parse_answer(await asyncio.wait_for(reader.read(), 5))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "invalid_request")
    writer.close()


async def test_headers_are_bounded_in_size_and_time(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"GET /health HTTP/1.1\r\nx: " + b"a" * (http_server.HEAD_BYTES_MAX + 1))
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400 ")
    writer.close()

    monkeypatch.setattr(http_server, "HEAD_SECONDS_MAX", 0.2)
    for opening in (b"", b"GET /health HTTP/1.1\r\nx: a"):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(opening)
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()


async def test_body_is_bounded_in_time(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "BODY_SECONDS_MAX", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, b"{", headers={"content-length": "100"}))
    answer = parse_answer(await asyncio.wait_for(reader.read(), 5))
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert b"did not arrive" in answer.body
    writer.close()


async def test_the_rest_of_a_refused_body_is_bounded_in_time(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "BODY_SECONDS_MAX", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, b"{", key=None, headers={"content-length": "100"}))
    assert parse_answer(await asyncio.wait_for(reader.read(), 5)).status == 401
    writer.close()


async def test_a_refused_request_whose_body_comes_after_all_leaves_its_connection_good(
    edge: HttpEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "BODY_SECONDS_MAX", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, b"{", key=None, headers={"content-length": "2"}))
    assert b" 401 " in await read_until(reader, b"}}")
    writer.write(b"}")
    await outlast_a_refused_body(edge)
    await ask_for_the_last_time(reader, writer)


async def test_a_kept_connection_may_wait_longer_than_a_refused_body(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "BODY_SECONDS_MAX", 0.3)
    edge.requests.script = Script(pieces=(CHAT_DOCUMENT,))
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body()))
    assert b" 200 " in await read_until(reader, CHAT_DOCUMENT)
    await outlast_a_refused_body(edge)
    await ask_for_the_last_time(reader, writer)


async def outlast_a_refused_body(edge: HttpEdge) -> None:
    """Until the port has cut a connection that came after all others and owes the rest of a refused body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, b"{", key=None, headers={"content-length": "100"}))
    assert parse_answer(await asyncio.wait_for(reader.read(), 5)).status == 401
    writer.close()


async def ask_for_the_last_time(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert not reader.at_eof(), "the port cut a connection that owed nothing"
    writer.write(request_bytes("GET", "/health", headers={"connection": "close"}))
    assert parse_answer(await asyncio.wait_for(reader.read(), 5)).status == 200
    writer.close()


async def test_declared_body_too_large_is_refused_before_it_comes(edge: HttpEdge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, headers={"content-length": str(BODY_BYTES_MAX + 1)}))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_chunked_body_is_bounded_while_it_arrives(edge: HttpEdge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: pool\r\nauthorization: Bearer {USER_KEY}\r\ntransfer-encoding: chunked\r\n\r\n"
    writer.write(head.encode())
    piece = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
    for _ in range(BODY_BYTES_MAX // 65536 + 2):
        writer.write(piece)
        await writer.drain()
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_endless_body_after_a_refusal_ends_the_connection(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UNREAD_BODY_BYTES_MAX", 1_000_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, key=None, headers={"content-length": str(10**12)}))
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)).startswith(b"HTTP/1.1 401 ")
    with pytest.raises(ConnectionError):
        await flood(writer)
    writer.close()


async def flood(writer: asyncio.StreamWriter) -> None:
    for _ in range(1000):
        writer.write(b"x" * 65536)
        await writer.drain()


async def test_more_connections_than_the_bound_are_closed_at_once(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 2)
    open_ones = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(2)]
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    for _, opened in open_ones:
        opened.close()
    writer.close()


async def test_tls(tmp_path: Path) -> None:
    authority = CertificateAuthority.load_or_create(tmp_path / "ca", SystemClock().unix_ms())
    server = authority.issue_server_certificate(SystemClock().unix_ms())
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.write_bytes(server.certificate_chain_pem)
    key.write_bytes(server.private_key_pem)
    trust = ssl.create_default_context(cadata=server.ca_certificate_pem)
    async with http_edge(tls_certificate=certificate, tls_key=key) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=trust, server_hostname=SERVER_NAME)
        writer.write(request_bytes("GET", "/health", headers={"connection": "close"}))
        assert parse_answer(await asyncio.wait_for(reader.read(), 5)).status == 200
        writer.close()


async def test_port_that_is_taken_is_named(edge: HttpEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "PREDECESSOR_SECONDS_MAX", 0)
    with pytest.raises(PotluckError, match=rf"Port {edge.port} of 127\.0\.0\.1 .*--http-port"):
        await edge.server.start("127.0.0.1", edge.port)
    with pytest.raises(PotluckError, match="Cannot listen on 192"):
        await edge.server.start("192.0.2.1", 0)
