"""A flex request that is too large for what the default tier leaves: who passes it, what is held for it, and from whom."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.tiers import AskedTier, flex_comes_free, flex_fits, flex_lacks_slots
from potluck_coordinator.gateway.free_room import OVERTAKEN_SECONDS_MAX
from potluck_coordinator.gateway.inference_request import Continued
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import ReplicaId
from tests.support import request_queue
from tests.support.judged_pool import HandClock
from tests.support.request_path import request_by
from tests.support.request_queue import MODEL, Front, bodies_at, settle

DEFAULT, FLEX = AskedTier.DEFAULT, AskedTier.FLEX
SMALL_BYTES = 100
HALF_BYTES = 4800
LARGE_BYTES = 8000
WORK = Work(100.0, 100.0)
KV_TOKENS = 4096
"""Of which a half and a large one fit, but not beside what is kept for the default tier."""


@pytest.fixture
async def front(monkeypatch):
    monkeypatch.setattr(request_queue, "SLOTS", 8)
    front = Front(HandClock())
    yield front
    await front.stop()


async def joined(front, name="a", **changes):
    return await front.joined(name, **{"kv_capacity_tokens": KV_TOKENS, "prefill_tokens_per_second": 1e6} | changes)


async def ask(front, tier, prompt_bytes=SMALL_BYTES, **fields):
    """One more request; its number is its body."""
    body = b"%d" % len(front.asked)
    request = request_by(**{"model_id": MODEL, "body": body, "prompt_bytes": prompt_bytes} | fields)
    front.asked.append(asyncio.ensure_future(front.requests.begin(replace(request, asked_tier=tier))))
    await settle()
    return body


async def end(front, body):
    front.asked[int(body)].cancel()
    await settle()


async def later(front, *sessions, seconds=OVERTAKEN_SECONDS_MAX + 0.1):
    """The nodes are heard all the time."""
    front.clock.seconds += seconds
    for session in sessions:
        session.heartbeat_at = front.clock.seconds
    front.look_at_queues()
    await settle()


def held_body(front):
    held = front.requests.queues.line(MODEL).held_for
    return None if held is None else held.request.body


async def overtaken(front):
    """A node, a flex request that runs there, and a larger one that was overtaken long enough, while the default tier is used."""
    session = await joined(front)
    await end(front, await ask(front, DEFAULT))
    half = await ask(front, FLEX, HALF_BYTES)
    large = await ask(front, FLEX, LARGE_BYTES)
    await later(front, session)
    assert (bodies_at(session), held_body(front)) == ([half], large)
    return session, half, large


async def test_a_small_one_that_waits_behind_a_large_one_has_the_slot_that_comes_free(front):
    session = await joined(front, slot_count=2, kv_capacity_tokens=3072)
    half, small = await ask(front, FLEX, 4000, account_id="a"), await ask(front, FLEX, account_id="b")
    await ask(front, FLEX, 7000, account_id="c")
    waits = await ask(front, FLEX, account_id="d")
    assert bodies_at(session) == [half, small]
    await end(front, small)
    assert bodies_at(session) == [half, waits]


async def test_smaller_ones_pass_for_a_while_and_then_the_room_is_held(front):
    session = await joined(front)
    await end(front, await ask(front, DEFAULT))
    half, large = await ask(front, FLEX, HALF_BYTES), await ask(front, FLEX, LARGE_BYTES, account_id="patient")
    passes = await ask(front, FLEX, account_id="other")
    assert bodies_at(session) == [half, passes]
    await later(front, session)
    stays = await ask(front, FLEX, account_id="third")
    assert (bodies_at(session), held_body(front)) == ([half, passes], large)
    await end(front, half)
    assert bodies_at(session) == [passes, large, stays]


async def test_what_is_held_is_given_back_when_its_client_goes(front):
    session, half, large = await overtaken(front)
    stays = await ask(front, FLEX, account_id="other")
    await end(front, large)
    front.look_at_queues()
    await settle()
    assert (bodies_at(session), held_body(front)) == ([half, stays], None)


async def test_the_default_tier_and_answers_that_have_begun_take_what_is_held_for_flex(front):
    session, half, large = await overtaken(front)
    chat = await ask(front, DEFAULT)
    assert bodies_at(session) == [half, chat]
    line, free_room = front.requests.queues.line(MODEL), front.requests.queues._free_room

    def has_room(**changes):
        request = replace(request_by(model_id=MODEL), **changes)
        return free_room.room_for(line, request, frozenset(), front.clock.seconds) is not None

    assert held_body(front) == large
    assert has_room(tier=ServiceTier.FLEX, continued=Continued("Once", 3, 100))
    assert has_room(tier=ServiceTier.DEFAULT)
    assert not has_room(tier=ServiceTier.FLEX)


async def test_nobody_who_waits_in_the_default_tier_waits_for_what_is_held_for_flex(front):
    session = await joined(front, slot_count=2)
    default, half = await ask(front, DEFAULT), await ask(front, FLEX, HALF_BYTES)
    large = await ask(front, FLEX, LARGE_BYTES)
    chat = await ask(front, DEFAULT)
    await later(front, session)
    await end(front, default)
    assert bodies_at(session) == [half, chat]
    await end(front, chat)
    assert held_body(front) in (None, large)
    chat = await ask(front, DEFAULT)
    assert bodies_at(session) == [half, chat]


async def test_one_that_is_too_large_beside_the_default_tier_holds_up_nobody_and_runs_once_nothing_else_does(front):
    session = await joined(front, kv_capacity_tokens=2300)
    chat = await ask(front, DEFAULT)
    large = await ask(front, FLEX, LARGE_BYTES)
    await later(front, session)
    small = await ask(front, FLEX, account_id="other")
    assert (bodies_at(session), held_body(front)) == ([chat, small], None)
    await end(front, chat)
    # Nothing of the default tier runs, and what is kept for it still is.
    await later(front, session)
    another = await ask(front, FLEX, account_id="third")
    assert (bodies_at(session), held_body(front)) == ([small, another], None)
    await end(front, small)
    await end(front, another)
    assert bodies_at(session)[0] == large


async def test_one_that_finds_no_empty_pool_until_its_deadline_is_refused_then():
    front = Front(queue_wait_seconds_max=0.3)
    session = await joined(front, kv_capacity_tokens=2300)
    for _ in range(99):
        # So that nobody's wait is foreseen as too long.
        front.requests.queues.line(MODEL).began(request_by(), WORK, 0.0)
        front.requests.queues.line(MODEL).ended(request_by(), WORK, 0.001, 0.001)
    chat = await ask(front, DEFAULT)
    large = await ask(front, FLEX, LARGE_BYTES)
    small = await ask(front, FLEX, account_id="other")
    assert bodies_at(session) == [chat, small]
    with pytest.raises(PotluckError) as refused:
        await front.asked[int(large)]
    assert refused.value.code is ErrorCode.QUEUE_TIMEOUT
    await front.stop()


async def joined_and_trusted(front, **changes):
    safe = await joined(front, "safe", **changes)
    safe.word = replace(safe.word, trusted=frozenset({ReplicaId("safe/tiny")}))
    front.links.node_changed(safe.node_id)
    return safe


async def test_what_is_held_of_the_flex_share_is_not_taken_at_nodes_where_it_may_not_go(front):
    safe = await joined_and_trusted(front)
    await end(front, await ask(front, DEFAULT, trusted_only=True))
    await ask(front, FLEX, 6200, trusted_only=True)
    free = await joined(front, "free")
    running = [await ask(front, FLEX, 6200) for _ in range(2)]
    large = await ask(front, FLEX, 7000, trusted_only=True, account_id="patient")
    await later(front, safe, free)
    small = await ask(front, FLEX, account_id="other")
    assert (bodies_at(free), held_body(front)) == (running, large)
    await end(front, running[0])
    assert (bodies_at(free), bodies_at(safe)[-1]) == ([running[1], small], large)


async def test_nor_is_it_where_the_cache_is_what_it_lacks(front):
    safe = await joined_and_trusted(front)
    await end(front, await ask(front, DEFAULT, trusted_only=True))
    running = [await ask(front, FLEX, 6200, trusted_only=True) for _ in range(2)]
    large = await ask(front, FLEX, 7000, trusted_only=True, account_id="patient")
    free = await joined(front, "free")
    await later(front, safe, free)
    waits = await ask(front, FLEX, 6200, account_id="other")
    await later(front, safe, free, seconds=1.0)
    assert (bodies_at(free), held_body(front)) == ([], large)
    await end(front, running[0])
    assert (bodies_at(free), bodies_at(safe)) == ([waits], [running[1], large])


async def test_nothing_is_held_for_one_whose_only_node_has_no_slot(front):
    safe = await joined_and_trusted(front, slot_count=1, kv_capacity_tokens=2048)
    await ask(front, DEFAULT, 4000, trusted_only=True)
    free = await joined(front, "free", kv_capacity_tokens=4096)
    running = [await ask(front, FLEX, 6200) for _ in range(2)]
    assert bodies_at(free) == running
    await ask(front, FLEX, 7000, trusted_only=True)
    await later(front, safe, free)
    small = await ask(front, FLEX, account_id="other")
    assert (bodies_at(free), held_body(front)) == ([*running, small], None)


@pytest.mark.parametrize(
    ("slot_count", "in_flight_count", "lacks"),
    [(20, 15, False), (16, 15, False), (15, 15, True), (3, 9, True), (0, 1, True), (0, 0, False)],
)
def test_where_no_flex_request_may_run_however_small(slot_count, in_flight_count, lacks):
    left = Capacity(slot_count, in_flight_count, kv_tokens=10_000)
    assert flex_lacks_slots(left) is lacks
    assert flex_fits(left, 0.0) is not lacks


@pytest.mark.parametrize(
    ("default_use", "wanted_tokens", "comes_free"),
    [
        (Capacity(in_flight_count=1, committed_tokens=1_000), 8_000, True),
        (Capacity(in_flight_count=1, committed_tokens=1_001), 8_000, False),
        (Capacity(in_flight_count=20, committed_tokens=1_000), 10, False),
        (Capacity(), 9_000, True),
        (Capacity(), 9_001, False),  # it runs once nothing does, and for that nobody waits
        (Capacity(in_flight_count=1), 12_000, False),
    ],
)
def test_what_is_held_for_a_flex_request_is_what_flex_itself_has(default_use, wanted_tokens, comes_free):
    left = Capacity(slot_count=20, in_flight_count=15, kv_tokens=10_000, committed_tokens=5_000)
    assert flex_comes_free(left, default_use, wanted_tokens) is comes_free
