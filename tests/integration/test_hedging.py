"""A second attempt where the first token is late: real gateway, directory, links and books; the nodes' words are the test's."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from potluck import AsyncClient
from potluck_coordinator.domain.hedging import CANCEL_TOKENS
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EndReason, Usage
from tests.support.coordinator import TINY
from tests.support.hedged_pool import ANSWER, PRICE, PROMPT_TOKENS, give_up, hedged_pool, say, whole
from tests.support.request_path import read_all
from tests.support.two_owners import DONE, crash_engine, end, role, text, until


@pytest.mark.parametrize("has_head", [False, True], ids=["silent", "only its head"])
async def test_the_hedge_that_gives_its_token_first_is_the_answer_and_the_first_is_cancelled_unpaid(tmp_path, has_head):
    async with hedged_pool(tmp_path) as hedged:
        pool = hedged.pool
        before, earned_before = await pool.paid()
        budget = hedged.requests.hedging.budget.tokens
        asking = hedged.ask()
        first, start = await hedged.next_attempt()
        if has_head:
            await first.chunk(start.attempt_id, 0, b"")
        second, again = await hedged.next_attempt()
        assert again.body == start.body
        assert hedged.requests.hedging.budget.tokens == pytest.approx(budget - PRICE, abs=CANCEL_TOKENS)
        reading = asyncio.ensure_future(whole(asking))
        await second.chunk(again.attempt_id, 0, role("second") + text("second", "Once"))
        await hedged.cancelled(first, start)
        await first.chunk(start.attempt_id, int(has_head), role("first") + text("first", "ghost"))
        await first.end(start.attempt_id, 1 + int(has_head))
        await second.chunk(again.attempt_id, 1, text("second", " upon") + end("second", PROMPT_TOKENS, 2))
        await second.end(again.attempt_id, 2)
        answer, received = await asyncio.wait_for(reading, 5)
        assert received.count(DONE) == 1
        assert b"ghost" not in received
        assert b'"id":"first"' not in received
        assert answer.usage == Usage(PROMPT_TOKENS, 2, 0)
        assert answer.node_ids == (second.credentials.node_id,)
        spent, earned = await pool.paid()
        gained = [after - earlier for after, earlier in zip(earned, earned_before, strict=True)]
        assert spent - before == answer.charge_micro_credits == ANSWER
        assert (gained[pool.number(first)], gained[pool.number(second)]) == (0, ANSWER)
        assert hedged.steps() == ["placed", "hedged", "hedge_over", "answered"]
        assert hedged.metric("potluck_hedges", "won") == 1
        assert hedged.metric("potluck_hedge_wasted_tokens", "won") == PRICE
        assert hedged.requests.hedging.budget.tokens == pytest.approx(budget + 0.03 * (PROMPT_TOKENS + 2) - PRICE)
        assert not hedged.links.suspicions._suspicions, "to be late is no failure"


async def test_what_explains_a_request_tells_the_hedge_and_why(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking, first, start, second, again = await hedged.late()
        await say(second, again, "second")
        await whole(asking)
        _, begun, over, _ = hedged.story().steps
        assert (begun.node_id, begun.attempt_id) == (second.credentials.node_id, again.attempt_id)
        assert "no first token after 0.25 s, which 95 of 100 here do not take; it may waste" in begun.words
        reasons = {candidate.node_id: candidate.reason for candidate in begun.placement.candidates}
        assert reasons[second.credentials.node_id] == "chosen"
        assert over.words == "won: its first token came first"
        await hedged.cancelled(first, start)


async def test_a_first_attempt_that_gives_its_token_after_all_is_the_answer_and_the_hedge_is_cancelled_unpaid(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        pool = hedged.pool
        before, earned_before = await pool.paid()
        asking, first, start, second, again = await hedged.late()
        await first.chunk(start.attempt_id, 0, role("first") + text("first", "Once"))
        answer = await asyncio.wait_for(asking, 5)
        received = await asyncio.wait_for(answer.next_data(), 5)
        await hedged.cancelled(second, again)
        await second.chunk(again.attempt_id, 0, role("second") + text("second", "ghost"))
        await first.chunk(start.attempt_id, 1, text("first", " upon") + end("first", PROMPT_TOKENS, 2))
        await first.end(start.attempt_id, 2)
        received += await asyncio.wait_for(read_all(answer), 5)
        assert received.count(DONE) == 1
        assert b"ghost" not in received
        assert answer.node_ids == (first.credentials.node_id,)
        spent, earned = await pool.paid()
        assert spent - before == ANSWER
        assert earned[pool.number(second)] == earned_before[pool.number(second)]
        await answer.close()
        assert hedged.steps() == ["placed", "hedged", "hedge_over", "answered"]
        assert hedged.metric("potluck_hedges", "lost") == 1
        assert hedged.metric("potluck_hedge_wasted_tokens", "lost") == PRICE
        assert not hedged.links.suspicions._suspicions


async def test_when_both_tokens_come_at_once_one_stream_is_read_and_the_other_dropped(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        before, _ = await hedged.pool.paid()
        asking, first, start, second, again = await hedged.late()
        await asyncio.gather(say(first, start, "first"), say(second, again, "second"))
        answer = await asyncio.wait_for(asking, 5)
        received = await asyncio.wait_for(read_all(answer), 5)
        names = {name for name in ("first", "second") if f'"id":"{name}"'.encode() in received}
        assert len(names) == 1
        assert received.count(DONE) == 1
        spent, _ = await hedged.pool.paid()
        assert spent - before == ANSWER


@pytest.mark.parametrize("has_head", [False, True])
async def test_where_the_first_dies_the_hedge_goes_on_alone_and_nobody_else_is_asked(tmp_path, has_head):
    async with hedged_pool(tmp_path, node_count=3) as hedged:
        pool = hedged.pool
        before, earned_before = await pool.paid()
        asking = hedged.ask()
        first, start = await hedged.next_attempt()
        if has_head:
            await first.chunk(start.attempt_id, 0, b"")
        second, again = await hedged.next_attempt()
        reading = asyncio.ensure_future(whole(asking))
        await first.end(start.attempt_id, int(has_head), EndReason.ENGINE_FAILED)
        await until(lambda: "hedge_over" in hedged.steps())
        await hedged.no_attempt()
        await say(second, again, "second")
        answer, received = await asyncio.wait_for(reading, 5)
        assert received.count(DONE) == 1
        assert answer.node_id == second.credentials.node_id
        spent, earned = await pool.paid()
        assert spent - before == ANSWER == earned[pool.number(second)] - earned_before[pool.number(second)]
        assert hedged.steps() == ["placed", "hedged", "failed", "hedge_over", "answered"]
        assert hedged.metric("potluck_hedges", "replaced") == 1
        assert hedged.metric("potluck_hedge_wasted_tokens", "replaced") == 0


@pytest.mark.parametrize("death", [EndReason.ENGINE_FAILED, EndReason.REFUSED])
async def test_a_hedge_that_dies_does_not_hurt_the_first(tmp_path, death):
    async with hedged_pool(tmp_path, node_count=3) as hedged:
        asking, first, start, second, again = await hedged.late()
        await second.end(again.attempt_id, 0, death)
        await until(lambda: "hedge_over" in hedged.steps())
        await hedged.no_attempt()
        await say(first, start, "first")
        answer = await asyncio.wait_for(asking, 5)
        received = await asyncio.wait_for(read_all(answer), 5)
        await answer.close()
        assert received.count(DONE) == 1
        assert answer.node_ids == (first.credentials.node_id,)
        assert hedged.steps() == ["placed", "hedged", "failed", "hedge_over", "answered"]
        assert hedged.metric("potluck_hedges", "failed") == 1


async def test_a_hedge_that_answers_with_an_error_gives_no_token(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking, first, start, second, again = await hedged.late()
        await second.chunk(again.attempt_id, 0, b'{"error":{"message":"busy"}}', content_type="application/json", status=503)
        await until(lambda: "hedge_over" in hedged.steps())
        await say(first, start, "first")
        answer = await asyncio.wait_for(asking, 5)
        received = await asyncio.wait_for(read_all(answer), 5)
        assert b"busy" not in received
        assert received.count(DONE) == 1


@pytest.mark.parametrize("first_dies_first", [True, False])
async def test_where_both_die_a_third_node_is_asked_and_no_fourth(tmp_path, first_dies_first):
    async with hedged_pool(tmp_path, node_count=4) as hedged:
        before, _ = await hedged.pool.paid()
        asking, first, start, second, again = await hedged.late()
        dying = [(first, start), (second, again)]
        for node, attempt in dying if first_dies_first else reversed(dying):
            await node.end(attempt.attempt_id, 0, EndReason.ENGINE_FAILED)
            await until(lambda: "hedge_over" in hedged.steps())
        third, last = await hedged.next_attempt()
        assert third is not first
        assert third is not second
        await third.end(last.attempt_id, 0, EndReason.ENGINE_FAILED)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(asking, 5)
        assert failure.value.code is ErrorCode.ENGINE_FAILED
        await hedged.no_attempt()
        spent, _ = await hedged.pool.paid()
        assert spent == before


@pytest.mark.parametrize("has_head", [False, True])
async def test_a_client_that_hangs_up_cancels_both_and_pays_nothing(tmp_path, has_head):
    async with hedged_pool(tmp_path) as hedged:
        before, _ = await hedged.pool.paid()
        asking = hedged.ask()
        first, start = await hedged.next_attempt()
        if has_head:
            await first.chunk(start.attempt_id, 0, b"")
            answer = await asyncio.wait_for(asking, 5)
        second, again = await hedged.next_attempt()
        if has_head:
            await answer.close()
        else:
            await give_up(asking)
        await hedged.cancelled(first, start)
        await hedged.cancelled(second, again)
        assert hedged.requests.in_flight_count == 0
        spent, _ = await hedged.pool.paid()
        assert spent == before
        assert hedged.metric("potluck_hedges", "given_up") == 1


@pytest.mark.parametrize("key", [None, "once"])
async def test_an_http_client_sees_one_stream_of_the_node_that_gave_it(tmp_path, key):
    async with hedged_pool(tmp_path) as hedged:
        pool = hedged.pool
        before, _ = await pool.paid()
        _, secret = await pool.coordinator.directory.accounts.create_key(pool.client, "test", 0)
        body = {"model": TINY, "messages": hedged.words(), "stream": True, "max_tokens": 10}
        headers = {"authorization": f"Bearer {secret}"} | ({} if key is None else {"idempotency-key": key})
        async with aiohttp.ClientSession(pool.coordinator.url, headers=headers) as http:
            asking = asyncio.ensure_future(http.post("/v1/chat/completions", json=body))
            first, start = await hedged.next_attempt()
            await first.chunk(start.attempt_id, 0, b"")
            second, again = await hedged.next_attempt()
            await say(second, again, "second")
            response = await asyncio.wait_for(asking, 5)
            assert response.headers["x-potluck-node"] == second.credentials.node_id
            received = await response.read()
        assert response.status == 200
        assert received.count(DONE) == 1
        assert received.count(b'"role":"assistant"') == 1
        await hedged.cancelled(first, start)
        assert (await pool.paid())[0] - before == ANSWER


async def test_the_sdk_sees_one_answer_and_who_gave_it(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        pool = hedged.pool
        before, _ = await pool.paid()
        _, secret = await pool.coordinator.directory.accounts.create_key(pool.client, "test", 0)
        async with AsyncClient(pool.coordinator.url, api_key=secret) as client:
            asking = asyncio.ensure_future(client.chat(hedged.words(), model=TINY, stream=True, max_tokens=10))
            first, start = await hedged.next_attempt()
            await first.chunk(start.attempt_id, 0, b"")
            stream = await asyncio.wait_for(asking, 5)
            reading = asyncio.ensure_future(stream.result())
            second, again = await hedged.next_attempt()
            await say(second, again, "second")
            result = await asyncio.wait_for(reading, 5)
        assert (result.text, result.finish_reason) == ("Once upon", "stop")
        assert result.node_id == second.credentials.node_id
        await hedged.cancelled(first, start)
        spent, _ = await pool.paid()
        assert spent - before == result.charge_micro_credits == ANSWER


async def test_where_the_winner_dies_later_whoever_lost_the_race_may_go_on(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        pool = hedged.pool
        before, earned_before = await pool.paid()
        asking, first, start, second, again = await hedged.late()
        await second.chunk(again.attempt_id, 0, role("second") + text("second", "Once"))
        answer = await asyncio.wait_for(asking, 5)
        received = await asyncio.wait_for(answer.next_data(), 5)
        reading = asyncio.ensure_future(read_all(answer))
        await crash_engine(pool, second, again)
        third, last = await hedged.next_attempt()
        assert third is first
        await third.chunk(last.attempt_id, 0, role("third") + text("third", " upon") + end("third", PROMPT_TOKENS + 1, 1))
        await third.end(last.attempt_id, 1)
        received += await asyncio.wait_for(reading, 5)
        assert received.count(DONE) == 1
        assert b'"id":"third"' not in received
        spent, earned = await pool.paid()
        gained = [after - earlier for after, earlier in zip(earned, earned_before, strict=True)]
        assert spent - before == ANSWER
        assert (gained[pool.number(first)], gained[pool.number(second)]) == (PROMPT_TOKENS + 4, 4)
        assert last.attempt_id != start.attempt_id


async def test_a_coordinator_that_stops_ends_both(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        before, _ = await hedged.pool.paid()
        asking, *_ = await hedged.late()
        await hedged.requests.stop()
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(asking, 5)
        assert failure.value.code is ErrorCode.NODE_LOST
        assert hedged.requests.in_flight_count == 0
        spent, _ = await hedged.pool.paid()
        assert spent == before


@pytest.mark.parametrize("wins", ["first", "second"])
async def test_what_only_keeps_a_connection_alive_is_nobodys_first_token(tmp_path, wins):
    """llama.cpp sends comments while it reads a long prompt."""
    async with hedged_pool(tmp_path) as hedged:
        before, _ = await hedged.pool.paid()
        asking, first, start, second, again = await hedged.late()
        reading = asyncio.ensure_future(whole(asking))
        await second.chunk(again.attempt_id, 0, b":\n\n")
        await first.chunk(start.attempt_id, 0, b":\n\n")
        await asyncio.sleep(0.1)
        assert hedged.steps() == ["placed", "hedged"], "the race is not over"
        winner, loser = ((first, start), (second, again)) if wins == "first" else ((second, again), (first, start))
        await say(*winner, wins, 1)
        answer, received = await asyncio.wait_for(reading, 5)
        await hedged.cancelled(*loser)
        assert received.startswith(b":\n\n")
        assert received.replace(b":\n\n", b"").startswith(b"data: {")
        assert {f'"id":"{name}"'.encode() in received for name in ("first", "second")} == {True, False}
        assert f'"id":"{wins}"'.encode() in received
        assert received.count(DONE) == 1
        assert answer.node_ids == (winner[0].credentials.node_id,)
        assert (await hedged.pool.paid())[0] - before == ANSWER
