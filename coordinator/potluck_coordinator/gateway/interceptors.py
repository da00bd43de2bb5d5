"""What happens around every gRPC call: who calls, whether they may, how a failure leaves, and the one log line of the call.

Decides nothing about who may call what (`authorisation` does) and nothing about a call's content; `key_cache` says whose key a call
carries. That a node's certificate names one is seen here; at each call `links` says who is out and whom the books know, and has to ask the
directory only of a node that has no session. A `PotluckError` becomes its catalogue status with an `ErrorDetail`, its message included;
anything else becomes `internal_error` with an id that the log knows, and none of its text leaves.

A call holds one of its port's places even while it says nothing. So the caller is looked at before the call's message is waited for, the
message has `BODY_SECONDS_MAX` to come, no caller has more than a part of the places, and all without a credential count as one. An answer
that nobody reads for `STALL_SECONDS_MAX` is given up; gRPC keeps its place until its client goes. The link reads and writes for itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.gateway.authorisation import RPC_AUDIENCE, UNIDENTIFIED, Audience, require, require_gateway, require_node
from potluck_coordinator.gateway.edges import BODY_SECONDS_MAX, STALL_SECONDS_MAX, log_unexpected
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.request_ids import request_id_of
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import gateway_epoch_of_certificate, node_id_of_certificate
from potluck_protocol.metadata import AUTHORIZATION, ERROR_DETAIL, REQUEST_ID
from potluck_protocol.v1 import common_pb2
from potluck_protocol.values import NodeId, RequestId

_log = structlog.get_logger()

UNIDENTIFIED_CALLS_MAX: Final = 128
"""Calls at a time that carry no credential, a small part of those that the grpc port serves (`grpc_server.CALLS_MAX`): whoever opens them
without end keeps boxes from joining, but nobody from their answers."""
CALLS_PER_ACCOUNT_MAX: Final = 512
"""Half of the grpc port's places, however many connections they come by."""
LINKS_PER_NODE_MAX: Final = 4
"""A node has one, and for a moment two while it moves; those it just lost may take their time to end."""
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
    gateway_epoch: int | None = None
    outcome: str = "ok"
    facts: dict[str, Any] = field(default_factory=dict)
    """What the servicer adds to the call's line in the log."""
    more_trailers: Callable[[], tuple[tuple[str, str], ...]] = tuple
    """Asked for at the call's end, whatever that is."""


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


def calling_gateway() -> int:
    """The epoch of the gateway whose certificate the connection showed; raises PotluckError(INVALID_CERTIFICATE) for any other call."""
    epoch = current_call().gateway_epoch
    if epoch is None:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE)
    return epoch


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
        outcasts: the nodes that are no longer welcome, as of now, and why.
        is_enrolled: whether the books have a node as an active one; may wait for a directory that is away.
        clock: for certificates' dates and durations.
        gateway_epochs: of the coordinator's gateways, as of now.
    """

    def __init__(
        self,
        keys: KeyCache,
        outcasts: Callable[[], Mapping[NodeId, str]],
        is_enrolled: Callable[[NodeId], Awaitable[bool]],
        clock: Clock,
        gateway_epochs: Callable[[], Collection[int]] = frozenset,
    ) -> None:
        self._keys = keys
        self._outcasts = outcasts
        self._is_enrolled = is_enrolled
        self._gateway_epochs = gateway_epochs
        self._clock = clock
        self._places: Counter[str] = Counter()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]], handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        """The wrapped handler; methods that nobody serves stay UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(handler_call_details.method, handler)

    def _wrap(self, method: str, handler: _Handler) -> _Handler:
        async def serve(requests: Any, context: _Context) -> None:
            await self._serve(method, handler, requests, context)

        # On the wire all four arities look alike. This is the one in which gRPC hands a call over before its message has come.
        wrapped: _Handler = grpc.stream_stream_rpc_method_handler(serve, handler.request_deserializer, handler.response_serializer)
        return wrapped

    async def _serve(self, method: str, handler: _Handler, requests: Any, context: _Context) -> None:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        call = Call(method, request_id_of(metadata.get(REQUEST_ID)))
        _CALL.set(call)
        started = self._clock.monotonic_seconds()
        try:
            context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
            await self._admit(call, metadata.get(AUTHORIZATION), context)
            with self._placed(call):
                await _answer(handler, requests, context)
            context.set_trailing_metadata(((REQUEST_ID, call.request_id), *call.more_trailers()))
        except PotluckError as error:
            call.outcome = str(error.code)
            await _abort(context, error, call.request_id, call.more_trailers())
        except asyncio.CancelledError:
            call.outcome = str(ErrorCode.CANCELLED)
            raise
        except Exception as error:  # noqa: BLE001 - the last place before the wire
            call.outcome = str(ErrorCode.INTERNAL_ERROR)
            log_unexpected("grpc_call_failed_unexpectedly", call.request_id, error, method=method.removeprefix(_METHOD_PREFIX))
            await _abort(context, PotluckError(ErrorCode.INTERNAL_ERROR), call.request_id)
        finally:
            self._log_call(call, started)

    @contextmanager
    def _placed(self, call: Call) -> Iterator[None]:
        """Gives a call one of its caller's places; raises COORDINATOR_UNAVAILABLE or QUEUE_FULL where all are taken."""
        if call.node_id is not None:
            caller_id, count_max = str(call.node_id), LINKS_PER_NODE_MAX
            full = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"This node has {count_max} links already.", retry_after_seconds=1)
        elif call.gateway_epoch is not None:
            caller_id, count_max = str(call.gateway_epoch), LINKS_PER_NODE_MAX
            full = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"This gateway has {count_max} links already.", retry_after_seconds=1)
        elif call.identity is not None:
            caller_id, count_max = str(call.identity.account_id), CALLS_PER_ACCOUNT_MAX
            full = PotluckError(ErrorCode.QUEUE_FULL, f"This account has {count_max} calls running already.", retry_after_seconds=1)
        else:
            caller_id, count_max = "", UNIDENTIFIED_CALLS_MAX
            message = "Too many callers want to join at this moment; try again in a few seconds."
            full = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, message, retry_after_seconds=5)
        if self._places[caller_id] >= count_max:
            raise full
        self._places[caller_id] += 1
        try:
            yield
        finally:
            self._places[caller_id] -= 1
            if not self._places[caller_id]:
                del self._places[caller_id]

    async def _admit(self, call: Call, authorization: str | None, context: _Context) -> None:
        """Establishes the caller and lets the call pass, or raises. A method without a row passes for nobody."""
        match RPC_AUDIENCE.get(call.method):
            case None:
                raise PotluckError(ErrorCode.PERMISSION_DENIED, "Nobody may call this method.")
            case audience if audience in UNIDENTIFIED:
                return
            case Audience.NODE:
                call.node_id = await self._node_of(context)
            case Audience.GATEWAY:
                call.gateway_epoch = gateway_epoch_of_certificate(_shown_certificate(context), self._clock.unix_ms())
                require_gateway(call.gateway_epoch, self._gateway_epochs())
            case audience:
                call.identity = await self._keys.identify(authorization)
                require(call.identity, audience)

    async def _node_of(self, context: _Context) -> NodeId:
        node_id = node_id_of_certificate(_shown_certificate(context), self._clock.unix_ms())
        reason = self._outcasts().get(node_id)
        require_node(reason, is_enrolled=reason is None and await self._is_enrolled(node_id))
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


def _shown_certificate(context: _Context) -> bytes:
    shown = tuple(context.auth_context().get("x509_pem_cert", ()))
    if len(shown) != 1:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The connection shows no certificate.")
    return bytes(shown[0])


async def _answer(handler: _Handler, requests: Any, context: _Context) -> None:
    """Runs the servicer's method, whatever its arity, and writes what it answers."""
    request = requests if handler.request_streaming else await _message(context)
    method: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    answer = method(request, context)
    if not handler.response_streaming:
        await _write(context, await answer)
    elif isinstance(answer, Awaitable):
        # It writes its messages itself.
        await answer
    else:
        # Closed at once when the client goes, not when the garbage collector comes by.
        async with aclosing(answer) as messages:
            async for message in messages:
                await _write(context, message)


async def _message(context: _Context) -> Any:
    """The one message of a call; raises INVALID_REQUEST where none comes in time, none at all, or one that cannot be read."""
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            message = await context.read()
    except TimeoutError:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"The call's message did not arrive within {BODY_SECONDS_MAX:.0f} s.") from None
    except DecodeError:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The call's message is not one of this method.") from None
    if message is grpc.aio.EOF:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The call came without its message.")
    return message


async def _write(context: _Context, message: Any) -> None:
    try:
        async with asyncio.timeout(STALL_SECONDS_MAX):
            await context.write(message)
    except TimeoutError:
        raise PotluckError(ErrorCode.CANCELLED, f"The client read nothing for {STALL_SECONDS_MAX:.0f} s.") from None


async def _abort(context: _Context, error: PotluckError, request_id: RequestId, more_trailers: tuple[tuple[str, str], ...] = ()) -> None:
    message = error.message[:ERROR_TEXT_CHARACTERS_MAX]
    detail = common_pb2.ErrorDetail(
        code=str(error.code),
        message=message,
        request_id=request_id,
        param=error.param or "",
        retry_after_ms=int((error.retry_after_seconds or 0) * 1000),
    )
    trailing: tuple[tuple[str, str | bytes], ...] = (
        (REQUEST_ID, request_id),
        (ERROR_DETAIL, detail.SerializeToString()),
        *more_trailers,
    )
    await context.abort(error.spec.grpc_status, message, trailing)
