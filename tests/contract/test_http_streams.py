"""A stream on its way from the relay to the socket: nothing lost, whatever else its client does on the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from potluck_coordinator.gateway import http_server
from potluck_coordinator.gateway.relay import AnswerHead
from potluck_protocol.values import EndReason
from tests.support.http_edge import DONE, chat_body, chat_event, read_until, request_bytes
from tests.support.relayed_edge import RelayedEdge, relayed_edge_of

CHAT = "/v1/chat/completions"


@pytest.fixture
async def relayed_edge() -> AsyncIterator[RelayedEdge]:
    async with relayed_edge_of() as running:
        yield running


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
        await read_until(reader, token)
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
    reader, writer = await asyncio.open_connection("127.0.0.1", relayed_edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    relay = await relayed_edge.next_relay()
    relay.head = AnswerHead(200, "text/event-stream")
    relay.receive(0, chat_event({"content": "t"}), 0.0)
    await read_until(reader, b'"t"')
    writer.write(early)
    await asyncio.sleep(0.05)
    writer.close()
    async with asyncio.timeout(1):
        await relayed_edge.released.wait()


async def test_who_sends_too_early_without_end_is_dropped(relayed_edge: RelayedEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UNREAD_BODY_BYTES_MAX", 200_000)
    _, writer = await asyncio.open_connection("127.0.0.1", relayed_edge.port)
    early = request_bytes("POST", CHAT, b"x" * 400_000)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    await relayed_edge.next_relay()
    for start in range(0, len(early), 1000):
        writer.write(early[start : start + 1000])
    async with asyncio.timeout(2):
        await relayed_edge.released.wait()
    writer.close()


async def test_tokens_reach_a_client_that_reads_without_anybodys_turn(relayed_edge: RelayedEdge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", relayed_edge.port)
    writer.write(request_bytes("POST", CHAT, chat_body(stream=True)))
    relay = await relayed_edge.next_relay()
    relay.head = AnswerHead(200, "text/event-stream")
    relay.receive(0, chat_event({"content": "first"}), 0.0)
    await read_until(reader, b"first")
    large = b": " + b"x" * 40_000 + b"\n\n"
    for number in range(1, 1000):
        relay.receive(number, large, 0.0)
        if relay._buffer:
            break
    # Nothing has had a turn since. The connection took what it takes; the rest waits for the reader, and the node will wait for that.
    assert 1 < number < 999
    seen = 0
    async with asyncio.timeout(5):
        while seen < 40_000 * number:
            seen += (await reader.read(65536)).count(b"x")
    writer.close()
