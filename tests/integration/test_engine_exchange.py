"""A request to an engine and its answer over real sockets: however bytes are cut and wherever they end, and which connections are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node import engine_exchange
from potluck_node.engine_exchange import AnswerBrokenError, EngineAnswer, EngineConnections, EngineUnreachableError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
EVENTS = (b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n")
WHOLE = b"".join(EVENTS)
ALL = 1 << 20

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


ENDINGS = {
    "chunks": CHUNKED + chunked(*EVENTS),
    "a length": HEAD + b"content-length: %d\r\n\r\n" % len(WHOLE) + WHOLE,
    "its connection's end": HEAD + b"connection: close\r\n\r\n" + WHOLE,
    "chunks, behind a word that it is to come": b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + chunked(*EVENTS),
}


class RawEngine:
    """Answers every request with what its script writes."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connection_count = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self.script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def raw_engine(script: Script) -> AsyncIterator[tuple[RawEngine, EngineConnections]]:
    engine, connections = RawEngine(script), EngineConnections()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/engine"
    try:
        yield engine, connections
    finally:
        connections.close()
        server.close()


def saying(*pieces: bytes, hang_up: bool = False) -> Script:
    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if hang_up:
            writer.close()

    return script


async def asked(engine: RawEngine, connections: EngineConnections) -> EngineAnswer:
    return await connections.ask(engine.url, "/v1/chat/completions", {"authorization": "Bearer secret"}, b'{"model": "soup"}')


async def read_into(pieces: list[bytes], answer: EngineAnswer) -> None:
    async with asyncio.timeout(10):
        while piece := await answer.read(ALL):
            pieces.append(piece)


async def whole(answer: EngineAnswer) -> bytes:
    pieces: list[bytes] = []
    await read_into(pieces, answer)
    answer.close()
    return b"".join(pieces)


def cut_at(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({place % len(data) for place in places}), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges) if begin != end]


@pytest.mark.parametrize("ending", ENDINGS)
@given(places=st.lists(st.integers(0, 10**6), max_size=12), bytes_max=st.integers(1, 64), takes=st.lists(st.booleans(), max_size=8))
async def test_an_answer_is_the_same_however_it_is_cut_ended_and_read(ending: str, places, bytes_max, takes):
    taken, answers = [], iter([*takes, *[True] * 100])

    def take(piece: bytes) -> bool:
        if goes := next(answers):
            taken.append(piece)
        return goes

    parts: list[bytes] = []
    async with raw_engine(saying(*cut_at(ENDINGS[ending], places), hang_up="connection" in ending)) as (engine, connections):
        answer = await asked(engine, connections)
        assert (answer.http_status, answer.content_type) == (200, "text/event-stream")
        async with asyncio.timeout(10):
            while True:
                piece = await answer.read(bytes_max, take)
                parts += [*taken, piece]
                taken.clear()
                assert len(piece) <= bytes_max
                if not piece:
                    break
        answer.close()
    assert b"".join(parts) == WHOLE


async def test_a_request_says_where_it_goes_and_how_long_it_is():
    async with raw_engine(saying(ENDINGS["a length"])) as (engine, connections):
        await whole(await asked(engine, connections))
    host = engine.url.removeprefix("http://").removesuffix("/engine")
    assert engine.requests == [
        (
            f"POST /engine/v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer secret\r\n"
            'content-length: 17\r\n\r\n{"model": "soup"}'
        ).encode()
    ]


@pytest.mark.parametrize(
    ("said", "connection_count"),
    [
        (ENDINGS["a length"], 1),
        (ENDINGS["chunks"], 1),
        (CHUNKED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + chunked(*EVENTS), 2),
        (ENDINGS["a length"] + ENDINGS["a length"].replace(b"one", b"six"), 2),
        (ENDINGS["a length"] + b"HTTP/1.1 200", 2),
    ],
    ids=["a length", "chunks", "an engine that closes", "an answer too many", "the beginning of one"],
)
async def test_a_connection_is_used_again_unless_something_is_left_on_it(said: bytes, connection_count: int):
    async with raw_engine(saying(said)) as (engine, connections):
        for _ in range(2):
            assert await whole(await asked(engine, connections)) == WHOLE
            await asyncio.sleep(0.02)
    assert engine.connection_count == connection_count


async def test_two_at_a_time_have_a_connection_each_and_both_are_kept():
    async with raw_engine(saying(ENDINGS["chunks"])) as (engine, connections):
        for _ in range(3):
            answers = await asyncio.gather(asked(engine, connections), asked(engine, connections))
            assert await asyncio.gather(*map(whole, answers)) == [WHOLE, WHOLE]
    assert engine.connection_count == 2


async def test_an_idle_connection_is_not_kept_for_longer_than_engines_keep_theirs(monkeypatch):
    monkeypatch.setattr(engine_exchange, "IDLE_SECONDS_MAX", 0.01)
    async with raw_engine(saying(ENDINGS["chunks"])) as (engine, connections):
        for _ in range(2):
            assert await whole(await asked(engine, connections)) == WHOLE
            await asyncio.sleep(0.1)
    assert engine.connection_count == 2


async def test_one_that_the_engine_has_closed_is_not_asked():
    async with raw_engine(saying(ENDINGS["chunks"], hang_up=True)) as (engine, connections):
        for _ in range(2):
            assert await whole(await asked(engine, connections)) == WHOLE
            await asyncio.sleep(0.05)
    assert engine.connection_count == 2


async def test_a_connection_on_which_a_request_still_waits_to_be_sent_is_not_kept():
    answered = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ENDINGS["a length"])
        await answered.wait()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=1024)
    connections, url = EngineConnections(), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(10):
        for _ in range(2):
            answer = await connections.ask(url, "/v1/completions", {}, bytes(32 << 20))
            assert await whole(answer) == WHOLE
    answered.set()
    server.close()


@pytest.mark.parametrize(
    ("said", "before"),
    [
        (b"", None),
        (HEAD, None),
        (b"x" * 100, None),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * engine_exchange.HEAD_BYTES_MAX * 2, None),
        (CHUNKED + chunked(EVENTS[0])[:-5], EVENTS[0]),
        (CHUNKED + b"6\r\n123", b"123"),
        (CHUNKED + chunked(EVENTS[0])[:-5] + b"no number\r\n", EVENTS[0]),
        (HEAD + b"content-length: 50\r\n\r\n" + WHOLE, WHOLE),
    ],
    ids=["nothing", "half a head", "no HTTP", "an endless head", "no last chunk", "half a chunk", "no chunk", "less than its length"],
)
async def test_an_answer_that_breaks_off_does_so_behind_all_that_was_said(said: bytes, before: bytes | None):
    async with raw_engine(saying(said, hang_up=True)) as (engine, connections):
        if before is None:
            with pytest.raises(AnswerBrokenError):
                await asked(engine, connections)
            return
        read: list[bytes] = []
        with pytest.raises(AnswerBrokenError):
            await read_into(read, await asked(engine, connections))
        assert b"".join(read) == before


async def test_where_nobody_listens_nothing_was_sent():
    async with raw_engine(saying()) as (engine, _):
        url = engine.url
    with pytest.raises(EngineUnreachableError):
        await EngineConnections().ask(url, "/v1/completions", {}, b"{}")


async def test_a_reader_that_pauses_holds_its_engine_up():
    written, piece = [0], b"x" * 65_536

    async def pour(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % (1024 * len(piece)))
        for _ in range(1024):
            writer.write(piece)
            await writer.drain()
            written[0] += len(piece)

    async with raw_engine(pour) as (engine, connections):
        answer = await asked(engine, connections)
        before = -1
        while before != written[0]:
            before = written[0]
            await asyncio.sleep(0.2)
        assert written[0] < 16 << 20, "what the kernel's buffers take"
        assert len(await whole(answer)) == 1024 * len(piece)


@pytest.mark.parametrize("moment", ["before its head", "in its middle"])
async def test_closing_hangs_up_on_the_engine(moment: str):
    hung_up = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"" if moment == "before its head" else CHUNKED + chunked(EVENTS[0])[:-5])
        await reader.read()
        hung_up.set()

    async with raw_engine(wait) as (engine, connections), asyncio.timeout(10):
        asking = asyncio.ensure_future(asked(engine, connections))
        if moment == "in its middle":
            answer = await asking
            assert await answer.read(ALL) == EVENTS[0]
            answer.close()
        else:
            while not engine.requests:
                await asyncio.sleep(0.001)
            asking.cancel()
        await hung_up.wait()


async def test_what_goes_wrong_in_taking_is_the_readers_even_at_the_answers_end():
    def take(_piece: bytes) -> bool:
        raise ZeroDivisionError

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        await asyncio.sleep(0.05)
        writer.write(chunked(*EVENTS))

    async with raw_engine(slowly) as (engine, connections):
        answer = await asked(engine, connections)
        with pytest.raises(ZeroDivisionError):
            await answer.read(ALL, take)
