"""Attempts of one node with a watchdog over their engines, and what they would send: no link, and time as the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from potluck_node.attempts import Attempts
from potluck_node.engine_exchange import EngineConnections
from potluck_node.replicas import Replicas
from potluck_node.watchdog import Watchdog
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, Endpoint, NodeState, ReplicaId, StartAttempt
from tests.support.engines import MovedClock
from tests.support.node_engine import REPLICA

TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
BODY = {"messages": [{"role": "user", "content": "count"}], "max_tokens": 2000, "ignore_eos": True}


class Hearing:
    """Attempts of one node, the watchdog over their engines, and what they would send."""

    def __init__(self, replicas: Replicas, clock: MovedClock) -> None:
        self.clock = clock
        self.attempts = Attempts(
            replicas=replicas, connections=EngineConnections(), clock=clock, node_state=lambda: NodeState.SERVING, slot_count_max=None
        )
        self.watchdog = Watchdog(attempts=self.attempts, replicas=replicas, clock=clock)
        self.sent = node_pb2.NodeFrame()

    def start(
        self,
        name: str,
        replica_id: ReplicaId = REPLICA,
        *,
        endpoint: Endpoint = Endpoint.CHAT_COMPLETIONS,
        stream: bool = True,
        window_bytes: int = 1 << 20,
        **more: object,
    ) -> None:
        body = json.dumps({**BODY, "stream": stream, **more}).encode()
        self.attempts.start(StartAttempt(AttemptId(name), replica_id, endpoint, body, stream=stream, window_bytes=window_bytes))

    async def until(self, condition: Callable[[node_pb2.NodeFrame], object]) -> None:
        async with asyncio.timeout(60):
            while not condition(self.sent):
                self.attempts.move_into(self.sent, 1 << 24)
                await asyncio.sleep(0.01)

    async def until_end(self, name: str) -> node_pb2.AttemptEnd:
        await self.until(lambda sent: any(end.attempt_id == name for end in sent.ends))
        return next(end for end in self.sent.ends if end.attempt_id == name)

    async def wait(self, seconds: float) -> None:
        """Time goes by, and the watchdog looks once a second."""
        for _ in range(round(seconds)):
            self.clock.now_seconds += 1.0
            self.watchdog.look()
            await asyncio.sleep(0)


@asynccontextmanager
async def hearing(replicas: Replicas, clock: MovedClock) -> AsyncIterator[Hearing]:
    made = Hearing(replicas, clock)
    yield made
    await made.attempts.close()
