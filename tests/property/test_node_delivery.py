"""Whatever the cuts, losses and acknowledgements: the bytes that arrive are the bytes that were said."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from potluck_coordinator.gateway.relay import Relay
from potluck_node.delivery import Delivery, ResponseHead
from potluck_node.domain.event_stream import DataLines, EventTooLargeError, TokenEvents, WholeEvents
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EndReason, ResumePoint

_STREAM = st.lists(
    st.sampled_from([b"data: {}", b"x", b"\n", b"\n\n", b"\n\n\n", b": comment\n\n", b"data: \xc3\xa9\n\n"]), max_size=30
).map(b"".join)


@given(stream=_STREAM, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_any_split_of_a_stream_rejoins_to_the_same_bytes_and_every_chunk_ends_at_an_event_end(stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    events, chunks = WholeEvents(1000), []
    for piece in pieces:
        chunk = events.take(piece)
        assert chunk == b"" or chunk.endswith(b"\n\n")
        assert b"\n\n" not in events.remainder
        chunks.append(chunk)
    assert b"".join(chunks) + events.remainder == stream


@given(
    stream=st.lists(st.sampled_from([b"data: {}", b"\n", b"\r", b"\r\n"]), max_size=30).map(b"".join),
    cuts=st.lists(st.integers(0, 100), max_size=12),
)
def test_lines_may_end_as_the_standard_says_and_are_ended_by_line_feeds(stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    events = WholeEvents(1000)
    chunks = [events.take(stream[start:end]) for start, end in itertools.pairwise(edges)]
    assert all(chunk == b"" or chunk.endswith(b"\n\n") for chunk in chunks)
    assert b"\n\n" not in events.remainder
    assert b"".join(chunks) + events.remainder == re.sub(rb"\r\n|\r", b"\n", stream)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_leaves_when_its_empty_line_has_come_and_an_event_without_one_has_a_bound(end: bytes) -> None:
    events = WholeEvents(10)
    assert [events.take(piece) for piece in (b"data: 1" + end, end, b"data: 2" + end + end)] == [b"", b"data: 1\n\n", b"data: 2\n\n"]
    with pytest.raises(EventTooLargeError):
        events.take(b"data: 12345")


@pytest.mark.parametrize("piece", [b"x" * 8, b"xxxxxxx\n", b"x\rxxxxx\r"])
def test_an_event_without_an_end_costs_no_more_than_its_bytes_in_however_many_pieces_it_comes(piece: bytes) -> None:
    """A copy of what is held for each piece would be 68 GB here, of which a processor makes some 10 a second."""
    events, began_seconds = WholeEvents(1024 * 1024), time.process_time()
    for _ in range(1024 * 1024 // len(piece)):
        assert events.take(piece) == b""
    assert len(events.remainder) == 1024 * 1024
    assert time.process_time() - began_seconds < 3.0
    with pytest.raises(EventTooLargeError):
        events.take(piece)


@given(stream=_STREAM, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_lines_with_data_are_counted_once_wherever_the_stream_is_cut(stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    lines = DataLines()
    counted = sum(lines.take(stream[start:end]) for start, end in itertools.pairwise(edges))
    assert counted == sum(line.startswith(b"data:") for line in stream.split(b"\n"))


def test_a_chats_role_is_no_token_and_neither_is_a_comment() -> None:
    chat, text = TokenEvents(names_role_first=True), TokenEvents(names_role_first=False)
    pieces = [b":\n\n", b"data: 1\n", b"\n: da", b"ta:\n\n", b"dat", b"a: 2\n\n", b"event: ping\n\n"]
    assert [chat.take(piece) for piece in pieces] == [False, False, False, False, False, True, False]
    assert [text.take(piece) for piece in pieces] == [False, True, False, False, False, True, False]
    assert TokenEvents(names_role_first=True).take(b"data: role\n\ndata: token\n\n")


class Delivered(RuleBasedStateMachine):
    """A delivery, a lossy link, and a coordinator that takes chunks in sequence only."""

    WINDOW_BYTES = 40

    def __init__(self) -> None:
        super().__init__()
        self.delivery = Delivery(AttemptId("a"), self.WINDOW_BYTES)
        self.said = b""
        self.wire: list[node_pb2.NodeFrame] = []
        self.taken: list[bytes] = []
        self.end: node_pb2.AttemptEnd | None = None
        self.acknowledged = 0
        self.ended = False

    @precondition(lambda self: not self.ended)
    @rule(data=st.binary(min_size=1, max_size=60))
    def say(self, data: bytes) -> None:
        if self.delivery.has_room(len(data)):
            self.delivery.push(data, None if self.delivery.next_sequence else ResponseHead(200, "text/plain"))
            self.said += data

    @precondition(lambda self: not self.ended)
    @rule()
    def finish(self) -> None:
        self.delivery.finish(EndReason.COMPLETED)
        self.ended = True

    @precondition(lambda self: self.delivery.waiting)
    @rule(bytes_max=st.integers(1, 100))
    def send(self, bytes_max: int) -> None:
        frame = node_pb2.NodeFrame()
        self.delivery.move_into(frame, bytes_max)
        assert frame.chunks or frame.ends
        self.wire.append(frame)

    @precondition(lambda self: self.wire)
    @rule()
    def arrive(self) -> None:
        frame = self.wire.pop(0)
        for chunk in frame.chunks:
            assert chunk.sequence <= len(self.taken), "a chunk was skipped"
            if chunk.sequence == len(self.taken):
                assert chunk.HasField("head") is (chunk.sequence == 0)
                self.taken.append(chunk.data)
        for end in frame.ends:
            assert end.sequence == len(self.taken)
            self.end = end

    @precondition(lambda self: self.taken)
    @rule(share=st.floats(0, 1))
    def acknowledge(self, share: float) -> None:
        self.acknowledged = max(self.acknowledged, round(len(self.taken) * share))
        self.delivery.acknowledge(self.acknowledged)

    @precondition(lambda self: self.end is None)
    @rule()
    def cut(self) -> None:
        self.wire.clear()
        assert self.delivery.rewind(ResumePoint(len(self.taken), self.acknowledged))

    @invariant()
    def what_arrived_is_what_was_said(self) -> None:
        assert self.said.startswith(b"".join(self.taken))

    @rule()
    def wait(self) -> None:
        """Nothing happens, which is all that is left after the end has arrived."""

    @invariant()
    def no_more_is_unread_than_the_window_unless_one_chunk_is_larger(self) -> None:
        """However often the link breaks: what has arrived and was not acknowledged fills the window, too."""
        self.assert_fits([len(data) for data in self.taken[self.acknowledged :]])

    @invariant()
    def no_more_is_under_way_than_the_window_unless_one_chunk_is_larger(self) -> None:
        under_way = [len(chunk.data) for frame in self.wire for chunk in frame.chunks if chunk.sequence >= len(self.taken)]
        self.assert_fits(under_way)

    def assert_fits(self, sizes: list[int]) -> None:
        """A piece of any size may follow what fills less than a quarter."""
        assert sum(sizes) <= max(self.WINDOW_BYTES, self.WINDOW_BYTES // 4 + max(sizes, default=0))

    def teardown(self) -> None:
        """The link holds from here on, and the client reads: everything must arrive."""
        self.delivery.finish(EndReason.COMPLETED)
        for _ in range(10_000):
            if self.end is not None:
                break
            while self.wire:
                self.arrive()
            self.delivery.acknowledge(len(self.taken))
            if self.delivery.waiting:
                self.send(100)
        assert b"".join(self.taken) == self.said
        assert self.end is not None
        self.delivery.acknowledge(self.end.sequence + 1)
        assert self.delivery.end_acknowledged
        assert self.delivery.has_room(self.WINDOW_BYTES)


TestDelivered = Delivered.TestCase
TestDelivered.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_resume_point_before_what_was_acknowledged_cannot_be_served() -> None:
    delivery = Delivery(AttemptId("a"), 1000)
    for _ in range(4):
        delivery.push(b"x")
    delivery.move_into(node_pb2.NodeFrame(), 1000)
    delivery.acknowledge(3)
    assert not delivery.rewind(ResumePoint(2, 2))
    assert delivery.rewind(ResumePoint(3, 3))


def test_cancelling_drops_what_was_not_sent_and_ends_after_what_was() -> None:
    delivery = Delivery(AttemptId("a"), 1000)
    delivery.push(b"one")
    delivery.move_into(node_pb2.NodeFrame(), 1000)
    delivery.push(b"two")
    delivery.cancel()
    delivery.push(b"three")
    frame = node_pb2.NodeFrame()
    delivery.move_into(frame, 1000)
    assert not frame.chunks
    assert (frame.ends[0].sequence, frame.ends[0].reason) == (1, node_pb2.END_REASON_CANCELLED)
    assert delivery.has_room(1000), "what was sent is not kept either: nobody will acknowledge it"


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60), cuts=st.sets(st.integers(0, 60)), reads=st.sets(st.integers(0, 60)))
def test_a_slow_client_behind_a_line_that_breaks_again_and_again_loses_nothing(sizes: list[int], cuts: set[int], reads: set[int]) -> None:
    """Both real ends of the window: the coordinator must never find that the node sent more than it allows."""
    asyncio.run(_relayed(sizes, cuts, reads))


async def _relayed(sizes: list[int], cuts: set[int], reads: set[int]) -> None:
    lost: list[int] = []
    delivery = Delivery(AttemptId("a"), 40)
    relay = Relay(AttemptId("a"), 40, 0.0, lambda _, sequence: lost.append(sequence))
    said, taken, step = b"", b"", 0
    waiting = [bytes([65 + number % 26]) * size for number, size in enumerate(sizes)]
    while waiting or delivery.waiting or len(taken) < len(said):
        step += 1
        while waiting and delivery.has_room(len(waiting[0])):
            said += waiting[0]
            delivery.push(waiting.pop(0), ResponseHead(200, "text/plain"))
        frame = node_pb2.NodeFrame()
        delivery.move_into(frame, 1000)
        for chunk in frame.chunks:
            relay.receive(chunk.sequence, chunk.data, 0.0)
        assert not relay.over, "the window was overrun"
        if step % 61 in reads or step > 60:
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    taken += await relay.next_data() or b""
        if step % 61 in cuts and step <= 60:
            # With the link go the acknowledgements on it.
            lost.clear()
            assert delivery.rewind(relay.resume_point)
        for sequence in lost:
            delivery.acknowledge(sequence)
        lost.clear()
        assert step < 10_000
    assert taken == said == b"".join(bytes([65 + number % 26]) * size for number, size in enumerate(sizes))
