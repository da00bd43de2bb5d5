"""Someone else answers where the coordinator should: not one byte of a secret may reach them."""

# ruff: noqa: N802 - the contract's names
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_node import enrolment
from potluck_node.identity_store import StateFolder
from potluck_protocol import identity
from potluck_protocol.channels import CHANNEL_OPTIONS, SERVER_NAME
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import ConnectionDocument, Invite, certificate_hash
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2, node_pb2_grpc
from potluck_protocol.values import Inventory, TokenId
from tests.support.certificates import SERVER, Credential, bent_certificate

SECRET = "Zq7-join-token-secret-that-nobody-may-see-x"
CLOCK = SystemClock()


@dataclass
class Eavesdropper:
    """A socket in front of another that keeps every byte a client sends."""

    target_port: int
    heard: bytearray = field(default_factory=bytearray)
    connection_count: int = 0
    port: int = 0
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self.target_port)

        async def back() -> None:
            while data := await onward_reader.read(65536):
                writer.write(data)
            writer.close()

        returning = asyncio.ensure_future(back())
        try:
            while data := await reader.read(65536):
                self.heard += data
                onward_writer.write(data)
        finally:
            onward_writer.close()
            await asyncio.gather(returning, return_exceptions=True)


class Greedy(node_pb2_grpc.EnrolmentServiceServicer, node_pb2_grpc.NodeServiceServicer):
    """Keeps whatever it is told."""

    def __init__(self) -> None:
        self.secrets: list[str] = []
        self.hellos: list[object] = []

    async def Join(self, request: node_pb2.JoinRequest, context: object) -> node_pb2.JoinResponse:
        self.secrets.append(request.token_secret)
        return node_pb2.JoinResponse()

    async def Link(self, requests: AsyncIterator[node_pb2.NodeFrame], context: object) -> AsyncIterator[node_pb2.CoordinatorFrame]:
        async for frame in requests:
            self.hellos.append(frame)
            yield node_pb2.CoordinatorFrame()


async def greedy_server(servicer: Greedy, credential: Credential, ca_pem: str | None = None) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    node_pb2_grpc.add_EnrolmentServiceServicer_to_server(servicer, server)
    node_pb2_grpc.add_NodeServiceServicer_to_server(servicer, server)
    pair = [(credential.key_pem, credential.certificate_pem)]
    if ca_pem is None:
        credentials = grpc.ssl_server_credentials(pair)
    else:
        credentials = grpc.ssl_server_credentials(pair, root_certificates=ca_pem.encode(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    return server, port


def impostor_credentials(true: CertificateAuthority, evil: CertificateAuthority) -> dict[str, Credential]:
    """What an impostor might hold. The last three are signed by the true CA: a volunteer of the pool who plays coordinator."""
    now = CLOCK.unix_ms()
    server = evil.issue_server_certificate(now)
    node_key = identity.new_private_key()
    node = true.issue_node_certificate(identity.public_key_der(node_key), now)
    other_name: list[x509.GeneralName] = [x509.DNSName("coordinator.elsewhere")]
    return {
        "another CA": Credential(server.private_key_pem, server.certificate_chain_pem),
        "a node's certificate": Credential(node_key, node.encode()),
        "a server's certificate for another name": bent_certificate(
            true, identity.new_private_key(), uris=[], other_names=other_name, usages=[SERVER]
        ),
        "the name in a client's certificate": bent_certificate(
            true, identity.new_private_key(), uris=[], other_names=[x509.DNSName(SERVER_NAME)]
        ),
    }


IMPOSTORS = ["another CA", "a node's certificate", "a server's certificate for another name", "the name in a client's certificate"]


@pytest.fixture
def true_authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path / "true", CLOCK.unix_ms())


@pytest.fixture
def evil_authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path / "evil", CLOCK.unix_ms())


async def http_server(document: ConnectionDocument) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = document.to_json()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


async def try_to_join(
    tmp_path: Path, shown_ca_pem: str, invited_ca_pem: str, credential: Credential
) -> tuple[PotluckError, Greedy, Eavesdropper, Eavesdropper]:
    """A volunteer with an invite of the true pool meets the impostor. Answers with what the impostor's sockets heard."""
    greedy = Greedy()
    server, grpc_port = await greedy_server(greedy, credential)
    grpc_ear = Eavesdropper(grpc_port)
    await grpc_ear.start()
    document = ConnectionDocument(1, "pool", grpc_ear.port, grpc_ear.port, None, shown_ca_pem)
    http = await http_server(document)
    http_ear = Eavesdropper(http.sockets[0].getsockname()[1])
    await http_ear.start()
    invite = Invite(f"http://127.0.0.1:{http_ear.port}", certificate_hash(invited_ca_pem), TokenId("abcdefghijkl"), SECRET)
    try:
        with pytest.raises(PotluckError) as caught:
            await enrolment.join(invite, StateFolder(tmp_path / "node"), display_name="box", inventory=Inventory(), clock=CLOCK)
    finally:
        await server.stop(0)
        http.close()
        await grpc_ear.stop()
        await http_ear.stop()
    return caught.value, greedy, http_ear, grpc_ear


async def test_a_coordinator_with_another_ca_hears_nothing(
    tmp_path: Path, true_authority: CertificateAuthority, evil_authority: CertificateAuthority
) -> None:
    credential = impostor_credentials(true_authority, evil_authority)["another CA"]
    error, greedy, http_ear, grpc_ear = await try_to_join(
        tmp_path, evil_authority.ca_certificate_pem, true_authority.ca_certificate_pem, credential
    )
    assert error.code is ErrorCode.INVALID_CERTIFICATE
    assert "another CA" in error.message
    assert http_ear.connection_count == 1
    assert b"GET /pool/v1/connection" in http_ear.heard
    assert grpc_ear.connection_count == 0
    for word in (SECRET.encode(), b"abcdefghijkl"):
        assert word not in http_ear.heard
    assert greedy.secrets == []


@pytest.mark.parametrize("name", IMPOSTORS)
async def test_showing_the_true_ca_does_not_help(
    tmp_path: Path, true_authority: CertificateAuthority, evil_authority: CertificateAuthority, name: str
) -> None:
    credential = impostor_credentials(true_authority, evil_authority)[name]
    true_pem = true_authority.ca_certificate_pem
    error, greedy, http_ear, grpc_ear = await try_to_join(tmp_path, true_pem, true_pem, credential)
    assert error.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert grpc_ear.connection_count >= 1
    for word in (SECRET.encode(), b"abcdefghijkl"):
        assert word not in http_ear.heard + grpc_ear.heard
    assert greedy.secrets == []


@pytest.mark.parametrize("name", IMPOSTORS)
async def test_nor_does_a_node_open_its_link_to_one(
    true_authority: CertificateAuthority, evil_authority: CertificateAuthority, name: str
) -> None:
    greedy = Greedy()
    credential = impostor_credentials(true_authority, evil_authority)[name]
    server, port = await greedy_server(greedy, credential, true_authority.ca_certificate_pem)
    key_pem = identity.new_private_key()
    certificate = true_authority.issue_node_certificate(identity.public_key_der(key_pem), CLOCK.unix_ms())
    channel_credentials = grpc.ssl_channel_credentials(true_authority.ca_certificate_pem.encode(), key_pem, certificate.encode())
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", channel_credentials, options=CHANNEL_OPTIONS) as channel:
            call = node_pb2_grpc.NodeServiceStub(channel).Link(iter([node_pb2.NodeFrame(epoch=1)]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert greedy.hellos == []
    finally:
        await server.stop(0)


async def test_the_true_coordinator_does_hear_the_secret(tmp_path: Path, true_authority: CertificateAuthority) -> None:
    """The same set-up with the right certificate gets the secret: the refusals above are not an accident of the set-up."""
    made = true_authority.issue_server_certificate(int(datetime.now(UTC).timestamp() * 1000))
    true_pem = true_authority.ca_certificate_pem
    error, greedy, _, grpc_ear = await try_to_join(
        tmp_path, true_pem, true_pem, Credential(made.private_key_pem, made.certificate_chain_pem)
    )
    assert error.code is ErrorCode.INVALID_CERTIFICATE  # its answer carries no certificate
    assert greedy.secrets == [SECRET]
    assert SECRET.encode() not in grpc_ear.heard
