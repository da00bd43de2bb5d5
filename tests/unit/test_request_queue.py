"""Requests that wait for a slot: whose turn it is, that full nodes cost nothing, and that what placement sees is what nodes are."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.placement import likeness
from potluck_coordinator.gateway import placing as placing_module
from potluck_coordinator.gateway import queues as queues_module
from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, EndReason, GoodbyeReason, Heartbeat, NodeId, NodeState, ReplicaId, RequestId
from tests.support.replicas import roster_of
from tests.support.request_path import request_by
from tests.support.request_queue import MODEL, SLOTS, Front, bodies_at, hello_of, settle, status_of, wish

FEW = 10
"""Replicas that are looked at, where there are 300 nodes and 64 requests wait."""


class HandClock:
    def __init__(self):
        self.seconds = 100.0

    def monotonic_seconds(self):
        return self.seconds

    def unix_ms(self):
        return int(self.seconds * 1000)


@pytest.fixture
async def front():
    front = Front(HandClock())
    yield front
    await front.stop()


def beat(front, session, state=NodeState.SERVING, **changes):
    """A heartbeat, as it comes from the link."""
    heartbeat = Heartbeat(1, state, (status_of(session.node_id, **changes),), 0)
    servicer = LinkServicer(front.links, front.directory, front.clock)
    servicer._take_heartbeat(codec.heartbeat_message(heartbeat), session, session.outbox, front.clock.seconds)


async def test_whoever_waits_longest_has_the_next_slot_and_nobody_overtakes(front):
    session = await front.joined("a")
    asked = [front.ask() for _ in range(SLOTS + 3)]
    await settle()
    assert front.requests.queues.queued_count(MODEL) == 3
    for done in range(3):
        asked[done].cancel()
        await settle()
        assert bodies_at(session) == [b"%d" % number for number in range(done + 1, done + 1 + SLOTS)]
    asked[3].cancel()
    front.ask()
    await settle()
    assert bodies_at(session) == [b"4", b"5"]


async def test_where_slots_are_free_and_a_prompt_is_read_the_wait_is_for_the_reading_and_not_for_an_answers_end():
    front = Front(HandClock(), queue_wait_seconds_max=30.0)
    session = await front.joined("a", prefill_tokens_per_second=1000.0)
    for _ in range(3):
        answer = front.ask(prompt_tokens_min=10)
        await settle()
        front.clock.seconds += 60.0
        answer.cancel()
        await settle()
    front.ask(prompt_tokens_min=1500)
    for _ in range(SLOTS):
        latest = front.ask(prompt_tokens_min=1500)
    await settle()
    waiting = front.requests.queues.waiting(AccountId("client"), RequestId("request"))
    assert waiting is not None
    assert waiting.predicted_wait_seconds == pytest.approx(1.5)
    assert (len(session.requests), front.requests.queues.queued_count(MODEL)) == (1, SLOTS - 1)
    with pytest.raises(PotluckError) as refused:
        await latest
    assert (refused.value.code, refused.value.retry_after_seconds) == (ErrorCode.QUEUE_FULL, 60.0), "no slot is left for the last"
    await front.stop()


async def test_one_that_no_free_replica_suits_does_not_hold_up_those_behind_it(front):
    long_one = await front.joined("long", prefill_tokens_per_second=1e6)
    for _ in range(SLOTS):
        front.ask(prompt_tokens_min=1500)
    await settle()
    front.ask(prompt_tokens_min=1500)
    front.ask(prompt_tokens_min=100)
    await settle()
    short_one = await front.joined("short", context_length_tokens=1000)
    await settle()
    assert (bodies_at(short_one), front.requests.queues.queued_count(MODEL)) == ([b"3"], 1)
    front.asked[0].cancel()
    await settle()
    assert bodies_at(long_one) == [b"1", b"2"]


async def test_long_prompts_that_fill_the_queue_keep_nobody_from_slots_that_are_too_short_for_them(front):
    await front.joined("long", prefill_tokens_per_second=1e6)
    short_one = await front.joined("short", context_length_tokens=1000)
    for _ in range(SLOTS + 64):
        front.ask(prompt_tokens_min=1500)
    await settle()
    assert (front.requests.queues.queued_count(MODEL), bodies_at(short_one)) == (64, [])
    for _ in range(SLOTS):
        front.ask(prompt_tokens_min=10)
    await settle()
    assert bodies_at(short_one) == [b"66", b"67"]
    with pytest.raises(PotluckError) as refused:
        await front.ask(prompt_tokens_min=10)
    assert refused.value.code is ErrorCode.QUEUE_FULL
    assert "Replicas: 2 busy." in refused.value.message


async def test_a_slot_that_came_free_between_two_looks_is_the_first_waiters_and_not_the_newcomers(front):
    await front.joined("full")
    away = await front.joined("away", slot_count=1)
    beat(front, away, slot_count=0)
    for _ in range(SLOTS):
        front.ask()
    front.ask(prompt_tokens_min=1500)
    front.ask()
    await settle()
    beat(front, away, slot_count=1, context_length_tokens=1000)
    front.ask()
    await settle()
    assert (bodies_at(away), front.requests.queues.queued_count(MODEL)) == ([b"3"], 2), "the first of those that it suits"


async def test_a_suspect_that_may_have_no_free_slot_does_not_make_the_queue_longer_than_it_may_be():
    front = Front(HandClock(), queue_length_max=1)
    await front.joined("a")
    suspect = front.ask()
    fingerprint = request_by(model_id=MODEL, body=b"0").fingerprint(front.links.culprits)
    front.links.culprits.died([fingerprint])
    await settle()
    again = [front.ask(body=b"0") for _ in range(2)]
    await settle()
    assert (front.requests.queues.queued_count(MODEL), suspect.done(), [one.done() for one in again]) == (1, False, [False, True])
    with pytest.raises(PotluckError) as refused:
        await again[1]
    assert refused.value.code is ErrorCode.QUEUE_FULL
    await front.stop()


async def test_a_request_that_a_node_gave_back_waits_for_another_node(front):
    session = await front.joined("a")
    other = await front.joined("b")
    for _ in range(2 * SLOTS):
        front.ask()
    await settle()
    attempt_id = next(iter(session.requests))
    given_back = session.requests[attempt_id].body
    session.attempts[attempt_id].end(0, EndReason.REFUSED, "")
    await settle()
    assert front.requests.queues.queued_count(MODEL) == 1
    front.requests.queues.serve_all()
    assert (given_back in bodies_at(session), front.requests.queues.queued_count(MODEL)) == (False, 1), (
        "its slot there is free, and it was tried"
    )
    first_of_other = next(task for number, task in enumerate(front.asked) if b"%d" % number == bodies_at(other)[0])
    first_of_other.cancel()
    await settle()
    tried = {request.body: other.tried(attempt_id) for attempt_id, request in other.requests.items()}
    assert tried.pop(given_back) == {session.node_id}, "should its engine die, whose second opinion could be had is known"
    assert set(tried.values()) == {frozenset()}


async def test_who_asks_now_and_then_does_not_wait_behind_who_floods(front):
    session = await front.joined("a")
    for _ in range(SLOTS + 64):
        front.ask(account_id=AccountId("flood"))
    await settle()
    polite = front.ask(account_id=AccountId("polite"))
    await settle()
    newest = front.asked[SLOTS + 63]
    assert (front.requests.queues.queued_count(MODEL), newest.done()) == (64, True)
    with pytest.raises(PotluckError) as refused:
        await newest
    assert (refused.value.code, refused.value.retry_after_seconds > 0) == (ErrorCode.QUEUE_FULL, True)
    front.asked[0].cancel()
    await settle()
    assert bodies_at(session) == [b"1", b"%d" % (SLOTS + 64)], "whoever has nothing under way comes first"
    with pytest.raises(PotluckError) as refused:
        await asyncio.gather(*(front.ask(account_id=AccountId("flood")) for _ in range(2)))
    assert refused.value.code is ErrorCode.QUEUE_FULL
    assert not polite.done()


async def test_an_answer_that_is_given_up_is_charged_its_prompt_and_what_was_relayed(front):
    await front.joined("a")
    asked = front.ask(account_id=AccountId("a"), prompt_bytes=400)
    await settle()
    account = front.requests.queues.line(MODEL).queues[ServiceTier.DEFAULT]._accounts[AccountId("a")]
    assert (account.given, account.pending) == (0, 100 + 2 * 100)
    asked.cancel()
    await settle()
    assert (account.given, account.pending) == (100, 0)


@pytest.mark.parametrize("unable", [{"state": NodeState.PAUSED}, {"slot_count": 0}, {"endpoints": ()}])
async def test_what_a_heartbeat_makes_free_is_given_when_the_queues_are_looked_at(front, unable):
    full, away = await front.joined("full"), await front.joined("away")
    beat(front, away, **unable)
    for _ in range(SLOTS + 2):
        front.ask()
    await settle()
    assert (len(bodies_at(full)), len(bodies_at(away))) == (SLOTS, 0)
    beat(front, away)
    front.requests.queues.serve_all()
    await settle()
    assert (bodies_at(away), front.requests.queues.queued_count(MODEL)) == ([b"2", b"3"], 0)


async def test_a_pool_of_full_nodes_costs_no_more_than_one(front, monkeypatch):
    looked_at = []

    def counted(draw, *arguments, **more):
        looked_at.extend(draw.offers or draw.rest)
        return placed(draw, *arguments, **more)

    placed = placing_module.place
    sessions = [await front.joined(f"node{number}") for number in range(300)]
    for _ in range(300 * SLOTS + 64):
        front.ask()
    await settle()
    assert front.requests.queues.queued_count(MODEL) == 64
    monkeypatch.setattr(placing_module, "place", counted)
    for session in sessions:
        beat(front, session)
    front.requests.queues.serve_all()
    assert looked_at == [], "nobody has a slot free, so nobody's request is looked at"
    with pytest.raises(PotluckError) as refused:
        await front.ask()
    assert refused.value.code is ErrorCode.QUEUE_FULL
    assert "Replicas: 300 busy." in refused.value.message
    front.asked[0].cancel()
    await settle()
    assert front.requests.queues.queued_count(MODEL) == 63
    assert 0 < len(looked_at) < FEW


async def test_who_has_a_session_is_enrolled_and_the_directory_is_asked_of_others(front):
    node_id = NodeId("a")
    assert await front.links.is_enrolled(node_id)
    session = await front.joined("a")
    assert await front.links.is_enrolled(node_id)
    assert front.directory.asked == [node_id], "a link that comes back waits for no directory"
    front.links.disconnect(session, session.outbox, None)
    assert await front.links.is_enrolled(node_id)
    assert front.directory.asked == [node_id], "within its grace it still has its session"
    front.links.take_snapshot(PoolSnapshot(1, {}, {}, {node_id: ""}, 1))
    await front.links.is_enrolled(node_id)
    assert front.directory.asked == [node_id, node_id], "a revoked one has none"


async def connect(front, node_id, number):
    await front.links.connect(hello_of(node_id, session_id=f"session {number % 2}", slot_count=1 + number % 3))


async def lose_link(front, node_id, number):
    session = front.links.session(node_id)
    if session is not None and session.outbox is not None:
        front.links.disconnect(session, session.outbox, GoodbyeReason.STOPPING if number == 0 else None)


async def speak(front, node_id, number):
    session = front.links.session(node_id)
    if session is not None and session.outbox is not None:
        state = NodeState.PAUSED if number == 0 else NodeState.SERVING
        beat(front, session, state, slot_count=number % 3, context_length_tokens=(0, 1000, 4000)[number % 3])


async def ask(front, node_id, number):
    front.ask(prompt_tokens_min=(10, 900, 1900)[number % 3])
    await settle()


async def leave(front, node_id, number):
    if front.asked:
        front.asked[number % len(front.asked)].cancel()
    await settle()


async def wait(front, node_id, number):
    """In steps that the gateway does not take for an absence of its own."""
    for _ in range((1, 2, 4, 7, 9)[number]):
        front.clock.seconds += 1.9
        front.links.tick()
    front.requests.queues.serve_all()


async def hear_of_an_end(front, node_id, number):
    """The replica's, the node's, or nobody's any more."""
    leaving = frozenset({ReplicaId(f"{node_id}/tiny")} if number > 2 else ())
    outcasts = {node_id: ""} if number == 0 else {}
    front.links.take_snapshot(PoolSnapshot(1, {}, {}, outcasts, 1, leaving=leaving))
    front.links.take_snapshot(PoolSnapshot(2, {}, {}, {}, 1, leaving=leaving))


async def hear_a_wish(front, node_id, number):
    session = front.links.session(node_id)
    if session is not None:
        desired = {node_id: wish(node_id, session.desired.revision + 1, slot_count=number)}
        front.links.take_snapshot(PoolSnapshot(1, {}, desired, {}, 1))


def as_found(roster):
    return {likeness(kind.sample): {replica.replica_id: replica for replica in kind.replicas()} for kind in roster.kinds(MODEL)}


def found_anew(front):
    return as_found(roster_of(replica for session in front.links.sessions for replica in session.replica_views(MODEL)))


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (connect, 0),
        (connect, 3),
        (lose_link, 0),
        (lose_link, 1),
        (speak, 0),
        (ask, 0),
        (hear_of_an_end, 0),
        (hear_of_an_end, 3),
        (hear_a_wish, 1),
        (wait, 3),
    ],
)
async def test_the_next_placement_sees_what_a_node_has_become(front, step, number):
    await front.joined("a")
    before = as_found(front.links.roster())
    await step(front, NodeId("a"), number)
    assert as_found(front.links.roster()) == found_anew(front) != before


async def play(steps):
    front = Front(HandClock(), queue_length_max=3)
    for step, name, number in steps:
        await step(front, NodeId(name), number)
        assert as_found(front.links.roster()) == found_anew(front)
    await front.stop()
    assert front.links.roster().kinds(MODEL) == ()


happenings = st.sampled_from([connect, connect, lose_link, speak, ask, ask, leave, wait, hear_of_an_end, hear_a_wish])


@settings(deadline=None)
@given(st.lists(st.tuples(happenings, st.sampled_from("abc"), st.integers(0, 4)), max_size=25))
def test_what_placement_sees_is_what_the_nodes_are_whatever_happened(steps):
    asyncio.run(play(steps))


async def test_one_whose_client_goes_in_the_moment_in_which_it_is_sent_away_harms_nobody(front, monkeypatch):
    await front.joined("a")
    for _ in range(SLOTS + 3):
        front.ask()
    await settle()
    line = front.requests.queues.line(MODEL)
    gone = next(iter(line))
    gone.turn.cancel()  # its task has not run since, so that it still stands in the line
    monkeypatch.setattr(queues_module, "is_hopeless", lambda *_: True)
    front.clock.seconds += 1.0
    front.requests.queues.serve_all()
    await settle()
    assert front.requests.queues.queued_count(MODEL) == 0
    refused = [task for task in front.asked[SLOTS:] if task.done() and not task.cancelled() and isinstance(task.exception(), PotluckError)]
    assert len(refused) == 2
