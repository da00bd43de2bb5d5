"""The node desk over a real database: planning, sessions, and whose minutes count, with a clock that only the test moves."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID, offer
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.node_reports import NodeReport
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import (
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Hello,
    Inventory,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
)
from tests.support.books import Books
from tests.support.replicas import catalogue_entry


@asynccontextmanager
async def node_desk(database_url, *names):
    books = Books(database_url)
    try:
        await books.found()
        await offer(books.store, [catalogue_entry("tiny")])
        for name in names:
            add_node(books, name)
        board = SnapshotBoard(1)
        nodes = Nodes(books.store, board, books.clock, 15.0)
        await nodes.refresh()
        yield books, board, nodes
    finally:
        books.store.close()


def add_node(books, name):
    books.run_now(
        lambda work: work.nodes.add(
            EnrolledNode(
                node_id=NodeId(name),
                owner_account_id=OPERATOR_ACCOUNT_ID,
                display_name=name,
                public_key_spki=name.encode(),
                status=NodeStatus.ACTIVE,
                status_reason="",
                epoch=0,
                inventory=Inventory(memory_bytes=8 << 30),
                agent_version="",
                enrolled_at_unix_ms=books.clock.unix_ms(),
                last_seen_at_unix_ms=0,
            )
        )
    )


def hello(name):
    return Hello(1, NodeId(name), SessionId("session"), "1", Inventory(cpu_count=2), NodeState.SERVING)


def report(name, epoch=1, covered_seconds=1.0, **changes):
    said = NodeReport(NodeId(name), epoch, covered_seconds, suspect=False, state=NodeState.SERVING, engines=())
    return replace(said, **changes)


async def serve(books, nodes, seconds, *names, every_seconds=1):
    """Lets the time pass, with a gateway that reports the named nodes each second, or as seldom as told."""
    for _ in range(0, seconds, every_seconds):
        books.clock.advance(every_seconds)
        await nodes.report([report(name, covered_seconds=every_seconds) for name in names], {}, gateway_epoch=1)
        await nodes.judge_minutes()


async def minutes(nodes):
    return {record.node_id: (record.up_minutes, record.down_minutes, record.unknown_minutes) for record in await nodes.list_nodes()}


async def test_every_active_node_gets_the_models_and_an_outcast_none(database_url):
    async with node_desk(database_url, "a", "b") as (_, board, nodes):
        assert [engine.replica_id for engine in board.snapshot.desired[NodeId("a")].engines] == ["a/tiny"]
        await nodes.revoke_node(NodeId("b"), "test")
        assert board.snapshot.outcasts == {"b": "test"}
        assert set(board.snapshot.desired) == {"a"}
        with pytest.raises(PotluckError) as failure:
            await nodes.open_session(hello("b"), gateway_epoch=1)
        assert failure.value.code is ErrorCode.INVALID_CERTIFICATE


async def test_what_others_hold_of_a_nodes_cards_stands_until_it_says_something_else_or_is_out(database_url):
    def held(nodes, work):
        return nodes._known(work)[0].nodes[NodeId("a")].card_foreign_bytes

    def told(epoch, foreign_bytes):
        return replace(report("a", epoch), cards=(CardTelemetry("gpu", memory_foreign_bytes=foreign_bytes),))

    async with node_desk(database_url, "a") as (books, _, nodes):
        await nodes.open_session(hello("a"), gateway_epoch=1)
        await nodes.report([told(1, 5 << 30)], {}, gateway_epoch=1)
        await nodes.report([told(1, None)], {}, gateway_epoch=1)
        assert books.run_now(lambda work: held(nodes, work)) == {"gpu": 5 << 30}
        # In a container, with an engine on the card, it cannot tell after its link has broken what it could tell before.
        await nodes.close_session(NodeId("a"), 1, None)
        await nodes.open_session(hello("a"), gateway_epoch=1)
        assert books.run_now(lambda work: held(nodes, work)) == {"gpu": 5 << 30}
        await nodes.report([told(2, None)], {}, gateway_epoch=1)
        nodes.gateway_started({2})
        await nodes.report([told(2, None)], {}, gateway_epoch=1)
        assert books.run_now(lambda work: held(nodes, work)) == {"gpu": 5 << 30}
        await nodes.report([told(2, 0)], {}, gateway_epoch=1)
        assert books.run_now(lambda work: held(nodes, work)) == {}
        await nodes.report([told(2, 1 << 30)], {}, gateway_epoch=1)
        await nodes.close_session(NodeId("a"), 2, GoodbyeReason.LEAVING)
        assert nodes._card_foreign_bytes == {}


async def test_a_directory_that_begins_anew_hears_with_the_first_word_how_a_nodes_cards_are(database_url):
    async with node_desk(database_url, "a") as (books, _, nodes):
        cards = (CardTelemetry("gpu", memory_foreign_bytes=5 << 30), CardTelemetry("other", lost=True))
        await nodes.open_session(replace(hello("a"), cards=cards), gateway_epoch=1)
        view = books.run_now(lambda work: nodes._known(work)[0].nodes[NodeId("a")])
        assert view.card_foreign_bytes == {"gpu": 5 << 30}
        assert nodes._live[NodeId("a")].lost_cards == {"other"}


async def test_a_wish_keeps_its_revision_until_it_changes(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        before = board.snapshot.desired[NodeId("a")]
        await nodes.refresh()
        assert board.snapshot.desired[NodeId("a")] == before
        await offer(books.store, [catalogue_entry("tiny"), catalogue_entry("second")])
        await nodes.refresh()
        after = board.snapshot.desired[NodeId("a")]
        assert after.revision > before.revision
        assert {engine.model.model_id for engine in after.engines} == {"tiny", "second"}
        assert set(board.snapshot.models) == {ModelId("tiny"), ModelId("second")}


async def test_where_planning_fails_the_last_plan_holds_and_outcasts_are_out(database_url, monkeypatch):
    async with node_desk(database_url, "a", "b") as (_, board, nodes):
        before = board.snapshot.desired

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(nodes._planner, "advance", fail)
        assert (await nodes.open_session(hello("a"), gateway_epoch=1)).desired == before[NodeId("a")]
        await nodes.revoke_node(NodeId("b"), "test")
        assert board.snapshot.outcasts == {"b": "test"}
        assert board.snapshot.desired == before


async def test_every_session_has_a_higher_epoch_even_after_a_restart(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        first = await nodes.open_session(hello("a"), gateway_epoch=1)
        second = await nodes.open_session(hello("a"), gateway_epoch=1)
        third = await Nodes(books.store, board, books.clock, 15.0).open_session(hello("a"), gateway_epoch=1)
        assert first.epoch < second.epoch < third.epoch


async def test_an_old_session_that_ends_says_nothing_about_the_new_one(database_url):
    async with node_desk(database_url, "a") as (_, _, nodes):
        old = await nodes.open_session(hello("a"), gateway_epoch=1)
        await nodes.open_session(hello("a"), gateway_epoch=1)
        for goodbye in (None, GoodbyeReason.LEAVING):
            await nodes.close_session(NodeId("a"), old.epoch, goodbye)
            assert (await nodes.list_nodes())[0].connection == "connected"


async def test_what_an_old_session_still_reports_says_nothing_about_the_new_one(database_url):
    async with node_desk(database_url, "a") as (_, _, nodes):
        old = await nodes.open_session(hello("a"), gateway_epoch=1)
        new = await nodes.open_session(hello("a"), gateway_epoch=1)
        await nodes.report([replace(report("a", epoch=old.epoch), suspect=True, state=NodeState.PAUSED)], {}, gateway_epoch=1)
        (record,) = await nodes.list_nodes()
        assert (record.connection, record.state) == ("connected", NodeState.SERVING)
        await nodes.report([replace(report("a", epoch=new.epoch), state=NodeState.PAUSED)], {}, gateway_epoch=1)
        (record,) = await nodes.list_nodes()
        assert (record.connection, record.state) == ("connected", NodeState.PAUSED)


async def test_leaving_is_for_good(database_url):
    async with node_desk(database_url, "a") as (_, board, nodes):
        grant = await nodes.open_session(hello("a"), gateway_epoch=1)
        await nodes.close_session(NodeId("a"), grant.epoch, GoodbyeReason.LEAVING)
        assert (await nodes.list_nodes())[0].connection == "left"
        assert board.snapshot.outcasts == {"a": "taken out by its owner"}


@pytest.mark.parametrize("every_seconds", [1, 5])
async def test_minutes_are_counted_by_what_gateways_saw(database_url, every_seconds):
    async with node_desk(database_url, "a", "b") as (books, _, nodes):
        nodes.gateway_started({2})
        await serve(books, nodes, 6 * 60, "a", every_seconds=every_seconds)
        counted = await minutes(nodes)
        up, down, unknown = counted["a"]
        assert (down, counted["b"][0]) == (0, 0)
        assert up == counted["b"][1] >= 3
        assert up + unknown == 6
        assert [record.connection for record in await nodes.list_nodes()] == ["connected", "offline"]


async def test_a_coordinator_outage_is_charged_to_nobody(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        nodes.gateway_started({2})
        await serve(books, nodes, 4 * 60, "a")
        up_before, _, _ = (await minutes(nodes))["a"]
        books.clock.advance(3600)  # the whole coordinator was away
        restarted = Nodes(books.store, board, books.clock, 15.0)
        restarted.gateway_started({2})
        await serve(books, restarted, 4 * 60, "a")
        up, down, unknown = (await minutes(restarted))["a"]
        assert down == 0
        assert up > up_before
        assert unknown >= 60


async def test_while_no_gateway_reports_nobody_is_judged(database_url):
    async with node_desk(database_url, "a") as (books, _, nodes):
        nodes.gateway_started({2})
        await serve(books, nodes, 3 * 60, "a")
        before = await minutes(nodes)
        for _ in range(600):
            books.clock.advance(1)
            await nodes.judge_minutes()
        after = await minutes(nodes)
        assert after["a"][:2] == before["a"][:2]
        assert (await nodes.list_nodes())[0].connection == "offline"


async def test_time_in_which_the_coordinator_stood_still_is_neither_for_nor_against_a_node(database_url):
    async with node_desk(database_url, "here", "away") as (books, _, nodes):
        nodes.gateway_started({2})
        await serve(books, nodes, 4 * 60, "here")
        before = await minutes(nodes)
        books.clock.advance(7 * 24 * 3600)
        await nodes.report([report("here", covered_seconds=7 * 24 * 3600.0)], {}, gateway_epoch=1)
        await nodes.judge_minutes()
        assert {name: counted[:2] for name, counted in (await minutes(nodes)).items()} == {
            name: counted[:2] for name, counted in before.items()
        }
        await serve(books, nodes, 4 * 60, "here")
        after = await minutes(nodes)
        assert (after["here"][0] > before["here"][0], after["here"][1]) == (True, 0)
        assert after["away"][1] > before["away"][1]


async def test_a_restarted_directory_learns_from_reports_who_is_there(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        grant = await nodes.open_session(hello("a"), gateway_epoch=1)
        restarted = Nodes(books.store, board, books.clock, 15.0)
        assert (await restarted.list_nodes())[0].connection == "offline"
        await restarted.report([report("a", epoch=grant.epoch)], {}, gateway_epoch=1)
        assert (await restarted.list_nodes())[0].connection == "connected"


@pytest.mark.parametrize("comes_back_first", [False, True])
async def test_what_a_node_was_answering_ends_with_its_session(database_url, comes_back_first):
    """Else a replica of the next session would seem to answer for ever, and neither rest nor leave at once."""
    async with node_desk(database_url, "a") as (books, board, nodes):
        await nodes.open_session(hello("a"), gateway_epoch=1)
        tiny = ReplicaId("a/tiny")
        await nodes.report([report("a", attempt_counts={tiny: 2})], {}, gateway_epoch=1)
        if comes_back_first:
            await nodes.open_session(hello("a"), gateway_epoch=1)
        await nodes.close_session(NodeId("a"), 1, None)
        if not comes_back_first:
            await nodes.open_session(hello("a"), gateway_epoch=1)
        starting = EngineStatus(tiny, ModelId("tiny"), EngineState.STARTING, "llamacpp")
        await nodes.report([report("a", epoch=2, engines=(starting,))], {}, gateway_epoch=1)
        books.run_now(lambda work: work.catalogue.withdraw(ModelId("tiny")))
        await nodes.refresh()
        assert board.snapshot.leaving == frozenset()
        assert board.snapshot.desired[NodeId("a")].engines == ()


async def test_what_is_leaving_finishes_its_answers_and_then_goes(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        await nodes.open_session(hello("a"), gateway_epoch=1)
        tiny = ReplicaId("a/tiny")
        await nodes.report([report("a", attempt_counts={tiny: 2})], {}, gateway_epoch=1)
        books.run_now(lambda work: work.catalogue.withdraw(ModelId("tiny")))
        await nodes.refresh()
        assert board.snapshot.leaving == {tiny}
        # The gateway names one that has ended once, and never again; that word may have been lost.
        await nodes.report([report("a")], {}, gateway_epoch=1)
        await nodes.refresh()
        assert board.snapshot.leaving == frozenset()


async def test_nodes_that_come_back_as_they_were_wait_for_no_plan_and_one_plan_for_all_follows(database_url):
    names = ("a", "b", "c")
    async with node_desk(database_url, *names) as (_books, board, nodes):
        first = [await nodes.open_session(hello(name), gateway_epoch=1) for name in names]
        await nodes.refresh()
        plans, advance = [], nodes._planner.advance
        nodes._planner.advance = lambda facts, now: (plans.append([view.connected for view in facts.nodes.values()]), advance(facts, now))[
            1
        ]
        nodes.gateway_started({2})
        again = [await nodes.open_session(hello(name), gateway_epoch=2) for name in names]
        assert plans == []
        assert [grant.desired for grant in again] == [board.snapshot.desired[grant_id] for grant_id in map(NodeId, names)]
        assert [grant.epoch for grant in again] == [grant.epoch + 1 for grant in first]
        await nodes.refresh_old_plan()
        assert plans == [[True] * 3], "though the last plan is young"
        await nodes.open_session(replace(hello("a"), state=NodeState.PAUSED), gateway_epoch=2)
        assert len(plans) == 2, "which is not as it was"
