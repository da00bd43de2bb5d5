"""However clients ask, drop and ask again, and whenever the coordinator dies or its books are away: a key has one run that anybody saw or
paid for, and stays locked only where its gateway died."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.directory.idempotency import IdempotencyKeys
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.idempotency import KeptBounds, WhenGone
from potluck_coordinator.gateway import last_words
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, NodeId
from tests.support.books import Books, open_books
from tests.support.key_desk import Absence, MortalDesk, RunsAtOnce
from tests.support.request_path import request_by

HASH_KEY = b"h" * 32
TURNS = 12
_people = count()


@pytest.fixture(scope="module")
def books() -> Iterator[Books]:
    with open_books() as books, pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_words, "RETRY_SECONDS", 0)
        yield books


class Run:
    """One answer, which the test writes; a piece costs a micro-credit, and is paid when the run is closed."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.node_id = NodeId("n")
        self.usage = None
        self.tier = ServiceTier.FLEX
        self.given: list[bytes] = []
        self.closed = False
        self.charge_micro_credits = 0
        self._next: asyncio.Queue[bytes | PotluckError | None] = asyncio.Queue()

    def write(self, data: bytes | PotluckError | None) -> None:
        self._next.put_nowait(data)

    def end(self) -> None:
        self.write(b"last")
        self.write(None)

    async def next_data(self) -> bytes | None:
        data = await self._next.get()
        if isinstance(data, PotluckError):
            raise data
        if data is not None:
            self.given.append(data)
        return data

    async def close(self) -> None:
        self.closed = True
        self.charge_micro_credits = len(self.given)


class Pool:
    """The request service: what it runs, and whether it takes the next request."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.refuses = False
        self.is_full = False
        """What is announced is refused, before anything of it is in the books."""
        self.announced_count = 0

    def announce(self, request: Any) -> Any:
        if self.is_full:
            raise PotluckError(ErrorCode.RATE_LIMITED)
        self.announced_count += 1
        left = [1]
        return lambda: setattr(self, "announced_count", self.announced_count - (left.pop() if left else 0))

    async def begin(self, request: Any) -> Run:
        await asyncio.sleep(0)
        if self.refuses:
            raise PotluckError(ErrorCode.QUEUE_FULL)
        self.runs.append(Run(request.model_id))
        return self.runs[-1]

    @property
    def open_runs(self) -> list[Run]:
        return [run for run in self.runs if not run.closed]


class World:
    """Clients, a gateway that dies now and then, and the books, which do not."""

    def __init__(self, books: Books, bounds: KeptBounds) -> None:
        self.account = AccountId(f"person-{next(_people)}")
        books.add_people(self.account)
        self._books = books
        self._bounds = bounds
        self._keys = IdempotencyKeys(RunsAtOnce(books), books.clock)  # type: ignore[arg-type]
        self.pool = Pool()
        self.clients: list[tuple[str, bytes, asyncio.Task[bytes]]] = []
        self.epoch = 0
        self.start()

    def start(self) -> None:
        self.epoch += 1
        self._books.gateways_are(self.epoch)
        self.desk = MortalDesk(self._keys)
        self.gateway = KeyedRequests(
            self.pool, self.desk, self._books.clock, hash_key=HASH_KEY, gateway_epoch=self.epoch, bounds=self._bounds
        )

    def locked_keys(self) -> list[Any]:
        """What the books hold to be under way at this gateway."""
        query = f"SELECT * FROM idempotency_key WHERE account_id = '{self.account}' AND state = 'claimed' AND gateway_epoch = {self.epoch}"
        return self._books.rows(query)

    async def die(self) -> None:
        """As SIGKILL would: nobody is told anything, and what was running is settled by nobody here."""
        self.desk.is_lost = True
        for *_, task in self.clients:
            task.cancel()
        for task in tuple(self.gateway._under_way):
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
        await self.turn()
        self.start()

    def ask(self, key: str, body: bytes, when_gone: WhenGone) -> None:
        self.clients.append((key, body, asyncio.ensure_future(self._read(key, body, when_gone))))

    async def _read(self, key: str, body: bytes, when_gone: WhenGone) -> bytes:
        request = request_by(self.account, model_id=key, body=body)  # a run is to know whose it is
        answer = await self.gateway.begin(request, key, body, when_gone)
        seen = b""
        try:
            while (data := await answer.next_data()) is not None:
                seen += data
        finally:
            await answer.close()
        return seen

    async def turn(self, turns: int = TURNS) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)


_STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from("ab"), st.sampled_from([b"1", b"2"]), st.sampled_from(WhenGone)),
    st.tuples(st.just("again"), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.integers(0, 9)),
    st.tuples(st.just("piece"), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("break"), st.integers(0, 9)),
    st.tuples(st.just("pool"), st.sampled_from(["refuses", "is_full"]), st.booleans()),
    st.tuples(st.just("away"), st.sampled_from([None, *Absence])),
    st.tuples(st.just("die")),
)
_LIFE = st.lists(st.tuples(_STEPS, st.sampled_from([0, 1, TURNS])), min_size=3, max_size=40)
"""With how often the loop turns after each."""
_number = count()


async def _carry_out(world: World, step: tuple[Any, ...]) -> None:
    match step:
        case ("ask", key, body, when_gone):
            world.ask(key, body, when_gone)
        case ("again", index) if world.clients:
            key, body, _ = world.clients[index % len(world.clients)]
            world.ask(key, body, WhenGone.FINISH)
        case ("drop", index) if world.clients:
            world.clients[index % len(world.clients)][2].cancel()
        case ("piece", index) if runs := world.pool.open_runs:
            runs[index % len(runs)].write(f"{next(_number)} ".encode())
        case ("end", index) if runs := world.pool.open_runs:
            runs[index % len(runs)].end()
        case ("break", index) if runs := world.pool.open_runs:
            runs[index % len(runs)].write(PotluckError(ErrorCode.NODE_LOST))
        case ("pool", what, is_so):
            setattr(world.pool, what, is_so)
        case ("away", absence):
            world.desk.absence = absence
        case ("die",):
            await world.die()


async def _live(books: Books, life: list[tuple[tuple[Any, ...], int]], bounds: KeptBounds) -> World:
    world = World(books, bounds)
    for step, turns in life:
        await _carry_out(world, step)
        await world.turn(turns)
    for _ in range(3):
        await world.turn()
        for run in world.pool.open_runs:
            run.end()
    await world.turn()
    for *_, task in world.clients:
        task.cancel()
        with suppress(asyncio.CancelledError, PotluckError):
            await task
    await world.gateway.stop()
    world.desk.absence = None
    assert await world.gateway.drain(5)
    return world


def _outcome(task: asyncio.Task[bytes]) -> bytes | str | None:
    if task.cancelled():
        return None
    error = task.exception()
    if error is not None:
        assert isinstance(error, PotluckError), error
        return str(error.code)
    return task.result()


SMALL = KeptBounds(answer_bytes_max=12, account_bytes_max=20, account_count_max=1)


@settings(deadline=None)
@given(life=_LIFE, bounds=st.sampled_from([KeptBounds(), SMALL]))
def test_one_run_and_one_charge(books, life, bounds) -> None:
    world = asyncio.run(_live(books, life, bounds))
    assert world.pool.announced_count == 0, "room stays taken for a request that is over"
    assert not world.locked_keys(), "a key stays locked though nothing runs under it"
    for key in "ab":
        seen_or_paid = [run for run in world.pool.runs if run.key == key and run.given]
        assert len(seen_or_paid) <= 1, "a key was run, and paid for, twice"
        outcomes = [(body, _outcome(task)) for k, body, task in world.clients if k == key]
        whole = {(body, outcome) for body, outcome in outcomes if isinstance(outcome, bytes)}
        assert len(whole) <= 1, "two answers to one key, or one answer to two requests"
        assert {answer for _, answer in whole} <= {b"".join(run.given) for run in seen_or_paid}


@settings(deadline=None)
@given(drops=st.lists(st.integers(0, 49), max_size=60), pieces=st.integers(0, 5))
def test_a_storm_of_fifty_is_one_run_and_all_who_stay_get_its_bytes(books, drops, pieces) -> None:
    async def storm() -> World:
        world = World(books, KeptBounds())
        for _ in range(50):
            world.ask("a", b"1", WhenGone.FINISH)
        for drop in drops[: len(drops) // 2]:
            world.clients[drop][2].cancel()
        await world.turn()
        for index in range(pieces):
            world.pool.runs[0].write(f"piece {index}".encode())
            await world.turn()
        for drop in drops[len(drops) // 2 :]:
            world.clients[drop][2].cancel()
        world.pool.runs[0].end()
        await world.turn()
        world.ask("a", b"1", WhenGone.FINISH)
        await world.turn()
        return world

    world = asyncio.run(storm())
    (run,) = world.pool.runs
    outcomes = {_outcome(task) for _, _, task in world.clients} - {None}
    assert outcomes == {b"".join(run.given)}


@pytest.mark.parametrize("seen", [b"some", b""])
def test_an_answer_that_breaks_off_spends_its_key_if_anybody_saw_of_it(books, seen) -> None:
    async def live() -> World:
        world = World(books, KeptBounds())
        world.ask("a", b"1", WhenGone.FINISH)
        await world.turn()
        if seen:
            world.pool.runs[0].write(seen)
        world.pool.runs[0].write(PotluckError(ErrorCode.NODE_LOST))
        await world.turn()
        world.ask("a", b"1", WhenGone.FINISH)
        await world.turn()
        if not seen:
            world.pool.runs[1].end()
        await world.turn()
        return world

    world = asyncio.run(live())
    assert [_outcome(task) for *_, task in world.clients] == ["node_lost", "node_lost" if seen else b"last"]
    assert len(world.pool.runs) == (1 if seen else 2)


async def test_the_sdks_own_key_gives_the_engine_back_when_its_stream_is_closed(books) -> None:
    world = World(books, KeptBounds())
    for when_gone in WhenGone:
        world.ask(when_gone, b"1", when_gone)
    await world.turn()
    finishing, cancelled = world.pool.runs
    for *_, task in world.clients:
        task.cancel()
    await asyncio.sleep(0.01)
    assert (finishing.closed, cancelled.closed) == (False, True)
    finishing.end()
    await world.turn()
    assert finishing.closed


@pytest.mark.parametrize("turns", [6, 7, 8, TURNS])
def test_a_key_whose_request_was_refused_is_free(books, turns) -> None:
    async def live() -> World:
        world = World(books, KeptBounds())
        world.pool.refuses = True
        world.ask("a", b"1", WhenGone.FINISH)
        await world.turn(turns)
        world.pool.refuses = False
        world.ask("a", b"2", WhenGone.FINISH)
        await world.turn()
        world.pool.runs[0].end()
        await world.turn()
        return world

    world = asyncio.run(live())
    assert [_outcome(task) for *_, task in world.clients] == ["queue_full", b"last"], "even for another request"


async def test_what_is_refused_at_once_costs_the_books_nothing_and_leaves_its_key_as_it_was(books) -> None:
    world = World(books, KeptBounds())
    world.ask("kept", b"1", WhenGone.FINISH)
    await world.turn()
    world.pool.runs[0].end()
    await world.turn()
    calls: list[str] = []

    class Counting:
        def __init__(self, desk: Any) -> None:
            self._desk = desk

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self._desk, name)

    world.gateway._desk = world.gateway._last_words._desk = Counting(world.desk)  # type: ignore[assignment]
    world.pool.is_full = True
    for number in range(20):
        world.ask(f"new {number}", b"1", WhenGone.FINISH)
    world.ask("kept", b"1", WhenGone.FINISH)
    await world.turn()
    outcomes = [_outcome(task) for *_, task in world.clients]
    assert outcomes[1:-1] == ["rate_limited"] * 20
    assert outcomes[-1] == outcomes[0] == b"last", "what is kept here is given before anybody looks whether there is room"
    assert calls == []
    world.pool.is_full = False
    world.ask("new 7", b"another request", WhenGone.FINISH)
    await world.turn()
    world.pool.runs[1].end()
    await world.turn()
    assert _outcome(world.clients[-1][2]) == b"last"
    assert calls == ["claim", "finish"]


def test_after_a_death_a_spent_key_is_refused_and_named(books) -> None:
    async def live() -> World:
        world = World(books, KeptBounds())
        for key in "ab":
            world.ask(key, b"1", WhenGone.FINISH)
        await world.turn()
        world.pool.runs[0].end()
        world.pool.runs[1].write(b"half")
        await world.turn()
        await world.die()
        for key, body in (("a", b"1"), ("b", b"1"), ("a", b"2")):
            world.ask(key, body, WhenGone.FINISH)
        await world.turn()
        return world

    world = asyncio.run(live())
    outcomes = [_outcome(task) for *_, task in world.clients[2:]]
    assert outcomes == ["idempotency_key_spent", "idempotency_key_spent", "idempotency_key_reused"]
    assert len(world.pool.runs) == 2
    finished, interrupted = (world.clients[index][2].exception() for index in (2, 3))
    assert "charged 1 micro-credits as request request" in str(finished)
    assert "begun as request request" in str(interrupted)
