"""Room that is held for a request which smaller ones have passed for too long: where, and for whom it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.gateway.free_room import OVERTAKEN_SECONDS_MAX
from potluck_protocol.values import ReplicaId
from tests.support.judged_pool import HandClock
from tests.support.request_path import request_by
from tests.support.request_queue import CONTEXT_TOKENS, MODEL, SLOTS, Front, bodies_at, settle


@pytest.fixture
async def front():
    front = Front(HandClock())
    yield front
    await front.stop()


async def test_room_that_is_held_for_one_whose_client_goes_is_free_at_once(front):
    """Half of a cache that is shared is taken: the one that needs most of it lets smaller ones pass, for a while."""
    session = await front.joined("a", kv_capacity_tokens=3 * CONTEXT_TOKENS // 2, prefill_tokens_per_second=30_000.0)
    front.ask(prompt_bytes=4000)
    await settle()
    large = front.ask(prompt_bytes=7000)
    await settle()
    front.clock.seconds += OVERTAKEN_SECONDS_MAX + 0.1
    front.requests.queues.serve_all()
    assert front.requests.queues.line(MODEL).held_for is not None

    large.cancel()
    await settle()
    front.ask(prompt_bytes=100)
    await settle()
    assert bodies_at(session) == [b"0", b"2"]


async def held_for_room_at_a_trusted_node(front):
    """One that demands trusted nodes, and was overtaken for long enough; and another node, which is free and not trusted."""
    room = {"kv_capacity_tokens": 3 * CONTEXT_TOKENS // 2, "prefill_tokens_per_second": 30_000.0}
    safe = await front.joined("safe", **room)
    safe.word = replace(safe.word, trusted=frozenset({ReplicaId("safe/tiny")}))
    front.links.node_changed(safe.node_id)
    for prompt_bytes in (4000, 7000):
        front.ask(prompt_bytes=prompt_bytes, trusted_only=True)
        await settle()
    free = await front.joined("free", **room)
    front.clock.seconds += OVERTAKEN_SECONDS_MAX + 0.1
    front.requests.queues.serve_all()
    assert front.requests.queues.line(MODEL).held_for is not None
    return safe, free


async def test_room_is_held_only_where_the_one_it_is_held_for_may_go(front):
    safe, free = await held_for_room_at_a_trusted_node(front)
    front.ask(prompt_bytes=100)
    front.ask(prompt_bytes=100, trusted_only=True)
    await settle()
    assert (bodies_at(safe), bodies_at(free)) == ([b"0"], [b"2"])


async def test_nothing_is_held_for_a_suspect_that_waits_for_another_owners_node(front):
    """An engine of one owner died with it; the other owner's node is full, and the first one's is free for everybody else."""
    await front.joined("other", prefill_tokens_per_second=1e6)
    for _ in range(SLOTS):
        front.ask()
    await settle()
    witness = await front.joined("witness", prefill_tokens_per_second=1e6)
    suspect = request_by(model_id=MODEL, body=b"%d" % len(front.asked))
    front.links.suspect_requests = {suspect.fingerprint(front.links.culprits): witness.owner_account_id}
    front.ask()
    await settle()
    front.clock.seconds += OVERTAKEN_SECONDS_MAX + 0.1
    witness.heartbeat_at = front.clock.seconds
    front.requests.queues.serve_all()
    assert front.requests.queues.line(MODEL).held_for is None
    front.ask()
    await settle()
    assert bodies_at(witness) == [b"%d" % (SLOTS + 1)]


async def test_room_is_not_held_where_the_context_is_too_short_for_the_one_it_is_held_for(front):
    room = {"kv_capacity_tokens": 3 * CONTEXT_TOKENS // 2, "prefill_tokens_per_second": 30_000.0}
    await front.joined("long", **room)
    for prompt_bytes in (4000, 7000):
        front.ask(prompt_bytes=prompt_bytes, prompt_tokens_min=1500)
        await settle()
    short_one = await front.joined("short", context_length_tokens=1000)
    front.clock.seconds += OVERTAKEN_SECONDS_MAX + 0.1
    front.requests.queues.serve_all()
    assert front.requests.queues.line(MODEL).held_for is not None
    front.ask()
    await settle()
    assert bodies_at(short_one) == [b"2"]
