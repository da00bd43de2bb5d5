"""What an agent carries out of the frames that reach it: those of its own epoch, each start once, and a heartbeat when asked for one.

And that it leaves no connection behind.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from potluck_protocol.codec import goodbye_message
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import GoodbyeReason
from tests.support.link_coordinator import LinkCoordinator, link_coordinator
from tests.support.node_engine import DirectedEngine, directed_engine, wired_node


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[LinkCoordinator]:
    async with link_coordinator(tmp_path) as running:
        yield running


@pytest.fixture
async def engine() -> AsyncIterator[DirectedEngine]:
    async with directed_engine() as running:
        yield running


async def test_frames_of_another_epoch_and_starts_that_come_again_are_dropped(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url) as node:
        link = await coordinator.next_link()
        await link.welcome(epoch=3)
        start = node_pb2.StartAttempt(attempt_id="a1", replica_id="r1", endpoint=1, body=b"{}", stream=True, window_bytes=65_536)
        for epoch in (2, 4):
            await link.send(epoch=epoch, starts=[start])
        await link.send(epoch=3, beat_now=True)
        await link.until(lambda: sum(frame.HasField("heartbeat") for frame in link.frames) > 1)
        assert node.attempts.in_flight == ()
        await link.send(epoch=3, starts=[start])
        talk = await engine.next_conversation()
        for epoch in (2, 4):
            await link.send(epoch=epoch, cancels=[node_pb2.CancelAttempt(attempt_id="a1")])
        talk.say(b'data: {"n":1}\n\n')
        talk.finish()
        end = await link.until_end("a1")
        assert end.reason == node_pb2.END_REASON_COMPLETED
        await link.acknowledge("a1", end.sequence + 1)
        await link.until(lambda: node.attempts.in_flight == () or None) if node.attempts.in_flight else None
        for _ in range(3):
            await link.send(epoch=3, starts=[start])
        await link.start("a2")
        await engine.next_conversation()
        assert node.attempts.in_flight == ("a2",)
        assert engine.conversations.empty()


async def test_a_heartbeat_that_is_asked_for_comes_at_once_and_each_has_a_number_of_its_own(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None):
        link = await coordinator.next_link()
        await link.welcome(heartbeat_busy_ms=60_000, heartbeat_idle_ms=60_000)

        def numbers() -> list[int]:
            return [frame.heartbeat.number for frame in link.frames if frame.HasField("heartbeat")]

        for count in (1, 2, 3):
            await link.send(beat_now=True)
            await link.until(lambda count=count: len(numbers()) >= count, 2)
        assert numbers() == sorted(set(numbers()))
        assert numbers()[0] > 0


async def test_a_node_that_is_told_of_another_gateway_while_its_link_stands_goes_there(coordinator, tmp_path) -> None:
    async with link_coordinator(tmp_path) as another, wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        own, others = (f"127.0.0.1:{one.link_port}" for one in (coordinator, another))
        await link.welcome()
        await link.send(link_addresses=[own, others])
        await link.send(goodbye=goodbye_message(GoodbyeReason.COORDINATOR_STOPPING))
        link.close()
        assert (await another.next_link()).hello.node_id == node.folder.identity().node_id
        assert coordinator.links.empty()


def sockets_to(port: int) -> int:
    """This process's own ends of connections to that port."""
    return sum(bool(one.raddr) and one.raddr.port == port for one in psutil.Process().net_connections("tcp"))


async def test_a_connection_is_closed_when_the_link_has_left_it_and_not_when_rubbish_is_collected(coordinator, tmp_path) -> None:
    gc.disable()
    try:
        async with wired_node(coordinator, tmp_path, None) as node:
            former = await coordinator.next_link()
            await former.welcome()
            await former.until(lambda: former.frames)
            for _ in range(3):
                node.link.introduce_again()
                link = await coordinator.next_link()
                await former.send(goodbye=goodbye_message(GoodbyeReason.REPLACED))
                former.close()
                await link.welcome()
                await link.until(lambda link=link: link.frames)
                former = link
            async with asyncio.timeout(5):
                while sockets_to(coordinator.link_port) > 1:
                    await asyncio.sleep(0.01)
            assert await node.link.say_goodbye(GoodbyeReason.STOPPING)
            async with asyncio.timeout(5):
                while sockets_to(coordinator.link_port):
                    await asyncio.sleep(0.01)
    finally:
        gc.enable()
