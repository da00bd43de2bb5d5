"""The SDK's exceptions: one class per code of the catalogue, under one root.

    PotluckError                      potluck_protocol.errors; also what the coordinator's own code raises
    └── PoolError                     code, message, param, request_id, retry_after_seconds, partial_text, outcome_unknown
        ├── InvalidRequestError
        │   ├── ContextLengthExceededError
        │   ├── RequestTooLargeError
        │   ├── RequestRefusedError
        │   ├── MethodNotAllowedError
        │   ├── AlreadyExistsError
        │   ├── IdempotencyKeyReusedError
        │   └── IdempotencyKeySpentError
        ├── CredentialError           the pool does not know, or does not allow, whoever asks
        │   ├── InvalidApiKeyError
        │   ├── InvalidInviteError
        │   ├── InvalidCertificateError
        │   └── NotPermittedError
        ├── NotFoundError
        │   └── ModelNotFoundError
        ├── InsufficientCreditsError
        ├── BusyError                 try again later; `retry_after_seconds` may say when
        │   ├── RateLimitedError
        │   ├── QuotaExceededError
        │   ├── QueueFullError
        │   ├── QueueTimeoutError
        │   ├── NoCapacityError
        │   └── IdempotencyKeyInFlightError
        ├── AnswerLostError           the answer broke off; `partial_text` holds what had arrived
        │   ├── NodeLostError
        │   └── EngineFailedError
        ├── CoordinatorUnavailableError
        ├── ProtocolVersionUnsupportedError
        ├── RequestCancelledError
        │   └── PoolTimeoutError      the caller's own time limit; also a built-in TimeoutError
        └── InternalError

Decides which class a failed call raises. It must not know which call it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import common_pb2


class PoolError(PotluckError):
    """A call to a pool that failed.

    Attributes:
        code: its place in the error catalogue.
        message: what happened and, where there is one, the way out.
        param: the request field at fault, or None.
        request_id: the request it happened to, or None if it never became one.
        retry_after_seconds: when trying again makes sense, or None.
        partial_text: what of the answer had arrived.
        outcome_unknown: the request was sent and the pool did not say what became of it. It may have run, and cost.
    """

    partial_text: str = ""
    outcome_unknown: bool = False

    @property
    def retry_is_safe(self) -> bool:
        """Whether nothing was produced or charged, and the same request may well succeed later."""
        return self.spec.retry_is_safe and not self.outcome_unknown

    def __reduce__(self) -> tuple[object, ...]:
        known = {"param": self.param, "request_id": self.request_id, "retry_after_seconds": self.retry_after_seconds}
        return _rebuild, (type(self), self.code, self.message, known, vars(self))


class InvalidRequestError(PoolError):
    """The request cannot be right as it stands."""


class ContextLengthExceededError(InvalidRequestError):
    """Prompt and answer together do not fit the model's context."""


class RequestTooLargeError(InvalidRequestError):
    """The request body is over the pool's bound."""


class RequestRefusedError(InvalidRequestError):
    """Engines died of this request more than once, so the pool does not run it again."""


class MethodNotAllowedError(InvalidRequestError):
    """The path does not take that method."""


class AlreadyExistsError(InvalidRequestError):
    """What was to be made is there already."""


class IdempotencyKeyReusedError(InvalidRequestError):
    """The idempotency key was used for another request within a day."""


class IdempotencyKeySpentError(InvalidRequestError):
    """The request under this idempotency key was run already, and its answer is no longer kept. The message says as which request."""


class CredentialError(PoolError):
    """The pool does not know, or does not allow, whoever asks."""


class InvalidApiKeyError(CredentialError):
    """The API key is missing, unknown, expired or revoked."""


class InvalidInviteError(CredentialError):
    """The invite is unknown, expired, revoked or already used."""


class InvalidCertificateError(CredentialError):
    """A certificate is not the one this pool vouches for."""


class NotPermittedError(CredentialError):
    """The key is good, but not for this."""


class NotFoundError(PoolError):
    """There is no such thing in the pool."""


class ModelNotFoundError(NotFoundError):
    """The pool has no such model."""


class InsufficientCreditsError(PoolError):
    """The account has too few credits for what the request could cost."""


class BusyError(PoolError):
    """The pool cannot take the request now. Nothing was produced or charged."""


class RateLimitedError(BusyError):
    """The account has had its requests of the default tier; the flex tier is open."""


class QuotaExceededError(BusyError):
    """The API key has used what it may of requests, tokens or credits a day, or of requests at a time."""


class QueueFullError(BusyError):
    """More waits for the model than it can begin in time."""


class QueueTimeoutError(BusyError):
    """No slot of the model became free in time."""


class NoCapacityError(BusyError):
    """No node serves the model right now."""


class IdempotencyKeyInFlightError(BusyError):
    """The request under this idempotency key is being answered already, to somebody else."""


class AnswerLostError(PoolError):
    """The answer broke off. What arrived is in `partial_text`, and only that was paid for."""


class NodeLostError(AnswerLostError):
    """The node that was answering is gone."""


class EngineFailedError(AnswerLostError):
    """The engine broke the answer off."""


class CoordinatorUnavailableError(PoolError):
    """The coordinator cannot be reached or is starting."""


class ProtocolVersionUnsupportedError(PoolError):
    """This SDK and the coordinator are versions too far apart."""


class RequestCancelledError(PoolError):
    """The caller took the request back."""


class PoolTimeoutError(RequestCancelledError, TimeoutError):
    """The caller's own time limit ran out."""


class InternalError(PoolError):
    """Something failed inside the coordinator."""


CLASS_OF_CODE: Final[dict[ErrorCode, type[PoolError]]] = {
    ErrorCode.INVALID_REQUEST: InvalidRequestError,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: ContextLengthExceededError,
    ErrorCode.REQUEST_TOO_LARGE: RequestTooLargeError,
    ErrorCode.INVALID_API_KEY: InvalidApiKeyError,
    ErrorCode.INVALID_INVITE: InvalidInviteError,
    ErrorCode.INVALID_CERTIFICATE: InvalidCertificateError,
    ErrorCode.PERMISSION_DENIED: NotPermittedError,
    ErrorCode.MODEL_NOT_FOUND: ModelNotFoundError,
    ErrorCode.NOT_FOUND: NotFoundError,
    ErrorCode.METHOD_NOT_ALLOWED: MethodNotAllowedError,
    ErrorCode.ALREADY_EXISTS: AlreadyExistsError,
    ErrorCode.IDEMPOTENCY_KEY_REUSED: IdempotencyKeyReusedError,
    ErrorCode.IDEMPOTENCY_KEY_SPENT: IdempotencyKeySpentError,
    ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT: IdempotencyKeyInFlightError,
    ErrorCode.INSUFFICIENT_CREDITS: InsufficientCreditsError,
    ErrorCode.RATE_LIMITED: RateLimitedError,
    ErrorCode.QUOTA_EXCEEDED: QuotaExceededError,
    ErrorCode.QUEUE_FULL: QueueFullError,
    ErrorCode.QUEUE_TIMEOUT: QueueTimeoutError,
    ErrorCode.NO_CAPACITY: NoCapacityError,
    ErrorCode.NODE_LOST: NodeLostError,
    ErrorCode.ENGINE_FAILED: EngineFailedError,
    ErrorCode.REQUEST_REFUSED: RequestRefusedError,
    ErrorCode.COORDINATOR_UNAVAILABLE: CoordinatorUnavailableError,
    ErrorCode.PROTOCOL_VERSION_UNSUPPORTED: ProtocolVersionUnsupportedError,
    ErrorCode.CANCELLED: RequestCancelledError,
    ErrorCode.INTERNAL_ERROR: InternalError,
}

# What a bare gRPC status means: one that gRPC itself, not the coordinator's own code, has set.
_CODE_OF_BARE_STATUS: Final[dict[grpc.StatusCode, tuple[ErrorCode, str | None]]] = {
    grpc.StatusCode.UNAVAILABLE: (
        ErrorCode.COORDINATOR_UNAVAILABLE,
        "The coordinator's gRPC port does not answer, or its certificate is another pool's; is it running?",
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (ErrorCode.QUEUE_FULL, "The coordinator has as many open calls as it takes; try again."),
    grpc.StatusCode.UNIMPLEMENTED: (
        ErrorCode.PROTOCOL_VERSION_UNSUPPORTED,
        "The coordinator does not know this call; upgrade the older side.",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (ErrorCode.INVALID_API_KEY, None),
    grpc.StatusCode.PERMISSION_DENIED: (ErrorCode.PERMISSION_DENIED, None),
    grpc.StatusCode.CANCELLED: (ErrorCode.CANCELLED, None),
}

# How gRPC says that a call found no connection and never left this process. Other words than these count as sent: the safe side.
_WORDS_FOR_NOT_SENT: Final = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")


class FailedCall(Protocol):
    """What the errors of grpc and grpc.aio have in common."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def pool_error(
    code: ErrorCode,
    message: str | None = None,
    *,
    param: str | None = None,
    request_id: str | None = None,
    retry_after_seconds: float | None = None,
) -> PoolError:
    """The exception of a code."""
    return CLASS_OF_CODE[code](code, message, param=param, request_id=request_id, retry_after_seconds=retry_after_seconds)


def error_of_protocol(error: PotluckError) -> PoolError:
    """The SDK's exception for a failure that `potluck_protocol` raised on this side."""
    return pool_error(
        error.code, error.message, param=error.param, request_id=error.request_id, retry_after_seconds=error.retry_after_seconds
    )


def error_of_answer(error: grpc.RpcError, timeout_seconds: float, request_id: str | None = None) -> PoolError:
    """As `error_of_call`, for a request that costs.

    Only two things say that nothing ran: the coordinator's own word, and gRPC's that it found no connection to send the request over. Any
    other status that gRPC set leaves it open: the connection may have broken on the way there or on the way back.
    """
    failed = cast(FailedCall, error)
    if _error_detail(failed) is not None or (failed.details() or "").startswith(_WORDS_FOR_NOT_SENT):
        return error_of_call(error, timeout_seconds, request_id)
    if failed.code() is grpc.StatusCode.UNAVAILABLE:
        message = "The connection to the coordinator broke before the answer was complete; the request may have run, and cost."
        failure = pool_error(ErrorCode.COORDINATOR_UNAVAILABLE, message, request_id=request_id)
    else:
        failure = error_of_call(error, timeout_seconds, request_id)
    failure.outcome_unknown = True
    return failure


def error_of_call(error: grpc.RpcError, timeout_seconds: float, request_id: str | None = None) -> PoolError:
    """The exception for a failed gRPC call.

    Args:
        error: as grpc or grpc.aio raised it.
        timeout_seconds: the limit that the call ran under, for the message if it ran out.
        request_id: the request's id if the pool had given it one.
    """
    failed = cast(FailedCall, error)
    status = failed.code()
    if (detail := _error_detail(failed)) is not None:
        return pool_error(
            ErrorCode(detail.code),
            detail.message or None,
            param=detail.param or None,
            request_id=detail.request_id or request_id,
            retry_after_seconds=detail.retry_after_ms / 1000 if detail.retry_after_ms else None,
        )
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"The answer was not complete within the limit of {timeout_seconds:g} s (timeout_seconds); the request was taken back."
        return PoolTimeoutError(ErrorCode.CANCELLED, message, request_id=request_id)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (failed.details() or ""):
        return pool_error(ErrorCode.REQUEST_TOO_LARGE, request_id=request_id)
    code, bare_message = _CODE_OF_BARE_STATUS.get(status or grpc.StatusCode.UNKNOWN, (ErrorCode.INTERNAL_ERROR, None))
    return pool_error(code, bare_message, request_id=request_id)


def _error_detail(failed: FailedCall) -> common_pb2.ErrorDetail | None:
    """The coordinator's own word on the failure; None if there is none that this version understands."""
    for key, value in failed.trailing_metadata() or ():
        if key == ERROR_DETAIL and isinstance(value, bytes):
            try:
                detail = common_pb2.ErrorDetail.FromString(value)
                ErrorCode(detail.code)
            except (DecodeError, ValueError):
                return None
            return detail
    return None


def _rebuild(error_class: type[PoolError], code: ErrorCode, message: str, known: dict[str, Any], attributes: dict[str, Any]) -> PoolError:
    error = error_class(code, message, **known)
    vars(error).update(attributes)
    return error
