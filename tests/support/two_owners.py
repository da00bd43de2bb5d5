"""Two nodes of different owners, whose every word is the test's, and an answer that goes from one to the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, Endpoint, EndReason, RequestId
from tests.support.coordinator import TINY, Coordinator, running_coordinator
from tests.support.raw_node import RawNode, enrol, raw_link

DONE = b"data: [DONE]\n\n"
PROMPT_TOKENS = 20
CHAT = Endpoint.CHAT_COMPLETIONS
USER = {"role": "user", "content": "Tell me a story, please."}


def event(name: str, fields: dict[str, Any]) -> bytes:
    head = {"id": name, "created": 1, "model": "tiny", "object": "chat.completion.chunk"}
    return b"data: " + json.dumps({**head, **fields}, separators=(",", ":")).encode() + b"\n\n"


def delta(name: str, content: dict[str, Any], finish_reason: str | None = None) -> bytes:
    return event(name, {"choices": [{"index": 0, "delta": content, "finish_reason": finish_reason}]})


def role(name: str) -> bytes:
    return delta(name, {"role": "assistant", "content": None})


def text(name: str, word: str) -> bytes:
    return delta(name, {"content": word})


def end(name: str, prompt: int, completion: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return delta(name, {}, "stop") + event(name, {"choices": [], "usage": usage}) + DONE


@dataclass
class TwoOwners:
    """Nodes of different owners, asked by somebody who owns none."""

    coordinator: Coordinator
    nodes: list[RawNode]
    owners: list[AccountId]
    client: AccountId

    def request(self, *, trusted_only: bool = False, **fields: Any) -> InferenceRequest:
        body = {"model": TINY, "messages": [USER], "stream": True, "max_tokens": 10, **fields}
        return parse_request(CHAT, json.dumps(body).encode(), RequestId("request"), self.client, trusted_only=trusted_only)

    def ask(self, **fields: Any) -> asyncio.Task[Answer]:
        return asyncio.ensure_future(self.coordinator.gateway.requests.begin(self.request(**fields)))

    @property
    def queued_count(self) -> int:
        return self.coordinator.gateway.requests.queues.queued_count(TINY)

    async def started(self, besides: tuple[RawNode, ...] = ()) -> tuple[RawNode, Any]:
        """The node that the request's next attempt comes to, and the attempt."""
        waiting = [asyncio.ensure_future(node.next_start()) for node in self.nodes if node not in besides]
        try:
            done, _ = await asyncio.wait(waiting, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
        assert done, "no attempt came"
        start = done.pop().result()
        return next(node for node in self.nodes if start in node.starts()), start

    async def paid(self) -> tuple[int, list[int]]:
        """What the client paid, and what each owner earned, once nothing is held."""
        ledger = self.coordinator.directory.ledger
        async with asyncio.timeout(5):
            while (balance := await ledger.balance(self.client)).held_micro_credits:
                await asyncio.sleep(0.01)
        assert (await ledger.audit()).findings == ()
        granted = self.coordinator.settings.grant_micro_credits
        return granted - balance.available_micro_credits, [(await ledger.balance(owner)).earned_micro_credits for owner in self.owners]

    def number(self, node: RawNode) -> int:
        return self.nodes.index(node)


@asynccontextmanager
async def two_owners(folder, node_count: int = 2, **changes: Any) -> AsyncIterator[TwoOwners]:
    async with running_coordinator(folder, fee_basis_points=0, **changes) as coordinator, AsyncExitStack() as links:
        accounts = coordinator.directory.accounts
        owners = [(await accounts.create_account(f"owner {number}")).account_id for number in range(node_count)]
        nodes = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator, owner))) for owner in owners]
        for node in nodes:
            await node.hello()
        yield TwoOwners(coordinator, nodes, owners, (await accounts.create_account("client")).account_id)


async def lose_link(_pool: TwoOwners, node: RawNode, _start: Any) -> None:
    node.call.cancel()


async def crash_engine(_pool: TwoOwners, node: RawNode, start: Any) -> None:
    await node.end(start.attempt_id, 3, EndReason.ENGINE_FAILED)


async def hand_back(_pool: TwoOwners, node: RawNode, start: Any) -> None:
    await node.end(start.attempt_id, 3, EndReason.HANDED_BACK)


async def stall(pool: TwoOwners, node: RawNode, start: Any) -> None:
    """As the watch over silent attempts does."""
    session = pool.coordinator.gateway._links.session(node.credentials.node_id)
    session.attempts[start.attempt_id].fail(PotluckError(ErrorCode.NODE_LOST, "The node that was answering fell silent."))


LOSSES: list[Callable[[TwoOwners, RawNode, Any], Awaitable[None]]] = [lose_link, crash_engine, hand_back, stall]


async def begun(pool: TwoOwners, *words: str, **fields: Any) -> tuple[Answer, bytes, RawNode, Any]:
    """An answer of which the client has read so many words."""
    asking = pool.ask(**fields)
    node, start = await pool.started()
    for number, chunk in enumerate([role("first"), *(text("first", word) for word in words)]):
        await node.chunk(start.attempt_id, number, chunk)
    answer = await asyncio.wait_for(asking, 5)
    received = b""
    while received.count(b"\n\n") <= len(words):
        received += await asyncio.wait_for(answer.next_data(), 5) or b""
    return answer, received, node, start


def same(part: bytes) -> Any:
    """An event, whatever the order of its fields."""
    payload = part.removeprefix(b"data: ").strip()
    if payload == b"[DONE]":
        return part.decode().strip()
    fields = json.loads(payload)
    fields.pop("service_tier", None)  # the first event's
    return fields


def usage_of(received: bytes) -> list[dict[str, int]]:
    return [
        fields["usage"] for part in received.split(b"\n\n") if part.startswith(b"data: {") and (fields := json.loads(part[6:])).get("usage")
    ]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)
