"""Engines that their owner runs already: found, asked, forwarded to, and left running."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from potluck_node import attached_servers
from potluck_node.attached_servers import AttachedServers
from potluck_node.domain.attached import AttachedServer
from potluck_node.engines import attach_server
from potluck_node.engines.attach_server import Front, GoneError, server_with
from potluck_node.engines.registry import available_engines
from potluck_node.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import DesiredEngine, EngineState, FailureKind, ModelFile, ModelId, ReplicaId
from tests.support.engines import children_of, running, supervisor_of
from tests.support.hand_started import NAME, hand_started
from tests.support.node_engine import DirectedEngine, directed_engine
from tests.support.tiny_gguf import write_tiny_gguf

GREEDY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def attached_wish(name: str = NAME, kind: str = "attach") -> DesiredEngine:
    return DesiredEngine(ReplicaId("replica-1"), ModelFile(ModelId("tiny"), f"attach:{name}", "", "", 0), kind, 2, 1024)


async def ask(url: str, body: dict[str, object] | bytes, path: str = PATH) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body)
    async with aiohttp.ClientSession() as session, session.post(url + path, data=data) as response:
        return response.status, await response.read()


def said_by(answer: bytes) -> str:
    return json.loads(answer)["choices"][0]["message"]["content"]


async def test_a_real_engine_is_adopted_asked_and_left_running_and_taken_up_again_after_it_was_away(tmp_path, tiny_gguf):
    with hand_started(tiny_gguf) as hand:
        servers = AttachedServers([AttachedServer(hand.url)])
        async with (
            servers.watched(lambda: None),
            running(supervisor_of(tmp_path, SystemClock(), engines=available_engines(Settings(), servers))) as node,
        ):
            assert servers.model_names == (NAME,)
            assert servers.kinds.startswith("llama.cpp")
            node.wish(attached_wish())
            status = await node.until_state(EngineState.READY)
            assert status.engine_version == servers.kinds
            assert (status.fetched_bytes, status.fetch_total_bytes) == (0, 0)

            code, answer = await ask(node.url(), {**GREEDY, "model": "tiny"})
            assert (code, said_by(answer)) == (200, said_by(json.dumps(hand.ask(PATH, GREEDY)).encode()))
            assert json.loads(answer)["model"] == NAME, "an answer goes on as it is"
            code, streamed = await ask(node.url(), {**GREEDY, "stream": True, "stream_options": {"include_usage": True}})
            assert streamed.endswith(b"data: [DONE]\n\n")
            assert '"completion_tokens":8' in streamed.decode()

            (front,) = children_of(os.getpid())[1:]
            os.kill(front, signal.SIGKILL)
            await node.until_state(EngineState.BACKING_OFF)
            await node.until_state(EngineState.READY)
            assert hand.ask("/v1/models")["data"][0]["id"] == NAME, "ending what stands for it here ends nothing there"

            hand.end()
            failed = await node.until_state(EngineState.BACKING_OFF)
            assert failed.failure_kind is FailureKind.KILLED
            assert "the attached server went away" in failed.failure
            with hand_started(tiny_gguf, port=hand.port) as again:
                await node.until_state(EngineState.READY)
                node.wish()
                await node.until(lambda statuses: not statuses)
                assert again.ask("/v1/models")["data"][0]["id"] == NAME


async def test_a_server_that_asks_for_a_key_gets_the_one_in_its_file_and_no_argument_shows_it(tmp_path, tiny_gguf):
    key_file = tmp_path / "key"
    key_file.write_text("sk-owners-own\n")
    with hand_started(tiny_gguf, key="sk-owners-own") as hand:
        async with AttachedServers([AttachedServer(hand.url)]).watched(lambda: None):
            pass
        servers = AttachedServers([AttachedServer(hand.url, str(key_file))])
        async with (
            servers.watched(lambda: None),
            running(supervisor_of(tmp_path, SystemClock(), engines=available_engines(Settings(), servers))) as node,
        ):
            node.wish(attached_wish())
            await node.until_state(EngineState.READY)
            assert (await ask(node.url(), GREEDY))[0] == 200
            for pid in children_of(os.getpid()):
                if pid != hand.process.pid:
                    assert b"sk-owners-own" not in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.parametrize(("name", "kind"), [(NAME, "llamacpp"), ("", "attach")])
async def test_attached_models_go_with_their_own_kind_of_engine_only(tmp_path, name, kind):
    servers = AttachedServers([AttachedServer("http://127.0.0.1:9")])
    async with running(supervisor_of(tmp_path, SystemClock(), engines=available_engines(Settings(), servers))) as node:
        node.wish(attached_wish(name, kind))
        status = await node.until_state(EngineState.REFUSED)
        assert "attach:" in status.failure


class Listing:
    """Lists models, and nothing more."""

    def __init__(self) -> None:
        self.names = ["m"]
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, request.headers.get("authorization")))
        if request.path != "/v1/models":
            raise web.HTTPNotFound
        return web.json_response({"data": [{"id": name, "owned_by": "vllm"} for name in self.names]})


@asynccontextmanager
async def listing() -> AsyncIterator[Listing]:
    server = Listing()
    application = web.Application()
    application.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def test_a_change_of_models_is_told_and_nothing_else_is(monkeypatch):
    monkeypatch.setattr(attached_servers, "LOOK_SECONDS", 0.02)
    changed = asyncio.Event()
    async with listing() as first, listing() as second:
        second.names = ["n", "m", "two\nlines"]
        servers = AttachedServers([AttachedServer(first.url), AttachedServer(second.url), AttachedServer("http://127.0.0.1:9")])
        async with servers.watched(changed.set):
            assert servers.model_names == ("m", "n"), "known before the first hello"
            assert servers.kinds == "vLLM"
            asked = len(first.asked)
            async with asyncio.timeout(5):
                while len(first.asked) < asked + 3:
                    await asyncio.sleep(0.01)
            assert not changed.is_set()
            assert {path for path, _ in first.asked[asked:]} == {"/v1/models"}, "which software it is, it is asked once"
            second.names.append("o")
            async with asyncio.timeout(5):
                await changed.wait()
            assert servers.model_names == ("m", "n", "o")
        looks = len(first.asked)
        await asyncio.sleep(0.1)
        assert len(first.asked) == looks, "nobody looks any more"


async def test_a_key_is_sent_to_its_own_server_only(tmp_path):
    (tmp_path / "key").write_text("secret-1")
    async with listing() as first, listing() as second:
        servers = AttachedServers([AttachedServer(first.url, str(tmp_path / "key")), AttachedServer(second.url)])
        async with servers.watched(lambda: None):
            assert {key for _, key in first.asked} == {"Bearer secret-1"}
            assert {key for _, key in second.asked} == {None}
    servers = AttachedServers([AttachedServer("http://127.0.0.1:9", str(tmp_path / "no such file"))])
    async with servers.watched(lambda: None):
        assert servers.model_names == ()


async def test_the_first_server_that_lists_the_model_is_waited_for(monkeypatch):
    monkeypatch.setattr(attach_server, "WAIT_LOOK_SECONDS", 0.01)
    async with listing() as first, listing() as second, aiohttp.ClientSession() as http:
        second.names = []
        waiting = asyncio.create_task(server_with(http, [AttachedServer(first.url), AttachedServer(second.url)], "x"))
        async with asyncio.timeout(5):
            while len(second.asked) < 3:
                await asyncio.sleep(0.01)
            second.names = ["x"]
            assert (await waiting).url == second.url
        monkeypatch.setattr(attach_server, "WAIT_LIMIT_SECONDS", 0.0)
        nobody = AttachedServer("http://127.0.0.1:9/secret-path")
        with pytest.raises(GoneError) as caught:
            await server_with(http, [AttachedServer(first.url), nobody], "x")
        place = urlsplit(first.url).netloc
        assert str(caught.value) == (f"no attached server lists the model x: {place} does not list it, 127.0.0.1:9 does not answer")


@asynccontextmanager
async def front_of(url: str, name: str = "theirs") -> AsyncIterator[tuple[Front, str]]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), auto_decompress=False) as http:
        front = Front(http, AttachedServer(url), name)
        async with front.serve() as front_url:
            yield front, front_url


async def said_through(engine: DirectedEngine, url: str, body: dict[str, object] | bytes, said: bytes) -> tuple[int, bytes, bytes]:
    asking = asyncio.create_task(ask(url, body))
    conversation = await engine.next_conversation()
    conversation.say(said)
    conversation.finish()
    return *(await asking), conversation.body


async def test_only_the_models_name_changes_on_the_way_there_and_nothing_on_the_way_back():
    said = b'data: {"model":"theirs"}\n\n: a comment\r\n\r\ndata: \xff\x00 [DONE]\n\n'
    async with directed_engine() as engine, front_of(engine.url) as (_, url):
        status, answer, asked = await said_through(engine, url, {"model": "ours", "top_k": 3, "x": {"model": "y"}}, said)
        assert (status, answer) == (200, said)
        assert json.loads(asked) == {"model": "theirs", "top_k": 3, "x": {"model": "y"}}
        _, _, asked = await said_through(engine, url, {"prompt": "é"}, said)
        assert json.loads(asked) == {"prompt": "é", "model": "theirs"}
        engine.status, engine.content_type = 422, "text/plain"
        for nonsense in (b"no json", b"[1]", b""):
            assert await said_through(engine, url, nonsense, b"what?") == (422, b"what?", nonsense)


async def test_a_hang_up_here_is_a_hang_up_there_at_once():
    async with directed_engine() as engine, front_of(engine.url) as (_, url), aiohttp.ClientSession() as session:
        response = await session.post(url + PATH, data=b'{"stream":true}')
        conversation = await engine.next_conversation()
        conversation.say(b"data: {}\n\n")
        assert await response.content.readline() == b"data: {}\n"
        response.close()
        async with asyncio.timeout(10):
            await conversation.gone.wait()
        asking = asyncio.create_task(session.post(url + PATH, data=b"{}"))
        silent = await engine.next_conversation()
        asking.cancel()
        async with asyncio.timeout(10):
            await silent.gone.wait()


async def test_an_answer_that_breaks_off_there_breaks_off_here():
    async with directed_engine() as engine, front_of(engine.url) as (_, url), aiohttp.ClientSession() as session:
        response = await session.post(url + PATH, data=b"{}")
        conversation = await engine.next_conversation()
        conversation.say(b"data: {}\n\n")
        conversation.break_off()
        with pytest.raises(aiohttp.ClientError):
            await response.read()


async def test_nobody_gets_in_who_was_not_told_the_url_and_nothing_else_is_forwarded():
    async with directed_engine() as engine, front_of(engine.url) as (_, url), aiohttp.ClientSession() as session:
        told = urlsplit(url)
        assert len(told.path) > 24
        for path in (PATH, f"/{'x' * len(told.path[1:])}{PATH}", f"{told.path}/api/pull", f"{told.path}/v1/models"):
            async with session.post(f"http://{told.netloc}{path}", data=b"{}") as response:
                assert response.status == 404
        async with session.post(url + PATH, data=b"{}", headers={"origin": "http://a.page"}) as response:
            assert response.status == 403
        assert engine.conversations.empty()


async def test_a_server_is_gone_when_it_lists_the_model_no_more_and_busy_when_it_only_says_nothing(monkeypatch):
    for name, seconds in (("LOOK_SECONDS", 0.05), ("WAIT_LOOK_SECONDS", 0.01)):
        monkeypatch.setattr(attach_server, name, seconds)
    monkeypatch.setattr(attached_servers, "ANSWER_LIMIT_SECONDS", 0.05)
    async with listing() as server, front_of(server.url, "m") as (front, _):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(front.until_gone(), 0.3)
        server.names = ["another"]
        async with asyncio.timeout(5):
            with pytest.raises(GoneError, match=f"^the attached server went away: {urlsplit(server.url).netloc} serves m no more$"):
                await front.until_gone()
    silent = await asyncio.start_server(lambda *_: asyncio.Event().wait(), "127.0.0.1", 0)
    async with front_of(f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}", "m") as (front, _):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(front.until_gone(), 0.5)
        silent.close()
        async with asyncio.timeout(5):
            with pytest.raises(GoneError):
                await front.until_gone()


async def test_a_request_that_finds_no_server_says_so_and_has_it_looked_for_at_once(monkeypatch):
    monkeypatch.setattr(attach_server, "WAIT_LOOK_SECONDS", 0.01)
    async with front_of("http://127.0.0.1:9") as (front, url):
        gone = asyncio.create_task(front.until_gone())
        status, answer = await ask(url, {})
        assert (status, json.loads(answer)["error"]["message"]) == (502, "the attached server did not answer")
        async with asyncio.timeout(attach_server.LOOK_SECONDS / 2):
            await asyncio.wait({gone})
        assert isinstance(gone.exception(), GoneError)
