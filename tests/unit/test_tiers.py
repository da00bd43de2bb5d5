"""Which tier a request gets, what is kept for the better one, how its promise is counted, and what a window and a key's day let in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.gate_counts import GateCounts
from potluck_coordinator.domain.quotas import DAY_MS, NO_QUOTAS, Claim, KeyDay, KeyQuotas, KeyUse, begun, ended, refusal, taken_back, today
from potluck_coordinator.domain.tiers import (
    HOUR_SECONDS,
    NONE,
    RESERVE_IDLE_SECONDS,
    AskedTier,
    PromiseCount,
    PromiseRecord,
    TierChoice,
    choose,
    flex_fits,
    is_kept,
    left_to_flex,
)
from potluck_coordinator.gateway import rate_windows
from potluck_coordinator.gateway.expectations import Expectations
from potluck_coordinator.gateway.gate import Gate, TierLimits
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.gateway.rate_windows import Allowance, RateWindows, duration_text, rate_headers
from potluck_coordinator.rate_text import rate_limit
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, KeyPrefix, Usage
from tests.support.engines import MovedClock
from tests.support.replicas import MODEL, catalogue_entry
from tests.support.request_path import request_by

DEFAULT, FLEX = ServiceTier.DEFAULT, ServiceTier.FLEX


@pytest.mark.parametrize(
    ("asked", "offered", "allowance_left", "choice"),
    [
        (AskedTier.AUTO, DEFAULT, True, TierChoice(DEFAULT, counts=True)),
        (AskedTier.AUTO, DEFAULT, False, TierChoice(FLEX)),
        (AskedTier.AUTO, FLEX, True, TierChoice(FLEX)),
        (AskedTier.DEFAULT, DEFAULT, True, TierChoice(DEFAULT, counts=True)),
        (AskedTier.DEFAULT, DEFAULT, False, TierChoice(None)),
        (AskedTier.DEFAULT, FLEX, True, TierChoice(None)),
        (AskedTier.FLEX, DEFAULT, True, TierChoice(FLEX)),
        (AskedTier.FLEX, FLEX, False, TierChoice(FLEX)),
    ],
)
def test_which_tier_a_request_gets(asked, offered, allowance_left, choice):
    assert choose(asked, offered, allowance_left=allowance_left) == choice


ROOM = Capacity(slot_count=20, in_flight_count=15, kv_tokens=10_000, committed_tokens=5_000)


@pytest.mark.parametrize(
    ("default_use", "idle_seconds", "slots", "tokens"),
    [
        (Capacity(), 0.0, 18, 9_000),
        (Capacity(in_flight_count=1, committed_tokens=400), 0.0, 19, 9_400),  # what it has need not be kept for it
        (Capacity(in_flight_count=9, committed_tokens=4_000), 0.0, 20, 10_000),
        (Capacity(), RESERVE_IDLE_SECONDS + 1, 20, 10_000),  # nobody uses it
    ],
)
def test_what_flex_may_fill(default_use, idle_seconds, slots, tokens):
    left = left_to_flex(ROOM, default_use, 10, idle_seconds)
    assert (left.slot_count, left.kv_tokens) == (slots, tokens)


@pytest.mark.parametrize(
    ("slot_count", "percent", "slots"), [(1, 10, 1), (2, 10, 1), (4, 10, 3), (9, 10, 8), (11, 10, 9), (4, 0, 4), (4, 90, 1)]
)
def test_of_few_slots_one_is_kept_and_one_is_left(slot_count, percent, slots):
    assert left_to_flex(Capacity(slot_count), Capacity(), percent, 0.0).slot_count == slots


def test_a_flex_request_stays_out_of_what_is_kept():
    assert flex_fits(ROOM, 4_000)
    assert not flex_fits(ROOM, 4_001), "nine tenths of the cache are promised"
    assert not flex_fits(ROOM._replace(slot_count=15), 10)
    assert flex_fits(Capacity(slot_count=1, in_flight_count=0, kv_tokens=100), 10_000), "where nothing runs, nothing is kept from anyone"


@given(st.integers(1, 64), st.integers(0, 64), st.integers(0, 90))
def test_the_default_tier_always_finds_its_share_of_slots(slot_count, default_count, reserve_percent):
    """However many flex requests come: they stop where the default tier's share begins."""
    flex_count = 0
    while True:
        in_flight = flex_count + min(default_count, slot_count)
        room = Capacity(slot_count=slot_count, in_flight_count=in_flight)
        left = left_to_flex(room, Capacity(in_flight_count=min(default_count, slot_count)), reserve_percent, 0.0)
        if in_flight >= slot_count or not flex_fits(left, 1.0) or in_flight == 0:
            break
        flex_count += 1
    if flex_count and default_count:
        assert slot_count - flex_count >= min(slot_count * reserve_percent / 100, slot_count - 1)


def test_the_promise_is_counted_over_an_hour_a_day_and_thirty_days():
    record = PromiseRecord()
    record.add(0.0, PromiseCount(10, 5))
    record.add(30 * 60.0, PromiseCount(1, 1))
    assert record.compliance(59 * 60.0).hour == PromiseCount(11, 6)
    assert record.compliance(61 * 60.0).hour == PromiseCount(1, 1)
    assert record.compliance(20 * HOUR_SECONDS).day == PromiseCount(11, 6)
    assert record.compliance(30 * HOUR_SECONDS).day == NONE
    assert record.compliance(29 * 24 * HOUR_SECONDS).month.share == 6 / 11
    assert record.compliance(31 * 24 * HOUR_SECONDS).month.share is None
    record.add_hour(5, PromiseCount(4, 4))
    assert record.compliance(20 * HOUR_SECONDS).day == PromiseCount(15, 10), "what the books had of earlier hours counts, too"


def test_a_record_stays_small_however_long_it_is_kept():
    record = PromiseRecord()
    for hour in range(2_000):
        record.add(hour * HOUR_SECONDS, PromiseCount(1, 1))
    assert (len(record._minutes), len(record._hours)) == (1, 720)


def test_the_promise_is_kept_by_a_first_token_in_time():
    assert (is_kept(4.9, 5.0), is_kept(5.1, 5.0), is_kept(None, 5.0)) == (True, False, False)


NOW_MS = 10 * DAY_MS + DAY_MS // 2


@pytest.mark.parametrize(
    ("quotas", "use", "words", "seconds"),
    [  # of a request that claims a hundred tokens and 50 micro-credits
        (NO_QUOTAS, KeyUse(10, 10**9, 1e12, 10**15, 10**6), None, 0),
        (KeyQuotas(requests_per_day=5), KeyUse(10, request_count=4), None, 0),
        (KeyQuotas(requests_per_day=5), KeyUse(10, request_count=5), "5 requests a day", 12 * 3600),
        (KeyQuotas(tokens_per_day=1000), KeyUse(10, token_count=800, pending_tokens=100), None, 0),
        (KeyQuotas(tokens_per_day=1000), KeyUse(10, token_count=950), "1000 tokens a day", 12 * 3600),
        (KeyQuotas(concurrent_max=2), KeyUse(10, running_count=2), "2 requests running at a time", 1),
        (KeyQuotas(spend_micro_credits_per_day=2_500_000), KeyUse(10, spend_micro_credits=2_499_990), "spend 2.5 credits a day", 12 * 3600),
    ],
)
def test_a_key_s_quotas(quotas, use, words, seconds):
    found = refusal(quotas, use, Claim(100.0, 50, 100.0, 50), NOW_MS)
    if words is None:
        assert found is None
    else:
        assert words in found.words
        assert found.retry_after_seconds == seconds


def test_a_new_day_begins_with_what_is_under_way():
    use = begun(KeyUse(10, 7, 500.0, 90), 100.0, 50)
    assert today(use, NOW_MS) == use
    assert today(use, NOW_MS + DAY_MS) == KeyUse(11, running_count=1, pending_tokens=100.0, pending_micro_credits=50)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6), st.integers(0, 10**9), st.floats(0, 1e6), st.integers(0, 10**9)), max_size=20))
def test_what_a_key_used_is_what_its_requests_came_to(requests):
    use = KeyUse(10)
    for _, tokens, cost, _, _ in requests:
        use = begun(use, tokens, cost)
    for answered, tokens, cost, used, charged in requests:
        use = ended(use, tokens, cost, used, charged) if answered else taken_back(use, tokens, cost)
    answered = [request for request in requests if request[0]]
    assert (use.request_count, use.running_count, use.pending_tokens, use.pending_micro_credits) == (len(answered), 0, 0.0, 0)
    assert use.spend_micro_credits == sum(request[4] for request in answered)
    assert use.token_count == pytest.approx(sum(request[3] for request in answered))


@pytest.mark.parametrize(("text", "amount", "seconds"), [("100/hour", 100, 3600), ("3 per 10 seconds", 3, 10), ("20/minute", 20, 60)])
def test_how_operators_write_rates(text, amount, seconds):
    assert (rate_limit(text).amount, rate_limit(text).get_expiry()) == (amount, seconds)


@pytest.mark.parametrize("text", ["", "many", "0/hour", "100", "200000/second", "-1/hour"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(PotluckError) as refused:
        rate_limit(text)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_the_request_after_an_hour_s_last_waits_until_the_first_is_an_hour_ago():
    clock = MovedClock()
    windows = RateWindows(rate_limit("100/hour"), clock.monotonic_seconds)
    ann, bob = AccountId("ann"), AccountId("bob")
    assert windows.allowance(ann) == Allowance(100, 100, 0.0, 3600)
    for _ in range(100):
        assert windows.has_room(ann)
        windows.count(ann)
        clock.now_seconds += 6.0
    assert not windows.has_room(ann)
    assert windows.has_room(bob)
    assert windows.allowance(ann) == Allowance(100, 0, 3000.0, 3600)
    clock.now_seconds += 2999.9
    assert not windows.has_room(ann)
    clock.now_seconds += 0.2
    assert windows.has_room(ann), "what it was told is true"
    windows.take_back(ann, windows.count(ann))
    assert windows.allowance(ann).remaining_count == 1


def test_what_is_taken_back_is_that_request_and_no_other():
    """Requests may wait for longer than the window is, and be refused after others were counted."""
    clock = MovedClock()
    windows, ann = RateWindows(rate_limit("5 per 10 seconds"), clock.monotonic_seconds), AccountId("ann")
    waiting = [windows.count(ann) for _ in range(5)]
    clock.now_seconds += 12.0
    for _ in range(5):
        windows.count(ann)
    for moment in waiting:
        windows.take_back(ann, moment)
    assert windows.allowance(ann).remaining_count == 0
    windows.take_back(AccountId("nobody"), 1.0)


def test_accounts_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(rate_windows, "ACCOUNTS_MAX", 10)
    clock = MovedClock()
    windows = RateWindows(rate_limit("2/hour"), clock.monotonic_seconds)
    for number in range(100):
        windows.count(AccountId(f"account {number}"))
    assert len(windows._moments._moments) == 10
    assert windows.allowance(AccountId("account 99")).remaining_count == 1


def test_what_other_gateways_let_in_is_forgotten_by_the_same_bounds(monkeypatch):
    monkeypatch.setattr(rate_windows, "ACCOUNTS_MAX", 10)
    clock, ann = MovedClock(), AccountId("ann")
    windows = RateWindows(rate_limit("20/hour"), clock.monotonic_seconds)
    for number in range(100):
        clock.now_seconds += 600.0
        windows.count_elsewhere(ann, 2)
        windows.count_elsewhere(AccountId(f"account {number}"), 1)
    assert windows.allowance(ann).remaining_count == 20 - 6 * 2
    assert len(windows._moments._moments) == 10
    assert len(windows._moments._moments[windows._limit.key_for(ann)]) == 6 * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (1.5, "1.5s"), (36, "36s"), (360, "6m0s"), (3599.9995, "1h0m0s"), (3661.5, "1h1m1.5s")],
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert duration_text(seconds) == text


def test_the_headers_of_a_limit():
    assert dict(rate_headers(Allowance(100, 7, 36.0, 3600))) == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "7",
        "x-ratelimit-reset-requests": "36s",
    }


ENTRY = catalogue_entry("tiny")


def gate_of(clock, flex_models=frozenset(), **changes):
    return Gate(TierLimits(**{"default_rate": rate_limit("3/hour"), **changes}), lambda: flex_models, Expectations(), clock)


def asking(tier, **quotas):
    caller = Caller(KeyPrefix("key"), KeyQuotas(**quotas))
    return replace(request_by(AccountId("ann"), model_id=MODEL, completion_tokens_max=100), asked_tier=tier, caller=caller)


def test_the_gate_counts_what_is_answered_and_takes_back_what_is_not():
    clock = MovedClock()
    gate = gate_of(clock)
    visits = [gate.enter(asking(AskedTier.DEFAULT), ENTRY) for _ in range(3)]
    with pytest.raises(PotluckError) as refused:
        gate.enter(asking(AskedTier.DEFAULT), ENTRY)
    assert (refused.value.code, refused.value.retry_after_seconds) == (ErrorCode.RATE_LIMITED, 3600.0)
    assert gate.enter(asking(AskedTier.AUTO), ENTRY).request.tier is FLEX
    visits[0].refuse(PotluckError(ErrorCode.QUEUE_FULL))
    visits[0].refuse(PotluckError(ErrorCode.QUEUE_FULL))
    visits[1].end(Usage(10, 20), 20, 90, 1.0, waited_seconds=2.0)
    assert gate.windows.allowance(AccountId("ann")).remaining_count == 1
    assert gate.compliance().hour == PromiseCount(2, 1), "a request that was refused for want of room is a promise that was not kept"
    assert gate.take_untold() == GateCounts({int(clock.unix_ms() // 3_600_000): PromiseCount(2, 1)})
    assert not gate.take_untold()


def test_what_a_key_used_today_is_told_to_the_books_and_counts_after_a_restart():
    clock = MovedClock()
    day = clock.unix_ms() // 86_400_000
    asked = asking(AskedTier.FLEX, requests_per_day=2)
    gate = gate_of(clock)
    gate.enter(asked, ENTRY).end(Usage(10, 20), 20, 90, 1.0, waited_seconds=2.0)
    gate.enter(asked, ENTRY).refuse(PotluckError(ErrorCode.QUEUE_FULL))
    told = gate.take_untold()
    assert told.key_days == {(KeyPrefix("key"), day): KeyDay(1, 30.0, 90)}
    gate.put_back(told)
    gate.enter(asked, ENTRY).take_back()
    assert gate.take_untold().key_days == told.key_days, "what was put back is told again, and what was taken back is nothing"

    began_anew = gate_of(clock)
    began_anew.remember(told)
    began_anew.enter(asked, ENTRY)
    with pytest.raises(PotluckError, match="may make 2 requests a day, and has"):
        began_anew.enter(asked, ENTRY)
    assert began_anew.take_untold().key_days == {(KeyPrefix("key"), day): KeyDay(1)}


def test_whoever_asks_again_and_again_breaks_no_more_promises_than_an_account_has():
    gate = gate_of(MovedClock())
    for _ in range(50):
        gate.enter(asking(AskedTier.DEFAULT), ENTRY).refuse(PotluckError(ErrorCode.QUEUE_FULL))
    assert gate.compliance().hour == PromiseCount(3, 0)


def test_the_promise_is_not_judged_by_clients_that_go_at_once_nor_by_flex():
    gate = gate_of(MovedClock())
    gate.enter(asking(AskedTier.DEFAULT), ENTRY).end(None, 0, 0, None, waited_seconds=1.0)
    gate.enter(asking(AskedTier.FLEX), ENTRY).end(None, 0, 0, None, waited_seconds=100.0)
    gate.enter(asking(AskedTier.DEFAULT), ENTRY).refuse(PotluckError(ErrorCode.INSUFFICIENT_CREDITS))
    assert gate.compliance().hour == NONE
    gate.enter(asking(AskedTier.DEFAULT), ENTRY).end(None, 0, 0, None, waited_seconds=6.0)
    assert gate.compliance().hour == PromiseCount(1, 0)


def test_a_model_that_is_deployed_as_flex_has_no_default_tier():
    gate = gate_of(MovedClock(), frozenset({MODEL}))
    with pytest.raises(PotluckError) as refused:
        gate.enter(asking(AskedTier.DEFAULT), ENTRY)
    assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "service_tier")
    assert gate.enter(asking(AskedTier.AUTO), ENTRY).request.tier is FLEX
    assert gate.windows.allowance(AccountId("ann")).remaining_count == 3


def test_who_hangs_up_has_used_the_prompt_and_what_was_relayed():
    gate = gate_of(MovedClock())
    quotas = {"tokens_per_day": 1000}
    visit = gate.enter(asking(AskedTier.FLEX, **quotas), ENTRY)
    visit.end(None, 40, 160, 1.0, waited_seconds=2.0)
    (use,) = gate._uses.values()
    assert (use.token_count, use.pending_tokens, use.running_count) == (visit.request.work.prompt_tokens + 40, 0.0, 0)
    gate.enter(asking(AskedTier.FLEX, **quotas), ENTRY).end(None, 0, 0, None, waited_seconds=2.0)
    (after,) = gate._uses.values()
    assert after.token_count == use.token_count, "before its first token nothing was used"


def test_the_gate_holds_a_key_to_its_quotas():
    clock = MovedClock()
    gate = gate_of(clock)
    first = gate.enter(asking(AskedTier.FLEX, concurrent_max=1, requests_per_day=2), ENTRY)
    with pytest.raises(PotluckError) as refused:
        gate.enter(asking(AskedTier.FLEX, concurrent_max=1, requests_per_day=2), ENTRY)
    assert (refused.value.code, "at a time" in refused.value.message) == (ErrorCode.QUOTA_EXCEEDED, True)
    first.end(Usage(5, 5), 5, 30, 1.0, waited_seconds=1.0)
    gate.enter(asking(AskedTier.FLEX, concurrent_max=1, requests_per_day=2), ENTRY).end(None, 0, 0, None, waited_seconds=0.0)
    with pytest.raises(PotluckError) as refused:
        gate.enter(asking(AskedTier.FLEX, concurrent_max=1, requests_per_day=2), ENTRY)
    assert "2 requests a day" in refused.value.message
    clock.now_seconds += 24 * 3600
    gate.enter(asking(AskedTier.FLEX, concurrent_max=1, requests_per_day=2), ENTRY)
