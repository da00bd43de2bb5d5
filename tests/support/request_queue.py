"""A gateway's nodes and requests without its ports: real links, placement and queues, and a directory that lets everyone in."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count
from typing import Any, cast

from potluck_coordinator.desks import DirectoryPort, SessionGrant
from potluck_coordinator.domain.admission import AdmissionLimits
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.dispatching import Books
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.ledger_writer import LedgerWriter
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.requests import RequestLimits, RequestService
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.values import (
    AccountId,
    AttemptId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Hello,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
)
from tests.support.replicas import catalogue_entry
from tests.support.request_path import request_by

MODEL = ModelId("tiny")
SLOTS = 2
CONTEXT_TOKENS = 2048


class OpenDoor:
    """A directory and its desks: everyone may serve, and has the model."""

    def __init__(self) -> None:
        self.nodes = self.enrolment = self.ledger = self
        self.epochs = count(1)
        self.asked: list[NodeId] = []

    async def is_enrolled(self, node_id: NodeId) -> bool:
        self.asked.append(node_id)
        return True

    async def open_session(self, hello: Hello, *, gateway_epoch: int) -> SessionGrant:
        return SessionGrant(next(self.epochs), AccountId(f"owner of {hello.node_id}"), wish(hello.node_id))

    async def close_session(self, node_id: NodeId, epoch: int, reason: GoodbyeReason | None) -> None:
        pass


def wish(node_id: NodeId, revision: int = 1, **changes: Any) -> DesiredState:
    file = ModelFile(MODEL, "path:/models", "tiny.gguf", "0" * 64, 10)
    engine = DesiredEngine(ReplicaId(f"{node_id}/tiny"), file, "llamacpp", SLOTS, CONTEXT_TOKENS)
    return DesiredState(revision, (replace(engine, **changes),))


def status_of(node_id: NodeId, **changes: Any) -> EngineStatus:
    values: dict[str, Any] = {
        "slot_count": SLOTS,
        "context_length_tokens": CONTEXT_TOKENS,
        "endpoints": (Endpoint.CHAT_COMPLETIONS,),
    }
    return EngineStatus(ReplicaId(f"{node_id}/tiny"), MODEL, EngineState.READY, "llamacpp", **(values | changes))


def hello_of(node_id: NodeId, session_id: str = "session", **changes: Any) -> Hello:
    status = status_of(node_id, **changes)
    return Hello(1, node_id, SessionId(session_id), "test", Inventory(), NodeState.SERVING, engines=(status,))


class Front:
    """The part of a gateway between its ports: what a test or a benchmark says of nodes and requests happens there."""

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        queue_length_max: int = 64,
        queue_wait_seconds_max: float = 1500.0,
        queue_bytes_max: int = 1 << 28,
    ) -> None:
        self.directory = OpenDoor()
        self.clock = clock or SystemClock()
        self.links = Links(cast("DirectoryPort", self.directory), LivenessLimits(), self.clock, self.look_at_queues)
        numbers = count(1)
        entry = catalogue_entry("tiny", context_length_tokens=CONTEXT_TOKENS)
        self.requests = RequestService(
            links=self.links,
            books=Books(
                ledger=LedgerWriter(cast("Any", self.directory), lambda _: None),
                replica_payees=dict,
                new_attempt_id=lambda: AttemptId(f"attempt {next(numbers)}"),
                gateway_epoch=1,
            ),
            catalogue=lambda: {MODEL: entry},
            limits=RequestLimits(AdmissionLimits(queue_length_max, queue_wait_seconds_max, queue_bytes_max=queue_bytes_max)),
            clock=self.clock,
            draw=lambda: 0.5,
        )
        self.asked: list[asyncio.Task[Answer]] = []

    def look_at_queues(self) -> None:
        """As the gateway's tick does."""
        self.requests.queues.serve_all()

    async def joined(self, name: str, **changes: Any) -> NodeSession:
        """A node with one ready replica, which has `changes`."""
        session, _, _ = await self.links.connect(hello_of(NodeId(name), **changes))
        return session

    def ask(self, **fields: Any) -> asyncio.Task[Answer]:
        """A request on its way; it goes as far as it can in the loop's next turn."""
        request: InferenceRequest = request_by(**{"model_id": MODEL, "body": b"%d" % len(self.asked), **fields})
        self.asked.append(asyncio.ensure_future(self.requests.begin(request)))
        return self.asked[-1]

    async def stop(self) -> None:
        """Nobody waits any more."""
        for task in self.asked:
            task.cancel()
        await asyncio.gather(*self.asked, return_exceptions=True)
        await self.links.stop()


async def settle() -> None:
    """Whatever can go on without an answer does."""
    for _ in range(30):
        await asyncio.sleep(0)


def bodies_at(session: NodeSession) -> list[bytes]:
    """What each request at a node is, in the order of their coming."""
    return [request.body for request in session.requests.values()]
