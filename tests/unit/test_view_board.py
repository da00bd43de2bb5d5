"""Who is told which gateway's view, and when."""

from __future__ import annotations

import asyncio

from potluck_coordinator.directory.view_board import ViewBoard
from potluck_coordinator.pool_view import SharedReplica, gateway_view
from tests.support.replicas import replica_view


def a_view(name: str = "a"):
    return gateway_view([SharedReplica(replica_view(name), 1)], {}, 1.0)


async def test_a_gateway_is_told_what_others_say_once_and_at_once():
    board = ViewBoard(100, lambda: {1, 2, 3})
    first, second = a_view("a"), a_view("b")
    board.tell(2, first)
    news = await board.follow(1, 0)
    assert news.gateways == {2: first}
    waiting = asyncio.ensure_future(board.follow(1, news.version))
    await asyncio.sleep(0)
    board.tell(1, a_view("own"))
    await asyncio.sleep(0)
    assert not waiting.done()
    board.tell(3, second)
    assert (await waiting).gateways == {3: second}


async def test_a_replaced_gateways_word_is_nobodys():
    epochs = {1, 2}
    board = ViewBoard(0, lambda: epochs)
    board.tell(2, a_view())
    epochs = {1, 5}
    board.tell(2, a_view())
    board.tell(5, a_view())
    assert set((await board.follow(1, 0)).gateways) == {5}


async def test_a_version_of_an_earlier_run_with_a_later_clock_starts_anew():
    board = ViewBoard(10, lambda: {1, 2})
    board.tell(2, a_view())
    assert set((await board.follow(1, 5_000)).gateways) == {2}
