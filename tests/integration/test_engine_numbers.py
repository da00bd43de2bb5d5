"""What engines say of themselves reaches the heartbeat: of our own llama.cpp, of one that its owner runs, and of one that means no good."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from potluck_node import attached_servers
from potluck_node.attached_servers import AttachedServers
from potluck_node.domain.attached import AttachedServer
from potluck_node.engine_session import engine_session
from potluck_node.engines import asking
from potluck_node.engines.asking import ask_load
from potluck_node.engines.attach_server import Front
from potluck_node.engines.base import EngineAddress
from potluck_node.engines.metrics import load_from
from potluck_node.engines.metrics_words import EngineLoad
from potluck_node.engines.registry import available_engines
from potluck_node.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import DesiredEngine, EngineState, EngineStatus, ModelFile, ModelId, ReplicaId
from tests.integration.test_node_readings import Told
from tests.support.engines import pinned, running, supervisor_of, wished
from tests.support.hand_started import NAME, hand_started
from tests.support.tiny_gguf import write_tiny_gguf

PROMPT = "The same words as before. " * 8
PATH = "/v1/completions"
ANSWER_TOKENS = 250
SOCKETS_BYTES_MAX = 16 * 1024 * 1024
"""What the kernel takes of an answer that nobody reads."""


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@dataclass
class Watched:
    """An engine at work, and what its node says of it."""

    told: Told
    url: str

    async def ask(self, max_tokens: int) -> None:
        body = {"prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "model": NAME}
        async with aiohttp.ClientSession() as session, session.post(self.url + PATH, data=json.dumps(body)) as response:
            assert response.status == 200, await response.text()

    async def until(self, holds: Callable[[EngineLoad], bool]) -> EngineLoad:
        async with asyncio.timeout(20):
            while True:
                await self.told.readings.read()
                load = self.told.readings.load(ReplicaId("replica-1"))
                if holds(load):
                    return load
                await asyncio.sleep(0.02)

    async def status(self) -> EngineStatus:
        await self.told.readings.read()
        return self.told.status()


@asynccontextmanager
async def watched(folder: Path, wish: DesiredEngine, servers: AttachedServers | None = None) -> AsyncIterator[Watched]:
    supervisor = supervisor_of(folder, SystemClock(), engines=available_engines(Settings(), servers))
    async with running(supervisor) as node, engine_session() as http:
        node.wish(wish)
        await node.until_state(EngineState.READY)
        yield Watched(Told(supervisor, http), node.url())


async def work_for(engine: Watched, ask_count: int, running_count: int) -> EngineLoad:
    """The look at its busiest while so many at a time asked it, as often as that look took: a round is over soon."""
    seen = asyncio.Event()

    async def work() -> None:
        while not seen.is_set():
            await asyncio.gather(*(engine.ask(ANSWER_TOKENS) for _ in range(ask_count)))

    working = asyncio.ensure_future(work())
    try:
        return await engine.until(
            lambda load: load.running_count == running_count and bool(load.kv_used_tokens) and bool(load.waiting_count)
        )
    finally:
        seen.set()
        await working


async def test_our_own_llama_cpp_tells_what_runs_what_waits_what_its_cache_holds_and_what_it_found_there(tmp_path, tiny_gguf):
    wish = wished(pinned(tiny_gguf), kind="llamacpp", slots=2, context=1024)
    async with watched(tmp_path, wish) as engine:
        idle = await engine.until(lambda load: load.running_count == 0)
        assert (idle.waiting_count, idle.kv_used_tokens, idle.kv_capacity_tokens) == (0, 0, 2048)
        assert idle.prefix_hit_tokens == 0, "none is not unknown"
        busy = await work_for(engine, 3, 2)
        assert (busy.waiting_count, busy.kv_capacity_tokens) == (1, 2048)
        assert 0 < busy.kv_used_tokens <= 2048
        status = await engine.status()
        assert (status.kv_used_tokens, status.kv_capacity_tokens, status.waiting_count) == (0, 2048, 0)
        assert status.prefix_hit_tokens > 100, "the prompt came three times, and there are two slots"
        assert status.prefix_queried_tokens > status.prefix_hit_tokens
        assert (await engine.until(lambda load: load.running_count == 0)).generated_tokens >= 3 * ANSWER_TOKENS


def attached_wish() -> DesiredEngine:
    return DesiredEngine(ReplicaId("replica-1"), ModelFile(ModelId("tiny"), f"attach:{NAME}", "", "", 0), "attach", 2, 1024)


async def test_a_llama_cpp_that_its_owner_runs_tells_the_same_where_he_lets_it(tmp_path, tiny_gguf):
    with hand_started(tiny_gguf, key="sk-owners-own", slots=1, metrics=True) as hand:
        (tmp_path / "key").write_text("sk-owners-own")
        servers = AttachedServers([AttachedServer(hand.url, str(tmp_path / "key"))])
        async with servers.watched(lambda: None), watched(tmp_path, attached_wish(), servers) as engine:
            await engine.ask(1)
            busy = await work_for(engine, 2, 1)
            assert (busy.waiting_count, busy.kv_capacity_tokens) == (1, 2048)
            assert 0 < busy.kv_used_tokens <= 2048
            assert busy.prefix_queried_tokens > busy.prefix_hit_tokens > 100
            status = await engine.status()
            assert (status.engine_kind, status.kv_used_tokens, status.kv_capacity_tokens) == ("attach", None, 2048)
            assert status.waiting_count is None, "without a request of ours on its way it is not asked, for it may sleep"


@asynccontextmanager
async def serving(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def door_to(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """What stands for an attached server in the node, and a client of it."""
    async with (
        serving(handle) as url,
        aiohttp.ClientSession(auto_decompress=False) as http,
        Front(http, AttachedServer(url), "m").serve() as door,
    ):
        yield http, door


def software(
    owner: str, pages: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "m", "owned_by": owner}]})
        if request.path not in pages:
            raise web.HTTPNotFound
        return await pages[request.path](request)

    return handle


def text(page: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(text=page)

    return handle


@pytest.mark.parametrize(
    ("owner", "pages", "load"),
    [
        ("vllm", {"/metrics": text("vllm:num_requests_running 3\n")}, EngineLoad(3)),
        ("sglang", {"/metrics": text("vllm:num_requests_running 3\nsglang:num_running_reqs 4\n")}, EngineLoad(4)),
        ("tensorrt_llm", {"/metrics": text("[]"), "/prometheus/metrics": text("trtllm_num_requests_running 5\n")}, EngineLoad(5)),
        ("tabbyAPI", {"/v1/model": text('{"parameters": {"cache_size": 16384}}')}, EngineLoad(kv_capacity_tokens=16_384)),
        (
            "m",
            {
                "/info": text('{"router": "text-generation-router", "max_batch_total_tokens": 8192}'),
                "/metrics": text("tgi_queue_size 7\ntgi_batch_current_max_tokens 9000\n"),
            },
            EngineLoad(None, 7, None, 8192, kv_used_tokens=8192),
        ),
        ("library", {"/api/version": text('{"version": "0.12.6"}'), "/metrics": text("vllm:num_requests_running 3\n")}, EngineLoad()),
        ("nobody", {"/metrics": text("vllm:num_requests_running 3\n")}, EngineLoad()),
        ("llamacpp", {}, EngineLoad()),
    ],
)
async def test_an_attached_server_is_asked_as_what_it_is_recognised_as(owner, pages, load):
    async with door_to(software(owner, pages)) as (http, door):
        assert await ask_load(http, "attach", EngineAddress(door)) == load


async def test_only_who_was_told_the_url_is_told_the_numbers():
    async with door_to(software("vllm", {"/metrics": text("vllm:num_requests_running 3\n")})) as (http, door):
        told = urlsplit(door)
        for path in ("/metrics", f"/{'x' * len(told.path[1:])}/metrics"):
            async with http.get(f"http://{told.netloc}{path}") as response:
                assert response.status == 404
        async with http.get(f"{door}/metrics", headers={"origin": "http://a.page"}) as response:
            assert response.status == 403


async def test_an_attached_llama_cpp_that_nobody_asks_anything_here_is_not_asked_what_would_wake_it():
    """One of before August 2026 wakes at a question for its metrics, and any at one for its slots; `/props` wakes none."""
    asked: list[str] = []
    at_work, done = asyncio.Event(), asyncio.Event()

    def noted(page: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            asked.append(request.path)
            return web.Response(text=page)

        return handle

    async def answer(_: web.Request) -> web.StreamResponse:
        at_work.set()
        await done.wait()
        return web.Response(text="{}")

    pages = {"/metrics": noted("llamacpp:requests_processing 0\n"), "/slots": noted("[]"), "/props": noted("{}"), PATH: answer}
    async with door_to(software("llamacpp", pages)) as (http, door):
        assert await ask_load(http, "attach", EngineAddress(door)) == EngineLoad()
        assert set(asked) == {"/props"}
        asking = asyncio.create_task(http.post(door + PATH, data=b"{}"))
        await asyncio.wait_for(at_work.wait(), 5)
        assert await ask_load(http, "attach", EngineAddress(door)) == EngineLoad(0, kv_used_tokens=0)
        assert "/metrics" in asked
        assert "/slots" not in asked, "what it would say follows from its metrics"
        done.set()
        (await asking).release()
        asked.clear()
        assert await ask_load(http, "attach", EngineAddress(door)) == EngineLoad()
        assert set(asked) == {"/props"}


@asynccontextmanager
async def at_work_on(http: aiohttp.ClientSession, door: str) -> AsyncIterator[None]:
    """A request of ours is on its way there."""
    asking = asyncio.create_task(http.post(door + PATH, data=b"{}"))
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


swallowed: list[int] = []
"""How many bytes were taken of what never ends."""


async def endless(request: web.Request) -> web.StreamResponse:
    """Speaks the truth first, and never stops."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"llamacpp:requests_processing 1\nllamacpp:requests_deferred -4\nllamacpp:tokens_predicted_total NaN\n")
    while True:
        await response.write(b"llamacpp:requests_processing 1\n" * 4096)
        swallowed.append(31 * 4096)


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise web.HTTPNotFound


async def elsewhere(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def packed(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"\x1f\x8b" + bytes(1 << 20), headers={"content-encoding": "gzip"})


@pytest.mark.parametrize(
    ("pages", "load"),
    [
        ({"/metrics": endless}, EngineLoad(1)),
        ({"/metrics": endless, "/props": endless, "/slots": text("[" * 900_000)}, EngineLoad(1)),
        ({"/metrics": text("llamacpp:requests_processing 1\n"), "/props": silent}, EngineLoad(1)),
        ({"/metrics": silent}, EngineLoad()),
        ({"/metrics": elsewhere, "/elsewhere": text("llamacpp:requests_processing 1\n")}, EngineLoad()),
        ({"/metrics": packed}, EngineLoad()),
        ({"/metrics": text(f"llamacpp:requests_processing {'9' * 4000}\nllamacpp:requests_deferred 2\n")}, EngineLoad(None, 2)),
    ],
)
async def test_a_page_that_means_no_good_costs_its_facts_only_and_bounded_memory(pages, load, monkeypatch):
    monkeypatch.setattr("potluck_node.engines.attach_server.BEHIND_DOOR_SECONDS_MAX", 1.0)
    monkeypatch.setattr(attached_servers, "ANSWER_LIMIT_SECONDS", 0.5)
    swallowed.clear()
    async with (
        door_to(software("llamacpp", pages | {PATH: silent})) as (http, door),
        at_work_on(http, door),
        http.get(door + "/metrics") as response,
    ):
        page = await response.read()
    assert (load_from("attach", page.decode()), len(page) < 1000) == (load, True)
    assert sum(swallowed) < 2 * SOCKETS_BYTES_MAX + 3 * asking.METRICS_BYTES_MAX + 2 * attached_servers.ANSWER_BYTES_MAX
