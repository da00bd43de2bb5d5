"""Who demands trusted nodes has nobody else: real gateway, directory, links and books; the nodes' words are the test's."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from potluck import AsyncClient, Client, NoCapacityError, calls
from potluck.address import pool_address
from potluck.explain_calls import explain_node, explain_request, explain_waiting
from potluck.transport import AsyncTransport
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.judging import Elsewhere
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EndReason, GoodbyeReason, Hello, Inventory, NodeState, RequestId, SessionId
from tests.integration.test_node_desk import hello as hello_of
from tests.integration.test_node_desk import node_desk
from tests.support.coordinator import TINY
from tests.support.hedged_pool import give_up, hedged_pool, say, whole
from tests.support.raw_node import RawNode
from tests.support.request_path import read_all
from tests.support.two_owners import (
    LOSSES,
    PROMPT_TOKENS,
    USER,
    TwoOwners,
    begun,
    crash_engine,
    end,
    role,
    text,
    two_owners,
    until,
)

WHOLE = role("first") + text("first", "Once") + end("first", PROMPT_TOKENS, 1)
DOCUMENT = (
    b'{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"text":"hi","finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6}}'
)


async def trust(pool: TwoOwners, node: RawNode, *, trusted: bool = True) -> None:
    """The operator's word, by the desk; returns when the gateway has heard of it."""
    node_id = node.credentials.node_id
    await pool.coordinator.directory.nodes.set_node_trust(node_id, trusted=trusted)
    session = pool.coordinator.gateway._links.session(node_id)
    await until(lambda: (node.status.replica_id in session.word.trusted) is trusted)


@asynccontextmanager
async def operator_calls(pool: TwoOwners):
    transport = AsyncTransport(pool_address(pool.coordinator.url, pool.coordinator.operator_key), 30)
    try:
        yield transport.unary
    finally:
        await transport.close()


def demand(pool: TwoOwners, name: str) -> asyncio.Task[Answer]:
    """A request that demands trusted nodes, by a name of its own."""
    request = replace(pool.request(trusted_only=True), request_id=RequestId(name))
    return asyncio.ensure_future(pool.coordinator.gateway.requests.begin(request))


async def finish(pool: TwoOwners, node: RawNode, start: Any, asking: asyncio.Task[Any]) -> bytes:
    await node.chunk(start.attempt_id, 0, WHOLE)
    await node.end(start.attempt_id, 1)
    answer = await asyncio.wait_for(asking, 5)
    received = await read_all(answer)
    await answer.close()
    return received


async def test_it_waits_for_the_trusted_node_while_another_stands_idle(tmp_path):
    async with two_owners(tmp_path, queue_deadline_seconds=60) as pool, operator_calls(pool) as ask:
        other, trusted = pool.nodes
        await trust(pool, trusted)
        running = [demand(pool, f"running {number}") for number in range(2)]
        starts = [await trusted.next_start(number) for number in range(2)]
        waiting = demand(pool, "waiting")
        await until(lambda: pool.queued_count == 1)
        # A review sends nobody away.
        queues = pool.coordinator.gateway.requests.queues
        queues.line(TINY).reviewed_at_seconds = 0.0
        queues.serve_all()
        assert not other.starts()
        seen = await ask(explain_waiting(RequestId("waiting")))
        assert (seen.waiting, seen.position) == (True, 1)
        assert {candidate.reason: candidate.replica_count for candidate in seen.candidates} == {"not trusted": 1, "busy": 1}
        # Who demands nothing is served at once beside it.
        free = pool.ask()
        await finish(pool, other, await other.next_start(), free)
        for start, asking in zip(starts, running, strict=True):
            await finish(pool, trusted, start, asking)
        await finish(pool, trusted, await trusted.next_start(2), waiting)
        assert len(other.starts()) == 1
        story = await ask(explain_request(RequestId("waiting")))
        assert any(candidate.reason == "not trusted" for step in story.steps for candidate in step.candidates)
        share = await ask(explain_node(other.credentials.node_id))
        assert sum(replica.losses.get("not trusted", 0) for replica in share.replicas if replica.model_id == TINY) == 3
        mine = await ask(explain_node(trusted.credentials.node_id))
        assert all("not trusted" not in replica.losses for replica in mine.replicas)


@pytest.mark.parametrize("lose", LOSSES)
async def test_an_answer_whose_trusted_node_is_lost_ends_rather_than_go_on_elsewhere(tmp_path, lose):
    async with two_owners(tmp_path) as pool:
        other, trusted = pool.nodes
        await trust(pool, trusted)
        answer, _, first, start = await begun(pool, "Once", " upon", trusted_only=True)
        assert first is trusted
        await lose(pool, first, start)
        with pytest.raises(PotluckError) as failure:
            await read_all(answer)
        await answer.close()
        assert failure.value.code in {ErrorCode.NODE_LOST, ErrorCode.ENGINE_FAILED, ErrorCode.NO_CAPACITY}
        assert "Nobody could go on with the answer: No trusted node serves the model" in failure.value.message
        assert "potluck nodes trust" in failure.value.message
        assert not other.starts()
        spent, earned = await pool.paid()
        assert spent == sum(earned) == earned[1] == 2 * 4


async def test_one_that_was_not_begun_ends_so_too_and_does_not_begin_anew_elsewhere(tmp_path):
    async with two_owners(tmp_path) as pool:
        other, trusted = pool.nodes
        await trust(pool, trusted)
        asking = pool.ask(trusted_only=True)
        start = await trusted.next_start()
        await trusted.end(start.attempt_id, 0, EndReason.ENGINE_FAILED)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(asking, 5)
        assert failure.value.code is ErrorCode.ENGINE_FAILED
        assert not other.starts()
        assert await pool.paid() == (0, [0, 0])


async def test_an_answer_goes_on_at_another_trusted_node(tmp_path):
    async with two_owners(tmp_path, node_count=3) as pool:
        other, *trusted = pool.nodes
        for node in trusted:
            await trust(pool, node)
        answer, received, first, start = await begun(pool, "Once", trusted_only=True)
        await crash_engine(pool, first, start)
        reading = asyncio.ensure_future(read_all(answer))
        second, again = await pool.started(besides=(first,))
        assert second is next(node for node in trusted if node is not first)
        await second.chunk(again.attempt_id, 0, role("second") + text("second", " upon") + end("second", PROMPT_TOKENS + 1, 1))
        await second.end(again.attempt_id, 1)
        received += await reading
        await answer.close()
        assert b" upon" in received
        assert not other.starts()


async def test_a_late_first_token_brings_no_hedge_on_a_node_that_is_not_trusted(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        await trust(hedged.pool, hedged.pool.nodes[0])
        asking = hedged.ask(trusted_only=True)
        first, start = await hedged.next_attempt()
        assert first is hedged.pool.nodes[0]
        await hedged.no_attempt()
        assert hedged.steps() == ["placed", "not_hedged"]
        await say(first, start, "first")
        await whole(asking)
        # The same pool hedges who demands nothing.
        asking, *_ = await hedged.late()
        await give_up(asking)


@pytest.mark.parametrize("stream", [True, False])
async def test_where_nobody_is_trusted_it_is_refused_at_once_and_told_what_to_do(tmp_path, stream):
    async with two_owners(tmp_path) as pool:
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(pool.ask(trusted_only=True, stream=stream), 1)
        assert failure.value.code is ErrorCode.NO_CAPACITY
        assert failure.value.message.startswith("No trusted node serves the model right now")
        assert failure.value.message.endswith("Replicas: 2 not trusted.")
        assert not any(node.starts() for node in pool.nodes)


async def test_trust_that_is_taken_back_counts_for_the_next_request_and_for_one_that_waits(tmp_path):
    async with two_owners(tmp_path, queue_deadline_seconds=60) as pool:
        other, trusted = pool.nodes
        await trust(pool, trusted)
        running = [pool.ask(trusted_only=True) for _ in range(2)]
        starts = [await trusted.next_start(number) for number in range(2)]
        waiting = pool.ask(trusted_only=True)
        await until(lambda: pool.queued_count == 1)
        await trust(pool, trusted, trusted=False)
        for asking in (waiting, pool.ask(trusted_only=True)):
            with pytest.raises(PotluckError, match="No trusted node serves the model") as failure:
                await asyncio.wait_for(asking, 2)
            assert failure.value.code is ErrorCode.NO_CAPACITY
        # What is under way there was placed when it was trusted.
        for start, asking in zip(starts, running, strict=True):
            await finish(pool, trusted, start, asking)
        await trust(pool, other)
        asking = pool.ask(trusted_only=True)
        await finish(pool, other, await other.next_start(), asking)
        assert len(trusted.starts()) == 2


async def test_where_else_it_could_go_counts_trusted_nodes_alone(tmp_path):
    """By this a suspect waits for a second opinion, and an attempt that stalls is given up."""
    async with two_owners(tmp_path) as pool:
        await trust(pool, pool.nodes[0])
        links, others = pool.coordinator.gateway._links, frozenset({pool.nodes[0].credentials.node_id})
        for demands in (False, True):
            request = pool.request(trusted_only=demands)
            assert links.others_can_take(request, pool.owners[0]) is not demands
            assert links.others_can_take(request, pool.owners[1])
            assert links._elsewhere(request, others) == Elsewhere(not demands, not demands)


async def test_a_trusted_node_that_dials_again_is_trusted(tmp_path):
    async with two_owners(tmp_path) as pool:
        trusted = pool.nodes[1]
        await trust(pool, trusted)
        await trusted.goodbye()
        await trusted.wait_until_ended()
        directory = pool.coordinator.directory.nodes
        assert [record.trusted for record in await directory.list_nodes()] == [False, True]
        said = Hello(1, trusted.credentials.node_id, SessionId("next"), "raw", Inventory(), NodeState.SERVING, engines=(trusted.status,))
        session, _, _ = await pool.coordinator.gateway._links.connect(said)
        assert [view.is_trusted for view in session.replica_views(TINY)] == [True]


async def test_trust_is_kept_by_the_books_and_ends_with_membership(database_url):
    async with node_desk(database_url, "a", "b") as (books, board, nodes):
        for name in ("a", "b"):
            await nodes.set_node_trust(name, trusted=True)
        assert board.snapshot.trusted_replicas == {"a/tiny", "b/tiny"}
        again = Nodes(books.store, board, books.clock, 15.0)
        board.publish(trusted_replicas=frozenset())
        await again.refresh()
        assert board.snapshot.trusted_replicas == {"a/tiny", "b/tiny"}
        await again.set_node_trust("b", trusted=False)
        await again.set_node_trust("b", trusted=False)
        assert board.snapshot.trusted_replicas == {"a/tiny"}
        grant = await again.open_session(hello_of("a"), gateway_epoch=1)
        await again.close_session("a", grant.epoch, GoodbyeReason.LEAVING)
        assert board.snapshot.trusted_replicas == set()
        with pytest.raises(PotluckError, match="not in the pool any more"):
            await again.set_node_trust("a", trusted=True)
        owner = books.run_now(lambda work: work.nodes.get("a")).owner_account_id
        assert books.run_now(lambda work: work.nodes.come_back("a", owner, "a", Inventory(memory_bytes=8 << 30)))
        await again.refresh()
        assert set(board.snapshot.desired) == {"a", "b"}
        assert board.snapshot.trusted_replicas == set(), "who comes back is a stranger"
        with pytest.raises(PotluckError, match="There is no node nobody") as failure:
            await again.set_node_trust("nobody", trusted=True)
        assert failure.value.code is ErrorCode.NOT_FOUND


async def test_trust_counts_where_planning_fails(database_url, monkeypatch):
    async with node_desk(database_url, "a") as (_, board, nodes):
        await nodes.set_node_trust("a", trusted=True)

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(nodes._planner, "advance", fail)
        await nodes.set_node_trust("a", trusted=False)
        assert board.snapshot.trusted_replicas == set()


PATHS = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "Tell me a story, please."},
    "/v1/embeddings": {"input": "x"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["", "Required", "true", "preferred", "required, required", "none"])
async def test_another_word_in_the_header_is_refused_by_name(edge, path, value):
    pool, session = edge
    async with session.post(path, json={"model": TINY, **PATHS[path]}, headers={"x-potluck-trust": value}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "x-potluck-trust")
    assert "'required'" in error["message"]
    assert not any(node.starts() for node in pool.nodes)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_header_keeps_a_request_to_trusted_nodes(edge, path):
    pool, session = edge
    asked = {"model": TINY, **PATHS[path]}
    async with session.post(path, json=asked, headers={"x-potluck-trust": "required"}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (503, "no_capacity")
        assert error["message"].startswith("No trusted node serves the model")
    trusted = pool.nodes[1]
    await trust(pool, trusted)
    for number in range(3):
        asking = asyncio.ensure_future(session.post(path, json=asked, headers={"x-potluck-trust": "required"}))
        start = await trusted.next_start(number)
        assert b"trust" not in start.body, "it is between client and pool"
        await trusted.chunk(start.attempt_id, 0, DOCUMENT, "application/json")
        await trusted.end(start.attempt_id, 1)
        async with await asyncio.wait_for(asking, 5) as response:
            assert (response.status, response.headers["x-potluck-node"]) == (200, trusted.credentials.node_id)
    assert not pool.nodes[0].starts()


async def test_the_demand_is_a_part_of_what_the_same_request_means(edge):
    pool, session = edge
    asked, keyed = {"model": TINY, "messages": [USER]}, {"idempotency-key": "once"}
    asking = asyncio.ensure_future(session.post("/v1/chat/completions", json=asked, headers=keyed))
    node, start = await pool.started()
    await node.chunk(start.attempt_id, 0, DOCUMENT, "application/json")
    await node.end(start.attempt_id, 1)
    async with await asyncio.wait_for(asking, 5) as response:
        assert response.status == 200
    async with session.post("/v1/chat/completions", json=asked, headers=keyed) as response:
        assert (response.status, response.headers["idempotent-replayed"]) == (200, "true")
    async with session.post("/v1/chat/completions", json=asked, headers=keyed | {"x-potluck-trust": "required"}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (422, "idempotency_key_reused")


@pytest.fixture
async def edge(tmp_path):
    """A pool that nobody of is trusted yet, and a client of its HTTP port."""
    async with two_owners(tmp_path) as pool:
        _, key = await pool.coordinator.directory.accounts.create_key(pool.client, "test", 0)
        async with aiohttp.ClientSession(pool.coordinator.url, headers={"authorization": f"Bearer {key}"}) as session:
            yield pool, session


async def test_the_sdk_demands_it_and_shows_who_is_trusted(edge):
    pool, _ = edge
    _, key = await pool.coordinator.directory.accounts.create_key(pool.client, "sdk", 0)
    trusted = pool.nodes[1]
    async with AsyncClient(pool.coordinator.url, api_key=key) as client, operator_calls(pool) as ask:
        with pytest.raises(NoCapacityError, match="No trusted node serves the model"):
            await asyncio.wait_for(client.chat([USER], model=TINY, trusted_only=True), 15)
        await ask(calls.set_node_trust(trusted.credentials.node_id, trusted=True))
        assert {node.node_id: node.trusted for node in await client.nodes()} == {
            pool.nodes[0].credentials.node_id: False,
            trusted.credentials.node_id: True,
        }, "a stranger sees it, too"
        session = pool.coordinator.gateway._links.session(trusted.credentials.node_id)
        await until(lambda: trusted.status.replica_id in session.word.trusted)
        blocking = Client(pool.coordinator.url, api_key=key)
        asked = [
            lambda: client.chat([USER], model=TINY, trusted_only=True),
            lambda: client.complete("Once", model=TINY, trusted_only=True),
            lambda: asyncio.to_thread(blocking.chat, [USER], model=TINY, trusted_only=True),
            lambda: asyncio.to_thread(blocking.complete, "Once", model=TINY, trusted_only=True),
        ]
        for number, begin in enumerate(asked):
            asking = asyncio.ensure_future(begin())
            start = await trusted.next_start(number)
            assert "trusted_only" not in json.loads(start.body)
            await trusted.chunk(start.attempt_id, 0, DOCUMENT, "application/json")
            await trusted.end(start.attempt_id, 1)
            result = await asyncio.wait_for(asking, 5)
            assert (result.text, result.node_id) == ("hi", trusted.credentials.node_id)
        async with await streamed(client, trusted, 4) as stream:
            assert (await stream.result()).text == "Once"
        blocking.close()
    assert not pool.nodes[0].starts()


async def streamed(client: AsyncClient, node: RawNode, number: int) -> Any:
    asking = asyncio.ensure_future(client.chat([USER], model=TINY, stream=True, trusted_only=True))
    start = await node.next_start(number)
    await node.chunk(start.attempt_id, 0, WHOLE)
    await node.end(start.attempt_id, 1)
    return await asyncio.wait_for(asking, 5)
