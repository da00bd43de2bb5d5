"""What happens around every gRPC call: who calls, whether they may, and how a failure leaves.

Decides nothing about who may call what (`authorisation` does) and nothing about a call's content. No exception's own text leaves here: a
`PotluckError` becomes its catalogue status with an `ErrorDetail`, and anything else becomes `internal_error` with an id that the log knows.

The work is per call, but for one thing: each message of a server stream is written under a 60 s limit, since a client that reads nothing
for so long has gone. The link writes for itself, without it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc
import structlog

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.gateway.authorisation import RPC_AUDIENCE, Audience, require
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.request_ids import request_id_of
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import node_id_of_certificate
from potluck_protocol.metadata import AUTHORIZATION, ERROR_DETAIL, REQUEST_ID
from potluck_protocol.v1 import common_pb2
from potluck_protocol.values import NodeId, RequestId

_log = structlog.get_logger()

STALL_SECONDS_MAX: Final = 60.0
"""A client that reads nothing for so long has gone, whatever its connection says; its engine is needed by others."""
ERROR_TEXT_CHARACTERS_MAX: Final = 400
"""It stands twice in the trailing metadata, at up to 17 bytes a character, and gRPC refuses some of what is over 8 KiB, by chance."""
_METHOD_PREFIX: Final = "/potluck_protocol.v1."

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(slots=True)
class Call:
    """One gRPC call as its servicer may know it."""

    method: str
    request_id: RequestId
    identity: KeyIdentity | None = None
    node_id: NodeId | None = None
    outcome: str = "ok"
    facts: dict[str, Any] = field(default_factory=dict)
    """What the servicer adds to the call's line in the log."""


_CALL: ContextVar[Call] = ContextVar("potluck_call")


def current_call() -> Call:
    """The call being served."""
    return _CALL.get()


def caller() -> KeyIdentity:
    """Whose key the call carries; raises PotluckError(INVALID_API_KEY) where it carries none."""
    identity = current_call().identity
    if identity is None:
        raise PotluckError(ErrorCode.INVALID_API_KEY)
    return identity


def calling_node() -> NodeId:
    """Whose certificate the link's connection showed; raises PotluckError(INVALID_CERTIFICATE) for a call that is no node's."""
    node_id = current_call().node_id
    if node_id is None:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE)
    return node_id


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call. It keeps no handlers, so that two ports may share it and each serves its own services only.

    Args:
        keys: whose API key it is.
        revoked_node_ids: the nodes that are no longer welcome, as of now.
        clock: for certificates' dates and durations.
    """

    def __init__(self, keys: KeyCache, revoked_node_ids: Callable[[], frozenset[NodeId]], clock: Clock) -> None:
        self._keys = keys
        self._revoked_node_ids = revoked_node_ids
        self._clock = clock

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]], handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        """The wrapped handler; methods that nobody serves stay UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(handler_call_details.method, handler)

    def _wrap(self, method: str, handler: _Handler) -> _Handler:
        make: Any
        inner: Any
        match (handler.request_streaming, handler.response_streaming):
            case (False, False):
                make, inner = grpc.unary_unary_rpc_method_handler, handler.unary_unary
            case (False, True):
                make, inner = grpc.unary_stream_rpc_method_handler, handler.unary_stream
            case (True, False):
                make, inner = grpc.stream_unary_rpc_method_handler, handler.stream_unary
            case _:
                make, inner = grpc.stream_stream_rpc_method_handler, handler.stream_stream

        async def serve(request: Any, context: _Context) -> Any:
            return await self._serve(method, inner, request, context, streams=handler.response_streaming)

        wrapped: _Handler = make(serve, handler.request_deserializer, handler.response_serializer)
        return wrapped

    async def _serve(self, method: str, inner: Callable[..., Any], request: Any, context: _Context, *, streams: bool) -> Any:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        call = Call(method, request_id_of(metadata.get(REQUEST_ID)))
        _CALL.set(call)
        started = self._clock.monotonic_seconds()
        try:
            context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
            await self._admit(call, metadata.get(AUTHORIZATION), context)
            if streams:
                return await _answer_stream(inner(request, context), context)
            return await inner(request, context)
        except PotluckError as error:
            call.outcome = str(error.code)
            await _abort(context, error, call.request_id)
        except asyncio.CancelledError:
            call.outcome = str(ErrorCode.CANCELLED)
            raise
        except Exception as error:  # noqa: BLE001 - the last place before the wire
            call.outcome = str(ErrorCode.INTERNAL_ERROR)
            _log_unexpected(call, error)
            await _abort(context, PotluckError(ErrorCode.INTERNAL_ERROR), call.request_id)
        finally:
            self._log_call(call, started)

    async def _admit(self, call: Call, authorization: str | None, context: _Context) -> None:
        """Establishes the caller and lets the call pass, or raises. A method without a row passes for nobody."""
        match RPC_AUDIENCE.get(call.method):
            case None:
                raise PotluckError(ErrorCode.PERMISSION_DENIED, "Nobody may call this method.")
            case Audience.ANYONE | Audience.JOINER:
                return
            case Audience.NODE:
                call.node_id = self._node_of(context)
            case audience:
                call.identity = await self._keys.identify(authorization)
                require(call.identity, audience)

    def _node_of(self, context: _Context) -> NodeId:
        shown = tuple(context.auth_context().get("x509_pem_cert", ()))
        if len(shown) != 1:
            raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The connection shows no node's certificate.")
        node_id = node_id_of_certificate(shown[0], self._clock.unix_ms())
        if node_id in self._revoked_node_ids():
            raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "This node was revoked; ask the pool's operator for a new invite.")
        return node_id

    def _log_call(self, call: Call, started_seconds: float) -> None:
        _log.info(
            "grpc_call",
            method=call.method.removeprefix(_METHOD_PREFIX),
            request_id=call.request_id,
            account_id=call.identity.account_id if call.identity else None,
            outcome=call.outcome,
            duration_ms=round((self._clock.monotonic_seconds() - started_seconds) * 1000, 1),
            **({"node_id": call.node_id} if call.node_id else {}),
            **call.facts,
        )


async def _answer_stream(answer: AsyncIterator[Any] | Awaitable[None], context: _Context) -> None:
    """Serves either shape of a streaming servicer: one that yields its messages, or one that writes them itself."""
    if isinstance(answer, Awaitable):
        await answer
        return
    # Closed at once when the client goes, not when the garbage collector comes by.
    async with aclosing(answer) as messages:  # type: ignore[type-var]
        async for message in messages:
            try:
                async with asyncio.timeout(STALL_SECONDS_MAX):
                    await context.write(message)
            except TimeoutError:
                raise PotluckError(ErrorCode.CANCELLED, f"The client read nothing for {STALL_SECONDS_MAX:.0f} s.") from None


async def _abort(context: _Context, error: PotluckError, request_id: RequestId) -> None:
    message = error.message[:ERROR_TEXT_CHARACTERS_MAX]
    detail = common_pb2.ErrorDetail(
        code=str(error.code),
        message=message,
        request_id=request_id,
        param=error.param or "",
        retry_after_ms=int((error.retry_after_seconds or 0) * 1000),
    )
    trailing = ((REQUEST_ID, request_id), (ERROR_DETAIL, detail.SerializeToString()))
    await context.abort(error.spec.grpc_status, message, trailing)


def _log_unexpected(call: Call, error: Exception) -> None:
    """Where it happened, but not the exception's own words: they may quote what must never be logged."""
    _log.error(
        "grpc_call_failed_unexpectedly",
        error_id=call.request_id,
        method=call.method.removeprefix(_METHOD_PREFIX),
        exception=type(error).__name__,
        stack=traceback.format_tb(error.__traceback__)[-8:],
    )
