"""Several gates and one directory: an account's window and a key's bounds are not as many times as large as there are gateways."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.directory.shared_counts import SharedCounts
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_coordinator.domain.tiers import AskedTier
from potluck_coordinator.gateway.expectations import Expectations
from potluck_coordinator.gateway.gate import Gate, TierLimits
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.rate_text import rate_limit
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import KeyPrefix, Usage
from tests.support.books import open_books
from tests.support.replicas import catalogue_entry
from tests.support.request_path import request_by

LIMIT = 20
KEY = KeyPrefix("key")


class Gates:
    """Gates of several gateways that tell the directory each second."""

    def __init__(self, books, count: int) -> None:
        self.books = books
        self.counts = SharedCounts(books.store, books.clock)
        limits = TierLimits(rate_limit(f"{LIMIT}/hour"), is_shared=True)
        self.gates = [Gate(limits, frozenset, Expectations(), books.clock) for _ in range(count)]

    async def second(self) -> None:
        for epoch, gate in enumerate(self.gates):
            gate.learn(await self.counts.note(gate.take_untold(), gate.others_version, epoch, range(len(self.gates))))
        self.books.clock.advance(1)

    def ask(self, number: int, quotas: KeyQuotas | None = None, tier: AskedTier = AskedTier.DEFAULT):
        """A visit, or the code of a refusal."""
        request = replace(request_by("ann"), asked_tier=tier, caller=Caller(KEY, quotas or KeyQuotas()), completion_tokens_max=100)
        try:
            return self.gates[number].enter(request, catalogue_entry("tiny"))
        except PotluckError as error:
            return error.code


@pytest.fixture
def books():
    with open_books() as books:
        yield books


@given(turns=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=4, max_size=12))
@settings(max_examples=15, deadline=None)
async def test_a_window_lets_in_no_more_than_its_limit_and_what_came_in_one_second(turns):
    with open_books() as books:
        gates = Gates(books, 3)
        let_in = 0
        for turn in turns:
            let_in += sum(gates.ask(number) is not ErrorCode.RATE_LIMITED for number in turn)
            await gates.second()
            assert let_in <= LIMIT + max(map(len, turns)), "what one second lets through before the others hear of it"
        for number in range(3):
            left = gates.gates[number].windows.allowance("ann").remaining_count
            assert (gates.ask(number) is ErrorCode.RATE_LIMITED) == (left == 0)
            assert abs(left - max(0, LIMIT - let_in)) <= max(map(len, turns))


async def test_what_is_taken_back_is_so_everywhere(books):
    gates = Gates(books, 2)
    visits = [gates.ask(0) for _ in range(5)]
    await gates.second()
    await gates.second()
    assert gates.gates[1].windows.allowance("ann").remaining_count == LIMIT - 5
    for visit in visits[:3]:
        visit.take_back()
    await gates.second()
    await gates.second()
    assert [gate.windows.allowance("ann").remaining_count for gate in gates.gates] == [LIMIT - 2] * 2


async def test_requests_of_a_day_are_the_keys_wherever_it_asks(books):
    gates, quotas = Gates(books, 2), KeyQuotas(requests_per_day=6)
    for number in (0, 1) * 3:
        assert gates.ask(number, quotas, AskedTier.FLEX) is not ErrorCode.QUOTA_EXCEEDED
        await gates.second()
    await gates.second()
    assert [gates.ask(number, quotas, AskedTier.FLEX) for number in (0, 1)] == [ErrorCode.QUOTA_EXCEEDED] * 2


async def test_what_runs_at_one_gateway_counts_at_the_other_until_it_is_over(books):
    gates, quotas = Gates(books, 2), KeyQuotas(concurrent_max=2)
    visits = [gates.ask(0, quotas, AskedTier.FLEX) for _ in range(2)]
    await gates.second()
    assert gates.ask(1, quotas, AskedTier.FLEX) is ErrorCode.QUOTA_EXCEEDED
    for visit in visits:
        visit.end(Usage(10, 20, 0), 20, 0, 0.1, waited_seconds=0.1)
    await gates.second()
    await gates.second()
    assert not isinstance(gates.ask(1, quotas, AskedTier.FLEX), ErrorCode)


async def test_what_a_gateway_that_died_had_running_is_held_against_nobody(books):
    gates, quotas = Gates(books, 2), KeyQuotas(concurrent_max=1)
    gates.ask(0, quotas, AskedTier.FLEX)
    await gates.second()
    other = gates.gates[1]
    other.learn(await gates.counts.note(other.take_untold(), other.others_version, 1, [1, 2]))
    assert not isinstance(gates.ask(1, quotas, AskedTier.FLEX), ErrorCode)


async def test_a_directory_that_starts_anew_tells_everyone_the_days_of_its_books(books):
    gates, quotas = Gates(books, 2), KeyQuotas(requests_per_day=3)
    for _ in range(3):
        gates.ask(0, quotas, AskedTier.FLEX)
    first, second = gates.gates
    first.learn(await gates.counts.note(first.take_untold(), first.others_version, 0, [0, 1]))
    books.clock.advance(1)
    gates.counts = SharedCounts(books.store, books.clock)
    second.learn(await gates.counts.note(second.take_untold(), second.others_version, 1, [0, 1]))
    assert gates.ask(1, quotas, AskedTier.FLEX) is ErrorCode.QUOTA_EXCEEDED
