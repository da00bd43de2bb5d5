"""Speeds that gateways measure become days in the books, and a replica that has become slow gets less: over a real database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.directory.paces import MINUTE_MS, Paces
from potluck_coordinator.domain.slowness import DAYS_MAX, SLOW_WEIGHT
from potluck_protocol.values import EngineState, EngineStatus, ModelId, NodeId, ReplicaId
from tests.integration.test_node_desk import node_desk, report

DAY_MINUTES = 24 * 60
REPLICA = ReplicaId("a/tiny")
STATUS = EngineStatus(REPLICA, ModelId("tiny"), EngineState.READY, "llamacpp")


async def passes(books, nodes, paces, minutes, tokens_per_second):
    """So many minutes with an answer each at that speed."""
    for _ in range(minutes):
        said = report("a", engines=(STATUS,), decode_tokens_per_second={REPLICA: tokens_per_second} if tokens_per_second else {})
        await nodes.report([said], {}, gateway_epoch=1)
        books.clock.advance(60)
        await paces.judge_minute()


def paces_of(books, board, nodes):
    paces = Paces(books.store, board, books.clock)
    nodes.on_reports = paces.take
    return paces


async def test_a_replica_under_half_of_its_usual_speed_gets_less_and_under_a_fifth_nothing_for_a_while(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        paces = paces_of(books, board, nodes)
        await passes(books, nodes, paces, 30, 80.0)
        books.clock.advance(24 * 3600)
        await passes(books, nodes, paces, 5, 80.0)
        assert (board.snapshot.slow_replicas, board.snapshot.drained_replicas) == ({}, {})
        await passes(books, nodes, paces, 3, 30.0)
        assert (board.snapshot.slow_replicas, board.snapshot.drained_replicas) == ({REPLICA: SLOW_WEIGHT}, {})
        await passes(books, nodes, paces, 3, 12.0)
        assert board.snapshot.drained_replicas == {REPLICA: "slow: 12.0 tokens/s, where 80.0 are usual of it"}
        await passes(books, nodes, paces, 10, None)
        assert (board.snapshot.slow_replicas, board.snapshot.drained_replicas) == ({REPLICA: SLOW_WEIGHT}, {})
        await passes(books, nodes, paces, 1, 75.0)
        assert (board.snapshot.slow_replicas, board.snapshot.drained_replicas) == ({}, {})


@pytest.mark.parametrize("away_days", [1, 9])
async def test_what_is_usual_outlives_a_restart_and_no_more_than_seven_days(database_url, away_days):
    async with node_desk(database_url, "a") as (books, board, nodes):
        paces = paces_of(books, board, nodes)
        await passes(books, nodes, paces, 30, 80.0)
        books.clock.advance(24 * 3600 * away_days)
        again = paces_of(books, board, nodes)
        await passes(books, nodes, again, 3, 12.0)
        assert bool(board.snapshot.drained_replicas) is (away_days == 1)
        await passes(books, nodes, again, 10, 12.0)
        days = books.run_now(lambda work: work.paces.since(0))
        assert len(days[NodeId("a"), ModelId("tiny")]) == (2 if away_days == 1 else 1)


@pytest.mark.parametrize("known_days_ago", [1, DAYS_MAX])
async def test_a_drain_outlasts_midnight_whatever_is_published_then(database_url, known_days_ago):
    async with node_desk(database_url, "a") as (books, board, nodes):
        paces = paces_of(books, board, nodes)
        await passes(books, nodes, paces, 30, 80.0)
        midnight_minute = (books.clock.unix_ms() // MINUTE_MS // DAY_MINUTES + known_days_ago + 1) * DAY_MINUTES
        books.clock.advance(60 * (midnight_minute - 4 - books.clock.unix_ms() // MINUTE_MS))
        await paces.judge_minute()
        await passes(books, nodes, paces, 3, 12.0)
        told = {REPLICA: "slow: 12.0 tokens/s, where 80.0 are usual of it"}
        for _ in range(9):
            assert board.snapshot.drained_replicas == told
            # As when another replica's pace changes.
            board.publish(slow_replicas={}, drained_replicas={})
            await passes(books, nodes, paces, 1, None)
        assert books.clock.unix_ms() // MINUTE_MS > midnight_minute
        assert board.snapshot.drained_replicas == told
        await passes(books, nodes, paces, 1, None)
        assert board.snapshot.drained_replicas == {}


async def test_a_nodes_word_about_another_ones_replica_or_nonsense_is_dropped(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        paces = paces_of(books, board, nodes)
        said = report(
            "a", engines=(replace(STATUS, replica_id=ReplicaId("other")),), decode_tokens_per_second={REPLICA: 80.0, "other": -1.0}
        )
        await nodes.report([said], {}, gateway_epoch=1)
        assert paces._samples == {}
