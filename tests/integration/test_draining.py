"""A gateway that drains: what runs goes on to its end, nobody new comes in, and its nodes go once they have nothing left to do."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import aiohttp
import pytest

from potluck_coordinator import control
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import GoodbyeReason
from tests.support.coordinator import TINY, running_gateways
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, pool, token

pytestmark = pytest.mark.timeout(120)

BODY = {"model": TINY, "stream": True, "messages": [{"role": "user", "content": "hi"}]}


def session_of(coordinator):
    return aiohttp.ClientSession(coordinator.url, headers={"authorization": f"Bearer {coordinator.operator_key}"})


async def end(node, start):
    await node.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 2)


async def is_refused(coordinator):
    """Whether new connections are."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", coordinator.endpoints.http_port)
    except ConnectionError:
        return True
    writer.close()
    return False


async def test_an_answer_ends_whole_while_its_gateway_drains_and_its_node_goes_then(tmp_path):
    async with running_gateways(tmp_path) as (here, _), raw_link(here, await enrol(here)) as node, session_of(here) as session:
        await node.hello()
        asking = asyncio.ensure_future(session.post("/v1/chat/completions", json=BODY))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        answer = await asyncio.wait_for(asking, 10)
        draining = asyncio.ensure_future(here.gateway.drain(30))
        async with asyncio.timeout(10):
            while not await is_refused(here):
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)
        assert not draining.done()
        assert here.gateway._links.session(node.credentials.node_id) is not None, "it has something to do"
        assert all(view.leaving for view in here.gateway._links.session(node.credentials.node_id).replica_views())
        await end(node, start)
        assert (await asyncio.wait_for(answer.read(), 10)).rstrip().endswith(b"[DONE]")
        frame = await node.wait_for(lambda frame: frame.HasField("goodbye"))
        assert codec.goodbye_value(frame.goodbye)[0] is GoodbyeReason.COORDINATOR_STOPPING
        assert await asyncio.wait_for(draining, 10) == 0


async def test_a_connection_that_stands_is_told_that_its_answer_was_the_last(tmp_path):
    async with running_gateways(tmp_path) as (here, _), session_of(here) as session:
        async with session.get("/v1/models") as before:
            assert "connection" not in before.headers
        draining = asyncio.ensure_future(here.gateway.drain(30))
        await asyncio.sleep(0.1)
        async with session.get("/v1/models") as last:
            assert (last.status, last.headers["connection"]) == (200, "close")
        assert await asyncio.wait_for(draining, 10) == 0


async def test_the_only_gateway_keeps_its_nodes_until_its_last_answer_has_ended(tmp_path):
    async with pool(tmp_path) as (coordinator, node), session_of(coordinator) as session:
        asking = asyncio.ensure_future(session.post("/v1/chat/completions", json=BODY))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        answer = await asyncio.wait_for(asking, 10)
        draining = asyncio.ensure_future(coordinator.gateway.drain(30))
        await asyncio.sleep(1.5)
        assert not draining.done()
        await end(node, start)
        assert (await asyncio.wait_for(answer.read(), 10)).rstrip().endswith(b"[DONE]")
        assert await asyncio.wait_for(draining, 10) == 0
        assert coordinator.gateway._links.session(node.credentials.node_id) is not None


async def test_what_takes_too_long_is_counted_and_left_to_the_stop(tmp_path):
    async with pool(tmp_path) as (coordinator, node), session_of(coordinator) as session:
        asking = asyncio.ensure_future(session.post("/v1/chat/completions", json=BODY))
        start = await node.next_start()
        await node.chunk(start.attempt_id, 0, token("one"))
        await asyncio.wait_for(asking, 10)
        assert await asyncio.wait_for(coordinator.gateway.drain(1.5), 10) == 1


def test_a_conversation_with_the_coordinator_goes_line_by_line(tmp_path):
    def answer(asked):
        yield {"step": asked["ask"]}
        if asked["ask"] == "fail":
            raise PotluckError(ErrorCode.INVALID_REQUEST, "not so")
        if asked["ask"] == "break":
            raise ZeroDivisionError
        yield {"step": 2}

    served = control.Control(tmp_path / "control", answer)
    try:
        assert (tmp_path / "control").stat().st_mode & 0o777 == 0o600
        assert list(control.ask(tmp_path / "control", {"ask": "restart"})) == [{"step": "restart"}, {"step": 2}]
        for ask, code in (("fail", ErrorCode.INVALID_REQUEST), ("break", ErrorCode.INTERNAL_ERROR)):
            told = control.ask(tmp_path / "control", {"ask": ask})
            assert next(told) == {"step": ask}
            with pytest.raises(PotluckError) as refused:
                next(told)
            assert refused.value.code is code
        assert next(iter(control.ask(tmp_path / "control", {"ask": "again"}))) == {"step": "again"}, "it goes on"
    finally:
        served.stop()


@pytest.mark.parametrize("said", [b"", b"[" * 60_000 + b"\n", b"\xff\n"], ids=["nothing", "nonsense without end", "no text"])
def test_whoever_says_nothing_or_nonsense_keeps_nobody_from_asking(tmp_path, monkeypatch, said):
    monkeypatch.setattr(control, "LINE_SECONDS_MAX", 0.05)
    served = control.Control(tmp_path / "control", lambda asked: iter([asked]))
    try:
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(tmp_path / "control"))
            rude.sendall(said)
            heard: list[object] = []
            asking = threading.Thread(target=lambda: heard.extend(control.ask(tmp_path / "control", {"ask": "restart"})), daemon=True)
            asking.start()
            asking.join(5)
            assert heard == [{"ask": "restart"}]
    finally:
        served.stop()


def test_where_no_coordinator_answers_that_is_said(tmp_path):
    with pytest.raises(PotluckError) as absent:
        list(control.ask(tmp_path / "control", {"ask": "restart"}))
    assert absent.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert json.dumps(absent.value.message)
