"""What an attached server says that is no answer: a redirect, something packed, no end, no token, or nothing just now."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from potluck_node import attached_servers
from potluck_node.attached_servers import AttachedServers
from potluck_node.domain.attached import UNKNOWN, AttachedServer
from potluck_node.engines.asking import ask_load
from potluck_node.engines.base import EngineAddress, EngineProbe
from potluck_node.engines.metrics_words import EngineLoad
from potluck_node.engines.process import TOKEN_BYTES_MAX, ask, has_token
from potluck_node.engines.registry import available_engines
from potluck_node.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import DesiredEngine, Endpoint, EngineState, FailureKind, ModelFile, ModelId, ReplicaId
from tests.integration.test_engine_numbers import door_to, serving, software, text
from tests.support.engines import children_of, running, supervisor_of

ANSWER = b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}'
PROBE = EngineProbe(Endpoint.COMPLETIONS, b"{}")


async def posted(http: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with http.post(url, data=b'{"prompt": "private"}') as response:
        return response.status, json.loads(await response.read())["error"]["message"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_no_redirect_is_followed_with_a_prompt_nor_is_it_an_answer(status, endpoint, capfd):
    came: list[str] = []

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        came.append(request.path)
        return web.Response(body=ANSWER)

    async with serving(elsewhere) as other_url:

        async def redirect(_: web.Request) -> web.StreamResponse:
            return web.Response(status=status, headers={"location": f"{other_url}/steal"})

        async with door_to(redirect) as (http, door):
            told = f"the attached server redirects (HTTP status {status}), which is not followed"
            code, message = await posted(http, door + endpoint.value)
            assert (code, message.partition(";")[0]) == (500, told)
            assert told in capfd.readouterr().err, "the failure of one that gets not ready by it shows these lines"
        async with serving(redirect) as url, aiohttp.ClientSession() as session:
            assert (await ask(session, EngineAddress(url), PROBE, 5))[0] == status
    assert came == []


async def test_what_comes_packed_although_it_was_asked_for_plain_is_no_answer():
    async def packed(request: web.Request) -> web.StreamResponse:
        assert request.headers["accept-encoding"] == "identity"
        return web.Response(body=gzip.compress(ANSWER), headers={"content-encoding": "gzip"})

    async def plain(_: web.Request) -> web.StreamResponse:
        return web.Response(body=ANSWER, headers={"content-encoding": "identity"})

    async with door_to(packed) as (http, door):
        code, message = await posted(http, door + Endpoint.COMPLETIONS.value)
        assert (code, "packs its answers ('gzip')" in message) == (500, True)
    async with door_to(plain) as (http, door), http.post(door + Endpoint.COMPLETIONS.value, data=b"{}") as response:
        assert (response.status, await response.read()) == (200, ANSWER)


async def test_of_a_first_answer_without_an_end_only_so_much_is_read():
    written_bytes, hung_up = 0, asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written_bytes
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b" " * 65536)
                written_bytes += 65536
        finally:
            hung_up.set()

    async with door_to(endless) as (http, door):
        status, answer = await ask(http, EngineAddress(door), PROBE, 60)
        assert (status, len(answer), has_token(answer)) == (200, TOKEN_BYTES_MAX, False)
        await asyncio.wait_for(hung_up.wait(), 10)


@pytest.mark.parametrize(
    "answer", [b'{"usage": {"completion_tokens": 1e999}}', b'{"usage": {"completion_tokens": NaN}}', b"[" * 100_000, b"\xff", b"[]", b""]
)
def test_whatever_a_first_answer_holds_it_has_a_token_or_none(answer):
    assert not has_token(answer)
    assert has_token(ANSWER)


async def test_a_model_for_embeddings_only_is_never_ready_and_its_failure_says_why(tmp_path):
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "this model does not support generate"}}, status=400)

    async with serving(software("library", {Endpoint.COMPLETIONS.value: refuse})) as url:
        servers = AttachedServers([AttachedServer(url)])
        async with running(supervisor_of(tmp_path, SystemClock(), engines=available_engines(Settings(), servers))) as node:
            node.wish(DesiredEngine(ReplicaId("replica-1"), ModelFile(ModelId("tiny"), "attach:m", "", "", 0), "attach", 2, 1024))
            status = await node.until_state(EngineState.BACKING_OFF)
    assert status.failure_kind is FailureKind.NOT_STARTED
    assert status.failure.startswith("the engine's first answer had no token (HTTP status 400)\n")
    assert f"{urlsplit(url).netloc} answers /v1/completions with HTTP status 400; a model is ready once a token came from there" in (
        status.failure
    )


async def test_a_path_that_may_be_secret_is_in_nobodys_arguments(tmp_path):
    async def behind_a_prefix(request: web.Request) -> web.StreamResponse:
        pages = {"/s3cret/v1/models": b'{"data": [{"id": "m"}]}', "/s3cret/v1/completions": ANSWER}
        return web.Response(body=pages[request.path]) if request.path in pages else web.Response(status=404)

    async with serving(behind_a_prefix) as url:
        servers = AttachedServers([AttachedServer(f"{url}/s3cret")])
        async with running(supervisor_of(tmp_path, SystemClock(), engines=available_engines(Settings(), servers))) as node:
            node.wish(DesiredEngine(ReplicaId("replica-1"), ModelFile(ModelId("tiny"), "attach:m", "", "", 0), "attach", 2, 1024))
            await node.until_state(EngineState.READY)
            arguments = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(os.getpid())]
    assert sum(b"attach_server" in words for words in arguments) == 1
    assert not any(b"s3cret" in words for words in arguments)


class Ollama:
    """Too busy at first to say which version it is."""

    def __init__(self) -> None:
        self.is_busy = True
        self.asked_count = 0

    async def version(self, _: web.Request) -> web.StreamResponse:
        self.asked_count += 1
        return web.json_response({"version": "0.12.6"}, status=503 if self.is_busy else 200)


async def test_a_server_too_busy_at_the_first_look_to_say_what_it_is_is_asked_until_it_says_so(monkeypatch):
    monkeypatch.setattr(attached_servers, "LOOK_SECONDS", 0.02)
    ollama = Ollama()
    async with serving(software("library", {"/api/version": ollama.version})) as url:
        servers = AttachedServers([AttachedServer(url)])
        async with servers.watched(lambda: None):
            assert (servers.kinds, servers.model_names) == (UNKNOWN, ("m",))
            ollama.is_busy = False
            async with asyncio.timeout(5):
                while servers.kinds != "Ollama 0.12.6":
                    await asyncio.sleep(0.01)
            asked_count = ollama.asked_count
            await asyncio.sleep(0.1)
            assert ollama.asked_count == asked_count, "and then no more"


async def test_a_server_too_busy_at_first_to_say_what_it_is_tells_its_metrics_later():
    busy = True

    async def info(_: web.Request) -> web.StreamResponse:
        return web.json_response({"router": "text-generation-router"}, status=503 if busy else 200)

    async with door_to(software("m", {"/info": info, "/metrics": text("tgi_queue_size 7\n")})) as (http, door):
        assert await ask_load(http, "attach", EngineAddress(door)) == EngineLoad()
        busy = False
        assert (await ask_load(http, "attach", EngineAddress(door))).waiting_count == 7
