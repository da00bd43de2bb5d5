"""The request path where two things happen at once, or in an order that nobody planned: no slot, hold or attempt is left behind."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from potluck_coordinator.directory.enrolment import Enrolments
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.gateway import model_line
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import certificate_request
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import ModelId, ReplicaId
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, first_of, pool, read_all, request_of, settled_balance, token


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


async def test_a_turn_that_comes_with_the_deadline_leaves_no_slot_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(model_line, "HOLD_SECONDS_GUESS", 0.1)
    async with pool(tmp_path, queue_deadline_seconds=0.8) as (coordinator, node):
        requests = coordinator.gateway.requests
        answers = [(await begin(coordinator, node, number))[0] for number in range(2)]
        queued = asyncio.ensure_future(requests.begin(await request_of(coordinator)))
        async with asyncio.timeout(5):
            while requests.queues.queued_count(TINY) == 0:
                await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        loop.call_later(0.75, lambda: list(answers[0].close().__await__()))  # closes at once: nothing in it waits
        stand_still_until = loop.time() + 0.9
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


async def test_a_link_that_comes_back_while_the_directory_is_away_costs_nothing(tmp_path, monkeypatch):
    directory_is_there = asyncio.Event()
    directory_is_there.set()

    def held_up(ask):
        async def asked(*arguments, **named):
            await directory_is_there.wait()
            return await ask(*arguments, **named)

        return asked

    monkeypatch.setattr(Enrolments, "is_enrolled", held_up(Enrolments.is_enrolled))
    monkeypatch.setattr(Nodes, "open_session", held_up(Nodes.open_session))
    async with running_coordinator(tmp_path) as coordinator:
        credentials = await enrol(coordinator)
        async with raw_link(coordinator, credentials) as node:
            await node.hello()
            answer, start = await begin(coordinator, node)
            assert await first_of(answer) == token("one")
            directory_is_there.clear()
        async with raw_link(coordinator, credentials) as again:
            await again.hello(in_flight=(start.attempt_id,))
            assert again.epoch == node.epoch
            await again.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
            await again.end(start.attempt_id, 2)
            assert await read_all(answer) == token("two") + DONE
            directory_is_there.set()


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
        assert [(len(kind), kind.sample.slot_count) for kind in links.roster().kinds(TINY)] == [(1, 2)]
        assert links.roster().kinds(ModelId("gpt-of-my-own")) == ()


async def test_heartbeats_are_read_while_a_certificate_waits_for_the_directory(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        asked, never = asyncio.Event(), asyncio.Event()

        async def renew(_):
            asked.set()
            await never.wait()

        coordinator.directory.enrolment.renew = renew
        request = certificate_request(node.credentials.key_pem)
        await node.send(certificate_request=node_pb2.CertificateRequest(certificate_request_der=request))
        await asyncio.wait_for(asked.wait(), 5)
        node.received.clear()
        await node.beat()
        assert (await node.wait_for(lambda frame: frame.HasField("lease"), 5)).lease.epoch == node.epoch
