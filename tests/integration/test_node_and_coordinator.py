"""The agent's own link against the real gateway: what a client sees while the link breaks, moves and comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_node import enrolment
from potluck_node.domain.session import Phase
from potluck_node.identity_store import StateFolder
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.connection import Invite, fetch_connection
from potluck_protocol.values import GoodbyeReason, Inventory
from tests.support.coordinator import TINY, Coordinator, running_coordinator
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.node_engine import DirectedEngine, WiredNode, directed_engine, wired_node

HOUR_SECONDS = 3600


class AheadClock(SystemClock):
    """A node whose clock runs seventeen hours ahead: its new certificate is due for renewal at once."""

    def unix_ms(self) -> int:
        return super().unix_ms() + 17 * HOUR_SECONDS * 1000


@dataclass
class Pool:
    coordinator: Coordinator
    proxy: FaultProxy
    engine: DirectedEngine
    node: WiredNode
    first_certificate: bytes

    async def ask(self, words: list[str]) -> None:
        """One streamed request, whose words are collected up to its `[DONE]`. Its head comes with the engine's first bytes."""
        body = {"model": TINY, "stream": True, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
        headers = {"Authorization": f"Bearer {self.coordinator.operator_key}"}
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.coordinator.url}/v1/chat/completions", json=body, headers=headers) as response,
        ):
            assert response.status == 200
            async for line in response.content:
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: "):
                    words += [choice["delta"]["content"].strip() for choice in json.loads(line[6:])["choices"]]
            raise AssertionError(f"no [DONE] after {words}")


@asynccontextmanager
async def pool_of(folder: Path, clock: Clock | None = None) -> AsyncIterator[Pool]:
    async with running_coordinator(folder / "coordinator") as coordinator, fault_proxy(coordinator.endpoints.link_port) as proxy:
        document = await asyncio.to_thread(fetch_connection, coordinator.url)
        token, secret = await coordinator.directory.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 60)
        state = StateFolder(folder / "node")
        invite = Invite(coordinator.url, document.ca_hash, token.token_id, secret)
        identity = await enrolment.join(invite, state, display_name="box", inventory=Inventory(), clock=SystemClock())
        state.write_identity(replace(identity, connection=replace(identity.connection, link_port=proxy.port)))
        first_certificate = state.certificate()
        async with directed_engine() as engine, wired_node(None, folder, engine.url, clock=clock) as node:
            await until(lambda: any(kind.free_count for kind in coordinator.gateway._links.roster().kinds(TINY)), 10)
            yield Pool(coordinator, proxy, engine, node, first_certificate)


def event(number: int) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": f"w{number} "}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


USAGE = b'data: {"id":"c","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":60}}\n\n'


async def until(condition: Callable[[], object], limit_seconds: float) -> None:
    async with asyncio.timeout(limit_seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
async def test_cut_links_cost_the_client_not_one_word(tmp_path: Path, seed: int) -> None:
    async with pool_of(tmp_path) as pool:
        words: list[str] = []
        asking = asyncio.create_task(pool.ask(words))
        talk = await pool.engine.next_conversation()
        for number in range(60):
            talk.say(event(number))
            await asyncio.sleep(0.005)
            if number % 20 == 5 + seed * 3:
                pool.proxy.cut()
                await until(lambda: pool.node.link.session.phase is Phase.SERVING, 2)
        talk.say(USAGE + b"data: [DONE]\n\n")
        talk.finish()
        await asyncio.wait_for(asking, 15)
        assert words == [f"w{number}" for number in range(60)]
        assert pool.proxy.connection_count >= 2
        assert pool.node.link.session.epoch == 1


async def test_a_renewed_certificate_moves_a_live_link_without_a_lost_word(tmp_path: Path) -> None:
    async with pool_of(tmp_path, AheadClock()) as pool:
        first_certificate = pool.first_certificate
        words: list[str] = []
        asking = asyncio.create_task(pool.ask(words))
        talk = await pool.engine.next_conversation()
        for number in range(60):
            talk.say(event(number))
            await asyncio.sleep(0.03)
        talk.say(USAGE + b"data: [DONE]\n\n")
        talk.finish()
        await asyncio.wait_for(asking, 15)
        assert words == [f"w{number}" for number in range(60)]
        assert pool.node.folder.certificate() != first_certificate
        assert pool.proxy.connection_count == 2
        assert not pool.node.task.done()


async def test_a_client_that_hangs_up_frees_the_engine_within_a_second(tmp_path: Path) -> None:
    async with pool_of(tmp_path) as pool:
        words: list[str] = []
        asking = asyncio.create_task(pool.ask(words))
        talk = await pool.engine.next_conversation()
        talk.say(event(0))
        await until(lambda: words, 5)
        asking.cancel()

        def gone() -> bool:
            # Only a write shows the engine that nobody reads.
            talk.say(event(1))
            return talk.gone.is_set()

        await until(gone, 1)


async def test_a_goodbye_takes_the_node_out_at_once(tmp_path: Path) -> None:
    async with pool_of(tmp_path) as pool:
        assert await pool.node.link.say_goodbye(GoodbyeReason.STOPPING)
        await until(lambda: not pool.coordinator.gateway._links.sessions, 2)
