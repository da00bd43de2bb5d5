"""The two gRPC ports themselves: who gets past the link port's wrapper, how requests run on the grpc port, and how ports are bound."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self, cast

import grpc
import pytest

from potluck_coordinator import listening
from potluck_coordinator.desks import GatewayGrant, KeyIdentity
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway.grpc_server import GrpcServer, build_grpc_server, build_link_server
from potluck_coordinator.gateway.inference_servicer import InferenceServicer
from potluck_coordinator.gateway.interceptors import CallInterceptor, calling_node
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.requests import InferenceRequest, RequestService
from potluck_coordinator.metrics import Metrics
from potluck_protocol import identity
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import account_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc, node_pb2, node_pb2_grpc, pool_pb2_grpc
from potluck_protocol.values import AccountId, KeyPrefix, NodeId, Usage

CLOCK = SystemClock()
KEY = "sk-potluck-useruser-" + "u" * 43
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("pool") / "ca", CLOCK.unix_ms())


async def _authenticate(secret: str) -> KeyIdentity:
    if secret != KEY:
        raise PotluckError(ErrorCode.INVALID_API_KEY)
    return KeyIdentity(KeyPrefix("useruser"), AccountId("acct_user"), operator=False, expires_at_unix_ms=0)


def interceptor(revoked: frozenset[NodeId] = frozenset()) -> CallInterceptor:
    return CallInterceptor(KeyCache(_authenticate, lambda: 1, CLOCK), lambda: revoked, CLOCK)


def grant(authority: CertificateAuthority) -> GatewayGrant:
    return GatewayGrant(1, "pool", authority.issue_server_certificate(CLOCK.unix_ms()))


# The link port.


class Welcoming(node_pb2_grpc.NodeServiceServicer):
    """Lets in whoever the wrapper lets through, and says who that was."""

    async def Link(  # noqa: N802
        self, requests: AsyncIterator[node_pb2.NodeFrame], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[node_pb2.CoordinatorFrame]:
        yield node_pb2.CoordinatorFrame(goodbye=node_pb2.Goodbye(message=calling_node()))


async def met(authority: CertificateAuthority, key_pem: bytes, revoked: frozenset[NodeId]) -> str:
    server = build_link_server(grant(authority), interceptor(revoked), Welcoming())
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
    assert await met(authority, key, frozenset()) == identity.node_id_of_public_key(identity.public_key_der(key))


async def test_a_revoked_node_does_not_reach_the_servicer(authority: CertificateAuthority) -> None:
    key = identity.new_private_key()
    node_id = identity.node_id_of_public_key(identity.public_key_der(key))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await met(authority, key, frozenset({node_id}))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "revoked" in (caught.value.details() or "")


# Requests by gRPC.


@dataclass
class ScriptedAnswer:
    """Gives its pieces, then hangs, breaks or ends."""

    request: InferenceRequest
    pieces: list[bytes]
    hangs: bool = False
    breaks: PotluckError | None = None
    node_id: NodeId = field(default=NodeId("n" * 26))
    usage: Usage | None = None
    charge_micro_credits: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def next_data(self) -> bytes | None:
        if self.pieces:
            return self.pieces.pop(0)
        if self.hangs:
            await asyncio.Event().wait()
        if self.breaks is not None:
            raise self.breaks
        self.usage, self.charge_micro_credits = Usage(3, 5, 1), 23
        return None

    async def close(self) -> None:
        self.closed.set()


class ScriptedRequests:
    """The request service's face, with one answer behind it."""

    def __init__(self, **script: Any) -> None:
        self.script = script
        self.answers: list[ScriptedAnswer] = []

    async def begin(self, request: InferenceRequest) -> ScriptedAnswer:
        self.answers.append(ScriptedAnswer(request, [b"data: 1\n\n", b"data: 2\n\n"], **self.script))
        return self.answers[-1]


class Served:
    def __init__(self, authority: CertificateAuthority, requests: ScriptedRequests) -> None:
        self.requests = requests
        self._authority = authority
        self._server = build_grpc_server(
            grant(authority),
            interceptor(),
            enrolment=node_pb2_grpc.EnrolmentServiceServicer(),
            inference=InferenceServicer(cast("RequestService", requests), Metrics(), SystemClock()),
            account=account_pb2_grpc.AccountServiceServicer(),
            pool=pool_pb2_grpc.PoolServiceServicer(),
        )

    async def __aenter__(self) -> Self:
        port = await self._server.start("127.0.0.1", 0)
        credentials = grpc.ssl_channel_credentials(self._authority.ca_certificate_pem.encode())
        self.channel = grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=CHANNEL_OPTIONS)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self._server.stop(0)

    def generate(self, body: bytes = BODY, endpoint: int = common_pb2.ENDPOINT_CHAT_COMPLETIONS) -> Any:
        request = inference_pb2.GenerateRequest(endpoint=cast("Any", endpoint), body_json=body)
        metadata = (("authorization", f"Bearer {KEY}"), ("x-request-id", "mine"))
        return inference_pb2_grpc.InferenceServiceStub(self.channel).Generate(request, metadata=metadata)


async def failure_code(call: Any) -> tuple[str, list[bytes]]:
    got: list[bytes] = []

    async def read() -> None:
        async for event in call:
            got.extend([event.data] if event.HasField("data") else [])

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    raw = dict(caught.value.trailing_metadata() or ()).get(ERROR_DETAIL, b"")
    assert isinstance(raw, bytes)
    return common_pb2.ErrorDetail.FromString(raw).code, got


async def test_a_whole_answer(authority: CertificateAuthority) -> None:
    async with Served(authority, ScriptedRequests()) as served:
        events = [event async for event in served.generate()]
    (answer,) = served.requests.answers
    assert (answer.request.account_id, answer.request.request_id, answer.request.stream) == ("acct_user", "mine", True)
    assert events[0].placed == inference_pb2.Placed(request_id="mine", node_id="n" * 26, model_id="m")
    assert [event.data for event in events[1:-1]] == [b"data: 1\n\n", b"data: 2\n\n"]
    usage = common_pb2.Usage(prompt_token_count=3, completion_token_count=5, cached_prompt_token_count=1)
    assert events[-1].finished == inference_pb2.Finished(usage=usage, charge_micro_credits=23)
    assert answer.closed.is_set()


async def test_a_broken_answer_keeps_its_part_and_never_finishes(authority: CertificateAuthority) -> None:
    async with Served(authority, ScriptedRequests(breaks=PotluckError(ErrorCode.NODE_LOST))) as served:
        assert await failure_code(served.generate()) == ("node_lost", [b"data: 1\n\n", b"data: 2\n\n"])
    assert served.requests.answers[0].closed.is_set()


async def test_a_client_that_goes_closes_the_answer(authority: CertificateAuthority) -> None:
    async with Served(authority, ScriptedRequests(hangs=True)) as served:
        call = served.generate()
        await call.read()
        call.cancel()
        async with asyncio.timeout(1):
            await served.requests.answers[0].closed.wait()


@pytest.mark.parametrize(("body", "endpoint"), [(b"junk", 1), (b"{}", 1), (BODY, 0), (BODY, 99)])
async def test_bad_requests_go_no_further(authority: CertificateAuthority, body: bytes, endpoint: int) -> None:
    async with Served(authority, ScriptedRequests()) as served:
        assert await failure_code(served.generate(body, endpoint)) == ("invalid_request", [])
    assert served.requests.answers == []


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
