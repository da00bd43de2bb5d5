"""What the books say of a node's absences reaches the gateways, hour by hour, and from there its place among others."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.directory.absences import Absences
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.domain.survival import HISTORY_HOURS, LOSSES_PER_SECOND_GUESS, WEEK_HOURS, History
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_protocol.values import Inventory, NodeId
from tests.support.books import open_books
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import enrol, raw_link

NOW_HOUR = 490_000


class HandClock:
    def __init__(self):
        self.hour = NOW_HOUR

    def unix_ms(self):
        return self.hour * 3_600_000 + 1234

    def monotonic_seconds(self):
        return self.hour * 3600.0


@pytest.fixture
def books(database_url):
    with open_books(database_url) as opened:
        opened.add_people("ann")
        for name in ("stays", "leaves", "new"):
            opened.run_now(lambda work, name=name: work.nodes.add(_node(name)))

        def book(work):
            # Four hours of each week, and two weeks more than anybody looks back.
            for hour in (
                hour for hour in range(NOW_HOUR - HISTORY_HOURS - 336, NOW_HOUR) if (hour - NOW_HOUR) % WEEK_HOURS in (0, 1, 3, 4)
            ):
                work.uptime.add(hour, {NodeId("stays"): (60, 0)})
                is_away = (hour - NOW_HOUR) % WEEK_HOURS == 1
                work.uptime.add(hour, {NodeId("leaves"): (20, 40) if is_away else (60, 0)})

        opened.run_now(book)
        yield opened


def _node(name):
    return EnrolledNode(NodeId(name), "ann", name, name.encode(), NodeStatus.ACTIVE, "", 0, Inventory(), "test", 5, 6)


def test_histories_are_of_the_last_weeks_and_of_the_hours_asked_for(books):
    histories = books.run_now(
        lambda work: work.uptime.histories(NOW_HOUR - HISTORY_HOURS, (NOW_HOUR % WEEK_HOURS, (NOW_HOUR + 1) % WEEK_HOURS))
    )
    assert histories["stays"] == (History(32 * 60, 0, 0), History(16 * 60, 0, 0))
    assert histories["leaves"] == (History(24 * 60 + 8 * 20, 8 * 40, 8), History(8 * 60 + 8 * 20, 8 * 40, 8))
    assert "new" not in histories


async def test_gateways_hear_it_once_an_hour_and_anew_in_the_next(books):
    clock, board = HandClock(), SnapshotBoard(1)
    absences = Absences(books.store, board, clock)
    await absences.foresee()
    told = board.snapshot
    assert told.losses_per_second["leaves"] > 20 * told.losses_per_second["stays"]
    assert told.losses_per_second["stays"] < LOSSES_PER_SECOND_GUESS
    await absences.foresee()
    assert board.snapshot is told
    clock.hour += 3
    await absences.foresee()
    assert board.snapshot.losses_per_second["leaves"] < told.losses_per_second["leaves"] / 5, "it stays at other hours"


async def test_placement_sees_it(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            links = coordinator.gateway._links
            (session,) = links.sessions
            (view,) = session.replica_views(TINY)
            assert view.losses_per_second == LOSSES_PER_SECOND_GUESS
            snapshot = coordinator.directory.pool._board
            snapshot.publish(losses_per_second={session.node_id: 0.001})
            while session.losses_per_second != 0.001:
                await asyncio.sleep(0.02)
            (kind,) = links.roster().kinds(view.model_id)
            assert kind.sample.losses_per_second == 0.001
