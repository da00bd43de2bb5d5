"""The request path against a node whose every frame the test writes: money, resumption, loss, queueing, cancellation.

Real gateway, real directory, real gRPC with mutual TLS, real SQLite; only the engine is the test.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from contextlib import asynccontextmanager

import pytest

from potluck_coordinator.gateway.requests import InferenceRequest
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import certificate_request
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import Endpoint, EndReason, GoodbyeReason, ModelId, NodeState, ReplicaId, RequestId, Usage
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import enrol, raw_link

USAGE_EVENT = b'data: {"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}\n\n'
DONE = b"data: [DONE]\n\n"


def token(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


@asynccontextmanager
async def pool(folder, **changes):
    async with running_coordinator(folder, **changes) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            yield coordinator, node


async def request_of(coordinator, *, stream=True, completion_tokens_max=100):
    accounts = await coordinator.directory.accounts.list_accounts()
    return InferenceRequest(
        request_id=RequestId("request"),
        account_id=accounts[0].account_id,
        model_id=TINY,
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=b"{}",
        stream=stream,
        include_usage=False,
        prompt_bytes=20,
        completion_tokens_max=completion_tokens_max,
        answer_count=1,
    )


async def begin(coordinator, node, number=0, **fields):
    """A request on its way, with the attempt that the node got and its head already sent."""
    work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator, **fields)))
    start = await node.next_start(number)
    await node.chunk(start.attempt_id, 0, token("one"))
    return await asyncio.wait_for(work, 5), start


async def read_all(answer) -> bytes:
    data = b""
    while (piece := await asyncio.wait_for(answer.next_data(), 5)) is not None:
        data += piece
    return data


async def settled_balance(coordinator):
    """The operator's balance once nothing is held; the operator also owns the node."""
    account_id = (await coordinator.directory.accounts.list_accounts())[0].account_id
    async with asyncio.timeout(5):
        while (balance := await coordinator.directory.ledger.balance(account_id)).held_micro_credits:
            await asyncio.sleep(0.01)
    assert (await coordinator.directory.ledger.audit()).findings == ()
    return balance


async def test_a_complete_stream_is_paid_by_the_engines_count(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        await node.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        assert await read_all(answer) == token("one") + token("two") + DONE
        assert answer.usage == Usage(10, 2, 0)
        assert answer.charge_micro_credits == 10 * 1 + 2 * 4
        balance = await settled_balance(coordinator)
        assert balance.available_micro_credits == 1000 * 1_000_000 - 18
        assert balance.earned_micro_credits == 18  # the fee of 5 % of 18 rounds down to nothing


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
            received = await answer.next_data()
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
        assert await answer.next_data() == token("one")
        node.epoch -= 1
        await node.chunk(start.attempt_id, 1, token("ghost"))
        node.epoch += 1
        await node.chunk(start.attempt_id, 1, token("two") + DONE)
        await node.end(start.attempt_id, 2)
        assert await read_all(answer) == token("two") + DONE


async def test_a_client_that_hangs_up_cancels_the_attempt_and_pays_for_what_it_got(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        assert await answer.next_data() == token("one")
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
        await node.wait_for(lambda frame: bool(frame.cancels), 1)


async def test_a_full_model_queues_in_order_and_refuses_beyond_its_bound(tmp_path):
    async with pool(tmp_path, queue_length_max=1) as (coordinator, node):
        first, first_start = await begin(coordinator, node, 0)
        second, _ = await begin(coordinator, node, 1)
        queued = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        while coordinator.gateway.requests.queued_count(TINY) == 0:
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
    async with pool(tmp_path, queue_deadline_seconds=0.2) as (coordinator, node):
        answers = [(await begin(coordinator, node, number))[0] for number in range(2)]
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(coordinator.gateway.requests.begin(await request_of(coordinator)), 5)
        assert failure.value.code is ErrorCode.QUEUE_TIMEOUT
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
            with pytest.raises(AssertionError, match="the link ended first"):
                await node.hello()
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
        assert await answer.next_data() == token("one")
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
            while answer.marked_micro_credits != 8:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        await coordinator.directory.pool.register_gateway()  # what a new gateway does first
        balance = await settled_balance(coordinator)
        assert balance.earned_micro_credits == 8
        await answer.close()  # the ghost's own settlement changes nothing any more
        assert (await settled_balance(coordinator)).earned_micro_credits == 8


async def test_a_node_without_heartbeats_loses_its_lease_and_its_attempts(tmp_path):
    """A blocked event loop looks like this: the connection stands, gRPC answers pings, and nothing is said."""
    async with pool(tmp_path, lease_ttl_ms=800, heartbeat_idle_ms=200, heartbeat_busy_ms=100) as (coordinator, node):
        await node.beat()
        answer, _ = await begin(coordinator, node)
        assert await answer.next_data() == token("one")
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(answer.next_data(), 5)
        assert failure.value.code is ErrorCode.NODE_LOST
        await answer.close()
        await node.wait_until_ended()
        assert (await settled_balance(coordinator)).earned_micro_credits == 4


class SlowLedger:
    """The directory's ledger desk, whose commits wait until the test lets them go."""

    def __init__(self, ledger):
        self._ledger = ledger
        self.open = asyncio.Event()
        self.open.set()

    async def apply(self, commands):
        await self.open.wait()
        return await self._ledger.apply(commands)


def slow_down(coordinator):
    ledger = SlowLedger(coordinator.directory.ledger)
    coordinator.gateway._ledger._ledger = ledger
    ledger.open.clear()
    return ledger


async def test_a_client_that_goes_while_its_hold_is_committed_leaves_no_hold(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        ledger = slow_down(coordinator)
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await asyncio.sleep(0.1)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        ledger.open.set()
        balance = await settled_balance(coordinator)
        assert balance.available_micro_credits == 1000 * 1_000_000
        assert coordinator.gateway.requests.in_flight_count == 0


async def test_a_turn_that_comes_with_the_deadline_leaves_no_slot_taken(tmp_path):
    async with pool(tmp_path, queue_deadline_seconds=0.3) as (coordinator, node):
        requests = coordinator.gateway.requests
        answers = [(await begin(coordinator, node, number))[0] for number in range(2)]
        queued = asyncio.ensure_future(requests.begin(await request_of(coordinator)))
        async with asyncio.timeout(5):
            while requests.queued_count(TINY) == 0:
                await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        loop.call_later(0.25, lambda: list(answers[0].close().__await__()))  # closes at once: nothing in it waits
        stand_still_until = loop.time() + 0.4
        while loop.time() < stand_still_until:
            pass  # so that the slot and the deadline come in one turn of the loop, the slot first
        with pytest.raises(PotluckError):
            await asyncio.wait_for(queued, 5)
        await answers[1].close()
        assert requests.in_flight_count == 0
        assert (await settled_balance(coordinator)).earned_micro_credits == 0


async def test_an_attempt_given_up_here_is_cancelled_there(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        await node.chunk(start.attempt_id, 2, token("three"))  # the second is missing
        with pytest.raises(PotluckError):
            await read_all(answer)
        await answer.close()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 1)


async def test_too_few_credits_cancel_an_answer_that_would_come_in_one_piece(tmp_path):
    async with pool(tmp_path, grant_credits=0) as (coordinator, node):
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator, stream=False)))
        start = await node.next_start()
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(work, 5)  # nothing was ever sent: the engine would still be at work
        assert failure.value.code is ErrorCode.INSUFFICIENT_CREDITS
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 1)


async def test_after_the_last_event_an_answer_is_complete_whatever_its_node_does(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            answer, start = await begin(coordinator, node)
            await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
            received = await answer.next_data()
            while not received.endswith(DONE):
                received += await answer.next_data()
        assert await asyncio.wait_for(answer.next_data(), 5) is None
        assert answer.charge_micro_credits == 18
        assert (await settled_balance(coordinator)).earned_micro_credits == 18


async def test_a_node_gets_no_work_that_was_not_wished_of_it(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, raw_link(coordinator, await enrol(coordinator)) as node:
        boast = dataclasses.replace(node.status, slot_count=1 << 30)
        other = dataclasses.replace(node.status, replica_id=ReplicaId("mine"), model_id=ModelId("gpt-of-my-own"))
        await node.hello(engines=(boast, other))
        links = coordinator.gateway._links
        assert [view.slot_count for view in links.replicas(TINY)] == [2]
        assert list(links.replicas(ModelId("gpt-of-my-own"))) == []


async def test_heartbeats_are_read_while_a_certificate_waits_for_the_directory(tmp_path):
    async with pool(tmp_path, lease_ttl_ms=1500, heartbeat_idle_ms=300, heartbeat_busy_ms=200) as (coordinator, node):
        never = asyncio.Event()

        async def renew(_):
            await never.wait()

        coordinator.directory.enrolment.renew = renew
        request = certificate_request(node.credentials.key_pem)
        await node.send(certificate_request=node_pb2.CertificateRequest(certificate_request_der=request))
        for _ in range(10):
            await asyncio.sleep(0.2)
            await node.beat()
        assert not node.ended
        assert coordinator.gateway._links.session(node.credentials.node_id) is not None
