"""Whose turn it is among those that wait, and who gives way: examples, and the bound on how unequal backlogged accounts can become."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.domain.fairness import expected_service, gives_way, lifted, service
from potluck_coordinator.gateway import waiting as waiting_module
from potluck_coordinator.gateway.waiting import COMPLETION_TOKENS_GUESS, ModelQueue, WaitingRequest
from potluck_protocol.values import AccountId, Usage
from tests.support.replicas import catalogue_entry
from tests.support.request_path import request_by

ENTRY = catalogue_entry("tiny", context_length_tokens=2048)


def test_an_answered_token_counts_as_two_that_are_read():
    assert service(10, 10) == 30
    assert service(-5, -5) == 0


@pytest.mark.parametrize(
    ("completion_tokens_max", "answer_count", "expected"),
    [(None, 1, 25 + 600), (100, 1, 25 + 200), (1000, 1, 25 + 600), (100, 4, 25 + 800), (0, 1, 25)],
)
def test_a_request_is_charged_what_its_model_answers_in_the_mean_unless_it_asked_for_less(completion_tokens_max, answer_count, expected):
    assert expected_service(100, completion_tokens_max, 300.0, answer_count) == expected


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


def waiting(account, **fields):
    return WaitingRequest(request_by(AccountId(account), **fields), ENTRY, frozenset(), 30.0)


def ended(prompt_tokens=0, completion_tokens=0, *, usage=True, relayed=0, is_whole=True, completion_tokens_max=2048):
    counted = Usage(prompt_tokens, completion_tokens) if usage else None
    return SimpleNamespace(usage=counted, relayed_token_count=relayed, is_whole=is_whole, completion_tokens_max=completion_tokens_max)


def turns(queue):
    return [one.request.account_id for one in queue.in_turn()]


async def test_accounts_take_turns_however_many_requests_each_has_waiting():
    queue = ModelQueue()
    for account in ("flood", "flood", "flood", "flood", "polite", "third"):
        queue.join(waiting(account))
    served = []
    for one in queue.in_turn():
        queue.charge(one.request)
        one.turn.set_result(None)
        served.append(one.request.account_id)
    assert served == ["flood", "polite", "third", "flood", "flood", "flood"]
    assert len(queue) == 0


async def test_everyone_has_one_turn_in_a_pass_even_if_nobody_is_served():
    queue = ModelQueue()
    for account in ("a", "a", "b", "c", "b"):
        queue.join(waiting(account))
    assert sorted(turns(queue)) == ["a", "a", "b", "b", "c"]
    assert len(queue) == 5


async def test_who_was_given_more_while_others_waited_waits_for_them():
    queue = ModelQueue()
    for account in ("busy", "idle", "busy"):
        queue.join(waiting(account))
    queue.charge(request_by(AccountId("busy")))
    assert turns(queue) == ["idle", "busy", "busy"]


async def test_an_account_that_was_away_is_not_served_alone_until_it_has_caught_up():
    queue = ModelQueue()
    for _ in range(100):
        request = request_by(AccountId("busy"))
        queue.correct(request, queue.charge(request), ended(0, 100))
    for _ in range(3):
        queue.join(waiting("busy"))
        queue.join(waiting("returning"))
    served = []
    for one in queue.in_turn():
        queue.charge(one.request)
        served.append(one.request.account_id)
    assert served == ["busy", "returning", "busy", "returning", "busy", "returning"]


async def test_a_charge_in_advance_is_corrected_by_what_the_answer_came_to():
    queue = ModelQueue()
    queue.join(waiting("long"))
    queue.join(waiting("short"))
    short, long = (request_by(AccountId(name), completion_tokens_max=None, prompt_bytes=400) for name in ("short", "long"))
    expected = {one.account_id: queue.charge(one) for one in (short, long)}
    assert set(expected.values()) == {100 + 2 * COMPLETION_TOKENS_GUESS}
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
    queue = ModelQueue()
    request = request_by(AccountId("a"), prompt_bytes=400, stream=stream)
    expected = queue.charge(request)
    queue.correct(request, expected, answer)
    assert queue._accounts[AccountId("a")].counter == pytest.approx(charged)


async def test_the_length_of_answers_is_learned_from_whole_ones():
    queue = ModelQueue()
    asking = request_by(completion_tokens_max=None, prompt_bytes=0)
    for answer in [ended(0, 40)] * 40 + [ended(0, 2000, is_whole=False)]:
        queue.correct(asking, queue.charge(asking), answer)
    assert queue.charge(asking) == pytest.approx(80, rel=0.05)


async def test_who_has_left_the_queue_is_not_served_and_leaving_twice_is_harmless():
    queue = ModelQueue()
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
    queue = ModelQueue()
    ones = [waiting(account) for account in ("a", "b", "b", "b", "a")]
    for one in ones:
        queue.join(one)
    assert queue.newest_to_give_way(AccountId("c")) is ones[3]
    assert queue.newest_to_give_way(AccountId("b")) is None


async def test_counters_of_many_accounts_are_forgotten_but_for_the_most_served_and_those_that_wait(monkeypatch):
    monkeypatch.setattr(waiting_module, "ACCOUNTS_REMEMBERED_MAX", 10)
    queue = ModelQueue()
    queue.join(waiting("waits"))

    def served(account, completion_tokens):
        request = request_by(AccountId(account))
        queue.correct(request, queue.charge(request), ended(0, completion_tokens))

    served("busy", 1000)
    for number in range(1000):
        served(f"passer-by {number}", 10)
        assert len(queue._accounts) <= 11
    assert {"waits", "busy"} <= set(queue._accounts)


SERVICES = st.tuples(st.integers(0, 400), st.integers(0, 100))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(2, 5), st.integers(1, 4))
def test_two_accounts_that_always_wait_are_never_further_apart_than_the_paper_s_bound(data, account_count, slot_count):
    """Whatever their requests are like: twice the most that runs at a time, where a charge in advance counts as running."""

    async def play():
        queue, running = ModelQueue(), []
        accounts = [AccountId(f"account {number}") for number in range(account_count)]
        largest = 0.0

        def join(account):
            prompt_bytes, completion_tokens = data.draw(SERVICES)
            one = waiting(account, prompt_bytes=prompt_bytes, completion_tokens_max=None)
            one.entry = ended(prompt_bytes / 4, completion_tokens)
            queue.join(one)

        for account in accounts:
            for _ in range(data.draw(st.integers(2, 6))):
                join(account)
        for _ in range(60):
            while len(running) < slot_count:
                one = next(queue.in_turn())
                queue.leave(one)
                expected = queue.charge(one.request)
                largest = max(largest, expected, service(one.entry.usage.prompt_token_count, one.entry.usage.completion_token_count))
                running.append((one, expected))
                if not any(left.request.account_id == one.request.account_id for left in queue.in_turn()):
                    join(one.request.account_id)
            given = [queue._accounts[account].counter for account in accounts]
            assert max(given) - min(given) <= 2 * slot_count * largest
            done, expected = running.pop(data.draw(st.integers(0, len(running) - 1)))
            queue.correct(done.request, expected, done.entry)

    asyncio.run(play())
