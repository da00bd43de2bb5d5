"""The look at nodes and attempts by the clock: who is asked, what is moved, and who is kept while the coordinator doubts itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.nodes import DOUBT_SECONDS_MAX
from potluck_coordinator.domain.placement import hurdle
from potluck_coordinator.domain.suspicion import Standing
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import GoodbyeReason, Heartbeat, NodeState
from tests.support.judged_pool import JudgedPool


@pytest.fixture
async def pool():
    pool = JudgedPool()
    yield pool
    await pool.links._probing.stop()


async def over_after(pool, relay, seconds_max):
    """How long until the attempt was given up; None: it was not."""
    began_at = pool.clock.seconds
    while pool.clock.seconds - began_at < seconds_max:
        await pool.wait(0.25)
        if relay.over:
            return pool.clock.seconds - began_at
    return None


async def code_of(relay):
    try:
        while await relay.next_data() is not None:
            pass
    except PotluckError as error:
        return error.code
    return None


async def test_an_attempt_on_a_frozen_node_is_moved_within_three_seconds(pool):
    frozen = await pool.add("frozen")
    await pool.add("other")
    relay = pool.start(frozen)
    await pool.wait(2)
    frozen.lively = False
    assert 2.0 <= await over_after(pool, relay, 10) <= 3.0
    assert await code_of(relay) is ErrorCode.NODE_LOST
    assert frozen.asked_count == 1, "it was asked once and not at every look"
    assert pool.links.session(frozen.node_id) is frozen.session, "its lease still stands"


async def test_an_attempt_that_has_nowhere_to_go_waits_for_the_node_longer(pool):
    frozen = await pool.add("frozen")
    await pool.add("other", "another-model")
    relay = pool.start(frozen)
    frozen.lively = False
    await pool.wait(3)
    frozen.lively = True
    await pool.wait(20)
    assert not relay.over
    frozen.lively = False
    assert 8.0 <= await over_after(pool, relay, 20) <= 8.5


async def test_an_engine_that_hangs_behind_a_living_agent_is_left_for_a_free_slot_and_not_for_a_queue(pool):
    hung = await pool.add("hung")
    other = await pool.add("other", slot_count=1)
    busy = pool.start(other)
    relay = pool.start(hung)
    hung.talks = False
    await pool.wait(6)
    assert not relay.over
    pool.end(other, busy)
    assert await over_after(pool, relay, 1) > 0
    assert pool.links.session(hung.node_id) is hung.session


async def test_a_process_that_always_looks_a_little_late_finds_a_hung_engine_all_the_same(pool):
    hung, other = await pool.add("hung"), await pool.add("other")
    relay = pool.start(hung)
    hung.talks = False
    began_at = pool.clock.seconds
    while not relay.over and pool.clock.seconds - began_at < 60:
        pool.clock.seconds += 0.55
        for node in (hung, other):
            pool.beat(node)
        pool.links.tick()
    assert 3.0 <= pool.clock.seconds - began_at <= 3.5 * 0.55 / 0.25


async def test_a_nodes_word_of_anothers_replica_empties_no_cache(pool):
    good, evil = await pool.add("good"), await pool.add("evil")
    body = b'{"model":"tiny","messages":[{"role":"user","content":"' + b"a" * 4000 + b'"}]}'
    read = pool.start(good, body=body, prompt_bytes=len(body))
    request = good.session.requests[read.attempt_id]
    pool.end(good, read)

    def warm():
        return pool.links.measures.warm(request, Work(1000.0, 10.0))

    before = warm()
    assert before.keys() == {good.replica_id}
    own = tuple(evil.session.engines.values())
    for engines in ((replace(own[0], replica_id=good.replica_id), *own), own):
        evil.beat_count += 1
        beat = Heartbeat(0, NodeState.SERVING, engines, 0, number=evil.beat_count)
        pool.links.beat(evil.session, beat, pool.clock.seconds)
    assert warm() == before
    good.beat_count += 1
    pool.links.beat(good.session, Heartbeat(0, NodeState.SERVING, (), 0, number=good.beat_count), pool.clock.seconds)
    assert warm() == {}, "its own word counts"


async def test_a_hung_engine_is_found_within_four_seconds_and_a_slow_one_is_left_in_peace(pool):
    hung = await pool.add("hung")
    await pool.add("other")
    relay = pool.start(hung)
    hung.talks = False
    assert 3.0 <= await over_after(pool, relay, 10) <= 3.5
    slow = pool.start(hung, tokens=2)
    for _ in range(40):
        await pool.wait(2)
        pool.give(hung, slow)
    assert not slow.over


async def test_a_prompt_has_its_time_before_the_first_token(pool):
    node = await pool.add("node")
    await pool.add("other")
    node.talks = False
    short, long = pool.start(node, tokens=0), pool.start(node, tokens=0, prompt_bytes=2000)
    # Both together: 10 s and what the prompts take at 50 tokens a second.
    assert 50 <= await over_after(pool, long, 60) <= 51
    assert short.over


async def test_a_long_prompt_of_a_neighbour_excuses_the_tokens_that_do_not_come(pool):
    node = await pool.add("node")
    await pool.add("other")
    relay = pool.start(node)
    pool.start(node, tokens=0, prompt_bytes=500)
    node.talks = False
    await pool.wait(9)
    assert not relay.over
    assert await over_after(pool, relay, 5) > 0


async def test_a_client_that_does_not_read_is_no_stall(pool):
    node = await pool.add("node")
    await pool.add("other")
    relay = pool.start(node)
    pool.give(node, relay, b"x" * 40_000)
    node.talks = False
    await pool.wait(30)
    assert not relay.over
    # It reads on, and from now on the engine owes tokens again.
    await relay.next_data()
    relay._taken_bytes = relay.received_bytes
    relay._acknowledge_taken()
    assert 3.0 <= await over_after(pool, relay, 10) <= 3.5


async def test_time_in_which_this_process_stood_still_is_no_stall(pool):
    node = await pool.add("node")
    await pool.add("other")
    relay = pool.start(node)
    for seconds in (1.9, 5.0, 14.0):
        pool.clock.seconds += seconds
        pool.links.tick()
        assert not relay.over
        await pool.wait(1)


@pytest.mark.parametrize("seconds", [0.6, 1.9, 2.2])
async def test_a_link_that_broke_is_not_given_up_for_time_in_which_this_process_stood_still(pool, seconds):
    node = await pool.add("node")
    await pool.add("other")
    relay = pool.start(node)
    await pool.wait(0.1)
    pool.links.disconnect(node.session, node.session.outbox, None)
    pool.clock.seconds += seconds
    pool.links.tick()
    assert (pool.links.session(node.node_id), relay.over) == (node.session, False)


@pytest.mark.parametrize("data", [b"", b": ping\n\n"])
async def test_a_node_that_only_keeps_the_stream_alive_is_as_silent_as_one_that_says_nothing(pool, data):
    node = await pool.add("node")
    await pool.add("other")
    relay = pool.start(node, tokens=40)
    node.talks = False
    for _ in range(20):
        if relay.over:
            break
        pool.give(node, relay, data)
        await pool.wait(0.5)
    assert relay.over


async def test_a_node_that_answers_while_this_process_stands_still_is_not_given_up_for_it(pool):
    node = await pool.add("node")
    await pool.add("other")
    relay = pool.start(node)
    node.lively = False
    await pool.wait(0.75)
    assert node.asked_count == 0
    await pool.wait(0.25)
    await pool._live(node)
    assert node.asked_count == 1
    # Its answer lies unread, and so does whatever else it said.
    pool.clock.seconds += 1.9
    pool.links.tick()
    assert not relay.over
    node.lively = True
    await pool.wait(5)
    assert not relay.over


# Many at once.


async def silent_pool(pool, count=10, silent_count=6, model="tiny"):
    nodes = [await pool.add(f"n{number}", model) for number in range(count)]
    relays = [pool.start(node) for node in nodes]
    await pool.wait(3)
    for node in nodes[:silent_count]:
        node.lively = False
    return nodes, relays


async def test_one_silent_node_of_ten_is_evicted_when_its_lease_ends(pool):
    nodes, _ = await silent_pool(pool, silent_count=1)
    await pool.wait(14)
    assert pool.links.session(nodes[0].node_id) is not None
    await pool.wait(2)
    assert pool.links.session(nodes[0].node_id) is None
    assert pool.desk.closed == [(nodes[0].node_id, None)]


async def test_when_more_than_three_tenths_fall_silent_together_nobody_is_evicted_for_ten_minutes(pool):
    nodes, _ = await silent_pool(pool, silent_count=4)
    await pool.wait(DOUBT_SECONDS_MAX - 5)
    assert pool.desk.closed == []
    assert len(pool.links.sessions) == 10
    await pool.wait(10)
    assert sorted(node_id for node_id, _ in pool.desk.closed) == sorted(node.node_id for node in nodes[:4])


async def test_links_that_break_together_and_stay_away_end_no_session(pool):
    nodes, relays = await silent_pool(pool, silent_count=0)
    for node in nodes:
        node.lively = False
        pool.links.disconnect(node.session, node.session.outbox, None)
    await pool.wait(10)
    assert pool.desk.closed == []
    assert not any(relay.over for relay in relays), "a line that comes back within the lease finds them as they were"
    await pool.wait(6)
    assert all(relay.over for relay in relays), "nodes have fenced themselves by now"
    assert len(pool.links.sessions) == 10


async def test_idle_nodes_that_fall_silent_together_are_not_evicted_one_by_one(pool):
    """Their last beats lie up to five seconds apart."""
    nodes = []
    for number in range(10):
        nodes.append(await pool.add(f"n{number}"))
        await pool.wait(0.5)
    for node in nodes[:4]:
        node.lively = False
    await pool.wait(60)
    assert pool.desk.closed == []


async def test_nodes_whose_line_comes_back_are_as_they_were_and_the_last_of_them_has_time(pool):
    nodes, _ = await silent_pool(pool, silent_count=10)
    await pool.wait(60)
    for node in nodes[1:]:
        node.lively = True
    await pool.wait(5)
    nodes[0].lively = True
    await pool.wait(10)
    assert pool.desk.closed == []
    assert not any(node.session.suspect for node in nodes)
    assert not pool.links._judging.in_doubt


async def test_a_blackout_serves_from_the_last_view_where_nobody_else_is_there(pool):
    nodes, _ = await silent_pool(pool, silent_count=10)
    lonely = [node for node in nodes if node.view.ready]
    await pool.wait(10)
    assert all(node.session.suspect for node in nodes)
    assert [node.view.node_suspect for node in lonely] == [False] * 10


async def test_a_blackout_of_some_sends_requests_to_those_that_are_surely_there(pool):
    nodes, relays = await silent_pool(pool, silent_count=6)
    await pool.wait(5)
    assert [node.view.node_suspect for node in nodes] == [True] * 6 + [False] * 4
    assert [relay.over for relay in relays] == [True] * 6 + [False] * 4, "these can go on elsewhere"


async def test_idle_nodes_are_asked_whether_they_are_there_and_get_the_requests_if_they_are(pool):
    nodes = [await pool.add(f"n{number}") for number in range(10)]
    relays = [pool.start(node) for node in nodes[:6]]
    await pool.wait(3)
    for node in nodes[:6]:
        node.lively = False
    await pool.wait(4.5)
    assert all(node.asked_count for node in nodes[6:])
    assert all(relay.over for relay in relays)
    assert [node.view.node_suspect for node in nodes] == [True] * 6 + [False] * 4


async def test_nothing_is_held_against_nodes_while_the_coordinator_doubts_itself(pool):
    nodes, relays = await silent_pool(pool, silent_count=6)
    more = [pool.start(node) for node in nodes[:6]]
    await pool.wait(30)
    assert all(relay.over for relay in [*relays[:6], *more])
    assert {pool.links.suspicions.standing(node.replica_id) for node in nodes} == {Standing.TRUSTED}


async def test_three_of_five_nodes_are_a_blackout(pool):
    await silent_pool(pool, count=5, silent_count=3)
    await pool.wait(20)
    assert pool.desk.closed == []


async def test_two_nodes_are_no_blackout(pool):
    await silent_pool(pool, count=2, silent_count=2)
    await pool.wait(20)
    assert len(pool.desk.closed) == 2


async def test_owners_who_say_goodbye_together_are_believed(pool):
    nodes, _ = await silent_pool(pool, silent_count=0)
    for node in nodes[:6]:
        pool.links.disconnect(node.session, node.session.outbox, GoodbyeReason.STOPPING)
    await pool.wait(1)
    assert len(pool.desk.closed) == 6
    assert not pool.links._judging.in_doubt


async def test_a_drained_replica_gets_nothing_while_another_serves_and_a_slow_one_less(pool):
    slow, other = await pool.add("slow"), await pool.add("other")
    desired = pool.desk.desired
    words = "slow: 12.0 tokens/s, where 80.0 are usual of it"
    pool.links.take_snapshot(
        PoolSnapshot(1, {}, desired, {}, 1, slow_replicas={slow.replica_id: 0.25}, drained_replicas={slow.replica_id: words})
    )
    await pool.wait(0.5)
    assert hurdle(slow.view) == words
    assert slow.view.weight == 0.25
    assert hurdle(other.view) is None
    other.lively = False
    pool.links.disconnect(other.session, other.session.outbox, None)
    await pool.wait(0.25)
    assert hurdle(slow.view) is None, "better slowly than not at all"
    pool.links.take_snapshot(PoolSnapshot(2, {}, desired, {}, 1))
    assert slow.view.weight == 1.0
