"""What the coordinator believes of a node's words: over its real link, to the real directory."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from potluck import catalogue_calls
from potluck_coordinator.directory.in_thread import to_its_end
from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.storage.catalogue import Origin
from potluck_protocol import codec
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.values import GoodbyeReason, Heartbeat, Inventory, ModelId, NodeState
from tests.integration.test_models_and_wishes import Caller
from tests.support.coordinator import running_coordinator
from tests.support.open_pool import open_pool
from tests.support.planning import card_entry, cards
from tests.support.raw_node import enrol, raw_link


async def told_to_adopt(coordinator, monkeypatch):
    """How often the planner is told that the coordinator's links have ended."""
    told = []
    planner = coordinator.directory.nodes._planner
    expect_back = planner.expect_back
    monkeypatch.setattr(planner, "expect_back", lambda now: (told.append(now), expect_back(now)))
    await coordinator.directory.nodes.refresh()  # the gateway's own start
    told.clear()
    return told


@pytest.mark.parametrize("reason", sorted(set(GoodbyeReason) - {GoodbyeReason.STOPPING, GoodbyeReason.LEAVING}))
async def test_a_goodbye_that_only_the_coordinator_may_say_is_a_lost_link_when_a_node_says_it(tmp_path, monkeypatch, reason):
    async with running_coordinator(tmp_path, link_grace_ms=60_000) as coordinator:
        told = await told_to_adopt(coordinator, monkeypatch)
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            session = coordinator.gateway._links.session(node.credentials.node_id)
            await node.goodbye(reason)
            await node.wait_until_ended()
            async with asyncio.timeout(5):
                while session.outbox is not None:
                    await asyncio.sleep(0.01)
            assert coordinator.gateway._links.session(node.credentials.node_id) is session
            assert session.link_lost_at is not None
            await coordinator.directory.nodes.refresh()
            assert told == []


async def test_that_the_coordinator_stops_is_the_gateways_own_word(tmp_path, monkeypatch):
    async with running_coordinator(tmp_path) as coordinator:
        told = await told_to_adopt(coordinator, monkeypatch)
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            await coordinator.gateway._links.stop()
            assert len(told) == 1


async def test_a_lost_card_is_planned_for_no_more_and_again_once_it_is_back(tmp_path):
    model_id = ModelId("8b")
    async with running_coordinator(tmp_path) as coordinator:
        await coordinator.directory._store.run(lambda work: work.catalogue.put([card_entry("8b")], Origin.ADDED))
        await coordinator.directory.catalogue.deploy(Deployment(model_id, 1))
        (card,) = cards(1)
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello(inventory=Inventory(memory_bytes=64 << 30, accelerators=(card,), engine_kinds=("vllm",)), engines=())

            async def wishes(*, lost):
                """What is wished of the model once the card is said to be lost, or not."""
                telemetry = (CardTelemetry(card.uuid, lost=lost),)
                await node.send(heartbeat=codec.heartbeat_message(Heartbeat(1, NodeState.SERVING, (), 1 << 40, cards=telemetry)))
                live = coordinator.directory.nodes._live
                async with asyncio.timeout(10):
                    while [card.lost for card in live[node.credentials.node_id].report.cards] != [lost]:
                        await asyncio.sleep(0.02)
                # The engine of a replica that leaves is gone, as the node says nothing of it.
                for _ in range(3):
                    await coordinator.directory.nodes.refresh()
                engines = coordinator.directory.pool._board.snapshot.desired[node.credentials.node_id].engines
                return [engine.shape.card_uuids for engine in engines if engine.model.model_id == model_id]

            assert await wishes(lost=False) == [(card.uuid,)]
            assert await wishes(lost=True) == []
            verdict, *_ = await coordinator.directory.catalogue.explain(model_id)
            assert verdict.verdict == "no_fit"
            assert await wishes(lost=False) == [(card.uuid,)]
            (record,) = await coordinator.directory.nodes.list_nodes()
            assert record.inventory.accelerators == (card,)


async def test_a_users_question_after_the_deployments_neither_plans_nor_waits_for_a_plan(tmp_path):
    async with open_pool(tmp_path) as pool:
        _, key = await pool.user_key("user")
        nodes = pool.directory.nodes
        async with pool.grpc_channel() as channel:
            user = Caller(channel, key)
            (before,) = await user.make(catalogue_calls.list_deployments())
            answered_count = nodes._answered_count
            async with nodes._refreshing:
                for _ in range(5):
                    assert await asyncio.wait_for(user.make(catalogue_calls.list_deployments()), 5) == (before,)
            assert nodes._answered_count == answered_count
            # What the operator changes shows at once all the same.
            await pool.directory.catalogue.deploy(replace(Deployment(before.deployment.model_id), replica_count=2))
            (after,) = await user.make(catalogue_calls.list_deployments())
            assert (after.deployment.replica_count, after.shortfall) == (2, "the pool has no node")


async def test_a_plan_that_its_caller_left_is_awaited_before_another_begins():
    begun, may_end = threading.Event(), threading.Event()

    def plan():
        begun.set()
        may_end.wait(10)

    lock = asyncio.Lock()

    async def refresh():
        async with lock:
            await to_its_end(plan)

    caller = asyncio.create_task(refresh())
    try:
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(2):
            caller.cancel()
            await asyncio.wait([caller], timeout=0.05)
            assert lock.locked()
    finally:
        may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not lock.locked()
