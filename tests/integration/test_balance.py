"""Nodes that a gateway lets go since another one has fewer: they go where somebody is, and nowhere else."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from potluck_coordinator.domain.gateways import SURPLUS_COUNT_MIN
from potluck_protocol import codec
from potluck_protocol.values import GoodbyeReason
from tests.support.coordinator import running_gateways
from tests.support.raw_node import enrol, raw_link

pytestmark = pytest.mark.timeout(60)

NODE_COUNT = 3 * SURPLUS_COUNT_MIN


async def surplus_count(gateway) -> int:
    """What the directory says of it now."""
    return await gateway._links.report({})


async def test_nodes_are_let_go_to_a_gateway_that_has_fewer_and_to_none_that_has_just_died(tmp_path):
    async with running_gateways(tmp_path) as (here, there), AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(raw_link(here, await enrol(here))) for _ in range(NODE_COUNT)]
        for node in nodes:
            await node.hello()
        async with asyncio.timeout(20):
            while len(here.gateway._links) == NODE_COUNT:
                await asyncio.sleep(0.05)
        gone = next(node for node in nodes if here.gateway._links.session(node.credentials.node_id) is None)
        frame = await gone.wait_for(lambda frame: frame.HasField("goodbye"))
        assert codec.goodbye_value(frame.goodbye)[0] is GoodbyeReason.COORDINATOR_STOPPING

        await there.gateway.stop()
        async with asyncio.timeout(4):
            while here.gateway._peers.has_met(here.gateway._snapshot.gateways):  # until it has seen the link end
                await asyncio.sleep(0.01)
        left_count = len(here.gateway._links)
        async with asyncio.timeout(4):
            while await surplus_count(here.gateway) == 0:  # until the directory has counted them anew, and it still takes `there` for there
                await asyncio.sleep(0.05)
        await here.gateway._report()
        assert len(here.gateway._links) == left_count
