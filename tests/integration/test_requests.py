"""The request path against a node whose every frame the test writes: money, resumption, loss, queueing, cancellation.

Real gateway, real directory, real gRPC with mutual TLS, real SQLite; only the engine is the test.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import pytest

from potluck_coordinator.gateway import attempt as attempt_module
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EndReason, GoodbyeReason, ModelId, NodeState, Usage
from tests.support.coordinator import TINY, replace_gateway_in_books, running_coordinator
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, first_of, pool, read_all, request_of, settled_balance, token, without_tier


async def test_a_complete_stream_is_paid_by_the_engines_count(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        await node.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        assert without_tier(await read_all(answer)) == token("one") + token("two") + DONE
        assert answer.usage == Usage(10, 2, 0)
        assert answer.charge_micro_credits == 10 * 1 + 2 * 4
        balance = await settled_balance(coordinator)
        assert balance.available_micro_credits == 1000 * 1_000_000 - 18
        assert balance.earned_micro_credits == 18  # the fee of 5 % of 18 rounds down to nothing


async def test_an_unstreamed_answer_is_kept_whole_and_paid_by_its_own_usage_record(tmp_path):
    document = json.dumps({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}).encode()
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node, stream=False, first=document[:7])
        await node.chunk(start.attempt_id, 1, document[7:])
        reading = asyncio.ensure_future(answer.next_data())
        await asyncio.sleep(0.1)
        assert not reading.done()  # all of it is there, and whoever hung up now would have it for nothing
        await node.end(start.attempt_id, 2)
        assert (data := await reading + await read_all(answer)) == answer.document
        assert without_tier(data) == document
        assert (answer.usage, answer.charge_micro_credits) == (Usage(10, 2, 0), 10 * 1 + 2 * 4)


async def test_an_unstreamed_answer_beyond_its_bound_is_broken_off(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt_module, "DOCUMENT_BYTES_MAX", 10)
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node, stream=False, first=b"12345")
        await node.chunk(start.attempt_id, 1, b"123456")
        with pytest.raises(PotluckError) as failure:
            await read_all(answer)
        assert failure.value.code is ErrorCode.ENGINE_FAILED
        await answer.close()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 1)


async def test_a_link_that_comes_back_within_its_grace_costs_nothing(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            answer, start = await begin(coordinator, node)
            await node.chunk(start.attempt_id, 1, token("two"))
            assert await answer.next_data() is not None
        async with raw_link(coordinator, credentials) as again:
            frame = await again.hello(in_flight=(start.attempt_id,))
            (point,) = frame.welcome.resume_points
            assert (point.attempt_id, point.next_sequence) in {(start.attempt_id, 1), (start.attempt_id, 2)}
            await again.chunk(start.attempt_id, 1, token("two"))
            await again.chunk(start.attempt_id, 2, token("three") + USAGE_EVENT + DONE)
            await again.end(start.attempt_id, 3)
            rest = await read_all(answer)
            assert (token("one") + token("two") + token("three") + DONE).endswith(rest)
            assert token("three") in rest
        assert (await settled_balance(coordinator)).earned_micro_credits == 18


async def test_a_lost_node_is_paid_for_what_was_relayed_and_the_client_is_told(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            answer, start = await begin(coordinator, node)
            await node.chunk(start.attempt_id, 1, token("two") + token("three"))
            received = b""
            async with asyncio.timeout(5):
                while received.count(b"\n\n") < 3:
                    received += await answer.next_data()
        loop = asyncio.get_running_loop()
        cut_at = loop.time()
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(answer.next_data(), 5)
        assert failure.value.code is ErrorCode.NODE_LOST
        assert loop.time() - cut_at < 3
        await answer.close()
        assert answer.charge_micro_credits == 3 * 4
        assert (await settled_balance(coordinator)).earned_micro_credits == 12


async def test_frames_of_an_older_epoch_are_dropped(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        assert await first_of(answer) == token("one")
        node.epoch -= 1
        await node.chunk(start.attempt_id, 1, token("ghost"))
        node.epoch += 1
        await node.chunk(start.attempt_id, 1, token("two") + DONE)
        await node.end(start.attempt_id, 2)
        assert await read_all(answer) == token("two") + DONE


async def test_a_client_that_hangs_up_cancels_the_attempt_and_pays_for_what_it_got(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        assert await first_of(answer) == token("one")
        await answer.close()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 1)
        assert (await settled_balance(coordinator)).earned_micro_credits == 4


async def test_too_few_credits_cancel_before_the_client_sees_anything(tmp_path):
    async with pool(tmp_path, grant_credits=0) as (coordinator, node):
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(work, 5)
        assert failure.value.code is ErrorCode.INSUFFICIENT_CREDITS
        assert "could cost up to 0.000676 credits" in failure.value.message
        await node.wait_for(lambda frame: bool(frame.cancels), 1)


async def test_an_unknown_model_is_refused_with_where_the_known_ones_are_listed(tmp_path):
    async with pool(tmp_path) as (coordinator, _):
        request = replace(await request_of(coordinator), model_id=ModelId("nobodys"))
        with pytest.raises(PotluckError, match=r"'nobodys'.*`potluck models`") as failure:
            await coordinator.gateway.requests.begin(request)
        assert failure.value.code is ErrorCode.MODEL_NOT_FOUND


async def test_a_full_model_queues_in_order_and_refuses_beyond_its_bound(tmp_path):
    async with pool(tmp_path, queue_length_max=1) as (coordinator, node):
        first, first_start = await begin(coordinator, node, 0)
        second, _ = await begin(coordinator, node, 1)
        queued = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        while coordinator.gateway.requests.queues.queued_count(TINY) == 0:
            await asyncio.sleep(0)
        with pytest.raises(PotluckError) as failure:
            await coordinator.gateway.requests.begin(await request_of(coordinator))
        assert failure.value.code is ErrorCode.QUEUE_FULL
        assert failure.value.retry_after_seconds >= 1
        await node.chunk(first_start.attempt_id, 1, DONE)
        await node.end(first_start.attempt_id, 2)
        await read_all(first)
        third_start = await node.next_start(2)
        await node.chunk(third_start.attempt_id, 0, token("three"))
        await (await asyncio.wait_for(queued, 5)).close()
        await second.close()


async def test_nobody_waits_longer_than_the_deadline(tmp_path):
    async with pool(tmp_path, queue_deadline_seconds=0.8) as (coordinator, node):
        answers = [(await begin(coordinator, node, number))[0] for number in range(2)]
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(coordinator.gateway.requests.begin(await request_of(coordinator)), 5)
        assert failure.value.code is ErrorCode.QUEUE_FULL, "half a second is predicted: refused when that would be too late"
        for answer in answers:
            await answer.close()


async def test_a_node_that_pauses_in_between_is_tried_once_and_explained(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        start = await node.next_start()
        await node.beat(NodeState.PAUSED)
        await node.end(start.attempt_id, 0, EndReason.REFUSED)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(work, 5)
        assert failure.value.code is ErrorCode.NO_CAPACITY
        assert "Replicas: 1 " in failure.value.message
        assert len(node.starts()) == 1


async def test_what_one_node_refuses_another_answers_and_is_paid_for(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, AsyncExitStack() as links:
        nodes = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator))) for _ in range(2)]
        for node in nodes:
            await node.hello()
        coordinator.gateway.requests._placing._draw = lambda: 0.0  # of equals always the same one, so that only the refusal moves it
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        starts = [asyncio.ensure_future(node.next_start()) for node in nodes]
        (first,), _ = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
        refusing, answering = nodes if first is starts[0] else reversed(nodes)
        await refusing.end((await first).attempt_id, 0, EndReason.REFUSED)
        start = await answering.next_start()
        await answering.chunk(start.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
        await answering.end(start.attempt_id, 1)
        answer = await asyncio.wait_for(work, 5)
        assert answer.node_id == answering.credentials.node_id
        assert without_tier(await read_all(answer)) == token("one") + DONE
        assert len(refusing.starts()) == 1
        assert (await settled_balance(coordinator)).earned_micro_credits == 18
        await asyncio.gather(*starts)


async def test_an_engines_refusal_reaches_the_client_in_our_words(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        start = await node.next_start()
        body = json.dumps({"error": {"code": 400, "message": "the request exceeds the context size", "type": "exceed_context_size_error"}})
        await node.chunk(start.attempt_id, 0, body.encode(), "application/json", 400)
        await node.end(start.attempt_id, 1)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(work, 5)
        assert failure.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        assert (await settled_balance(coordinator)).earned_micro_credits == 0


async def test_revocation_ends_the_live_link_and_the_node_stays_out(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            await coordinator.directory.nodes.revoke_node(credentials.node_id, "test")
            frame = await node.wait_for(lambda frame: frame.HasField("goodbye"), 1)
            assert frame.goodbye.reason == 3
            await node.wait_until_ended()
        async with raw_link(coordinator, credentials) as node:
            with pytest.raises((AssertionError, grpc.aio.AioRpcError)):
                await node.hello()
            assert not any(frame.HasField("welcome") for frame in node.received)
        assert [record.connection for record in await coordinator.directory.nodes.list_nodes()] == ["revoked"]


async def test_a_goodbye_ends_the_session_at_once_and_leaving_ends_it_for_good(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            await node.goodbye(GoodbyeReason.LEAVING)
            await node.wait_until_ended()
        async with asyncio.timeout(5):
            while (await coordinator.directory.nodes.list_nodes())[0].connection != "left":
                await asyncio.sleep(0.01)


async def test_an_agent_started_anew_replaces_the_old_one_and_its_attempts_are_lost(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, _ = await begin(coordinator, node)
        assert await first_of(answer) == token("one")
        async with raw_link(coordinator, node.credentials, session_id="another") as newer:
            await newer.hello()
            assert newer.epoch > node.epoch
            with pytest.raises(PotluckError) as failure:
                await asyncio.wait_for(answer.next_data(), 5)
            assert failure.value.code is ErrorCode.NODE_LOST
            await node.wait_until_ended()
        await answer.close()


async def test_holds_of_a_gateway_that_died_are_settled_at_their_last_mark(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        await node.chunk(start.attempt_id, 1, token("two"))
        received = await answer.next_data()
        while received.count(b"\n\n") < 2:
            received += await answer.next_data()
        async with asyncio.timeout(5):
            while answer.attempt.marked_micro_credits != 8:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        await replace_gateway_in_books(coordinator)
        balance = await settled_balance(coordinator)
        assert balance.earned_micro_credits == 8
        await answer.close()  # the ghost's own settlement changes nothing any more
        assert (await settled_balance(coordinator)).earned_micro_credits == 8


async def test_a_node_without_heartbeats_loses_its_lease_and_its_attempts(tmp_path):
    """A blocked event loop looks like this: the connection stands, gRPC answers pings, and nothing is said."""
    async with pool(tmp_path, lease_ttl_ms=800, heartbeat_idle_ms=200, heartbeat_busy_ms=100) as (coordinator, node):
        await node.beat()
        answer, _ = await begin(coordinator, node)
        assert await first_of(answer) == token("one")
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(answer.next_data(), 5)
        assert failure.value.code is ErrorCode.NODE_LOST
        await answer.close()
        await node.wait_until_ended()
        assert (await settled_balance(coordinator)).earned_micro_credits == 4
