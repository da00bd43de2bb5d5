"""A client's answer goes on elsewhere when its node fails: real gateway, directory, links and books; the nodes' words are the test's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from potluck import AsyncClient
from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.pricing import hold_amount
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import Endpoint, RequestId, Usage
from tests.support.coordinator import TINY
from tests.support.request_path import read_all
from tests.support.two_owners import (
    DONE,
    LOSSES,
    PROMPT_TOKENS,
    USER,
    begun,
    crash_engine,
    delta,
    end,
    event,
    role,
    same,
    stall,
    text,
    two_owners,
    until,
    usage_of,
)


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_stream_goes_on_where_its_node_fails_and_each_node_is_paid_for_its_own(tmp_path, lose, include_usage):
    async with two_owners(tmp_path) as pool:
        answer, received, first, start = await begun(pool, "Once", " upon", stream_options={"include_usage": include_usage})
        await lose(pool, first, start)
        reading = asyncio.ensure_future(read_all(answer))
        second, again = await pool.started(besides=(first,))
        body = json.loads(again.body)
        assert body["messages"] == [USER, {"role": "assistant", "content": "Once upon"}]
        assert body["max_tokens"] == 8
        assert again.attempt_id != start.attempt_id
        await second.chunk(again.attempt_id, 0, role("second") + text("second", " a") + text("second", " time"))
        await second.chunk(again.attempt_id, 1, end("second", PROMPT_TOKENS + 2, 2))
        await second.end(again.attempt_id, 2)
        received += await reading
        told = usage_of(received)
        shown = [{"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 4, "total_tokens": PROMPT_TOKENS + 4}] if include_usage else []
        assert told == shown
        one = [role("first"), *(text("first", word) for word in ("Once", " upon", " a", " time")), delta("first", {}, "stop")]
        assert [same(part) for part in received.split(b"\n\n") if part and b"usage" not in part] == [
            *(same(part) for part in one),
            "data: [DONE]",
        ]
        assert answer.usage == Usage(PROMPT_TOKENS, 4, 0)
        assert answer.node_ids == (first.credentials.node_id, second.credentials.node_id)
        spent, earned = await pool.paid()
        assert (earned[pool.number(first)], earned[pool.number(second)]) == (2 * 4, PROMPT_TOKENS + 2 * 4)
        assert spent == answer.charge_micro_credits == sum(earned)


async def test_an_attempt_that_was_replaced_is_cancelled_and_its_late_words_go_nowhere(tmp_path):
    async with two_owners(tmp_path) as pool:
        answer, received, first, start = await begun(pool, "Once")
        await stall(pool, first, start)
        reading = asyncio.ensure_future(read_all(answer))
        second, again = await pool.started(besides=(first,))
        await first.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 5)
        await first.chunk(start.attempt_id, 2, text("first", " ghost"))
        await first.end(start.attempt_id, 3)
        await second.chunk(again.attempt_id, 0, role("second") + text("second", " upon") + end("second", PROMPT_TOKENS + 1, 1))
        await second.end(again.attempt_id, 1)
        received += await reading
        assert b"ghost" not in received
        assert received.count(DONE) == 1
        _, earned = await pool.paid()
        assert earned[pool.number(first)] == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "it may call tools"),
        ({"logprobs": True}, "it has log probabilities"),
        ({"response_format": {"type": "json_object"}}, "its form is prescribed"),
        ({"grammar_of_theirs": "x"}, "'grammar_of_theirs'"),
    ],
)
async def test_what_cannot_be_continued_ends_with_the_reason_and_a_partial_bill(tmp_path, fields, words):
    async with two_owners(tmp_path) as pool:
        answer, _, first, start = await begun(pool, "Once", " upon", **fields)
        await crash_engine(pool, first, start)
        with pytest.raises(PotluckError) as failure:
            await read_all(answer)
        await answer.close()
        assert failure.value.code is ErrorCode.ENGINE_FAILED
        assert "It cannot be continued elsewhere: " in failure.value.message
        assert words in failure.value.message
        spent, earned = await pool.paid()
        assert spent == earned[pool.number(first)] == 2 * 4
        assert sum(len(node.starts()) for node in pool.nodes) == 1


@pytest.mark.parametrize("fields", [{}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
async def test_where_only_its_speaker_was_named_an_answer_begins_anew_whatever_it_is(tmp_path, fields):
    async with two_owners(tmp_path) as pool:
        answer, received, first, start = await begun(pool, **fields)
        await stall(pool, first, start)
        reading = asyncio.ensure_future(read_all(answer))
        second, again = await pool.started(besides=(first,))
        assert again.body == start.body
        await second.chunk(again.attempt_id, 0, role("second") + text("second", "Once") + end("second", PROMPT_TOKENS, 1))
        await second.end(again.attempt_id, 1)
        received += await reading
        assert [same(part) for part in received.split(b"\n\n") if part] == [
            *(same(part) for part in (role("first"), text("first", "Once"), delta("first", {}, "stop"))),
            "data: [DONE]",
        ]
        _, earned = await pool.paid()
        assert (earned[pool.number(first)], earned[pool.number(second)]) == (0, PROMPT_TOKENS + 4)


async def test_an_unstreamed_answer_begins_anew_and_is_paid_once(tmp_path):
    document = json.dumps({"choices": [], "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 2}}).encode()
    async with two_owners(tmp_path) as pool:
        asking = pool.ask(stream=False)
        first, start = await pool.started()
        await first.chunk(start.attempt_id, 0, document[:9])
        answer = await asyncio.wait_for(asking, 5)
        first.call.cancel()
        reading = asyncio.ensure_future(read_all(answer))
        second, again = await pool.started(besides=(first,))
        assert again.body == start.body
        await second.chunk(again.attempt_id, 0, document)
        await second.end(again.attempt_id, 1)
        assert await reading == answer.document
        assert json.loads(answer.document) == json.loads(document) | {"service_tier": "default"}
        spent, earned = await pool.paid()
        assert spent == earned[pool.number(second)] == PROMPT_TOKENS + 2 * 4


@pytest.mark.parametrize("has_reason", [True, False], ids=["its reason to end was said", "its tokens are used up"])
async def test_an_answer_that_only_lacks_its_end_is_finished_here(tmp_path, has_reason):
    words = ["Once", " upon"] if has_reason else [" and"] * 10
    async with two_owners(tmp_path) as pool:
        answer, received, first, start = await begun(pool, *words, stream_options={"include_usage": True})
        if has_reason:
            await first.chunk(start.attempt_id, 3, delta("first", {}, "stop"))
            received += await asyncio.wait_for(answer.next_data(), 5)
        first.call.cancel()
        received += await asyncio.wait_for(read_all(answer), 5)
        events = [same(part) for part in received.split(b"\n\n") if part]
        assert events[-1] == "data: [DONE]"
        assert events[-2]["usage"] == {"prompt_tokens": 0, "completion_tokens": len(words), "total_tokens": len(words)}
        assert events[-3]["choices"][0]["finish_reason"] == ("stop" if has_reason else "length")
        assert {one["id"] for one in events[:-1]} == {"first"}
        spent, earned = await pool.paid()
        assert spent == earned[pool.number(first)] == len(words) * 4
        assert sum(len(node.starts()) for node in pool.nodes) == 1


def of_the_first(word: str, finish_reason: str | None = None, *, is_chat: bool) -> bytes:
    choice = {"delta": {"content": word} if word else {}} if is_chat else {"text": word}
    return event("first", {"choices": [{"index": 0, "finish_reason": finish_reason, **choice}]})


@pytest.mark.parametrize("has_reason", [True, False], ids=["its reason to end was said", "its tokens are used up"])
@pytest.mark.parametrize("is_chat", [True, False], ids=["two choices", "two prompts"])
async def test_of_several_answers_one_that_has_ended_alone_is_no_whole_answer(tmp_path, is_chat, has_reason):
    async with two_owners(tmp_path) as pool:
        body = {"model": TINY, "prompt": ["aaa", "bbb"], "stream": True, "max_tokens": 10}
        request = parse_request(Endpoint.COMPLETIONS, json.dumps(body).encode(), RequestId("request"), pool.client)
        asking = asyncio.ensure_future(pool.coordinator.gateway.requests.begin(pool.request(n=2) if is_chat else request))
        node, start = await pool.started()
        words = ["Once", " upon"] if has_reason else [" and"] * 10
        events = [of_the_first(word, is_chat=is_chat) for word in words]
        events += [of_the_first("", "stop", is_chat=is_chat)] if has_reason else []
        await node.chunk(start.attempt_id, 0, b"".join(events))
        answer = await asyncio.wait_for(asking, 5)
        await asyncio.wait_for(answer.next_data(), 5)
        node.call.cancel()
        with pytest.raises(PotluckError, match="It cannot be continued elsewhere: ") as failure:
            await read_all(answer)
        await answer.close()
        assert failure.value.code is ErrorCode.NODE_LOST
        spent, _ = await pool.paid()
        assert spent == len(words) * 4


async def test_a_request_is_tried_three_times_and_never_twice_on_one_node(tmp_path):
    async with two_owners(tmp_path, node_count=4) as pool:
        answer, _, node, start = await begun(pool, "Once")
        reading = asyncio.ensure_future(read_all(answer))
        tried = [node]
        await stall(pool, node, start)
        for word in (" upon", " a"):
            node, start = await pool.started(besides=tuple(tried))
            tried.append(node)
            await node.chunk(start.attempt_id, 0, role("more") + text("more", word))
            relay = pool.coordinator.gateway._links.session(node.credentials.node_id).attempts[start.attempt_id]
            await until(lambda relay=relay: relay.next_sequence == 1)
            await stall(pool, node, start)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(reading, 5)
        await answer.close()
        assert failure.value.code is ErrorCode.NODE_LOST
        assert [len(node.starts()) for node in tried] == [1, 1, 1]
        assert sum(len(node.starts()) for node in pool.nodes) == 3
        spent, earned = await pool.paid()
        assert spent == sum(earned) == 3 * 4


async def test_an_account_with_just_enough_for_one_answer_has_enough_for_one_that_goes_on_elsewhere(tmp_path):
    async with two_owners(tmp_path) as pool:
        entry, granted = pool.coordinator.gateway._snapshot.models[TINY], pool.coordinator.settings.grant_micro_credits
        amount = hold_amount(entry, pool.request().prompt_bytes, 10, 1, 1)
        # What is beyond it is set aside, as by another request that runs.
        later_unix_ms = SystemClock().unix_ms() + 60_000
        aside = OpenHold("aside", pool.client, (PayeeShare(pool.owners[0], 1),), granted - amount, later_unix_ms, gateway_epoch=1)
        assert await pool.coordinator.directory.ledger.apply([aside]) == (LedgerOutcome.APPLIED,)
        answer, _, first, start = await begun(pool, "Once")
        await stall(pool, first, start)
        reading = asyncio.ensure_future(read_all(answer))
        second, again = await pool.started(besides=(first,))
        await second.chunk(again.attempt_id, 0, role("second") + end("second", 10**6, 10**6))
        await second.end(again.attempt_id, 1)
        await asyncio.wait_for(reading, 5)
        assert answer.charge_micro_credits == amount, "whatever a node claims, it is no more than one answer could cost"


async def test_a_continued_answer_comes_before_everybody_who_waits(tmp_path):
    async with two_owners(tmp_path) as pool:
        answer, _, first, start = await begun(pool, "Once")
        # Every other slot of both nodes is taken, and somebody waits.
        others = {number: pool.ask(max_tokens=number) for number in (1, 2, 3)}
        await until(lambda: sum(len(node.starts()) for node in pool.nodes) == 4)
        early = pool.ask(max_tokens=4)
        await until(lambda: pool.queued_count == 1)
        await stall(pool, first, start)
        reading = asyncio.ensure_future(read_all(answer))
        # The slot that the broken attempt gave back is on the one node that it may not have.
        await until(lambda: tokens_asked(first.starts()[-1]) == 4)
        late = pool.ask(max_tokens=5)
        await until(lambda: pool.queued_count == 2)
        (second,) = [node for node in pool.nodes if node is not first]
        freed = second.starts()[0]
        await second.chunk(freed.attempt_id, 0, role("other"))
        await (await asyncio.wait_for(others[tokens_asked(freed)], 5)).close()
        await until(lambda: len(second.starts()) == 3)
        assert json.loads(second.starts()[2].body)["messages"][-1] == {"role": "assistant", "content": "Once"}
        assert pool.queued_count == 1
        for task in (*others.values(), early, late, reading):
            task.cancel()
        await asyncio.gather(*others.values(), early, late, reading, return_exceptions=True)
        await answer.close()


def tokens_asked(start: Any) -> int:
    return int(json.loads(start.body)["max_tokens"])


async def test_the_sdk_shows_the_whole_answer_its_whole_price_and_who_answered_last(tmp_path):
    async with two_owners(tmp_path) as pool:
        _, secret = await pool.coordinator.directory.accounts.create_key(pool.client, "test", 0)
        async with AsyncClient(pool.coordinator.url, api_key=secret) as client:
            asking = asyncio.ensure_future(client.chat([USER], model=TINY, stream=True, max_tokens=10))
            first, start = await pool.started()
            await first.chunk(start.attempt_id, 0, role("first") + text("first", "Once"))
            stream = await asyncio.wait_for(asking, 5)
            assert await anext(stream) == "Once"
            assert stream.node_id == first.credentials.node_id
            await crash_engine(pool, first, start)
            reading = asyncio.ensure_future(stream.result())
            second, again = await pool.started(besides=(first,))
            await second.chunk(again.attempt_id, 0, role("second") + text("second", " upon") + end("second", PROMPT_TOKENS + 1, 1))
            await second.end(again.attempt_id, 1)
            result = await asyncio.wait_for(reading, 5)
        assert (result.text, result.finish_reason) == ("Once upon", "stop")
        assert result.node_id == stream.node_id == second.credentials.node_id
        assert result.usage == Usage(PROMPT_TOKENS, 2, 0)
        spent, _ = await pool.paid()
        assert result.charge_micro_credits == spent == PROMPT_TOKENS + 2 * 4


@pytest.mark.parametrize("keeps_up", [True, False])
async def test_what_is_passed_on_at_once_goes_on_as_what_is_asked_for(tmp_path, keeps_up):
    """As the HTTP edge reads: it leaves a function for what comes while it waits."""
    async with two_owners(tmp_path) as pool:
        answer, received, first, start = await begun(pool, "Once")
        passed = [received]

        def pass_on(data: bytes) -> bool:
            assert data, "an empty piece would end a chunked answer"
            passed.append(data)
            return keeps_up

        async def read() -> None:
            while (data := await answer.next_data(pass_on)) is not None:
                passed.append(data)

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        await first.chunk(start.attempt_id, 2, text("first", " upon"))
        await until(lambda: len(passed) == 2)
        await stall(pool, first, start)
        second, again = await pool.started(besides=(first,))
        pieces = [role("second"), text("second", " a"), text("second", " time"), end("second", PROMPT_TOKENS + 2, 2)]
        for number, piece in enumerate(pieces):
            await second.chunk(again.attempt_id, number, piece)
            await asyncio.sleep(0.02)
        await second.end(again.attempt_id, len(pieces))
        await asyncio.wait_for(reading, 5)
        one = [role("first"), *(text("first", word) for word in ("Once", " upon", " a", " time")), delta("first", {}, "stop")]
        assert [same(part) for part in b"".join(passed).split(b"\n\n") if part] == [*(same(part) for part in one), "data: [DONE]"]
        assert json.loads(again.body)["messages"][-1]["content"] == "Once upon"


async def test_a_coordinator_that_stops_moves_no_answer(tmp_path):
    async with two_owners(tmp_path) as pool:
        answer, _, _, _ = await begun(pool, "Once")
        reading = asyncio.ensure_future(read_all(answer))
        await asyncio.sleep(0.05)
        await pool.coordinator.gateway.requests.stop()
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(reading, 5)
        assert failure.value.code is ErrorCode.NODE_LOST
        assert sum(len(node.starts()) for node in pool.nodes) == 1


async def test_a_hold_that_was_refused_is_tried_nowhere_else(tmp_path):
    async with two_owners(tmp_path, grant_credits=0) as pool:
        asking = pool.ask()
        node, start = await pool.started()
        await node.chunk(start.attempt_id, 0, role("first"))
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(asking, 5)
        assert failure.value.code is ErrorCode.INSUFFICIENT_CREDITS
        assert sum(len(node.starts()) for node in pool.nodes) == 1
