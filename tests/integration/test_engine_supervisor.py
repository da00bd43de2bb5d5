"""Real engine processes under the supervisor: ready, killed, refused, orphaned, gone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from potluck_node.domain.plan import LocalLimits
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import Endpoint, EngineState, FailureKind, ModelId
from tests.support.engines import MovedClock, children_of, pinned, running, script_file, supervisor_of, wished
from tests.support.tiny_gguf import write_tiny_gguf

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


async def ask(url: str, body: dict[str, object], path: str = Endpoint.CHAT_COMPLETIONS.value) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.post(url + path, data=json.dumps(body)) as response:
        return response.status, await response.read()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def until_gone(pid: int, limit_seconds: float = 10.0) -> None:
    async with asyncio.timeout(limit_seconds):
        while not gone(pid):
            await asyncio.sleep(0.02)


async def test_llamacpp_is_ready_and_answers_whole_and_streamed(tmp_path, tiny_gguf):
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(pinned(tiny_gguf), kind="llamacpp", slots=2, context=256))
        status = await node.until_state(EngineState.READY)
        assert status.endpoints == (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS)
        assert status.engine_version.startswith("xllamacpp ")
        url = node.url()

        code, whole = await ask(url, CHAT)
        answer = json.loads(whole)
        assert (code, answer["object"], answer["model"]) == (200, "chat.completion", "tiny")
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["finish_reason"] == "length"

        code, streamed = await ask(url, CHAT | {"stream": True, "stream_options": {"include_usage": True}})
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith(b"data: {")]
        assert (code, events[-1]["usage"]["completion_tokens"]) == (200, 8)
        assert streamed.endswith(b"data: [DONE]\n\n")

        greedy = CHAT | {"temperature": 0}
        first = json.loads((await ask(url, greedy))[1])["choices"][0]["message"]["content"]
        streamed = (await ask(url, greedy | {"stream": True}))[1]
        parts = [
            json.loads(line[6:])["choices"][0]["delta"].get("content") for line in streamed.splitlines() if line.startswith(b"data: {")
        ]
        assert "".join(part for part in parts if part) == first, "folded and streamed answers are the same text"

        code, text = await ask(url, {"prompt": "a b", "max_tokens": 3, "ignore_eos": True}, Endpoint.COMPLETIONS.value)
        assert (code, json.loads(text)["usage"]["completion_tokens"]) == (200, 3)


async def test_llamacpp_counts_every_answer_and_every_prompt_once_whole_and_streamed(tmp_path, tiny_gguf):
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(pinned(tiny_gguf), kind="llamacpp", slots=4, context=256))
        await node.until_state(EngineState.READY)
        async with openai.AsyncOpenAI(base_url=node.url() + "/v1", api_key="none", max_retries=0) as client:
            chat = partial(client.chat.completions.create, messages=CHAT["messages"])
            text = client.completions.create
            for create, more, answer_count, prompt_tokens in (
                *((chat, {"n": count}, count, 57) for count in (1, 2, 3, 4)),
                *((text, {"prompt": "a b", "n": count}, count, 5) for count in (1, 2, 3, 4)),
                (text, {"prompt": ["a b", "a b c"]}, 2, 5 + 7),
                (text, {"prompt": ["a b", "a b c"], "n": 2}, 4, 5 + 7),
                (text, {"prompt": ["a", "b", "c", "d", "e", "f"]}, 6, 6 * 3),
            ):
                await counted_alike(partial(create, **more), answer_count, prompt_tokens)


async def counted_alike(create: Callable[..., Any], answer_count: int, prompt_tokens: int) -> None:
    """The same request, whole and streamed, with and without asking for usage."""
    create = partial(create, model="tiny", max_tokens=5, seed=1, extra_body={"ignore_eos": True})
    whole = await create()
    assert [choice.index for choice in whole.choices] == list(range(answer_count))
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (5 * answer_count, prompt_tokens)
    assert whole.usage.total_tokens == whole.usage.completion_tokens + whole.usage.prompt_tokens
    chunks = [chunk async for chunk in await create(stream=True, stream_options={"include_usage": True})]
    usage = chunks[-1].usage
    assert (usage.completion_tokens, usage.prompt_tokens, usage.total_tokens) == (
        whole.usage.completion_tokens,
        whole.usage.prompt_tokens,
        whole.usage.total_tokens,
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason == "length"} == set(range(answer_count))
    if answer_count > 1:
        assert chunks[-1].choices == []
        assert [chunk for chunk in chunks if chunk.usage is not None] == chunks[-1:]
        assert all(chunk.usage is None for chunk in [chunk async for chunk in await create(stream=True)])


async def test_llamacpp_says_what_is_wrong_in_openai_shape(tmp_path, tiny_gguf):
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(pinned(tiny_gguf), kind="llamacpp", slots=1, context=256))
        await node.until_state(EngineState.READY)
        url = node.url()
        for stream in (False, True):
            code, body = await ask(url, {"messages": [{"role": "user", "content": "x" * 2000}], "stream": stream})
            assert (code, json.loads(body)["error"]["type"]) == (400, "exceed_context_size_error")
        for wrong in ({"messages": "x"}, CHAT | {"max_tokens": "x"}, CHAT | {"stream": "x"}, {}):
            code, body = await ask(url, wrong)
            assert (code, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")
        assert (await ask(url, {}, "/slots"))[0] == 404, "only the allowed paths pass"
        async with (
            aiohttp.ClientSession(headers={"origin": "https://example.org"}) as session,
            session.post(url + "/v1/completions") as response,
        ):
            assert response.status == 403, "no page in a browser reaches the engine"


@pytest.mark.timed
@pytest.mark.parametrize("stream", [False, True])
async def test_llamacpp_frees_the_slot_within_a_second_of_a_hang_up(tmp_path, tiny_gguf, stream):
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(pinned(tiny_gguf), kind="llamacpp", slots=1, context=2048))
        await node.until_state(EngineState.READY)
        url = node.url()
        endless = CHAT | {"max_tokens": 1900, "stream": stream}
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(session.post(url + "/v1/chat/completions", data=json.dumps(endless)))
            await asyncio.sleep(0.3)  # the engine is at work on its only slot
            response = asking.result() if stream else None
            asking.cancel()
            if response is not None:
                response.close()
        hung_up_at = time.monotonic()
        code, _ = await ask(url, CHAT | {"max_tokens": 1})
        assert code == 200
        assert time.monotonic() - hung_up_at < 1.0


async def test_killed_engine_comes_back_after_its_backoff(tmp_path):
    clock = MovedClock()
    limits = LocalLimits(frozenset({"scripted"}), lines_folder=tmp_path / "lines")
    async with running(supervisor_of(tmp_path, clock, limits=limits)) as node:
        engine = wished(pinned(script_file(tmp_path)))
        node.wish(engine)
        await node.until_state(EngineState.READY)
        (pid,) = children_of(os.getpid())
        os.kill(pid, signal.SIGKILL)
        failed = await node.until_state(EngineState.BACKING_OFF)
        assert "signal SIGKILL" in failed.failure
        assert failed.failure_kind is FailureKind.KILLED
        assert not (tmp_path / "lines" / "scripted.txt").exists(), "it had said nothing"
        assert node.supervisor.ready_address(engine.replica_id) is None
        clock.now_seconds += 0.9
        node.wish(engine)
        await asyncio.sleep(0.05)
        assert node.supervisor.statuses()[0].state is EngineState.BACKING_OFF, "not before its backoff of a second"
        clock.now_seconds += 0.2
        node.wish(engine)
        ready = await node.until_state(EngineState.READY)
        assert ready.failure == ""
        assert (await ask(node.url(), CHAT))[0] == 200


async def test_a_model_that_its_engine_cannot_load_shows_the_engines_own_words(tmp_path, tiny_gguf):
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"lmama"))
    async with running(supervisor_of(tmp_path, MovedClock())) as node:
        node.wish(wished(pinned(unknown), kind="llamacpp"))
        status = await node.until_state(EngineState.BACKING_OFF)
        assert "unknown model architecture: 'lmama'" in status.failure
        assert status.failure_kind is FailureKind.UNSUPPORTED_ARCHITECTURE
        assert len(status.failure) < 3000
        assert children_of(os.getpid()) == []


async def test_flipped_byte_is_never_loaded(tmp_path, tiny_gguf):
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    engine = wished(pinned(copy), kind="llamacpp")
    async with running(supervisor_of(tmp_path, MovedClock())) as node:
        node.wish(engine)
        await node.until_state(EngineState.READY)
        node.wish()
        await node.until(lambda statuses: not statuses)
        content = bytearray(copy.read_bytes())
        content[1000] ^= 1
        copy.write_bytes(content)
        node.wish(engine)
        status = await node.until_state(EngineState.BACKING_OFF)
        assert status.failure == "tiny.gguf does not match the catalogue"
        assert status.failure_kind is FailureKind.FETCH_FAILED
        assert children_of(os.getpid()) == [], "no engine was started on it"


async def test_changed_wish_replaces_the_engine_and_pausing_stops_it(tmp_path):
    file = pinned(script_file(tmp_path))
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(file, slots=1))
        await node.until_state(EngineState.READY)
        (first,) = children_of(os.getpid())
        node.wish(wished(file, slots=2))
        await node.until(lambda statuses: bool(statuses) and (statuses[0].slot_count, statuses[0].state) == (2, EngineState.READY))
        assert gone(first)
        (second,) = children_of(os.getpid())
        node.supervisor.set_paused(True)
        await node.until(lambda statuses: not statuses)
        assert gone(second)
        node.supervisor.set_paused(False)
        await node.until_state(EngineState.READY)
        (third,) = children_of(os.getpid())
    assert gone(third), "the loop's end is the engines' end"


async def test_refused_model_shows_one_line_and_starts_nothing(tmp_path):
    limits = LocalLimits(frozenset({"scripted"}), models_allowed=frozenset({ModelId("another")}))
    async with running(supervisor_of(tmp_path, SystemClock(), limits=limits)) as node:
        node.wish(wished(pinned(script_file(tmp_path))))
        status = await node.until_state(EngineState.REFUSED)
        assert status.failure == "this node's settings do not allow the model tiny"
        assert status.failure_kind is FailureKind.NOT_ALLOWED


async def test_cancelled_start_leaves_no_process(tmp_path):
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(pinned(script_file(tmp_path, load_ms=60_000))))
        await node.until_state(EngineState.STARTING)
        async with asyncio.timeout(10):
            while not (children := children_of(os.getpid())):
                await asyncio.sleep(0.02)
        node.wish()
        await node.until(lambda statuses: not statuses)
        assert gone(children[0])


AGENT = """
import asyncio, os, sys
from pathlib import Path
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import EngineState
from tests.support.engines import children_of, pinned, running, supervisor_of, wished

async def main(folder, file, kind):
    async with running(supervisor_of(folder, SystemClock())) as node:
        node.wish(wished(pinned(file), kind=kind))
        await node.until_state(EngineState.READY)
        print("engine", children_of(os.getpid())[0], flush=True)
        await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
"""


@pytest.mark.parametrize("kind", ["scripted", "llamacpp"])
async def test_killed_agent_leaves_no_engine(tmp_path, tiny_gguf, kind):
    file = tiny_gguf if kind == "llamacpp" else script_file(tmp_path)
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, str(tmp_path), str(file), kind), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert agent.stdout is not None
    try:
        async with asyncio.timeout(60):
            while not (line := await agent.stdout.readline()).startswith(b"engine "):
                assert line, "the agent ended"
        engine_pid = int(line.split()[1])
        assert not gone(engine_pid)
    finally:
        agent.kill()
        await agent.wait()
    await until_gone(engine_pid, limit_seconds=2.0)
