"""A stream on its way from the relay to the socket: nothing lost, whatever else its client does on the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvloop

from potluck_coordinator.gateway import http_server
from potluck_coordinator.gateway.relay import AnswerHead, Relay
from potluck_coordinator.gateway.tier_mark import marked
from potluck_protocol.values import EndReason
from tests.support.http_edge import DONE, chat_body, chat_event, read_until, request_bytes, usage_event
from tests.support.relayed_edge import RelayedEdge, relayed_edge_of

CHAT = "/v1/chat/completions"
# The hook that shall replace it speaks for a whole folder.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The gateway runs on uvloop, whose connections behave otherwise at their end."""
    return request.param()


@pytest.fixture
async def relayed_edge() -> AsyncIterator[RelayedEdge]:
    async with relayed_edge_of() as running:
        yield running


async def begun_stream(edge: RelayedEdge) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Relay]:
    """A client whose stream has begun, and what its node says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    relay = await edge.next_relay()
    relay.head = AnswerHead(200, "text/event-stream")
    relay.receive(0, chat_event({"content": "first"}), 0.0)
    await read_until(reader, b"first")
    return reader, writer, relay


EARLY = [
    pytest.param(request_bytes("GET", "/health"), id="a request"),
    pytest.param(request_bytes("POST", CHAT, chat_body()) * 3, id="three with bodies"),
    pytest.param(b"GET /health HT", id="the beginning of one"),
    pytest.param(b"\x16\x03\x01 this is not HTTP\r\n\r\n", id="no HTTP"),
]


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("at_once", [True, False], ids=["with the first", "in its stream"])
async def test_what_comes_before_an_answer_is_over_costs_it_nothing(
    relayed_edge: RelayedEdge, monkeypatch: pytest.MonkeyPatch, early: bytes, at_once: bool
) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS_MAX", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", relayed_edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)) + (early if at_once else b""))
    relay = await relayed_edge.next_relay()
    relay.head = AnswerHead(200, "text/event-stream")
    tokens = [chat_event({"content": f"t{number} "}) for number in range(8)]
    for number, token in enumerate(tokens):
        relay.receive(number, token, 0.0)
        await read_until(reader, token if number else marked(token, "default", stream=True))
        if number == 2 and not at_once:
            writer.write(early)
            await asyncio.sleep(0.15)
    relay.receive(len(tokens), DONE, 0.0)
    relay.end(len(tokens) + 1, EndReason.COMPLETED, "")
    # The rest of the stream, and nothing behind it: the connection closes.
    assert (await asyncio.wait_for(reader.read(), 5)).endswith(DONE + b"\r\n0\r\n\r\n")
    assert relayed_edge.charges == [len(tokens) * relayed_edge.price]
    writer.close()


@pytest.mark.parametrize("early", EARLY)
async def test_who_asks_too_early_and_hangs_up_is_noticed(relayed_edge: RelayedEdge, early: bytes) -> None:
    _, writer, _ = await begun_stream(relayed_edge)
    writer.write(early)
    await asyncio.sleep(0.05)
    writer.close()
    async with asyncio.timeout(10):
        await relayed_edge.released.wait()


async def test_who_sends_too_early_without_end_is_dropped(relayed_edge: RelayedEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UNREAD_BODY_BYTES_MAX", 200_000)
    _, writer = await asyncio.open_connection("127.0.0.1", relayed_edge.port)
    early = request_bytes("POST", CHAT, b"x" * 400_000)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    await relayed_edge.next_relay()
    for start in range(0, len(early), 1000):
        writer.write(early[start : start + 1000])
    async with asyncio.timeout(10):
        await relayed_edge.released.wait()
    writer.close()


async def test_tokens_reach_a_client_that_reads_without_anybodys_turn(relayed_edge: RelayedEdge) -> None:
    reader, writer, relay = await begun_stream(relayed_edge)
    large = b": " + b"x" * 40_000 + b"\n\n"
    for number in range(1, 1000):
        relay.receive(number, large, 0.0)
        if relay._buffer:
            break
    # Nothing has had a turn since. The connection took what it takes; the rest waits for the reader, and the node will wait for that.
    assert 1 < number < 999
    seen = 0
    async with asyncio.timeout(10):
        while seen < 40_000 * number:
            seen += (await reader.read(65536)).count(b"x")
    writer.close()


async def test_the_usage_event_that_nobody_asked_for_leaves_no_trace(relayed_edge: RelayedEdge) -> None:
    reader, writer, relay = await begun_stream(relayed_edge)
    for sequence, chunk in enumerate((chat_event({}, "stop"), usage_event(), DONE), start=1):
        relay.receive(sequence, chunk, 0.0)
        await asyncio.sleep(0)
    relay.end(4, EndReason.COMPLETED, "")
    seen = await read_until(reader, b"\r\n0\r\n\r\n")
    assert seen.endswith(b"e\r\n" + DONE + b"\r\n0\r\n\r\n")
    assert b"usage" not in seen
    writer.close()


async def test_tokens_for_a_client_that_has_just_gone_are_no_failure(relayed_edge: RelayedEdge) -> None:
    _, writer, relay = await begun_stream(relayed_edge)
    writer.transport.abort()
    async with asyncio.timeout(10):
        for sequence in range(1, 1_000_000):
            relay.receive(sequence, b": x\n\n", 0.0)
            if relayed_edge.released.is_set():
                break
            await asyncio.sleep(0)
    assert relay._error is None


async def test_an_early_sender_gets_the_whole_answer(relayed_edge: RelayedEdge) -> None:
    reader, writer, relay = await begun_stream(relayed_edge)

    async def keep_sending() -> None:
        writer.write(request_bytes("POST", CHAT, headers={"content-length": "100000000"}))
        while True:
            writer.write(b"x" * 50_000)
            await asyncio.sleep(0.001)

    sending = asyncio.ensure_future(keep_sending())
    await asyncio.sleep(0.05)
    pieces = [b": %d " % number + b"y" * 10_000 + b"\n\n" for number in range(200)]
    for sequence, piece in enumerate((*pieces, DONE), start=1):
        relay.receive(sequence, piece, 0.0)
    relay.end(len(pieces) + 2, EndReason.COMPLETED, "")
    async with asyncio.timeout(10):
        await relayed_edge.released.wait()
        await asyncio.sleep(0.1)
        seen = await reader.read()
    sending.cancel()
    assert [piece for piece in pieces if piece not in seen] == []
    assert seen.endswith(DONE + b"\r\n0\r\n\r\n")
    writer.transport.abort()


async def test_who_sends_too_early_without_end_and_reads_nothing_is_dropped(
    relayed_edge: RelayedEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "UNREAD_BODY_BYTES_MAX", 200_000)
    reader, writer, relay = await begun_stream(relayed_edge)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    for sequence in range(1, 1000):
        relay.receive(sequence, b": " + b"x" * 40_000 + b"\n\n", 0.0)
        if relay._buffer:
            break
    early = request_bytes("POST", CHAT, b"x" * 400_000)
    for start in range(0, len(early), 1000):
        writer.write(early[start : start + 1000])
    async with asyncio.timeout(10):
        await relayed_edge.released.wait()
    writer.transport.abort()


async def test_bare_line_ends_between_requests_keep_no_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "IDLE_SECONDS_MAX", 0.2)
    async with relayed_edge_of() as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(request_bytes("GET", "/health"))
        await read_until(reader, b'{"status":"ok"}')
        writer.write(b"\r\n")
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()


async def test_a_body_that_is_no_body_is_refused_at_once(relayed_edge: RelayedEdge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", relayed_edge.port)
    head = request_bytes("POST", CHAT).replace(b"content-length: 0", b"transfer-encoding: chunked")
    writer.write(head + b"no size\r\n")
    assert (await asyncio.wait_for(reader.read(), 2)).startswith(b"HTTP/1.1 400 ")
    writer.close()
