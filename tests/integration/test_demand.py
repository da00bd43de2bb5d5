"""What the gateway sees of demand and use, and what the directory plans of it: a real coordinator, and a node with room for one model."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.domain.planning.words import IDLE_SECONDS
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EngineState, Heartbeat, ModelId, NodeState
from tests.support.coordinator import TINY, TINY_CATALOGUE, running_coordinator
from tests.support.open_pool import ShiftedClock
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, read_all, request_of

WANTED = ModelId("wanted")
LARGE = TINY_CATALOGUE.replace("size_bytes = 10", "size_bytes = 4000000000")
CATALOGUE = LARGE + LARGE.replace('"tiny"', '"wanted"').replace("tiny.json", "wanted.json")


@asynccontextmanager
async def pool_with_room_for_one(folder):
    """`tiny` runs and `wanted` finds no room; the clock is the test's to shift."""
    catalogue = folder / "two.toml"
    catalogue.write_text(CATALOGUE)
    clock = ShiftedClock()
    async with running_coordinator(folder / "pool", clock, catalogue_file=catalogue) as coordinator:
        for record in await coordinator.directory.catalogue.list_deployments():
            await coordinator.directory.catalogue.undeploy(record.deployment.model_id)
        for model_id in (TINY, WANTED):
            await coordinator.directory.catalogue.deploy(Deployment(model_id, 1))
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            assert await wished(coordinator, node, {TINY})
            yield coordinator, node, clock


async def wished(coordinator, node, model_ids, seconds_max=15):
    """Whether so much is wished of the node before long."""
    async with asyncio.timeout(seconds_max):
        while {engine.model.model_id for engine in _desired(coordinator, node)} != model_ids:
            await asyncio.sleep(0.02)
    return True


def _desired(coordinator, node):
    return coordinator.directory.pool._board.snapshot.desired[node.credentials.node_id].engines


async def refused(coordinator):
    """A request for the model without a replica."""
    request = replace(await request_of(coordinator), model_id=WANTED)
    with pytest.raises(PotluckError) as failure:
        await coordinator.gateway.requests.begin(request)
    assert failure.value.code is ErrorCode.NO_CAPACITY


async def say(node, *engines):
    await node.send(heartbeat=codec.heartbeat_message(Heartbeat(1, NodeState.SERVING, engines, 1 << 40)))


async def test_requests_for_a_model_without_a_replica_bring_it_one_in_the_place_of_an_idle_one(tmp_path):
    async with pool_with_room_for_one(tmp_path) as (coordinator, node, clock):
        clock.shift_seconds += IDLE_SECONDS + 1
        await node.beat()
        await refused(coordinator)
        assert await wished(coordinator, node, set())
        await say(node)
        assert await wished(coordinator, node, {WANTED})
        (demand,) = [one for one in await coordinator.directory.catalogue.list_deployments() if one.deployment.model_id == WANTED]
        assert (demand.waiting_request_count, demand.starting_count) == (1, 1)
        await say(node, replace(node.status, replica_id=f"{node.credentials.node_id}/wanted", model_id=WANTED))
        request = replace(await request_of(coordinator), model_id=WANTED)
        answering = asyncio.ensure_future(_begun(coordinator, request))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, b"data: {}\n\n")
        await (await asyncio.wait_for(answering, 5)).close()


async def _begun(coordinator, request):
    """Asks until the gateway has heard that the replica answers."""
    while True:
        try:
            return await coordinator.gateway.requests.begin(request)
        except PotluckError as error:
            if error.code is not ErrorCode.NO_CAPACITY:
                raise
            await asyncio.sleep(0.05)


async def test_a_replica_that_answered_between_two_plans_is_not_taken_for_an_idle_one(tmp_path):
    async with pool_with_room_for_one(tmp_path) as (coordinator, node, clock):
        clock.shift_seconds += IDLE_SECONDS - 2
        await node.beat()
        answer, start = await begin(coordinator, node)
        await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        await coordinator.gateway._links.report({})  # as each second
        clock.shift_seconds += 10
        await node.beat()
        await refused(coordinator)
        nodes = coordinator.directory.nodes
        async with asyncio.timeout(10):
            while WANTED not in (await nodes.standings())[1]:
                await asyncio.sleep(0.02)
        await nodes.refresh()
        assert {engine.model.model_id for engine in _desired(coordinator, node)} == {TINY}


async def test_what_nobody_deployed_is_no_demand_however_often_it_is_asked_for(tmp_path):
    async with pool_with_room_for_one(tmp_path) as (coordinator, _, _):
        await coordinator.directory.catalogue.undeploy(WANTED)
        await refused(coordinator)
        assert coordinator.gateway.requests.waiting_counts == {WANTED: 1}
        await coordinator.directory.nodes.report([], coordinator.gateway.requests.waiting_counts, gateway_epoch=1)
        assert (await coordinator.directory.nodes.standings())[1] == {}


async def test_a_node_that_names_models_of_its_own_is_not_remembered_for_them(tmp_path):
    async with pool_with_room_for_one(tmp_path) as (coordinator, node, _):
        invented = [
            replace(node.status, replica_id=f"r{number}", model_id=f"m{number}", state=EngineState.REFUSED, failure="x")
            for number in range(10)
        ]
        words = "\x1b[2Jno room on the card, " * 12
        await say(node, *invented, replace(node.status, state=EngineState.REFUSED, failure=words))
        planner = coordinator.directory.nodes._planner
        async with asyncio.timeout(10):
            while not planner._troubles:
                await asyncio.sleep(0.02)
        ((key, trouble),) = planner._troubles.items()
        assert key == (node.credentials.node_id, TINY, node.status.replica_id)
        assert (len(trouble.reason), trouble.reason.isprintable(), trouble.refused) == (200, True, True)
