"""What another gateway's call counts, whatever becomes of this gateway's own link to that one."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway import forward_servicer
from potluck_coordinator.gateway.forward_servicer import ForwardServicer
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.peers import Peers, _Peer
from potluck_protocol.v1 import common_pb2, gateway_pb2
from tests.support.books import MovableClock

HERE, THERE = 1, 2


class Call:
    """A call as gRPC would have it; what it is given is read."""

    def __init__(self) -> None:
        self.frames = asyncio.Queue()
        self.task = None
        self.numbers = itertools.count()
        self.was_read = asyncio.Event()

    async def send_initial_metadata(self, _: object) -> None:
        pass

    async def read(self) -> object:
        if self.frames.empty():
            self.was_read.set()
        return await self.frames.get()

    async def write(self, _: object) -> None:
        pass

    async def start(self) -> None:
        """One more attempt, for a node that is not here."""
        frame = gateway_pb2.ForwardFrame()
        start = frame.starts.add(node_id="elsewhere")
        start.start.attempt_id, start.start.endpoint = f"attempt-{next(self.numbers)}", common_pb2.ENDPOINT_CHAT_COMPLETIONS
        self.was_read.clear()
        self.frames.put_nowait(frame)
        await self.was_read.wait()

    async def end(self) -> None:
        self.frames.put_nowait(None)
        await self.task


@pytest.fixture
def peers():
    clock = MovableClock()
    return Peers(HERE, None, Links(None, LivenessLimits(), clock, lambda: None), clock, lambda: None)


@asynccontextmanager
async def calls(peers, monkeypatch):
    monkeypatch.setattr(forward_servicer, "calling_gateway", lambda: THERE)
    servicer = ForwardServicer(peers._links, peers, peers._clock, lambda: None)

    async def begin() -> Call:
        call = Call()
        call.task = asyncio.create_task(servicer.Forward(None, call))
        await asyncio.sleep(0)
        return call

    yield begin


async def test_a_call_is_counted_on_after_this_gateway_has_parted_from_the_other(peers, monkeypatch):
    async with calls(peers, monkeypatch) as begin:
        peers._peers[THERE] = _Peer("there:1")
        call = await begin()
        await call.start()
        # It stood still for long enough that the directory names it no more, and is back before its link to here broke.
        await peers.meet({})
        assert THERE not in peers._peers
        await call.start()
        assert not call.task.done()
        assert peers.starts_seen == {THERE: 2}
        await call.end()
        assert peers.starts_seen == {}


async def test_an_older_calls_end_leaves_the_newer_ones_count(peers, monkeypatch):
    async with calls(peers, monkeypatch) as begin:
        older = await begin()
        await older.start()
        newer = await begin()
        await newer.start()
        await older.end()
        assert peers.starts_seen == {THERE: 1}
        await newer.end()
        assert peers.starts_seen == {}
