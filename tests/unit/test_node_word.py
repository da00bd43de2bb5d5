"""Which heartbeats are read, and what the directory is told of a node that only beats."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway import link_servicer
from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_coordinator.gateway.reporting import COVERS_PER_LEASE, Reporting
from potluck_coordinator.node_reports import ReportReceipt
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import Heartbeat, NodeId, NodeState
from tests.support.judged_pool import JudgedPool

COVER_SECONDS = LivenessLimits().lease_ttl_seconds / COVERS_PER_LEASE


async def test_a_heartbeat_that_comes_again_late_hides_no_later_one():
    pool = JudgedPool()
    node = await pool.add("a")
    servicer = LinkServicer(pool.links, pool.desk, pool.clock)
    beats = [Heartbeat(0, state, (), 0, number=number) for number, state in enumerate((NodeState.PAUSED, NodeState.SERVING), 1)]
    for beat in (beats[0], beats[1], beats[0], replace(beats[0], number=3)):
        servicer._take_heartbeat(codec.heartbeat_message(beat), node.session, node.session.outbox, pool.clock.seconds)
    assert node.session.state is NodeState.PAUSED


async def test_a_heartbeat_that_says_nothing_new_is_a_sign_of_life_and_leaves_the_rest_as_it_was():
    pool = JudgedPool()
    node = await pool.add("a")
    servicer, session = LinkServicer(pool.links, pool.desk, pool.clock), node.session
    full = Heartbeat(0, NodeState.PAUSED, tuple(session.engines.values()), 0, number=1)
    for message in map(codec.heartbeat_message, (full, replace(full, number=2, unchanged=True))):
        pool.clock.seconds += 1.0
        before = session.state, session.engines
        servicer._take_heartbeat(message, session, session.outbox, pool.clock.seconds)
        assert (session.heartbeat_at, session.state) == (pool.clock.seconds, NodeState.PAUSED)
    assert (session.state, session.engines) == before
    assert session.counts_by_number


async def test_answers_to_heartbeats_wait_for_each_other_and_leave_together(monkeypatch):
    monkeypatch.setattr(link_servicer, "ANSWER_SECONDS", 0.05)
    pool = JudgedPool()
    servicer = LinkServicer(pool.links, pool.desk, pool.clock)
    sessions = [(await pool.add(name)).session for name in ("a", "b")]
    frames = [asyncio.ensure_future(session.outbox.take()) for session in sessions]
    for round_number in (1, 2):
        for number, session in enumerate(sessions, 10 * round_number):
            pool.clock.seconds += 5.0
            servicer._take_heartbeat(node_pb2.Heartbeat(number=number, unchanged=True), session, session.outbox, pool.clock.seconds)
            await asyncio.sleep(0)
            assert not any(frame.done() for frame in frames)
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*frames)
        assert [answer.lease.heartbeat_number for answer in answers] == [10 * round_number, 10 * round_number + 1]
        frames = [asyncio.ensure_future(session.outbox.take()) for session in sessions]
    for frame in frames:
        frame.cancel()


class Desk:
    """A directory that takes reports, or does not."""

    def __init__(self):
        self.nodes = self
        self.run_id = "first"
        self.reports, self.covered, self.unknown, self.is_away = [], {}, frozenset(), False

    async def report(self, reports, waiting_counts, covered, *, gateway_epoch):
        if self.is_away:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)
        self.reports.append([report.node_id for report in reports])
        said = [(report.node_id, report.covered_seconds) for report in reports]
        for node_id, seconds in (*said, *zip(covered.node_ids, covered.seconds, strict=True)):
            self.covered[node_id] = self.covered.get(node_id, 0.0) + seconds
        return ReportReceipt(self.run_id, self.unknown & set(covered.node_ids))


class Told:
    """A pool whose reports go to a desk each second."""

    def __init__(self, names):
        self.pool, self.desk, self.names = JudgedPool(), Desk(), names
        self.reporting = Reporting(self.desk, LivenessLimits().lease_ttl_seconds)

    async def seconds(self, count):
        """What was told in each; what fails is as if nobody had asked."""
        found = []
        for _ in range(count):
            await self.pool.wait(1)
            self.desk.reports.clear()
            try:
                await self.reporting.report(self.pool.links._sessions.values(), {}, self.pool.clock.seconds, 1)
            except PotluckError:
                assert self.desk.is_away
            found.append(self.desk.reports.copy())
        return found


@pytest.fixture
async def told():
    told = Told(("a", "b", "c"))
    for name in told.names:
        await told.pool.add(name)
    await told.seconds(1)
    return told


async def test_of_nodes_that_only_beat_nothing_is_told_but_their_time(told):
    before = dict(told.desk.covered)
    assert await told.seconds(20) == [[[]]] * 20
    for name in told.names:
        assert told.desk.covered[name] - before[name] == pytest.approx(20, abs=COVER_SECONDS)


async def test_a_node_at_work_is_told_of_each_second_and_once_more_after_it(told):
    relay = told.pool.start(told.pool.nodes["b"])
    assert await told.seconds(3) == [[["b"]]] * 3
    told.pool.end(told.pool.nodes["b"], relay)
    assert await told.seconds(3) == [[["b"]], [[]], [[]]]


async def test_time_counts_up_to_the_moment_in_which_a_node_becomes_suspect(told):
    told.pool.nodes["c"].lively = False
    before = told.desk.covered["c"]
    found = await told.seconds(13)
    assert [["c"], ["c"]] in [[*first, *second] for first, second in itertools.pairwise(found)], "a suspect is told of each second"
    assert told.desk.covered["c"] - before == pytest.approx((LivenessLimits().missed_heartbeats_suspect + 0.5) * 5.0, abs=5.3)


async def test_a_directory_that_begins_anew_is_told_of_everybody_at_once(told):
    told.desk.run_id = "second"
    assert await told.seconds(2) == [[[], ["a", "b", "c"]], [[]]]


async def test_whom_the_directory_does_not_know_is_told_of_in_full(told):
    told.desk.unknown = frozenset({NodeId("b")})
    found = [report for second in await told.seconds(8) for report in second]
    assert ["b"] in found
    assert not any({"a", "c"} & set(report) for report in found)


async def test_what_was_not_taken_is_told_again(told):
    relay = told.pool.start(told.pool.nodes["a"])
    before = dict(told.desk.covered)
    told.desk.is_away = True
    await told.seconds(7)
    told.pool.end(told.pool.nodes["a"], relay)
    told.desk.is_away = False
    assert "a" in (await told.seconds(1))[0][0]
    await told.seconds(6)
    for name in told.names:
        assert told.desk.covered[name] - before[name] == pytest.approx(14, abs=COVER_SECONDS)
