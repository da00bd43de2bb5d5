"""The door in front of llama.cpp, with an engine behind it whose every byte is decided here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from potluck_node.engines.llamacpp_front import Front
from tests.support.node_engine import Conversation, directed_engine

PATH = "/v1/chat/completions"
PROGRESS = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}],"prompt_progress":{"total":9,"processed":4}}\n\n'
TEXT = b'data: {"choices":[{"index":0,"finish_reason":null,"delta":{"content":"a \\"prompt_progress\\":{ \xc3\xa9"}}]}\n\n'
END = b'data: {"choices":[{"index":0,"finish_reason":"stop","delta":{}}]}\n\ndata: [DONE]\n\n'
FAILURE = b'error: {"code":503,"message":"no room","type":"unavailable_error"}\n\n'


@asynccontextmanager
async def asked(**body: object) -> AsyncIterator[tuple[Conversation, aiohttp.ClientResponse | None, object]]:
    """One request through the door: what llama.cpp sees of it, and the way to the answer."""
    async with directed_engine() as engine, aiohttp.ClientSession() as session:
        url = await Front(engine.url).serve()
        response = session.post(url + PATH, data=json.dumps(body))
        yield engine, response


async def answer_to(*said: bytes, break_off: bool = False, **body: object) -> tuple[int, bytes, dict[str, object]]:
    """Status and body that a client gets when llama.cpp says this, and what llama.cpp was asked."""
    async with directed_engine() as engine, aiohttp.ClientSession() as session, Front(engine.url) as url:
        import asyncio

        async def client() -> tuple[int, bytes]:
            async with session.post(url + PATH, data=json.dumps(body)) as response:
                return response.status, await response.read()

        asking = asyncio.create_task(client())
        conversation = await engine.next_conversation()
        for piece in said:
            conversation.say(piece)
        conversation.break_off() if break_off else conversation.finish()
        status, content = await asking
        return status, content, json.loads(conversation.body)
