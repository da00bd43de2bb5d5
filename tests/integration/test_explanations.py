"""Why: what a real coordinator tells of a request that was answered, that waits or was lost, and of a node; and whom it tells."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from potluck.address import pool_address
from potluck.errors import NotFoundError, NotPermittedError
from potluck.explain_calls import explain_node, explain_request, explain_waiting
from potluck.transport import AsyncTransport
from potluck_coordinator.gateway.decisions import REFUSED_MAX, STORIES_MAX
from potluck_protocol.values import EndReason, NodeId, NodeState, RequestId
from tests.support.coordinator import TINY, running_coordinator
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, pool, read_all, request_of, token

NAME = RequestId("request")


@asynccontextmanager
async def asking(coordinator, api_key=None):
    """Calls as the operator, whose the requests of these tests are, or with another's key."""
    transport = AsyncTransport(pool_address(coordinator.url, api_key or coordinator.operator_key), 30)
    try:
        yield transport.unary
    finally:
        await transport.close()


async def stranger_key(coordinator):
    account = await coordinator.directory.accounts.create_account("stranger")
    _, key = await coordinator.directory.accounts.create_key(account.account_id, "key", 0)
    return key


async def tiny_of(ask, node):
    share = await ask(explain_node(node.credentials.node_id))
    return next(replica for replica in share.replicas if replica.model_id == TINY)


async def test_an_answered_request_tells_where_it_ran_and_what_each_candidate_would_have_cost(tmp_path):
    async with pool(tmp_path) as (coordinator, node), asking(coordinator) as ask:
        answer, start = await begin(coordinator, node)
        await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        await answer.close()
        story = await ask(explain_request(NAME))
        assert [step.kind for step in story.steps] == ["placed", "answered"]
        (chosen,) = story.steps[0].candidates
        assert (chosen.node_id, chosen.chosen) == (node.credentials.node_id, True)
        assert chosen.cost_seconds == pytest.approx(sum(chosen.terms_seconds.values()))
        assert {"line", "waiting", "reading", "writing", "cache", "loss"} == set(chosen.terms_seconds)
        assert f"charged {answer.charge_micro_credits} micro-credits" in story.steps[1].words


async def test_a_request_that_went_on_elsewhere_tells_why(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, asking(coordinator) as ask, AsyncExitStack() as links:
        first, second = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator))) for _ in range(2)]
        await first.hello()
        answer, start = await begin(coordinator, first, body=b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}', first=b"")
        await second.hello()
        await first.end(start.attempt_id, 1, EndReason.ENGINE_FAILED)
        reading = asyncio.ensure_future(read_all(answer))
        again = await second.next_start()
        await second.chunk(again.attempt_id, 0, token("hello") + USAGE_EVENT + DONE)
        await second.end(again.attempt_id, 1)
        await reading
        await answer.close()
        story = await ask(explain_request(NAME))
        assert [step.kind for step in story.steps] == ["placed", "failed", "restarted", "placed", "answered"]
        assert [step.node_id for step in story.steps if step.kind == "placed"] == [
            first.credentials.node_id,
            second.credentials.node_id,
        ]
        tried = [candidate.reason for candidate in story.steps[3].candidates if not candidate.chosen]
        assert any("tried before" in reason for reason in tried)


async def test_a_request_that_waits_tells_its_place_and_one_that_was_refused_why(tmp_path):
    async with pool(tmp_path, queue_deadline_seconds=20) as (coordinator, node), asking(coordinator) as ask:
        answers = [await begin(coordinator, node, number) for number in range(2)]
        waits = asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator)))
        while not coordinator.gateway.requests.queues.queued_count(answers[0][0]._request.model_id):
            await asyncio.sleep(0.01)
        found = await ask(explain_waiting(NAME))
        assert (found.waiting, found.position, found.waiting_count) == (True, 1, 1)
        assert 0 < found.deadline_ms <= 20_000
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        found = await ask(explain_waiting(NAME))
        assert not found.waiting
        assert "does not wait" in found.words
        assert f"`potluck explain {NAME} --request`" in found.words, "the name alone would be taken for a model's"
        await node.beat(NodeState.PAUSED)
        await asyncio.sleep(0.1)
        with pytest.raises(Exception, match="1 paused"):
            await coordinator.gateway.requests.begin(await request_of(coordinator))
        refused = (await ask(explain_request(NAME))).steps[-1]
        assert refused.kind == "refused"
        assert [candidate.reason for candidate in refused.candidates] == ["paused"]
        for answer, _ in answers:
            await answer.close()


async def test_a_node_tells_what_it_was_considered_for_and_what_keeps_it_from_requests_now(tmp_path):
    async with pool(tmp_path) as (coordinator, node), asking(coordinator) as ask:
        answer, _ = await begin(coordinator, node)
        replica = await tiny_of(ask, node)
        assert (replica.hurdle, replica.running_count, replica.considered_count, replica.chosen_count) == ("", 1, 1, 1)
        await node.beat(NodeState.PAUSED)
        async with asyncio.timeout(5):
            while not (replica := await tiny_of(ask, node)).hurdle:
                await asyncio.sleep(0.02)
        assert replica.hurdle == "paused"
        await answer.close()


async def test_what_a_node_costs_by_its_owners_habits_is_told_to_him_and_the_operator_alone(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, AsyncExitStack() as links:
        accounts = coordinator.directory.accounts
        people = [await accounts.create_account(name) for name in ("client", "owner")]
        keys = [(await accounts.create_key(person.account_id, "key", 0))[1] for person in people]
        owners = (None, people[1].account_id)
        nodes = [await links.enter_async_context(raw_link(coordinator, await enrol(coordinator, owner))) for owner in owners]
        for node in nodes:
            await node.hello()
        told = {}
        for person, key in zip((None, *people), (None, *keys), strict=True):
            request = await request_of(coordinator)
            if person is not None:
                request = replace(request, account_id=person.account_id)
            pending = asyncio.ensure_future(coordinator.gateway.requests.begin(request))
            placed_count = len(told) + 1
            async with asyncio.timeout(5):
                while sum(len(node.starts()) for node in nodes) < placed_count:
                    await asyncio.sleep(0.01)
            async with asking(coordinator, key) as ask:
                story = await ask(explain_request(NAME))
            (placed,) = [step for step in story.steps if step.kind == "placed"]
            told[person] = {candidate.node_id: candidate for candidate in placed.candidates if candidate.cost_seconds is not None}
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        operators, others = nodes[0].credentials.node_id, nodes[1].credentials.node_id
        every, few = {"line", "waiting", "reading", "writing", "cache", "loss"}, {"waiting", "reading", "rest"}
        client, owner = people
        shown = {person: {node_id: set(each.terms_seconds) for node_id, each in found.items()} for person, found in told.items()}
        assert shown[None] == {operators: every, others: every}
        assert shown[client] == {operators: few, others: few}
        assert shown[owner] == {operators: few, others: every}
        for found in told.values():
            for candidate in found.values():
                assert candidate.cost_seconds == pytest.approx(sum(candidate.terms_seconds.values()), abs=1e-12)
                assert candidate.reason


async def test_a_request_that_is_not_known_is_told_how_long_and_how_many_are_kept(tmp_path):
    async with running_coordinator(tmp_path) as coordinator, asking(coordinator) as ask:
        with pytest.raises(NotFoundError, match=f"15 minutes at most, and no more than {STORIES_MAX}, and {REFUSED_MAX} refused"):
            await ask(explain_request(NAME))


async def test_strangers_learn_nothing_not_even_that_a_request_exists(tmp_path):
    async with pool(tmp_path) as (coordinator, node):
        answer, _ = await begin(coordinator, node)
        async with asking(coordinator, await stranger_key(coordinator)) as ask:
            for call in (explain_request, explain_waiting):
                with pytest.raises(NotFoundError) as unknown:
                    await ask(call(NAME))
                with pytest.raises(NotFoundError) as never:
                    await ask(call(RequestId("never")))
                assert str(unknown.value).replace("request", "") == str(never.value).replace("never", "").replace("request", "")
            with pytest.raises(NotPermittedError):
                await ask(explain_node(node.credentials.node_id))
            with pytest.raises(NotFoundError):
                await ask(explain_node(NodeId("nobody")))
        await answer.close()
