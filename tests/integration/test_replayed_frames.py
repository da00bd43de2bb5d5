"""Every frame of a recorded session, sent again in any order, changes nothing: neither what is known of the node nor a posting."""

from __future__ import annotations

import asyncio
import hashlib
import random
from contextlib import nullcontext

import pytest

from potluck_protocol.errors import PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import EndReason, NodeState
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, read_all, settled_balance, token

LEDGER_TABLES = ("ledger_account", "ledger_transaction", "posting", "hold", "hold_payee")


class RecordedCall:
    """A link's call that remembers what was written to it."""

    def __init__(self, call):
        self._call = call
        self.frames: list[bytes] = []

    async def write(self, frame):
        self.frames.append(frame.SerializeToString())
        await self._call.write(frame)

    def __getattr__(self, name):
        return getattr(self._call, name)


async def ledger_of(coordinator):
    """All of the books about money."""

    def read(work):
        rows = hashlib.sha256()
        for table in LEDGER_TABLES:
            found = work.ledger._connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            assert found or table == "hold_payee", table
            rows.update(repr((table, [tuple(row) for row in found])).encode())
        return rows.hexdigest()

    return await coordinator.directory._store.run(read)


def known_of(coordinator, node):
    """All that the gateway knows of the node, but for when it was last heard."""
    session = coordinator.gateway._links.session(node.credentials.node_id)
    return (
        session.epoch,
        session.state,
        session.engines,
        dict(session.attempts),
        dict(session.attempts_by_replica),
        session.suspect,
        session.heartbeat_at,
        session._gap_counts,
        [(view.in_flight_count, view.slot_count, view.ready, view.node_suspect) for view in session.replica_views(TINY)],
        {relay.attempt_id: (relay.next_sequence, relay.received_bytes, relay.over) for relay in session.attempts.values()},
    )


async def answered(coordinator, node, number, *, reason=EndReason.COMPLETED):
    """One request, with everything that a node says of one."""
    answer, start = await begin(coordinator, node, number)
    await node.chunk(start.attempt_id, 1, token("two"))
    last = token("three") + (USAGE_EVENT + DONE if reason is EndReason.COMPLETED else b"")
    await node.chunk(start.attempt_id, 2, last)
    await node.end(start.attempt_id, 3, reason)
    # One that its node breaks off has nowhere else to go.
    with nullcontext() if reason is EndReason.COMPLETED else pytest.raises(PotluckError):
        await read_all(answer)
    await answer.close()


async def heard_everything(coordinator, node):
    """The coordinator has read all that was written before: it has heard a newer heartbeat."""
    await node.beat()
    number = node_pb2.NodeFrame.FromString(node.call.frames[-1]).heartbeat.number
    session = coordinator.gateway._links.session(node.credentials.node_id)
    async with asyncio.timeout(10):
        while not session.has_heard(number):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
async def test_a_recorded_session_sent_three_times_more_and_shuffled_changes_neither_state_nor_ledger(tmp_path, seed):
    async with running_coordinator(tmp_path) as coordinator, raw_link(coordinator, await enrol(coordinator)) as node:
        node.call = recorded = RecordedCall(node.call)
        await node.hello()
        await node.beat()
        await answered(coordinator, node, 0)
        await node.beat(NodeState.SERVING)
        await answered(coordinator, node, 1, reason=EndReason.CANCELLED)
        await settled_balance(coordinator)
        # One is on its way: what it has said comes again in the middle of it.
        running, start = await begin(coordinator, node, 2)
        await node.chunk(start.attempt_id, 1, token("two"))
        await heard_everything(coordinator, node)
        # But for the hello, which a servicer takes once a link, and no goodbye was said.
        frames = [frame for frame in recorded.frames if not node_pb2.NodeFrame.FromString(frame).HasField("hello")]
        assert len(frames) > 10
        before = known_of(coordinator, node), await ledger_of(coordinator)
        again = frames * 3
        random.Random(seed).shuffle(again)
        for frame in again:
            await recorded._call.write(node_pb2.NodeFrame.FromString(frame))
        for frame in frames:
            ghost = node_pb2.NodeFrame.FromString(frame)
            ghost.epoch += 1
            await recorded._call.write(ghost)
        # A heartbeat would be news: what is written behind all frames is a chunk that came before.
        await node.chunk(start.attempt_id, 0, token("one"))
        await asyncio.sleep(0.5)
        assert (known_of(coordinator, node), await ledger_of(coordinator)) == before
        await node.chunk(start.attempt_id, 2, token("three") + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 3)
        assert (await read_all(running)).count(b"data:") == 4, "three tokens and the end, each once"
        await settled_balance(coordinator)
        assert len(coordinator.gateway._links.sessions) == 1


async def test_what_comes_of_an_attempt_that_is_over_is_cancelled_and_unpaid(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, raw_link(coordinator, await enrol(coordinator)) as node:
        await node.hello()
        answer, start = await begin(coordinator, node)
        await answer.next_data()
        await answer.close()
        paid = (await settled_balance(coordinator)).earned_micro_credits
        before = await ledger_of(coordinator)
        node.received.clear()
        await node.chunk(start.attempt_id, 1, token("late") * 50 + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 2)
        assert (await settled_balance(coordinator)).earned_micro_credits == paid
        assert await ledger_of(coordinator) == before
        assert answer.charge_micro_credits == paid
