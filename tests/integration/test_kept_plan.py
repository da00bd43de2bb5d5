"""The plan in the books: only what is new is written, nothing that failed to be written is forgotten, and none of it is told before."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import text

from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, CorrectionKey, Measure, Observation, learn
from potluck_protocol.values import ReplicaId
from tests.integration.test_group_directory import GROUP, OWNERS, pool_in
from tests.integration.test_node_desk import add_node, node_desk

BREAK = "CREATE TRIGGER broken BEFORE INSERT ON {} BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
MEND = "DROP TRIGGER broken"


@pytest.fixture
def database_url(tmp_path):
    """SQLite counts the rows that it writes."""
    return f"sqlite:///{tmp_path / 'books.db'}"


def execute(books, statement):
    def run(work):
        result = work.audit._connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None

    return books.run_now(run)


def rows_written(books):
    return execute(books, "SELECT total_changes()")


def kept(books):
    return set(books.run_now(lambda work: work.plan.all()))


async def test_only_what_differs_is_written_however_many_replicas_there_are(database_url):
    async with node_desk(database_url, "a") as (books, _, _):
        (one,) = books.run_now(lambda work: work.plan.all()).values()
        many = {ReplicaId(f"a/{number}"): replace(one, replica_id=ReplicaId(f"a/{number}")) for number in range(40_000)}
        books.run_now(lambda work: work.plan.keep({one.replica_id: one}, many))
        changed = many | {ReplicaId("a/7"): replace(many[ReplicaId("a/7")], made_for="changed")}
        del changed[ReplicaId("a/8")]
        before = rows_written(books)
        books.run_now(lambda work: work.plan.keep(many, changed))
        assert rows_written(books) - before == 3  # one removed, one removed and added
        found = books.run_now(lambda work: work.plan.all())
        assert found == changed


async def test_a_new_node_costs_the_rows_of_its_own_replicas(database_url):
    async with node_desk(database_url, *"abcdefgh") as (books, _, nodes):
        add_node(books, "new")
        before = rows_written(books)
        await nodes.refresh()
        assert kept(books) >= {"a/tiny", "new/tiny"}
        assert rows_written(books) - before <= 4
        written = rows_written(books)
        await nodes.refresh()
        assert rows_written(books) == written


async def test_a_plan_that_could_not_be_kept_is_kept_by_the_next_one_and_told_only_then(database_url):
    async with node_desk(database_url, "a") as (books, board, nodes):
        add_node(books, "b")
        execute(books, BREAK.format("planned_replica"))
        # Both ask before either has begun: who waited must not take the other's failure for an answer.
        async with nodes._refreshing:
            asked = [asyncio.ensure_future(nodes.refresh()) for _ in range(2)]
            await asyncio.sleep(0)
        assert all(isinstance(failure, Exception) for failure in await asyncio.gather(*asked, return_exceptions=True))
        assert (kept(books), set(board.snapshot.desired)) == ({"a/tiny"}, {"a"})
        execute(books, MEND)
        await nodes.refresh()
        assert (kept(books), set(board.snapshot.desired)) == ({"a/tiny", "b/tiny"}, {"a", "b"})
        again = Nodes(books.store, SnapshotBoard(1), books.clock, 15.0)
        await again.refresh()
        assert set(again._planner.replicas) == {"a/tiny", "b/tiny"}


async def test_a_groups_generation_is_told_only_once_it_is_in_the_books(database_url):
    async with pool_in(database_url) as pool:
        for name in OWNERS:
            await pool.join(name)
        await pool.report()
        pool.measure()
        execute(pool.books, BREAK.format("shard_group"))
        for _ in range(3):
            failures = await asyncio.gather(pool.report(), pool.nodes.refresh(), return_exceptions=True)
            assert any(isinstance(failure, Exception) for failure in failures)
            assert (pool.stages(), pool.books.run_now(lambda work: work.groups.all())) == ({}, {})
        execute(pool.books, MEND)
        await pool.nodes.refresh()
        (generation,) = {stage.generation for stage in pool.stages().values()}
        assert pool.books.run_now(lambda work: work.groups.all())[GROUP].generation == generation


async def test_how_wishes_are_met_is_counted_once_a_plan_and_makes_none(database_url):
    async with node_desk(database_url, "a") as (_, _, nodes):
        first, _ = await nodes.standings()
        planned_at = nodes._answered_count
        async with nodes._refreshing:  # a plan is being made
            for _ in range(3):
                assert (await asyncio.wait_for(nodes.standings(), 5))[0] is first
        assert nodes._answered_count == planned_at
        await nodes.refresh()
        assert (await nodes.standings())[0] is not first


async def test_what_nodes_showed_is_written_once_a_minute_however_often_it_changes(database_url):
    async with node_desk(database_url, "a") as (books, _, nodes):
        key, before = CorrectionKey("processor", "scripted", "tiny", ""), rows_written(books)
        planner, seen = nodes._planner, []
        for second in range(150):
            shown = Observation(key, "a", Measure.DECODE, 20.0 + second, 40.0)
            planner._sizer = planner._sizer.learning(learn(planner.corrections, shown), ())
            books.clock.advance(1)
            await nodes._kept_plan.keep(planner, books.clock.monotonic_seconds())
            seen.append(books.run_now(lambda work: work.plan.corrections()))
        assert seen[0] != NOTHING_LEARNED, "the first word is kept at once"
        assert [number for number in range(1, 150) if seen[number] != seen[number - 1]] == [60, 120]
        assert rows_written(books) - before == 3
