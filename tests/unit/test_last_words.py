"""Books that go away while requests with keys are under way: they hear of each key later, and none stays locked or is run twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from potluck_coordinator.directory.idempotency import IdempotencyKeys
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.gateway import last_words
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_coordinator.storage.absence import DatabaseAwayError
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, NodeId
from tests.support.books import Books, open_books
from tests.support.request_path import request_by

ANN = AccountId("ann")


class Desk:
    """The books' own, as long as they are there."""

    def __init__(self, keys: IdempotencyKeys) -> None:
        self._keys = keys
        self.calls: list[str] = []
        self.failure: Exception | None = None
        self.fails_after: Exception | None = None
        """The call takes effect, and its answer is lost."""
        self.answers = asyncio.Event()
        self.answers.set()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self.calls.append(name)
            await self.answers.wait()
            if self.failure is not None:
                raise self.failure
            answer = await getattr(self._keys, name)(*arguments)
            if self.fails_after is not None:
                raise self.fails_after
            return answer

        return call


class Answer:
    """One piece, when the test lets it end."""

    node_id = NodeId("n")
    usage = None
    tier = ServiceTier.FLEX
    charge_micro_credits = 7

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self._pieces = [b"answer"]

    async def next_data(self) -> bytes | None:
        if self._pieces:
            return self._pieces.pop()
        await self.may_end.wait()
        return None

    async def close(self) -> None:
        pass


class Pool:
    """Answers, unless it waits for a hold that it is then refused."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.refusal: PotluckError | None = None
        self.is_asked = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    def announce(self, request: Any) -> Any:
        return lambda: None

    async def begin(self, request: Any) -> Answer:
        self.is_asked.set()
        await self.may_go_on.wait()
        if self.refusal is not None:
            raise self.refusal
        self.answers.append(Answer())
        return self.answers[-1]


class World:
    """Two gateways on the same books; those of the first go away."""

    def __init__(self, books: Books) -> None:
        books.add_people(ANN)
        books.gateways_are(1, 2)
        keys = IdempotencyKeys(books.store, books.clock)
        self.desk = Desk(keys)
        self.pool = Pool()
        self.first, self.second = (
            KeyedRequests(self.pool, desk, books.clock, hash_key=b"h" * 32, gateway_epoch=epoch)
            for desk, epoch in ((self.desk, 1), (Desk(keys), 2))
        )

    def go_away(self) -> None:
        self.desk.failure = DatabaseAwayError("gone")

    async def come_back(self) -> None:
        self.desk.failure = self.desk.fails_after = None
        assert await self.first.drain(5)

    async def ask(self, gateway: KeyedRequests, key: str) -> bytes:
        answer = await gateway.begin(request_by(ANN), key, b"body")
        if answer.is_first:
            self.pool.answers[-1].may_end.set()
        seen = b""
        while (data := await asyncio.wait_for(answer.next_data(), 5)) is not None:
            seen += data
        await answer.close()
        return seen

    async def refusal(self, gateway: KeyedRequests, key: str) -> PotluckError:
        with pytest.raises(PotluckError) as refused:
            await self.ask(gateway, key)
        return refused.value


@pytest.fixture
def world(monkeypatch) -> Iterator[World]:
    monkeypatch.setattr(last_words, "RETRY_SECONDS", 0)
    with open_books() as books:
        yield World(books)


async def test_a_key_whose_request_was_refused_in_an_outage_is_free_after_it(world):
    world.pool.may_go_on.clear()
    world.pool.refusal = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "Nothing was charged; try again.")
    refused = asyncio.ensure_future(world.refusal(world.first, "k"))
    await world.pool.is_asked.wait()
    world.go_away()
    world.pool.may_go_on.set()
    assert (await refused).code == ErrorCode.COORDINATOR_UNAVAILABLE
    world.pool.refusal = None
    assert (await world.refusal(world.second, "k")).code == ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT, "nobody could tell"
    again = await world.refusal(world.first, "k")
    assert (again.code, again.retry_after_seconds) == (ErrorCode.COORDINATOR_UNAVAILABLE, 2)
    await world.come_back()
    assert await world.ask(world.second, "k") == b"answer"
    assert len(world.pool.answers) == 1


@pytest.mark.parametrize("gateway", ["first", "second"])
async def test_a_claim_that_was_made_and_never_answered_is_given_back(world, gateway):
    world.desk.fails_after = DatabaseAwayError("gone", had_begun=True)
    assert (await world.refusal(world.first, "k")).code == ErrorCode.COORDINATOR_UNAVAILABLE
    await world.come_back()
    assert await world.ask(getattr(world, gateway), "k") == b"answer"
    assert len(world.pool.answers) == 1


@pytest.mark.parametrize("loss", ["failure", "fails_after"])
async def test_an_answer_that_ended_in_an_outage_is_known_everywhere_after_it(world, loss):
    answer = await world.first.begin(request_by(ANN), "k", b"body")
    setattr(world.desk, loss, DatabaseAwayError("gone", had_begun=loss == "fails_after"))
    world.pool.answers[0].may_end.set()
    assert [await answer.next_data(), await answer.next_data()] == [b"answer", None]
    assert await world.ask(world.first, "k") == b"answer", "what is kept here needs no books"
    await world.come_back()
    known = await world.refusal(world.second, "k")
    assert known.code == ErrorCode.IDEMPOTENCY_KEY_SPENT
    assert "charged 7 micro-credits" in known.message
    assert len(world.pool.answers) == 1


async def test_while_the_books_take_no_words_no_key_is_claimed(world):
    world.go_away()
    for _ in range(2):
        await world.refusal(world.first, "k")
        while world.desk.calls.count("release") < 2:
            await asyncio.sleep(0)
    refused = await world.refusal(world.first, "another")
    assert (refused.code, refused.message) == (ErrorCode.COORDINATOR_UNAVAILABLE, last_words.REFUSED)
    assert world.desk.calls.count("claim") == 1
    await world.come_back()
    assert await world.ask(world.first, "another") == b"answer"


async def test_a_keys_next_request_waits_for_the_word_on_its_last_one_and_then_runs(world):
    world.pool.refusal = PotluckError(ErrorCode.QUEUE_FULL)
    world.pool.may_go_on.clear()
    refused = asyncio.ensure_future(world.refusal(world.first, "k"))
    await world.pool.is_asked.wait()
    world.desk.answers.clear()
    world.pool.may_go_on.set()
    assert (await refused).code == ErrorCode.QUEUE_FULL
    world.pool.refusal = None
    again = asyncio.ensure_future(world.ask(world.first, "k"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert world.desk.calls == ["claim", "release"]
    world.desk.answers.set()
    assert await again == b"answer"


async def test_of_slow_books_no_key_is_asked_beyond_a_bound(world, monkeypatch):
    monkeypatch.setattr(last_words, "WAITING_COUNT_MAX", 1)
    answer = await world.first.begin(request_by(ANN), "k", b"body")
    world.desk.answers.clear()
    world.pool.answers[0].may_end.set()
    assert [await answer.next_data(), await answer.next_data()] == [b"answer", None]
    while world.desk.calls != ["claim", "finish"]:
        await asyncio.sleep(0)
    assert (await world.refusal(world.first, "another")).code == ErrorCode.COORDINATOR_UNAVAILABLE
    world.desk.answers.set()
    assert await world.first.drain(5)
    assert await world.ask(world.first, "another") == b"answer"


@pytest.mark.parametrize("failure", [PotluckError(ErrorCode.INTERNAL_ERROR), ValueError("unforeseen")])
async def test_a_word_that_the_books_fail_on_by_itself_is_given_up(world, failure):
    world.desk.failure = failure
    assert (await world.refusal(world.first, "k")).code == ErrorCode.INTERNAL_ERROR
    assert await world.first.drain(5)
    assert world.desk.calls == ["claim", "release"]
    world.desk.failure = None
    assert await world.ask(world.first, "another") == b"answer"


async def test_a_stop_does_not_wait_for_books_that_stay_away(world):
    world.go_away()
    await world.refusal(world.first, "k")
    await world.first.stop()
    assert not await world.first.drain(0)
    await asyncio.sleep(0)
    calls = len(world.desk.calls)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(world.desk.calls) == calls
