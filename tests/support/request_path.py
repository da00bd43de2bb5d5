"""A pool of one node whose every frame the test writes, and requests on their way through it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

from potluck_coordinator.gateway.inference_request import NO_CALLER, InferenceRequest
from potluck_protocol.values import AccountId, Endpoint, RequestId
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import enrol, raw_link

USAGE_EVENT = b'data: {"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}\n\n'
DONE = b"data: [DONE]\n\n"


def token(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


@asynccontextmanager
async def pool(folder, **changes):
    async with running_coordinator(folder, **changes) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            yield coordinator, node


async def request_of(coordinator, **fields):
    accounts = await coordinator.directory.accounts.list_accounts()
    return request_by(accounts[0].account_id, **fields)


def request_by(
    account_id=AccountId("client"),  # noqa: B008 - an id, which nobody changes
    *,
    model_id=TINY,
    stream=True,
    completion_tokens_max=100,
    prompt_tokens_min=1,
    body=b"{}",
    prompt_bytes=20,
    caller=NO_CALLER,
    trusted_only=False,
):
    return InferenceRequest(
        request_id=RequestId("request"),
        account_id=account_id,
        model_id=model_id,
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=body,
        stream=stream,
        include_usage=False,
        prompt_bytes=prompt_bytes,
        completion_tokens_max=completion_tokens_max,
        answer_count=1,
        prompt_count=1,
        prompt_tokens_min=prompt_tokens_min,
        caller=caller,
        trusted_only=trusted_only,
    )


async def begin(coordinator, node, number=0, first=None, **fields):
    """A request on its way, with the attempt that the node got and its head already sent."""
    work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator, **fields)))
    start = await node.next_start(number)
    await node.chunk(start.attempt_id, 0, token("one") if first is None else first)
    return await asyncio.wait_for(work, 5), start


def without_tier(data: bytes) -> bytes:
    """As its engine sent it: the pool has put the tier into the first bytes of an answer."""
    assert b'"service_tier":"default",' in data
    return data.replace(b'"service_tier":"default",', b"", 1)


async def first_of(answer) -> bytes:
    return without_tier(await answer.next_data())


async def read_all(answer) -> bytes:
    """All that is left."""
    data = b""
    while (piece := await asyncio.wait_for(answer.next_data(), 5)) is not None:
        data += piece
    return data


async def settled_balance(coordinator):
    """The operator's balance once nothing is held; the operator also owns the node."""
    account_id = (await coordinator.directory.accounts.list_accounts())[0].account_id
    async with asyncio.timeout(5):
        while (balance := await coordinator.directory.ledger.balance(account_id)).held_micro_credits:
            await asyncio.sleep(0.01)
    assert (await coordinator.directory.ledger.audit()).findings == ()
    return balance
