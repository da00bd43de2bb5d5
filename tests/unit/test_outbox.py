"""What goes into the next frame to a node, and that no frame is too large for the link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX
from potluck_coordinator.gateway.outbox import CANCELS_MAX, STARTS_BYTES_MAX, Outbox
from potluck_protocol.channels import MESSAGE_BYTES_MAX
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, Endpoint, GoodbyeReason, ReplicaId, StartAttempt

KIB = 1024


def start(name: str, body_bytes: int = 10) -> StartAttempt:
    return StartAttempt(AttemptId(name), ReplicaId("r"), Endpoint.COMPLETIONS, b"x" * body_bytes, True, 100)


async def taken(outbox: Outbox) -> node_pb2.CoordinatorFrame:
    """The next frame, of an outbox in which something is: no moment is waited for it, and a wake-up that was lost fails the test."""
    async with asyncio.timeout(0.1):
        return await outbox.take()


async def frames_of(outbox: Outbox, count: int) -> list[list[str]]:
    return [[each.attempt_id for each in (await taken(outbox)).starts] for _ in range(count)]


async def is_empty(outbox: Outbox) -> bool:
    waiting = asyncio.ensure_future(outbox.take())
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    return not waiting.done()


async def test_everything_that_waits_goes_together():
    outbox = Outbox()
    outbox.start(start("a"))
    outbox.acknowledge(AttemptId("b"), 7)
    outbox.start(start("c"))
    outbox.renew_lease(3, 15_000, 5_000, 7)
    frame = await taken(outbox)
    assert [each.attempt_id for each in frame.starts] == ["a", "c"]
    assert (frame.acknowledgements[0].next_sequence, frame.lease.epoch, frame.lease.heartbeat_number) == (7, 3, 7)
    assert await is_empty(outbox)


async def test_a_lease_leaves_when_it_is_sent_and_once():
    outbox = Outbox()
    outbox.renew_lease(3, 15_000, 5_000, 7)
    assert await is_empty(outbox)
    outbox.send_lease()
    assert (await taken(outbox)).lease.heartbeat_number == 7
    outbox.send_lease()
    assert await is_empty(outbox)


async def test_a_lease_that_left_with_something_else_is_not_sent_again():
    outbox = Outbox()
    outbox.renew_lease(3, 15_000, 5_000, 7)
    outbox.ask_for_beat()
    assert (await taken(outbox)).lease.heartbeat_number == 7
    outbox.send_lease()
    assert await is_empty(outbox)


async def test_what_can_wait_leaves_with_what_is_said_next():
    outbox = Outbox()
    outbox.acknowledge(AttemptId("a"), 3, can_wait=True)
    assert await is_empty(outbox)
    outbox.start(start("b"))
    frame = await taken(outbox)
    assert ([each.attempt_id for each in frame.starts], [each.attempt_id for each in frame.acknowledgements]) == (["b"], ["a"])
    assert await is_empty(outbox)


async def test_what_can_wait_does_not_wait_for_long():
    outbox = Outbox()
    outbox.acknowledge(AttemptId("a"), 3, can_wait=True)
    assert [each.next_sequence for each in (await asyncio.wait_for(outbox.take(), 5)).acknowledgements] == [3]
    outbox.acknowledge(AttemptId("b"), 4, can_wait=True)
    assert [each.next_sequence for each in (await asyncio.wait_for(outbox.take(), 5)).acknowledgements] == [4]


@pytest.mark.parametrize(
    "put",
    [
        lambda outbox: outbox.start(start("a")),
        lambda outbox: outbox.cancel(AttemptId("a")),
        lambda outbox: outbox.acknowledge(AttemptId("a"), 1),
        lambda outbox: outbox.hand_over_certificate("pem"),
        lambda outbox: outbox.close(GoodbyeReason.REPLACED),
    ],
    ids=["start", "cancel", "acknowledgement", "certificate", "goodbye"],
)
async def test_whatever_is_put_in_wakes_the_one_who_waits(put: Callable[[Outbox], None]):
    outbox = Outbox()
    waiting = asyncio.ensure_future(outbox.take())
    await asyncio.sleep(0)
    put(outbox)
    assert (await asyncio.wait_for(waiting, 5)).ByteSize() > 0
    assert await is_empty(outbox)


async def test_two_bodies_at_their_bound_do_not_share_a_frame():
    outbox = Outbox()
    outbox.start(start("a", BODY_BYTES_MAX))
    outbox.start(start("b", BODY_BYTES_MAX))
    sizes = [(await taken(outbox)).ByteSize() for _ in range(2)]
    assert BODY_BYTES_MAX < min(sizes) <= max(sizes) < MESSAGE_BYTES_MAX
    assert await is_empty(outbox)


async def test_a_start_that_was_not_sent_is_taken_back():
    outbox = Outbox()
    outbox.start(start("a", BODY_BYTES_MAX))
    outbox.start(start("b", BODY_BYTES_MAX))
    assert await frames_of(outbox, 1) == [["a"]]
    outbox.cancel(AttemptId("b"))
    outbox.cancel(AttemptId("a"))
    frame = await taken(outbox)
    assert ([each.attempt_id for each in frame.starts], sorted(each.attempt_id for each in frame.cancels)) == ([], ["a", "b"])
    assert await is_empty(outbox)


async def test_a_goodbye_does_not_wait_behind_requests():
    outbox = Outbox()
    outbox.start(start("a", BODY_BYTES_MAX))
    outbox.start(start("b", BODY_BYTES_MAX))
    outbox.close(GoodbyeReason.REPLACED)
    assert (await taken(outbox)).HasField("goodbye")


async def test_what_a_node_makes_the_coordinator_say_again_and_again_does_not_grow():
    outbox = Outbox()
    for number in range(1, 10_000):
        outbox.acknowledge(AttemptId("a"), number)
        outbox.cancel(AttemptId(f"made up {number}"))
    frame = await asyncio.wait_for(outbox.take(), 5)
    assert [each.next_sequence for each in frame.acknowledgements] == [9_999]
    assert len(frame.cancels) == CANCELS_MAX


@given(st.lists(st.integers(min_value=0, max_value=600 * KIB), min_size=1, max_size=12))
def test_every_start_leaves_once_in_order_and_no_frame_is_too_large(sizes: list[int]):
    async def sent() -> list[str]:
        outbox, names = Outbox(), []
        for number, size in enumerate(sizes):
            outbox.start(start(str(number), size))
        while len(names) < len(sizes):
            starts = (await taken(outbox)).starts
            assert starts
            assert len(starts) == 1 or sum(len(each.body) for each in starts) <= STARTS_BYTES_MAX
            names += [each.attempt_id for each in starts]
        assert await is_empty(outbox)
        return names

    assert asyncio.run(sent()) == [str(number) for number in range(len(sizes))]
