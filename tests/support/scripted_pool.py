"""A pool for the SDK's tests: the contract over real TLS gRPC and a real connection document, with scripted answers behind it.

Decides only what each `Generate` call does next. It stands in for the coordinator's inside, never for its wire.
"""

# ruff: noqa: N802 - the contract's names
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.channels import SERVER_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import CONNECTION_PATH, ERROR_DETAIL
from potluck_protocol.v1 import (
    account_pb2,
    account_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    node_pb2,
    pool_pb2,
    pool_pb2_grpc,
)
from potluck_protocol.version import PROTOCOL_VERSION

API_KEY = "sk-potluck-testtest-" + "s" * 43
MODEL = "scripted-model"
NODE = "a" * 26
REQUEST = "req_scripted"

Event = inference_pb2.GenerateResponse
Play = Callable[[inference_pb2.GenerateRequest, grpc.ServicerContext], Iterator[Event]]


def placed() -> Event:
    return Event(placed=inference_pb2.Placed(request_id=REQUEST, node_id=NODE, model_id=MODEL))


def finished(prompt: int = 3, completion: int = 5, charge: int = 23) -> Event:
    usage = common_pb2.Usage(prompt_token_count=prompt, completion_token_count=completion)
    return Event(finished=inference_pb2.Finished(usage=usage, charge_micro_credits=charge))


def data(*pieces: bytes) -> list[Event]:
    return [Event(data=piece) for piece in pieces]


def abort(context: grpc.ServicerContext, error: PotluckError) -> None:
    detail = common_pb2.ErrorDetail(
        code=error.code,
        message=error.message,
        request_id=REQUEST,
        param=error.param or "",
        retry_after_ms=int((error.retry_after_seconds or 0) * 1000),
    )
    context.set_trailing_metadata(((ERROR_DETAIL, detail.SerializeToString()),))
    context.abort(error.spec.grpc_status, error.message)


def answers(*events: Event) -> Play:
    """Places the request, then sends the events."""
    return lambda _request, _context: iter([placed(), *events])


def refuses(code: ErrorCode, retry_after_seconds: float | None = None) -> Play:
    """Refuses before the request is placed."""

    def play(_request: inference_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        abort(context, PotluckError(code, f"scripted {code}", param="model", retry_after_seconds=retry_after_seconds))
        yield placed()  # not reached: abort raises

    return play


def breaks(code: ErrorCode, *events: Event) -> Play:
    """Fails after the events."""

    def play(_request: inference_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        yield placed()
        yield from events
        abort(context, PotluckError(code))

    return play


def drops(status: grpc.StatusCode) -> Play:
    """Takes the request and ends without the coordinator's own word, as a connection that breaks does."""

    def play(_request: inference_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        context.abort(status, "Socket closed")
        yield placed()  # not reached: abort raises

    return play


def hangs(cancelled: threading.Event, *events: Event) -> Play:
    """Sends the events, then nothing until the client has gone, which it marks."""

    def play(_request: inference_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        gone = threading.Event()
        context.add_callback(gone.set)
        try:
            yield placed()
            yield from events
            gone.wait(30)
        finally:
            # Also where gRPC closes the generator between two events.
            if gone.wait(5):
                cancelled.set()

    return play


@dataclass
class ScriptedPool:
    """Where it listens, what it will do, and what it was asked."""

    url: str = ""
    plays: deque[Play] = field(default_factory=deque)
    bodies: list[bytes] = field(default_factory=list)
    authorisations: list[str] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    """Of each `Generate` its idempotency key, and what it wants done when its client is gone."""
    unary_refusals: deque[PotluckError] = field(default_factory=deque)
    unary_calls: list[str] = field(default_factory=list)
    audit_pauses: int = 0
    """How often an audit is not over yet."""
    models: list[inference_pb2.Model] = field(default_factory=list)
    node_connection: str = "connected"
    node_trusted: bool = False
    operator_requests: list[Message] = field(default_factory=list)
    """What was asked about models and deployments."""
    operator_replies: deque[Message] = field(default_factory=deque)
    """What that is answered with, in turn; where there is nothing left, with an empty message."""

    def admit(self, name: str, context: grpc.ServicerContext) -> None:
        self.unary_calls.append(name)
        if self.unary_refusals:
            abort(context, self.unary_refusals.popleft())

    def reply(self, request: Message, empty: Message, context: grpc.ServicerContext) -> Any:
        """To the operator's call whose reply is of the kind of the empty one."""
        self.operator_requests.append(request)
        self.admit(type(request).__name__.removesuffix("Request"), context)
        reply = self.operator_replies.popleft() if self.operator_replies else empty
        assert type(reply) is type(empty)
        return reply


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, pool: ScriptedPool) -> None:
        self._pool = pool

    def Generate(self, request: Any, context: Any) -> Iterator[Event]:
        self._pool.bodies.append(request.body_json)
        metadata = dict(context.invocation_metadata())
        self._pool.authorisations.append(metadata.get("authorization", ""))
        self._pool.keys.append((metadata.get("idempotency-key", ""), metadata.get("potluck-when-gone", "")))
        return self._pool.plays.popleft()(request, context)

    def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        self._pool.admit("ListModels", context)
        shown = [model for model in self._pool.models if request.with_offers or not model.offered_repository]
        return inference_pb2.ListModelsResponse(models=shown)


class _Accounts(account_pb2_grpc.AccountServiceServicer):
    def __init__(self, pool: ScriptedPool) -> None:
        self._pool = pool

    def GetBalance(self, request: Any, context: Any) -> account_pb2.GetBalanceResponse:
        self._pool.admit("GetBalance", context)
        return account_pb2.GetBalanceResponse(
            account_id="acct_a", available_micro_credits=1_500_000, held_micro_credits=2, earned_micro_credits=3
        )

    def CreateKey(self, request: Any, context: Any) -> account_pb2.CreateKeyResponse:
        self._pool.admit("CreateKey", context)
        return account_pb2.CreateKeyResponse(key=account_pb2.ApiKey(key_prefix="abcdefgh"), secret="sk-potluck-abcdefgh-x")

    def CreateJoinToken(self, request: Any, context: Any) -> account_pb2.CreateJoinTokenResponse:
        self._pool.admit("CreateJoinToken", context)
        token = account_pb2.JoinToken(token_id="t" * 12, account_id="acct_a", expires_at_unix_ms=1_000)
        return account_pb2.CreateJoinTokenResponse(token=token, secret="z" * 43)

    def RevokeKey(self, request: Any, context: Any) -> account_pb2.RevokeKeyResponse:
        self._pool.admit("RevokeKey", context)
        return account_pb2.RevokeKeyResponse()

    def RevokeJoinToken(self, request: Any, context: Any) -> account_pb2.RevokeJoinTokenResponse:
        self._pool.admit("RevokeJoinToken", context)
        return account_pb2.RevokeJoinTokenResponse()

    def AuditLedger(self, request: Any, context: Any) -> account_pb2.AuditLedgerResponse:
        self._pool.admit("AuditLedger", context)
        if self._pool.unary_calls.count("AuditLedger") <= self._pool.audit_pauses:
            return account_pb2.AuditLedgerResponse(progress="5,000 postings looked at")
        return account_pb2.AuditLedgerResponse(account_count=4, findings=["acct_a: balance 3, postings 2"])


class _Pool(pool_pb2_grpc.PoolServiceServicer):
    def __init__(self, pool: ScriptedPool) -> None:
        self._pool = pool

    def ListNodes(self, request: Any, context: Any) -> pool_pb2.ListNodesResponse:
        self._pool.admit("ListNodes", context)
        engine = node_pb2.EngineStatus(replica_id="r1", model_id=MODEL, state=node_pb2.ENGINE_STATE_READY, slot_count=4)
        node = pool_pb2.Node(
            node_id=NODE,
            display_name="den",
            connection=self._pool.node_connection,
            state=node_pb2.NODE_STATE_SERVING,
            engines=[engine],
            up_minutes=7,
            trusted=self._pool.node_trusted,
        )
        return pool_pb2.ListNodesResponse(nodes=[node])

    def RevokeNode(self, request: Any, context: Any) -> pool_pb2.RevokeNodeResponse:
        self._pool.admit("RevokeNode", context)
        return pool_pb2.RevokeNodeResponse()

    def SetNodeTrust(self, request: Any, context: Any) -> pool_pb2.SetNodeTrustResponse:
        return self._pool.reply(request, pool_pb2.SetNodeTrustResponse(), context)

    def AddModel(self, request: Any, context: Any) -> pool_pb2.AddModelResponse:
        return self._pool.reply(request, pool_pb2.AddModelResponse(), context)

    def RemoveModel(self, request: Any, context: Any) -> pool_pb2.RemoveModelResponse:
        return self._pool.reply(request, pool_pb2.RemoveModelResponse(), context)

    def GetModel(self, request: Any, context: Any) -> pool_pb2.GetModelResponse:
        return self._pool.reply(request, pool_pb2.GetModelResponse(), context)

    def Deploy(self, request: Any, context: Any) -> pool_pb2.DeployResponse:
        return self._pool.reply(request, pool_pb2.DeployResponse(), context)

    def Undeploy(self, request: Any, context: Any) -> pool_pb2.UndeployResponse:
        return self._pool.reply(request, pool_pb2.UndeployResponse(), context)

    def ListDeployments(self, request: Any, context: Any) -> pool_pb2.ListDeploymentsResponse:
        return self._pool.reply(request, pool_pb2.ListDeploymentsResponse(), context)

    def ExplainDeployment(self, request: Any, context: Any) -> pool_pb2.ExplainDeploymentResponse:
        return self._pool.reply(request, pool_pb2.ExplainDeploymentResponse(), context)

    def ExplainRequest(self, request: Any, context: Any) -> pool_pb2.ExplainRequestResponse:
        return self._pool.reply(request, pool_pb2.ExplainRequestResponse(), context)

    def ExplainWaiting(self, request: Any, context: Any) -> pool_pb2.ExplainWaitingResponse:
        return self._pool.reply(request, pool_pb2.ExplainWaitingResponse(), context)

    def ExplainNode(self, request: Any, context: Any) -> pool_pb2.ExplainNodeResponse:
        return self._pool.reply(request, pool_pb2.ExplainNodeResponse(), context)

    def GetTiers(self, request: Any, context: Any) -> pool_pb2.GetTiersResponse:
        return self._pool.reply(request, pool_pb2.GetTiersResponse(), context)


@contextmanager
def scripted_pool(folder: Path) -> Iterator[ScriptedPool]:
    """A running `ScriptedPool`; everything it started has stopped when the block is left."""
    now_unix_ms = SystemClock().unix_ms()
    authority = CertificateAuthority.load_or_create(folder / "ca", now_unix_ms)
    identity = authority.issue_server_certificate(now_unix_ms)
    pool = ScriptedPool(
        models=[
            inference_pb2.Model(
                model_id=MODEL, ready_replica_count=1, endpoints=[common_pb2.ENDPOINT_CHAT_COMPLETIONS, common_pb2.ENDPOINT_COMPLETIONS]
            )
        ]
    )
    server = grpc.server(ThreadPoolExecutor(8), options=SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(pool), server)
    account_pb2_grpc.add_AccountServiceServicer_to_server(_Accounts(pool), server)
    pool_pb2_grpc.add_PoolServiceServicer_to_server(_Pool(pool), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(identity.private_key_pem, identity.certificate_chain_pem)]))
    document = ConnectionDocument(
        protocol_version=PROTOCOL_VERSION,
        pool_id="pool_scripted",
        grpc_port=port,
        link_port=port,
        host=None,
        ca_certificate_pem=identity.ca_certificate_pem,
    )
    http = ThreadingHTTPServer(("127.0.0.1", 0), _document_handler(document))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    server.start()
    thread.start()
    pool.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield pool
    finally:
        http.shutdown()
        http.server_close()
        thread.join(5)
        server.stop(0).wait(5)


def _document_handler(document: ConnectionDocument) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == CONNECTION_PATH else 404)
            self.end_headers()
            self.wfile.write(document.to_json())

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
