"""The scripted engine keeps to its script, to OpenAI's shapes, and to its faults."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import aiohttp
import pytest

from potluck_node.domain.failures import diagnose
from potluck_node.engines.asking import ask_load
from potluck_node.engines.base import EngineAddress
from potluck_node.engines.batch_model import CostModel
from potluck_node.engines.script import Script, read_script
from potluck_node.engines.scripted_server import ScriptedServer, serving
from potluck_protocol.values import FailureKind

PROMPT = {"messages": [{"role": "user", "content": "one two three"}]}
SCRIPT = Script(tokens=("a", "b", "c", "d"))


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(SCRIPT, "tiny", context_length_tokens=100, slot_count=1)
    async with serving(server) as server.url:
        yield server


@pytest.fixture
async def http(server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


async def post(http, body, path="/v1/chat/completions"):
    async with http.post(path, data=body if isinstance(body, bytes) else json.dumps(body)) as response:
        return response.status, await response.read()


def events_of(streamed: bytes) -> list[dict]:
    assert streamed.endswith(b"data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith(b"data: {")]


async def test_whole_and_streamed_chat(http):
    status, body = await post(http, PROMPT)
    answer = json.loads(body)
    assert (status, answer["object"]) == (200, "chat.completion")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "abcd"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}}

    status, body = await post(http, PROMPT | {"stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}})
    events = events_of(body)
    assert "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"]) == "ab"
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "length"]
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]) == ([], 2)
    assert "usage" not in events_of((await post(http, PROMPT | {"stream": True}))[1])[-1]


async def test_completions_and_embeddings(http):
    status, body = await post(http, {"prompt": "one two", "stream": True}, "/v1/completions")
    assert (status, "".join(event["choices"][0]["text"] for event in events_of(body))) == (200, "abcd")
    status, body = await post(http, {"input": ["one", "two three"]}, "/v1/embeddings")
    answer = json.loads(body)
    assert (status, len(answer["data"]), len(answer["data"][0]["embedding"])) == (200, 2, 8)
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "error_type"),
    [
        (b"{", "invalid_request_error"),
        (b"[]", "invalid_request_error"),
        ({"messages": "x"}, "invalid_request_error"),
        (PROMPT | {"max_tokens": "2"}, "invalid_request_error"),
        (PROMPT | {"scripted": {"unknown": 1}}, "invalid_request_error"),
        (PROMPT | {"scripted": {"ttft_ms": -1}}, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "word " * 100}]}, "exceed_context_size_error"),
    ],
)
async def test_bad_requests_have_openai_errors(http, body, error_type):
    status, answer = await post(http, body)
    assert (status, json.loads(answer)["error"]["type"]) == (400, error_type)


async def test_faults(http):
    status, body = await post(http, PROMPT | {"scripted": {"fail_status": 503}})
    assert (status, json.loads(body)["error"]["type"]) == (503, "server_error")

    async with http.post("/v1/chat/completions", json=PROMPT | {"stream": True, "scripted": {"break_after_tokens": 2}}) as response:
        received = b""

        async def read() -> None:
            nonlocal received
            while piece := await response.content.readany():
                received += piece

        with pytest.raises(aiohttp.ClientPayloadError):
            await read()
    assert received.count(b'"content": "') == 2
    assert b"[DONE]" not in received


async def test_hang_up_frees_the_only_slot(http, server):
    for stream in (False, True):
        hanging = PROMPT | {"stream": stream, "scripted": {"hang_after_tokens": 0}}
        asking = asyncio.create_task(post(http, hanging))
        async with asyncio.timeout(5):
            while not server.counts["running"]:
                await asyncio.sleep(0.01)
        asking.cancel()
        async with asyncio.timeout(10):
            assert (await post(http, PROMPT))[0] == 200
    assert server.counts["cancelled"] == 2


async def test_it_goes_on_behind_the_beginning_of_its_own_answer(http):
    begun = {"messages": [*PROMPT["messages"], {"role": "assistant", "content": "abc"}]}
    answer = json.loads((await post(http, begun))[1])
    assert answer["choices"][0]["message"]["content"] == "d"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3 + 3, 1)
    for content in ("abcd", "another text"):
        answer = json.loads((await post(http, {"messages": [*PROMPT["messages"], {"role": "assistant", "content": content}]}))[1])
        assert answer["choices"][0]["message"]["content"] == ("" if content == "abcd" else "abcd")


async def test_pace(http):
    started_at = asyncio.get_running_loop().time()
    await post(http, PROMPT | {"stream": True, "scripted": {"ttft_ms": 100, "inter_token_ms": 20, "token_count": 6}})
    assert 0.19 < asyncio.get_running_loop().time() - started_at < 2.0, "100 ms to the first token and five steps of 20 ms"


async def test_stamped_tokens_say_their_number_and_when_they_left(http):
    asked = PROMPT | {"stream": True, "scripted": {"stamped": True, "token_count": 3}}
    before = time.monotonic_ns()
    text = "".join(choice["delta"].get("content") or "" for event in events_of((await post(http, asked))[1]) for choice in event["choices"])
    stamps = [token.split(":") for token in text.split()]
    assert [number for number, _ in stamps] == ["0", "1", "2"]
    assert before < int(stamps[0][1]) <= int(stamps[2][1]) < time.monotonic_ns()

    # It goes on behind what another engine stamped, and begins anew where that is not the beginning.
    for said, numbers in ((" 0:17 1:18", ["2"]), (" 0:17 1:18 2:19", []), (" 1:17", ["0", "1", "2"])):
        begun = asked | {"stream": False, "messages": [*PROMPT["messages"], {"role": "assistant", "content": said}]}
        content = json.loads((await post(http, begun))[1])["choices"][0]["message"]["content"]
        assert [token.split(":")[0] for token in content.split()] == numbers


async def test_prompts_of_stamped_answers_are_counted_by_their_length(http):
    asked = {"messages": [{"role": "user", "content": "p" * 200}], "scripted": {"stamped": True}}
    assert json.loads((await post(http, asked))[1])["usage"]["prompt_tokens"] == 50


async def test_the_prompt_may_name_the_pace(http):
    started_at = time.monotonic()
    await post(http, {"messages": [{"role": "user", "content": "at 30"}], "scripted": {"pace_in_prompt": True}})
    assert 0.085 < time.monotonic() - started_at < 2.0, "three steps of 30 ms"


async def _said(server, sent: bytes, limit_bytes: int = 2**16) -> bytes:
    """What comes until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    writer.write(sent)
    async with asyncio.timeout(5):
        received = await reader.read(limit_bytes)
        while piece := await reader.read(limit_bytes):
            received += piece
    writer.close()
    return received


async def test_requests_of_one_connection_are_answered_one_after_the_other(server):
    body = json.dumps(PROMPT).encode()
    ask = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n" % len(body)
    received = await _said(server, ask + b"\r\n" + body + b"GET /health HTTP/1.1\r\n\r\n" + ask + b"Connection: close\r\n\r\n" + body)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.index(b'"abcd"') < received.index(b'"ok"') < received.rindex(b'"abcd"')


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.0\r\n\r\n", b"nonsense\r\n\r\n", b"x" * (2**16 + 1)])
async def test_it_hangs_up_where_it_should(server, sent):
    received = await _said(server, sent)
    assert received.endswith(b'{"status": "ok"}') if sent.startswith(b"GET") else received == b""


async def test_what_is_not_there_is_not_found(http):
    for method, path in (("GET", "/v1/chat/completions"), ("POST", "/health"), ("GET", "/server_info")):
        async with http.request(method, path) as response:
            assert response.status == 404


async def test_a_client_that_does_not_read_is_waited_for(server):
    body = json.dumps(PROMPT | {"stream": True, "max_tokens": 10**6, "scripted": {"token_count": 10**6}}).encode()
    server._context_length_tokens = 10**7
    _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]), limit=2**10)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    said = -1
    async with asyncio.timeout(10):
        while server.counts["tokens"] == 0 or server.counts["tokens"] != said:
            said = server.counts["tokens"]
            await asyncio.sleep(0.2)
        assert said < 10**5
        writer.close()
        while server.counts["running"]:
            await asyncio.sleep(0.01)


def test_script_file(tmp_path):
    path = tmp_path / "script.json"
    path.write_text('{"tokens": ["x"], "token_count": 3}')
    assert read_script(path) == Script(tokens=("x",), token_count=3)
    for wrong in ("[]", "{", '{"tokens": []}', '{"tokens": [1]}', '{"nonsense": 1}', '{"ttft_ms": "1"}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"."):
            read_script(path)


COST = CostModel(prefill_tokens_per_second=10_000, step_ms=10, step_ms_per_request=0, kv_capacity_tokens=200, kv_overcommit_max=1.2)


async def test_with_a_cost_it_batches_and_tells_what_it_holds():
    server = ScriptedServer(Script(tokens=("a",), token_count=50, cost=COST), "tiny", context_length_tokens=100, slot_count=1)
    async with serving(server) as url, aiohttp.ClientSession(url) as http:
        asking = [asyncio.create_task(post(http, {"prompt": "one " * 60, "max_tokens": 20}, "/v1/completions")) for _ in range(3)]
        async with asyncio.timeout(5):
            while (load := await ask_load(http, "scripted", EngineAddress(url))).running_count != 2 or load.waiting_count != 1:
                await asyncio.sleep(0.01)
        assert load.kv_capacity_tokens == 200
        assert load.kv_used_tokens is not None
        assert 120 <= load.kv_used_tokens <= 160
        for answer in await asyncio.gather(*asking):
            assert answer[0] == 200
            assert json.loads(answer[1])["choices"][0]["text"] == "a" * 20
        # Hung up in the middle, it is forgotten.
        asking = [asyncio.create_task(post(http, PROMPT | {"stream": True}))]
        async with asyncio.timeout(5):
            while (await ask_load(http, "scripted", EngineAddress(url))).running_count != 1:
                await asyncio.sleep(0.01)
            asking[0].cancel()
            while (await ask_load(http, "scripted", EngineAddress(url))).kv_used_tokens != 0:
                await asyncio.sleep(0.01)


async def test_over_admitted_it_dies_as_a_real_one_does(tmp_path):
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"token_count": 90, "cost": asdict(COST)}))
    command = [sys.executable, "-m", "potluck_node.engines.scripted_server", "--model", str(script)]
    command += ["--alias", "tiny", "--context", "100", "--slots", "1"]
    engine = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        url = json.loads(await engine.stdout.readline())["url"]
        async with aiohttp.ClientSession(url) as http:
            asking = [asyncio.create_task(post(http, {"prompt": "one two"}, "/v1/completions")) for _ in range(20)]
            failures = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(failure, aiohttp.ClientError) for failure in failures)
        _, errors = await asyncio.wait_for(engine.communicate(), 5)
        found = diagnose("ended with status 1", errors.decode().splitlines(), served=True)
        assert (engine.returncode, found.kind) == (1, FailureKind.OUT_OF_MEMORY)
    finally:
        if engine.returncode is None:
            engine.kill()
            await engine.wait()


def test_a_cache_that_holds_no_whole_request_starts_no_server():
    with pytest.raises(ValueError, match="kv_capacity_tokens"):
        ScriptedServer(Script(cost=COST), "tiny", context_length_tokens=200, slot_count=1)
