"""One attempt's bytes: order, repetition, gaps, the window, and the end."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.domain.suspicion import AnswerKind
from potluck_coordinator.gateway.relay import AnswerHead, Relay
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AttemptId, EndReason


@pytest.fixture
def acknowledged():
    return []


@pytest.fixture
def relay(acknowledged):
    return Relay(AttemptId("attempt"), 400, 0.0, lambda _, sequence: acknowledged.append(sequence))


async def test_what_arrived_between_two_reads_leaves_as_one_piece(relay):
    for sequence, data in enumerate([b"a", b"b", b"c"]):
        relay.receive(sequence, data, 1.0)
    assert await relay.next_data() == b"abc"
    relay.end(3, EndReason.COMPLETED, "")
    assert await relay.next_data() is None


async def test_a_repetition_is_dropped_and_a_gap_ends_the_answer(relay):
    relay.receive(0, b"a", 1.0)
    relay.receive(0, b"a", 1.0)
    relay.receive(2, b"c", 1.0)
    assert await relay.next_data() == b"a"
    with pytest.raises(PotluckError) as failure:
        await relay.next_data()
    assert failure.value.code is ErrorCode.NODE_LOST


async def test_an_end_that_counts_more_chunks_than_arrived_is_a_loss(relay):
    relay.receive(0, b"a", 1.0)
    relay.end(2, EndReason.COMPLETED, "")
    assert await relay.next_data() == b"a"
    with pytest.raises(PotluckError):
        await relay.next_data()


async def test_a_waiting_reader_is_woken_by_data_and_by_failure(relay):
    reading = asyncio.ensure_future(relay.next_data())
    await asyncio.sleep(0)
    relay.receive(0, b"a", 1.0)
    assert await reading == b"a"
    reading = asyncio.ensure_future(relay.next_data())
    await asyncio.sleep(0)
    relay.fail(PotluckError(ErrorCode.NODE_LOST))
    with pytest.raises(PotluckError):
        await reading


async def reading_on(relay, pass_on):
    """A reader that waits, with a function for what comes meanwhile."""
    reading = asyncio.ensure_future(relay.next_data(pass_on))
    await asyncio.sleep(0)
    return reading


async def test_bytes_that_come_while_a_reader_waits_go_on_at_once(relay, acknowledged):
    passed = []
    reading = await reading_on(relay, lambda data: passed.append(data) or True)
    for sequence, data in enumerate([b"a" * 60, b"b" * 60, b"c"]):
        relay.receive(sequence, data, 1.0)
    assert passed == [b"a" * 60, b"b" * 60, b"c"]
    assert acknowledged == [2]  # a quarter of the window had left with the second, and nobody had to ask again
    relay.end(3, EndReason.COMPLETED, "")
    assert await reading is None


async def test_behind_bytes_that_were_the_last_to_be_taken_the_rest_waits(relay, acknowledged):
    passed = []
    reading = await reading_on(relay, passed.append)  # None: it takes no more
    for sequence, data in enumerate([b"a", b"b", b"c" * 200]):
        relay.receive(sequence, data, 1.0)
    assert (passed, await reading) == ([b"a"], b"b" + b"c" * 200)
    assert acknowledged == []
    reading = await reading_on(relay, passed.append)
    assert acknowledged == [3]
    relay.receive(3, b"d", 1.0)
    assert passed == [b"a", b"d"]
    reading.cancel()


async def test_bytes_passed_on_are_signs_of_life_and_free_the_window(relay, acknowledged):
    for round_number in range(20):
        reading = await reading_on(relay, lambda _: False)
        relay.receive(2 * round_number, b"x" * 100, float(round_number))
        assert relay.last_chunk_at == round_number
        relay.receive(2 * round_number + 1, b"y", 0.0)
        assert await reading == b"y"
    assert not relay.over
    assert acknowledged[-1] == 39


async def test_what_takes_no_more_is_not_asked_again_by_an_empty_chunk(relay):
    passed = []
    reading = await reading_on(relay, passed.append)
    relay.receive(0, b"a", 1.0)
    relay.receive(1, b"", 1.0)
    await asyncio.sleep(0)
    relay.receive(2, b"b", 1.0)
    assert (passed, await reading) == ([b"a"], b"b")


async def test_a_reader_that_was_woken_or_has_gone_is_passed_nothing_more(relay):
    passed = []
    relay.receive(0, b"a", 1.0)
    assert await relay.next_data(lambda data: passed.append(data) or True) == b"a"
    relay.receive(1, b"b", 1.0)
    assert await relay.next_data() == b"b"
    reading = await reading_on(relay, lambda data: passed.append(data) or True)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    relay.receive(2, b"c", 1.0)
    assert (passed, await relay.next_data()) == ([], b"c")


async def test_bytes_that_cannot_be_passed_on_fail_their_own_answer_only(relay):
    def break_down(_):
        raise RuntimeError("the prompt's own words")

    reading = await reading_on(relay, break_down)
    relay.receive(0, b"a", 1.0)
    relay.receive(1, b"b", 1.0)
    with pytest.raises(PotluckError) as failure:
        await reading
    assert failure.value.code is ErrorCode.INTERNAL_ERROR


async def test_only_what_has_left_is_acknowledged(relay, acknowledged):
    relay.receive(0, b"x" * 150, 1.0)
    await relay.next_data()
    assert acknowledged == []  # taken, but not yet asked for more: it may still wait at the client's socket
    relay.receive(1, b"y", 1.0)
    await relay.next_data()
    assert acknowledged == [1]


async def test_a_node_that_ignores_the_window_is_cut_off(relay):
    for sequence in range(9):
        relay.receive(sequence, b"x" * 100, 1.0)
    assert relay.over
    assert relay.received_bytes <= 900


async def test_the_end_is_acknowledged_so_that_the_node_may_forget(relay, acknowledged):
    relay.receive(0, b"a", 1.0)
    relay.end(1, EndReason.COMPLETED, "")
    assert acknowledged == [2]


async def test_a_head_that_never_comes_raises_what_happened_instead(relay):
    relay.end(0, EndReason.REFUSED, "paused")
    with pytest.raises(PotluckError) as failure:
        await relay.wait_for_head()
    assert failure.value.code is ErrorCode.NO_CAPACITY


async def test_the_head_is_there_before_the_first_byte(relay):
    relay.head = AnswerHead(200, "text/event-stream")
    relay.receive(0, b"", 1.0)
    assert (await relay.wait_for_head()).http_status == 200


async def test_empty_chunks_take_their_number_and_no_memory(relay):
    for sequence in range(1000):
        relay.receive(sequence, b"", 1.0)
    assert relay.next_sequence == 1000
    assert relay._buffer == []


async def test_an_answer_that_was_broken_off_says_nothing_of_its_engine_and_one_that_ended_does(relay):
    assert relay.answer_kind is None
    relay.head = AnswerHead(200, "text/event-stream")
    relay.receive(0, b"data: {}", 1.0)
    assert relay.answer_kind is None, "it goes on"
    relay.end(1, EndReason.COMPLETED, "")
    assert relay.answer_kind is AnswerKind.GOOD
    relay.fell_short = True
    assert relay.answer_kind is AnswerKind.ERROR


@pytest.mark.parametrize("status", [None, 200, 500])
async def test_an_end_without_a_byte_is_no_answer_and_what_this_side_ends_is_none_of_the_engines(relay, status):
    relay.head = None if status is None else AnswerHead(status, "application/json")
    relay.end(0, EndReason.COMPLETED, "")
    assert relay.answer_kind is AnswerKind.ERROR
    broken = Relay(AttemptId("other"), 1000, 0.0, lambda *_: None)
    broken.head = relay.head
    broken.fail(PotluckError(ErrorCode.NODE_LOST))
    assert broken.answer_kind is None
