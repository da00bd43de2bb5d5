"""Over a real link and with a real ledger: what a node writes around its answer's text is worth nothing to it."""

from __future__ import annotations

import asyncio
import json

import pytest

from potluck_coordinator.domain.delivered_text import UNSEEN_TOKENS_ALLOWANCE
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import EndReason
from tests.support.request_path import DONE, begin, pool, read_all, request_of, settled_balance, token

PADDING = {"choices": [{"index": 0, "delta": {"content": "!", "pad": "y" * 500}, "pad": "y" * 500}], "pad": "y" * 5000}
CLAIM = {"prompt_tokens": 12, "completion_tokens": 400}


async def test_padding_around_a_streamed_text_costs_nothing(tmp_path):
    padded = b"data: " + json.dumps(PADDING).encode() + b"\n\n" + b'data: {"choices":[{"index":0,"delta":{"content":""}}]}\n\n' * 500
    end = b"data: " + json.dumps({"choices": [], "usage": CLAIM}).encode() + b"\n\n" + DONE
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node, completion_tokens_max=400)
        await node.chunk(start.attempt_id, 1, token("two") + padded + end)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        assert answer.usage.completion_token_count == len("onetwo!") + UNSEEN_TOKENS_ALLOWANCE
        await settled_balance(coordinator)


async def test_padding_around_an_unstreamed_text_costs_nothing(tmp_path):
    choice = {"index": 0, "message": {"role": "assistant", "content": "no", "pad": "y" * 500}, "finish_reason": "stop"}
    document = json.dumps({"choices": [choice], "usage": CLAIM, "pad": " " * 5000}).encode()
    async with pool(tmp_path) as (coordinator, node):
        work = asyncio.ensure_future(
            coordinator.gateway.requests.begin(await request_of(coordinator, stream=False, completion_tokens_max=400))
        )
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, document, "application/json")
        await node.end(start.attempt_id, 1)
        answer = await asyncio.wait_for(work, 5)
        await read_all(answer)
        assert answer.usage.completion_token_count == len("no") + UNSEEN_TOKENS_ALLOWANCE
        await settled_balance(coordinator)


async def test_events_without_text_cost_nothing_where_a_stream_breaks_off(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node, completion_tokens_max=400)
        await node.chunk(start.attempt_id, 1, token("two"))
        async with asyncio.timeout(5):
            received = await answer.next_data()
            while received.count(b"\n\n") < 2:
                received += await answer.next_data()
        await node.chunk(start.attempt_id, 2, b"data: {}\n\n" * 300)
        await node.end(start.attempt_id, 3, EndReason.ENGINE_FAILED)
        with pytest.raises(PotluckError):
            await read_all(answer)
        assert answer.charge_micro_credits == len("onetwo") * 4
        await settled_balance(coordinator)
