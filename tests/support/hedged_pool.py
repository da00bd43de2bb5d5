"""Nodes whose first tokens have come in time so often that one which does not is late: what hedging needs to be known and paid for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from potluck_coordinator.domain.hedging import CANCEL_TOKENS, LATE_SECONDS_MIN, RATIOS_KNOWN_MIN
from potluck_coordinator.gateway.answer import Answer
from tests.support.coordinator import TINY
from tests.support.raw_node import RawNode
from tests.support.request_path import read_all
from tests.support.two_owners import TwoOwners, end, role, text, two_owners

PROMPT_TOKENS = 100
"""As the nodes count; `ask` sends some four hundred bytes."""
PRICE = PROMPT_TOKENS + CANCEL_TOKENS
ANSWER = PROMPT_TOKENS + 2 * 4
"""Micro-credits of an answer of two tokens."""
LATE_SECONDS = LATE_SECONDS_MIN
"""After so long these nodes are late: they answer at once."""


@dataclass
class Hedged:
    """The pool, and which attempts the test has seen."""

    pool: TwoOwners
    seen: set[str] = field(default_factory=set)
    asked: int = 0

    @property
    def requests(self) -> Any:
        return self.pool.coordinator.gateway.requests

    @property
    def links(self) -> Any:
        return self.pool.coordinator.gateway._links

    def words(self) -> list[dict[str, str]]:
        """Of some four hundred bytes, and no other's beginning."""
        self.asked += 1
        return [{"role": "user", "content": f"{self.asked} {'once more, ' * 36}"}]

    def ask(self, **fields: Any) -> asyncio.Task[Answer]:
        return self.pool.ask(messages=self.words(), **fields)

    async def next_attempt(self, seconds_max: float = 5.0) -> tuple[RawNode, Any]:
        """The next one that the test has not seen, and its node."""
        async with asyncio.timeout(seconds_max):
            while True:
                for node in self.pool.nodes:
                    for start in node.starts():
                        if start.attempt_id not in self.seen:
                            self.seen.add(start.attempt_id)
                            return node, start
                await asyncio.sleep(0.002)

    async def no_attempt(self) -> None:
        """Nobody is asked, for longer than it takes to be late."""
        try:
            node, start = await self.next_attempt(3 * LATE_SECONDS)
        except TimeoutError:
            return
        raise AssertionError(f"{start.attempt_id} came to {node.credentials.node_id}")

    async def learn(self) -> None:
        """Asks as much as there are slots, and again, until every node has answered at once often enough to be known."""
        words = b"".join(text("quick", " word") for _ in range(9))
        for _ in range(RATIOS_KNOWN_MIN // 2):
            asking = [self.ask() for _ in range(2 * len(self.pool.nodes))]
            for _ in asking:
                node, start = await self.next_attempt()
                await node.chunk(start.attempt_id, 0, role("quick") + words + end("quick", PROMPT_TOKENS, 9))
                await node.end(start.attempt_id, 1)
            for answer in await asyncio.wait_for(asyncio.gather(*asking), 5):
                await read_all(answer)
                await answer.close()
        assert all(len(replica.first_tokens.ratios) == RATIOS_KNOWN_MIN for replica in self.links.measures._replicas.values())

    async def late(self, **fields: Any) -> tuple[asyncio.Task[Answer], RawNode, Any, RawNode, Any]:
        """A request whose first attempt is silent, and the hedge that follows."""
        asking = self.ask(**fields)
        first, start = await self.next_attempt()
        second, again = await self.next_attempt()
        assert second is not first
        return asking, first, start, second, again

    def steps(self) -> list[str]:
        """What `potluck explain` says happened to the newest request."""
        return [str(step.kind) for step in self.story().steps]

    def story(self) -> Any:
        return self.requests.decisions.story("request", lambda account_id: account_id == self.pool.client)

    def metric(self, name: str, end_word: str) -> float:
        """Of the Prometheus page."""
        page = self.pool.coordinator.gateway._metrics.render().decode()
        prefix = f'{name}_total{{end="{end_word}",model="{TINY}"}} '
        return sum(float(line.removeprefix(prefix)) for line in page.splitlines() if line.startswith(prefix))

    async def cancelled(self, node: RawNode, start: Any) -> None:
        """Returns when the node was told to stop."""
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels), 5)


async def say(node: RawNode, start: Any, name: str, first_sequence: int = 0) -> None:
    """A whole answer of two tokens."""
    await node.chunk(start.attempt_id, first_sequence, role(name) + text(name, "Once"))
    await node.chunk(start.attempt_id, first_sequence + 1, text(name, " upon") + end(name, PROMPT_TOKENS, 2))
    await node.end(start.attempt_id, first_sequence + 2)


async def whole(asking: asyncio.Task[Answer]) -> tuple[Answer, bytes]:
    """As an edge does it: reads as soon as the answer has begun, and closes."""
    answer = await asking
    try:
        return answer, await read_all(answer)
    finally:
        await answer.close()


async def give_up(*asking: asyncio.Task[Any]) -> None:
    """Their clients hang up."""
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


@asynccontextmanager
async def hedged_pool(folder, **changes: Any) -> AsyncIterator[Hedged]:
    async with two_owners(folder, **changes) as pool:
        hedged = Hedged(pool)
        await hedged.learn()
        yield hedged
