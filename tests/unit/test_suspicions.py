"""A replica that failed twice gets a probe instead of requests, through real links: what counts, what is asked, how it comes back."""

from __future__ import annotations

import asyncio
import json

import pytest

from potluck_coordinator.domain.suspicion import REFUSALS_MAX, Standing
from potluck_coordinator.gateway import probing
from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_coordinator.gateway.relay import AnswerHead
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import EndReason, GoodbyeReason, NodeState
from tests.support.judged_pool import JudgedPool


@pytest.fixture
async def pool():
    pool = JudgedPool()
    yield pool
    await pool.links._probing.stop()


def ends(pool, node, relay, reason, *, blamed=False):
    """The node's word, as it comes off the link."""
    end = node_pb2.AttemptEnd(
        attempt_id=relay.attempt_id, sequence=relay.next_sequence, reason=codec.END_REASON_NUMBER[reason], blamed=blamed
    )
    LinkServicer(pool.links, pool.desk, pool.clock)._take_ends(node_pb2.NodeFrame(ends=[end]), node.session)
    pool.links.finish(node.session, relay.attempt_id, node.replica_id)


def standing(pool, node):
    return pool.links.suspicions.standing(node.replica_id)


async def suspected(pool, node):
    for _ in range(2):
        ends(pool, node, pool.start(node), EndReason.ENGINE_FAILED)
    await pool.wait(0.5)
    return node.starts[-1]


def answer_probe(pool, node, probe, *, status=200, reason=EndReason.COMPLETED):
    relay = node.session.attempts[probe.attempt_id]
    relay.head = AnswerHead(status, "text/event-stream")
    pool.give(node, relay)
    relay.end(1, reason, "")


async def test_two_broken_answers_stop_requests_and_bring_a_probe_of_one_token(pool):
    node = await pool.add("node")
    node.talks = False
    probe = await suspected(pool, node)
    assert node.view.node_suspect
    body = json.loads(probe.body)
    assert (body["model"], body["max_tokens"], body["stream"]) == ("tiny", 1, True)
    assert probe.attempt_id.startswith("probe_")
    assert len(node.starts) == 3, "one probe at a time"
    again = await pool.add("again")
    again.talks = False
    assert (await suspected(pool, again)).body != probe.body, "no cache answers it"


async def test_a_good_probe_opens_it_to_one_request_and_a_good_answer_to_all(pool):
    node, other = await pool.add("node"), await pool.add("other")
    node.talks = False
    answer_probe(pool, node, await suspected(pool, node))
    await pool.wait(0.5)
    assert standing(pool, node) is Standing.HALF_OPEN
    assert not node.view.node_suspect
    assert node.view.half_open
    # While nobody else answers, it gets what there is.
    pool.links.disconnect(other.session, other.session.outbox, None)
    await pool.wait(0.25)
    assert not node.view.half_open
    await pool.links.connect(other.hello)
    await pool.wait(0.25)
    assert node.view.half_open
    pool.end(node, pool.start(node))
    assert standing(pool, node) is Standing.TRUSTED
    assert not node.view.half_open


@pytest.mark.parametrize(("status", "reason"), [(500, EndReason.COMPLETED), (200, EndReason.ENGINE_FAILED), (200, EndReason.REFUSED)])
async def test_a_bad_probe_is_followed_by_another_after_two_seconds(pool, status, reason):
    node = await pool.add("node")
    node.talks = False
    answer_probe(pool, node, await suspected(pool, node), status=status, reason=reason)
    await pool.wait(1.5)
    assert standing(pool, node) is Standing.SUSPECTED
    assert len(node.starts) == 3
    await pool.wait(1)
    assert len(node.starts) == 4


async def test_a_probe_that_breaks_before_it_is_sent_counts_as_a_bad_one_and_is_not_begun_at_every_look(pool, monkeypatch):
    made = []

    def broken(*arguments):
        made.append(arguments)
        raise ValueError("a fault of ours")

    monkeypatch.setattr(probing, "parse_request", broken)
    node = await pool.add("node")
    node.talks = False
    await suspected(pool, node)
    assert len(made) == 1
    await pool.wait(1.5)
    assert (len(made), standing(pool, node), pool.links._probing.attempt_ids) == (1, Standing.SUSPECTED, set())
    await pool.wait(1)
    assert len(made) == 2, "after two seconds, as any bad one"


async def test_a_probe_that_nobody_counts_any_more_ends_in_peace(pool):
    troubles = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    node = await pool.add("node")
    node.talks = False
    probe = await suspected(pool, node)
    pool.links._probing._running.clear()
    answer_probe(pool, node, probe)
    async with asyncio.timeout(5):
        while standing(pool, node) is not Standing.HALF_OPEN:
            await asyncio.sleep(0)
    await asyncio.sleep(0)  # its task's callbacks
    assert (troubles, standing(pool, node)) == ([], Standing.HALF_OPEN)


@pytest.mark.parametrize(
    ("reason", "blamed"),
    [
        (EndReason.ENGINE_FAILED, True),
        (EndReason.CANCELLED, False),
        (EndReason.COMPLETED, False),
    ],
)
async def test_what_requests_and_owners_do_is_held_against_no_replica(pool, reason, blamed):
    node = await pool.add("node")
    for _ in range(5):
        ends(pool, node, pool.start(node), reason, blamed=blamed)
    assert standing(pool, node) is Standing.TRUSTED


@pytest.mark.parametrize("reason", [EndReason.REFUSED, EndReason.HANDED_BACK])
async def test_a_replica_that_takes_nothing_though_its_node_serves_is_suspected_and_one_of_a_node_that_rests_is_not(pool, reason):
    serving, resting = await pool.add("serving"), await pool.add("resting")
    resting.session.state = NodeState.DRAINING
    for _ in range(REFUSALS_MAX + 1):
        assert (standing(pool, serving), standing(pool, resting)) == (Standing.TRUSTED, Standing.TRUSTED)
        for node in (serving, resting):
            ends(pool, node, pool.start(node), reason)
    assert (standing(pool, serving), standing(pool, resting)) == (Standing.SUSPECTED, Standing.TRUSTED)


async def test_a_node_that_says_goodbye_to_its_answers_time_after_time_is_suspected(pool):
    node = await pool.add("node")
    for _ in range(REFUSALS_MAX + 1):
        assert standing(pool, node) is Standing.TRUSTED
        pool.start(node)
        outbox = node.session.outbox
        await pool.links.disconnect(node.session, outbox, GoodbyeReason.STOPPING)
        node = await pool.add("node")
    assert standing(pool, node) is Standing.SUSPECTED


def answers(pool, node, status, reason=EndReason.COMPLETED):
    """An attempt that gets an answer of this status in place of tokens, and its end."""
    relay = pool.start(node, tokens=0)
    relay.head = AnswerHead(status, "application/json")
    pool.give(node, relay)
    ends(pool, node, relay, reason)


def probes(node):
    return [start for start in node.starts if start.attempt_id.startswith("probe_")]


@pytest.mark.parametrize("status", [204, 400, 404, 422, 500, 502])
async def test_an_engine_that_answers_errors_is_probed_and_suspected_by_what_it_answers_to_that(pool, status):
    node = await pool.add("node")
    node.talks = False
    answers(pool, node, status)
    await pool.wait(0.5)
    assert probes(node) == []
    answers(pool, node, status)
    await pool.wait(0.5)
    (probe,) = probes(node)
    assert (standing(pool, node), node.view.node_suspect) == (Standing.TRUSTED, False), "its requests may be at fault"
    answer_probe(pool, node, probe, status=status)
    await pool.wait(0.25)
    assert standing(pool, node) is Standing.SUSPECTED
    await pool.wait(2.5)
    answer_probe(pool, node, probes(node)[1])
    await pool.wait(0.25)
    assert standing(pool, node) is Standing.HALF_OPEN


async def test_a_healthy_replica_that_gets_nonsense_stays_trusted_and_is_seldom_probed(pool):
    node = await pool.add("node")
    node.talks = False
    for _ in range(80):
        answers(pool, node, 400)
        await pool.wait(0.25)
        for relay in tuple(node.session.attempts.values()):
            relay.head = AnswerHead(200, "text/event-stream")
            pool.give(node, relay)
            relay.end(1, EndReason.COMPLETED, "")
    assert standing(pool, node) is Standing.TRUSTED
    assert 1 <= len(probes(node)) <= 3


async def test_a_doubted_replica_without_a_free_slot_is_probed_once_it_has_one_and_one_that_is_lost_meanwhile_is_not_suspected(pool):
    node = await pool.add("node", slot_count=1)
    node.talks = False
    answers(pool, node, 500)
    answers(pool, node, 500)
    long = pool.start(node)
    await pool.wait(0.5)
    assert probes(node) == []
    pool.links.finish(node.session, long.attempt_id, node.replica_id)
    await pool.wait(0.5)
    assert len(probes(node)) == 1
    pool.links.close(node.session, None)
    await asyncio.sleep(0)
    assert standing(pool, node) is Standing.TRUSTED


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_an_error_does_not_open_what_is_half_open(pool, status):
    node, _ = await pool.add("node"), await pool.add("other")
    node.talks = False
    answer_probe(pool, node, await suspected(pool, node))
    await pool.wait(0.5)
    answers(pool, node, status)
    assert standing(pool, node) is Standing.HALF_OPEN
    pool.end(node, pool.start(node))
    assert standing(pool, node) is Standing.TRUSTED


@pytest.mark.parametrize("status", [429, 503])
async def test_an_engine_that_says_it_is_busy_where_it_had_a_slot_has_refused(pool, status):
    node = await pool.add("node")
    for _ in range(REFUSALS_MAX + 1):
        assert standing(pool, node) is Standing.TRUSTED
        answers(pool, node, status)
        pool.clock.seconds += 1
    assert standing(pool, node) is Standing.SUSPECTED


@pytest.mark.parametrize(
    ("code", "count"),
    [(ErrorCode.ENGINE_FAILED, 2), (ErrorCode.INVALID_REQUEST, REFUSALS_MAX + 1), (ErrorCode.CONTEXT_LENGTH_EXCEEDED, None)],
)
async def test_what_its_like_answers_was_this_ones_failure_and_its_refusals_count_while_it_answers_nothing(pool, code, count):
    node = await pool.add("node")
    outdone = []
    while standing(pool, node) is Standing.TRUSTED and len(outdone) < 10:
        outdone.append(code)
        pool.links.suspicions.outdone(node.session, node.replica_id, code, by_its_like=True)
        pool.clock.seconds += 1
    assert len(outdone) == (count or 10)
    taker = await pool.add("taker")
    for _ in range(10):
        pool.links.suspicions.outdone(taker.session, taker.replica_id, ErrorCode.INVALID_REQUEST, by_its_like=True)
        pool.clock.seconds += 1
        pool.end(taker, pool.start(taker))
    assert standing(pool, taker) is Standing.TRUSTED


async def test_a_body_that_another_kind_of_engine_takes_is_an_error_that_a_probe_decides(pool):
    node = await pool.add("node")
    node.talks = False
    for _ in range(20):
        answers(pool, node, 400)
        pool.links.suspicions.outdone(node.session, node.replica_id, ErrorCode.INVALID_REQUEST, by_its_like=False)
        pool.clock.seconds += 1
    assert standing(pool, node) is Standing.TRUSTED
    await pool.wait(0.5)
    (probe,) = probes(node)
    answer_probe(pool, node, probe, status=400)
    await pool.wait(0.25)
    assert standing(pool, node) is Standing.SUSPECTED


@pytest.mark.parametrize("by_its_like", [True, False])
async def test_a_body_that_another_node_takes_keeps_no_replica_out_that_has_passed_its_probe(pool, by_its_like):
    node = await pool.add("node")
    node.talks = False
    answer_probe(pool, node, await suspected(pool, node))
    await pool.wait(0.5)
    for _ in range(10):
        answers(pool, node, 400)
        pool.links.suspicions.outdone(node.session, node.replica_id, ErrorCode.INVALID_REQUEST, by_its_like=by_its_like)
        pool.clock.seconds += 1
    assert standing(pool, node) is Standing.HALF_OPEN
    pool.end(node, pool.start(node))
    assert standing(pool, node) is Standing.TRUSTED


async def test_a_client_that_goes_away_is_held_against_no_replica(pool):
    node = await pool.add("node")
    for _ in range(5):
        relay = pool.start(node)
        pool.links.finish(node.session, relay.attempt_id, node.replica_id)
    assert standing(pool, node) is Standing.TRUSTED


@pytest.mark.parametrize(
    ("goodbye", "expected"),
    [(None, Standing.SUSPECTED), (GoodbyeReason.STOPPING, Standing.TRUSTED), (GoodbyeReason.REVOKED, Standing.TRUSTED)],
)
async def test_a_node_that_is_lost_from_two_answers_is_suspected_when_it_comes_back(pool, goodbye, expected):
    node = await pool.add("node")
    for _ in range(2):
        pool.start(node)
    pool.links.close(node.session, goodbye)
    back = await pool.add("node")
    assert back.session is not node.session
    assert standing(pool, back) is expected
    assert back.view.node_suspect is (expected is Standing.SUSPECTED)
    await pool.wait(0.5)
    assert len(back.starts) == (expected is Standing.SUSPECTED), "it is probed at once"


async def test_two_stalls_on_a_frozen_node_are_two_failures(pool):
    node = await pool.add("node")
    await pool.add("other")
    relays = [pool.start(node) for _ in range(2)]
    node.lively = False
    await pool.wait(4)
    assert all(relay.over for relay in relays)
    assert standing(pool, node) is Standing.SUSPECTED
    assert len(node.starts) == 2, "a node that says nothing is not probed"


async def test_an_engine_that_dies_of_a_probe_makes_no_request_lethal(pool):
    node = await pool.add("node")
    node.talks = False
    probe = await suspected(pool, node)
    relay = node.session.attempts[probe.attempt_id]
    end = node_pb2.AttemptEnd(attempt_id=probe.attempt_id, sequence=0, reason=node_pb2.END_REASON_ENGINE_FAILED, blamed=True)
    LinkServicer(pool.links, pool.desk, pool.clock)._take_ends(node_pb2.NodeFrame(ends=[end]), node.session)
    await pool.wait(0.5)
    assert relay.over
    assert pool.desk.deaths == []
    assert not pool.links.culprits.has_any
    assert standing(pool, node) is Standing.SUSPECTED


async def test_what_is_no_longer_wished_anywhere_is_forgotten(pool):
    node = await pool.add("node")
    await suspected(pool, node)
    pool.links.suspicions.retain([node.replica_id])
    assert standing(pool, node) is Standing.SUSPECTED
    pool.links.suspicions.retain([])
    assert standing(pool, node) is Standing.TRUSTED
