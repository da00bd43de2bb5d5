"""Many nodes that fall silent together, as the directory sees it over a real database: nobody is charged, and nothing is moved."""

from __future__ import annotations

from dataclasses import replace

from potluck_coordinator.domain.catalogue import Deployment, ServiceTier
from potluck_protocol.values import GoodbyeReason, ModelId, NodeId
from tests.integration.test_node_desk import hello, minutes, node_desk, report

NAMES = tuple(f"n{number}" for number in range(10))
WISHED_COUNT = 6


async def pool_of(books, nodes):
    """Ten nodes that serve, six of them with the replicas that are wished; those with one, and the others."""
    books.run_now(lambda work: work.catalogue.deploy(Deployment(ModelId("tiny"), WISHED_COUNT, ServiceTier.DEFAULT)))
    for name in NAMES:
        await nodes.open_session(hello(name), gateway_epoch=1)
    await passes(books, nodes, 180)
    holders = holding(nodes)
    assert len(holders) == WISHED_COUNT
    return holders, [name for name in NAMES if name not in holders]


def holding(nodes):
    desired = nodes._board.snapshot.desired
    return sorted(name for name in NAMES if desired[NodeId(name)].engines)


async def passes(books, nodes, seconds, *, silent=(), gone=()):
    """Each second the gateway tells of everyone but those gone, of those silent that it hears nothing."""
    for _ in range(seconds):
        books.clock.advance(1)
        told = [report(name) for name in NAMES if name not in gone]
        told = [replace(said, covered_seconds=0.0, suspect=True) if said.node_id in silent else said for said in told]
        await nodes.report(told, {}, gateway_epoch=1)
        await nodes.judge_minutes()
        await nodes.refresh_old_plan()


async def test_silence_of_many_is_charged_to_nobody_and_moves_nothing(database_url):
    async with node_desk(database_url, *NAMES) as (books, _, nodes):
        holders, _ = await pool_of(books, nodes)
        before = await minutes(nodes)
        await passes(books, nodes, 400, silent=holders[:5])
        after = await minutes(nodes)
        assert all(after[name][1] == before[name][1] == 0 for name in NAMES), "not one minute down"
        assert all(after[name][2] > before[name][2] for name in holders[:5]), "nobody knows"
        assert holding(nodes) == holders


async def test_the_silence_of_one_is_its_own(database_url):
    async with node_desk(database_url, *NAMES) as (books, _, nodes):
        holders, _ = await pool_of(books, nodes)
        before = await minutes(nodes)
        await passes(books, nodes, 400, gone=holders[:1])
        assert (await minutes(nodes))[holders[0]][1] > before[holders[0]][1]
        # What takes a replica's place is wished first, and the old one withdrawn once the new one serves.
        assert len(set(holding(nodes)) - set(holders)) == 1


async def test_many_that_do_not_come_back_after_a_restart_of_the_gateway_are_planned_away_after_ten_minutes_only(database_url):
    async with node_desk(database_url, *NAMES) as (books, _, nodes):
        holders, _ = await pool_of(books, nodes)
        nodes.gateway_started({2})
        await passes(books, nodes, 590, gone=holders[:5])
        assert holding(nodes) == holders
        await passes(books, nodes, 200, gone=holders[:5])
        assert len(set(holding(nodes)) - set(holders)) == 4, "everyone else who is there"


async def test_owners_who_stop_their_nodes_together_are_planned_away_in_time(database_url):
    async with node_desk(database_url, *NAMES) as (books, _, nodes):
        holders, _ = await pool_of(books, nodes)
        for name in holders[:5]:
            await nodes.close_session(NodeId(name), 1, GoodbyeReason.STOPPING)
        await passes(books, nodes, 200, gone=holders[:5])
        assert len(set(holding(nodes)) - set(holders)) == 4
