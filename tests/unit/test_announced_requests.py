"""Requests that are announced: refused at once, with all that belongs to a refusal, or let through, as many as there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from potluck_coordinator.domain.admission import KV_SHARE_MAX, NOBODY, Capacity, Queued, beside
from potluck_coordinator.domain.decisions import StepKind
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_coordinator.domain.tiers import AskedTier
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.gateway.model_line import HOLD_SECONDS_GUESS
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, KeyPrefix, ModelId, RequestId
from tests.support.request_path import request_by
from tests.support.request_queue import MODEL, SLOTS, Front


@asynccontextmanager
async def front(**limits) -> AsyncIterator[Front]:
    front = Front(**limits)
    try:
        yield front
    finally:
        await front.stop()


def asked(number: int = 0, account: str = "ana", **fields):
    request = request_by(AccountId(account), **{"model_id": MODEL, "body": b"%d" % number} | fields)
    return replace(request, request_id=RequestId(f"{account}-{number}"))


def refusal_of(front: Front, request) -> PotluckError:
    with pytest.raises(PotluckError) as refused:
        front.requests.announce(request)
    return refused.value


async def begun(front: Front, count: int, account: str = "bob") -> None:
    for number in range(count):
        front.ask(account_id=AccountId(account), body=b"%s %d" % (account.encode(), number))
    await asyncio.sleep(0)


ROOMY = Capacity(4, 0, 1000, 0.0)


@pytest.mark.parametrize(
    ("capacity", "announced", "run_count", "waits"),
    [
        (Capacity(4, 4), NOBODY, 4, NOBODY),
        (Capacity(4, 2), Queued(1, 100), 3, NOBODY),
        (Capacity(4, 2), Queued(5, 500), 4, Queued(3, 300)),
        (Capacity(4, 6), Queued(2, 200), 6, Queued(2, 200)),
        (ROOMY, Queued(2, 500), 2, NOBODY),
        (ROOMY, Queued(4, 4 * 1000 * KV_SHARE_MAX / 2), 2, Queued(2, 1000 * KV_SHARE_MAX)),
        (Capacity(4, 1, 1000, 950.0), Queued(1, 400), 1, Queued(1, 400)),
    ],
)
def test_those_that_are_announced_run_as_far_as_there_is_room_and_the_others_wait(capacity, announced, run_count, waits):
    after, left = beside(capacity, announced)
    assert (after.in_flight_count, left) == (run_count, waits)
    assert after.committed_tokens + left.tokens == pytest.approx(capacity.committed_tokens + announced.tokens)


@pytest.mark.parametrize("wait_seconds_max", [3.0, 90.0])
async def test_of_many_at_a_time_those_pass_for_which_there_is_room_or_a_place(wait_seconds_max):
    async with front(queue_wait_seconds_max=wait_seconds_max) as pool:
        await pool.joined("den")
        passed, codes = [], set()
        for number in range(400):
            try:
                passed.append(pool.requests.announce(asked(number)))
            except PotluckError as error:
                codes.add((error.code, bool(error.retry_after_seconds)))
        assert (len(passed) > SLOTS) is (wait_seconds_max > HOLD_SECONDS_GUESS)
        assert SLOTS <= len(passed) < 400
        assert codes == {(ErrorCode.QUEUE_FULL, True)}
        for withdraw in (*passed, *passed):
            withdraw()
        assert pool.requests.queues.line(MODEL).announced is NOBODY
        twice, _ = pool.requests.announce(asked(500)), pool.requests.announce(asked(501))
        twice()
        twice()
        assert pool.requests.queues.line(MODEL).announced.count == 1
    async with front(queue_wait_seconds_max=wait_seconds_max) as pool:
        await pool.joined("den")
        await begun(pool, 400)
        begun_count = pool.requests.in_flight_count + pool.requests.queues.queued_count(MODEL)
        assert begun_count == len(passed), "as many are let in that are not announced"


async def test_who_waits_and_who_is_announced_fill_the_queue_together():
    async with front(queue_length_max=3) as pool:
        await pool.joined("den")
        await begun(pool, SLOTS + 1, "ana")
        assert pool.requests.queues.queued_count(MODEL) == 1
        pool.requests.announce(asked(1))
        withdraw = pool.requests.announce(asked(2))
        assert refusal_of(pool, asked(3)).code is ErrorCode.QUEUE_FULL
        withdraw()
        assert pool.requests.announce(asked(4)) is not None
        assert pool.requests.queues.queued_count(MODEL) == 1, "nobody has a place yet, and nobody lost one"


async def test_what_passed_and_went_has_left_nothing_behind():
    quotas = KeyQuotas(requests_per_day=1, tokens_per_day=100_000, concurrent_max=1, spend_micro_credits_per_day=10**9)
    async with front() as pool:
        await pool.joined("den")
        request = replace(asked(), caller=Caller(KeyPrefix("key"), quotas))
        before = pool.requests.allowance(request.account_id).remaining_count
        for _ in range(3):
            withdraw = pool.requests.announce(request)
            assert pool.requests.allowance(request.account_id).remaining_count == before - 1
            assert refusal_of(pool, replace(request, request_id=RequestId("other"))).code is ErrorCode.QUOTA_EXCEEDED
            withdraw()
            withdraw()
        assert pool.requests.allowance(request.account_id).remaining_count == before
        assert pool.requests.in_flight_count == 0
        assert pool.requests.gate.compliance().hour.count == 0


@pytest.mark.parametrize("gone", ["unknown model", "hour", "nodes"])
async def test_a_refusal_is_the_same_as_of_one_that_begins(gone):
    async def refused(announces: bool) -> tuple[PotluckError, object]:
        async with front() as pool:
            request = asked()
            if gone == "unknown model":
                request = replace(request, model_id=ModelId("none"))
            elif gone == "hour":
                await pool.joined("den")
                request = replace(request, asked_tier=AskedTier.DEFAULT)
                while pool.requests.gate.windows.has_room(request.account_id):
                    pool.requests.gate.windows.count(request.account_id)
            with pytest.raises(PotluckError) as error:
                pool.requests.announce(request) if announces else await pool.requests.begin(request)
            story = pool.requests.decisions.story(request.request_id, lambda _: True)
            steps = None if story is None else [(step.kind, step.words) for step in story.steps]
            waiting, left = pool.requests.waiting_counts, pool.requests.allowance(request.account_id).remaining_count
            return error.value, (steps, waiting, pool.requests.gate.compliance().hour, left)

    (early, early_left), (late, late_left) = await refused(True), await refused(False)
    assert (early.code, early.message, early.param) == (late.code, late.message, late.param)
    assert early_left == late_left, "story, demand, promise and allowance"
    if gone == "nodes":
        assert early_left[0][0][0] is StepKind.REFUSED  # type: ignore[index]


async def test_who_was_told_when_to_come_back_is_told_the_same_again_before_that():
    async with front(queue_wait_seconds_max=3.0) as pool:
        await pool.joined("den")
        await begun(pool, SLOTS)
        refused = refusal_of(pool, asked(1))
        again = refusal_of(pool, asked(1))
        assert refused.retry_after_seconds
        assert again.retry_after_seconds == pytest.approx(refused.retry_after_seconds, abs=0.5), "it is still told the same time"
        line = pool.requests.queues.line(MODEL)
        assert sum(len(kept) for kept in line.appointments.values()) == 1


async def test_room_that_suits_nobody_who_waits_is_not_kept_from_who_is_announced():
    async with front() as pool:
        await pool.joined("den")
        pool.ask(account_id=AccountId("bob"), prompt_tokens_min=10**6)
        await asyncio.sleep(0)
        assert pool.requests.announce(asked(1)) is not None
