"""What the directory keeps of requests that engines died of, for how long, and how much of it one node can make it keep."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace

from potluck_coordinator.desks import SessionGrant
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.lethal_requests import LethalRequests
from potluck_coordinator.domain.lethal import DEATHS_HEARD_MAX, DEATHS_HEARD_SECONDS, SUSPECT_KEPT_MS, LoneDeath
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_coordinator.gateway.relay import Relay
from potluck_protocol.culprits import Fingerprint
from potluck_protocol.values import (
    AccountId,
    AttemptId,
    DesiredState,
    Endpoint,
    Hello,
    Inventory,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
    StartAttempt,
)
from tests.support.books import Books
from tests.support.request_path import request_by

NODE, REPLICA = NodeId("node"), ReplicaId("node/tiny")
SUSPECT, REFUSED = Fingerprint(b"s" * 16), Fingerprint(b"r" * 16)


@contextmanager
def lethal_desk(database_url):
    books = Books(database_url)
    try:
        board = SnapshotBoard(1)
        yield books, board, LethalRequests(books.store, board, books.clock)
    finally:
        books.store.close()


def known(board):
    return set(board.snapshot.suspect_requests), set(board.snapshot.refused_requests)


async def test_a_suspect_is_let_go_after_its_time_and_what_is_refused_stays(database_url):
    with lethal_desk(database_url) as (books, board, desk):
        for number, (fingerprint, owner) in enumerate(((SUSPECT, "ann"), (REFUSED, "ann"), (REFUSED, "bob"))):
            await desk.report_death(LoneDeath(AttemptId(f"a{number}"), fingerprint, AccountId(owner), is_only_owner=False))
        books.clock.advance(SUSPECT_KEPT_MS / 1000 - 1)
        version = board.snapshot.version
        await desk.forget_old()
        assert known(board) == ({SUSPECT}, {REFUSED})
        assert board.snapshot.version == version
        books.clock.advance(1)
        await desk.forget_old()
        assert known(board) == (set(), {REFUSED})
        assert [one.fingerprint for one in books.run_now(lambda work: work.lethal_requests.all())] == [REFUSED]


async def test_what_lapsed_while_no_coordinator_ran_is_not_told_to_gateways(database_url):
    with lethal_desk(database_url) as (books, board, desk):
        await desk.report_death(LoneDeath(AttemptId("a"), SUSPECT, AccountId("ann"), is_only_owner=False))
        books.clock.advance(SUSPECT_KEPT_MS / 1000)
        await LethalRequests(books.store, board, books.clock).load()
        assert known(board) == (set(), set())


async def test_a_node_that_claims_deaths_without_end_is_heard_now_and_then(database_url):
    with lethal_desk(database_url) as (books, board, desk):
        links = Links(SimpleNamespace(lethal=desk), LivenessLimits(), books.clock, lambda: None)
        hello = Hello(1, NODE, SessionId("session"), "test", Inventory(), NodeState.SERVING)
        claimed = 0

        async def claim(count, session):
            nonlocal claimed
            for _ in range(count):
                claimed += 1
                now, attempt_id, body = books.clock.monotonic_seconds(), AttemptId(f"a{claimed}"), b"%d" % claimed
                start = StartAttempt(attempt_id, REPLICA, Endpoint.CHAT_COMPLETIONS, body, True, 100)
                session.start(start, Relay(attempt_id, 100, now, lambda *_: None), now, request_by(body=body))
                links.engine_died(session, attempt_id)
                session.finish(attempt_id, REPLICA)
            await asyncio.gather(*links._closings)

        def connected():
            session = NodeSession(hello, SessionGrant(1, AccountId("ann"), DesiredState()), books.clock.monotonic_seconds())
            session.outbox = Outbox()
            return session

        await claim(DEATHS_HEARD_MAX + 5, connected())
        await claim(5, connected())  # to come anew is no way round
        assert len(board.snapshot.suspect_requests) == DEATHS_HEARD_MAX
        books.clock.advance(DEATHS_HEARD_SECONDS)
        await claim(1, connected())
        assert len(board.snapshot.suspect_requests) == DEATHS_HEARD_MAX + 1
        assert len(links._deaths_heard._at[NODE]) == 1
