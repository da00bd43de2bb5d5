"""The bounds of the request path: what a node claims, how long things may take, how often a request is placed, what waits at the end."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack

import grpc
import pytest

from potluck_coordinator.domain import ledger, requests
from potluck_coordinator.domain.delivered_text import UNSEEN_TOKENS_ALLOWANCE
from potluck_coordinator.domain.pricing import hold_amount
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_coordinator.gateway import attempt as attempt_module
from potluck_coordinator.gateway import dispatching, interceptors, ledger_writer, node_session, replica_view
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX
from potluck_coordinator.gateway.reporting import report_of
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import certificate_request
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import EndReason, GoodbyeReason, Heartbeat, KeyPrefix, NodeState
from tests.support.coordinator import TINY, running_coordinator
from tests.support.open_pool import ShiftedClock
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, first_of, pool, read_all, request_of, settled_balance, token, without_tier


async def test_no_claim_of_a_node_costs_more_than_was_held(tmp_path):
    claim = b'data: {"choices":[],"usage":{"prompt_tokens":999999999,"completion_tokens":999999999}}\n\n'
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node, completion_tokens_max=10)
        await node.chunk(start.attempt_id, 1, claim + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        held = 1000 * 1_000_000 - (await settled_balance(coordinator)).available_micro_credits
        assert answer.charge_micro_credits == held < 999_999_999


@pytest.mark.parametrize("count", [999_999_999, int("9" * 400)], ids=["huge", "beyond all counting"])
async def test_a_nodes_count_is_worth_no_more_than_what_came_of_it(tmp_path, count):
    claim = b'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":' + str(count).encode() + b"}}\n\n"
    async with pool(tmp_path) as (coordinator, node):
        caller = Caller(KeyPrefix("key"), KeyQuotas(tokens_per_day=1_000_000))
        answer, start = await begin(coordinator, node, completion_tokens_max=100, caller=caller)
        await node.chunk(start.attempt_id, 1, token("two") + claim + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        await answer.close()
        tokens_max = len("onetwo") + UNSEEN_TOKENS_ALLOWANCE
        assert 2 * 4 <= answer.charge_micro_credits <= 12 + 4 * tokens_max
        (use,) = coordinator.gateway.requests.gate._uses.values()
        assert (use.running_count, use.pending_tokens) == (0, 0.0)
        assert use.token_count <= 12 + tokens_max
        assert coordinator.gateway.requests.in_flight_count == 0
        await settled_balance(coordinator)


async def test_no_number_of_relayed_events_costs_more_than_was_held(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node, completion_tokens_max=1)
        await node.chunk(start.attempt_id, 1, token("x") * 5000)
        received = b""
        while received.count(b"\n\n") < 5001:
            received += await asyncio.wait_for(answer.next_data(), 5)
        await answer.close()
        paid = 1000 * 1_000_000 - (await settled_balance(coordinator)).available_micro_credits
        assert 0 < paid == answer.charge_micro_credits < 5000 * 4


async def test_an_answer_that_takes_too_long_fails_and_frees_its_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatching, "REQUEST_SECONDS_MAX", 0.3)
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        with pytest.raises(PotluckError) as failure:
            await read_all(answer)
        assert failure.value.code is ErrorCode.ENGINE_FAILED
        await answer.close()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 1)
        assert coordinator.gateway.requests.in_flight_count == 0


async def test_an_answer_does_not_wait_for_its_hold_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt_module, "HOLD_SECONDS_MAX", 0.2)
    async with pool(tmp_path) as (coordinator, node):
        real, released = coordinator.directory.ledger.apply, asyncio.Event()

        async def late(commands):
            await released.wait()
            return await real(commands)

        monkeypatch.setattr(coordinator.directory.ledger, "apply", late)
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(work, 5)
        assert failure.value.code is ErrorCode.INTERNAL_ERROR  # not one that clients repeat: the engine has worked
        released.set()
        assert (await settled_balance(coordinator)).earned_micro_credits == 0


async def test_a_node_has_no_more_attempts_than_its_bound(tmp_path, monkeypatch):
    for module in (node_session, replica_view):
        monkeypatch.setattr(module, "ATTEMPTS_PER_NODE_MAX", 1)
    async with pool(tmp_path) as (coordinator, node):
        first, _ = await begin(coordinator, node)
        second = asyncio.ensure_future(begin(coordinator, node, number=1))
        while not coordinator.gateway.requests.queues.queued_count(TINY):
            await asyncio.sleep(0.01)
        assert len(node.starts()) == 1
        await first.close()
        answer, _ = await second
        await answer.close()


async def test_two_requests_of_the_largest_size_do_not_break_the_link(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        largest = await request_of(coordinator, body=b"x" * BODY_BYTES_MAX)
        # Begun in the same turn of the loop: both wait for the same frame.
        both = [asyncio.ensure_future(coordinator.gateway.requests.begin(largest)) for _ in range(2)]
        for number, work in enumerate(both):
            start = await node.next_start(number)
            assert len(start.body) == BODY_BYTES_MAX
            await node.chunk(start.attempt_id, 0, token("one"))
            await (await asyncio.wait_for(work, 5)).close()
        assert len(node.starts()) == 2


async def test_what_cannot_fit_reaches_no_node(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        requests_ = coordinator.gateway.requests
        context = next(model.entry.context_length_tokens for model in requests_.models() if model.entry.model_id == TINY)
        with pytest.raises(PotluckError) as failure:
            await requests_.begin(await request_of(coordinator, prompt_tokens_min=context + 1))
        assert (failure.value.code, failure.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "messages")
        assert str(context) in failure.value.message
        fitting = asyncio.ensure_future(requests_.begin(await request_of(coordinator, prompt_tokens_min=context)))
        start = await node.next_start()
        await node.end(start.attempt_id, 0, EndReason.ENGINE_FAILED)
        with pytest.raises(PotluckError):
            await fitting
        assert len(node.starts()) == 1


async def test_a_node_that_was_stepped_down_is_not_asked_what_it_has_no_room_for(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        short = dataclasses.replace(node.status, context_length_tokens=128)
        await node.send(heartbeat=codec.heartbeat_message(Heartbeat(1, NodeState.SERVING, (short,), 1 << 40)))
        session = coordinator.gateway._links.session(node.credentials.node_id)
        async with asyncio.timeout(5):
            while [replica.context_length_tokens for replica in session.replica_views(TINY)] != [128]:
                await asyncio.sleep(0.01)
        with pytest.raises(PotluckError, match="1 with a context of 128 tokens, too short for it"):
            await coordinator.gateway.requests.begin(await request_of(coordinator, prompt_tokens_min=300))
        assert node.starts() == []


async def test_a_request_that_every_node_refuses_is_offered_to_each_of_some_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "REFUSALS_MAX", 3)

    async def refuse(node):
        start = await node.next_start()
        await node.end(start.attempt_id, 0, EndReason.REFUSED)

    async with running_coordinator(tmp_path) as coordinator, AsyncExitStack() as links:
        nodes = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator))) for _ in range(4)]
        for node in nodes:
            await node.hello()
        refusals = [asyncio.ensure_future(refuse(node)) for node in nodes]
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(coordinator.gateway.requests.begin(await request_of(coordinator)), 5)
        await asyncio.sleep(0.1)
        for refusal in refusals:
            refusal.cancel()
        assert failure.value.code is ErrorCode.NO_CAPACITY
        assert sum(len(node.starts()) for node in nodes) == 3


async def test_a_request_that_its_node_gives_back_waits_only_for_the_rest_of_its_time(tmp_path, monkeypatch):
    wait_seconds = 60.0
    async with running_coordinator(tmp_path, queue_deadline_seconds=wait_seconds) as coordinator, AsyncExitStack() as links:
        clock = ShiftedClock()
        monkeypatch.setattr(coordinator.gateway.requests, "_clock", clock)
        busy, refusing = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator))) for _ in range(2)]
        await busy.hello(engines=(dataclasses.replace(busy.status, slot_count=1),))
        answer, _ = await begin(coordinator, busy)
        await refusing.hello()
        given_back = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        start = await refusing.next_start()
        clock.shift_seconds = wait_seconds - 0.3
        await refusing.end(start.attempt_id, 0, EndReason.REFUSED)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(given_back, 5)
        assert failure.value.code is ErrorCode.QUEUE_FULL, "it would not come to its turn in what is left of its time"
        await answer.close()


async def test_a_request_whose_hold_cannot_be_asked_for_leaves_its_slot(tmp_path, monkeypatch):
    async with pool(tmp_path) as (coordinator, node):
        with monkeypatch.context() as patch:
            patch.setattr(ledger_writer, "QUEUE_LENGTH_MAX", 0)
            with pytest.raises(PotluckError) as failure:
                await asyncio.wait_for(coordinator.gateway.requests.begin(await request_of(coordinator)), 5)
        assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
        session = coordinator.gateway._links.session(node.credentials.node_id)
        assert (session.attempts, sum(session.attempts_by_replica.values())) == ({}, 0)
        # Both slots are there, and the node heard of nothing else.
        answers = [(await begin(coordinator, node, number))[0] for number in range(2)]
        assert len(node.starts()) == 2
        for answer in answers:
            await answer.close()


async def test_an_attempt_that_its_node_forgot_is_only_started_again_if_nothing_came_of_it(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            begun, _ = await begin(coordinator, node)
            waiting = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
            lost = await node.next_start(1)
        async with raw_link(coordinator, credentials) as again:
            await again.hello(in_flight=())
            start = await again.next_start()
            assert start == lost
            assert len(again.starts()) == 1
            with pytest.raises(PotluckError) as failure:
                await read_all(begun)
            assert failure.value.code is ErrorCode.NODE_LOST
            await again.chunk(start.attempt_id, 0, token("one") + DONE)
            await again.end(start.attempt_id, 1)
            answer = await asyncio.wait_for(waiting, 5)
            assert without_tier(await read_all(answer)) == token("one") + DONE
        await begun.close()


async def test_answers_of_a_stopping_coordinator_do_not_look_repeatable(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, _ = await begin(coordinator, node)
        assert await first_of(answer) == token("one")
        await coordinator.gateway.requests.stop()
        # Settled before anybody reads on: a client that does not read must not cost the node its pay.
        assert (await settled_balance(coordinator)).earned_micro_credits == 4
        with pytest.raises(PotluckError) as failure:
            await read_all(answer)
        assert failure.value.code is ErrorCode.NODE_LOST


async def test_a_node_that_asks_for_certificates_without_end_has_one_request_at_work(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asked, answered = 0, asyncio.Event()

        async def renew(_):
            nonlocal asked
            asked += 1
            await answered.wait()
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)

        coordinator.directory.enrolment.renew = renew
        request = node_pb2.CertificateRequest(certificate_request_der=certificate_request(node.credentials.key_pem))
        for _ in range(50):
            await node.send(certificate_request=request)
        await node.beat()
        await node.wait_for(lambda frame: frame.HasField("lease"))
        assert asked == 1
        answered.set()
        while asked == 1:
            await node.send(certificate_request=request)
            await asyncio.sleep(0.01)
        assert asked == 2


async def test_time_without_a_link_is_not_counted_as_served(tmp_path):
    async with running_coordinator(tmp_path, link_grace_ms=60_000) as coordinator:
        async with raw_link(coordinator, await enrol(coordinator)) as node:
            await node.hello()
            session = coordinator.gateway._links.session(node.credentials.node_id)
        async with asyncio.timeout(5):
            while session.outbox is not None:
                await asyncio.sleep(0.01)
        assert report_of(session, session.heartbeat_at + 10).covered_seconds == session.link_lost_at - session.heartbeat_at
        assert report_of(session, session.heartbeat_at + 20).covered_seconds == 0


async def test_credits_for_one_hold_are_enough_for_one_request_after_the_other(tmp_path):
    async with pool(tmp_path, grant_credits=0) as (coordinator, node):
        account = (await coordinator.directory.accounts.list_accounts())[0].account_id
        entry = coordinator.gateway.requests.models()[0].entry
        request = await request_of(coordinator)
        needed = hold_amount(entry, request.prompt_bytes, request.completion_tokens_max, request.answer_count, request.prompt_count)
        given = ledger.grant(account, needed * 3 // 2)
        await coordinator.directory._store.run(lambda work: work.ledger.post(given, 1))
        for number in range(5):
            answer, start = await begin(coordinator, node, number)
            await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
            await node.end(start.attempt_id, 2)
            await read_all(answer)
        assert (await settled_balance(coordinator)).available_micro_credits == needed * 3 // 2 - 5 * 18


async def test_a_node_that_leaves_hears_whether_that_was_written_down(tmp_path, monkeypatch):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        desk, real = coordinator.directory.nodes, coordinator.directory.nodes.close_session

        async def away(*_):
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)

        for close_session, expected in ((away, grpc.StatusCode.UNAVAILABLE), (real, grpc.StatusCode.OK)):
            monkeypatch.setattr(desk, "close_session", close_session)
            async with raw_link(coordinator, credentials) as node:
                await node.hello()
                await node.goodbye(GoodbyeReason.LEAVING)
                await node.call.done_writing()
                assert await asyncio.wait_for(node.call.code(), 5) is expected


async def test_a_node_has_no_more_links_than_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(interceptors, "LINKS_PER_NODE_MAX", 1)
    async with pool(tmp_path) as (coordinator, node):
        async with raw_link(coordinator, node.credentials) as second:
            assert await asyncio.wait_for(second.call.code(), 5) is grpc.StatusCode.UNAVAILABLE
        async with raw_link(coordinator, await enrol(coordinator)) as other:
            await other.hello()


async def test_an_answer_past_its_time_gives_its_slot_back_although_nobody_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatching, "REQUEST_SECONDS_MAX", 0.3)
    async with pool(tmp_path) as (coordinator, node):
        answer, start = await begin(coordinator, node)
        cancelled = await node.wait_for(lambda frame: bool(frame.cancels))
        assert [cancel.attempt_id for cancel in cancelled.cancels] == [start.attempt_id]
        assert coordinator.gateway._links.session(node.credentials.node_id).attempts == {}
        await answer.close()


@pytest.mark.parametrize("status", [0, 100, 204, 302])
async def test_a_node_that_sends_neither_an_answer_nor_an_error_has_failed(tmp_path, status):
    async with pool(tmp_path) as (coordinator, node):
        work = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator, stream=False)))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, b"x", "application/json", status=status)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(work, 5)
        assert failure.value.code is ErrorCode.ENGINE_FAILED


async def test_a_node_that_works_for_nobody_is_told_to_stop(tmp_path):
    async with pool(tmp_path) as (_, node):
        await node.chunk("x" * 65, 0, token("one"))
        await node.chunk("forgotten", 0, token("one"))
        told = await node.wait_for(lambda frame: bool(frame.cancels))
        assert [cancel.attempt_id for cancel in told.cancels] == ["forgotten"]


@pytest.mark.parametrize("ours", [GoodbyeReason.COORDINATOR_STOPPING, GoodbyeReason.LEASE_ENDED])
async def test_a_leave_that_crosses_the_coordinators_goodbye_was_not_heard(tmp_path, ours):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        links = coordinator.gateway._links
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            links.close(links.session(credentials.node_id), None, ours)
            await node.goodbye(GoodbyeReason.LEAVING)
            await node.call.done_writing()
            assert await asyncio.wait_for(node.call.code(), 5) is grpc.StatusCode.UNAVAILABLE


async def test_a_node_that_left_is_told_so_and_not_that_it_was_revoked(tmp_path):
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            await node.goodbye(GoodbyeReason.LEAVING)
            await node.call.done_writing()
            assert await asyncio.wait_for(node.call.code(), 5) is grpc.StatusCode.OK
        async with asyncio.timeout(5):
            while credentials.node_id not in coordinator.gateway._links.outcasts:
                await asyncio.sleep(0.01)
        async with raw_link(coordinator, credentials) as node:
            assert "no longer part of the pool" in await asyncio.wait_for(node.call.details(), 5)


async def test_a_nodes_words_do_nothing_to_the_terminal_that_shows_them(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, raw_link(coordinator, await enrol(coordinator)) as node:
        status = dataclasses.replace(node.status, engine_version="1\x1b]0;mine\x07\n2", failure="one\ntwo\x1b[2J")
        await node.hello(engines=(status,))
        session = coordinator.gateway._links.session(node.credentials.node_id)
        (shown,) = session.engines.values()
        assert (shown.engine_version, shown.failure) == ("1 ]0;mine  2", "one\ntwo [2J")
