"""An attempt that runs here for another gateway: numbers, windows and ends pass through as they are."""

from __future__ import annotations

import pytest

from potluck_coordinator.gateway.answer_outbox import CHUNK_BYTES, FRAME_BYTES_MAX, AnswerOutbox
from potluck_coordinator.gateway.passing_relay import PassingRelay
from potluck_coordinator.gateway.relay import AnswerHead
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AttemptId, EndReason

ATTEMPT = AttemptId("a1")


class Passing:
    def __init__(self, window_bytes: int = 400) -> None:
        self.acknowledged: list[int] = []
        self.outbox = AnswerOutbox()
        self.relay = PassingRelay(ATTEMPT, window_bytes, 0.0, lambda _, sequence: self.acknowledged.append(sequence), self.outbox)


@pytest.fixture
def passing():
    return Passing()


async def test_chunks_go_on_with_their_numbers_and_the_first_with_its_head(passing):
    passing.relay.head = AnswerHead(200, "text/event-stream")
    passing.relay.receive(0, b"one", 1.0)
    passing.relay.receive(1, b"two", 1.0)
    passing.relay.receive(1, b"two", 1.0)
    passing.relay.end(2, EndReason.COMPLETED, "")
    frame = await passing.outbox.take()
    assert [(chunk.sequence, chunk.data, chunk.head.http_status) for chunk in frame.chunks] == [(0, b"one", 200), (1, b"two", 0)]
    (end,) = frame.ends
    assert (end.attempt_id, end.sequence, end.error_code) == (ATTEMPT, 2, "")


async def test_an_empty_first_chunk_brings_the_head(passing):
    passing.relay.head = AnswerHead(500, "application/json")
    passing.relay.receive(0, b"", 1.0)
    (chunk,) = (await passing.outbox.take()).chunks
    assert (chunk.head.http_status, chunk.data) == (500, b"")


async def test_the_window_is_the_whole_ways(passing):
    passing.relay.receive(0, b"x" * 300, 1.0)
    passing.relay.receive(1, b"x" * 100, 1.0)
    assert passing.relay.held_up
    assert passing.acknowledged == []
    passing.relay.acknowledged(1)
    assert passing.acknowledged == [1]
    assert (passing.relay.resume_point.next_sequence, passing.relay.resume_point.acknowledged_sequence) == (2, 1)
    passing.relay.receive(2, b"x" * 300, 1.0)
    assert not passing.relay.over
    passing.relay.receive(3, b"x" * 300, 1.0)
    frame = await passing.outbox.take()
    assert frame.ends[0].error_code == ErrorCode.NODE_LOST


async def test_an_acknowledgement_of_what_was_never_sent_or_comes_late_is_passed_over(passing):
    passing.relay.receive(0, b"x", 1.0)
    for next_sequence in (5, 0, -1):
        passing.relay.acknowledged(next_sequence)
    assert passing.acknowledged == []
    passing.relay.acknowledged(1)
    passing.relay.acknowledged(1)
    assert passing.acknowledged == [1]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda relay: relay.end(1, EndReason.REFUSED, "full"), ErrorCode.NO_CAPACITY),
        (lambda relay: relay.end(1, EndReason.ENGINE_FAILED, "died"), ErrorCode.ENGINE_FAILED),
        (lambda relay: relay.end(1, EndReason.ENGINE_FAILED, "", kills_engines=True), ErrorCode.REQUEST_REFUSED),
        (lambda relay: relay.end(9, EndReason.COMPLETED, ""), ErrorCode.NODE_LOST),
        (lambda relay: relay.fail(PotluckError(ErrorCode.NODE_LOST, "silent")), ErrorCode.NODE_LOST),
        (lambda relay: relay.receive(7, b"x", 1.0), ErrorCode.NODE_LOST),
    ],
)
async def test_every_bad_end_goes_on_once_behind_what_came(passing, end, code):
    passing.relay.receive(0, b"x", 1.0)
    end(passing.relay)
    passing.relay.fail(PotluckError(ErrorCode.INTERNAL_ERROR))
    frame = await passing.outbox.take()
    assert [chunk.data for chunk in frame.chunks] == [b"x"]
    assert [(told.error_code, told.sequence) for told in frame.ends] == [(code, 1)]


async def test_no_frame_grows_beyond_its_bound():
    outbox = AnswerOutbox()
    for sequence in range(5):
        outbox.chunk(ATTEMPT, sequence, b"x" * (FRAME_BYTES_MAX // 2 - CHUNK_BYTES), None)
    sizes = [len((await outbox.take()).chunks) for _ in range(3)]
    assert sizes == [2, 2, 1]


async def test_nor_with_pieces_that_hold_nothing():
    outbox = AnswerOutbox()
    for sequence in range(30_000):
        outbox.chunk(ATTEMPT, sequence, b"", None)
    frames = [await outbox.take() for _ in range(2)]
    assert [chunk.sequence for frame in frames for chunk in frame.chunks] == list(range(30_000))
    assert max(frame.ByteSize() for frame in frames) <= FRAME_BYTES_MAX
