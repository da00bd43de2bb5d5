"""A shard group from the wish to its loss, as the directory sees it: over a real database, with a clock that only the test moves."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.bootstrap import offer
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.node_reports import NodeReport
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_protocol.values import (
    AccountId,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    GroupOffer,
    Hello,
    Inventory,
    ModelId,
    NodeId,
    NodeState,
    PeerMeasurement,
    SessionId,
)
from tests.support.books import Books
from tests.support.planning import card_entry, cards

MODEL, GROUP = ModelId("32b"), "group/32b/0"
OWNERS = {"a": "ann", "b": "bob", "e": "eve"}
TRUSTS = {"a": ("bob",), "b": ("ann",), "e": ("ann", "bob")}


class Pool:
    """Three nodes with a card of 12 GB each, of which a model of 18 GB takes two."""

    def __init__(self, books, board, nodes):
        self.books, self.board, self.nodes = books, board, nodes
        self.epochs = {}
        self.engines = {}
        self.measured = {}

    def inventory(self, name):
        return Inventory(
            memory_bytes=1 << 35,
            accelerators=cards(1, "NVIDIA GeForce RTX 3060", 12 << 30, node=name),
            engine_kinds=("vllm",),
            group_offer=GroupOffer("lab", f"10.0.0.{ord(name)}", 29600, tuple(map(AccountId, TRUSTS[name]))),
        )

    async def join(self, name, engines=(), gateway_epoch=1, session="s"):
        hello = Hello(1, NodeId(name), SessionId(session), "1", self.inventory(name), NodeState.SERVING, engines=engines)
        self.epochs[name] = (await self.nodes.open_session(hello, gateway_epoch=gateway_epoch)).epoch
        self.engines[name], self.measured[name] = engines, ()

    async def leave(self, name, reason=None):
        await self.nodes.close_session(NodeId(name), self.epochs.pop(name), reason)

    async def report(self):
        """A second passes, and the gateway tells of everyone who is there."""
        self.books.clock.advance(1)
        reports = [
            NodeReport(
                NodeId(name),
                epoch,
                1.0,
                suspect=False,
                state=NodeState.SERVING,
                engines=self.engines[name],
                peer_measurements=self.measured[name],
            )
            for name, epoch in self.epochs.items()
        ]
        await self.nodes.report(reports, {}, gateway_epoch=1)

    def desired(self, name):
        return self.board.snapshot.desired[NodeId(name)]

    def stages(self):
        return {name: engine.group for name in OWNERS for engine in self.desired(name).engines}

    def measure(self):
        """Everyone measures the peers that it is to dial."""
        for name in self.epochs:
            self.measured[name] = tuple(PeerMeasurement(peer.node_id, 300, 10**9) for peer in self.desired(name).peers if peer.dial)

    def obey(self, state=EngineState.READY):
        """Every node runs the stages that are wished of it, and nothing else."""
        for name in self.epochs:
            self.engines[name] = tuple(
                EngineStatus(
                    engine.replica_id,
                    MODEL,
                    state,
                    "vllm",
                    group_id=engine.group.group_id,
                    group_rank=engine.group.rank,
                    group_generation=engine.group.generation,
                )
                for engine in self.desired(name).engines
            )

    async def serving(self):
        await self.report()
        self.measure()
        await self.report()
        self.obey()
        await self.report()
        return self


@asynccontextmanager
async def pool_in(database_url, *, again=False):
    books = Books(database_url)
    try:
        if not again:
            books.add_people(*OWNERS.values())
            await offer(books.store, [card_entry("32b")])
            for name, owner in OWNERS.items():
                _add_node(books, name, owner)
            books.run_now(lambda work: work.catalogue.deploy(Deployment(MODEL, 1)))
        board = SnapshotBoard(1)
        nodes = Nodes(books.store, board, books.clock, 15.0)
        await nodes.refresh()
        yield Pool(books, board, nodes)
    finally:
        books.store.close()


def _add_node(books, name, owner):
    node = EnrolledNode(
        node_id=NodeId(name),
        owner_account_id=AccountId(owner),
        display_name=name,
        public_key_spki=name.encode(),
        status=NodeStatus.ACTIVE,
        status_reason="",
        epoch=0,
        inventory=Inventory(),
        agent_version="",
        enrolled_at_unix_ms=books.clock.unix_ms(),
        last_seen_at_unix_ms=0,
    )
    books.run_now(lambda work: work.nodes.add(node))


@pytest.fixture
async def pool(database_url):
    async with pool_in(database_url) as opened:
        for name in OWNERS:
            await opened.join(name)
        yield opened


async def test_only_those_who_may_be_together_measure_each_other_and_only_until_there_is_a_group(pool):
    await pool.report()
    (peer_of_a,), (peer_of_b,) = pool.desired("a").peers, pool.desired("b").peers
    assert (peer_of_a.node_id, peer_of_b.node_id) == ("b", "a")
    assert (peer_of_a.address, peer_of_a.port, peer_of_a.dial, peer_of_b.dial) == ("10.0.0.98", 29601, True, False)
    assert peer_of_a.secret == peer_of_b.secret
    assert pool.desired("e").peers == ()
    pool.measure()
    await pool.report()
    assert [pool.desired(name).peers for name in OWNERS] == [(), (), ()]


async def test_the_group_is_wished_of_its_two_nodes_and_pays_both_owners(pool):
    await pool.serving()
    stages = pool.stages()
    assert {name: stage.rank for name, stage in stages.items()} == {"a": 0, "b": 1}
    assert sum(stages["a"].layer_counts) == 64
    assert stages["b"].leader_address == "10.0.0.97"
    assert pool.board.snapshot.replica_payees == {GROUP: (PayeeShare(AccountId("ann"), 1), PayeeShare(AccountId("bob"), 1))}
    assert pool.board.snapshot.broken_groups == {}


async def test_the_loss_of_a_member_is_published_at_once_with_its_reason_and_its_return_forms_the_next_generation(pool):
    await pool.serving()
    await pool.leave("b")
    assert pool.board.snapshot.broken_groups == {GROUP: "member b is lost: is not connected"}
    assert pool.stages() == {}
    assert pool.board.snapshot.replica_payees == {}
    await pool.report()
    await pool.join("b")
    await pool.report()
    assert pool.stages() == {}, "the other member has not stopped yet"
    pool.obey()
    await pool.report()
    pool.measure()
    await pool.report()
    assert {stage.generation for stage in pool.stages().values()} == {2}
    assert pool.board.snapshot.broken_groups == {}


async def test_a_failed_engine_breaks_it_with_the_next_report(pool):
    await pool.serving()
    (ready,) = pool.engines["a"]
    pool.engines["a"] = (replace(ready, state=EngineState.BACKING_OFF, failure="the engine ended: signal SIGKILL"),)
    await pool.report()
    assert pool.board.snapshot.broken_groups == {GROUP: "the engine of member a failed: the engine ended: signal SIGKILL"}


async def test_everyone_is_told_their_part(pool):
    await pool.serving()
    verdicts, _, words = await pool.nodes.verdicts(MODEL)
    said = {verdict.node_id: (verdict.verdict, verdict.reason) for verdict in verdicts}
    assert [said[name][0] for name in OWNERS] == ["serves", "serves", "no_fit"]
    assert "serves stage 2 of 2" in said["b"][1]
    assert "alone: " in said["b"][1]
    assert "does not trust its owner" in said["e"][1]
    assert "generation 1, is ready" in words


async def come_back_to_another_gateway(pool, engines):
    pool.epochs.clear()
    pool.nodes.gateway_started({2})
    for name in OWNERS:
        await pool.join(name)
        pool.engines[name] = engines[name]
        await pool.report()


async def test_a_gateway_that_stops_takes_no_group_along(pool):
    before, engines = (await pool.serving()).stages(), dict(pool.engines)
    for name in OWNERS:
        await pool.leave(name, GoodbyeReason.COORDINATOR_STOPPING)
        assert pool.stages() == before
    await come_back_to_another_gateway(pool, engines)
    assert pool.stages() == before
    await pool.leave("b")
    assert pool.stages() == {}


async def test_nor_does_a_gateway_that_died(pool):
    before, engines = (await pool.serving()).stages(), dict(pool.engines)
    await come_back_to_another_gateway(pool, engines)
    assert pool.stages() == before


async def test_nor_one_whose_nodes_are_with_another_gateway_before_it_is_missed(pool):
    before, engines = (await pool.serving()).stages(), dict(pool.engines)
    for name in OWNERS:
        await pool.join(name, engines[name], gateway_epoch=2)
        assert pool.stages() == before
    pool.nodes.gateway_started({2, 3})
    await pool.report()
    assert pool.stages() == before
    await pool.leave("b")
    assert pool.stages() == {}


async def test_an_agent_that_begins_anew_at_another_gateway_is_lost_to_its_group(pool):
    engines = dict((await pool.serving()).engines)
    await pool.join("b", engines["b"], gateway_epoch=2, session="another")
    assert pool.board.snapshot.broken_groups == {GROUP: "member b is lost: its agent began anew"}


async def test_a_directory_that_starts_anew_leaves_the_group_alone(database_url):
    async with pool_in(database_url) as pool:
        for name in OWNERS:
            await pool.join(name)
        before = (await pool.serving()).stages()
        engines, revision = pool.engines, pool.desired("a").revision
    async with pool_in(database_url, again=True) as pool:
        assert pool.stages() == before
        for name in OWNERS:
            await pool.join(name)
            pool.engines[name] = engines[name]
            await pool.report()
            assert pool.stages() == before
        assert pool.desired("a").revision > revision
        await pool.leave("a")
        await pool.report()
        assert pool.board.snapshot.broken_groups == {GROUP: "member a is lost: is not connected"}
        pool.obey()
        await pool.report()
        await pool.join("a")
        pool.measure()
        await pool.report()
        pool.measure()
        await pool.report()
        assert {stage.generation for stage in pool.stages().values()} == {2}
