"""The one error catalogue: code, gRPC status, HTTP status, public text.

Decides how a failure looks to whoever called, on every surface. It must not know where the failure happened: the edges translate a
`PotluckError` with this table, its message included, for which whoever raised it answers word by word; of everything else only
`internal_error` leaves a process, and none of its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import grpc


class ErrorCode(StrEnum):
    """The stable name of a failure, the same in OpenAI bodies, gRPC trailers and SDK classes."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    REQUEST_TOO_LARGE = "request_too_large"
    INVALID_API_KEY = "invalid_api_key"
    INVALID_INVITE = "invalid_invite"
    INVALID_CERTIFICATE = "invalid_certificate"
    PERMISSION_DENIED = "permission_denied"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    ALREADY_EXISTS = "already_exists"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    IDEMPOTENCY_KEY_SPENT = "idempotency_key_spent"
    IDEMPOTENCY_KEY_IN_FLIGHT = "idempotency_key_in_flight"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    RATE_LIMITED = "rate_limited"
    QUOTA_EXCEEDED = "quota_exceeded"
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    NO_CAPACITY = "no_capacity"
    NODE_LOST = "node_lost"
    ENGINE_FAILED = "engine_failed"
    REQUEST_REFUSED = "request_refused"
    COORDINATOR_UNAVAILABLE = "coordinator_unavailable"
    PROTOCOL_VERSION_UNSUPPORTED = "protocol_version_unsupported"
    CANCELLED = "cancelled"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """How one code looks on each surface; `openai_type` is the `type` field of OpenAI's error body."""

    grpc_status: grpc.StatusCode
    http_status: int
    openai_type: str
    public_text: str
    openai_code: str | None = None
    """Where OpenAI has its own word for it, which its clients look for."""
    retry_is_safe: bool = False
    """Nothing was produced or charged, and the same request may well succeed later."""


_STATUS = grpc.StatusCode

CATALOGUE: Final[dict[ErrorCode, ErrorSpec]] = {
    ErrorCode.INVALID_REQUEST: ErrorSpec(_STATUS.INVALID_ARGUMENT, 400, "invalid_request_error", "The request is not valid."),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: ErrorSpec(
        _STATUS.OUT_OF_RANGE, 400, "invalid_request_error", "The prompt and the answer asked for do not fit the model's context."
    ),
    ErrorCode.REQUEST_TOO_LARGE: ErrorSpec(_STATUS.INVALID_ARGUMENT, 413, "invalid_request_error", "The request body is too large."),
    ErrorCode.INVALID_API_KEY: ErrorSpec(
        _STATUS.UNAUTHENTICATED, 401, "authentication_error", "The API key is missing, unknown, expired or revoked."
    ),
    ErrorCode.INVALID_INVITE: ErrorSpec(
        _STATUS.UNAUTHENTICATED, 401, "authentication_error", "The invite is unknown, expired, revoked or already used."
    ),
    ErrorCode.INVALID_CERTIFICATE: ErrorSpec(
        _STATUS.UNAUTHENTICATED, 401, "authentication_error", "The node's certificate is not one this pool accepts now."
    ),
    ErrorCode.PERMISSION_DENIED: ErrorSpec(_STATUS.PERMISSION_DENIED, 403, "permission_error", "This credential may not do that."),
    ErrorCode.MODEL_NOT_FOUND: ErrorSpec(_STATUS.NOT_FOUND, 404, "invalid_request_error", "The pool has no such model."),
    ErrorCode.NOT_FOUND: ErrorSpec(_STATUS.NOT_FOUND, 404, "invalid_request_error", "There is no such thing here."),
    ErrorCode.METHOD_NOT_ALLOWED: ErrorSpec(_STATUS.UNIMPLEMENTED, 405, "invalid_request_error", "This path does not take that method."),
    ErrorCode.ALREADY_EXISTS: ErrorSpec(_STATUS.ALREADY_EXISTS, 409, "invalid_request_error", "That already exists."),
    ErrorCode.IDEMPOTENCY_KEY_REUSED: ErrorSpec(
        _STATUS.INVALID_ARGUMENT, 422, "invalid_request_error", "This idempotency key was used for another request."
    ),
    ErrorCode.IDEMPOTENCY_KEY_SPENT: ErrorSpec(
        _STATUS.ALREADY_EXISTS, 409, "invalid_request_error", "This request was run already, and its answer is no longer kept."
    ),
    ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT: ErrorSpec(
        _STATUS.UNAVAILABLE, 409, "invalid_request_error", "This request is being answered already.", retry_is_safe=True
    ),
    ErrorCode.INSUFFICIENT_CREDITS: ErrorSpec(
        _STATUS.FAILED_PRECONDITION,
        429,
        "insufficient_quota",
        "The account has too few credits for what this request could cost.",
        openai_code="insufficient_quota",
    ),
    ErrorCode.RATE_LIMITED: ErrorSpec(
        _STATUS.RESOURCE_EXHAUSTED,
        429,
        "rate_limit_error",
        "The account has had its requests of the default tier.",
        openai_code="rate_limit_exceeded",
        retry_is_safe=True,
    ),
    ErrorCode.QUOTA_EXCEEDED: ErrorSpec(
        _STATUS.RESOURCE_EXHAUSTED,
        429,
        "rate_limit_error",
        "The API key has used what it may.",
        openai_code="rate_limit_exceeded",
        retry_is_safe=True,
    ),
    ErrorCode.QUEUE_FULL: ErrorSpec(
        _STATUS.RESOURCE_EXHAUSTED,
        429,
        "rate_limit_error",
        "More waits for the model than it can begin in time.",
        openai_code="rate_limit_exceeded",
        retry_is_safe=True,
    ),
    ErrorCode.QUEUE_TIMEOUT: ErrorSpec(
        _STATUS.UNAVAILABLE, 503, "server_error", "No slot of the model became free in time.", retry_is_safe=True
    ),
    ErrorCode.NO_CAPACITY: ErrorSpec(_STATUS.UNAVAILABLE, 503, "server_error", "No node serves the model right now.", retry_is_safe=True),
    ErrorCode.NODE_LOST: ErrorSpec(_STATUS.ABORTED, 502, "server_error", "The node that was answering is gone."),
    ErrorCode.ENGINE_FAILED: ErrorSpec(_STATUS.ABORTED, 502, "server_error", "The engine broke the answer off."),
    ErrorCode.REQUEST_REFUSED: ErrorSpec(
        _STATUS.FAILED_PRECONDITION,
        422,
        "invalid_request_error",
        "Engines died while they worked on this request, more than once, so it is not run again. Send another.",
    ),
    ErrorCode.COORDINATOR_UNAVAILABLE: ErrorSpec(
        _STATUS.UNAVAILABLE, 503, "server_error", "The coordinator cannot be reached or is starting.", retry_is_safe=True
    ),
    ErrorCode.PROTOCOL_VERSION_UNSUPPORTED: ErrorSpec(
        _STATUS.FAILED_PRECONDITION, 400, "invalid_request_error", "The two sides speak versions too far apart; upgrade the older."
    ),
    ErrorCode.CANCELLED: ErrorSpec(_STATUS.CANCELLED, 499, "server_error", "The client went away."),
    ErrorCode.INTERNAL_ERROR: ErrorSpec(_STATUS.INTERNAL, 500, "server_error", "Something failed inside the coordinator."),
}


class PotluckError(Exception):
    """A failure with a place in the catalogue.

    Args:
        code: what failed.
        message: public text, more exact than the catalogue's; it reaches the caller, so it never quotes a prompt or a secret.
        param: the request field at fault.
        request_id: the request it happened to.
        retry_after_seconds: when trying again makes sense.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str | None = None,
        *,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.code = code
        self.message = message or CATALOGUE[code].public_text
        self.param = param
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{code}: {self.message}")

    def __reduce__(self) -> tuple[object, ...]:
        """Keyword arguments survive the way between processes."""
        return _rebuild, (self.code, self.message, self.param, self.request_id, self.retry_after_seconds)

    @property
    def spec(self) -> ErrorSpec:
        """The catalogue's row for this failure."""
        return CATALOGUE[self.code]


def _rebuild(code: ErrorCode, message: str, param: str | None, request_id: str | None, retry_after_seconds: float | None) -> PotluckError:
    return PotluckError(code, message, param=param, request_id=request_id, retry_after_seconds=retry_after_seconds)
