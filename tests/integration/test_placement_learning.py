"""What the gateway learns by itself of replicas and their caches, over real links; every frame of the nodes is the test's."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from potluck_coordinator.domain.placement import EXPLORE_SHARE, NEW_SHARE
from potluck_protocol import codec
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import PotluckError
from potluck_protocol.line import LineMeasurement
from potluck_protocol.values import EndReason, EngineState, Heartbeat, NodeState
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import _beat_numbers, enrol, raw_link
from tests.support.request_path import DONE, read_all, request_of, token


class ShiftedClock(SystemClock):
    def __init__(self):
        self.shift_seconds = 0.0

    def monotonic_seconds(self):
        return super().monotonic_seconds() + self.shift_seconds


class Two:
    """A pool of two nodes, whose requests this plays."""

    def __init__(self, coordinator, clock, nodes):
        self.coordinator = coordinator
        self.clock = clock
        self.nodes = nodes
        self.links = coordinator.gateway._links
        self.seen = [0 for _ in nodes]

    async def begin(self, text, *, stream=True):
        """A request on its way: its task, and the node that got it, with the attempt."""
        body = json.dumps({"model": TINY, "messages": [{"role": "user", "content": text}]}).encode()
        request = await request_of(self.coordinator, body=body, stream=stream, prompt_bytes=len(body), completion_tokens_max=20)
        task = asyncio.ensure_future(self.coordinator.gateway.requests.begin(request))
        async with asyncio.timeout(20):
            while True:
                for number, node in enumerate(self.nodes):
                    if len(node.starts()) > self.seen[number]:
                        self.seen[number] += 1
                        return task, number, node.starts()[-1]
                await asyncio.sleep(0.005)

    async def answered(self, text, *, reads=0.0, writes=0.0, prompt_tokens=100, cached=0, tokens=11):
        """Where a request went, which was answered after `reads` seconds, in `writes` more."""
        task, number, start = await self.begin(text)
        node = self.nodes[number]
        self.clock.shift_seconds += reads
        await node.chunk(start.attempt_id, 0, token("one"))
        answer = await asyncio.wait_for(task, 5)
        self.clock.shift_seconds += writes
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        last = b"".join(token("x") for _ in range(tokens - 1)) + b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
        await node.chunk(start.attempt_id, 1, last + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        return number

    def view(self, number):
        session = self.links.session(self.nodes[number].credentials.node_id)
        (view,) = session.replica_views(TINY)
        return view

    async def say(self, number, **changes):
        """A heartbeat, read by the gateway."""
        node = self.nodes[number]
        beat = Heartbeat(1, NodeState.SERVING, (replace(node.status, **changes),), 1 << 40, number=next(_beat_numbers))
        session = self.links.session(node.credentials.node_id)
        before = session.engines
        await node.send(heartbeat=codec.heartbeat_message(beat))
        async with asyncio.timeout(20):
            while session.engines is before:
                await asyncio.sleep(0.005)


@pytest.fixture
async def two(tmp_path):
    async with two_nodes(tmp_path) as pool:
        yield pool


@asynccontextmanager
async def two_nodes(folder):
    clock = ShiftedClock()
    async with running_coordinator(folder, clock) as coordinator:
        # One request in a hundred looks away from caches, and one in ten tries whom nobody knows: not these.
        coordinator.gateway.requests._placing._draw = lambda: random.uniform(max(EXPLORE_SHARE, NEW_SHARE), 1.0)
        credentials = [await enrol(coordinator), await enrol(coordinator)]
        async with raw_link(coordinator, credentials[0]) as first, raw_link(coordinator, credentials[1]) as second:
            for node in (first, second):
                await node.hello(engines=(replace(node.status, prefill_tokens_per_second=100.0, decode_tokens_per_second=5.0),))
            yield Two(coordinator, clock, (first, second))


TEXT = "One of the longer beginnings that a conversation may have, again and again. " * 20


async def test_speeds_are_what_the_gateway_saw_and_the_nodes_word_is_where_that_begins(two):
    assert two.view(0).speeds.prefill_tokens_per_second == 100.0
    assert two.view(0).speeds.decode_seconds(1) == pytest.approx(0.2)
    number = 0
    for turn in range(6):
        number = await two.answered(f"{turn} {TEXT}", reads=2.0, writes=1.0, prompt_tokens=400, tokens=11)
    speeds, other = two.view(number).speeds, two.view(1 - number).speeds
    learned = max((speeds, other), key=lambda each: each.prefill_sample_count)
    assert 130 < learned.prefill_tokens_per_second < 250, "400 tokens in 2 s, less the time of the first token itself"
    assert 0.1 <= learned.decode_seconds(1) < 0.17, "ten tokens in a second"
    assert learned.decode_sample_count == learned.prefill_sample_count > 0


async def test_answers_in_one_piece_at_once_show_together_how_fast_prompts_are_read(two):
    for number in range(2):
        await two.say(number, prefill_tokens_per_second=2000.0)
    asked = [await two.begin(f"{number} {TEXT}"[:300], stream=False) for number in range(4)]  # two slots each
    two.clock.shift_seconds += 0.25
    document = {"choices": [], "usage": {"prompt_tokens": 300, "completion_tokens": 1}}
    for task, number, start in asked:
        node = two.nodes[number]
        await node.chunk(start.attempt_id, 0, json.dumps(document).encode())
        await node.end(start.attempt_id, 1)
        await read_all(await asyncio.wait_for(task, 5))
    count, number = max((sum(number == each for _, number, _ in asked), each) for each in range(2))
    assert 300 / 0.25 < 2000 < count * 300 / 0.25, "one alone says nothing new"
    assert two.view(number).speeds.prefill_tokens_per_second > 2000


async def test_a_conversation_goes_on_where_it_was_read_until_its_engine_begins_anew(two):
    for talk in range(4):
        text = f"{talk} {TEXT}"
        home = await two.answered(text)
        for turn in range(3):
            text += f"And then {turn}? "
            assert await two.answered(text, cached=80) == home
    depth, _ = two.links.measures.prefixes.depth(two.view(home).replica_id, _names(two, text), two.clock.monotonic_seconds())
    assert depth > 5
    await two.say(home, state=EngineState.STARTING)
    await two.say(home)
    assert two.links.measures.prefixes.depth(two.view(home).replica_id, _names(two, text), two.clock.monotonic_seconds())[0] == 0


def _names(two, text):
    body = json.dumps({"model": TINY, "messages": [{"role": "user", "content": text}]}).encode()
    from potluck_coordinator.domain.prefixes import block_names
    from potluck_coordinator.gateway.prompt_text import prompt_text
    from potluck_protocol.values import Endpoint

    return block_names(prompt_text(Endpoint.CHAT_COMPLETIONS, body))


async def test_a_cache_that_turns_out_empty_is_believed_to_hold_less(two):
    await two.answered(TEXT, prompt_tokens=400)
    number = await two.answered("Something else. " * 100, prompt_tokens=400)
    while await two.answered(f"{TEXT} more", prompt_tokens=410, cached=400) != number:
        number = 1 - number
    measures, replica_id = two.links.measures, two.view(number).replica_id
    before = measures._cache(replica_id)
    assert 1024 <= before.capacity_tokens < 1100, "its slots times its context, or what it has shown to hold"
    await two.answered(f"{TEXT} and other things", prompt_tokens=410, cached=0)
    assert measures._cache(replica_id).capacity_tokens < 1024 * 0.9


async def test_what_is_under_way_is_counted_and_what_was_never_read_is_forgotten(two):
    task, number, start = await two.begin(TEXT)
    view = two.view(number)
    assert view.in_flight_count == 1
    assert view.prefill_backlog_tokens > 300
    assert view.committed_tokens > view.prefill_backlog_tokens
    assert view.dispatched_tokens == view.committed_tokens
    await two.say(number)
    assert two.view(number).dispatched_tokens == 0, "its engine knows of it now"
    await two.nodes[number].chunk(start.attempt_id, 0, token("one"))
    answer = await asyncio.wait_for(task, 5)
    assert two.view(number).prefill_backlog_tokens == 0
    assert len(two.links.measures.prefixes) > 0
    await answer.close()
    after = two.view(number)
    assert (after.in_flight_count, after.committed_tokens, after.prefill_backlog_tokens) == (0, 0, 0)


async def test_an_attempt_that_came_to_nothing_leaves_no_trace_in_caches(two):
    task, number, start = await two.begin(TEXT)
    await two.nodes[number].end(start.attempt_id, 0, EndReason.REFUSED)
    while not task.done() and sum(len(node.starts()) for node in two.nodes) < 2:
        await asyncio.sleep(0.005)
    assert two.links.measures.prefixes.depth(two.view(number).replica_id, _names(two, TEXT), 1e9)[0] == 0
    second = two.nodes[1 - number].starts()[-1]
    await two.nodes[1 - number].end(second.attempt_id, 0, EndReason.REFUSED)
    with pytest.raises(PotluckError):
        await asyncio.wait_for(task, 5)
    assert len(two.links.measures.prefixes) == 0


async def test_the_line_and_the_cache_are_the_nodes_word_within_bounds(two):
    node = two.nodes[0]
    line = LineMeasurement(0, round_trip_microseconds=10**9)
    beat = Heartbeat(
        1,
        NodeState.SERVING,
        (replace(node.status, kv_capacity_tokens=900, kv_used_tokens=10**9),),
        1 << 40,
        number=next(_beat_numbers),
        line=line,
    )
    await node.send(heartbeat=codec.heartbeat_message(beat))
    async with asyncio.timeout(20):
        while two.view(0).round_trip_seconds != 2.0:
            await asyncio.sleep(0.005)
    view = two.view(0)
    assert (view.kv_capacity_tokens, view.kv_used_tokens, view.shares_cache) == (900, 900, True)
    assert two.view(1).round_trip_seconds == 0.03
    assert (two.view(1).kv_capacity_tokens, two.view(1).shares_cache) == (1024, False)
