"""A key's day and the promise in a real gateway: requests that race, and answers in one piece that nobody waits for."""

from __future__ import annotations

import asyncio
import json

import pytest

from potluck_coordinator.domain.quotas import CONCURRENT_RETRY_SECONDS, NO_USE, KeyDay, KeyQuotas
from potluck_coordinator.domain.tiers import PromiseCount
from potluck_coordinator.gateway.gate import TIER_LIMITS_DEFAULT
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EndReason, KeyPrefix, RequestId
from tests.support.coordinator import TINY
from tests.support.open_pool import ShiftedClock
from tests.support.request_path import read_all
from tests.support.two_owners import CHAT, USER, end, role, text, two_owners, until

KEY = KeyPrefix("kkkkkkkk")
PAST_PROMISE_SECONDS = TIER_LIMITS_DEFAULT.first_token_seconds + 1
DOCUMENT = b'{"choices":[{"index":0,"message":{"content":"hello"}}],"usage":{"prompt_tokens":5,"completion_tokens":1}}'


class Asking:
    """A pool's requests by one key."""

    def __init__(self, pool, **quotas: int) -> None:
        self.pool = pool
        self.gate = pool.coordinator.gateway.requests.gate
        self._caller = Caller(KEY, KeyQuotas(**quotas))
        self._seen: set[str] = set()

    @property
    def use(self):
        return self.gate._uses[KEY]

    def ask(self, **fields) -> asyncio.Task:
        body = {"model": TINY, "messages": [USER], "stream": True, **fields}
        request = parse_request(CHAT, json.dumps(body).encode(), RequestId("request"), self.pool.client, self._caller)
        return asyncio.ensure_future(self.pool.coordinator.gateway.requests.begin(request))

    async def started(self):
        """The next attempt that comes to a node."""
        found = []

        def look() -> bool:
            found[:] = [(node, start) for node in self.pool.nodes for start in node.starts() if start.attempt_id not in self._seen]
            return bool(found)

        await until(look)
        self._seen.add(found[0][1].attempt_id)
        return found[0]

    async def answer(self, word_count: int) -> None:
        node, start = await self.started()
        words = b"".join(text("first", "a") for _ in range(word_count))
        await node.chunk(start.attempt_id, 0, role("first") + words + end("first", 20, word_count))
        await node.end(start.attempt_id, 1)


async def read(asking) -> None:
    answer = await asyncio.wait_for(asking, 5)
    await read_all(answer)
    await answer.close()


async def test_a_key_that_taught_the_pool_short_answers_does_not_pass_its_bound_by_many_long_ones(tmp_path):
    bound = 2_000
    async with two_owners(tmp_path) as pool:
        key = Asking(pool, spend_micro_credits_per_day=bound)
        for _ in range(20):
            asking = key.ask(max_tokens=1)
            await key.answer(1)
            await read(asking)
        spent_before = key.use.spend_micro_credits
        racing = [key.ask() for _ in range(40)]
        await until(lambda: sum(task.done() for task in racing) == 39)
        refused = [task.exception() for task in racing if task.done()]
        assert {(error.code, error.retry_after_seconds) for error in refused} == {(ErrorCode.QUOTA_EXCEEDED, CONCURRENT_RETRY_SECONDS)}
        assert "ask with a smaller `max_tokens`" in refused[0].message
        await key.answer(400)
        await read(next(task for task in racing if not task.done() or task.exception() is None))
        assert key.use.spend_micro_credits == spent_before + 20 + 400 * 4
        assert (key.use.running_count, key.use.pending_micro_credits) == (0, 0)


async def test_a_key_is_told_to_wait_for_what_runs_and_not_for_midnight(tmp_path):
    async with two_owners(tmp_path) as pool:
        key = Asking(pool, tokens_per_day=900)
        first = key.ask(max_tokens=300)
        await key.started()
        with pytest.raises(PotluckError, match="what is running may take") as refused:
            await asyncio.wait_for(key.ask(max_tokens=300), 5)
        assert refused.value.retry_after_seconds == CONCURRENT_RETRY_SECONDS
        first.cancel()
        await asyncio.wait([first])
        again = key.ask(max_tokens=300)
        await key.answer(1)
        await read(again)


async def test_whoever_hangs_up_on_an_answer_in_one_piece_has_used_its_prompt_and_had_its_promise(tmp_path, monkeypatch):
    async with two_owners(tmp_path) as pool:
        key, clock = Asking(pool, tokens_per_day=10_000), ShiftedClock()
        monkeypatch.setattr(pool.coordinator.gateway.requests, "_clock", clock)
        used = [0.0]
        for _ in range(2):
            asking = key.ask(stream=False, max_tokens=100)
            await key.started()
            clock.shift_seconds += PAST_PROMISE_SECONDS
            asking.cancel()
            await asyncio.wait([asking])
            used.append(key.use.token_count)
        assert used[0] < used[1] < used[2]
        assert key.gate.compliance().hour == PromiseCount(2, 2)
        asking = key.ask(stream=False, max_tokens=100)
        node, start = await key.started()
        clock.shift_seconds += PAST_PROMISE_SECONDS
        await node.chunk(start.attempt_id, 0, DOCUMENT)
        await node.end(start.attempt_id, 1)
        await read(asking)
        assert key.gate.compliance().hour == PromiseCount(3, 3), "an engine had begun with it in time"


async def test_a_node_that_would_not_take_an_answer_in_one_piece_has_not_begun_with_it(tmp_path, monkeypatch):
    async with two_owners(tmp_path) as pool:
        key, clock = Asking(pool, tokens_per_day=10_000), ShiftedClock()
        monkeypatch.setattr(pool.coordinator.gateway.requests, "_clock", clock)
        asking = key.ask(stream=False, max_tokens=100)
        node, start = await key.started()
        clock.shift_seconds += PAST_PROMISE_SECONDS
        await node.end(start.attempt_id, 0, EndReason.REFUSED)
        node, start = await key.started()
        await node.chunk(start.attempt_id, 0, DOCUMENT)
        await node.end(start.attempt_id, 1)
        await read(asking)
        assert key.gate.compliance().hour == PromiseCount(1, 0)


async def test_the_day_knows_what_an_answer_came_to_so_far_should_this_gateway_die(tmp_path, monkeypatch):
    async with two_owners(tmp_path) as pool:
        key, told = Asking(pool, tokens_per_day=5_000), NO_USE
        real = pool.coordinator.directory.pool.note_counts

        async def note(counts, known_version, *, gateway_epoch):
            nonlocal told
            told = sum(counts.key_days.values(), told)
            return await real(counts, known_version, gateway_epoch=gateway_epoch)

        monkeypatch.setattr(pool.coordinator.directory.pool, "note_counts", note)
        asking = key.ask(max_tokens=300)
        node, start = await key.started()
        await node.chunk(start.attempt_id, 0, role("first") + b"".join(text("first", "a") for _ in range(200)))
        answer = await asyncio.wait_for(asking, 5)
        set_aside = key.use.pending_tokens
        await asyncio.wait_for(answer.next_data(), 5)
        await until(lambda: told == KeyDay(1, 200.0, 200 * 4))
        assert (key.use.token_count, key.use.pending_tokens) == (200.0, set_aside - 200)
        await node.chunk(start.attempt_id, 1, text("first", "a") + end("first", 20, 190))
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        await answer.close()
        assert (key.use.token_count, key.use.spend_micro_credits) == (20 + 190, 20 + 190 * 4), "its engine's count is the last word"
        assert (key.use.pending_tokens, key.use.pending_micro_credits) == (0.0, 0)
        await until(lambda: told == KeyDay(1, 210.0, 20 + 190 * 4))
