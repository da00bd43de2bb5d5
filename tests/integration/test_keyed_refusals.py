"""Refusals of requests that name a key, over the real ports and books: at once, from memory, and the key stays what it was."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from potluck_coordinator.domain.admission import NOBODY
from tests.support.coordinator import TINY, running_coordinator
from tests.support.http_edge import exchange
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, pool, token

CHAT = "/v1/chat/completions"


class CountedDesk:
    """The books' own desk, and what was asked of it."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self._desk, name)


def counted(coordinator) -> CountedDesk:
    keyed = coordinator.gateway._keyed
    keyed._desk = keyed._last_words._desk = CountedDesk(keyed._desk)
    return keyed._desk


def forget_answers(coordinator) -> None:
    """As if they had become too many."""
    keyed = coordinator.gateway._keyed
    for shelf in tuple(keyed._shelves.values()):
        for run in tuple(shelf.runs.values()):
            keyed._let_go(run)


async def ask(coordinator, key: str, text: str = "hello", **fields: Any) -> tuple[int, str]:
    body = {"model": TINY, "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 50, **fields}
    answer = await exchange(
        coordinator.endpoints.http_port,
        "POST",
        CHAT,
        json.dumps(body).encode(),
        key=coordinator.operator_key,
        headers={"idempotency-key": key},
    )
    return answer.status, "" if answer.status == 200 else json.loads(answer.body)["error"]["code"]


async def answer_next(node, number: int = 0) -> None:
    start = await node.next_start(number)
    await node.chunk(start.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 1)


async def test_a_refusal_asks_nothing_of_the_books_and_its_key_serves_later(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        desk = counted(coordinator)
        refused = await asyncio.gather(*(ask(coordinator, f"key {number}") for number in range(50)))
        assert set(refused) == {(503, "no_capacity")}
        assert await ask(coordinator, "key 1", model="none") == (404, "model_not_found")
        assert desk.calls == []
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            asking = asyncio.ensure_future(ask(coordinator, "key 1", "quite another request"))
            await answer_next(node)
            assert (await asking)[0] == 200
        assert desk.calls == ["claim", "finish"]


async def test_refusals_do_not_wait_for_books_that_are_slow(tmp_path):
    """A writer that is busy with others' work, or a flood of claims, keeps nobody from his refusal."""
    async with pool(tmp_path) as (coordinator, node):
        desk, claiming, may_claim = counted(coordinator)._desk, asyncio.Event(), asyncio.Event()
        claim = desk.claim

        async def slow_claim(use: Any) -> Any:
            claiming.set()
            await may_claim.wait()
            return await claim(use)

        desk.claim = slow_claim
        windows = coordinator.gateway.requests.gate.windows
        first = asyncio.ensure_future(ask(coordinator, "first"))
        await asyncio.wait_for(claiming.wait(), 5)
        account_id = (await coordinator.directory.accounts.list_accounts())[0].account_id
        while windows.has_room(account_id):
            windows.count(account_id)
        began = time.monotonic()
        refused = await asyncio.wait_for(asyncio.gather(*(ask(coordinator, f"k{n}", service_tier="default") for n in range(20))), 5)
        assert set(refused) == {(429, "rate_limit_exceeded")}
        assert time.monotonic() - began < 5
        assert not first.done()
        may_claim.set()
        await answer_next(node)
        assert (await first)[0] == 200


async def test_a_key_that_only_the_books_know_is_told_so_once_its_request_would_be_let_in(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = asyncio.ensure_future(ask(coordinator, "k", service_tier="default"))
        await answer_next(node)
        assert (await asking)[0] == 200
        windows = coordinator.gateway.requests.gate.windows
        account_id = (await coordinator.directory.accounts.list_accounts())[0].account_id
        counted = []
        while windows.has_room(account_id):
            counted.append(windows.count(account_id))
        assert await ask(coordinator, "k", service_tier="default") == (200, ""), "its answer is here, and needs no room"
        forget_answers(coordinator)
        assert await ask(coordinator, "k", service_tier="default") == (429, "rate_limit_exceeded")
        for moment in counted:
            windows.take_back(account_id, moment)
        assert await ask(coordinator, "k", service_tier="default") == (409, "idempotency_key_spent")
        assert await ask(coordinator, "k", "another", service_tier="default") == (422, "idempotency_key_reused")
        left = coordinator.gateway.requests.allowance(account_id).remaining_count
        assert left == len(counted), "what was refused for its key counts nowhere"
        assert len(node.starts()) == 1


async def test_while_keys_are_claimed_no_more_are_let_through_than_there_is_room_for(tmp_path):
    async with pool(tmp_path, queue_deadline_seconds=1) as (coordinator, node):
        desk = counted(coordinator)
        asking = [asyncio.ensure_future(ask(coordinator, f"k{number}")) for number in range(100)]
        done, pending = await asyncio.wait(asking, timeout=2)
        slots = node.status.slot_count
        assert len(pending) == slots
        assert {task.result() for task in done} == {(429, "rate_limit_exceeded")}
        assert desk.calls.count("claim") == slots
        assert "release" not in desk.calls
        requests = coordinator.gateway.requests
        assert requests.queues.line(TINY).announced is NOBODY, "what has begun is not announced any more, and is counted once"
        allowance = requests.allowance((await coordinator.directory.accounts.list_accounts())[0].account_id)
        assert allowance.limit_count - allowance.remaining_count == slots
        for number in range(slots):
            await answer_next(node, number)
        assert {status for status, _ in await asyncio.gather(*pending)} == {200}
