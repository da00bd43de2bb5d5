"""The real grpc port over TLS on a real socket, in front of a request service whose answers the test writes down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Self, cast

import grpc

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.gateway.grpc_server import build_grpc_server
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.inference_servicer import InferenceServicer
from potluck_coordinator.gateway.interceptors import CallInterceptor
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_coordinator.gateway.rate_windows import Allowance
from potluck_coordinator.gateway.requests import RequestService
from potluck_coordinator.metrics import Metrics
from potluck_coordinator.pool_desk import GatewayGrant
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import account_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc, node_pb2_grpc, pool_pb2_grpc
from potluck_protocol.values import AccountId, KeyPrefix, NodeId, RequestId, Usage
from tests.support.key_desk import no_keys

CLOCK: Final = SystemClock()
USER_KEY: Final = "sk-potluck-useruser-" + "u" * 43
OTHER_KEY: Final = "sk-potluck-otherone-" + "t" * 43
OPERATOR_KEY: Final = "sk-potluck-operoper-" + "o" * 43
BODY: Final = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
CHAT: Final = common_pb2.ENDPOINT_CHAT_COMPLETIONS

_IDENTITIES: Final = {
    USER_KEY: KeyIdentity(KeyPrefix("useruser"), AccountId("acct_user"), operator=False, expires_at_unix_ms=0),
    OTHER_KEY: KeyIdentity(KeyPrefix("otherone"), AccountId("acct_other"), operator=False, expires_at_unix_ms=0),
    OPERATOR_KEY: KeyIdentity(KeyPrefix("operoper"), AccountId("acct_operator"), operator=True, expires_at_unix_ms=0),
}


async def _authenticate(secret: str) -> KeyIdentity:
    if secret not in _IDENTITIES:
        raise PotluckError(ErrorCode.INVALID_API_KEY)
    return _IDENTITIES[secret]


async def everybody_is_enrolled(_node_id: NodeId) -> bool:
    return True


def interceptor(outcasts: Mapping[NodeId, str] = MappingProxyType({})) -> CallInterceptor:
    return CallInterceptor(KeyCache(_authenticate, lambda: 1, CLOCK), lambda: outcasts, everybody_is_enrolled, CLOCK)


def grant(authority: CertificateAuthority) -> GatewayGrant:
    now_ms = CLOCK.unix_ms()
    return GatewayGrant(1, "pool", authority.issue_server_certificate(now_ms), authority.issue_gateway_certificate(1, now_ms))


@dataclass
class ScriptedAnswer:
    """Gives its pieces, so many times over, then hangs, breaks or ends."""

    request: InferenceRequest
    pieces: tuple[bytes, ...] = (b"data: 1\n\n", b"data: 2\n\n")
    repeats: int = 1
    hangs: bool = False
    breaks: PotluckError | None = None
    node_id: NodeId = field(default=NodeId("n" * 26))
    usage: Usage | None = None
    charge_micro_credits: int = 0
    taken_count: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    tier: ServiceTier = ServiceTier.FLEX

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    async def next_data(self) -> bytes | None:
        if self.taken_count < len(self.pieces) * self.repeats:
            self.taken_count += 1
            return self.pieces[(self.taken_count - 1) % len(self.pieces)]
        if self.hangs:
            await asyncio.Event().wait()
        if self.breaks is not None:
            raise self.breaks
        self.usage, self.charge_micro_credits = Usage(3, 5, 1), 23
        return None

    async def close(self) -> None:
        self.closed.set()


class ScriptedRequests:
    """The request service's face; every request gets an answer of the same script."""

    def __init__(self, **script: Any) -> None:
        self.script = script
        self.answers: list[ScriptedAnswer] = []
        self.began = asyncio.Event()

    def allowance(self, _account_id: AccountId) -> Allowance:
        return Allowance(limit_count=100, remaining_count=99, reset_seconds=36.0, window_seconds=3600)

    async def begin(self, request: InferenceRequest) -> ScriptedAnswer:
        self.answers.append(ScriptedAnswer(request, **self.script))
        self.began.set()
        return self.answers[-1]


def authorization(key: str | None) -> tuple[tuple[str, str], ...]:
    return () if key is None else (("authorization", f"Bearer {key}"),)


class GrpcEdge:
    """The port, served for as long as the block lasts, and a connection to it."""

    def __init__(
        self,
        authority: CertificateAuthority,
        requests: ScriptedRequests | None = None,
        pool: pool_pb2_grpc.PoolServiceServicer | None = None,
        keyed: Callable[[ScriptedRequests], KeyedRequests] | None = None,
    ) -> None:
        self.requests = requests or ScriptedRequests()
        self._credentials = grpc.ssl_channel_credentials(authority.ca_certificate_pem.encode())
        self._server = build_grpc_server(
            grant(authority),
            interceptor(),
            enrolment=node_pb2_grpc.EnrolmentServiceServicer(),
            inference=InferenceServicer(cast("RequestService", self.requests), (keyed or no_keys)(self.requests), Metrics(), CLOCK),
            account=account_pb2_grpc.AccountServiceServicer(),
            pool=pool or pool_pb2_grpc.PoolServiceServicer(),
        )

    async def __aenter__(self) -> Self:
        self._port = await self._server.start("127.0.0.1", 0)
        self.channel = self.new_channel()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self._server.stop(0)

    def new_channel(self) -> grpc.aio.Channel:
        """A connection of its own."""
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{self._port}", self._credentials, options=options)

    def generate(
        self, body: bytes = BODY, endpoint: int = CHAT, key: str | None = USER_KEY, channel: grpc.aio.Channel | None = None
    ) -> Any:
        request = inference_pb2.GenerateRequest(endpoint=cast("Any", endpoint), body_json=body)
        metadata = (*authorization(key), ("x-request-id", "mine"))
        return inference_pb2_grpc.InferenceServiceStub(channel or self.channel).Generate(request, metadata=metadata)


async def failure_code(call: Any) -> tuple[str, list[bytes]]:
    """What our side says of a call that fails, and the data that came before."""
    got: list[bytes] = []
    try:
        async for event in call:
            got.extend([event.data] if event.HasField("data") else [])
    except grpc.aio.AioRpcError as error:
        return code_in(error.trailing_metadata()), got
    raise AssertionError("the call ended well")


def code_in(trailing_metadata: Any) -> str:
    """The catalogue's code; empty where gRPC itself ended the call."""
    return detail_in(trailing_metadata).code


def detail_in(trailing_metadata: Any) -> common_pb2.ErrorDetail:
    """What our side says of a failure; empty where gRPC itself ended the call."""
    raw = dict(trailing_metadata or ()).get(ERROR_DETAIL, b"")
    assert isinstance(raw, bytes)
    return common_pb2.ErrorDetail.FromString(raw)
