"""The two gRPC ports themselves: who gets past the link port's wrapper, how requests run on the grpc port, and how ports are bound."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import pytest

from potluck_coordinator import listening
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway.grpc_server import GrpcServer, build_link_server
from potluck_coordinator.gateway.interceptors import calling_node
from potluck_protocol import identity
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import common_pb2, inference_pb2, node_pb2, node_pb2_grpc
from potluck_protocol.values import NodeId
from tests.support.grpc_edge import BODY, CLOCK, GrpcEdge, ScriptedRequests, failure_code, grant, interceptor


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("pool") / "ca", CLOCK.unix_ms())


# The link port.


class Welcoming(node_pb2_grpc.NodeServiceServicer):
    """Lets in whoever the wrapper lets through, and says who that was."""

    async def Link(  # noqa: N802
        self, requests: AsyncIterator[node_pb2.NodeFrame], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[node_pb2.CoordinatorFrame]:
        yield node_pb2.CoordinatorFrame(goodbye=node_pb2.Goodbye(message=calling_node()))


async def met(authority: CertificateAuthority, key_pem: bytes, outcasts: Mapping[NodeId, str]) -> str:
    server = build_link_server(grant(authority), interceptor(outcasts), Welcoming())
    port = await server.start("127.0.0.1", 0)
    certificate = authority.issue_node_certificate(identity.public_key_der(key_pem), CLOCK.unix_ms())
    credentials = grpc.ssl_channel_credentials(authority.ca_certificate_pem.encode(), key_pem, certificate.encode())
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=CHANNEL_OPTIONS) as channel:
            call = node_pb2_grpc.NodeServiceStub(channel).Link()
            frame = await call.read()
            return str(frame.goodbye.message)
    finally:
        await server.stop(0)


async def test_the_servicer_learns_which_node_it_is(authority: CertificateAuthority) -> None:
    key = identity.new_private_key()
    assert await met(authority, key, {}) == identity.node_id_of_public_key(identity.public_key_der(key))


@pytest.mark.parametrize(("reason", "words"), [("too many wrong answers", " (too many wrong answers);"), ("", ";")])
async def test_a_revoked_node_does_not_reach_the_servicer(authority: CertificateAuthority, reason: str, words: str) -> None:
    key = identity.new_private_key()
    node_id = identity.node_id_of_public_key(identity.public_key_der(key))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await met(authority, key, {node_id: reason})
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert f"no longer part of the pool{words}" in (caught.value.details() or "")


# Requests by gRPC.


async def test_a_whole_answer(authority: CertificateAuthority) -> None:
    async with GrpcEdge(authority, ScriptedRequests()) as edge:
        events = [event async for event in edge.generate()]
    (answer,) = edge.requests.answers
    assert (answer.request.account_id, answer.request.request_id, answer.request.stream) == ("acct_user", "mine", True)
    assert events[0].placed == inference_pb2.Placed(request_id="mine", node_id="n" * 26, model_id="m", service_tier="flex")
    assert [event.data for event in events[1:-1]] == [b"data: 1\n\n", b"data: 2\n\n"]
    usage = common_pb2.Usage(prompt_token_count=3, completion_token_count=5, cached_prompt_token_count=1)
    assert events[-1].finished == inference_pb2.Finished(usage=usage, charge_micro_credits=23)
    assert answer.closed.is_set()


async def test_a_broken_answer_keeps_its_part_and_never_finishes(authority: CertificateAuthority) -> None:
    async with GrpcEdge(authority, ScriptedRequests(breaks=PotluckError(ErrorCode.NODE_LOST))) as edge:
        assert await failure_code(edge.generate()) == ("node_lost", [b"data: 1\n\n", b"data: 2\n\n"])
    assert edge.requests.answers[0].closed.is_set()


async def test_a_client_that_goes_closes_the_answer(authority: CertificateAuthority) -> None:
    async with GrpcEdge(authority, ScriptedRequests(hangs=True)) as edge:
        call = edge.generate()
        await call.read()
        call.cancel()
        async with asyncio.timeout(10):
            await edge.requests.answers[0].closed.wait()


@pytest.mark.parametrize(("body", "endpoint"), [(b"junk", 1), (b"{}", 1), (BODY, 0), (BODY, 99)])
async def test_bad_requests_go_no_further(authority: CertificateAuthority, body: bytes, endpoint: int) -> None:
    async with GrpcEdge(authority, ScriptedRequests()) as edge:
        assert await failure_code(edge.generate(body, endpoint)) == ("invalid_request", [])
    assert edge.requests.answers == []


# Binding.


def link_server(authority: CertificateAuthority) -> GrpcServer:
    return build_link_server(grant(authority), interceptor(), Welcoming())


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "PREDECESSOR_SECONDS_MAX", 0.4)
    monkeypatch.setattr(listening, "RETRY_SECONDS", 0.02)


@pytest.mark.usefixtures("hurry")
async def test_a_port_that_becomes_free_is_taken(authority: CertificateAuthority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        server = link_server(authority)
        starting = asyncio.ensure_future(server.start("127.0.0.1", port))
        await asyncio.sleep(0.1)
        assert not starting.done()
    assert await starting == port
    await server.stop(0)


@pytest.mark.usefixtures("hurry")
async def test_a_port_that_stays_taken_is_named(authority: CertificateAuthority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(PotluckError) as caught:
            await link_server(authority).start("127.0.0.1", port)
    assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert f"Port {port} of 127.0.0.1" in caught.value.message
    assert "--link-port" in caught.value.message


@pytest.mark.usefixtures("hurry")
async def test_two_coordinators_never_share_a_port(authority: CertificateAuthority) -> None:
    first = link_server(authority)
    port = await first.start("127.0.0.1", 0)
    try:
        with pytest.raises(PotluckError, match="is taken by another process"):
            await link_server(authority).start("127.0.0.1", port)
    finally:
        await first.stop(0)


async def test_an_address_that_is_not_ours_fails_at_once(authority: CertificateAuthority) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(PotluckError, match="Cannot assign requested address"):
            await link_server(authority).start("192.0.2.1", 0)
