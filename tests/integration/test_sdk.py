"""The SDK over real TLS gRPC, against a coordinator whose answers are scripted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import potluck
from potluck import AsyncClient, Client
from potluck.address import pool_address
from potluck.calls import generate_request
from potluck.retry import TRIES_MAX
from potluck.transport import Transport
from potluck_protocol.connection import fetch_connection
from potluck_protocol.errors import CATALOGUE, ErrorCode, PotluckError
from potluck_protocol.values import Endpoint, ModelId
from tests.support.scripted_pool import (
    API_KEY,
    MODEL,
    NODE,
    ScriptedPool,
    answers,
    breaks,
    data,
    drops,
    finished,
    hangs,
    refuses,
    scripted_pool,
)


def events(*texts: str) -> list:
    return data(*(f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}\n\n'.encode() for text in texts))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


WHOLE = data(b'{"choices":[{"index":0,"message":{"content":"Hi"},"finish_reason":"stop"}]}')


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ScriptedPool]:
    with scripted_pool(tmp_path) as running:
        yield running


@pytest.fixture
def client(pool: ScriptedPool) -> Iterator[Client]:
    with Client(pool.url, API_KEY, timeout_seconds=20) as made:
        yield made


def test_a_whole_chat(pool: ScriptedPool, client: Client):
    pool.plays.append(answers(*WHOLE, finished()))
    result = client.chat("Hello", max_tokens=7)
    assert (result.text, result.finish_reason, result.node_id, result.model_id) == ("Hi", "stop", NODE, MODEL)
    assert (result.request_id, result.charge_micro_credits, result.usage.completion_token_count) == ("req_scripted", 23, 5)
    assert json.loads(pool.bodies[0]) == {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 7}
    assert pool.authorisations == [f"Bearer {API_KEY}"]


def test_a_named_model_saves_the_look_at_the_catalogue(pool: ScriptedPool, client: Client):
    pool.plays.append(answers(*WHOLE, finished()))
    client.chat([{"role": "user", "content": "x"}], model="named")
    assert pool.unary_calls == []
    assert json.loads(pool.bodies[0])["model"] == "named"


def test_a_streamed_chat_gives_text_then_the_result(pool: ScriptedPool, client: Client):
    pool.plays.append(answers(*events("a", "b", "c"), *data(b"data: [DONE]\n\n"), finished()))
    with client.chat("x", stream=True) as stream:
        assert stream.node_id == NODE
        assert next(stream) == "a"
        assert stream.text.startswith("a")
        assert list(stream) == ["b", "c"]
        assert stream.result().text == "abc"
    assert json.loads(pool.bodies[0])["stream"] is True


def test_a_plain_prompt(pool: ScriptedPool, client: Client):
    pool.plays.append(answers(*data(b'{"choices":[{"index":0,"text":"on and on"}]}'), finished()))
    assert client.complete("It goes").text == "on and on"
    assert json.loads(pool.bodies[0])["prompt"] == "It goes"


NO_MESSAGES = [None, [], (), 5, {"role": "user", "content": "a canary"}, ["a canary"], [{"role": "user"}, None], b"a canary"]


@pytest.mark.parametrize("messages", NO_MESSAGES, ids=repr)
async def test_what_is_no_conversation_is_refused_before_any_call(pool: ScriptedPool, client: Client, messages: object):
    for stream in (False, True):
        with pytest.raises(potluck.InvalidRequestError, match=r"(?s)one question as a string.*\"role\"") as caught:
            client.chat(messages, stream=stream)
        assert (caught.value.param, "canary" in caught.value.message) == ("messages", False)
    async with AsyncClient(pool.url, API_KEY) as other:
        with pytest.raises(potluck.InvalidRequestError, match="one question as a string"):
            await other.chat(messages)
    assert (pool.unary_calls, pool.bodies) == ([], [])


@pytest.mark.parametrize("prompt", [None, 5, {"prompt": "a canary"}], ids=repr)
async def test_what_is_no_prompt_is_refused_before_any_call(pool: ScriptedPool, client: Client, prompt: object):
    with pytest.raises(potluck.InvalidRequestError, match="a text to go on from") as caught:
        client.complete(prompt)
    assert (caught.value.param, "canary" in caught.value.message) == ("prompt", False)
    async with AsyncClient(pool.url, API_KEY) as other:
        with pytest.raises(potluck.InvalidRequestError, match="a text to go on from"):
            await other.complete(prompt)
    assert (pool.unary_calls, pool.bodies) == ([], [])


def test_messages_may_come_from_a_generator(pool: ScriptedPool, client: Client):
    pool.plays.append(answers(*WHOLE, finished()))
    client.chat({"role": "user", "content": text} for text in ("a", "b"))
    assert len(json.loads(pool.bodies[0])["messages"]) == 2


def test_leaving_the_block_early_takes_the_request_back(pool: ScriptedPool, client: Client):
    gone = threading.Event()
    pool.plays.append(hangs(gone, *events("a")))
    with client.chat("x", stream=True) as stream:
        assert next(stream) == "a"
    assert gone.wait(5)
    assert list(stream) == []
    with pytest.raises(potluck.RequestCancelledError) as caught:
        stream.result()
    assert caught.value.partial_text == "a"


@pytest.mark.parametrize("code", [ErrorCode.NODE_LOST, ErrorCode.ENGINE_FAILED])
def test_a_broken_stream_raises_with_what_had_arrived_and_is_not_repeated(pool: ScriptedPool, client: Client, code: ErrorCode):
    pool.plays.append(breaks(code, *events("half", " of it")))
    with client.chat("x", stream=True) as stream, pytest.raises(potluck.AnswerLostError) as caught:
        list(stream)
    assert caught.value.code is code
    assert caught.value.partial_text == "half of it"
    assert caught.value.request_id == "req_scripted"
    assert len(pool.bodies) == 1
    with pytest.raises(potluck.AnswerLostError):
        stream.result()


def test_even_a_safe_code_is_not_repeated_once_the_request_had_a_place(pool: ScriptedPool, client: Client):
    pool.plays.append(breaks(ErrorCode.COORDINATOR_UNAVAILABLE, *events("half")))
    with pytest.raises(potluck.CoordinatorUnavailableError):
        client.chat("x", stream=True).result()
    assert len(pool.bodies) == 1


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_refusal_raises_its_class_and_only_safe_ones_are_repeated(pool: ScriptedPool, client: Client, code: ErrorCode):
    pool.plays.extend([refuses(code, 0.01)] * 3)
    with pytest.raises(potluck.errors.CLASS_OF_CODE[code]) as caught:
        client.chat("x", model=MODEL)
    assert (caught.value.code, caught.value.message, caught.value.param) == (code, f"scripted {code}", "model")
    assert (caught.value.request_id, caught.value.retry_after_seconds) == ("req_scripted", 0.01)
    assert len(pool.bodies) == (3 if CATALOGUE[code].retry_is_safe else 1)


BARE = {
    grpc.StatusCode.UNAVAILABLE: potluck.CoordinatorUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: potluck.QueueFullError,
}


@pytest.mark.parametrize("status", list(BARE))
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_was_sent_is_repeated_on_grpcs_word_under_one_key(
    pool: ScriptedPool, client: Client, status: grpc.StatusCode, stream: bool
):
    pool.plays.extend([drops(status)] * TRIES_MAX)
    with pytest.raises(BARE[status]) as caught:
        client.chat("x", model=MODEL, stream=stream)
    assert caught.value.outcome_unknown
    assert not caught.value.retry_is_safe, "by whoever called: the next call has another key"
    ((key, when_gone),) = set(pool.keys)
    assert (len(pool.keys), len(key), when_gone) == (TRIES_MAX, 32, "cancel")


async def test_async_a_request_that_was_sent_is_repeated_on_grpcs_word_under_one_key(pool: ScriptedPool):
    pool.plays.extend([drops(grpc.StatusCode.UNAVAILABLE), answers(*WHOLE, finished()), answers(*WHOLE, finished())])
    async with AsyncClient(pool.url, API_KEY, timeout_seconds=20) as client:
        assert (await client.chat("x", model=MODEL)).text == "Hi"
        await client.chat("x", model=MODEL)
    first, again, another = pool.keys
    assert first == again != another


def test_a_key_of_the_callers_own_is_named_and_outlives_him(pool: ScriptedPool, client: Client):
    pool.plays.extend([answers(*WHOLE, finished())] * 2)
    client.chat("x", model=MODEL, idempotency_key="order 17")
    client.complete("x", model=MODEL, idempotency_key="order 18")
    assert pool.keys == [("order 17", ""), ("order 18", "")]
    assert b"idempotency" not in pool.bodies[0]
    with pytest.raises(potluck.InvalidRequestError, match="printable ASCII"):
        client.chat("x", model=MODEL, idempotency_key="schl\u00fcssel")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.IDEMPOTENCY_KEY_REUSED, potluck.IdempotencyKeyReusedError),
        (ErrorCode.IDEMPOTENCY_KEY_SPENT, potluck.IdempotencyKeySpentError),
    ],
)
def test_a_key_that_is_taken_is_not_tried_again(pool: ScriptedPool, client: Client, code: ErrorCode, kind: type[potluck.PoolError]):
    pool.plays.append(refuses(code))
    with pytest.raises(kind):
        client.chat("x", model=MODEL, idempotency_key="order 17")


@pytest.mark.parametrize("host", ["127.0.0.1", "nobody.invalid"])
def test_a_request_that_found_no_connection_is_tried_again(pool: ScriptedPool, host: str):
    slept: list[float] = []
    document = dataclasses.replace(fetch_connection(pool.url), grpc_port=free_port(), host=host)
    transport = Transport(pool_address(pool.url, API_KEY), 20, sleep=slept.append)
    transport._document = document
    with pytest.raises(potluck.CoordinatorUnavailableError) as caught:
        transport.open_answer(generate_request(Endpoint.CHAT_COMPLETIONS, ModelId(MODEL), {}, stream=False), stream=False)
    transport.close()
    assert not caught.value.outcome_unknown
    assert len(slept) == TRIES_MAX - 1


def test_a_busy_pool_is_asked_again(pool: ScriptedPool, client: Client):
    pool.plays.extend([refuses(ErrorCode.QUEUE_FULL, 0.01), answers(*WHOLE, finished())])
    assert client.chat("x", model=MODEL).text == "Hi"


def test_the_callers_limit_ends_the_answer_and_frees_the_engine(pool: ScriptedPool):
    gone = threading.Event()
    pool.plays.append(hangs(gone, *events("a")))
    with Client(pool.url, API_KEY, timeout_seconds=1) as client, pytest.raises(TimeoutError) as caught:
        client.chat("x", model=MODEL, stream=True).result()
    assert isinstance(caught.value, potluck.PoolTimeoutError)
    assert caught.value.partial_text == "a"
    assert gone.wait(5)


def test_models_nodes_and_credits(client: Client):
    assert [(model.model_id, model.ready_replica_count) for model in client.models()] == [(MODEL, 1)]
    (node,) = client.nodes()
    assert (node.node_id, node.display_name, node.owner_account_id, node.engines[0].slot_count) == (NODE, "den", None, 4)
    balance = client.credits()
    assert (balance.available_micro_credits, balance.held_micro_credits, balance.earned_micro_credits) == (1_500_000, 2, 3)


def test_reads_are_repeated_after_a_lapse_and_creations_are_not(pool: ScriptedPool, client: Client):
    pool.unary_refusals.append(PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=0.01))
    assert client.models()
    assert pool.unary_calls == ["ListModels", "ListModels"]
    pool.unary_refusals.append(PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=0.01))
    with pytest.raises(potluck.CoordinatorUnavailableError):
        client._transport.unary(potluck.calls.create_key("k"))
    assert pool.unary_calls[2:] == ["CreateKey"]


def test_a_coordinator_that_is_not_there_is_named(tmp_path: Path):
    with scripted_pool(tmp_path) as pool:
        url = pool.url
    with Client(url, API_KEY, timeout_seconds=1) as client, pytest.raises(potluck.CoordinatorUnavailableError, match=url):
        client.models()


def test_a_pin_of_another_pool_stops_the_key(pool: ScriptedPool):
    with Client(f"{pool.url}#{'a' * 52}", API_KEY) as client, pytest.raises(potluck.InvalidCertificateError):
        client.models()
    assert pool.unary_calls == []


async def test_async_whole_and_streamed(pool: ScriptedPool):
    async with AsyncClient(pool.url, API_KEY, timeout_seconds=20) as client:
        pool.plays.append(answers(*WHOLE, finished()))
        assert (await client.chat("x")).text == "Hi"
        pool.plays.append(answers(*events("a", "b"), finished()))
        async with await client.chat("x", stream=True) as stream:
            assert [text async for text in stream] == ["a", "b"]
            assert (await stream.result()).charge_micro_credits == 23
        assert (await client.credits()).available_micro_credits == 1_500_000
        assert len(await client.nodes()) == 1


async def test_async_failure_keeps_the_text(pool: ScriptedPool):
    async with AsyncClient(pool.url, API_KEY, timeout_seconds=20) as client:
        pool.plays.append(breaks(ErrorCode.NODE_LOST, *events("half")))
        async with await client.complete("x", model=MODEL, stream=True) as stream:
            with pytest.raises(potluck.NodeLostError) as caught:
                await stream.result()
        assert caught.value.partial_text == "half"


async def test_async_refusal_is_repeated_and_limit_raises(pool: ScriptedPool):
    async with AsyncClient(pool.url, API_KEY, timeout_seconds=1) as client:
        pool.plays.extend([refuses(ErrorCode.NO_CAPACITY, 0.01), answers(*WHOLE, finished())])
        assert (await client.chat("x", model=MODEL)).text == "Hi"
        gone = threading.Event()
        pool.plays.append(hangs(gone))
        with pytest.raises(potluck.PoolTimeoutError):
            await client.chat("x", model=MODEL)
        assert await asyncio.to_thread(gone.wait, 5)


async def test_cancelling_the_task_takes_the_request_back(pool: ScriptedPool):
    gone = threading.Event()
    pool.plays.append(hangs(gone, *events("a")))
    async with AsyncClient(pool.url, API_KEY) as client:
        task = asyncio.create_task(client.chat("x", model=MODEL))
        for _ in range(500):
            if pool.bodies:
                break
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gone.wait, 5)
