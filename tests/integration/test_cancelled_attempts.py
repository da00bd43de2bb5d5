"""Attempts that are cancelled, started again or never acknowledged: run once, ended once, and then nothing of them stays with the node."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from potluck_node.attempts import DELIVERED_KEPT_SECONDS, UNDELIVERED_KEPT_SECONDS, Attempts
from potluck_node.delivery import Delivery
from potluck_node.engine_exchange import EngineConnections
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, Endpoint, NodeState, StartAttempt
from tests.support.engines import MovedClock
from tests.support.link_coordinator import link_coordinator
from tests.support.node_engine import REPLICA, DirectedEngine, FixedReplicas, directed_engine, wired_node

EVENT = b"data: " + b"x" * 50_000 + b"\n\n"
CANCEL_COUNT = 100


@pytest.fixture
async def engine() -> AsyncIterator[DirectedEngine]:
    async with directed_engine() as running:
        yield running


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
async def attempts(engine: DirectedEngine, clock: MovedClock) -> AsyncIterator[Attempts]:
    made = Attempts(
        replicas=FixedReplicas(engine.url, slot_count=4),
        connections=EngineConnections(),
        clock=clock,
        node_state=lambda: NodeState.SERVING,
        slot_count_max=None,
    )
    yield made
    await made.close()


async def streaming(attempts: Attempts, engine: DirectedEngine, name: str) -> AttemptId:
    """An attempt whose first chunk was sent and not acknowledged."""
    attempts.start(start_of(name))
    (await engine.next_conversation()).say(EVENT)
    await until_sent(attempts, "chunks")
    return AttemptId(name)


async def ended(attempts: Attempts, engine: DirectedEngine, name: str) -> AttemptId:
    """An attempt of one chunk, sent with its end and not acknowledged."""
    attempts.start(start_of(name))
    conversation = await engine.next_conversation()
    conversation.say(EVENT)
    conversation.finish()
    await until_sent(attempts, "ends")
    return AttemptId(name)


def start_of(name: str) -> StartAttempt:
    return StartAttempt(AttemptId(name), REPLICA, Endpoint.CHAT_COMPLETIONS, b"{}", stream=True, window_bytes=2 * len(EVENT))


async def until_sent(attempts: Attempts, part: str) -> None:
    """Sends until there is such a part in what is sent."""
    frame = node_pb2.NodeFrame()
    async with asyncio.timeout(5):
        while not getattr(frame, part):
            await asyncio.sleep(0.001)
            attempts.move_into(frame, 10 * len(EVENT))


async def test_cancelled_attempts_leave_nothing_behind(attempts, engine) -> None:
    for number in range(CANCEL_COUNT):
        attempt_id = await streaming(attempts, engine, f"a{number}")
        attempts.cancel(attempt_id)
        assert attempts.in_flight == (), "nobody will acknowledge it, so nothing may wait for that"
        frame = node_pb2.NodeFrame()
        assert attempts.move_into(frame, 1000)
        assert [(end.attempt_id, end.sequence, end.reason) for end in frame.ends] == [(attempt_id, 1, node_pb2.END_REASON_CANCELLED)]
        assert not frame.chunks
    assert not attempts.busy
    assert attempts.running_count(REPLICA) == 0
    await asyncio.sleep(0)  # the last attempt's task ends
    gc.collect()
    assert not [kept for kept in gc.get_objects() if isinstance(kept, Delivery)]


async def test_cancelling_again_or_what_is_not_there_does_nothing(attempts, engine) -> None:
    attempt_id = await streaming(attempts, engine, "a1")
    for _ in range(2):
        attempts.cancel(attempt_id)
    attempts.cancel(AttemptId("never heard of"))
    attempts.acknowledge(attempt_id, 2)
    frame = node_pb2.NodeFrame()
    attempts.move_into(frame, 1000)
    assert len(frame.ends) == 1


async def test_a_fenced_node_sends_no_end_of_the_former_lease(attempts, engine) -> None:
    attempts.cancel(await streaming(attempts, engine, "a1"))
    attempts.abandon_all()
    assert not attempts.busy
    assert not attempts.move_into(node_pb2.NodeFrame(), 1000)


async def test_an_attempt_that_is_started_again_is_asked_of_its_engine_once(attempts, engine) -> None:
    for _ in range(2):
        attempts.start(start_of("a1"))
    assert attempts.running_count(REPLICA) == 1
    attempt_id = await ended(attempts, engine, "a1")
    attempts.start(start_of("a1"))
    assert (attempts.in_flight, attempts.running_count(REPLICA)) == ((attempt_id,), 0)
    # An engine request of another attempt comes after any that a start before it made.
    await streaming(attempts, engine, "a2")
    assert engine.conversations.empty()


@pytest.mark.parametrize(("acknowledged", "kept_seconds"), [(True, DELIVERED_KEPT_SECONDS), (False, UNDELIVERED_KEPT_SECONDS)])
async def test_an_attempt_whose_end_is_never_acknowledged_is_forgotten_in_time(attempts, engine, clock, acknowledged, kept_seconds) -> None:
    attempt_id = await ended(attempts, engine, "a1")
    if acknowledged:
        attempts.acknowledge(attempt_id, 1)
    for seconds, left in ((kept_seconds - 1, (attempt_id,)), (1, ())):
        clock.now_seconds += seconds
        attempts.sweep()
        assert attempts.in_flight == left


async def test_an_attempt_that_has_not_ended_is_kept_however_long_it_takes(attempts, engine, clock) -> None:
    attempt_id = await streaming(attempts, engine, "a1")
    clock.now_seconds += 2 * UNDELIVERED_KEPT_SECONDS
    attempts.sweep()
    assert attempts.in_flight == (attempt_id,)


async def test_the_next_hello_does_not_name_a_cancelled_attempt(engine, tmp_path) -> None:
    async with link_coordinator(tmp_path) as coordinator, wired_node(coordinator, tmp_path, engine.url):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1")
        await link.start("a2")
        for _ in range(2):
            (await engine.next_conversation()).say(EVENT)
        await link.until(lambda: link.data("a1") and link.data("a2"))
        await link.send(cancels=[node_pb2.CancelAttempt(attempt_id="a1")])
        assert (await link.until_end("a1")).reason == node_pb2.END_REASON_CANCELLED
        link.close()
        again = await coordinator.next_link()
        assert [attempt.attempt_id for attempt in again.hello.in_flight] == ["a2"]
