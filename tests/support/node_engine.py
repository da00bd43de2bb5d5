"""An engine whose every byte a test decides, replicas that point at it, and a node's link wired to both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from potluck_node.attached_servers import AttachedServers
from potluck_node.attempts import Attempts
from potluck_node.credentials import Credentials
from potluck_node.domain.thermal import HeatLimits
from potluck_node.engine_exchange import EngineConnections
from potluck_node.engine_session import engine_session
from potluck_node.engines.base import EngineAddress
from potluck_node.heat import Heat
from potluck_node.identity_store import StateFolder
from potluck_node.line_watch import LineWatch
from potluck_node.link import Link
from potluck_node.peer_measurement import PeerMeasuring
from potluck_node.power_caps import PowerCaps
from potluck_node.readings import Readings
from potluck_node.replicas import Replicas, Residence
from potluck_node.report import NodeReport
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.values import (
    DesiredState,
    Endpoint,
    EngineState,
    EngineStatus,
    FailureKind,
    Inventory,
    ModelId,
    ReplicaId,
    SessionId,
)
from tests.support.link_coordinator import LinkCoordinator

REPLICA = ReplicaId("r1")


class Conversation:
    """One request at the engine: the test says what is answered, and sees when the agent hangs up."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.gone = asyncio.Event()
        self.written_bytes = 0
        self._pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    def say(self, data: bytes) -> None:
        self._pieces.put_nowait(data)

    def finish(self) -> None:
        self._pieces.put_nowait(None)

    def break_off(self) -> None:
        self._pieces.put_nowait(ConnectionResetError())

    async def answer(self, request: web.Request, response: web.StreamResponse) -> None:
        try:
            while True:
                piece = await self._pieces.get()
                if isinstance(piece, Exception):
                    assert request.transport is not None
                    request.transport.abort()
                    return
                if piece is None:
                    return
                await response.write(piece)
                self.written_bytes += len(piece)
        except (ConnectionError, asyncio.CancelledError):
            self.gone.set()
            raise


class DirectedEngine:
    """An HTTP server on loopback that answers as the test says."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.content_type = "text/event-stream"
        self.conversations: asyncio.Queue[Conversation] = asyncio.Queue()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        conversation = Conversation(await request.read())
        await self.conversations.put(conversation)
        response = web.StreamResponse(status=self.status, headers={"Content-Type": self.content_type})
        await response.prepare(request)
        await conversation.answer(request, response)
        return response

    async def next_conversation(self) -> Conversation:
        async with asyncio.timeout(5):
            return await self.conversations.get()


@asynccontextmanager
async def directed_engine() -> AsyncIterator[DirectedEngine]:
    engine = DirectedEngine()
    application = web.Application()
    for path in ("/v1/chat/completions", "/v1/completions"):
        application.router.add_post(path, engine.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield engine
    finally:
        await runner.cleanup()


class FixedReplicas:
    """Replicas that are there without a supervisor."""

    def __init__(self, url: str | None, slot_count: int = 4) -> None:
        self.url = url
        self.slot_count = slot_count
        self.state = EngineState.READY
        self.engine_kind = "scripted"
        self.lives_at: Residence | None = None
        self.desired: list[DesiredState] = []
        self.paused: list[bool] = []
        self._callbacks: list[Callable[[], None]] = []
        self.death_callbacks: list[Callable[[ReplicaId, FailureKind], None]] = []
        self.ended: list[str] = []
        self.questions: list[float | None] = []
        self.answers_when_asked = True

    def set_desired(self, desired: DesiredState) -> None:
        before = self.replica_id
        self.desired.append(desired)
        if self.replica_id != before:
            for callback in self._callbacks:
                callback()

    def set_paused(self, paused: bool) -> None:
        self.paused.append(paused)

    def statuses(self) -> tuple[EngineStatus, ...]:
        endpoints = (Endpoint.CHAT_COMPLETIONS,)
        return (
            EngineStatus(self.replica_id, ModelId("tiny"), self.state, self.engine_kind, slot_count=self.slot_count, endpoints=endpoints),
        )

    def slot_count_of(self, replica_id: ReplicaId) -> int:
        return self.slot_count if replica_id == self.replica_id else 0

    @property
    def replica_id(self) -> ReplicaId:
        """The one wished for, or a name of its own where nobody wishes."""
        wished = [engine.replica_id for engine in self.desired[-1].engines if engine.model.model_id == "tiny"] if self.desired else []
        return wished[0] if wished else REPLICA

    def ready_address(self, replica_id: ReplicaId) -> EngineAddress | None:
        return EngineAddress(self.url) if self.url is not None and replica_id == self.replica_id else None

    def residence(self, replica_id: ReplicaId) -> Residence | None:
        return self.lives_at if replica_id == self.replica_id else None

    def cards_given(self) -> frozenset[str]:
        return frozenset(self.lives_at.card_uuids) if self.lives_at is not None else frozenset()

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def on_death(self, callback: Callable[[ReplicaId, FailureKind], None]) -> None:
        self.death_callbacks.append(callback)

    def end_hung(self, replica_id: ReplicaId, why: str) -> None:
        self.ended.append(why)
        self.die(FailureKind.HUNG)

    async def answers(self, replica_id: ReplicaId, *, token_seconds_max: float | None) -> bool:
        self.questions.append(token_seconds_max)
        return self.answers_when_asked

    def die(self, kind: FailureKind) -> None:
        """Its engine is gone, and the next one is there at once."""
        for callback in self.death_callbacks:
            callback(self.replica_id, kind)

    def change(self, state: EngineState) -> None:
        self.state = state
        for callback in self._callbacks:
            callback()

    async def run(self) -> None:
        await asyncio.Event().wait()


def heat_beside(readings: Readings, replicas: Replicas, folder: Path, clock: Clock) -> Heat:
    """What every report asks; without a look it takes nothing away."""
    return Heat(readings=readings, replicas=replicas, caps=PowerCaps(folder / "power_caps.json", clock), limits=HeatLimits(), clock=clock)


class WiredNode:
    """A running link with everything it needs."""

    def __init__(self, link: Link, attempts: Attempts, report: NodeReport, replicas: FixedReplicas, folder: StateFolder) -> None:
        self.link = link
        self.attempts = attempts
        self.report = report
        self.replicas = replicas
        self.folder = folder
        self.task: asyncio.Task[None]


@asynccontextmanager
async def wired_node(
    coordinator: LinkCoordinator | None, folder: Path, url: str | None, *, clock: Clock | None = None, slot_count: int = 4, **limits: Any
) -> AsyncIterator[WiredNode]:
    """Runs a node's link until the block ends. Without a coordinator to enrol at, the folder's node has joined already."""
    used_clock = clock or SystemClock()
    state = StateFolder(folder / "node")
    if coordinator is not None and not state.joined:
        coordinator.enrol(state)
    credentials = Credentials(state, used_clock, lambda: 0.5)
    replicas = FixedReplicas(url, slot_count)
    slot_count_max = limits.get("slot_count_max")
    async with engine_session() as http:
        attempts = Attempts(
            replicas=replicas,
            connections=EngineConnections(),
            clock=used_clock,
            node_state=lambda: report.state,
            slot_count_max=slot_count_max,
        )
        peers = PeerMeasuring(credentials.identity.node_id, None, used_clock)
        readings = Readings(replicas, http, heard=attempts.watches.heard)
        report = NodeReport(
            credentials=credentials,
            session_id=SessionId(limits.get("session_id", "session-1")),
            inventory=Inventory(cpu_count=2, memory_bytes=8 << 30),
            replicas=replicas,
            attempts=attempts,
            readings=readings,
            heat=heat_beside(readings, replicas, state.path, used_clock),
            peers=peers,
            line=LineWatch(credentials, state.path, used_clock, lambda: 0.5, quiet=lambda: False),
            attached=AttachedServers(()),
            cache_dir=folder,
            slot_count_max=slot_count_max,
            clock=used_clock,
        )
        link = Link(
            credentials=credentials, attempts=attempts, replicas=replicas, peers=peers, report=report, clock=used_clock, jitter=lambda: 0.5
        )
        node = WiredNode(link, attempts, report, replicas, state)
        node.task = asyncio.create_task(link.run())
        try:
            yield node
        finally:
            node.task.cancel()
            await asyncio.gather(node.task, return_exceptions=True)
            await attempts.close()
