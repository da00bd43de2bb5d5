"""Real links and sessions on a clock that a test moves, with nodes that answer, beat and give tokens for as long as they are lively."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

from potluck_coordinator.desks import SessionGrant
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.domain.placement import ReplicaView
from potluck_coordinator.gateway.judging import LOOK_SECONDS
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.relay import AnswerHead, Relay
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import (
    AccountId,
    AttemptId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    EndReason,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
    StartAttempt,
)
from tests.support.request_path import request_by


class HandClock:
    seconds = 100.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    def unix_ms(self) -> int:
        return int(self.seconds * 1000)


class Desk:
    """What `Links` asks of a directory, and what it tells it."""

    def __init__(self) -> None:
        self.nodes = self.lethal = self
        self.desired: dict[NodeId, DesiredState] = {}
        self.closed: list[tuple[NodeId, GoodbyeReason | None]] = []
        self.deaths: list[object] = []

    async def open_session(self, hello: Hello, *, gateway_epoch: int) -> SessionGrant:
        return SessionGrant(1, AccountId(f"owner of {hello.node_id}"), self.desired[hello.node_id])

    async def close_session(self, node_id: NodeId, _epoch: int, reason: GoodbyeReason | None) -> None:
        self.closed.append((node_id, reason))

    async def report_death(self, death: object) -> None:
        self.deaths.append(death)


@dataclass
class JudgedNode:
    """One node with one replica."""

    node_id: NodeId
    model_id: ModelId
    session: NodeSession
    hello: Hello
    lively: bool = True
    """Its agent runs, and its line carries."""
    talks: bool = True
    """Its engine gives a token each tick to everything that runs there."""
    beat_count: int = 0
    beaten_at: float = 0.0
    starts: list[node_pb2.StartAttempt] = field(default_factory=list)
    asked_count: int = 0

    @property
    def replica_id(self) -> ReplicaId:
        return ReplicaId(f"{self.node_id}/{self.model_id}")

    @property
    def view(self) -> ReplicaView:
        (view,) = self.session.replica_views()
        return view


class JudgedPool:
    """The pool; `wait` lets time pass."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.desk = Desk()
        self.links = Links(self.desk, LivenessLimits(), self.clock, lambda: None)
        self.nodes: dict[str, JudgedNode] = {}
        self._numbers = itertools.count()

    async def add(self, name: str, model: str = "tiny", slot_count: int = 4) -> JudgedNode:
        node_id, model_id = NodeId(name), ModelId(model)
        replica_id = ReplicaId(f"{name}/{model}")
        wish = DesiredEngine(replica_id, ModelFile(model_id, "path:/m", "m", "0" * 64, 1), "scripted", slot_count, 512)
        self.desk.desired[node_id] = DesiredState(1, (wish,))
        status = EngineStatus(
            replica_id, model_id, EngineState.READY, "scripted", slot_count=slot_count, endpoints=(Endpoint.CHAT_COMPLETIONS,)
        )
        hello = Hello(1, node_id, SessionId(name), "test", Inventory(), NodeState.SERVING, engines=(status,))
        session, _, _ = await self.links.connect(hello)
        node = self.nodes[name] = JudgedNode(node_id, model_id, session, hello, beaten_at=self.clock.seconds)
        return node

    def start(self, node: JudgedNode, tokens: int = 40, **fields: object) -> Relay:
        """An attempt there, with so many tokens already come, 20 ms apart."""
        attempt_id = AttemptId(f"att_{next(self._numbers)}")
        relay = Relay(attempt_id, 64 * 1024, self.clock.seconds, node.session.acknowledge)
        request = request_by(model_id=node.model_id, **fields)
        start = StartAttempt(attempt_id, node.replica_id, request.endpoint, request.body, request.stream, 64 * 1024)
        node.session.start(start, relay, self.clock.seconds, request)
        self.links.node_changed(node.node_id)
        if tokens:
            relay.head = AnswerHead(200, "text/event-stream")
        for _ in range(tokens):
            self.clock.seconds += 0.02
            self.give(node, relay)
        return relay

    def give(self, node: JudgedNode, relay: Relay, data: bytes = b"x") -> None:
        """A token."""
        node.session.heard_at = self.clock.seconds
        relay.receive(relay.next_sequence, data, self.clock.seconds)

    def end(self, node: JudgedNode, relay: Relay, reason: EndReason = EndReason.COMPLETED) -> None:
        """Its end, and nobody waits for it any more."""
        relay.end(relay.next_sequence, reason, "")
        self.links.finish(node.session, relay.attempt_id, node.replica_id)

    def beat(self, node: JudgedNode) -> None:
        node.beat_count += 1
        node.beaten_at = node.session.heard_at = self.clock.seconds
        beat = Heartbeat(0, NodeState.SERVING, tuple(node.session.engines.values()), 0, number=node.beat_count)
        self.links.beat(node.session, beat, self.clock.seconds)

    async def wait(self, seconds: float) -> None:
        """Time passes, tick by tick, as the gateway's does."""
        for _ in range(round(seconds / LOOK_SECONDS)):
            self.clock.seconds += LOOK_SECONDS
            for node in self.nodes.values():
                await self._live(node)
            self.links.tick()
            await asyncio.sleep(0)

    async def _live(self, node: JudgedNode) -> None:
        asked = await self._read(node)
        if not node.lively or self.links.session(node.node_id) is not node.session:
            return
        for relay in tuple(node.session.attempts.values()) if node.talks else ():
            if not relay.over and relay.next_sequence:
                self.give(node, relay)
        period = 1.0 if node.session.attempts else 5.0
        if asked or self.clock.seconds - node.beaten_at >= period:
            self.beat(node)

    async def _read(self, node: JudgedNode) -> bool:
        """What the coordinator said; whether it asked for a beat."""
        outbox, asked = node.session.outbox, False
        while outbox is not None and outbox._filled.is_set():
            frame = await outbox.take()
            node.starts += frame.starts
            asked = asked or frame.beat_now
        node.asked_count += asked
        return asked
