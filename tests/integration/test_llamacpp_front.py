"""The door in front of llama.cpp, with an engine behind it whose every byte is decided here."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

import aiohttp
import pytest

from potluck_node.domain import silence
from potluck_node.engines import llamacpp_front, standstill
from potluck_node.engines.llamacpp_front import Front
from tests.support.node_engine import directed_engine

PATH = "/v1/chat/completions"
PROGRESS = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}],"prompt_progress":{"total":9,"processed":4}}\n\n'
TEXT = b'data: {"choices":[ {"index":0,"finish_reason":null,"delta":{"content":"\\"prompt_progress\\":{ \xc3\xa9"}}]}\n\n'
END = b'data: {"choices":[{"index":0,"finish_reason":"stop","delta":{}}]}\n\n'
RECORD = b'data: {"choices":[],"id":"x","usage":{"completion_tokens":3,"prompt_tokens":9,"total_tokens":12}}\n\n'
DONE = b"data: [DONE]\n\n"
FAILURE = b'error: {"code":503,"message":"no room","type":"unavailable_error"}\n\n'


def never() -> None:
    raise AssertionError("llama.cpp stood still")


async def answer_to(said: bytes, *, break_off: bool = False, **body: object) -> tuple[int, bytes, dict[str, object]]:
    """Status and body that a client gets when llama.cpp says this, and what llama.cpp was asked."""
    async with directed_engine() as engine, aiohttp.ClientSession() as session, Front(engine.url, never).serve() as url:

        async def client() -> tuple[int, bytes]:
            async with session.post(url + PATH, data=json.dumps(body)) as response:
                return response.status, await response.read()

        asking = asyncio.create_task(client())
        conversation = await engine.next_conversation()
        conversation.say(said)
        if break_off:
            conversation.break_off()
        else:
            conversation.finish()
        async with asyncio.timeout(5):
            status, content = await asking
        return status, content, json.loads(conversation.body)


async def test_streamed_answer_passes_byte_for_byte_without_the_progress_before_it():
    status, content, asked = await answer_to(PROGRESS * 3 + TEXT + TEXT + END + RECORD + DONE, stream=True, top_k=3)
    assert (status, content) == (200, TEXT + TEXT + END + RECORD + DONE)
    assert asked == {"stream": True, "top_k": 3, "return_progress": True}


@pytest.mark.parametrize("include_usage", [True, False])
async def test_several_choices_leave_with_one_record_or_none(include_usage):
    other_end = END.replace(b'"index":0', b'"index":1')
    said = b"data: null\n\n" + TEXT + PROGRESS + TEXT + END + RECORD + other_end + RECORD + DONE
    status, content, _ = await answer_to(said, stream=True, n=2, stream_options={"include_usage": include_usage})
    *events, done = content.removesuffix(b"\n\n").split(b"\n\n")
    assert (status, done) == (200, b"data: [DONE]")
    assert b"".join(event + b"\n\n" for event in events[:4]) == TEXT + TEXT + END + other_end
    usage = {"completion_tokens": 6, "prompt_tokens": 9, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 0}}
    records = [{"id": "x", "choices": [], "usage": usage}] if include_usage else []
    assert [json.loads(event[6:]) for event in events[4:]] == records


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": True, "n": 2}, {"stream": False}, {"stream": None}, {}])
async def test_failure_while_the_prompt_is_read_is_told_by_the_status(body):
    status, content, _ = await answer_to(PROGRESS + FAILURE, **body)
    assert (status, json.loads(content)["error"]["message"]) == (503, "no room")
    status, content, _ = await answer_to(PROGRESS, break_off=True, **body)
    assert (status, json.loads(content)["error"]["message"]) == (502, "llama.cpp broke the answer off")


async def test_failure_in_the_middle_reaches_the_client_as_an_event():
    for more in ({}, {"n": 2}):
        status, content, _ = await answer_to(TEXT + FAILURE, stream=True, **more)
        assert (status, content) == (200, TEXT + FAILURE)


async def test_nobody_gets_in_who_was_not_told_the_url():
    async with directed_engine() as engine, aiohttp.ClientSession() as session, Front(engine.url, never).serve() as url:
        told = urlsplit(url)
        assert len(told.path) > 24
        for path in (PATH, f"/{'x' * len(told.path[1:])}{PATH}", f"{told.path}/v1/embeddings"):
            async with session.post(f"http://{told.netloc}{path}", data=b"{}") as response:
                assert response.status == 404
        async with session.post(url + PATH, data=b"{}", headers={"origin": "http://a.page"}) as response:
            assert response.status == 403


@pytest.fixture
def quick_to_doubt(monkeypatch):
    monkeypatch.setattr(silence, "SILENCE_SECONDS_MAX", 0.2)  # and 0.15 for the prompt's few bytes
    monkeypatch.setattr(standstill, "DOUBT_SECONDS", 0.1)
    monkeypatch.setattr(llamacpp_front, "LOOK_SECONDS", 0.02)


@pytest.mark.parametrize("hangs_up", [True, False])
async def test_an_engine_that_stands_still_is_noticed_even_if_nobody_waits_for_it(quick_to_doubt, hangs_up):
    noticed = asyncio.Event()
    async with directed_engine() as engine, aiohttp.ClientSession() as session, Front(engine.url, noticed.set).serve() as url:
        asking = asyncio.create_task(session.post(url + PATH, data=b'{"stream":true}'))
        conversation = await engine.next_conversation()
        conversation.say(PROGRESS + TEXT)
        (await asking).close() if hangs_up else None
        if hangs_up:
            # The door then asks a question of its own, which finds no answer either.
            assert json.loads((await engine.next_conversation()).body)["max_tokens"] == 1
        async with asyncio.timeout(5):
            await noticed.wait()


@pytest.mark.parametrize("body", [b'{"stream":true}', b'{"stream":true,"n":2}', b"{}"])
@pytest.mark.parametrize("said", [PROGRESS, PROGRESS + TEXT])
async def test_an_engine_that_only_keeps_its_streams_alive_stands_still(quick_to_doubt, body, said):
    noticed = asyncio.Event()
    async with directed_engine() as engine, aiohttp.ClientSession() as session, Front(engine.url, noticed.set).serve() as url:
        asking = asyncio.create_task(session.post(url + PATH, data=body))
        conversation = await engine.next_conversation()
        conversation.say(said)
        async with asyncio.timeout(2):
            while not noticed.is_set():
                conversation.say(b":\n\n")
                await asyncio.sleep(0.05)
        asking.cancel()


async def test_a_keep_alive_before_the_first_token_is_not_the_first_event():
    for more, said in (({"stream": True}, TEXT + END + DONE), ({"stream": True, "n": 2}, TEXT + END + DONE)):
        assert (await answer_to(b":\n\n" + PROGRESS + b":\n\n" + said, **more))[:2] == (200, said)
    status, content, _ = await answer_to(b":\n\n" + PROGRESS + FAILURE, stream=True)
    assert (status, json.loads(content)["error"]["message"]) == (503, "no room")


async def test_an_engine_that_answers_after_a_hang_up_is_left_in_peace(quick_to_doubt):
    async with directed_engine() as engine, aiohttp.ClientSession() as session, Front(engine.url, never).serve() as url:
        asking = asyncio.create_task(session.post(url + PATH, data=b'{"stream":true}'))
        (await engine.next_conversation()).say(TEXT)
        (await asking).close()
        question = await engine.next_conversation()
        question.say(b"{}")
        question.finish()
        # Longer than a standstill; nobody listens, so nothing is expected of the engine.
        await asyncio.sleep(0.6)
        assert engine.conversations.empty()
