"""The coordinator's own line is gone, in pools whose idle nodes beat often and rarely: nobody is evicted for it, and no answer fails."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.judged_pool import LOOK_SECONDS, JudgedPool

IDLE_COUNT, BUSY_COUNT = 45, 5
GONE_SECONDS = 12.0
DOUBT_SECONDS_MAX = 7.5
"""One and a half of the longest period, less what many of them were silent for already."""


class Pool:
    """Idle nodes, and some at work, each alone with its model: an answer that is given up cannot go on elsewhere."""

    def __init__(self, node_count: int) -> None:
        self.pool, self.draw = JudgedPool(), random.Random(1)
        self.links = self.pool.links
        self.links.leases.adapt(node_count, 0.0)
        self.nodes, self.relays = [], []

    async def fill(self) -> None:
        for number in range(IDLE_COUNT + BUSY_COUNT):
            node = await self.pool.add(f"node-{number}", "tiny" if number < IDLE_COUNT else f"model-{number}")
            node.session.counts_by_number = True
            self.links.leases.welcome(node.session, ())
            node.beaten_at = self.pool.clock.seconds - self.draw.uniform(0, self.links.leases.idle_seconds)
            self.nodes.append(node)
        self.relays = [self.pool.start(node, tokens=1) for node in self.nodes[IDLE_COUNT:]]

    def hear(self) -> None:
        for node in self.nodes:
            for relay in tuple(node.session.attempts.values()):
                self.pool.give(node, relay)
            period = 1.0 if node.session.attempts else self.links.leases.idle_seconds
            if self.pool.clock.seconds - node.beaten_at >= period:
                self.pool.beat(node)
                self.links.leases.renew_if_due(node.session, self.pool.clock.seconds)

    async def look(self) -> None:
        self.links.tick()
        await asyncio.sleep(0)

    @property
    def evicted_count(self) -> int:
        return sum(self.links.session(node.node_id) is not node.session for node in self.nodes)


@pytest.mark.parametrize(("node_count", "period"), [(10, 5.0), (10_000, 9.25)])
async def test_nobody_is_evicted_and_no_answer_fails_while_the_coordinators_line_is_gone(node_count, period):
    pool = Pool(node_count)
    await pool.fill()
    assert pool.links.leases.idle_seconds == period
    for _ in range(int(60 / LOOK_SECONDS)):
        pool.pool.clock.seconds += LOOK_SECONDS
        pool.hear()
        await pool.look()
    assert not any(relay.over for relay in pool.relays)
    gone_at, doubt_after = pool.pool.clock.seconds, None
    while pool.pool.clock.seconds - gone_at < GONE_SECONDS:
        pool.pool.clock.seconds += LOOK_SECONDS
        await pool.look()
        if doubt_after is None and pool.links._judging.in_doubt:
            doubt_after = pool.pool.clock.seconds - gone_at
    assert doubt_after is not None
    assert doubt_after <= DOUBT_SECONDS_MAX
    assert pool.evicted_count == 0
    assert not any(relay.over for relay in pool.relays)
    await pool.links._probing.stop()
