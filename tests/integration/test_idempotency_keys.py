"""Idempotency keys over the real HTTP and gRPC ports: one run and one charge, whatever clients and the coordinator do in between."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from potluck_coordinator.domain.idempotency import KEY_KEPT_MS
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.connection import fetch_connection
from potluck_protocol.errors import ErrorCode
from potluck_protocol.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from potluck_protocol.values import EndReason, NodeState
from tests.support.coordinator import TINY, running_coordinator
from tests.support.grpc_edge import detail_in
from tests.support.http_edge import RawAnswer, exchange, read_until, request_bytes
from tests.support.open_pool import ShiftedClock
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, pool, settled_balance, token

CHAT = "/v1/chat/completions"
GRANT = 1000 * 1_000_000
COST = 10 * 1 + 2 * 4
WHOLE = token("one") + token("two") + DONE
DOCUMENT = json.dumps({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}).encode()


def body(*, stream: bool = True, text: str = "canary-in-a-prompt") -> bytes:
    return json.dumps({"model": TINY, "messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": 50}).encode()


def ask(coordinator, key: str | None = "order-17", content: bytes | None = None, **headers: str) -> asyncio.Task[RawAnswer]:
    named = {} if key is None else {"idempotency-key": key}
    content = body() if content is None else content
    port = coordinator.endpoints.http_port
    return asyncio.ensure_future(exchange(port, "POST", CHAT, content, key=coordinator.operator_key, headers=named | headers))


def error_of(answer: RawAnswer) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["error"]["code"]


def untold(body: bytes) -> bytes:
    """The node's own bytes: without the tier, which the gateway puts into the first of them."""
    return re.sub(rb'"service_tier": ?"[a-z]+", ?', b"", body)


async def finish(node, start, sequence: int = 1) -> None:
    await node.chunk(start.attempt_id, sequence, token("two") + USAGE_EVENT + DONE)
    await node.end(start.attempt_id, sequence + 1)


async def test_a_storm_of_fifty_is_one_run_one_charge_and_the_same_bytes(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = [ask(coordinator, **{"x-request-id": "retried"}) for _ in range(50)]
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await asyncio.sleep(0.2)
        await finish(node, start)
        answers = await asyncio.gather(*asking)
        assert {answer.status for answer in answers} == {200}
        (whole,) = {answer.body for answer in answers}
        assert untold(whole) == WHOLE
        assert sorted(answer.headers.get("idempotent-replayed", "") for answer in answers) == [""] + ["true"] * 49
        late = await ask(coordinator)
        assert (late.body, late.headers["idempotent-replayed"]) == (whole, "true")
        assert len(node.starts()) == 1
        assert (await settled_balance(coordinator)).available_micro_credits == GRANT - COST


async def test_a_client_that_drops_in_the_middle_comes_back_to_the_whole_answer(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        reader, writer = await asyncio.open_connection("127.0.0.1", coordinator.endpoints.http_port)
        writer.write(request_bytes("POST", CHAT, body(), key=coordinator.operator_key, headers={"idempotency-key": "k"}))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await read_until(reader, b"one")
        writer.transport.abort()
        await asyncio.sleep(0.2)
        assert not [frame for frame in node.received if frame.cancels], "its answer goes on without it"
        # It comes back while the answer is being made, and once more when it is there.
        coming_back = ask(coordinator, "k")
        await asyncio.sleep(0.1)
        assert not coming_back.done()
        await finish(node, start)
        for answer in (await coming_back, await ask(coordinator, "k")):
            assert (answer.status, untold(answer.body)) == (200, WHOLE)
        assert len(node.starts()) == 1
        assert (await settled_balance(coordinator)).available_micro_credits == GRANT - COST


async def test_without_a_key_a_client_that_drops_ends_its_attempt(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        reader, writer = await asyncio.open_connection("127.0.0.1", coordinator.endpoints.http_port)
        writer.write(request_bytes("POST", CHAT, body(), key=coordinator.operator_key))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await read_until(reader, b"one")
        writer.transport.abort()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 2)


async def test_a_drop_after_any_byte_costs_one_run(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        for number, size in enumerate(range(0, 300, 23)):
            reader, writer = await asyncio.open_connection("127.0.0.1", coordinator.endpoints.http_port)
            key = {"idempotency-key": f"drop-{size}"}
            writer.write(request_bytes("POST", CHAT, body(), key=coordinator.operator_key, headers=key))
            start = await node.next_start(number)
            await node.chunk(start.attempt_id, 0, token("one"))
            assert len(await asyncio.wait_for(reader.readexactly(size), 5)) == size
            writer.transport.abort()
            await finish(node, start)
            assert (await ask(coordinator, f"drop-{size}")).body.endswith(WHOLE[len(token("one")) :])
            assert len(node.starts()) == number + 1
        assert (await settled_balance(coordinator)).available_micro_credits == GRANT - COST * (number + 1)


async def test_an_unstreamed_answer_comes_again_with_what_it_cost(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = ask(coordinator, content=body(stream=False))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, DOCUMENT, "application/json")
        await node.end(start.attempt_id, 1)
        first, again = await asking, await ask(coordinator, content=body(stream=False))
        assert (first.status, untold(first.body)) == (200, DOCUMENT)
        assert (again.status, again.body) == (200, first.body)
        assert first.headers["x-potluck-cost-micro-credits"] == again.headers["x-potluck-cost-micro-credits"] == str(COST)
        assert first.headers["x-potluck-node"] == again.headers["x-potluck-node"]
        assert (await settled_balance(coordinator)).available_micro_credits == GRANT - COST


async def test_another_request_under_the_same_key_is_refused(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = ask(coordinator)
        start = await node.next_start()
        assert error_of(await ask(coordinator, content=body(text="something else"))) == (422, "idempotency_key_reused")
        await node.chunk(start.attempt_id, 0, token("one"))
        await finish(node, start)
        await asking
        assert error_of(await ask(coordinator, content=body(text="something else"))) == (422, "idempotency_key_reused")
        # The same text to another endpoint is another request, too.
        other = await exchange(
            coordinator.endpoints.http_port,
            "POST",
            "/v1/completions",
            json.dumps({"model": TINY, "prompt": "x"}).encode(),
            key=coordinator.operator_key,
            headers={"idempotency-key": "order-17"},
        )
        assert error_of(other) == (422, "idempotency_key_reused")
        assert len(node.starts()) == 1


@pytest.mark.parametrize("key", ["", "k" * 256, "tab\there", "schl\u00fcssel"])
async def test_what_is_no_key_is_refused(tmp_path, key):
    async with running_coordinator(tmp_path) as coordinator:
        answer = await ask(coordinator, key)
        assert (answer.status, json.loads(answer.body)["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_refusal_and_a_failure_before_anything_leave_the_key_free(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        assert (await ask(coordinator)).status == 503, "no node has the model"
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            asking = ask(coordinator)
            start = await node.next_start()
            await node.end(start.attempt_id, 0, EndReason.ENGINE_FAILED)
            assert (await asking).status in {502, 503}
            again = ask(coordinator)
            start = await node.next_start(1)
            await node.chunk(start.attempt_id, 0, token("one"))
            await finish(node, start)
            assert ((await again).status, "idempotent-replayed" in (await again).headers) == (200, False)
            assert (await settled_balance(coordinator)).available_micro_credits == GRANT - COST


async def test_an_answer_that_broke_off_comes_again_as_it_was(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = ask(coordinator)
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await node.end(start.attempt_id, 1, EndReason.ENGINE_FAILED)
        first, again = await asking, await ask(coordinator)
        assert first.body == again.body
        assert b"engine_failed" in again.body
        assert len(node.starts()) == 1


async def test_after_a_restart_a_spent_key_is_named_and_not_run_again(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = ask(coordinator, "done")
        await node.chunk((await node.next_start()).attempt_id, 0, token("one"))
        await finish(node, node.starts()[0])
        request_id = (await asking).headers["x-request-id"]
        cut_off = ask(coordinator, "cut off")
        await node.chunk((await node.next_start(1)).attempt_id, 0, token("one"))
        await asyncio.sleep(0.2)
    assert b"coordinator is stopping" in (await cut_off).body
    async with running_coordinator(tmp_path) as coordinator, raw_link(coordinator, await enrol(coordinator)) as node:
        await node.hello()
        spent = await ask(coordinator, "done")
        assert error_of(spent) == (409, "idempotency_key_spent")
        message = json.loads(spent.body)["error"]["message"]
        assert f"charged {COST} micro-credits as request {request_id}" in message
        assert (spent.headers["x-should-retry"], spent.headers.get("retry-after")) == ("false", None)
        assert error_of(await ask(coordinator, "cut off")) == (409, "idempotency_key_spent")
        assert error_of(await ask(coordinator, "done", body(text="something else"))) == (422, "idempotency_key_reused")
        assert node.starts() == []


async def test_a_key_is_new_again_after_a_day_and_its_row_is_gone(tmp_path):
    clock = ShiftedClock()
    async with running_coordinator(tmp_path, clock) as coordinator, raw_link(coordinator, await enrol(coordinator)) as node:
        await node.hello()
        for number in range(2):
            asking = ask(coordinator)
            start = await node.next_start(number)
            await node.chunk(start.attempt_id, 0, token("one"))
            await finish(node, start)
            assert "idempotent-replayed" not in (await asking).headers
            clock.shift_seconds += KEY_KEPT_MS / 1000
            await node.beat(NodeState.SERVING)
        await coordinator.directory.idempotency.forget_old()
        store = coordinator.directory.idempotency._store
        assert await store.run(lambda work: work.idempotency.remove_older(2**62, 10)) == 0


async def test_neither_prompt_nor_answer_nor_key_is_ever_written_down(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asking = ask(coordinator, "canary-of-a-key")
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("canary-in-an-answer"))
        await finish(node, start)
        assert (await asking).status == 200
        await settled_balance(coordinator)
    written = b"".join(path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file())
    assert b"idempotency_key" in written
    for canary in (b"canary-in-a-prompt", b"canary-in-an-answer", b"canary-of-a-key"):
        assert canary not in written


@asynccontextmanager
async def generating(coordinator):
    """Calls of the SDK's edge, with whatever metadata."""
    connection = await asyncio.to_thread(fetch_connection, coordinator.url)
    credentials = grpc.ssl_channel_credentials(connection.ca_certificate_pem.encode())
    async with grpc.aio.secure_channel(connection.grpc_target, credentials, options=CHANNEL_OPTIONS) as channel:

        def generate(**metadata: str):
            request = inference_pb2.GenerateRequest(endpoint=common_pb2.ENDPOINT_CHAT_COMPLETIONS, body_json=body())
            named = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
            return inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                request, metadata=(("authorization", f"Bearer {coordinator.operator_key}"), *named)
            )

        yield generate


async def test_grpc_and_http_share_a_key(tmp_path):
    async with pool(tmp_path) as (coordinator, node), generating(coordinator) as generate:
        call = generate(idempotency_key="order-17", x_request_id="mine")
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await finish(node, start)
        events = [event async for event in call]
        assert untold(b"".join(event.data for event in events)) == WHOLE
        again = [event async for event in generate(idempotency_key="order-17", x_request_id="another")]
        assert b"".join(event.data for event in again) == b"".join(event.data for event in events)
        assert (again[0].placed.request_id, again[-1].finished.charge_micro_credits) == ("mine", COST)
        assert (await ask(coordinator)).headers["idempotent-replayed"] == "true"
        assert len(node.starts()) == 1
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in generate(idempotency_key="k", potluck_when_gone="explode"):
                pass
        assert detail_in(refused.value.trailing_metadata()).code == ErrorCode.INVALID_REQUEST


async def test_the_sdks_way_gives_the_engine_back_when_its_client_goes(tmp_path):
    async with pool(tmp_path) as (coordinator, node), generating(coordinator) as generate:
        call = generate(idempotency_key="auto", potluck_when_gone="cancel")
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        assert (await call.read()).HasField("placed")
        call.cancel()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 2)


async def test_answers_that_are_too_much_go_and_their_keys_stay_spent(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        keyed = coordinator.gateway._keyed
        assert keyed is not None
        asking = ask(coordinator)
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await finish(node, start)
        size_bytes = len((await asking).body)
        assert keyed.held_bytes == size_bytes
        keyed._let_go(next(iter(keyed._shelves[next(iter(keyed._shelves))].runs.values())))
        assert keyed.held_bytes == 0
        assert error_of(await ask(coordinator)) == (409, "idempotency_key_spent")
        assert len(node.starts()) == 1
