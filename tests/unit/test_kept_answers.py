"""Answers kept for those who ask again: within bounds, the oldest out, and nobody who reads one loses a byte of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from potluck_coordinator.directory.idempotency import IdempotencyKeys
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.idempotency import KeptBounds
from potluck_coordinator.gateway import kept_answer
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, NodeId
from tests.support.books import Books, open_books
from tests.support.request_path import request_by

PEOPLE = (AccountId("ann"), AccountId("bob"))
BOUNDS = KeptBounds(answer_bytes_max=1000, account_bytes_max=1500, account_count_max=3, bytes_max=2500, count_max=5)


class Endless:
    """An answer of so many pieces of 100 bytes, as fast as they are taken."""

    def __init__(self, piece_count: int) -> None:
        self.node_id = NodeId("n")
        self.usage = None
        self.tier = ServiceTier.FLEX
        self.charge_micro_credits = 1
        self.taken_count = 0
        self._piece_count = piece_count
        self.may_end = asyncio.Event()

    async def next_data(self) -> bytes | None:
        await asyncio.sleep(0)
        if self.taken_count == self._piece_count:
            await self.may_end.wait()
            return None
        self.taken_count += 1
        return b"%100d" % self.taken_count

    async def close(self) -> None:
        pass


class Pool:
    """Answers of the length that stands in the body."""

    def __init__(self) -> None:
        self.answers: list[Endless] = []
        self.ends_at_once = True

    def announce(self, request):
        return lambda: None

    async def begin(self, request) -> Endless:
        self.answers.append(Endless(int(request.body)))
        if self.ends_at_once:
            self.answers[-1].may_end.set()
        return self.answers[-1]


@pytest.fixture
def books() -> Iterator[Books]:
    with open_books() as books:
        books.add_people(*PEOPLE)
        yield books


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
async def keyed(books, pool) -> AsyncIterator[KeyedRequests]:
    keyed = KeyedRequests(pool, IdempotencyKeys(books.store, books.clock), books.clock, hash_key=b"h" * 32, gateway_epoch=1, bounds=BOUNDS)
    yield keyed
    for answer in pool.answers:
        answer.may_end.set()
    await keyed.stop()
    assert await keyed.drain(5)


async def begin(keyed, key, piece_count, person=PEOPLE[0]):
    return await keyed.begin(request_by(person, body=b"%d" % piece_count), key, b"%d" % piece_count)


async def read(answer) -> bytes:
    seen = b""
    while (data := await asyncio.wait_for(answer.next_data(), 5)) is not None:
        seen += data
    await answer.close()
    return seen


async def code_of(keyed, key, piece_count, person=PEOPLE[0]) -> str:
    with pytest.raises(PotluckError) as refused:
        await begin(keyed, key, piece_count, person)
    return str(refused.value.code)


def whole(piece_count: int) -> bytes:
    return b"".join(b"%100d" % number for number in range(1, piece_count + 1))


async def test_the_accounts_oldest_answer_goes_and_its_key_stays_spent(keyed, pool):
    for key in ("one", "two", "three", "four"):
        assert await read(await begin(keyed, key, 3)) == whole(3)
    assert await code_of(keyed, "one", 3) == ErrorCode.IDEMPOTENCY_KEY_SPENT
    for key in ("two", "three", "four"):
        assert await read(await begin(keyed, key, 3)) == whole(3)
    assert (len(pool.answers), keyed.held_bytes) == (4, 900)


async def test_bytes_bound_what_is_kept_of_one_account_and_of_all(keyed):
    for key in ("one", "two"):
        await read(await begin(keyed, key, 8))
    assert keyed.held_bytes == 800, "two of 800 bytes are more than one account may have"
    for key in ("one", "two"):
        await read(await begin(keyed, key, 7, PEOPLE[1]))
    assert keyed.held_bytes == 800 + 1400
    await read(await begin(keyed, "three", 6))
    assert keyed.held_bytes == 600 + 1400, "the oldest of all goes, whose ever it is"
    assert await code_of(keyed, "two", 8) == ErrorCode.IDEMPOTENCY_KEY_SPENT


async def test_a_long_answer_is_passed_on_whole_and_not_kept(keyed, pool):
    pool.ends_at_once = False
    answer = await begin(keyed, "long", 50)
    reading = asyncio.ensure_future(read(answer))
    while keyed.held_bytes or pool.answers[0].taken_count < 50:
        await asyncio.sleep(0)
    assert await code_of(keyed, "long", 50) == ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT
    pool.answers[0].may_end.set()
    assert await reading == whole(50)
    assert await code_of(keyed, "long", 50) in {ErrorCode.IDEMPOTENCY_KEY_SPENT, ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT}
    assert len(pool.answers) == 1


async def test_a_slow_reader_of_one_that_is_not_kept_holds_the_run_and_not_memory(keyed, pool, monkeypatch):
    monkeypatch.setattr(kept_answer, "LAG_BYTES_MAX", 2000)
    answer = await begin(keyed, "long", 500)
    for _ in range(2000):
        await asyncio.sleep(0)
    assert pool.answers[0].taken_count * 100 <= 2000 + 100
    assert await read(answer) == whole(500)


async def test_a_reader_who_is_let_go_in_the_middle_still_gets_everything(keyed, pool):
    pool.ends_at_once = False
    answer = await begin(keyed, "first", 5)
    assert await answer.next_data() == whole(1)
    pool.ends_at_once = True
    for key in ("two", "three", "four"):
        await read(await begin(keyed, key, 1))
    assert await code_of(keyed, "first", 5) == ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT
    pool.answers[0].may_end.set()
    assert whole(1) + await read(answer) == whole(5)
