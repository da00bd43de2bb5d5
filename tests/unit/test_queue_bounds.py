"""What waits has bounds, and at the one that all share the account that holds the most gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.admission import AdmissionLimits
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.gateway.model_line import ModelLine
from potluck_coordinator.gateway.queue_bounds import QueueBounds
from potluck_coordinator.gateway.refusals import AT_ITS_BOUND
from potluck_coordinator.gateway.waiting import WaitingRequest
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId
from tests.support.judged_pool import HandClock
from tests.support.replicas import catalogue_entry
from tests.support.request_path import request_by
from tests.support.request_queue import MODEL, SLOTS, Front, settle

GUEST, POLITE = AccountId("guest"), AccountId("polite")
BYTES_MAX = 1000


@pytest.fixture
async def front():
    front = Front(HandClock(), queue_bytes_max=BYTES_MAX)
    await front.joined("a", prefill_tokens_per_second=1e6)
    for _ in range(SLOTS):
        front.ask()
    await settle()
    yield front
    await front.stop()


async def test_whoever_fills_the_queues_bytes_gives_way_to_others_and_is_told_why(front):
    guests = [front.ask(account_id=GUEST, body=b"x" * 300) for _ in range(4)]
    await settle()
    with pytest.raises(PotluckError) as refused:
        await guests[3]
    assert (refused.value.code, refused.value.message.startswith(AT_ITS_BOUND)) == (ErrorCode.QUEUE_FULL, True)

    polite = front.ask(account_id=POLITE, body=b"y" * 200)
    await settle()
    assert not polite.done()
    with pytest.raises(PotluckError) as gone:
        await guests[2]
    assert (gone.value.code, gone.value.message.startswith(AT_ITS_BOUND)) == (ErrorCode.QUEUE_FULL, True)
    assert [guest.done() for guest in guests] == [False, False, True, True]
    assert front.requests.queues.queued_count(MODEL) == 3


async def test_the_large_one_gives_way_before_the_many_small_ones(front):
    large = front.ask(account_id=GUEST, body=b"x" * 500)
    small = [front.ask(account_id=GUEST, body=b"x" * 20) for _ in range(20)]
    await settle()
    polite = front.ask(account_id=POLITE, body=b"y" * 300)
    await settle()
    assert (large.done(), polite.done(), any(one.done() for one in small)) == (True, False, False)


async def test_a_large_newcomer_does_not_push_out_those_who_hold_less(front):
    small = [front.ask(account_id=AccountId(f"a{number}"), body=b"x" * 90) for number in range(10)]
    await settle()
    large = front.ask(account_id=POLITE, body=b"y" * 200)
    await settle()
    assert large.done()
    assert not any(one.done() for one in small)


async def test_nobody_takes_the_rest_of_an_answer_away_that_has_begun():
    bounds, line = QueueBounds(AdmissionLimits(queue_bytes_max=BYTES_MAX)), ModelLine()
    continued = waiting_of(request_by(GUEST, body=b"x" * 900), is_continued=True)
    bounds.joined(continued)
    assert list(bounds.give_way(line, request_by(POLITE, body=b"y" * 200))) == []


def waiting_of(request, *, is_continued=False):
    request = replace(request, continued=object()) if is_continued else request
    return WaitingRequest(
        request,
        catalogue_entry("tiny"),
        frozenset(),
        work=Work(1.0, 1.0),
        seconds_max=30.0,
        arrived_at_seconds=0.0,
        joined_at_seconds=0.0,
    )


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 700)), max_size=40))
async def test_the_bytes_stay_bounded_and_only_who_holds_more_is_sent_away(asked):
    bounds, line = QueueBounds(AdmissionLimits(queue_bytes_max=BYTES_MAX)), ModelLine()
    here: list[WaitingRequest] = []

    def held(account_id):
        return sum(len(one.request.body) for one in here if one.request.account_id == account_id)

    for name, size in asked:
        request = request_by(AccountId(name), body=b"x" * size)
        if bounds.are_reached(line, request):
            assert sum(len(one.request.body) for one in here) + size > BYTES_MAX
            assert all(held(one.request.account_id) <= held(request.account_id) + size for one in here)
            continue
        for gone in bounds.give_way(line, request):
            assert held(gone.request.account_id) > held(request.account_id) + size
            here.remove(gone)
            bounds.left(gone)
            bounds.left(gone)
        waiting = waiting_of(request)
        if sum(len(one.request.body) for one in here) + size <= BYTES_MAX:
            here.append(waiting)
            bounds.joined(waiting)
        else:
            # Whoever gave way may hold no more than the newcomer by then, and it was let in.
            assert all(held(one.request.account_id) <= held(request.account_id) + size for one in here)
