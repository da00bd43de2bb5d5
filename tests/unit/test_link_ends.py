"""The end of a link is never missed, at whatever moment its call is cancelled: gRPC does so by itself once the node is gone."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_protocol import codec
from potluck_protocol.clock import SystemClock
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import GoodbyeReason, NodeId
from tests.support.request_queue import Front, hello_of


class Call:
    """A link's call whose node says what it is told to say, and then nothing more."""

    def __init__(self, *frames):
        self.frames: asyncio.Queue = asyncio.Queue()
        self.frames_of_node = frames

    async def read(self):
        return await self.frames.get()

    async def write(self, frame):
        pass

    def go(self):
        for frame in self.frames_of_node:
            self.frames.put_nowait(frame)


async def after(turn_count: int, *frames):
    """The session, so many turns of the loop after the node has said this and its call was cancelled."""
    front = Front()
    session, outbox, _ = await front.links.connect(hello_of(NodeId("a")))
    call, servicer = Call(*frames), LinkServicer(front.links, front.directory, SystemClock())
    carrying = asyncio.ensure_future(servicer._carry(call, session, outbox, node_pb2.CoordinatorFrame()))
    for _ in range(5):
        await asyncio.sleep(0)
    call.go()
    for _ in range(turn_count):
        await asyncio.sleep(0)
    carrying.cancel()
    await asyncio.gather(carrying, return_exceptions=True)
    return front, session


@pytest.mark.parametrize("turn_count", range(10))
async def test_a_stream_that_ends_is_a_lost_link_from_then_on(turn_count):
    front, session = await after(turn_count, grpc.aio.EOF)
    assert session.outbox is None
    assert session.link_lost_at is not None
    assert front.links.session(session.node_id) is session, "its grace has begun"


@pytest.mark.parametrize("turn_count", range(3, 10))
async def test_a_goodbye_that_was_read_ends_the_session(turn_count):
    front, session = await after(
        turn_count, node_pb2.NodeFrame(epoch=1, goodbye=codec.goodbye_message(GoodbyeReason.STOPPING)), grpc.aio.EOF
    )
    assert front.links.session(session.node_id) is None
