"""What a request leaves behind once it is over: nothing that only Python's collector would find, for it looks seldom."""

from __future__ import annotations

import asyncio
import gc

from potluck_coordinator.domain.ledger import LedgerOutcome
from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_protocol.v1 import node_pb2
from tests.support.http_edge import CHAT_DOCUMENT, CHAT_END, CHAT_STREAM
from tests.support.request_path import request_by
from tests.support.request_queue import MODEL, Front

COUNT = 20


class Node:
    """A node that answers at once, each frame as it would come from the wire."""

    def __init__(self, front: Front, session, pieces: tuple[bytes, ...]) -> None:
        self._servicer = LinkServicer(front.links, front.directory, front.clock)
        self._front, self._session, self._pieces = front, session, pieces

    async def answer(self) -> None:
        while True:
            for start in (await self._session.outbox.take()).starts:
                self._send(start.attempt_id)

    def _send(self, attempt_id: str) -> None:
        frame = node_pb2.NodeFrame(epoch=self._session.epoch)
        for number, piece in enumerate(self._pieces):
            chunk = frame.chunks.add(attempt_id=attempt_id, sequence=number, data=piece)
            if not number:
                chunk.head.http_status = 200
        frame.ends.add(attempt_id=attempt_id, sequence=len(self._pieces), reason=node_pb2.END_REASON_COMPLETED)
        self._servicer._take_chunks(frame, self._session, self._session.outbox, self._front.clock.monotonic_seconds())
        self._servicer._take_ends(frame, self._session)


async def ask(front: Front, *, stream: bool) -> bytes:
    answer = await front.requests.begin(request_by(model_id=MODEL, stream=stream, completion_tokens_max=10))
    data = b""
    while (piece := await answer.next_data()) is not None:
        data += piece
    await answer.close()
    return data


async def circles_left(*, stream: bool) -> int:
    """What the collector finds after so many requests."""
    front = Front()
    front.directory.apply = lambda commands: asyncio.sleep(0, tuple(LedgerOutcome.APPLIED for _ in commands))
    paying = asyncio.ensure_future(front.requests.dispatching._books.ledger.run())
    node = Node(front, await front.joined("node"), (*CHAT_STREAM, CHAT_END) if stream else (CHAT_DOCUMENT,))
    answering = asyncio.ensure_future(node.answer())
    try:
        assert b"Hello" in await ask(front, stream=stream)
        await asyncio.sleep(0.05)
        gc.collect()
        gc.disable()
        for _ in range(COUNT):
            await ask(front, stream=stream)
        await asyncio.sleep(0.05)
        return gc.collect()
    finally:
        gc.enable()
        for task in (paying, answering):
            task.cancel()
        await front.stop()


async def test_a_whole_answer_leaves_no_circles():
    assert await circles_left(stream=False) < COUNT


async def test_a_streamed_answer_leaves_no_circles():
    assert await circles_left(stream=True) < COUNT
