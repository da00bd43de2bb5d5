"""`python -m tests.benchmarks.request_queue --nodes 20 100 1000`: what a full model costs the gateway's loop, by the size of the pool.

Decides the pool: equal nodes of two slots, all of them taken, and as many requests waiting as may. Links, placement and queues are real,
and each heartbeat comes as it does from the wire; no port is open. `second` is what a busy pool's second of heartbeats costs, one of each
node, with the looks at the queues between them. `unsuited` is the same where every other node has a slot free and too short a context for
whoever waits. `end` is an answer's end together with the start of the next in the queue, `refused` a request that finds the queue full.
Milliseconds are processor time, the lowest of several tries.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import structlog

from potluck_coordinator.gateway.judging import LOOK_SECONDS
from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_protocol import codec
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import Heartbeat, NodeState
from tests.support.request_queue import CONTEXT_TOKENS, MODEL, SLOTS, Front

WAITING_COUNT: Final = 64
TRIES: Final = 5
LOOKS_EACH_SECOND: Final = round(1 / LOOK_SECONDS)


class Pool:
    """Nodes without a slot for whoever waits."""

    def __init__(self, node_count: int, *, is_short_every_other: bool) -> None:
        self.front = Front(queue_length_max=WAITING_COUNT)
        self._node_count = node_count
        self._is_short_every_other = is_short_every_other
        self._sessions: list[NodeSession] = []
        self._servicer = LinkServicer(self.front.links, cast("Any", self.front.directory), self.front.clock)

    async def fill(self) -> None:
        """Every node comes, every slot that suits is taken, and the queue is full."""
        full_count = 0
        for number in range(self._node_count):
            is_short = self._is_short_every_other and number % 2 == 1
            full_count += not is_short
            context_tokens = CONTEXT_TOKENS // 4 if is_short else CONTEXT_TOKENS
            self._sessions.append(await self.front.joined(f"node{number:05}", context_length_tokens=context_tokens))
        for _ in range(full_count * SLOTS + WAITING_COUNT):
            self.ask()
        await self.turn()
        assert self.front.requests.queues.queued_count(MODEL) == WAITING_COUNT, self.front.requests.queues.queued_count(MODEL)

    def ask(self) -> asyncio.Task[Any]:
        return self.front.ask(prompt_tokens_min=CONTEXT_TOKENS // 2, completion_tokens_max=100)

    async def turn(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def second(self) -> None:
        """One heartbeat of each node, and the looks between them."""
        each = max(1, len(self._sessions) // LOOKS_EACH_SECOND)
        for number, session in enumerate(self._sessions):
            heartbeat = codec.heartbeat_message(Heartbeat(1, NodeState.SERVING, tuple(session.engines.values()), 0))
            outbox = session.outbox
            assert outbox is not None
            self._servicer._take_heartbeat(heartbeat, session, outbox, self.front.clock.monotonic_seconds())
            if number % each == 0:
                self.front.look_at_queues()

    async def end(self) -> None:
        """One answer less, and the first of the queue in its place, whose place in the queue a new one takes."""
        self.front.asked.pop(0).cancel()
        await self.turn()
        self.ask()
        await self.turn()

    async def refused(self) -> None:
        try:
            await self.ask()
        except PotluckError:
            self.front.asked.pop()
        else:
            raise AssertionError("the queue had room")


async def lowest_ms(work: Callable[[], Awaitable[None]]) -> float:
    found = []
    for _ in range(TRIES):
        began = time.process_time()
        await work()
        found.append(1000 * (time.process_time() - began))
    return min(found)


async def measure(node_count: int) -> str:
    full = Pool(node_count, is_short_every_other=False)
    await full.fill()
    found = {"second": await lowest_ms(full.second), "end": await lowest_ms(full.end), "refused": await lowest_ms(full.refused)}
    await full.front.stop()
    mixed = Pool(node_count, is_short_every_other=True)
    await mixed.fill()
    found["unsuited"] = await lowest_ms(mixed.second)
    await mixed.front.stop()
    return f"{node_count} nodes, {WAITING_COUNT} waiting: ms " + ", ".join(f"{name} {cost:.2f}" for name, cost in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[20, 100, 1000])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    for node_count in parser.parse_args().nodes:
        print(asyncio.run(measure(node_count)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
