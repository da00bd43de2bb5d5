"""Requests that engines die of, seen by the gateway: refused to everyone after the second death, while those beside them are answered.

Real gateway, directory and links; the nodes' words are the test's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import EndReason
from tests.support.coordinator import Coordinator, running_coordinator
from tests.support.raw_node import RawNode, enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, read_all, request_of, token

KILLER, INNOCENT, OTHER = (b'{"messages":["%s"]}' % name for name in (b"killer", b"innocent", b"other"))


@asynccontextmanager
async def nodes(folder, count: int) -> AsyncIterator[tuple[Coordinator, list[RawNode]]]:
    """A pool with so many nodes of two slots each."""
    async with running_coordinator(folder) as coordinator, AsyncExitStack() as links:
        linked = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator))) for _ in range(count)]
        for node in linked:
            await node.hello()
        yield coordinator, linked


async def asked(coordinator: Coordinator, body: bytes) -> asyncio.Future:
    return asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator, body=body)))


async def started(linked: list[RawNode], body: bytes, number: int = 0) -> tuple[RawNode, node_pb2.StartAttempt]:
    """Where the request is placed, the first time or a later one."""
    async with asyncio.timeout(5):
        while True:
            found = [(node, start) for node in linked for start in node.starts() if start.body == body]
            if len(found) > number:
                return found[-1]
            await asyncio.sleep(0.01)


async def die(node: RawNode, *starts: node_pb2.StartAttempt, reason: EndReason = EndReason.ENGINE_FAILED) -> None:
    """The node's engine has died with these attempts."""
    number = codec.END_REASON_NUMBER[reason]
    await node.send(
        ends=[
            node_pb2.AttemptEnd(attempt_id=start.attempt_id, reason=number, detail="the engine ended (crashed)", blamed=True)
            for start in starts
        ]
    )


async def answer_in_full(node: RawNode, start: node_pb2.StartAttempt, asking: asyncio.Future) -> None:
    await node.chunk(start.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 1)
    assert await read_all(await asyncio.wait_for(asking, 5))


async def failure_of(asking: asyncio.Future) -> PotluckError:
    with pytest.raises(PotluckError) as failure:
        await asyncio.wait_for(asking, 5)
    return failure.value


async def test_a_request_that_kills_two_engines_anywhere_is_refused_to_everyone(tmp_path):
    async with nodes(tmp_path, 2) as (coordinator, linked):
        for number, code in enumerate((ErrorCode.ENGINE_FAILED, ErrorCode.REQUEST_REFUSED)):
            asking = await asked(coordinator, KILLER)
            node, start = await started(linked, KILLER, number)
            await die(node, start)
            failure = await failure_of(asking)
            assert failure.code is code
        assert (await failure_of(await asked(coordinator, KILLER))).code is ErrorCode.REQUEST_REFUSED
        assert sum(len(node.starts()) for node in linked) == 2, "no third engine is asked"
        asking = await asked(coordinator, INNOCENT)
        await answer_in_full(*await started(linked, INNOCENT), asking)


async def test_what_the_client_is_told_of_a_death_names_it(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        await die(*await started(linked, KILLER))
        failure = await failure_of(asking)
        assert failure.message == "The engine broke the answer off: the engine ended (crashed)"
        assert not failure.spec.retry_is_safe


async def test_suspects_are_kept_apart_so_that_the_next_death_tells_them_apart(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        (node,) = linked
        asking = [await asked(coordinator, body) for body in (KILLER, INNOCENT)]
        starts = [(await started(linked, body))[1] for body in (KILLER, INNOCENT)]
        await die(node, *starts)
        for one in asking:
            assert (await failure_of(one)).code is ErrorCode.ENGINE_FAILED
        # Both come again. One has the node to itself; the other waits, and one that nobody suspects passes it by.
        again = await asked(coordinator, KILLER)
        _, killing = await started(linked, KILLER, 1)
        innocent = await asked(coordinator, INNOCENT)
        other = await asked(coordinator, OTHER)
        await answer_in_full(*await started(linked, OTHER), other)
        assert sum(start.body == INNOCENT for start in node.starts()) == 1
        await die(node, killing)
        assert (await failure_of(again)).code is ErrorCode.REQUEST_REFUSED
        await answer_in_full(*await started(linked, INNOCENT, 1), innocent)
        asking = [await asked(coordinator, INNOCENT) for _ in range(2)]
        await started(linked, INNOCENT, 3)
        for one in asking:
            one.cancel()


async def test_a_suspect_that_is_answered_in_full_is_none_any_more(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        (node,) = linked
        asking = [await asked(coordinator, body) for body in (KILLER, INNOCENT)]
        await die(node, *[(await started(linked, body))[1] for body in (KILLER, INNOCENT)])
        for one in asking:
            await failure_of(one)
        innocent = await asked(coordinator, INNOCENT)
        await answer_in_full(*await started(linked, INNOCENT, 1), innocent)
        killing = await asked(coordinator, KILLER)
        await started(linked, KILLER, 1)
        beside = await asked(coordinator, INNOCENT)
        _, start = await started(linked, INNOCENT, 2)
        await die(node, start)
        assert (await failure_of(beside)).code is ErrorCode.ENGINE_FAILED, "it was answered since the last death"
        assert (await failure_of(killing)).code is ErrorCode.REQUEST_REFUSED if killing.done() else True
        killing.cancel()


async def test_one_death_counts_once_however_its_ends_arrive(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        (node,) = linked
        asking = [await asked(coordinator, body) for body in (KILLER, INNOCENT)]
        starts = [(await started(linked, body))[1] for body in (KILLER, INNOCENT)]
        for start, one in zip(starts, asking, strict=True):
            await die(node, start)
            assert (await failure_of(one)).code is ErrorCode.ENGINE_FAILED


async def test_a_nodes_own_refusal_ends_the_request_and_condemns_it_nowhere_else(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        node, start = await started(linked, KILLER)
        await die(node, start, reason=EndReason.REFUSED)
        assert (await failure_of(asking)).code is ErrorCode.REQUEST_REFUSED
        asking = await asked(coordinator, KILLER)
        await answer_in_full(*await started(linked, KILLER, 1), asking)


async def test_an_end_without_blame_is_nobodys_death(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        for number in range(4):
            asking = await asked(coordinator, KILLER)
            node, start = await started(linked, KILLER, number)
            await node.end(start.attempt_id, 0, EndReason.ENGINE_FAILED)
            assert (await failure_of(asking)).code is ErrorCode.ENGINE_FAILED
