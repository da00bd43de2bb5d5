"""The SDK of a Potluck pool.

    from potluck import Client

    with Client() as pool:                       # POTLUCK_URL and POTLUCK_API_KEY
        print(pool.chat("Why is the sky blue?").text)

Decides what is public: the names below, and nothing else. They are loaded when they are first used, so that the `potluck` command can
settle Ctrl-C and what gRPC reads before anything heavy is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potluck.client import AsyncClient, Client
    from potluck.errors import (
        AlreadyExistsError,
        AnswerLostError,
        BusyError,
        ContextLengthExceededError,
        CoordinatorUnavailableError,
        CredentialError,
        EngineFailedError,
        IdempotencyKeyInFlightError,
        IdempotencyKeyReusedError,
        IdempotencyKeySpentError,
        InsufficientCreditsError,
        InternalError,
        InvalidApiKeyError,
        InvalidCertificateError,
        InvalidInviteError,
        InvalidRequestError,
        MethodNotAllowedError,
        ModelNotFoundError,
        NoCapacityError,
        NodeLostError,
        NotFoundError,
        NotPermittedError,
        PoolError,
        PoolTimeoutError,
        ProtocolVersionUnsupportedError,
        QueueFullError,
        QueueTimeoutError,
        QuotaExceededError,
        RateLimitedError,
        RequestCancelledError,
        RequestRefusedError,
        RequestTooLargeError,
    )
    from potluck.results import ChatResult, Credits, ModelInfo, NodeInfo
    from potluck.streams import AsyncChatStream, ChatStream
    from potluck_protocol.errors import ErrorCode
    from potluck_protocol.values import Usage

__all__ = [
    "AlreadyExistsError",
    "AnswerLostError",
    "AsyncChatStream",
    "AsyncClient",
    "BusyError",
    "ChatResult",
    "ChatStream",
    "Client",
    "ContextLengthExceededError",
    "CoordinatorUnavailableError",
    "CredentialError",
    "Credits",
    "EngineFailedError",
    "ErrorCode",
    "IdempotencyKeyInFlightError",
    "IdempotencyKeyReusedError",
    "IdempotencyKeySpentError",
    "InsufficientCreditsError",
    "InternalError",
    "InvalidApiKeyError",
    "InvalidCertificateError",
    "InvalidInviteError",
    "InvalidRequestError",
    "MethodNotAllowedError",
    "ModelInfo",
    "ModelNotFoundError",
    "NoCapacityError",
    "NodeInfo",
    "NodeLostError",
    "NotFoundError",
    "NotPermittedError",
    "PoolError",
    "PoolTimeoutError",
    "ProtocolVersionUnsupportedError",
    "QueueFullError",
    "QueueTimeoutError",
    "QuotaExceededError",
    "RateLimitedError",
    "RequestCancelledError",
    "RequestRefusedError",
    "RequestTooLargeError",
    "Usage",
]

_MODULES = (
    "potluck.client",
    "potluck.errors",
    "potluck.results",
    "potluck.streams",
    "potluck_protocol.errors",
    "potluck_protocol.values",
)


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in map(import_module, _MODULES):
            if name in vars(module):
                found: object = vars(module)[name]
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
