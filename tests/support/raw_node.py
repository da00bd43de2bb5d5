"""A node that is nothing but its link: tests write its frames by hand and read what the coordinator sends."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from potluck_protocol import codec
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.connection import fetch_connection
from potluck_protocol.identity import certificate_request, new_private_key
from potluck_protocol.v1 import node_pb2, node_pb2_grpc
from potluck_protocol.values import (
    AccountId,
    Endpoint,
    EndReason,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Inventory,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
)
from tests.support.coordinator import TINY, Coordinator

_beat_numbers = itertools.count(1)
"""Of all nodes together: they grow over the links of one agent, too."""


@dataclass(frozen=True, slots=True)
class Credentials:
    node_id: NodeId
    key_pem: bytes
    certificate_pem: str


async def enrol(coordinator: Coordinator, owner: AccountId | None = None) -> Credentials:
    """Enrols a fresh key through the directory's desk, owned by the operator where nobody is named."""
    accounts = await coordinator.directory.accounts.list_accounts()
    token, secret = await coordinator.directory.accounts.create_join_token(owner or accounts[0].account_id, 60)
    key = new_private_key()
    enrolment = await coordinator.directory.enrolment.join(
        certificate_request(key), token.token_id, secret, "raw", Inventory(memory_bytes=8 << 30)
    )
    return Credentials(enrolment.node_id, key, enrolment.certificate_pem)


@dataclass
class RawNode:
    """One link; `received` is every frame so far."""

    credentials: Credentials
    call: Any
    session_id: str
    epoch: int = 0
    received: list[node_pb2.CoordinatorFrame] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(
            replica_id=ReplicaId(f"{self.credentials.node_id}/tiny"),
            model_id=TINY,
            state=EngineState.READY,
            engine_kind="scripted",
            slot_count=2,
            context_length_tokens=512,
            endpoints=(Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS),
        )

    async def send(self, **fields: Any) -> None:
        await self.call.write(node_pb2.NodeFrame(epoch=self.epoch, **fields))

    async def hello(self, in_flight: tuple[str, ...] = (), **changes: Any) -> node_pb2.CoordinatorFrame:
        """Says hello and waits for the welcome."""
        values = {
            "protocol_version": 1,
            "node_id": self.credentials.node_id,
            "session_id": SessionId(self.session_id),
            "agent_version": "raw",
            "inventory": Inventory(memory_bytes=8 << 30),
            "state": NodeState.SERVING,
            "in_flight": in_flight,
            "engines": (self.status,),
        }
        await self.send(hello=codec.hello_message(Hello(**(values | changes))))
        frame = await self.wait_for(lambda frame: frame.HasField("welcome") or frame.HasField("goodbye"))
        self.epoch = frame.welcome.epoch
        return frame

    async def beat(self, state: NodeState = NodeState.SERVING) -> None:
        beat = Heartbeat(1, state, (self.status,), 1 << 40, number=next(_beat_numbers))
        await self.send(heartbeat=codec.heartbeat_message(beat))

    async def chunk(self, attempt_id: str, sequence: int, data: bytes, content_type: str = "text/event-stream", status: int = 200) -> None:
        chunk = node_pb2.AttemptChunk(attempt_id=attempt_id, sequence=sequence, data=data)
        if sequence == 0:
            chunk.head.http_status, chunk.head.content_type = status, content_type
        await self.send(chunks=[chunk])

    async def end(self, attempt_id: str, sequence: int, reason: EndReason = EndReason.COMPLETED) -> None:
        await self.send(ends=[node_pb2.AttemptEnd(attempt_id=attempt_id, sequence=sequence, reason=codec.END_REASON_NUMBER[reason])])

    async def pass_probe(self, number: int = 0) -> None:
        """Answers the one-token request that a suspected replica gets, the first or a later one."""

        def probes() -> list[node_pb2.StartAttempt]:
            return [start for start in self.starts() if start.attempt_id.startswith("probe_")]

        await self.wait_for(lambda _: len(probes()) > number)
        probe = probes()[number]
        await self.chunk(probe.attempt_id, 0, b"data: {}\n\ndata: [DONE]\n\n")
        await self.end(probe.attempt_id, 1)

    async def goodbye(self, reason: GoodbyeReason = GoodbyeReason.STOPPING) -> None:
        await self.send(goodbye=codec.goodbye_message(reason))

    async def next_start(self, number: int = 0) -> node_pb2.StartAttempt:
        """The attempt that the coordinator starts here, the first or a later one."""
        await self.wait_for(lambda _: len(self.starts()) > number)
        return self.starts()[number]

    def starts(self) -> list[node_pb2.StartAttempt]:
        return [start for frame in self.received for start in frame.starts]

    async def wait_for(self, wanted: Callable[[node_pb2.CoordinatorFrame], bool], seconds_max: float = 10) -> node_pb2.CoordinatorFrame:
        """The first frame received, before or from now on, that is wanted."""
        async with asyncio.timeout(seconds_max):
            while True:
                for frame in self.received:
                    if wanted(frame):
                        return frame
                assert not self.ended, "the link ended first"
                self.arrived.clear()
                await self.arrived.wait()

    async def wait_until_ended(self, seconds_max: float = 10) -> None:
        async with asyncio.timeout(seconds_max):
            while not self.ended:
                self.arrived.clear()
                await self.arrived.wait()

    async def read(self) -> None:
        try:
            while (frame := await self.call.read()) is not grpc.aio.EOF:
                self.received.append(frame)
                self.arrived.set()
        except grpc.aio.AioRpcError:
            pass
        finally:
            self.ended = True
            self.arrived.set()


@asynccontextmanager
async def raw_link(coordinator: Coordinator, credentials: Credentials, session_id: str = "session") -> AsyncIterator[RawNode]:
    """Dials the link port; nothing is sent yet. Leaving cuts the link without a goodbye."""
    connection = await asyncio.to_thread(fetch_connection, coordinator.url)
    tls = grpc.ssl_channel_credentials(connection.ca_certificate_pem.encode(), credentials.key_pem, credentials.certificate_pem.encode())
    async with grpc.aio.secure_channel(connection.link_target, tls, options=CHANNEL_OPTIONS) as channel:
        node = RawNode(credentials, node_pb2_grpc.NodeServiceStub(channel).Link(), session_id)
        reading = asyncio.ensure_future(node.read())
        try:
            yield node
        finally:
            node.call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
