"""What gateways are told of the snapshot, and when."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.directory import board as board_module
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.pool_snapshot import PoolNews, PoolSnapshot
from potluck_protocol.values import DesiredState, NodeId

ANN, BOB, CAT = (NodeId(name) for name in ("ann", "bob", "cat"))


def wish(revision: int) -> DesiredState:
    return DesiredState(revision)


async def test_whoever_knows_nothing_is_told_everything():
    board = SnapshotBoard(100)
    board.publish(desired={ANN: wish(1)}, outcasts={BOB: "left"})
    assert PoolSnapshot().with_news(await board.wait(0)) == board.snapshot


async def test_of_what_is_desired_only_the_news_are_told():
    board = SnapshotBoard(100)
    states = {ANN: wish(1), BOB: wish(2)}
    board.publish(desired=states)
    known = PoolSnapshot().with_news(await board.wait(0))
    board.publish(desired={**states, BOB: wish(3), CAT: wish(4)}, outcasts={})
    news = await board.wait(known.version)
    assert (news.changes, news.desired) == ({}, {BOB: wish(3), CAT: wish(4)})
    assert known.with_news(news) == board.snapshot


async def test_nodes_that_are_gone_for_good_go_from_every_snapshot():
    board = SnapshotBoard(100)
    board.publish(desired={ANN: wish(1), BOB: wish(2)})
    known = PoolSnapshot().with_news(await board.wait(0))
    board.publish(desired={ANN: wish(1)})
    board.publish(desired={ANN: wish(5)})
    assert known.with_news(await board.wait(known.version)) == board.snapshot


async def test_who_waits_hears_at_once_and_only_of_what_has_changed():
    board = SnapshotBoard(100)
    waiting = asyncio.ensure_future(board.wait(100))
    await asyncio.sleep(0)
    board.publish(outcasts={}, flex_models=frozenset())
    await asyncio.sleep(0)
    assert not waiting.done(), "nothing of it was news"
    board.publish(outcasts={ANN: "revoked"}, flex_models=frozenset())
    assert await waiting == PoolNews(101, {"outcasts": {ANN: "revoked"}}, {})


async def test_who_knows_it_all_is_told_nothing_in_the_end(monkeypatch):
    monkeypatch.setattr(board_module, "WATCH_SECONDS_MAX", 0.01)
    board = SnapshotBoard(100)
    board.publish(desired={ANN: wish(1)})
    assert await board.wait(101) == PoolNews(101, {}, {})


async def test_a_version_of_another_run_is_told_everything():
    for first_version in (100, 10_000):
        board = SnapshotBoard(first_version)
        board.publish(desired={ANN: wish(1)})
        assert set((await board.wait(5_000)).changes) == set(PoolSnapshot.__dataclass_fields__) - {"version"}


@given(st.lists(st.tuples(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), st.booleans()), max_size=12))
def test_every_gateway_has_the_snapshot_whenever_it_asks(steps: list[tuple[dict[str, int], bool]]):
    """Two gateways: one asks after each change, the other now and then."""

    async def follow() -> None:
        board = SnapshotBoard(7)
        often, seldom = PoolSnapshot(), PoolSnapshot()
        for revisions, asks in steps:
            kept = board.snapshot.desired
            desired = {NodeId(name): wish(revision) for name, revision in revisions.items()}
            board.publish(desired={node_id: kept[node_id] if kept.get(node_id) == state else state for node_id, state in desired.items()})
            if board.snapshot.version != often.version:
                often = often.with_news(await board.wait(often.version))
            if asks and board.snapshot.version != seldom.version:
                seldom = seldom.with_news(await board.wait(seldom.version))
                assert seldom == board.snapshot
            assert often == board.snapshot

    asyncio.run(follow())
