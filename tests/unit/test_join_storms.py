"""Many nodes at once: whose questions go to the books together, who is sent away from the door, and what the log says."""

from __future__ import annotations

import ast
import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
import structlog

from potluck_coordinator.directory.gathering import LOT_MAX, Gathering
from potluck_coordinator.domain.doorway import COME_AGAIN_SECONDS, WAITING_MAX, come_again_seconds
from potluck_coordinator.gateway import doorway as doorway_module
from potluck_coordinator.gateway.doorway import Doorway
from potluck_coordinator.log_surges import LINES_PER_SECOND_MAX, OF_NODES, LogSurges
from potluck_protocol.errors import ErrorCode, PotluckError

COORDINATOR = Path(__file__).resolve().parents[2] / "coordinator/potluck_coordinator"
NEVER_HELD_BACK = {
    "grpc_call": "a request's own line; those of links are held back by their method",
    "node_revoked": "the operator's own doing, one command each",
    "node_trusted": "as that",
    "node_distrusted": "as that",
    "settlement_refused": "money: each one counts",
}
"""Events that name a node, a replica or an attempt all the same."""


class Books:
    """Answers a lot when it is told to."""

    def __init__(self):
        self.lots, self.go, self.error = [], asyncio.Event(), None
        self.gathering = Gathering(self.answer)

    async def answer(self, lot):
        self.lots.append(dict(lot))
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return {key: said * 2 for key, said in lot.items() if key != "nobody"}

    def ask(self, *questions):
        return [asyncio.ensure_future(self.gathering.ask(key, said)) for key, said in questions]


async def test_what_comes_while_one_lot_is_answered_goes_together():
    books = Books()
    first = books.ask(("a", 1))
    await asyncio.sleep(0)
    others = books.ask(("b", 2), ("nobody", 3), ("c", 4))
    await asyncio.sleep(0)
    assert books.lots == [{"a": 1}]
    books.go.set()
    assert await asyncio.gather(*first, *others) == [2, 4, None, 8]
    assert books.lots == [{"a": 1}, {"b": 2, "nobody": 3, "c": 4}]


async def test_a_node_that_asks_twice_gets_two_answers_of_two_lots_and_no_lot_is_larger_than_its_bound():
    books = Books()
    books.go.set()
    asked = books.ask(("a", 1), ("a", 5), *((f"n{number}", 1) for number in range(LOT_MAX + 3)))
    answers = await asyncio.gather(*asked)
    assert answers[:2] == [2, 10]
    assert max(map(len, books.lots)) == LOT_MAX
    assert sum(map(len, books.lots)) == len(asked)


async def test_who_asks_at_the_very_moment_in_which_the_last_answer_came_is_answered_too():
    books = Books()
    first = books.ask(("a", 1))
    await asyncio.sleep(0)
    books.go.set()
    last = books.ask(("b", 2))
    assert await asyncio.wait_for(asyncio.gather(*first, *last), 1) == [2, 4]


async def test_a_lot_that_fails_fails_all_of_its_own_and_nobody_else():
    books = Books()
    books.go.set()
    books.error = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)
    failed = await asyncio.gather(*books.ask(("a", 1), ("b", 2)), return_exceptions=True)
    assert failed == [books.error, books.error]
    books.error = None
    assert await books.gathering.ask("c", 3) == 6


async def test_who_was_answered_and_asks_again_at_once_is_answered_again():
    books = Books()
    books.go.set()
    async with asyncio.timeout(5):
        assert [await books.gathering.ask("a", number) for number in range(3)] == [0, 2, 4]


async def test_who_stops_waiting_holds_nobody_up():
    books = Books()
    gone, stays = books.ask(("a", 1), ("b", 2))
    await asyncio.sleep(0)
    gone.cancel()
    books.go.set()
    assert await stays == 4


def test_there_is_room_for_so_many_and_more_are_to_come_again():
    assert come_again_seconds(0) is None
    assert come_again_seconds(WAITING_MAX - 1) is None
    assert come_again_seconds(WAITING_MAX) == COME_AGAIN_SECONDS


def test_a_place_at_the_door_is_given_back_whatever_comes_of_it(monkeypatch):
    monkeypatch.setattr(doorway_module, "come_again_seconds", lambda waiting: 5.0 if waiting >= 1 else None)
    door = Doorway()
    with door.place(), pytest.raises(PotluckError) as refused, door.place():
        pass
    with suppress(KeyError), door.place():
        raise KeyError
    assert (refused.value.code, refused.value.retry_after_seconds) == (ErrorCode.QUEUE_FULL, 5.0)
    with door.place():
        pass


@pytest.fixture
def log():
    """What is written, and the clock's hand."""
    written, now = [], [0.0]
    surges = LogSurges(lambda: now[0])
    structlog.configure(processors=[surges, lambda _logger, _method, event: written.append(event) or str(event)])
    yield written, now, surges
    structlog.reset_defaults()


def test_of_a_thousand_nodes_in_a_second_ten_lines_are_written_and_one_that_counts_the_others(log):
    written, now, surges = log
    for number in range(1000):
        structlog.get_logger().info("node_connected", node_id=number)
        structlog.get_logger().info("grpc_call", method="NodeService/Link")
        structlog.get_logger().info("grpc_call", method="PoolService/ListNodes")
    assert sum(line["event"] == "node_connected" for line in written) == LINES_PER_SECOND_MAX
    assert sum(line.get("method") == "NodeService/Link" for line in written) == LINES_PER_SECOND_MAX
    assert sum(line.get("method") == "PoolService/ListNodes" for line in written) == 1000, "a client's call keeps its line"
    now[0] = 1.0
    surges.tell()
    held_back = 1000 - LINES_PER_SECOND_MAX
    assert written[-1] == {"event": "lines_held_back", "node_connected": held_back, "grpc_call": held_back}


def test_ordinary_joins_keep_their_lines_and_nothing_else_is_said(log):
    written, now, surges = log
    for second in range(20):
        now[0] = float(second)
        structlog.get_logger().info("node_connected", node_id=second)
        surges.tell()
    assert [line["event"] for line in written] == ["node_connected"] * 20


def logged_events():
    """Each log call of the coordinator: its event, where that is written out, and the names of what it tells beside it."""
    for path in COORDINATOR.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "_log":
                names = {keyword.arg for keyword in call.keywords if keyword.arg} | set(ast.unparse(call).split("'"))
                for word in ast.walk(call.args[0]):
                    if isinstance(word, ast.Constant) and isinstance(word.value, str):
                        yield word.value, names


def test_every_event_that_names_a_node_a_replica_or_an_attempt_is_held_to_so_many_a_second():
    events = list(logged_events())
    of_nodes = {event for event, names in events if names & {"node_id", "replica_id", "attempt_id"}}
    assert {"node_connected", "attempt_stalled", "replica_standing_changed", "grpc_call"} <= of_nodes, "none is found any more"
    assert of_nodes - OF_NODES == set(NEVER_HELD_BACK), "a new event belongs in OF_NODES, or here with its reason"
    assert {event for event, _ in events} >= OF_NODES, "an event has another name now"


def test_lines_of_attempts_and_replicas_are_held_back_as_those_of_nodes_are(log):
    written, now, surges = log
    for _ in range(500):
        for event in sorted(OF_NODES):
            structlog.get_logger().warning(event)
    assert len(written) == len(OF_NODES) * LINES_PER_SECOND_MAX
    now[0] = 1.0
    surges.tell()
    assert written[-1] == {"event": "lines_held_back", **dict.fromkeys(OF_NODES, 500 - LINES_PER_SECOND_MAX)}
