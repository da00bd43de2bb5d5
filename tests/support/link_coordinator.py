"""The coordinator's side of a link, driven by a test frame by frame over real gRPC with mutual TLS, and the enrolment calls beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_protocol.channels import SERVER_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.codec import welcome_message
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import ErrorCode
from potluck_protocol.identity import node_id_of_public_key, public_key_der, public_key_of_request
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import common_pb2, node_pb2, node_pb2_grpc
from potluck_protocol.values import AccountId, AttemptId, DesiredState, ResumePoint, Welcome

WAIT_SECONDS = 5.0


class ServedLink:
    """One Link call as the coordinator sees it. A background task reads, so that the node is never held up by the test."""

    def __init__(self, context: Any, hello: node_pb2.NodeFrame) -> None:
        self._context = context
        self.hello = hello.hello
        self.frames: list[node_pb2.NodeFrame] = []
        self.ended = asyncio.Event()
        self._news = asyncio.Condition()
        self._over = asyncio.Event()
        self._writing = asyncio.Lock()

    async def send(self, **fields: Any) -> None:
        async with self._writing:
            await self._context.write(node_pb2.CoordinatorFrame(**fields))

    async def welcome(self, *, epoch: int = 1, lease_ttl_ms: int = 15_000, resume: dict[str, int] | None = None, **changes: Any) -> None:
        values: dict[str, Any] = {
            "protocol_version": 1,
            "epoch": epoch,
            "lease_ttl_ms": lease_ttl_ms,
            "heartbeat_busy_ms": 200,
            "heartbeat_idle_ms": 200,
            "desired": DesiredState(),
            "resume_points": {AttemptId(name): ResumePoint(sequence, sequence) for name, sequence in (resume or {}).items()},
        }
        await self.send(welcome=welcome_message(Welcome(**(values | changes))))

    async def start(
        self, attempt_id: str, *, stream: bool = True, window_bytes: int = 65_536, replica_id: str = "r1", body: bytes = b"{}"
    ) -> None:
        await self.send(
            starts=[
                node_pb2.StartAttempt(
                    attempt_id=attempt_id, replica_id=replica_id, endpoint=1, body=body, stream=stream, window_bytes=window_bytes
                )
            ]
        )

    async def acknowledge(self, attempt_id: str, next_sequence: int) -> None:
        await self.send(acknowledgements=[node_pb2.ChunkAcknowledgement(attempt_id=attempt_id, next_sequence=next_sequence)])

    def chunks(self, attempt_id: str) -> list[node_pb2.AttemptChunk]:
        return [chunk for frame in self.frames for chunk in frame.chunks if chunk.attempt_id == attempt_id]

    def data(self, attempt_id: str) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks(attempt_id))

    def end(self, attempt_id: str) -> node_pb2.AttemptEnd | None:
        return next((end for frame in self.frames for end in frame.ends if end.attempt_id == attempt_id), None)

    async def until(self, condition: Callable[[], Any], limit_seconds: float = WAIT_SECONDS) -> Any:
        """Waits until the frames so far satisfy the condition, and gives its value."""
        async with asyncio.timeout(limit_seconds), self._news:
            await self._news.wait_for(condition)
            return condition()

    async def until_end(self, attempt_id: str) -> node_pb2.AttemptEnd:
        end = await self.until(lambda: self.end(attempt_id))
        assert isinstance(end, node_pb2.AttemptEnd)
        return end

    def close(self) -> None:
        """Ends the call as a broken connection does: without a goodbye."""
        self._over.set()

    async def serve(self, *, renew_leases: Callable[[], bool], lease_ttl_ms: int) -> None:
        reader = asyncio.create_task(self._read(renew_leases, lease_ttl_ms))
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait((reader, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            over.cancel()
            self.ended.set()

    async def _read(self, renew_leases: Callable[[], bool], lease_ttl_ms: int) -> None:
        while isinstance(frame := await self._context.read(), node_pb2.NodeFrame):
            async with self._news:
                self.frames.append(frame)
                self._news.notify_all()
            if frame.HasField("heartbeat") and renew_leases():
                number = frame.heartbeat.number
                await self.send(lease=node_pb2.LeaseRenewal(epoch=frame.epoch, lease_ttl_ms=lease_ttl_ms, heartbeat_number=number))


class LinkCoordinator(node_pb2_grpc.NodeServiceServicer, node_pb2_grpc.EnrolmentServiceServicer):
    """A CA, a link port and a grpc port."""

    def __init__(self, folder: Path) -> None:
        self.clock = SystemClock()
        self.authority = CertificateAuthority.load_or_create(folder / "ca", self.clock.unix_ms())
        self.links: asyncio.Queue[ServedLink] = asyncio.Queue()
        self.renew_leases = True
        self.lease_ttl_ms = 15_000
        self.refuse_links = False
        self.come_again_seconds = 0.0
        """What the next link is told, once, instead of being taken in."""
        self.refuse_renewals = False
        self.join_requests: list[node_pb2.JoinRequest] = []
        self.link_port = 0
        self.grpc_port = 0

    @property
    def connection(self) -> ConnectionDocument:
        return ConnectionDocument(1, "pool", self.grpc_port, self.link_port, "127.0.0.1", self.authority.ca_certificate_pem)

    async def Link(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        del request_iterator
        first = await context.read()
        if self.refuse_links:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "revoked")
        if self.come_again_seconds:
            retry_after_ms, self.come_again_seconds = int(self.come_again_seconds * 1000), 0.0
            detail = common_pb2.ErrorDetail(code=ErrorCode.QUEUE_FULL, message="Come again.", retry_after_ms=retry_after_ms)
            trailing = ((ERROR_DETAIL, detail.SerializeToString()),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Come again.", trailing)
        link = ServedLink(context, first)
        await self.links.put(link)
        await link.serve(renew_leases=lambda: self.renew_leases, lease_ttl_ms=self.lease_ttl_ms)

    async def Join(self, request: node_pb2.JoinRequest, context: Any) -> node_pb2.JoinResponse:  # noqa: N802
        self.join_requests.append(request)
        key = public_key_of_request(request.certificate_request_der)
        certificate_pem = self.authority.issue_node_certificate(key, self.clock.unix_ms())
        return node_pb2.JoinResponse(node_id=node_id_of_public_key(key), certificate_pem=certificate_pem, owner_account_id="acct_owner")

    async def Renew(self, request: node_pb2.RenewRequest, context: Any) -> node_pb2.RenewResponse:  # noqa: N802
        if self.refuse_renewals:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "revoked")
        key = public_key_of_request(request.certificate_request_der)
        return node_pb2.RenewResponse(certificate_pem=self.authority.issue_node_certificate(key, self.clock.unix_ms()))

    async def next_link(self, limit_seconds: float = WAIT_SECONDS) -> ServedLink:
        async with asyncio.timeout(limit_seconds):
            return await self.links.get()

    def enrol(self, folder: StateFolder, *, issued_at_unix_ms: int | None = None) -> NodeIdentity:
        """Fills a state folder as a join does."""
        key = public_key_der(folder.made_private_key())
        issued_at = self.clock.unix_ms() if issued_at_unix_ms is None else issued_at_unix_ms
        folder.write_certificate(self.authority.issue_node_certificate(key, issued_at))
        identity = NodeIdentity(node_id_of_public_key(key), AccountId("acct_owner"), "box", "http://127.0.0.1:9", self.connection)
        folder.write_identity(identity)
        return identity


@asynccontextmanager
async def link_coordinator(folder: Path) -> AsyncIterator[LinkCoordinator]:
    coordinator = LinkCoordinator(folder)
    server_identity = coordinator.authority.issue_server_certificate(coordinator.clock.unix_ms())
    pairs = [(server_identity.private_key_pem, server_identity.certificate_chain_pem)]
    link_server, grpc_server = grpc.aio.server(options=SERVER_OPTIONS), grpc.aio.server(options=SERVER_OPTIONS)
    node_pb2_grpc.add_NodeServiceServicer_to_server(coordinator, link_server)
    node_pb2_grpc.add_EnrolmentServiceServicer_to_server(coordinator, grpc_server)
    mutual = grpc.ssl_server_credentials(
        pairs, root_certificates=coordinator.authority.ca_certificate_pem.encode(), require_client_auth=True
    )
    coordinator.link_port = link_server.add_secure_port("127.0.0.1:0", mutual)
    coordinator.grpc_port = grpc_server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pairs))
    await link_server.start()
    await grpc_server.start()
    try:
        yield coordinator
    finally:
        await asyncio.gather(link_server.stop(0), grpc_server.stop(0))
