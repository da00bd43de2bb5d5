"""Who was told when to come back, and comes too early, or asks the same once more: treated as anybody, and what was promised stands."""

from __future__ import annotations

import pytest

from potluck_coordinator.domain.admission import Queued
from potluck_coordinator.gateway.appointments import Appointments, Expected
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, GoodbyeReason
from tests.support.judged_pool import HandClock
from tests.support.request_path import request_by
from tests.support.request_queue import MODEL, SLOTS, Front, settle

ANA, BOB = AccountId("ana"), AccountId("bob")


def asked(account_id=ANA, number=1):
    return request_by(account_id, model_id=MODEL, body=b"asked %d" % number)


def refusal_of(front, request):
    with pytest.raises(PotluckError) as refused:
        front.requests.announce(request)
    return refused.value


@pytest.fixture
async def full():
    """A pool whose slots are taken, and whose queue nobody may join: answers are believed to take eight seconds each."""
    front = Front(HandClock(), queue_wait_seconds_max=3.0)
    await front.joined("den", prefill_tokens_per_second=1e6)
    for _ in range(SLOTS):
        front.ask(account_id=BOB)
    await settle()
    yield front
    await front.stop()


async def quicken(front):
    """Answers turn out to take a tenth of a second: whoever is the next will not wait for long."""
    for _ in range(6):
        front.clock.seconds += 0.1
        front.asked[-SLOTS].cancel()
        await settle()
        front.ask(account_id=BOB)
        await settle()


def kept_count(front):
    return sum(len(kept) for kept in front.requests.queues.line(MODEL).appointments.values())


async def test_who_comes_too_early_is_let_in_where_anybody_would_be(full):
    told = refusal_of(full, asked()).retry_after_seconds
    await quicken(full)
    waits = full.ask(account_id=ANA, body=asked().body)
    await settle()
    assert not waits.done(), waits.exception()
    assert (full.requests.queues.queued_count(MODEL), kept_count(full)) == (1, 0)
    assert told > 6 * 0.1


async def test_one_of_two_equal_requests_does_not_keep_the_other_from_waiting(full):
    refusal_of(full, asked())
    await quicken(full)
    twins = [full.ask(account_id=ANA, body=asked().body) for _ in range(2)]
    await settle()
    assert not twins[0].done()
    assert isinstance(refused := twins[1].exception(), PotluckError)
    assert refused.retry_after_seconds == pytest.approx(1.0, abs=0.5), "of its own: the first one's is kept"


async def test_who_comes_too_early_and_is_refused_again_keeps_the_time_that_was_told(full):
    first = refusal_of(full, asked())
    full.clock.seconds += 1.0
    again = refusal_of(full, asked())
    assert (again.code, kept_count(full)) == (ErrorCode.QUEUE_FULL, 1)
    assert again.retry_after_seconds == pytest.approx(first.retry_after_seconds - 1.0)
    assert "it would wait some" in again.message
    full.clock.seconds += again.retry_after_seconds
    assert full.requests.announce(asked()) is not None, "and is let in then"


async def test_who_comes_too_early_when_nobody_serves_any_more_is_told_so(full):
    refusal_of(full, asked())
    for session in full.links.sessions:
        await full.links.disconnect(session, session.outbox, GoodbyeReason.STOPPING)
    await settle()
    assert refusal_of(full, asked()).code is ErrorCode.NO_CAPACITY


def test_what_is_expected_of_others_is_all_but_ones_own():
    appointments = Appointments()
    for request in (asked(), asked(number=2), asked(BOB)):
        appointments.make(request, 10.0, Expected(5.0, Queued(1, 100.0)))
    assert appointments.expected_beside(asked(number=3)) == {ANA: Expected(10.0, Queued(2, 200.0)), BOB: Expected(5.0, Queued(1, 100.0))}
    assert appointments.expected_beside(asked())[ANA] == Expected(5.0, Queued(1, 100.0))
    assert appointments.expected_beside(asked(BOB)) == {ANA: Expected(10.0, Queued(2, 200.0))}
    assert len(appointments) == 3
