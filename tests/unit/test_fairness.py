"""Whose turn it is among those that wait, and who gives way: examples, and the bound on how unequal backlogged accounts can become."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.domain.admission import NOBODY, Queued
from potluck_coordinator.domain.fairness import (
    EARNED_FOR_FULL_WEIGHT_MICRO_CREDITS,
    WEIGHT_MAX,
    Backlog,
    gives_way,
    lifted,
    service,
    turn_order,
    weight_of,
    work_ahead,
)
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.gateway import waiting as waiting_module
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.gateway.waiting import TierQueue, WaitingRequest
from potluck_protocol.values import AccountId, Usage
from tests.support.replicas import catalogue_entry
from tests.support.request_path import request_by

ENTRY = catalogue_entry("tiny", context_length_tokens=2048)


def test_an_answered_token_counts_as_two_that_are_read():
    assert service(10, 10) == 30
    assert service(-5, -5) == 0


@pytest.mark.parametrize(
    ("earned_micro_credits", "weight"),
    [(-5, 1.0), (0, 1.0), (EARNED_FOR_FULL_WEIGHT_MICRO_CREDITS // 3, 2.0), (EARNED_FOR_FULL_WEIGHT_MICRO_CREDITS, 4.0), (10**18, 4.0)],
)
def test_whoever_gives_counts_for_more_and_never_for_more_than_four(earned_micro_credits, weight):
    assert weight_of(earned_micro_credits) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("own", "others", "ahead"),
    [
        (Backlog(0, 1, 0, NOBODY), [], NOBODY),
        (Backlog(0, 1, 100, Queued(2, 300)), [], Queued(2, 300)),
        (Backlog(0, 1, 0, NOBODY), [Backlog(0, 1, 500, Queued(5, 500))], NOBODY),  # others have had as much, so it comes at once
        (Backlog(100, 1, 0, NOBODY), [Backlog(0, 1, 500, Queued(5, 500))], Queued(1, 100)),  # they have to catch up with it
        (Backlog(100, 1, 0, NOBODY), [Backlog(0, 4, 500, Queued(5, 500))], Queued(4, 400)),  # who gives has more to catch up with
        (Backlog(900, 1, 0, NOBODY), [Backlog(0, 1, 500, Queued(5, 500))], Queued(5, 500)),  # never more than waits
        (Backlog(0, 1, 200, Queued(2, 200)), [Backlog(0, 1, 500, Queued(5, 500))], Queued(4, 400)),  # turn about
    ],
)
def test_what_comes_before_one_more_request_of_an_account(own, others, ahead):
    found = work_ahead(others, own)
    assert (found.count, found.tokens) == pytest.approx((ahead.count, ahead.tokens))


def test_the_foreseen_order_is_turn_about_and_whoever_counts_double_has_two_turns():
    assert turn_order({"a": 0.0, "b": 0.0}, {"a": [10, 10, 10], "b": [10]}) == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]
    assert turn_order({"a": 0.0, "b": 1.0}, {"a": [10, 10], "b": [5, 5, 5]}) == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("b", 2)]
    assert turn_order({"a": 0.0}, {"a": []}) == []


@pytest.mark.parametrize(
    ("given_before", "others", "level", "counter"),
    [
        (10.0, [30.0, 50.0], 70.0, 30.0),  # it was away, and is lifted to the least of those that wait
        (40.0, [30.0, 50.0], 70.0, 40.0),  # it had more than the least
        (10.0, [], 70.0, 70.0),  # nobody waits: to who was served last
        (90.0, [], 70.0, 90.0),  # what it was given before stays with it
    ],
)
def test_who_begins_to_wait_has_no_credit_for_time_in_which_he_asked_for_nothing(given_before, others, level, counter):
    assert lifted(given_before, others, level) == counter


@pytest.mark.parametrize(
    ("queued", "newcomer", "who"),
    [
        ({"flood": 64}, "polite", "flood"),
        ({"flood": 64}, "flood", None),
        ({"flood": 33, "other": 31}, "polite", "flood"),
        ({"a": 32, "b": 32}, "a", None),
        ({"a": 33, "b": 31}, "b", "a"),
        ({"a": 32, "b": 31}, "b", None),  # they would only change places
        ({"a": 1}, "b", None),
        ({}, "a", None),
    ],
)
def test_in_a_full_queue_he_gives_way_who_has_most_if_that_makes_them_more_equal(queued, newcomer, who):
    assert gives_way(queued, newcomer) == who


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 20)), st.sampled_from("abcdefg"))
def test_giving_way_never_turns_the_tables(queued, newcomer):
    """Whoever gave way still has at least as much in the queue as the newcomer, so nobody is driven out by turns."""
    who = gives_way(queued, newcomer)
    if who is not None:
        assert queued[who] == max(queued.values())
        assert queued[who] - 1 >= queued.get(newcomer, 0) + 1
    else:
        assert max(queued.values(), default=0) <= queued.get(newcomer, 0) + 1


def work_of(request):
    answer = 256.0 if request.completion_tokens_max is None else float(request.completion_tokens_max)
    return Work(request.prompt_bytes / 4, answer, answer)


def waiting(account, weight=1.0, **fields):
    request = replace(request_by(AccountId(account), **fields), caller=Caller(weight=weight))
    return WaitingRequest(
        request, ENTRY, frozenset(), work=work_of(request), seconds_max=30.0, arrived_at_seconds=0.0, joined_at_seconds=0.0
    )


def charge(queue, request):
    return queue.charge(request, work_of(request))


def ended(prompt_tokens=0, completion_tokens=0, *, usage=True, relayed=0, is_whole=True, completion_tokens_max=2048):
    counted = Usage(prompt_tokens, completion_tokens) if usage else None
    return SimpleNamespace(usage=counted, relayed_token_count=relayed, is_whole=is_whole, completion_tokens_max=completion_tokens_max)


def turns(queue):
    return [one.request.account_id for one in queue.in_turn()]


async def test_accounts_take_turns_however_many_requests_each_has_waiting():
    queue = TierQueue()
    for account in ("flood", "flood", "flood", "flood", "polite", "third"):
        queue.join(waiting(account))
    served = []
    for one in queue.in_turn():
        charge(queue, one.request)
        queue.leave(one)
        one.turn.set_result(None)
        served.append(one.request.account_id)
    assert served == ["flood", "polite", "third", "flood", "flood", "flood"]
    assert len(queue) == 0


async def test_everyone_has_one_turn_in_a_pass_even_if_nobody_is_served():
    queue = TierQueue()
    for account in ("a", "a", "b", "c", "b"):
        queue.join(waiting(account))
    assert sorted(turns(queue)) == ["a", "a", "b", "b", "c"]
    assert len(queue) == 5


async def test_who_was_given_more_while_others_waited_waits_for_them():
    queue = TierQueue()
    for account in ("busy", "idle", "busy"):
        queue.join(waiting(account))
    charge(queue, request_by(AccountId("busy")))
    assert turns(queue) == ["idle", "busy", "busy"]


async def test_an_account_that_was_away_is_not_served_alone_until_it_has_caught_up():
    queue = TierQueue()
    for _ in range(100):
        request = request_by(AccountId("busy"))
        queue.correct(request, charge(queue, request), ended(0, 100))
    for _ in range(3):
        queue.join(waiting("busy"))
        queue.join(waiting("returning"))
    served = []
    for one in queue.in_turn():
        charge(queue, one.request)
        served.append(one.request.account_id)
    assert served == ["busy", "returning", "busy", "returning", "busy", "returning"]


async def test_a_charge_in_advance_is_corrected_by_what_the_answer_came_to():
    queue = TierQueue()
    queue.join(waiting("long"))
    queue.join(waiting("short"))
    short, long = (request_by(AccountId(name), completion_tokens_max=None, prompt_bytes=400) for name in ("short", "long"))
    expected = {one.account_id: charge(queue, one) for one in (short, long)}
    assert set(expected.values()) == {100 + 2 * 256}
    assert turns(queue) == ["long", "short"], "equal so far: in the order of their coming"
    queue.correct(short, expected["short"], ended(100, 10))
    queue.correct(long, expected["long"], ended(100, 900))
    assert turns(queue) == ["short", "long"]


@pytest.mark.parametrize(
    ("answer", "stream", "charged"),
    [
        (ended(100, 10), True, 120),
        (ended(10**9, 10**9, completion_tokens_max=50), True, 400 + 256 + 2 * 50),  # no tokenizer makes more tokens than there are bytes
        (ended(-5, -5), True, 0),
        (ended(usage=False, relayed=30), True, 100 + 60),  # broken off: the prompt by its bytes, and what was relayed
        (ended(usage=False), False, 100 + 2 * 100),  # in one piece: as was expected
    ],
)
async def test_no_node_makes_an_account_s_service_more_than_it_can_be(answer, stream, charged):
    queue = TierQueue()
    request = request_by(AccountId("a"), prompt_bytes=400, stream=stream)
    expected = charge(queue, request)
    queue.correct(request, expected, answer)
    assert queue._accounts[AccountId("a")].counter == pytest.approx(charged)


async def test_who_has_left_the_queue_is_not_served_and_leaving_twice_is_harmless():
    queue = TierQueue()
    first, second = waiting("a"), waiting("a")
    queue.join(first)
    queue.join(second)
    queue.leave(first)
    queue.leave(first)
    assert list(queue.in_turn()) == [second]
    assert queue.newest_to_give_way(AccountId("b")) is None
    queue.leave(second)
    assert (list(queue.in_turn()), len(queue)) == ([], 0)


async def test_the_newest_request_of_who_has_most_gives_way():
    queue = TierQueue()
    ones = [waiting(account) for account in ("a", "b", "b", "b", "a")]
    for one in ones:
        queue.join(one)
    assert queue.newest_to_give_way(AccountId("c")) is ones[3]
    assert queue.newest_to_give_way(AccountId("b")) is None


async def test_counters_of_many_accounts_are_forgotten_but_for_the_most_served_and_those_that_wait(monkeypatch):
    monkeypatch.setattr(waiting_module, "ACCOUNTS_REMEMBERED_MAX", 10)
    queue = TierQueue()
    queue.join(waiting("waits"))

    def served(account, completion_tokens):
        request = request_by(AccountId(account))
        queue.correct(request, charge(queue, request), ended(0, completion_tokens))

    served("busy", 1000)
    for number in range(1000):
        served(f"passer-by {number}", 10)
        assert len(queue._accounts) <= 11
    assert {"waits", "busy"} <= set(queue._accounts)


SERVICES = st.tuples(st.integers(0, 400), st.integers(0, 100))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.lists(st.sampled_from([1.0, 1.5, 2.0, WEIGHT_MAX]), min_size=2, max_size=5), st.integers(1, 4))
def test_two_accounts_that_always_wait_are_never_further_apart_than_the_paper_s_bound(data, weights, slot_count):
    """Whatever their requests are like, and over their weights: twice the most that runs at a time, where a charge in advance counts as
    running. A weight is 1 at the least, so that it makes nothing larger."""

    async def play():
        queue, running = TierQueue(), []
        accounts = {AccountId(f"account {number}"): weight for number, weight in enumerate(weights)}
        largest = 0.0

        def join(account):
            prompt_bytes, completion_tokens = data.draw(SERVICES)
            one = waiting(account, accounts[account], prompt_bytes=prompt_bytes, completion_tokens_max=None)
            one.entry = ended(prompt_bytes / 4, completion_tokens)
            queue.join(one)

        for account in accounts:
            for _ in range(data.draw(st.integers(2, 6))):
                join(account)
        for _ in range(60):
            while len(running) < slot_count:
                one = next(queue.in_turn())
                queue.leave(one)
                expected = charge(queue, one.request)
                largest = max(largest, expected, service(one.entry.usage.prompt_token_count, one.entry.usage.completion_token_count))
                running.append((one, expected))
                if not any(left.request.account_id == one.request.account_id for left in queue.in_turn()):
                    join(one.request.account_id)
            given = [queue._accounts[account].counter for account in accounts]
            assert max(given) - min(given) <= 2 * slot_count * largest
            done, expected = running.pop(data.draw(st.integers(0, len(running) - 1)))
            queue.correct(done.request, expected, done.entry)

    asyncio.run(play())


async def test_whoever_gives_four_times_as_much_gets_four_turns_and_a_guest_his_one():
    queue = TierQueue()
    for _ in range(40):
        queue.join(waiting("giver", WEIGHT_MAX))
        queue.join(waiting("guest"))
    served = []
    for one in queue.in_turn():
        charge(queue, one.request)
        served.append(one.request.account_id)
    first = served[:20]
    assert (first.count("giver"), first.count("guest")) == (16, 4)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=30), st.sampled_from("abcd"))
def test_what_is_foreseen_to_come_before_a_newcomer_is_what_does(ones, newcomer):
    """By no more than one request of each account: turns are whole requests, and the prediction counts parts."""

    async def play():
        queue = TierQueue()
        for account, prompt_tokens in ones:
            queue.join(waiting(account, prompt_bytes=4 * prompt_tokens, completion_tokens_max=0))
        last = waiting(newcomer, prompt_bytes=4, completion_tokens_max=0)
        foreseen = queue.ahead_of(last.request, {})
        queue.join(last)
        before = queue.in_foreseen_turn()
        before = before[: before.index(last)]
        largest = max((prompt for _, prompt in ones), default=0)
        assert abs(sum(one.work.tokens for one in before) - foreseen.tokens) <= 3 * largest
        assert len(queue) == len(ones) + 1

    asyncio.run(play())
