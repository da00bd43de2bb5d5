"""A node that answers errors sooner than others answer: real gateway, links and books; nothing may draw all requests to it for long."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from potluck_coordinator.domain.suspicion import Standing
from potluck_coordinator.gateway.dispatching import Dispatching
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.raw_node import RawNode
from tests.support.request_path import read_all
from tests.support.two_owners import PROMPT_TOKENS, TwoOwners, end, role, text, two_owners, until

BROKEN = json.dumps({"error": {"message": "CUDA error: unspecified launch failure", "type": "x"}}).encode()
ANSWER_SECONDS = 0.1
"""Of a healthy node. One that fails at once has its slots free always."""


@dataclass
class Engine:
    """One node's: it answers with this status, and to probes with that one."""

    node: RawNode
    status: int = 200
    probe_status: int | None = None
    says: bytes = BROKEN
    counts: Counter[str] = field(default_factory=Counter)

    async def serve(self) -> None:
        writing, answering, seen = asyncio.Lock(), set(), 0
        while True:
            for start in self.node.starts()[seen:]:
                seen += 1
                answering.add(asyncio.ensure_future(self._answer(start, writing)))
            await asyncio.sleep(0.005)

    async def _answer(self, start: Any, writing: asyncio.Lock) -> None:
        is_probe = start.attempt_id.startswith("probe_")
        self.counts["probes" if is_probe else "requests"] += 1
        status = self.probe_status if is_probe and self.probe_status is not None else self.status
        good = [role("good"), text("good", "hi") + end("good", PROMPT_TOKENS, 1)]
        chunks, kind = (good, "text/event-stream") if status == 200 else ([self.says], "application/json")
        for number, chunk in enumerate(chunks):
            async with writing:  # a link takes one frame at a time
                await self.node.chunk(start.attempt_id, number, chunk, kind, status)
            await asyncio.sleep(ANSWER_SECONDS if number == 0 and status == 200 else 0)
        async with writing:
            await self.node.end(start.attempt_id, len(chunks))


@contextlib.asynccontextmanager
async def served(pool: TwoOwners, *statuses: int) -> AsyncIterator[list[Engine]]:
    """Each node's engine, at work."""
    engines = [Engine(node, status) for node, status in zip(pool.nodes, statuses, strict=True)]
    serving = [asyncio.ensure_future(engine.serve()) for engine in engines]
    try:
        yield engines
    finally:
        for task in serving:
            task.cancel()


async def ask(pool: TwoOwners) -> str:
    try:
        answer = await asyncio.wait_for(pool.ask(), 10)
        try:
            assert b"hi" in await read_all(answer)
        finally:
            await answer.close()
    except PotluckError as error:
        return error.code.value
    return "ok"


async def ask_often(pool: TwoOwners, count: int, pause_seconds: float = 0.05) -> Counter[str]:
    asking = []
    for _ in range(count):
        asking.append(asyncio.ensure_future(ask(pool)))
        await asyncio.sleep(pause_seconds)
    return Counter(await asyncio.gather(*asking))


async def next_attempt(pool: TwoOwners, seen: set[str]) -> tuple[RawNode, Any]:
    """Where the next attempt comes, and the attempt."""

    def new() -> list[tuple[RawNode, Any]]:
        return [(node, start) for node in pool.nodes for start in node.starts() if start.attempt_id not in seen]

    await until(lambda: bool(new()))
    ((node, start),) = new()
    seen.add(start.attempt_id)
    return node, start


def standing(pool: TwoOwners, engine: Engine) -> Standing:
    return pool.coordinator.gateway._links.suspicions.standing(engine.node.status.replica_id)


@pytest.mark.parametrize("status", [400, 404, 422, 500, 502])
async def test_a_node_that_fails_fast_is_suspected_and_every_client_is_answered(tmp_path, status):
    async with two_owners(tmp_path) as pool, served(pool, status, 200) as (bad, good):
        assert await ask_often(pool, 25, 0.1) == {"ok": 25}
        assert standing(pool, bad) is Standing.SUSPECTED
        assert bad.counts["requests"] < 15, "until the look at who is to be probed"
        assert good.counts["requests"] == 25
        spent, earned = await pool.paid()
        assert earned[0] == 0 < earned[1] == spent, "an error is paid to nobody"


async def test_it_comes_back_by_a_probe_and_a_good_answer(tmp_path):
    async with two_owners(tmp_path) as pool, served(pool, 500, 200) as (bad, _):
        await ask_often(pool, 10)
        assert standing(pool, bad) is Standing.SUSPECTED
        bad.status = 200
        await until(lambda: standing(pool, bad) is Standing.HALF_OPEN)
        assert await ask_often(pool, 10) == {"ok": 10}
        assert standing(pool, bad) is Standing.TRUSTED


async def test_a_node_that_passes_probes_and_fails_what_another_answers_is_suspected(tmp_path):
    async with two_owners(tmp_path) as pool, served(pool, 500, 200) as (bad, _):
        bad.probe_status = 200
        assert await ask_often(pool, 4) == {"ok": 4}
        assert standing(pool, bad) is not Standing.TRUSTED


@pytest.mark.parametrize(
    ("kinds", "trusted"), [(("scripted", "scripted"), False), (("scripted", "other"), True), (("attach", "attach"), True)]
)
async def test_requests_that_only_the_other_node_takes_tell_of_engines_of_one_kind_alone(tmp_path, monkeypatch, kinds, trusted):
    async with two_owners(tmp_path) as pool, served(pool, 400, 200) as (picky, _):
        kind_by_node = dict(zip([node.credentials.node_id for node in pool.nodes], kinds, strict=True))
        plain = Dispatching.dispatch

        def of_kind(self, request, entry, replica, *others, **options):
            return plain(self, request, entry, replica._replace(engine_kind=kind_by_node[replica.node_id]), *others, **options)

        monkeypatch.setattr(Dispatching, "dispatch", of_kind)
        picky.probe_status = 200
        seen = set()
        for _ in range(4):
            assert await ask_often(pool, 6, 0.1) == {"ok": 6}
            seen.add(standing(pool, picky))
        assert (seen == {Standing.TRUSTED}) is trusted
        assert standing(pool, picky) is not Standing.SUSPECTED, "it passes its probes"
        picky.status = 200
        assert await ask_often(pool, 6, 0.1) == {"ok": 6}
        await until(lambda: standing(pool, picky) is not Standing.SUSPECTED)
        assert await ask_often(pool, 6, 0.1) == {"ok": 6}
        assert standing(pool, picky) is Standing.TRUSTED


async def test_requests_that_every_engine_refuses_take_no_trust_from_any(tmp_path):
    async with two_owners(tmp_path) as pool, served(pool, 400, 400) as engines:
        for engine in engines:
            engine.probe_status, engine.says = 200, b'{"error":{"message":"temperature must be below 2"}}'
        assert await ask_often(pool, 20) == {ErrorCode.INVALID_REQUEST.value: 20}
        assert all(10 <= engine.counts["requests"] <= 20 for engine in engines), "once each, where there is room"
        assert [standing(pool, engine) for engine in engines] == [Standing.TRUSTED] * 2
        assert await pool.paid() == (0, [0, 0])
        for engine in engines:
            engine.status = 200
        assert await ask(pool) == "ok"


@pytest.mark.parametrize("probe_status", [200, 500])
async def test_where_nobody_answers_a_probe_tells_the_broken_engine_from_the_odd_request(tmp_path, probe_status):
    async with two_owners(tmp_path, 1) as pool, served(pool, 500) as (engine,):
        engine.probe_status = probe_status
        assert set(await ask_often(pool, 3)) == {ErrorCode.ENGINE_FAILED.value}
        await until(lambda: engine.counts["probes"] > 0)
        await asyncio.sleep(0.3)
        assert standing(pool, engine) is (Standing.TRUSTED if probe_status == 200 else Standing.SUSPECTED)


async def test_a_refusal_waits_for_no_slot_elsewhere(tmp_path):
    async with two_owners(tmp_path) as pool:
        taken, seen = [], set()
        for _ in range(3):
            taken.append(pool.ask())
            node, start = await next_attempt(pool, seen)
            await node.chunk(start.attempt_id, 0, role("long"))
        busy = max(pool.nodes, key=lambda node: len(node.starts()))
        asking = pool.ask()
        refusing, start = await next_attempt(pool, seen)
        assert (refusing is busy, len(busy.starts())) == (False, 2)
        await refusing.chunk(start.attempt_id, 0, BROKEN, "application/json", 400)
        await refusing.end(start.attempt_id, 1)
        with pytest.raises(PotluckError) as refusal:
            await asyncio.wait_for(asking, 2)
        assert refusal.value.code is ErrorCode.INVALID_REQUEST
        assert len(busy.starts()) == 2
        for one in taken:
            await (await one).close()
